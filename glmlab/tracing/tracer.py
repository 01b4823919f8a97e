"""Every tensor that a run allocates and frees, from a config alone: the model's own code on the meta device.

The traced code is what a chat runs: transformers loads the checkpoint (:mod:`glmlab.tracing.meta_loading`), then
:func:`glmlab.generation.decoding.decode_steps` answers several short conversations, greedily, each over one cache.
:mod:`glmlab.tracing.fitting` turns the record into an :class:`AllocationTrace` that holds for any conversation, and
refuses a model whose sizes are not affine in the context length or whose events change their order.
"""

import contextlib
import gc
import logging
from collections.abc import Iterator, Sequence
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from glmlab.generation import decoding
from glmlab.models.loading import LoadedModel, build_skeleton, load_config
from glmlab.models.module_paths import follow_modules
from glmlab.models.placement import dtype_beside
from glmlab.tracing.cuda_rules import EFFECTS, DeviceRules
from glmlab.tracing.fitting import BETWEEN, build_trace
from glmlab.tracing.meta_loading import build_random_on_meta, load_on_meta, note_owners
from glmlab.tracing.recorder import AllocationRecorder, Row, Rule, record_allocations
from glmlab.tracing.trace import (
    AllocationTrace,
    TraceError,
    TraceFacts,
    TraceSettings,
    TurnTokens,
    turn_sections,
    versions,
)

CONVERSATIONS = (
    ((11, 6), (17, 6), (23, 1), (13, 2), (29, 1), (101, 1), (7, 3), (53, 1)),
    ((19, 1),),
    ((307, 2),),
    ((601, 6),),
)
"""Recorded conversations. Together they run every section, each at more lengths than its sizes have coefficients."""

ONE_TOKEN_CONVERSATIONS = (
    ((1, 2), (1, 2), (31, 1), (1, 2), (97, 1), (1, 2), (1, 1)),
    ((1, 2),),
    ((1, 1),),
)
"""Recorded too where a prompt has a single token."""

LONGEST = max(sum(prompt + generated - 1 for prompt, generated in turns) for turns in CONVERSATIONS)
"""Context length that the recorded conversations reach."""

MODEL_TYPES = ("chatglm", "glm", "llama", "mistral", "qwen2", "starcoder2")
"""Architectures that the tests trace; another causal language model is traced as well if it can be."""

_READ_ON_HOST = 2**20
"""Elements of the largest tensor whose values the host may read; larger ones are weights on their way."""


def record_trace(settings: TraceSettings) -> AllocationTrace:
    """Trace a model; :func:`glmlab.tracing.cached.trace` does so where no trace is cached.

    Raises:
        TraceError: as ``trace``.
    """
    if settings.cache == "static" and settings.static_tokens < LONGEST:
        raise TraceError(
            f"a static cache of {settings.static_tokens} tokens is shorter than the {LONGEST} tokens that tracing "
            f"needs. Use static_tokens={LONGEST} or more."
        )
    config = load_config(settings.config)
    config._attn_implementation = settings.attention
    stored_dtype = config.dtype
    config.dtype = dtype_beside(config, settings.precision, torch.device("cuda"))
    model = build_skeleton(config).eval()
    try:
        with _undisturbed():
            return _Run(settings, model).record(stored_dtype)
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        known = "" if config.model_type in MODEL_TYPES else (
            f" Its architecture ({config.model_type}) is not one that the tests trace: {', '.join(MODEL_TYPES)}."
        )  # fmt: skip
        raise TraceError(
            f"{settings.name}: this model cannot be traced ({type(error).__name__}: {error}).{known} Check the sizes "
            "in its config.json; if they are right, please report this."
        ) from error


@contextlib.contextmanager
def _undisturbed() -> Iterator[None]:
    """No garbage collection (it would free at moments of its own), no chatter of libraries about meta tensors."""
    collecting, has_bars = gc.isenabled(), transformers.utils.logging.is_progress_bar_enabled()
    disabled_level = logging.root.manager.disable
    gc.disable()
    logging.disable(logging.ERROR)
    transformers.utils.logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.disable(disabled_level)
        if has_bars:
            transformers.utils.logging.enable_progress_bar()
        if collecting:
            gc.enable()


class _Run:
    """One recording: loading, then the conversations."""

    def __init__(self, settings: TraceSettings, model: Any) -> None:
        self.settings, self.model, self.config = settings, model, model.config
        self.recorder = AllocationRecorder()
        self.scalars = _Scalars(model.generation_config.eos_token_id)
        self.device = DeviceRules(settings)
        self.longest_context = _longest_context(settings.name, self.config)
        self.kv_bytes_per_token = self.n_turns = 0

    def record(self, stored_dtype: torch.dtype | None) -> AllocationTrace:
        """Run everything; return the trace."""
        settings, recorder = self.settings, self.recorder
        operations = {**self.device.operations, **self.scalars.rules()}
        conversations = CONVERSATIONS + (ONE_TOKEN_CONVERSATIONS if settings.one_token_prompts else ())
        recorder.begin("load")
        with record_allocations(recorder, operations=operations, functions=self.device.functions):
            if settings.weights == "random":
                self.model = build_random_on_meta(recorder, self.config, settings.precision, self.model.dtype)
            else:
                self.model = load_on_meta(recorder, self.model, settings.precision, stored_dtype)
            note_owners(recorder, self.model)
            if settings.all_logits:
                self.model._supports_logits_to_keep = lambda: False
            with follow_modules(self.model.named_modules(), recorder.run_in, recorder.run_in):
                for turns in conversations:
                    self._converse(turns)
                    self.device.begin_process(recorder)
        return build_trace(recorder, self._facts())

    def _facts(self) -> TraceFacts:
        settings, dtype = self.settings, str(self.model.dtype).removeprefix("torch.")
        loading = "loaded by from_pretrained(device_map=...)"
        if settings.weights == "random":
            loading = "built from the config with random weights"
        return TraceFacts(
            model=settings.name,
            precision=settings.precision,
            kv_bytes_per_token=self.kv_bytes_per_token,
            context_limit=int(self.config.max_position_embeddings),
            longest_context=self.longest_context,
            description=f"{type(self.model).__name__} in {dtype}, {loading}, then turns of greedy decode_steps over "
            "one kept cache; recorded on the meta device",
            versions=versions(),
            effects={name: f"{effect.size} ({effect.source})" for name, effect in EFFECTS.items()},
        )

    def _converse(self, turns: Sequence[tuple[int, int]]) -> None:
        """Answer the turns of one conversation; every step is a row, and so is the end of a turn."""
        settings, recorder = self.settings, self.recorder
        tokenizer: Any = SimpleNamespace(pad_token_id=0)  # no text is read or written,
        report: Any = None  # and nobody asks how the model was loaded
        loaded = LoadedModel(self.model, tokenizer, report)
        keep = decoding.Keep(top_k=0, logits="logits" in settings.keeps)
        cache = self._new_cache()
        cached = 0
        for turn in map(TurnTokens._make, turns):
            self.n_turns += 1
            *names, end = turn_sections(turn, is_first=cached == 0)
            prompt = [[0] * (cached + turn.prompt)] * settings.batch
            row = recorder.begin(names[0], self.n_turns, cached + turn.prompt, turn.prompt)
            steps = decoding.decode_steps(loaded, prompt, max_new_tokens=turn.generated, keep=keep, cache=cache)
            step = None  # whoever keeps logits has those of the turn before until here
            for n_tokens, name in enumerate(names, start=turn.prompt):
                if n_tokens > turn.prompt:
                    row = recorder.begin(name, self.n_turns, cached + n_tokens, n_tokens)
                self.scalars.goes_on = n_tokens < turn.prompt + turn.generated - 1
                step = next(steps)
                self._note_step(row, cache, step)
            recorder.begin(end, self.n_turns, row.context, row.turn_tokens)
            if next(steps, None) is not None:
                raise TraceError("the generation loop did not end with its last token. Please report this.")
            if not keep.logits:
                del step
            cached = row.context
        recorder.begin(BETWEEN)  # the cache dies

    def _new_cache(self) -> Any:
        if self.settings.cache == "static":
            return transformers.StaticCache(config=self.config, max_cache_len=self.settings.static_tokens)
        return transformers.DynamicCache(config=self.config)

    def _note_step(self, row: Row, cache: Any, step: Any) -> None:
        """Note what is alive at the end of a step, and who holds it."""
        recorder, name = self.recorder, self.settings.name
        if step.context_length != row.context:
            raise TraceError(
                f"{name}: the cache counts {step.context_length} tokens where {row.context} were fed; such a cache "
                "cannot be forecast. Please report this."
            )
        tensors = _tensors_of(cache)
        self._count_bytes(tensors, row.context)
        of_step = [value for value in (step.logits, step.chosen_probability) if isinstance(value, Tensor)]
        kv = [recorder.number_of(tensor) for tensor in tensors]
        kept = [recorder.number_of(tensor) for tensor in of_step] if "logits" in self.settings.keeps else []
        row.is_step, row.carried = True, (*kv, *kept)
        for number in recorder.live():
            allocation = recorder.allocations[number]
            if number in kv:
                recorder.owners.setdefault(number, "kv_cache")
            elif number not in recorder.owners and allocation.module:
                raise TraceError(
                    f"{allocation.n_bytes} B of {allocation.operation} in {allocation.module} outlive their step, and "
                    "neither the cache nor the loop holds them: such a model cannot be forecast. Please report this."
                )
            else:
                recorder.owners.setdefault(number, "kept_outputs")

    def _count_bytes(self, tensors: Sequence[Tensor], context: int) -> None:
        """Bytes that the cache holds for a token, from its tensors (batch, KV heads, tokens, head_dim)."""
        kv = [tensor for tensor in tensors if tensor.dim() == 4]
        grows = self.settings.cache == "dynamic"
        for tensor in kv:
            if tensor.untyped_storage().nbytes() != tensor.nbytes or (grows and tensor.shape[2] != context):
                raise TraceError(
                    f"{self.settings.name}: after {context} tokens the cache holds keys or values of shape "
                    f"{tuple(tensor.shape)} in {tensor.untyped_storage().nbytes()} B; such a cache cannot be forecast. "
                    "Please report this."
                )
        self.kv_bytes_per_token = sum(tensor.nbytes // tensor.shape[2] for tensor in kv)


def _longest_context(name: str, config: Any) -> int:
    """Tokens that a cache with a sliding window holds, 0 for one that grows without end."""
    windows = [layer.get_max_length() for layer in transformers.DynamicCache(config=config).layers if layer.is_sliding]
    longest = min(windows, default=0) - 1
    if 0 <= longest < LONGEST:
        raise TraceError(
            f"{name} has a sliding window of {longest + 1} tokens, and tracing needs one of more than {LONGEST}: such "
            "a model cannot be forecast."
        )
    return max(longest, 0)


def _tensors_of(cache: Any) -> list[Tensor]:
    """Device tensors of a cache, layer by layer, keys before values."""
    held = [value for layer in cache.layers for value in vars(layer).values()]
    return [value for value in held if isinstance(value, Tensor) and value.device.type == "meta"]


class _Scalars:
    """Answers when the host asks for a value on the device: tokens, the loop's flags, what a static cache counts."""

    def __init__(self, eos: int | Sequence[int] | None) -> None:
        ends = eos if isinstance(eos, list | tuple) else [eos]
        self.token = next(token for token in range(len(ends) + 1) if token not in ends)  # one that ends no answer
        self.goes_on = True
        self.counted: dict[int, int] = {}  # allocation -> value

    def rules(self) -> dict[Any, Rule]:
        """Rules by ATen operation."""
        aten = torch.ops.aten
        return {
            aten._local_scalar_dense.default: self._read,
            aten._to_copy.default: self._copy,
            aten.add_.Tensor: self._add,
        }

    def _read(self, recorder: AllocationRecorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor = args[0]
        if tensor.device.type != "meta":
            return NotImplemented
        number = recorder.number_of(tensor)
        if number in self.counted:
            return self.counted[number]
        operation = recorder.allocations[number].operation if number >= 0 else ""
        if tensor.dtype == torch.bool:  # "is anybody unfinished", "is the mask all ones"
            return self.goes_on if ".any" in operation else True
        return 0.0 if tensor.is_floating_point() else 0

    def _copy(self, recorder: AllocationRecorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """A copy to the host has no data to copy; a copy of a counted length to the device goes on counting."""
        tensor, device = args[0], kwargs.get("device")
        if device is None:
            return NotImplemented
        if tensor.device.type == "meta" and device.type == "cpu":
            copied = torch.empty(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
            return copied.fill_(self.token) if copied.numel() < _READ_ON_HOST else copied  # to fill a weight takes long
        if tensor.device.type == "cpu" and device.type == "meta" and tensor.dim() == 0 and tensor.dtype == torch.int64:
            copied = func(*args, **kwargs)
            recorder.see(copied, str(func))
            self.counted[recorder.number_of(copied)] = int(tensor)
            return copied
        return NotImplemented

    def _add(self, recorder: AllocationRecorder, func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        tensor, other = args[:2]
        number = recorder.number_of(tensor) if tensor.device.type == "meta" else -1
        if number in self.counted:
            self.counted[number] += int(other)
        return NotImplemented
