"""The generation loop as an iterator: one :class:`DecodeStep` for every token that comes into being.

Four acts a step: (1) inputs are prepared and the forward pass runs, (2) logits become scores, probabilities and a
token, (3) the step is yielded, (4) the stop check decides whether another one follows. The check runs before the yield,
so that a step can tell why it was the last.

Everything around the loop (defaults, cache, processors, warpers, stopping criteria) is prepared by ``model.generate``
itself, which hands it to the loop through its ``custom_generate`` hook: what is shown is what ``generate`` does.
"""

import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import Cache, GenerationConfig, LogitsProcessorList, StoppingCriteriaList

from glmlab.errors import GlmlabError
from glmlab.models.loading import LoadedModel

Prompt = str | Sequence[int] | Sequence[Sequence[int]]
"""A text, the ids of one sequence, or the ids of several (left-padded to one length)."""


class DecodeError(GlmlabError):
    """A prompt or a setting with which the loop cannot run; raised before the first forward pass."""


@dataclass(frozen=True, slots=True)
class Keep:
    """What every step keeps. By default only the few best candidates, so that a thousand steps stay small."""

    top_k: int = 10
    """Candidates of every stage; 0 keeps none and skips their cost."""
    logits: bool = False
    hidden_states: bool = False
    attentions: bool = False
    """Needs ``attn_implementation="eager"``: fused attention never forms them."""


@dataclass(frozen=True, slots=True)
class Stage:
    """The candidates at one point of act 2: the raw logits, or the scores behind one processor or warper."""

    name: str
    """"logits", or the class of the processor."""
    survivors: Tensor  # (batch,) candidates whose score is above -inf
    token_ids: Tensor  # (batch, top_k) best first
    probabilities: Tensor  # (batch, top_k) softmax over all candidates of the stage


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One forward pass and the token that it chose; per-sequence fields have one entry a sequence of the batch."""

    index: int
    phase: Literal["prefill", "decode"]
    input_shapes: dict[str, tuple[int, ...]]
    """Shapes of what the forward pass read: input_ids, position_ids, attention_mask where there is one."""
    cached_tokens: int
    """Tokens whose keys and values were cached before the step."""
    context_length: int
    """Tokens whose keys and values are cached after it."""
    kv_bytes: int
    """Bytes of the cached keys and values after it; for a StaticCache what it holds for its full length."""
    stages: tuple[Stage, ...]
    token_ids: tuple[int, ...]
    chosen_probability: Tensor  # (batch,) after all processors and warpers
    stop_reasons: tuple[str | None, ...]
    """"stop token", "length", or None while the sequence goes on."""
    forward_s: float
    choose_s: float
    stop_check_s: float
    logits: Tensor | None  # (batch, vocab) fp32, where kept
    hidden_states: tuple[Tensor, ...] | None
    attentions: tuple[Tensor, ...] | None

    @property
    def token_id(self) -> int:
        """The token of a batch of one."""
        (token_id,) = self.token_ids
        return token_id

    @property
    def stop_reason(self) -> str | None:
        """Why a batch of one stopped here, or None."""
        (reason,) = self.stop_reasons
        return reason

    @property
    def surprisal_bits(self) -> tuple[float, ...]:
        """``-log2(chosen probability)`` of every sequence."""
        return tuple((-torch.log2(self.chosen_probability)).tolist())


def context_limit(config: Any) -> int:
    """Most tokens that the model's positions reach, from its config."""
    return int(config.max_position_embeddings)


def decode_steps(
    loaded: LoadedModel,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    generation_config: GenerationConfig | None = None,
    keep: Keep = Keep(),
    cache: Cache | None = None,
) -> Iterator[DecodeStep]:
    """Generate from a prompt, one step at a time.

    Args:
        loaded: from ``load_model``.
        prompt: text, token ids, or a batch of token ids.
        max_new_tokens: most tokens to generate.
        generation_config: sampling as in transformers; the model's own without it (greedy for the embedded model).
        keep: what every step keeps beside its token.
        cache: keys and values of the first tokens of the prompt; only the rest is fed. It grows with the steps.

    Yields:
        The prefill's step with the first token, then a decode step for every further token.

    Raises:
        DecodeError: empty prompt, ids outside the vocabulary, more tokens than the context limit, settings that
            contradict each other; all before the first forward pass.

    Example:
        >>> from glmlab import load_model
        >>> loaded = load_model("embedded", precision="fp32", device="cpu")
        >>> steps = list(decode_steps(loaded, "你好", max_new_tokens=3))
        >>> [step.phase for step in steps], steps[-1].context_length
        (['prefill', 'decode', 'decode'], 6)
    """
    config = _checked_config(loaded.model, generation_config, max_new_tokens)
    input_ids, attention_mask = _encode(loaded, prompt)
    _check_prompt(loaded.model, input_ids, max_new_tokens, cache)
    if keep.attentions and loaded.model.config._attn_implementation != "eager":
        raise DecodeError(
            f"attentions are never formed by {loaded.model.config._attn_implementation!r} attention. Call "
            "loaded.model.set_attn_implementation('eager') first."
        )

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Iterator[DecodeStep]:
        return _loop(model, input_ids, logits_processor, stopping_criteria, generation_config, keep, model_kwargs)

    steps: Iterator[DecodeStep] = loaded.model.generate(
        input_ids,
        attention_mask=attention_mask,
        generation_config=config,
        custom_generate=loop,
        **({} if cache is None else {"past_key_values": cache}),
    )
    return steps


def _loop(
    model: Any,
    input_ids: Tensor,  # (batch, tokens)
    processors: LogitsProcessorList,
    criteria: StoppingCriteriaList,
    config: GenerationConfig,
    keep: Keep,
    model_kwargs: dict[str, Any],
) -> Iterator[DecodeStep]:
    cache: Cache = model_kwargs["past_key_values"]
    model_kwargs["output_hidden_states"] = keep.hidden_states
    model_kwargs["output_attentions"] = keep.attentions
    stop_ids = config._eos_token_tensor
    unfinished = torch.ones(input_ids.shape[0], dtype=torch.bool, device=input_ids.device)
    index = 0
    while True:
        with torch.no_grad():
            # act 1: inputs and forward pass
            started = time.perf_counter()
            cached_tokens = int(cache.get_seq_length())
            inputs = model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=input_ids.shape[1] - cached_tokens,
                is_first_iteration=index == 0,
                **model_kwargs,
            )
            outputs = model(**inputs, return_dict=True)
            _synchronize(input_ids.device)
            forward_s = time.perf_counter() - started

            # act 2: logits -> scores -> probabilities -> token
            started = time.perf_counter()
            logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)  # (batch, vocab)
            scores, stages = _run_processors(processors, input_ids, logits, keep.top_k)
            probabilities = torch.softmax(scores, dim=-1)
            if config.do_sample:
                tokens = torch.multinomial(probabilities, num_samples=1).squeeze(1)  # (batch,)
            else:
                tokens = torch.argmax(scores, dim=-1)
            chosen_probability = probabilities.gather(1, tokens[:, None]).squeeze(1)
            if stop_ids is not None:  # a finished sequence of a batch goes on with padding
                tokens = torch.where(unfinished, tokens, config._pad_token_tensor)
            choose_s = time.perf_counter() - started

            # act 4, computed before act 3 so that the step can tell it
            started = time.perf_counter()
            input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
            model_kwargs = model._update_model_kwargs_for_generation(outputs, model_kwargs)
            stopped = unfinished & criteria(input_ids, None)
            unfinished = unfinished & ~stopped
            token_ids = tuple(tokens.tolist())
            reasons = _stop_reasons(token_ids, stopped.tolist(), stop_ids)
            finished = not bool(unfinished.any())
            stop_check_s = time.perf_counter() - started

        step = DecodeStep(
            index=index,
            phase="prefill" if index == 0 else "decode",
            input_shapes={name: tuple(value.shape) for name, value in inputs.items() if isinstance(value, Tensor)},
            cached_tokens=cached_tokens,
            context_length=int(cache.get_seq_length()),
            kv_bytes=kv_bytes(cache),
            stages=stages,
            token_ids=token_ids,
            chosen_probability=chosen_probability,
            stop_reasons=reasons,
            forward_s=forward_s,
            choose_s=choose_s,
            stop_check_s=stop_check_s,
            logits=logits if keep.logits else None,
            hidden_states=outputs.hidden_states if keep.hidden_states else None,
            attentions=outputs.attentions if keep.attentions else None,
        )
        del outputs, inputs, logits, scores, probabilities  # act 3 must not keep a prefill's logits alive
        yield step
        if finished:
            return
        index += 1


def _run_processors(
    processors: LogitsProcessorList, input_ids: Tensor, logits: Tensor, top_k: int
) -> tuple[Tensor, tuple[Stage, ...]]:
    """Scores after all processors and warpers, and the best candidates before and behind each."""
    stages = [_stage("logits", logits, top_k)] if top_k else []
    scores = logits
    for processor in processors:
        scores = processor(input_ids, scores)
        if top_k:
            stages.append(_stage(type(processor).__name__, scores, top_k))
    return scores, tuple(stages)


def _stage(name: str, scores: Tensor, top_k: int) -> Stage:
    best_scores, best_ids = torch.topk(scores, min(top_k, scores.shape[-1]), dim=-1)
    log_total = torch.logsumexp(scores, dim=-1, keepdim=True)
    return Stage(name, (scores > -torch.inf).sum(dim=-1), best_ids, torch.exp(best_scores - log_total))


def _stop_reasons(token_ids: Sequence[int], stopped: Sequence[bool], stop_ids: Tensor | None) -> tuple[str | None, ...]:
    stops = set() if stop_ids is None else set(stop_ids.tolist())
    return tuple(
        ("stop token" if token in stops else "length") if has_stopped else None
        for token, has_stopped in zip(token_ids, stopped, strict=True)
    )


def kv_bytes(cache: Cache) -> int:
    """Bytes of the keys and values that a cache holds.

    Example:
        >>> from transformers import DynamicCache
        >>> kv_bytes(DynamicCache())
        0
    """
    return sum(
        layer.keys.numel() * layer.keys.element_size() + layer.values.numel() * layer.values.element_size()
        for layer in cache.layers
        if layer.is_initialized
    )


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def _encode(loaded: LoadedModel, prompt: Prompt) -> tuple[Tensor, Tensor]:
    """Ids and attention mask, both (batch, tokens), left-padded."""
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


def _check_prompt(model: Any, input_ids: Tensor, max_new_tokens: int, cache: Cache | None) -> None:
    vocabulary = model.get_input_embeddings().num_embeddings
    lowest, highest = int(input_ids.min()), int(input_ids.max())
    if lowest < 0 or highest >= vocabulary:
        raise DecodeError(
            f"the prompt holds id {lowest if lowest < 0 else highest}, but the vocabulary has ids 0 to "
            f"{vocabulary - 1}. Encode the text with this model's own tokenizer."
        )
    limit, tokens = context_limit(model.config), input_ids.shape[1]
    if tokens > limit:
        raise DecodeError(
            f"the prompt has {tokens} tokens, but the model's context limit is {limit} (max_position_embeddings). "
            "Shorten it."
        )
    if cache is not None and (cached := int(cache.get_seq_length())) >= tokens:
        raise DecodeError(
            f"the cache holds {cached} tokens and the prompt has {tokens}: nothing is left to feed. Pass the whole "
            "prompt, of which the cache holds the beginning."
        )


def _checked_config(model: Any, config: GenerationConfig | None, max_new_tokens: int) -> GenerationConfig:
    """Return a copy of the settings with the token budget; refuse what one sequence at a time cannot do."""
    if max_new_tokens < 1:
        raise DecodeError(f"max_new_tokens={max_new_tokens}: at least one token has to be generated.")
    settings = (config or model.generation_config).to_dict()
    settings.pop("max_length", None)
    copy = GenerationConfig(**{**settings, "max_new_tokens": max_new_tokens})
    if copy.eos_token_id is None:
        copy.eos_token_id = model.generation_config.eos_token_id
    if copy.pad_token_id is None:
        copy.pad_token_id = model.generation_config.pad_token_id
    if (copy.num_beams or 1) > 1 or (copy.num_return_sequences or 1) > 1:
        raise DecodeError(
            "beam search and several returned sequences are not shown by this loop. Set num_beams=1 and "
            "num_return_sequences=1."
        )
    if (copy.min_new_tokens or 0) > max_new_tokens:
        raise DecodeError(
            f"min_new_tokens={copy.min_new_tokens} is more than max_new_tokens={max_new_tokens}. Lower the one or "
            "raise the other."
        )
    if not copy.do_sample and (ignored := [name for name in ("temperature", "top_k", "top_p") if _is_set(copy, name)]):
        raise DecodeError(
            f"{', '.join(ignored)} need do_sample=True: greedy decoding takes the best candidate whatever they say. "
            "Set do_sample=True, or leave them out."
        )
    return copy


def _is_set(config: GenerationConfig, name: str) -> bool:
    neutral = {"temperature": (None, 1.0), "top_k": (None, 0, 50), "top_p": (None, 1.0)}
    return getattr(config, name) not in neutral[name]
