"""Plates of notebook 02: one decode step. The run is computed anew each time; its times are a recording."""

import json
from functools import cache
from typing import TYPE_CHECKING, Any

import pandas as pd

from glmlab.core.resources import data_path
from glmlab.figures.decoding import candidates_chart, decode_strip, lens_heatmap
from glmlab.gallery.captions import caption
from glmlab.gallery.plate import Plate, embedded, model_provenance

if TYPE_CHECKING:
    from glmlab.generation.decoding import DecodeStep

QUESTION = "Tell me a long story."
SAMPLING = {"do_sample": True, "repetition_penalty": 1.1, "temperature": 1.3, "top_k": 50, "top_p": 0.95}
SEED, NEW_TOKENS = 3, 44
RECORDING = "decode-steps-embedded"
"""Stem of the recorded table in data/recordings; data/recordings/record_decode_steps.py makes it."""


@cache
def decode_run() -> "tuple[DecodeStep, ...]":
    """The run of notebook 02 on the embedded model, with logits and hidden states."""
    import torch
    from transformers import GenerationConfig

    from glmlab.generation.decoding import Keep, decode_steps
    from glmlab.prompts.encoding import encode_chat

    loaded = embedded()
    prompt = encode_chat(loaded.tokenizer, [{"role": "user", "content": QUESTION}])
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(SEED)
        steps = decode_steps(
            loaded,
            prompt,
            max_new_tokens=NEW_TOKENS,
            generation_config=GenerationConfig(**SAMPLING),
            keep=Keep(logits=True, hidden_states=True),
        )
        return tuple(steps)


def open_step() -> "DecodeStep":
    """The step of the run with the most candidates left over."""
    return max(decode_run(), key=lambda step: int(step.stages[-1].survivors))


def run_provenance() -> dict[str, Any]:
    """The model and the settings of the run."""
    return {**model_provenance(), "question": QUESTION, "seed": SEED, **SAMPLING}


def decode_steps_plate() -> Plate:
    """All steps of the recorded run."""
    folder = data_path("recordings")
    table = pd.read_csv(folder / f"{RECORDING}.csv", keep_default_na=False, na_values={"caller_ms": [""]})
    provenance = json.loads((folder / f"{RECORDING}.json").read_text(encoding="utf-8"))
    return Plate(decode_strip(table), table, provenance, caption("decode_steps"))


def candidates() -> Plate:
    """The candidates of the most open step, stage by stage."""
    from glmlab.generation.step_tables import candidates_table

    step = open_step()
    table = candidates_table(embedded().tokenizer, step.stages, chosen=step.token_id)
    return Plate(
        candidates_chart(table), table, {**run_provenance(), "step": step.index}, caption("decode_step_candidates")
    )


def lens() -> Plate:
    """What each layer would have predicted at the most open step."""
    from glmlab.generation.step_tables import logit_lens

    step = open_step()
    table = logit_lens(embedded(), step)
    return Plate(lens_heatmap(table), table, {**run_provenance(), "step": step.index}, caption("logit_lens"))
