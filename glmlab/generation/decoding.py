"""The generation loop as an iterator: one :class:`DecodeStep` for every generated token.

Four acts a step: (1) the forward pass runs, (2) logits become scores, probabilities and a token, (3) the step is
yielded, (4) the stop check decides whether another one follows. The check runs before the yield, so that a step can say
why it was the last.

``model.generate`` prepares everything around the loop (defaults, cache, processors, warpers, stopping criteria) and
hands it over through its ``custom_generate`` hook: the steps show what ``generate`` does. The loop skips work that
changes no value: without padding a decode step is fed the last token and its position, not slices of longer tensors;
tokens are appended to the prompt only where something reads them; the host checks stop tokens and length.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    Cache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, StaticLayer

from glmlab.generation.preparation import (
    DecodeError,
    Prompt,
    check_prompt,
    checked_config,
    context_limit,
    crop_cache,
    encode_prompt,
    ids_of,
    kv_bytes,
    new_cache,
)
from glmlab.models.compiling import make_room
from glmlab.models.loading import LoadedModel
from glmlab.models.placement import cpu_threads


@dataclass(frozen=True, slots=True)
class Keep:
    """What every step keeps. By default only the few best candidates, so that a thousand steps stay small."""

    top_k: int = 10  # candidates of every stage; 0 keeps none, nor the chosen token's probability, and skips their cost
    logits: bool = False
    hidden_states: bool = False
    attentions: bool = False  # needs attn_implementation="eager": fused attention never forms them


@dataclass(frozen=True, slots=True)
class Stage:
    """The candidates at one point of act 2: the raw logits, or the scores after one processor or warper."""

    name: str  # "logits", or the class of the processor
    survivors: Tensor  # (batch,) candidates whose score is above -inf
    token_ids: Tensor  # (batch, top_k) best first
    probabilities: Tensor  # (batch, top_k) softmax over all candidates of the stage


@dataclass(frozen=True, slots=True)
class DecodeStep:
    """One forward pass and the token that it chose; per-sequence fields have one entry a sequence of the batch."""

    index: int
    phase: Literal["prefill", "decode"]
    input_shapes: dict[str, tuple[int, ...]]
    """Shapes of what the forward pass read: input_ids, position_ids, and attention_mask unless it masks nothing."""
    cached_tokens: int  # whose keys and values were cached before the step
    context_length: int  # tokens whose keys and values are cached after it
    kv_bytes: int  # of the keys and values cached after it; of a StaticCache for its full length
    stages: tuple[Stage, ...]  # the raw logits, then every processor and warper in the order in which they act
    token_ids: tuple[int, ...]
    chosen_probability: Tensor | None  # (batch,) after all processors and warpers; None with Keep(top_k=0)
    stop_reasons: tuple[str | None, ...]
    """"stop token", "stop string", "length" or "time"; None while the sequence goes on, and after its end."""
    forward_s: float  # act 1
    choose_s: float  # act 2
    caller_s: float  # act 3 of the step before, until the caller asked for this one; 0 for the first
    stop_check_s: float  # act 4
    logits: Tensor | None  # (batch, vocab) fp32, where kept
    hidden_states: tuple[Tensor, ...] | None
    """Embeddings, then each layer: (batch, tokens, hidden), the last one normed."""
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
        """``-log2(chosen probability)`` of every sequence.

        Raises:
            DecodeError: the step was made with ``Keep(top_k=0)``, which keeps no probability.
        """
        if self.chosen_probability is None:
            raise DecodeError("Keep(top_k=0) keeps no probabilities. Ask for at least Keep(top_k=1).")
        return tuple((-torch.log2(self.chosen_probability) + 0.0).tolist())  # + 0.0: no minus before a zero


def decode_steps(
    loaded: LoadedModel,
    prompt: Prompt,
    *,
    max_new_tokens: int,
    generation_config: GenerationConfig | None = None,
    keep: Keep = Keep(),
    cache: Cache | None = None,
    stops: bool = True,
) -> Iterator[DecodeStep]:
    """Generate from a prompt, one step at a time: the prefill's with the first token, then a decode step a token.

    Args:
        loaded: from ``load_model``.
        prompt: text, token ids, or a batch of token ids.
        max_new_tokens: most tokens to generate.
        generation_config: sampling as in transformers; the model's own without it (greedy for the embedded model).
        keep: what every step keeps beside its token.
        cache: keys and values of the first tokens of the prompt; only the rest is fed. It grows with the steps. A
            model loaded with ``compile=True`` needs a StaticCache (:func:`~glmlab.generation.preparation.new_cache`).
        stops: False lets no stop token end a sequence.

    Raises:
        DecodeError: an empty prompt, ids outside the vocabulary, or settings that contradict each other; before the
            first forward pass.

    An interrupted step (KeyboardInterrupt) leaves the cache as it was before, and with
    ``steps = []; steps.extend(decode_steps(...))`` you keep what was generated.

    Example:
        >>> from glmlab import load_model
        >>> loaded = load_model("embedded", precision="fp32", device="cpu")
        >>> steps = list(decode_steps(loaded, [5, 6, 7], max_new_tokens=3))  # ids, or a text
        >>> [step.phase for step in steps], steps[-1].context_length
        (['prefill', 'decode', 'decode'], 5)
    """
    config = checked_config(loaded.model, generation_config, max_new_tokens, stops)
    input_ids, attention_mask = encode_prompt(loaded, prompt)
    check_prompt(loaded, input_ids, cache)
    attention = loaded.model.config._attn_implementation
    if keep.attentions and attention != "eager":
        raise DecodeError(
            f"attentions are never formed by {attention!r} attention. Call "
            "loaded.model.set_attn_implementation('eager') first."
        )
    if loaded.compiled and cache is None:
        cache = new_cache(loaded)
    criteria = StoppingCriteriaList()
    if config.stop_strings is not None:  # generate() itself takes no tokenizer beside a loop of one's own
        criteria.append(StopStringCriteria(loaded.tokenizer, config.stop_strings))
        config.stop_strings = None

    try:
        loop: _Loop = loaded.model.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            stopping_criteria=criteria,
            custom_generate=partial(_Loop, loaded, keep),
            **({} if cache is None else {"past_key_values": cache}),
        )
    except (ValueError, TypeError) as error:  # transformers' own checks; all of them run before the loop begins
        raise DecodeError(f"the generation settings cannot be used: {error}") from error
    return loop.steps()


class _Loop:
    """The generation loop as ``generate`` calls it, and what it carries from step to step."""

    def __init__(
        self,
        loaded: LoadedModel,
        keep: Keep,
        _model: Any,
        input_ids: Tensor,  # (batch, tokens)
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> None:
        self._forward = _Forward(loaded, model_kwargs, keep)
        self._stop_check = _StopCheck(stopping_criteria, generation_config, batch=len(input_ids))
        self._input_ids, self._processors, self._keep = input_ids, logits_processor, keep
        self._do_sample = bool(generation_config.do_sample)
        self._appends = bool(logits_processor) or self._stop_check.reads_ids or not self._forward.lean
        self._length = input_ids.shape[1]
        self._cached_tokens = int(self._forward.cache.get_seq_length())
        self._tokens: Tensor | None = None  # (batch,) those chosen last

    def steps(self) -> Iterator[DecodeStep]:
        """Run the acts in turn until every sequence has ended."""
        index, caller_s = 0, 0.0
        while any(self._stop_check.unfinished):
            try:
                step = self._step(index, caller_s)
            except BaseException:  # Ctrl+C too: some layers may hold the step's tokens, others not yet
                crop_cache(self._forward.cache, self._cached_tokens)
                raise
            self._cached_tokens = step.context_length
            yielded = time.perf_counter()
            yield step  # act 3
            del step
            index, caller_s = index + 1, time.perf_counter() - yielded

    @torch.no_grad()
    def _step(self, index: int, caller_s: float) -> DecodeStep:
        started = time.perf_counter()
        outputs, fed = self._forward(self._input_ids, self._tokens, self._cached_tokens)  # act 1
        forward_ended = time.perf_counter()

        logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)  # act 2: (batch, vocab)
        kept_logits = (logits.clone() if self._processors else logits) if self._keep.logits else None
        scores, stages = _run_processors(self._processors, self._input_ids, logits, self._keep.top_k)
        tokens, chosen_probability = _choose(scores, self._do_sample, with_probability=self._keep.top_k > 0)
        self._tokens = self._stop_check.pad(tokens)
        token_ids = tuple(self._tokens.tolist())
        choose_ended = time.perf_counter()

        self._length += 1  # act 4
        if self._appends:
            self._input_ids = torch.cat([self._input_ids, self._tokens[:, None]], dim=-1)
        reasons = self._stop_check(token_ids, self._length, self._input_ids)
        context_length = int(self._forward.cache.get_seq_length())
        stop_check_ended = time.perf_counter()

        return DecodeStep(
            index=index,
            phase="prefill" if index == 0 else "decode",
            input_shapes={name: tuple(value.shape) for name, value in fed.items() if isinstance(value, Tensor)},
            cached_tokens=self._cached_tokens,
            context_length=context_length,
            kv_bytes=kv_bytes(self._forward.cache),
            stages=stages,
            token_ids=token_ids,
            chosen_probability=chosen_probability,
            stop_reasons=reasons,
            forward_s=forward_ended - started,
            choose_s=choose_ended - forward_ended,
            caller_s=caller_s,
            stop_check_s=stop_check_ended - choose_ended,
            logits=kept_logits,
            hidden_states=_normal_tensors(outputs.hidden_states) if self._keep.hidden_states else None,
            attentions=_normal_tensors(outputs.attentions) if self._keep.attentions else None,
        )


class _Forward:
    """Act 1: what each forward pass is fed, and the pass itself."""

    def __init__(self, loaded: LoadedModel, inputs: dict[str, Any], keep: Keep) -> None:
        self._model, self._compiled, self._device = loaded.model, loaded.compiled, loaded.model.device
        self._threads = loaded.threads
        kept = {"output_hidden_states": keep.hidden_states, "output_attentions": keep.attentions}
        self._inputs = inputs | {name: True for name, wanted in kept.items() if wanted}
        self.cache: Cache = inputs["past_key_values"]
        methods = ("prepare_inputs_for_generation", "_update_model_kwargs_for_generation")
        self.lean = (  # a decode step is fed the last token and its position, and nothing else that changes
            all(getattr(type(self._model), method) is getattr(GenerationMixin, method) for method in methods)
            and inputs.get("attention_mask") is None
            and getattr(inputs.get("position_ids"), "ndim", 0) == 2
            and all(type(layer) is (StaticLayer if self._compiled else DynamicLayer) for layer in self.cache.layers)
        )

    def __call__(self, input_ids: Tensor, tokens: Tensor | None, cached_tokens: int) -> tuple[Any, dict[str, Any]]:
        """Feed the prompt behind what is cached, or the tokens chosen last: the model's outputs, and what it read."""
        prefill = tokens is None
        if self._compiled:
            needed = input_ids.shape[1] if prefill else cached_tokens + 1
            make_room(self.cache, needed, context_limit(self._model.config), self._device)
        if tokens is not None and self.lean:
            fed = {"input_ids": tokens[:, None], **self._inputs}
        else:
            fed = self._model.prepare_inputs_for_generation(
                input_ids,
                next_sequence_length=input_ids.shape[1] - cached_tokens if prefill else 1,
                is_first_iteration=prefill,
                **self._inputs,
            )
        outputs = self._run(fed, prefill)
        if self.lean:
            positions = self._inputs["position_ids"]
            self._inputs["position_ids"] = (positions[:, -1:] if prefill else positions) + 1
            self._inputs.pop("attention_mask", None)
        else:
            self._inputs = self._model._update_model_kwargs_for_generation(outputs, self._inputs)
        if self._device.type == "cuda":
            torch.cuda.synchronize(self._device)
        return outputs, fed

    def _run(self, fed: dict[str, Any], prefill: bool) -> Any:
        """Decode steps run compiled where the model was loaded so, everything else in eager mode.

        inference_mode saves autograd's counters. Tensors made in it must not be written to outside of it, so it is not
        for a pass that makes a static cache's tensors (the prefill): later passes and crop_cache write to them.
        """
        run = self._model if prefill or not self._compiled else self._compiled
        inference = run is self._compiled or (self.lean and not self._compiled and self._device.type != "meta")
        with cpu_threads(self._threads), torch.inference_mode() if inference else torch.no_grad():
            return run(**fed, return_dict=True)


class _StopCheck:
    """Act 4: which sequences end with this token, and why."""

    def __init__(self, criteria: StoppingCriteriaList, config: GenerationConfig, batch: int) -> None:
        by_type = {type(criterion): criterion for criterion in criteria}
        self._strings = by_type.pop(StopStringCriteria, None)
        self._time = by_type.pop(MaxTimeCriteria, None)
        if unknown := by_type.keys() - {EosTokenCriteria, MaxLengthCriteria}:
            raise DecodeError(f"{unknown.pop().__name__} is not known to this loop: leave its setting out.")
        self._stop_ids = frozenset(ids_of(config.eos_token_id))
        self._max_length, self._pad_token = config.max_length, config._pad_token_tensor
        self._ended: Tensor | None = None  # (batch,) once some sequences have ended and others go on
        self.unfinished = [True] * batch
        self.reads_ids = self._strings is not None

    def __call__(self, token_ids: Sequence[int], length: int, input_ids: Tensor) -> tuple[str | None, ...]:
        """One reason for each sequence that ends here, else None."""
        strings = self._strings(input_ids, None).tolist() if self._strings else [False] * len(token_ids)
        late = self._time is not None and bool(self._time(input_ids, None).any())
        at_end = "length" if length >= self._max_length else "time" if late else None
        found = [
            "stop token" if token_id in self._stop_ids else "stop string" if string else at_end
            for token_id, string in zip(token_ids, strings, strict=True)
        ]
        reasons = tuple(reason if goes_on else None for reason, goes_on in zip(found, self.unfinished, strict=True))
        if any(reasons):
            self.unfinished = [goes_on and not why for goes_on, why in zip(self.unfinished, reasons, strict=True)]
            if self._stop_ids and any(self.unfinished):
                self._ended = torch.tensor([not goes_on for goes_on in self.unfinished], device=input_ids.device)
        return reasons

    def pad(self, tokens: Tensor) -> Tensor:
        """The chosen tokens, with padding for sequences that have ended."""
        return tokens if self._ended is None else torch.where(self._ended, self._pad_token, tokens)


def _run_processors(
    processors: Iterable[LogitsProcessor], input_ids: Tensor, logits: Tensor, top_k: int
) -> tuple[Tensor, tuple[Stage, ...]]:
    """Scores after all processors and warpers, and the best candidates before and after each."""
    stages = [make_stage("logits", logits, top_k)] if top_k else []
    scores = logits
    for processor in processors:
        scores = processor(input_ids, scores)
        if top_k:
            stages.append(make_stage(type(processor).__name__, scores, top_k))
    return scores, tuple(stages)


def make_stage(name: str, scores: Tensor, top_k: int) -> Stage:
    """The best candidates of scores (batch, vocab)."""
    token_ids = torch.topk(scores, min(top_k, scores.shape[-1]), dim=-1).indices
    probabilities = torch.softmax(scores, dim=-1).gather(-1, token_ids)
    return Stage(name, (scores > -torch.inf).sum(dim=-1), token_ids, probabilities)


def _choose(scores: Tensor, do_sample: bool, *, with_probability: bool) -> tuple[Tensor, Tensor | None]:
    """One token a sequence, drawn by its probability or the best, and those tokens' probabilities."""
    if not (do_sample or with_probability):
        return torch.argmax(scores, dim=-1), None
    probabilities = torch.softmax(scores, dim=-1)  # (batch, vocab)
    tokens = torch.multinomial(probabilities, 1).squeeze(1) if do_sample else torch.argmax(scores, dim=-1)
    return tokens, probabilities.gather(1, tokens[:, None]).squeeze(1) if with_probability else None


def _normal_tensors(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies without inference_mode's restrictions, so that a caller can compute with them under autograd."""
    return tuple(tensor.clone() for tensor in tensors)


def reweigh(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, candidates: int = 10
) -> tuple[Stage, ...]:
    """What other warpers, transformers' own, would have made of recorded logits; the model does not run.

    Args:
        logits: (batch, vocab), of a step made with ``Keep(logits=True)``.
        temperature: above 0. At 1, as with ``top_k=0`` and ``top_p=1``, there is no such stage.
        top_k: candidates that survive.
        top_p: probability that survives.
        candidates: best candidates in each stage.

    Raises:
        DecodeError: a setting out of its range.

    Example:
        >>> stages = reweigh(torch.tensor([[2.0, 1.0, 0.0]]), temperature=0.5, top_p=0.9)
        >>> [(stage.name, int(stage.survivors), round(float(stage.probabilities[0, 0]), 2)) for stage in stages]
        [('logits', 3, 0.67), ('TemperatureLogitsWarper', 3, 0.87), ('TopPLogitsWarper', 2, 0.88)]
    """
    processors = LogitsProcessorList()
    try:
        if temperature != 1:
            processors.append(TemperatureLogitsWarper(float(temperature)))
        if top_k:
            processors.append(TopKLogitsWarper(top_k))
        if top_p != 1:
            processors.append(TopPLogitsWarper(top_p))
    except ValueError as error:
        raise DecodeError(f"these warpers cannot be built: {error}") from error
    _, stages = _run_processors(processors, logits[:, :0].long(), logits, candidates)
    return stages
