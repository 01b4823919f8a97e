"""The generation loop as an iterator: one :class:`DecodeStep` for every token that comes into being.

Four acts a step: (1) inputs are prepared and the forward pass runs, (2) logits become scores, probabilities and a
token, (3) the step is yielded, (4) the stop check decides whether another one follows. The check runs before the yield,
so that a step can tell why it was the last.

Everything around the loop (defaults, cache, processors, warpers, stopping criteria) is prepared by ``model.generate``
itself, which hands it to the loop through its ``custom_generate`` hook: what is shown is what ``generate`` does.

The loop is lean where that changes no value: without padding, a decode step's inputs are the last token and the next
position, so nothing is sliced out of longer tensors; ids are joined to the prompt only where a processor reads them;
the usual two stopping criteria, stop tokens and length, are checked on the host.
"""

import time
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor
from transformers import (
    Cache,
    DynamicCache,
    EosTokenCriteria,
    GenerationConfig,
    GenerationMixin,
    LogitsProcessor,
    LogitsProcessorList,
    MaxLengthCriteria,
    MaxTimeCriteria,
    StaticCache,
    StoppingCriteriaList,
    StopStringCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
    TopPLogitsWarper,
)
from transformers.cache_utils import DynamicLayer, StaticLayer
from transformers.generation.configuration_utils import GenerationMode

from glmlab.core.errors import GlmlabError
from glmlab.models.compiling import CompiledForward, make_room, static_cache_tokens
from glmlab.models.loading import LoadedModel

Prompt = str | Sequence[int] | Sequence[Sequence[int]]
"""A text, the ids of one sequence, or the ids of several (left-padded to one length)."""


class DecodeError(GlmlabError):
    """A prompt or a setting with which the loop cannot run; raised before the first forward pass."""


@dataclass(frozen=True, slots=True)
class Keep:
    """What every step keeps. By default only the few best candidates, so that a thousand steps stay small."""

    top_k: int = 10
    """Candidates of every stage; 0 keeps none, nor the chosen token's probability, and skips their cost."""
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
    """Shapes of what the forward pass read: input_ids, position_ids, and attention_mask unless it masks nothing."""
    cached_tokens: int
    """Tokens whose keys and values were cached before the step."""
    context_length: int
    """Tokens whose keys and values are cached after it."""
    kv_bytes: int
    """Bytes of the cached keys and values after it; for a StaticCache what it holds for its full length."""
    stages: tuple[Stage, ...]
    """The raw logits, then every processor and warper in the order in which they act."""
    token_ids: tuple[int, ...]
    chosen_probability: Tensor | None  # (batch,) after all processors and warpers; None with Keep(top_k=0)
    stop_reasons: tuple[str | None, ...]
    """"stop token", "length", "time" or "stop string"; None while the sequence goes on, and after its end."""
    forward_s: float
    """Act 1."""
    choose_s: float
    """Act 2."""
    caller_s: float
    """Act 3 of the step before: what the caller did with it until asking for this one; 0 for the first."""
    stop_check_s: float
    """Act 4."""
    logits: Tensor | None  # (batch, vocab) fp32, where kept
    hidden_states: (
        tuple[Tensor, ...] | None
    )  # embeddings, then each layer: (batch, tokens, hidden), the last one normed
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
        cache: keys and values of the first tokens of the prompt; only the rest is fed. It grows with the steps. Of a
            model loaded with ``compile=True`` it is a StaticCache (:func:`new_cache`).

    Yields:
        The prefill's step with the first token, then a decode step for every further token.

    Raises:
        DecodeError: empty prompt, ids outside the vocabulary, more tokens than the context limit, settings that
            contradict each other; all before the first forward pass.

    A step that is cut off (KeyboardInterrupt) leaves the cache as it was before that step, and the steps so far as they
    are: ``steps = []; steps.extend(decode_steps(...))`` keeps them.

    Example:
        >>> from glmlab import load_model
        >>> loaded = load_model("embedded", precision="fp32", device="cpu")
        >>> steps = list(decode_steps(loaded, [5, 6, 7], max_new_tokens=3))  # ids, or a text
        >>> [step.phase for step in steps], steps[-1].context_length
        (['prefill', 'decode', 'decode'], 5)
    """
    config = _checked_config(loaded.model, generation_config, max_new_tokens)
    input_ids, attention_mask = _encode(loaded, prompt)
    _check_prompt(loaded.model, input_ids, cache)
    if loaded.compiled and not isinstance(cache, StaticCache):
        if cache is not None:
            raise DecodeError(
                f"a model loaded with compile=True needs a StaticCache, and this is a {type(cache).__name__}. Make it "
                "with glmlab.generation.decoding.new_cache(loaded)."
            )
        cache = new_cache(loaded)
    if keep.attentions and loaded.model.config._attn_implementation != "eager":
        raise DecodeError(
            f"attentions are never formed by {loaded.model.config._attn_implementation!r} attention. Call "
            "loaded.model.set_attn_implementation('eager') first."
        )
    criteria = StoppingCriteriaList()
    if config.stop_strings is not None:  # generate() itself takes no tokenizer beside a loop of one's own
        criteria.append(StopStringCriteria(loaded.tokenizer, config.stop_strings))
        config.stop_strings = None

    def loop(
        model: Any,
        input_ids: Tensor,
        logits_processor: LogitsProcessorList,
        stopping_criteria: StoppingCriteriaList,
        generation_config: GenerationConfig,
        **model_kwargs: Any,
    ) -> Iterator[DecodeStep]:
        if keep.hidden_states:
            model_kwargs["output_hidden_states"] = True
        if keep.attentions:
            model_kwargs["output_attentions"] = True
        return _loop(
            _Inputs(model, model_kwargs, loaded.compiled),
            input_ids,
            logits_processor,
            _StopCheck(stopping_criteria, generation_config),
            generation_config,
            keep,
        )

    try:
        steps: Iterator[DecodeStep] = loaded.model.generate(
            input_ids,
            attention_mask=attention_mask,
            generation_config=config,
            stopping_criteria=criteria,
            custom_generate=loop,
            **({} if cache is None else {"past_key_values": cache}),
        )
    except (ValueError, TypeError) as error:  # transformers' own checks; all of them run before the loop begins
        raise DecodeError(f"the generation settings cannot be used: {error}") from error
    return steps


def _loop(
    inputs: "_Inputs",
    input_ids: Tensor,  # (batch, tokens)
    processors: LogitsProcessorList,
    stop_check: "_StopCheck",
    config: GenerationConfig,
    keep: Keep,
) -> Iterator[DecodeStep]:
    cache, device, length = inputs.cache, input_ids.device, input_ids.shape[1]
    reads_ids = bool(processors) or not stop_check.on_host or not inputs.lean
    cached_tokens = int(cache.get_seq_length())
    unfinished = [True] * input_ids.shape[0]
    padding: Tensor | None = None  # (batch,) the padding token where a sequence of several has ended, else -1
    tokens: Tensor | None = None
    yielded: float | None = None
    index = 0
    while True:
        started = time.perf_counter()
        caller_s = 0.0 if yielded is None else started - yielded
        try:
            with torch.no_grad():
                # act 1: inputs and forward pass
                inputs.make_room(input_ids.shape[1] if tokens is None else cached_tokens + 1)
                fed = inputs.first(input_ids, cached_tokens) if tokens is None else inputs.next(input_ids, tokens)
                outputs = inputs.forward(fed, prefill=tokens is None)
                inputs.advance(outputs)
                if device.type == "cuda":
                    torch.cuda.synchronize(device)
                forward_ended = time.perf_counter()

                # act 2: logits -> scores -> probabilities -> token
                logits = outputs.logits[:, -1].to(copy=True, dtype=torch.float32)  # (batch, vocab)
                kept_logits = (logits.clone() if processors else logits) if keep.logits else None
                scores, stages = _run_processors(processors, input_ids, logits, keep.top_k)
                tokens, probabilities = _choose(scores, config, with_probabilities=keep.top_k > 0)
                chosen_probability = None
                if probabilities is not None and keep.top_k:
                    chosen_probability = probabilities.gather(1, tokens[:, None]).squeeze(1)
                if padding is not None:
                    tokens = torch.where(padding < 0, tokens, padding)
                token_ids = tuple(tokens.tolist())
                choose_ended = time.perf_counter()

                # act 4, computed before act 3 so that the step can tell it
                length += 1
                if reads_ids:
                    input_ids = torch.cat([input_ids, tokens[:, None]], dim=-1)
                reasons = stop_check(token_ids, length, input_ids, unfinished)
                if any(reasons):
                    unfinished = [goes_on and not reason for goes_on, reason in zip(unfinished, reasons, strict=True)]
                    padding = stop_check.padding(unfinished, device)
                context_length = int(cache.get_seq_length())
                stop_check_ended = time.perf_counter()
        except BaseException:
            crop_cache(cache, cached_tokens)
            raise

        step = DecodeStep(
            index=index,
            phase="prefill" if index == 0 else "decode",
            input_shapes={name: tuple(value.shape) for name, value in fed.items() if isinstance(value, Tensor)},
            cached_tokens=cached_tokens,
            context_length=context_length,
            kv_bytes=kv_bytes(cache),
            stages=stages,
            token_ids=token_ids,
            chosen_probability=chosen_probability,
            stop_reasons=reasons,
            forward_s=forward_ended - started,
            choose_s=choose_ended - forward_ended,
            caller_s=caller_s,
            stop_check_s=stop_check_ended - choose_ended,
            logits=kept_logits,
            hidden_states=_as_normal_tensors(outputs.hidden_states) if keep.hidden_states else None,
            attentions=_as_normal_tensors(outputs.attentions) if keep.attentions else None,
        )
        del outputs, fed, logits, kept_logits, scores, probabilities  # act 3 must not keep a prefill's logits alive
        yielded = time.perf_counter()
        yield step
        del step
        if not any(unfinished):
            return
        cached_tokens = context_length
        index += 1


_LEAN_INPUTS = {
    "input_ids", "position_ids", "attention_mask", "past_key_values", "use_cache", "logits_to_keep",
    "output_hidden_states", "output_attentions",
}  # fmt: skip


class _Inputs:
    """Act 1: what each forward pass is called with, and the call."""

    def __init__(self, model: Any, model_kwargs: dict[str, Any], compiled: CompiledForward | None) -> None:
        self.model = model
        self._compiled = compiled
        self.cache: Cache = model_kwargs["past_key_values"]
        self._kwargs = model_kwargs
        self.lean = (  # a decode step's inputs are known beforehand: one token, one position
            type(model).prepare_inputs_for_generation is GenerationMixin.prepare_inputs_for_generation
            and type(model)._update_model_kwargs_for_generation is GenerationMixin._update_model_kwargs_for_generation
            and model_kwargs.keys() <= _LEAN_INPUTS
            and model_kwargs["attention_mask"] is None
            and model_kwargs["position_ids"].ndim == 2
            and (compiled is not None or type(self.cache) is DynamicCache)
            and all(type(layer) is (DynamicLayer if compiled is None else StaticLayer) for layer in self.cache.layers)
        )
        self._inference = self.lean and compiled is None and model.device.type != "meta"
        self._position: Tensor | None = None  # (batch or 1, 1) of the next token

    def make_room(self, tokens: int) -> None:
        """Lengthen the static cache of a compiled model to hold the tokens of the next pass."""
        if self._compiled:
            make_room(self.cache, tokens, context_limit(self.model.config), self.model.device)

    def forward(self, fed: dict[str, Any], *, prefill: bool) -> Any:
        """Run the pass: decode steps compiled where the model was loaded so, everything else in eager mode."""
        run = self.model if prefill or self._compiled is None else self._compiled
        # inference_mode spares autograd's counters. A tensor made in it must not be written to outside of it: so not
        # where a pass makes a static cache's tensors (its prefill), which later passes and crop_cache write to.
        with torch.inference_mode() if self._inference or run is self._compiled else torch.no_grad():
            return run(**fed, return_dict=True)

    def first(self, input_ids: Tensor, cached_tokens: int) -> dict[str, Any]:
        """Inputs of the prefill: the prompt behind what is cached."""
        fed: dict[str, Any] = self.model.prepare_inputs_for_generation(
            input_ids,
            next_sequence_length=input_ids.shape[1] - cached_tokens,
            is_first_iteration=True,
            **self._kwargs,
        )
        return fed

    def advance(self, outputs: Any) -> None:
        """Take note that a pass has run."""
        if not self.lean:
            self._kwargs = self.model._update_model_kwargs_for_generation(outputs, self._kwargs)
        elif self._position is None:
            self._position = self._kwargs.pop("position_ids")[:, -1:] + 1
            del self._kwargs["attention_mask"]
        else:
            self._position = self._position + 1

    def next(self, input_ids: Tensor, tokens: Tensor) -> dict[str, Any]:
        """Inputs of a decode step: the token just chosen, one position on."""
        if self.lean:
            return {"input_ids": tokens[:, None], "position_ids": self._position, **self._kwargs}
        fed: dict[str, Any] = self.model.prepare_inputs_for_generation(
            input_ids, next_sequence_length=1, is_first_iteration=False, **self._kwargs
        )
        return fed


def _as_normal_tensors(tensors: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Copies without inference_mode's restrictions, so that a caller can compute with them under autograd."""
    return tuple(tensor.clone() for tensor in tensors)


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
    config = loaded.model.config
    if static_tokens is not None and type(static_tokens) is not int:
        raise DecodeError(f"static_tokens={static_tokens!r} is not a whole number of tokens. Give one, such as 4096.")
    if static_tokens is not None and static_tokens < 1:
        raise DecodeError(f"static_tokens={static_tokens}: a static cache holds at least one token.")
    if static_tokens is not None and static_tokens > (limit := context_limit(config)):
        raise DecodeError(
            f"static_tokens={static_tokens}: the model's limit is {limit} tokens (max_position_embeddings), and a "
            "cache would stay empty beyond it. Give at most that."
        )
    if loaded.compiled is None and static_tokens is None:
        return DynamicCache(config=config)
    length = static_tokens or static_cache_tokens(1, context_limit(config), loaded.model.device)
    return StaticCache(config=config, max_cache_len=length)


def crop_cache(cache: Cache, tokens: int) -> None:
    """Forget all but the first tokens. After a step that was cut off some layers hold its tokens, others not yet."""
    for layer in cache.layers:
        if type(layer) in (DynamicLayer, StaticLayer) and (extra := int(layer.get_seq_length()) - tokens) > 0:
            if isinstance(layer, StaticLayer):
                layer.cumulative_length.sub_(extra)
            else:
                layer.crop(-extra)


def _run_processors(
    processors: Iterable[LogitsProcessor], input_ids: Tensor, logits: Tensor, top_k: int
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
    token_ids = torch.topk(scores, min(top_k, scores.shape[-1]), dim=-1).indices
    probabilities = torch.softmax(scores, dim=-1).gather(-1, token_ids)
    return Stage(name, (scores > -torch.inf).sum(dim=-1), token_ids, probabilities)


def _choose(scores: Tensor, config: GenerationConfig, *, with_probabilities: bool) -> tuple[Tensor, Tensor | None]:
    """The tokens (batch,), and the probabilities (batch, vocab) where they are needed or asked for."""
    probabilities = torch.softmax(scores, dim=-1) if config.do_sample or with_probabilities else None
    if config.do_sample and probabilities is not None:
        return torch.multinomial(probabilities, num_samples=1).squeeze(1), probabilities
    return torch.argmax(scores, dim=-1), probabilities


_REASONS = {  # in the order in which they are told where several hold
    EosTokenCriteria: "stop token",
    StopStringCriteria: "stop string",
    MaxLengthCriteria: "length",
    MaxTimeCriteria: "time",
}


class _StopCheck:
    """Act 4: which sequences end here, and why."""

    def __init__(self, criteria: StoppingCriteriaList, config: GenerationConfig) -> None:
        self._criteria = sorted(criteria, key=lambda criterion: list(_REASONS).index(type(criterion)))
        self.on_host = {type(criterion) for criterion in criteria} <= {EosTokenCriteria, MaxLengthCriteria}
        """Whether ids and length decide, without a look at tensors."""
        eos = config.eos_token_id
        self._stop_ids = frozenset(eos if isinstance(eos, list) else [] if eos is None else [eos])
        self._max_length = config.max_length
        self._pad_token_id = config._pad_token_tensor if self._stop_ids else None

    def __call__(
        self, token_ids: Sequence[int], length: int, input_ids: Tensor, unfinished: Sequence[bool]
    ) -> tuple[str | None, ...]:
        """One reason a sequence that ends with this token, else None."""
        if self.on_host:
            at_end = "length" if length >= self._max_length else None
            return tuple(
                ("stop token" if token_id in self._stop_ids else at_end) if goes_on else None
                for token_id, goes_on in zip(token_ids, unfinished, strict=True)
            )
        reasons: list[str | None] = [None] * len(token_ids)
        for criterion in self._criteria:
            for i, holds in enumerate(criterion(input_ids, None).tolist()):
                if holds and unfinished[i]:
                    reasons[i] = reasons[i] or _REASONS[type(criterion)]
        return tuple(reasons)

    def padding(self, unfinished: Sequence[bool], device: torch.device) -> Tensor | None:
        """What a finished sequence of a batch goes on with, -1 for the others; None if there is nothing to pad."""
        if self._pad_token_id is None or all(unfinished) or not any(unfinished):
            return None
        pad = int(self._pad_token_id)
        return torch.tensor([-1 if goes_on else pad for goes_on in unfinished], device=device)


def reweigh(
    logits: Tensor, *, temperature: float = 1.0, top_k: int = 0, top_p: float = 1.0, candidates: int = 10
) -> tuple[Stage, ...]:
    """What other warpers would have made of recorded logits; the model does not run.

    The warpers are transformers' own, in the order of ``generate``; one whose setting changes nothing is left out.

    Args:
        logits: (batch, vocab), of a step made with ``Keep(logits=True)``.
        temperature: above 0; 1 changes nothing.
        top_k: candidates that survive; 0 keeps all.
        top_p: probability that survives; 1 keeps all.
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


def _check_prompt(model: Any, input_ids: Tensor, cache: Cache | None) -> None:
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
    mode = copy.get_generation_mode()
    if mode not in (GenerationMode.GREEDY_SEARCH, GenerationMode.SAMPLE):
        raise DecodeError(
            f"{mode.value.replace('_', ' ')} is not shown by this loop: it does greedy search and sampling."
        )
    if copy.use_cache is False:
        raise DecodeError("use_cache=False: this loop feeds one token a step and needs the cache. Leave it out.")
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
