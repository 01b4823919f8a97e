"""Every tensor that a run allocates and frees, from a config alone: the model's own code on the meta device.

What runs is what a chat runs: the checkpoint's loading as transformers does it (:mod:`glmlab.tracing.meta_loading`),
then turns of :func:`glmlab.generation.decoding.decode_steps`, greedy, over one kept cache. Several short
conversations are recorded; :mod:`glmlab.tracing.fitting` turns them into an :class:`AllocationTrace` that holds
for any conversation, and refuses where sizes stop being affine in the context length or the order of events changes.

A trace depends on its settings (config included) and on the code: it is cached by the content of both, in
``$GLMLAB_CACHE`` or the user's cache folder.
"""

import contextlib
import gc
import hashlib
import importlib.metadata
import json
import logging
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
import transformers
from torch import Tensor

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import cache_folder
from glmlab.generation import decoding
from glmlab.models.loading import LoadedModel, build_skeleton, load_config
from glmlab.tracing import fitting
from glmlab.tracing.cuda_rules import EFFECTS, DeviceRules
from glmlab.tracing.fitting import Step, build_trace
from glmlab.tracing.meta_loading import build_random_on_meta, dtype_of, load_on_meta, owner_of_loaded
from glmlab.tracing.recorder import AllocationRecorder, OperationRule, module_paths, record_allocations
from glmlab.tracing.trace import (
    STEADY,
    STEP_NAMES,
    AllocationTrace,
    TraceError,
    TraceFacts,
    TraceSettings,
    Turn,
    read_trace,
)

CONVERSATIONS = (
    (Turn(11, 6), Turn(17, 6), Turn(23, 1), Turn(13, 2), Turn(29, 1), Turn(101, 1), Turn(7, 3), Turn(53, 1)),
    (Turn(19, 1),),
    (Turn(307, 2),),
    (Turn(601, 6),),
)
"""Recorded conversations. Together they run every section, each at more lengths than its sizes have coefficients."""

LONGEST = max(sum(p + a - 1 for p, a in conversation) for conversation in CONVERSATIONS)
MODEL_TYPES = ("chatglm", "glm", "glm4", "qwen2", "llama")
"""Architectures whose traces the tests run; another causal language model is traced all the same if it can be."""

_CODE_FOLDERS = ("core", "models", "prompts", "generation", "tracing")
"""Parts of the package whose code can shape a trace: an edit there makes cached traces anew."""

_LOADING = {
    "checkpoint": "loaded by from_pretrained(device_map=...)",
    "random": "built from the config with random weights",
}

_PACKAGES = ("torch", "transformers", "bitsandbytes")


def trace(settings: TraceSettings, *, refresh: bool = False) -> AllocationTrace:
    """Every allocation and free of loading, prefills and decode steps, for any turns.

    Args:
        settings: those of a forecast: ``forecast.workload.trace_settings()``.
        refresh: trace again, whatever the cache holds.

    Raises:
        TraceError: the config describes no model that can be built or run, sizes are not affine in the context length,
            the order of events changes, or something stays alive that nobody is known to hold; a static cache that is
            too short to trace, or an unknown effect.

    Example:
        >>> from glmlab.models.checkpoints import read_config_json
        >>> from glmlab.models.checkpoints import find_config
        >>> config = read_config_json(find_config("chatglm3-6b"))
        >>> trace(TraceSettings(config, "ChatGLM3-6B")).facts.kv_bytes_per_token
        28672
    """
    _check(settings)
    path = cache_folder() / f"trace-{_digest(settings)}.npz"
    if not refresh and path.is_file():
        try:
            return read_trace(path)
        except TraceError as error:
            warnings.warn(f"the cached trace is damaged and made again: {error}", stacklevel=2)
    made = _record(settings)
    try:
        made.save(path)
    except OSError as error:
        warnings.warn(f"the trace could not be cached ({error}); set GLMLAB_CACHE to a folder of yours", stacklevel=2)
    return made


def _check(settings: TraceSettings) -> None:
    if settings.cache == "static" and settings.static_tokens < LONGEST:
        raise TraceError(
            f"a static cache of {settings.static_tokens} tokens is shorter than the {LONGEST} tokens that tracing "
            f"needs. Use static_tokens={LONGEST} or more."
        )
    unknown = set(settings.without_effects) - set(EFFECTS)
    if unknown:
        raise TraceError(f"no effect {sorted(unknown)[0]!r} to switch off. There is: {', '.join(EFFECTS)}.")


def _digest(settings: TraceSettings) -> str:
    """Name of a trace: a digest of its settings, of the code that makes it, and of the packages' versions."""
    digest = hashlib.sha256(json.dumps(_as_json(settings), sort_keys=True).encode())
    package = Path(__file__).parent.parent
    for file in sorted(file for folder in _CODE_FOLDERS for file in (package / folder).glob("*.py")):
        digest.update(file.read_bytes())
    digest.update(json.dumps(_versions()).encode())
    return digest.hexdigest()[:24]


def _as_json(settings: TraceSettings) -> dict[str, Any]:
    return {
        **asdict(settings),
        "keeps": sorted(settings.keeps),
        "without_effects": sorted(settings.without_effects),
    }


def _versions() -> dict[str, str]:
    return {package: importlib.metadata.version(package) for package in _PACKAGES}


def _record(settings: TraceSettings) -> AllocationTrace:
    try:
        config = load_config(settings.config)
        config._attn_implementation = settings.attention
        stored_dtype = config.dtype
        config.dtype = dtype_of(config, settings.precision)
        model: Any = build_skeleton(config).eval()
    except GlmlabError:
        raise
    except Exception as error:
        raise TraceError(
            f"{settings.name}: no model can be built from this config ({type(error).__name__}: {error}). Compare its "
            "sizes (hidden_size, heads, layers, vocabulary) with the checkpoint's own config.json."
        ) from error
    run = _Run(settings, model, config, stored_dtype)
    try:
        with _undisturbed():
            return run.record()
    except GlmlabError:
        raise
    except (RuntimeError, ValueError, TypeError, IndexError, AttributeError, NotImplementedError) as error:
        known = "" if config.model_type in MODEL_TYPES else (
            f" Its architecture ({config.model_type}) is not one of those that the suite is tested with: "
            f"{', '.join(MODEL_TYPES)}."
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


@dataclass
class _Scalars:
    """Answers when the host asks for a value on the device: the loop's flags, lengths that a static cache counts."""

    goes_on: bool = True
    counted: dict[int, int] = field(default_factory=dict)  # allocation -> value

    def rules(self) -> dict[Any, OperationRule]:
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
            return torch.zeros(tensor.shape, dtype=kwargs.get("dtype") or tensor.dtype)
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


class _Run:
    """One recording: loading, then the conversations."""

    def __init__(self, settings: TraceSettings, model: Any, config: Any, stored_dtype: torch.dtype | None) -> None:
        self.settings, self.model, self.config = settings, model, config
        self.stored_dtype = stored_dtype
        self.recorder = AllocationRecorder()
        self.scalars = _Scalars()
        self.device = DeviceRules(
            settings.architecture,
            frozenset(settings.without_effects),
            settings.dequantise_4bit,
            settings.batch,
        )
        self.steps: list[Step] = []
        self.kv_bytes_per_token = 0

    def record(self) -> AllocationTrace:
        """Run everything; return the trace."""
        settings, recorder = self.settings, self.recorder
        operations = {**self.device.operations(), **self.scalars.rules()}
        recorder.begin("load")
        with record_allocations(recorder, operations=operations, functions=self.device.functions()):
            if settings.weights == "random":
                self.model = build_random_on_meta(recorder, self.config, settings.precision, self.model.dtype)
            else:
                self.model = load_on_meta(recorder, self.model, settings.precision, self.stored_dtype)
            self.owners = owner_of_loaded(recorder, self.model)
            fitting.check_loaded(recorder, self.owners)
            if settings.all_logits:
                self.model._supports_logits_to_keep = lambda: False
            with module_paths(recorder, self.model):
                for number, conversation in enumerate(CONVERSATIONS):
                    self._converse(number, conversation)
        facts = TraceFacts(
            model=settings.name,
            precision=settings.precision,
            kv_bytes_per_token=self.kv_bytes_per_token,
            context_limit=int(self.config.max_position_embeddings),
            first_prompt_min=2,
            later_prompt_min=2,
            description=f"{type(self.model).__name__} in {str(self.model.dtype).removeprefix('torch.')}, "
            f"{_LOADING[settings.weights]}, then turns of greedy decode_steps over one kept cache; recorded on the "
            "meta device",
            workload={name: value for name, value in _as_json(settings).items() if name not in ("config", "name")},
            versions=_versions(),
            effects={
                name: f"{effect.size} ({effect.source})"
                for name, effect in EFFECTS.items()
                if name not in settings.without_effects
            },
        )
        return build_trace(recorder, self.steps, self.owners, facts)

    def _converse(self, conversation: int, turns: tuple[Turn, ...]) -> None:
        tokenizer: Any = SimpleNamespace(pad_token_id=0)  # no text is read or written,
        report: Any = None  # and nobody asks how the model was loaded
        loaded = LoadedModel(self.model, tokenizer, report)
        cache = self._new_cache()
        keep = decoding.Keep(top_k=0, logits="logits" in self.settings.keeps)
        previous: list[Tensor] = []
        cached = 0
        for number, (prompt, generated) in enumerate(turns, start=1):
            turn = 100 * conversation + number
            prefix = "later" if cached else "first"
            ids = [[0] * (cached + prompt)] * self.settings.batch
            self.recorder.begin(f"{prefix}.{STEP_NAMES[0]}", turn, cached + prompt, prompt)
            steps = decoding.decode_steps(loaded, ids, max_new_tokens=generated, keep=keep, cache=cache)
            step = None
            for i in range(generated):
                if i > 0:
                    name = f"{prefix}.{STEP_NAMES[i]}" if i < len(STEP_NAMES) else STEADY
                    self.recorder.begin(name, turn, cached + prompt + i, prompt + i)
                self.scalars.goes_on = i < generated - 1
                step = next(steps)
                self._note_step(turn, i, cache, step, previous)
            short = str(generated) if generated < len(STEP_NAMES) else ""
            self.recorder.begin(f"{prefix}.end{short}", turn, cached + prompt + generated - 1, prompt + generated - 1)
            if next(steps, None) is not None:
                raise TraceError("the generation loop did not end with its last token. Please report this.")
            if "logits" not in self.settings.keeps:
                del step
            if "previous cache" in self.settings.keeps:
                previous = _tensors_of(cache)
            cached += prompt + generated - 1
        self.recorder.begin("between conversations")
        if self.device.workspace is not None:  # the next conversation stands for a fresh process
            self.recorder.free(self.device.workspace)
            self.device.workspace = None

    def _new_cache(self) -> Any:
        if self.settings.cache == "static":
            return transformers.StaticCache(config=self.config, max_cache_len=self.settings.static_tokens)
        return transformers.DynamicCache(config=self.config)

    def _note_step(self, turn: int, index: int, cache: Any, step: Any, previous: list[Tensor]) -> None:
        """What is alive at the end of a step, and who holds it."""
        number_of = self.recorder.number_of
        if step.context_length != self.recorder.rows[-1].context:
            raise TraceError(
                f"{self.settings.name}: the cache counts {step.context_length} tokens where "
                f"{self.recorder.rows[-1].context} were fed; such a cache cannot be forecast. Please report this."
            )
        tensors = _tensors_of(cache)
        kv = tuple(number_of(tensor) for tensor in tensors)
        context = self.recorder.rows[-1].context
        payload = sum(tensor.untyped_storage().nbytes() for tensor in tensors if tensor.dim() == 4)
        length = self.settings.static_tokens if self.settings.cache == "static" else context
        expected = sum(tensor.nbytes for tensor in tensors if tensor.dim() == 4)
        if payload != expected or payload % length:
            raise TraceError(
                f"{self.settings.name}: the cache holds {payload} B of keys and values for {context} tokens, which is "
                "no whole number of bytes a token; such a cache cannot be forecast. Please report this."
            )
        self.kv_bytes_per_token = payload // length
        of_step = [value for value in (step.logits, step.chosen_probability) if isinstance(value, Tensor)]
        kept = [number_of(tensor) for tensor in of_step] if "logits" in self.settings.keeps else []
        held = frozenset(number_of(tensor) for tensor in previous)
        self.steps.append(
            Step(
                row=len(self.recorder.rows) - 1,
                turn=turn,
                index=index,
                kv=kv,
                carried=(*kv, *kept),
                held=held,
                live=tuple(self.recorder.live()),
                workspace=-1 if self.device.workspace is None else self.device.workspace,
            )
        )


def _tensors_of(cache: Any) -> list[Tensor]:
    """Device tensors of a cache, layer by layer, keys before values."""
    return [
        tensor
        for layer in cache.layers
        for tensor in (layer.keys, layer.values, getattr(layer, "cumulative_length", None))
        if isinstance(tensor, Tensor) and tensor.device.type == "meta"
    ]
