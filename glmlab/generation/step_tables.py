"""Recorded decode steps as tables: what the figures draw, the stepper shows and a CSV keeps."""

from collections.abc import Iterable, Sequence
from typing import Any

import pandas as pd
import torch

from glmlab.generation.decoding import DecodeStep, Stage, make_stage
from glmlab.generation.preparation import DecodeError
from glmlab.models.loading import LoadedModel

STAGE_NAMES = {
    "logits": "logits",
    "RepetitionPenaltyLogitsProcessor": "repetition penalty",
    "MinNewTokensLengthLogitsProcessor": "minimum length",
    "TemperatureLogitsWarper": "temperature",
    "TopKLogitsWarper": "top-k",
    "TopPLogitsWarper": "top-p",
    "MinPLogitsWarper": "min-p",
    "TypicalLogitsWarper": "typical-p",
}
"""Class of a processor or warper -> the name of its setting; classes that are not here keep their own name."""


def token_text(tokenizer: Any, token_id: int) -> str:
    """How a token looks alone: its piece, with ``▁`` or the blank that it begins with, and ``⏎`` for a line's end.

    Example:
        >>> from glmlab import load_model
        >>> tokenizer = load_model("embedded").tokenizer
        >>> token_text(tokenizer, 2), token_text(tokenizer, tokenizer.convert_tokens_to_ids("<0x0A>"))
        ('</s>', '⏎')
    """
    piece = tokenizer.convert_ids_to_tokens(token_id)
    if piece is None:  # the head of some models is wider than the vocabulary
        return f"id {token_id}"
    if "▁" not in piece and not (piece.startswith("<") and piece.endswith(">")):
        piece = tokenizer.decode([token_id]) or piece
    return str(piece).replace("<0x0A>", "⏎").replace("\n", "⏎")


def steps_table(tokenizer: Any, steps: Sequence[DecodeStep]) -> pd.DataFrame:
    """One line a step: token, probability, cache and the time of each act; of a batch its first sequence.

    Args:
        tokenizer: of the model that made the steps.
        steps: from ``decode_steps``, with candidates (``Keep(top_k=…)`` of at least 1).

    Returns:
        Columns step, phase, token_id, text, probability (after all warpers), surprisal_bits, fed_tokens, cached_tokens
        (before), context_tokens (after), kv_bytes, one ``survivors: …`` a stage, forward_ms, choose_ms, caller_ms,
        stop_check_ms, stop_reason. caller_ms is act 3 of the line's own step; it is missing in the last line.

    Raises:
        DecodeError: no steps, or steps without candidates.
    """
    if not steps:
        raise DecodeError("there are no steps to show: generate at least one token.")
    caller_ms = [*(later.caller_s * 1e3 for later in steps[1:]), None]
    return pd.DataFrame(
        [
            {
                "step": step.index,
                "phase": step.phase,
                "token_id": step.token_ids[0],
                "text": token_text(tokenizer, step.token_ids[0]),
                "probability": 2.0 ** -step.surprisal_bits[0],
                "surprisal_bits": step.surprisal_bits[0],
                "fed_tokens": step.input_shapes["input_ids"][1],
                "cached_tokens": step.cached_tokens,
                "context_tokens": step.context_length,
                "kv_bytes": step.kv_bytes,
                **{f"survivors: {_stage_name(stage)}": int(stage.survivors[0]) for stage in step.stages},
                "forward_ms": step.forward_s * 1e3,
                "choose_ms": step.choose_s * 1e3,
                "caller_ms": away_ms,
                "stop_check_ms": step.stop_check_s * 1e3,
                "stop_reason": step.stop_reasons[0],
            }
            for step, away_ms in zip(steps, caller_ms, strict=True)
        ]
    )


def candidates_table(tokenizer: Any, stages: Iterable[Stage], *, chosen: int | None = None) -> pd.DataFrame:
    """One line a stage and candidate: what each processor and warper made of the best tokens.

    Args:
        tokenizer: of the model that made the stages.
        stages: of a DecodeStep, or from ``reweigh``.
        chosen: the token that was taken; it is marked.

    Returns:
        Columns stage, survivors, rank (from 1), token_id, text, probability, chosen; none for a candidate that was cut.
    """
    lines = []
    for stage in stages:
        survivors = int(stage.survivors[0])
        best = zip(stage.token_ids[0, :survivors].tolist(), stage.probabilities[0].tolist(), strict=False)
        lines += [
            {
                "stage": _stage_name(stage),
                "survivors": survivors,
                "rank": rank,
                "token_id": token_id,
                "text": token_text(tokenizer, token_id),
                "probability": probability,
                "chosen": token_id == chosen,
            }
            for rank, (token_id, probability) in enumerate(best, start=1)
        ]
    return pd.DataFrame(lines)


def logit_lens(loaded: LoadedModel, step: DecodeStep, *, candidates: int = 6) -> pd.DataFrame:
    """What the residual stream would have predicted after each layer: the model's own norm and head, applied early.

    The last of transformers' hidden states is normed already, so it goes straight to the head: the step's own logits.

    Args:
        loaded: the model that made the step.
        step: made with ``Keep(hidden_states=True)``; its last position is read.
        candidates: best tokens of each layer.

    Returns:
        Columns layer (0: the embeddings), name, normed (as recorded), rank, token_id, text, probability, chosen. The
        probabilities are a softmax of the raw logits: no warper has acted.

    Raises:
        DecodeError: a step without hidden states, or a model whose last norm is not where Llama, Qwen2 and GLM have it.
    """
    if step.hidden_states is None:
        raise DecodeError("the step has no hidden states. Pass keep=Keep(hidden_states=True) to decode_steps.")
    norm = getattr(loaded.model.base_model, "norm", None)
    if norm is None:
        raise DecodeError(
            f"{type(loaded.model).__name__} has no base_model.norm, the norm that Llama, Qwen2 and GLM have before the "
            "head. Use a model of such a family."
        )
    head, last = loaded.model.get_output_embeddings(), len(step.hidden_states) - 1
    stages = []
    with torch.no_grad():
        for layer, hidden in enumerate(step.hidden_states):
            residual = hidden[:1, -1:]  # (1, 1, hidden)
            logits = head(residual if layer == last else norm(residual))[:, 0].float()  # (1, vocab)
            stages.append(make_stage(f"layer {layer}" if layer else "embeddings", logits, candidates))
    table = candidates_table(loaded.tokenizer, stages, chosen=step.token_ids[0])
    layers = table["stage"].map({stage.name: layer for layer, stage in enumerate(stages)})
    table.insert(0, "layer", layers)
    table.insert(2, "normed", layers == last)
    return table.rename(columns={"stage": "name"}).drop(columns="survivors")


def _stage_name(stage: Stage) -> str:
    return STAGE_NAMES.get(stage.name, stage.name)
