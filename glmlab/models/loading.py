"""``load_model``: a model, its tokenizer and a report of where its bytes are.

Name -> checked folder (checkpoints.py) -> config -> precision that fits (placement.py) -> model, through transformers'
Auto classes. Each step can refuse before memory is spent. A checkpoint's own code is never run: ``trust_remote_code``
is always off.
"""

import copy
import importlib.metadata
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from html import escape
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import data_path
from glmlab.core.units import MIB, format_bytes
from glmlab.models.chatglm3 import MODEL_TYPE, ChatGLMTokenizer
from glmlab.models.checkpoints import EMBEDDED, find_checkpoint, find_config, has_tokenizer, read_config_json
from glmlab.models.compiling import Compilation, CompiledForward
from glmlab.models.hub import CheckpointError
from glmlab.models.placement import (
    build_random,
    check_precision,
    choose_precision,
    cpu_threads,
    dtype_beside,
    dtype_name,
    find_device,
    measure_bytes,
    predict_bytes,
    quantization_config_of,
)

Weights = Literal["checkpoint", "random"]

_LARGE_FROM_BYTES = 64 * MIB  # below, loading is instant, and one CPU thread is faster than several
_MOST_LAYERS = 1000  # far above any published model; every layer takes time even without memory
_DIMENSIONS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
_ATTENTIONS = (None, "eager", "sdpa")
# fields that only change how the outputs look, and labels, which a language model does not have
_OVERRULED = ("return_dict", "output_attentions", "output_hidden_states", "num_labels")


@dataclass(frozen=True)
class LoadReport:
    """What was loaded, and where its bytes are; its repr is the table, in a notebook an HTML table."""

    name: str
    architecture: str
    weights: str
    precision: str
    dtype: str
    """dtype of what is not quantised, and of the computation."""
    attention: str
    device: str
    parameters: int
    bytes_by_component: dict[str, int]
    """embedding, attention, MLP, norms, head, quantisation state, other -> bytes; they add up to ``total_bytes``."""
    seconds: float
    tokenizer: str
    versions: dict[str, str]
    compilation: Compilation | None = None
    """How torch.compile went, with ``compile=True``."""

    @property
    def total_bytes(self) -> int:
        """Bytes of all parameters, buffers and quantisation state."""
        return sum(self.bytes_by_component.values())

    def _rows(self) -> list[tuple[str, str, str]]:
        """(what, value, share) of every line of the table; the components first."""
        components = [*self.bytes_by_component.items(), ("total", self.total_bytes)]
        rows = [(what, format_bytes(n_bytes), f"{n_bytes / self.total_bytes:.1%}") for what, n_bytes in components]
        facts = {
            "parameters": f"{self.parameters:,}",
            "architecture": self.architecture,
            "weights": self.weights,
            "precision": self.precision if self.precision == self.dtype else f"{self.precision}, rest {self.dtype}",
            "attention": self.attention,
            "device": self.device,
            "tokenizer": self.tokenizer,
            "load time": f"{self.seconds:.2f} s",
            **({} if self.compilation is None else {"compiled": str(self.compilation)}),
            **self.versions,
        }
        return rows + [(what, value, "") for what, value in facts.items()]

    def __repr__(self) -> str:
        rows = self._rows()
        first, second, third = (max(len(row[column]) for row in rows) for column in range(3))
        lines = [f"{what:<{first}}  {value:>{second}}  {share:>{third}}".rstrip() for what, value, share in rows]
        return "\n".join([self.name, *lines])

    def _repr_html_(self) -> str:
        body = "".join(
            f'<tr><th scope="row" style="text-align:left">{escape(what)}</th>'
            + "".join(f'<td style="text-align:right">{escape(cell)}</td>' for cell in (value, share))
            + "</tr>"
            for what, value, share in self._rows()
        )
        return f"<table><caption>{escape(self.name)}</caption><tbody>{body}</tbody></table>"


@dataclass(frozen=True, repr=False)
class LoadedModel:
    """A model with its tokenizer and its :class:`LoadReport`; its repr is the report."""

    model: Any
    tokenizer: Any
    report: LoadReport
    compiled: CompiledForward | None = None
    """The forward pass of decode steps, with ``compile=True``."""
    threads: int | None = None
    """CPU threads of a decode step (:func:`~glmlab.models.placement.cpu_threads`): one for a small model, because
    handing out small products costs more than it gains; None leaves the caller's setting."""

    def __repr__(self) -> str:
        return repr(self.report)

    def _repr_html_(self) -> str:
        return self.report._repr_html_()


def load_model(
    name: str = EMBEDDED,
    *,
    precision: str = "auto",
    device: str = "auto",
    weights: Weights = "checkpoint",
    attention: str | None = None,
    compile: bool = False,
) -> LoadedModel:
    """Load a causal language model and its tokenizer.

    Args:
        name: "embedded", a checkpoint folder, or a hub id such as "zai-org/chatglm3-6b".
        precision: "fp32", "bf16", "fp16", "int8" or "int4" (bitsandbytes; int4 is nf4), or "auto": the checkpoint's own
            dtype on a GPU and fp32 on a CPU if that fits into free memory, else the next smaller one that does.
        device: "auto" (the first GPU, else the CPU), "cpu", "cuda", "cuda:1", …
        weights: "checkpoint", or "random": built from the config alone, straight on the device. Memory does not depend
            on the values, so this measures a model without downloading it.
        attention: "sdpa" or "eager"; without it, what the config says, else sdpa.
        compile: let torch.compile make decode steps faster, over a StaticCache and with the same tokens. Takes up to a
            minute the first time. Where it cannot be done a CompileWarning says why, and so does the report.

    Raises:
        CheckpointError: the checkpoint folder or hub id cannot be used.
        GlmlabError: unknown precision, device or attention, no GPU, dimensions that int4 cannot take, too little free
            memory, tensors of the checkpoint that are missing, unexpected or mis-shaped.

    Example:
        >>> loaded = load_model("embedded", precision="fp32", device="cpu")
        >>> loaded.report.parameters == sum(p.numel() for p in loaded.model.parameters())
        True
    """
    started = time.perf_counter()
    plan = _plan(str(name), precision, device, weights, attention)
    with _quiet_loading(without_bar=plan.is_small), cpu_threads(plan.threads):
        if weights == "checkpoint":
            model = _load_checkpoint(plan)
        else:
            model = build_random(plan.config, plan.precision, plan.dtype, plan.device)
        tokenizer, tokenizer_origin = _load_tokenizer(plan)
        _set_stop_tokens(model, tokenizer)
        seconds = time.perf_counter() - started
        compiled = CompiledForward(model) if compile else None
        report = _report(plan, model, tokenizer_origin, seconds, compiled)
    usable = None if compiled is None or compiled.compilation.failure else compiled
    return LoadedModel(model, tokenizer, report, usable, plan.threads)


@dataclass(frozen=True)
class _Plan:
    """What is loaded, decided before memory is spent."""

    name: str
    folder: Path
    """Of the checkpoint; with random weights of the config."""
    config: Any
    skeleton: nn.Module
    weights: Weights
    precision: str
    dtype: torch.dtype
    device: torch.device

    @property
    def is_small(self) -> bool:
        """Whether loading is instant, and one CPU thread faster than several."""
        return sum(predict_bytes(self.skeleton, self.precision, self.dtype).values()) < _LARGE_FROM_BYTES

    @property
    def threads(self) -> int | None:
        """CPU threads of a decode step; None leaves the caller's setting."""
        return 1 if self.is_small and self.device.type == "cpu" else None


def _plan(name: str, precision: str, device: str, weights: Weights, attention: str | None) -> _Plan:
    if weights not in ("checkpoint", "random"):
        raise GlmlabError(f"weights={weights!r} is not known. Use 'checkpoint' or 'random'.")
    check_precision(precision, or_auto=True)
    if attention not in _ATTENTIONS:
        raise GlmlabError(f"attention={attention!r} is not known. Use 'sdpa' or 'eager'.")
    target = find_device(device)
    config_file = find_checkpoint(name) / "config.json" if weights == "checkpoint" else find_config(name)
    config = load_config(config_file)
    config._attn_implementation = attention or config._attn_implementation
    skeleton = build_skeleton(config)
    precision = choose_precision(name, skeleton, precision, target)
    dtype = dtype_beside(config, precision, target)
    return _Plan(name, config_file.parent, config, skeleton, weights, precision, dtype, target)


def _report(
    plan: _Plan, model: Any, tokenizer_origin: str, seconds: float, compiled: CompiledForward | None
) -> LoadReport:
    is_folder = plan.weights == "checkpoint" and plan.name != EMBEDDED and Path(plan.name).exists()
    return LoadReport(
        name=plan.folder.name if is_folder else plan.name,
        architecture=type(model).__name__,
        weights=plan.weights,
        precision=plan.precision,
        dtype=dtype_name(plan.dtype),
        attention=plan.config._attn_implementation or "eager",
        device=_device_name(plan.device),
        parameters=sum(parameter.numel() for parameter in plan.skeleton.parameters()),
        bytes_by_component=measure_bytes(model),
        seconds=seconds,
        tokenizer=tokenizer_origin,
        versions={
            package: importlib.metadata.version(package) for package in ("torch", "transformers", "bitsandbytes")
        },
        compilation=compiled.compilation if compiled else None,
    )


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


# ------------------------------------------------------------------------------------------- config and skeleton


def load_config(source: Path | Mapping[str, Any]) -> Any:
    """Build transformers' config class from a config.json (a file or its fields), without code of the checkpoint.

    Raises:
        CheckpointError: not JSON, no ``model_type``, or one that transformers does not know; dimensions that no model
            has; a checkpoint that is quantised already, or asks for attention code that is not PyTorch's.
        GlmlabError: model_type chatglm with another architecture than ChatGLM2/3's.

    Example:
        >>> load_config(find_config("chatglm3-6b")).num_hidden_layers
        28
    """
    if isinstance(source, Path):
        name, fields = source.name, read_config_json(source)
    else:
        name, fields = "config.json", copy.deepcopy(dict(source))  # transformers writes into nested fields
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{name} says model_type {model_type!r}, which transformers {transformers.__version__} does not know; the "
            "checkpoint's own code is never executed. Use a checkpoint in transformers' format."
        )
    _refuse_foreign_code(name, fields)
    if fields.get("quantization_config"):
        raise CheckpointError(
            f"{name} has a quantization_config: its tensors are quantised already. Use the unquantised "
            "checkpoint; precision='int8' or 'int4' quantises it on load."
        )
    try:
        config = AutoConfig.for_model(**{key: value for key, value in fields.items() if key not in _OVERRULED})
    except Exception as error:
        for own in (error, error.__cause__):  # a strict config class wraps what its __post_init__ raises
            if isinstance(own, GlmlabError):
                raise own from None
        raise CheckpointError(f"{name} is not a usable {model_type} config: {error}") from error
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise CheckpointError(
            f"{name} describes a {model_type} model, which is not a causal language model. Use one that generates text."
        )
    _refuse_dimensions(name, config)
    return config


def _refuse_dimensions(file_name: str, config: Any) -> None:
    """Refuse sizes that no model has, before anything is built."""
    for dimension in _DIMENSIONS:
        number = getattr(config, dimension, None)
        most = _MOST_LAYERS if dimension == "num_hidden_layers" else None
        if isinstance(number, int) and (number < 1 or (most and number > most)):
            raise CheckpointError(
                f"{file_name} says {dimension} = {number}, which no model has{f' (1 to {most})' if most else ''}. "
                "Take config.json from the checkpoint's own repository."
            )


def _refuse_foreign_code(file_name: str, fields: Any) -> None:
    """Refuse attention and kernels by name: transformers would fetch code of that name from the hub and run it."""
    if not isinstance(fields, dict):
        return
    for name, value in fields.items():
        if name.removeprefix("_") in ("attn_implementation", "attn_implementation_internal"):
            allowed = value is None or (isinstance(value, str) and value in _ATTENTIONS)
        else:
            allowed = not value or name.removeprefix("_") not in ("experts_implementation", "use_kernels")
        if not allowed:
            raise CheckpointError(
                f"{file_name} says {name} = {value!r}, which names code outside PyTorch, and the suite runs "
                "none that a checkpoint asks for. Remove that field from the file."
            )
        _refuse_foreign_code(file_name, value)


def build_skeleton(config: Any) -> nn.Module:
    """Build the model on the meta device: every module and shape, no memory for weights.

    Raises:
        CheckpointError: no model can be built from the config's values.
    """
    try:
        with torch.device("meta"):
            model: nn.Module = AutoModelForCausalLM.from_config(config)
    except Exception as error:  # model classes take values as they come: any error of theirs means a wrong one
        raise CheckpointError(
            f"no {config.model_type} model can be built from this config.json ({type(error).__name__}: "
            f"{_first_lines(error)}). Take config.json from the checkpoint's own repository."
        ) from error
    return model


# --------------------------------------------------------------------------------------------- weights, tokenizer


def _load_checkpoint(plan: _Plan) -> Any:
    folder = plan.folder
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=plan.config,
            dtype=plan.dtype,
            device_map={"": plan.device},
            quantization_config=quantization_config_of(plan.precision, plan.dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except torch.OutOfMemoryError as error:
        raise GlmlabError(
            f"{plan.device} ran out of memory while loading {folder.name} in {plan.precision}. Close other programs on "
            "it or use a smaller precision."
        ) from error
    except RuntimeError as error:
        raise CheckpointError(f"{folder} does not fit its own config.json: {_first_lines(error)}") from error
    except Exception as error:  # a broken tensor file or generation_config.json fails in many ways
        raise CheckpointError(
            f"{folder} cannot be loaded ({type(error).__name__}: {_first_lines(error)}). One of its files is damaged "
            "or hand-edited: fetch the weights, config.json and generation_config.json again."
        ) from error
    for what, keys in (
        ("lacks", info["missing_keys"]),
        ("has tensors that no part of the model takes:", info["unexpected_keys"]),
        ("has tensors of the wrong shape:", [key for key, *_ in info["mismatched_keys"]]),
        ("cannot be converted:", info["error_msgs"]),
        ("has tensors of the wrong shape:", _mis_shaped(model)),
    ):
        if keys:
            named = sorted(map(str, keys))
            raise CheckpointError(
                f"{folder} {what} {', '.join(named[:3])}{f' and {len(named) - 3} more' if len(named) > 3 else ''}. "
                "Weights and config.json belong to different models, or the download is damaged: fetch both again."
            )
    return model.eval()


def _mis_shaped(model: nn.Module) -> list[str]:
    """Layers whose weight is not out_features x in_features: quantising takes any shape without a word."""
    linears = [(name, module) for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    return [
        f"{name}.weight"
        for name, linear in linears
        if tuple((getattr(linear.weight, "quant_state", None) or linear.weight).shape)
        != (linear.out_features, linear.in_features)
    ]


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _load_tokenizer(plan: _Plan) -> tuple[Any, str]:
    """The tokenizer, and whose it is; without one, as beside a mere config, the embedded model's stands in."""
    if plan.name != EMBEDDED and (plan.weights == "checkpoint" or has_tokenizer(plan.folder)):
        try:
            tokenizer = AutoTokenizer.from_pretrained(plan.folder, config=plan.config, trust_remote_code=False)
            return tokenizer, "the model's own"
        except GlmlabError:
            raise
        except Exception as error:  # every tokenizer class has its own way to fail on a broken file
            raise CheckpointError(
                f"the tokenizer of {plan.folder} cannot be read: {_first_lines(error)}. Copy the tokenizer files of "
                "the same model into the folder."
            ) from error
    tokenizer = AutoTokenizer.from_pretrained(data_path("tiny-chatglm3"), trust_remote_code=False)
    return tokenizer, "the model's own" if plan.name == EMBEDDED else "the embedded model's, standing in"


def _set_stop_tokens(model: Any, tokenizer: Any) -> None:
    """ChatGLM3 ends an answer with the next role's token, which its published config does not say."""
    if model.config.model_type == MODEL_TYPE and isinstance(tokenizer, ChatGLMTokenizer):
        stops = ["<|user|>", "<|observation|>"]
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(stops)]
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _quiet_loading(*, without_bar: bool) -> Iterator[None]:
    """Turn transformers' own reports off (load_model raises), and its bar too where loading is instant."""
    from transformers.utils import logging

    bitsandbytes = getLogger("bitsandbytes")  # it logs an optional kernel package that is not installed
    verbosity, had_bar, level = logging.get_verbosity(), logging.is_progress_bar_enabled(), bitsandbytes.level
    bitsandbytes.setLevel(ERROR)
    logging.set_verbosity_error()
    if without_bar:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        bitsandbytes.setLevel(level)
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
