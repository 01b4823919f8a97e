"""Every figure of the suite, in the order of the notebooks. One entry registers a figure."""

from collections.abc import Sequence

from glmlab.gallery import decoding, deployment, latency, memory, prompts, structure
from glmlab.gallery.plate import Entry, GalleryError

CATALOGUE = (
    Entry("bytes_by_precision", "00_deployment", "computed", deployment.bytes_by_precision),
    Entry("class_hierarchy", "01_class_hierarchy", "computed", structure.class_hierarchy),
    Entry("original_hierarchy", "01_class_hierarchy", "computed", structure.original_hierarchy),
    Entry("module_tree", "01_class_hierarchy", "computed", structure.module_tree),
    Entry("decode_steps", "02_one_decode_step", "measured", decoding.decode_steps_plate),
    Entry("decode_step_candidates", "02_one_decode_step", "computed", decoding.candidates),
    Entry("logit_lens", "02_one_decode_step", "computed", decoding.lens),
    Entry("prompt_tokens", "03_prompt_tokens", "computed", prompts.prompt_tokens),
    Entry("prompt_roles", "03_prompt_tokens", "computed", prompts.prompt_roles),
    Entry("prompt_formats", "03_prompt_tokens", "computed", prompts.prompt_formats),
    Entry("prompt_growth", "03_prompt_tokens", "computed", prompts.prompt_growth),
    Entry("memory_vs_context", "04_memory_vs_context", "measured, reported", memory.memory_vs_context),
    Entry("memory_forecast", "04_memory_vs_context", "forecast, measured, reported", memory.memory_forecast),
    Entry("why_the_curve_bends", "05_why_the_curve_bends", "forecast", memory.why_the_curve_bends),
    Entry("pools_before_the_move", "05_why_the_curve_bends", "forecast", memory.pools_before_the_move),
    Entry("pools_after_the_move", "05_why_the_curve_bends", "forecast", memory.pools_after_the_move),
    Entry("decode_latency", "06_decode_latency", "measured", latency.decode_latency),
    Entry("token_parts", "06_decode_latency", "measured", latency.token_parts),
    Entry("eager_and_compiled", "06_decode_latency", "measured", latency.eager_and_compiled),
    Entry("first_token", "06_decode_latency", "measured", latency.first_token),
    Entry("polling", "06_decode_latency", "measured", latency.polling),
    Entry("account_of_a_token", "06_decode_latency", "computed, measured, reported", latency.account_of_a_token),
)


def find_entries(names: Sequence[str]) -> tuple[Entry, ...]:
    """The entries of these names, in their order, or all of them; GalleryError for a name that is not there.

    Example:
        >>> [entry.notebook for entry in find_entries(["logit_lens"])]
        ['02_one_decode_step']
    """
    by_name = {entry.name: entry for entry in CATALOGUE}
    if unknown := [name for name in names if name not in by_name]:
        raise GalleryError(f"figure {unknown[0]!r} is not known. Choose from {', '.join(by_name)}.")
    return tuple(by_name[name] for name in dict.fromkeys(names)) or CATALOGUE
