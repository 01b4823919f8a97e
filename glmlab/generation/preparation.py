"""What a run of the loop begins with: prompt, settings and cache, checked before the first forward pass."""

import warnings
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from transformers import Cache, DynamicCache, GenerationConfig, StaticCache
from transformers.cache_utils import StaticLayer
from transformers.generation.configuration_utils import GenerationMode

from glmlab.core.errors import GlmlabError
from glmlab.models.compiling import static_cache_tokens
from glmlab.models.loading import LoadedModel

Prompt = str | Sequence[int] | Sequence[Sequence[int]]
"""A text, the ids of one sequence, or the ids of several (left-padded to one length)."""


class DecodeError(GlmlabError):
    """A prompt, cache or setting with which the loop cannot run; raised before the first forward pass."""


def encode_prompt(loaded: LoadedModel, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both (batch, tokens), left-padded; DecodeError for a prompt without a token."""
    if isinstance(prompt, str):
        prompt = loaded.tokenizer(prompt)["input_ids"]
    rows = [list(row) for row in prompt] if prompt and not isinstance(prompt[0], int) else [list(prompt)]  # type: ignore[arg-type]
    if not rows or not all(rows):
        raise DecodeError("the prompt is empty: generation needs at least one token to start from.")
    width = max(map(len, rows))
    padding = loaded.tokenizer.pad_token_id or 0
    ids = torch.tensor([[padding] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    device = loaded.model.device
    return ids.to(device), mask.to(device)


def check_prompt(loaded: LoadedModel, input_ids: Tensor, cache: Cache | None) -> None:
    """Raise :class:`DecodeError` for ids or a cache that do not fit the model; warn beyond its context limit."""
    model = loaded.model
    vocabulary = model.get_input_embeddings().num_embeddings
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise DecodeError(
            f"the prompt holds id {lowest if lowest < 0 else highest}, but the vocabulary has ids 0 to "
            f"{vocabulary - 1}. Encode the text with this model's own tokenizer."
        )
    limit, tokens = context_limit(model.config), input_ids.shape[1]
    if tokens > limit:
        warnings.warn(
            f"the prompt has {tokens} tokens, but the model's context limit is {limit} (max_position_embeddings): "
            "answers get worse beyond it. Shorten the prompt.",
            stacklevel=3,
        )
    if cache is not None and (cached := int(cache.get_seq_length())) >= tokens:
        raise DecodeError(
            f"the cache holds {cached} tokens and the prompt has {tokens}: nothing is left to feed. Pass the whole "
            "prompt, of which the cache holds the beginning."
        )
    if loaded.compiled and not isinstance(cache, StaticCache | None):
        raise DecodeError(
            f"a model loaded with compile=True needs a StaticCache, and this is a {type(cache).__name__}. Make it "
            "with glmlab.generation.preparation.new_cache(loaded)."
        )


def checked_config(model: Any, config: GenerationConfig | None, max_new_tokens: int, stops: bool) -> GenerationConfig:
    """Return a copy of the settings with the token budget; DecodeError for what this loop cannot do."""
    if max_new_tokens < 1:
        raise DecodeError(f"max_new_tokens={max_new_tokens}: at least one token has to be generated.")
    settings = {**(config or model.generation_config).to_dict(), "max_new_tokens": max_new_tokens}
    settings.pop("max_length", None)
    for name in ("eos_token_id", "pad_token_id"):
        if settings.get(name) is None:
            settings[name] = getattr(model.generation_config, name)
    if not stops and (eos := settings["eos_token_id"]) is not None:
        # ids that no token has: a step takes as much memory as with the model's own (with min_new_tokens, more)
        no_token = model.get_input_embeddings().num_embeddings
        settings["eos_token_id"] = [no_token] * len(eos) if isinstance(eos, list) else no_token
    copy = GenerationConfig(**settings)
    mode = copy.get_generation_mode()
    shown, sequences = mode in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE), copy.num_return_sequences or 1
    if not shown or sequences > 1:
        what = f"num_return_sequences={sequences}" if shown else mode.value.replace("_", " ")
        raise DecodeError(
            f"{what} is not shown by this loop: it does greedy search and sampling, one sequence a prompt."
        )
    if copy.use_cache is False:
        raise DecodeError("use_cache=False: this loop feeds one token a step and needs the cache. Leave it out.")
    if (copy.min_new_tokens or 0) > max_new_tokens:
        raise DecodeError(
            f"min_new_tokens={copy.min_new_tokens} is more than max_new_tokens={max_new_tokens}. Lower the one or "
            "raise the other."
        )
    neutral = {"temperature": (None, 1.0), "top_k": (None, 0, 50), "top_p": (None, 1.0)}
    ignored = [name for name, values in neutral.items() if getattr(copy, name) not in values]
    if ignored and not copy.do_sample:
        raise DecodeError(
            f"{', '.join(ignored)} need do_sample=True: greedy decoding takes the best candidate whatever they say. "
            "Set do_sample=True, or leave them out."
        )
    return copy


def ids_of(ids: int | list[int] | None) -> list[int]:
    """Ids as transformers' settings have them (one, several or none), as a list."""
    return ids if isinstance(ids, list) else [] if ids is None else [ids]


# ------------------------------------------------------------------------------------------------- the cache


def context_limit(config: Any) -> int:
    """Most tokens that the model was made for, from its config."""
    return int(config.max_position_embeddings)


def new_cache(loaded: LoadedModel, static_tokens: int | None = None) -> Cache:
    """Return an empty cache of the kind that the model decodes with: static where it is compiled, else dynamic.

    Args:
        loaded: from ``load_model``.
        static_tokens: a StaticCache of this length, compiled or not; without it that of a compiled model begins short.

    Raises:
        DecodeError: a length below 1, beyond the model's limit, or that is no whole number.

    Example:
        >>> from glmlab import load_model
        >>> type(new_cache(load_model("embedded", precision="fp32", device="cpu"))).__name__
        'DynamicCache'
    """
    config, limit = loaded.model.config, context_limit(loaded.model.config)
    if static_tokens is None:
        if loaded.compiled is None:
            return DynamicCache(config=config)
        static_tokens = static_cache_tokens(1, limit, loaded.model.device)
    if type(static_tokens) is not int:
        raise DecodeError(f"static_tokens={static_tokens!r} is not a whole number of tokens. Give one, such as 4096.")
    if static_tokens < 1:
        raise DecodeError(f"static_tokens={static_tokens}: a static cache holds at least one token.")
    if static_tokens > limit:
        raise DecodeError(
            f"static_tokens={static_tokens}: the model's limit is {limit} tokens (max_position_embeddings), and a "
            "cache would stay empty beyond it. Give at most that."
        )
    return StaticCache(config=config, max_cache_len=static_tokens)


def crop_cache(cache: Cache, tokens: int) -> None:
    """Forget all but the first tokens, in layers that hold more.

    Raises:
        DecodeError: a layer cannot go back, such as one that has passed its sliding window.
    """
    for layer in cache.layers:
        extra = int(layer.get_seq_length()) - tokens
        if extra > 0 and type(layer) is StaticLayer:
            layer.cumulative_length.sub_(extra)
        elif extra > 0:
            try:
                layer.crop(-extra)
            except (AttributeError, RuntimeError) as error:
                raise DecodeError(
                    f"the cache cannot forget its last tokens: a {type(layer).__name__} does not keep what came before "
                    "its window. Start again with a new cache."
                ) from error


def kv_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds.

    Example:
        >>> from transformers import DynamicCache
        >>> kv_bytes(DynamicCache())
        0
    """
    return sum(layer.keys.nbytes + layer.values.nbytes for layer in cache.layers if layer.is_initialized)
