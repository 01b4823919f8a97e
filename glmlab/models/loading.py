"""``load_model``: a model, its tokenizer and a report of where its bytes are.

Three steps, each of which can refuse before memory is spent: name -> checked folder (checkpoints.py), config -> the
bytes that the asked precision needs (sizes.py), folder -> model through transformers' Auto classes. A checkpoint's own
code is never run: ``trust_remote_code`` is always off.
"""

import copy
import importlib.metadata
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from logging import ERROR, getLogger
from pathlib import Path
from typing import Any, Literal

import torch
import transformers
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, BitsAndBytesConfig

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import data_path
from glmlab.core.units import MIB, format_bytes
from glmlab.models.chatglm3 import MODEL_TYPE, ChatGLMTokenizer
from glmlab.models.checkpoint_files import CheckpointError, has_tokenizer, read_config_json
from glmlab.models.checkpoints import EMBEDDED, find_checkpoint, find_config
from glmlab.models.compiling import Compilation, CompiledForward
from glmlab.models.placement import LoadError, choose_precision, dtype_beside, dtype_name, find_device
from glmlab.models.sizes import FLOAT_PRECISIONS, PRECISIONS, measure_bytes, predict_bytes

Weights = Literal["checkpoint", "random"]

_LARGE_FROM_BYTES = 64 * MIB  # below, loading is instant, and one CPU thread is faster than several
_ALL_THREADS = torch.get_num_threads()


_MOST_LAYERS = 1000  # far above any published model; every layer takes time even without memory
_DIMENSIONS = ("num_hidden_layers", "hidden_size", "num_attention_heads", "num_key_value_heads", "vocab_size")
_ATTENTIONS = (None, "eager", "sdpa")
_OVERRULED = (  # fields that only change how the outputs look, and labels, which a language model does not have
    "return_dict",
    "output_attentions",
    "output_hidden_states",
    "num_labels",
)


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
        rows = [
            (component, format_bytes(n_bytes), f"{n_bytes / self.total_bytes:.1%}")
            for component, n_bytes in self.bytes_by_component.items()
        ]
        rows.append(("total", format_bytes(self.total_bytes), f"{1:.1%}"))
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
        widths = [max(len(row[column]) for row in rows) for column in range(3)]
        lines = [
            f"{what:<{widths[0]}}  {value:>{widths[1]}}  {share:>{widths[2]}}".rstrip() for what, value, share in rows
        ]
        return "\n".join([self.name, *lines])

    def _repr_html_(self) -> str:
        from html import escape

        body = "".join(
            "<tr>"
            + f'<th scope="row" style="text-align:left">{escape(what)}</th>'
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
        weights: "checkpoint", or "random": built from the config alone, straight on the device in the asked precision.
            Memory does not depend on the values, so this measures a model without downloading it.
        attention: "sdpa" or "eager"; without it, what the config says, else sdpa.
        compile: let torch.compile make decode steps faster; ``decode_steps`` and ``ChatSession`` then keep keys and
            values in a StaticCache. Costs up to a minute the first time, some seconds later on; the tokens are those of
            eager mode. Where it cannot be done a CompileWarning says why, and so does the report.

    Returns:
        The model in eval mode, its tokenizer, and the report. On a CPU, PyTorch is set to one thread for a small model
        and to all for a large one: handing out small products costs more than it gains. With random weights and no
        tokenizer of the model on this machine, the embedded model's tokenizer stands in; the report says so.

    Raises:
        LoadError: unknown precision, device or attention, no GPU, dimensions that int4 cannot take, too little free
            memory, tensors of the checkpoint that are missing, unexpected or mis-shaped.
        CheckpointError: the checkpoint folder or hub id cannot be used.
        ArchitectureError: another architecture under ChatGLM3's model type.

    Example:
        >>> loaded = load_model("embedded", precision="fp32", device="cpu")
        >>> loaded.report.parameters == sum(p.numel() for p in loaded.model.parameters())
        True
    """
    started = time.perf_counter()
    name = str(name)  # a Path is as good
    if weights not in ("checkpoint", "random"):
        raise LoadError(f"weights={weights!r} is not known. Use 'checkpoint' or 'random'.")
    if precision not in (*PRECISIONS, "auto"):
        raise LoadError(f"precision={precision!r} is not known. Use one of {', '.join(PRECISIONS)}, or auto.")
    if attention not in _ATTENTIONS:
        raise LoadError(f"attention={attention!r} is not known. Use 'sdpa' or 'eager'.")
    target = find_device(device)
    folder = find_checkpoint(name) if weights == "checkpoint" else None
    config_file = folder / "config.json" if folder else find_config(name)
    config = load_config(config_file)
    if attention is not None:
        config._attn_implementation = attention
    skeleton = build_skeleton(config)
    precision = choose_precision(name, skeleton, precision, target)
    dtype = dtype_beside(config, precision, target)

    n_bytes = sum(predict_bytes(skeleton, precision, dtype).values())
    if target.type == "cpu":
        torch.set_num_threads(1 if n_bytes < _LARGE_FROM_BYTES else _ALL_THREADS)
    with _quiet_loading(n_bytes):
        if folder:
            model = _load_checkpoint(folder, config, precision, dtype, target)
        else:
            model = _build_random(config, precision, dtype, target)
    tokenizer, tokenizer_origin = _load_tokenizer(name, folder or config_file.parent, config, weights)
    _set_stop_tokens(model, tokenizer)
    seconds = time.perf_counter() - started
    compiled = CompiledForward(model) if compile else None
    return LoadedModel(
        model,
        tokenizer,
        LoadReport(
            name=folder.name if folder and name != EMBEDDED and Path(name).exists() else name,
            architecture=type(model).__name__,
            weights=weights,
            precision=precision,
            dtype=dtype_name(dtype),
            attention=config._attn_implementation or "eager",
            device=_device_name(target),
            parameters=sum(parameter.numel() for parameter in skeleton.parameters()),
            bytes_by_component=measure_bytes(model),
            seconds=seconds,
            tokenizer=tokenizer_origin,
            versions={
                library: importlib.metadata.version(library) for library in ("torch", "transformers", "bitsandbytes")
            },
            compilation=compiled.compilation if compiled else None,
        ),
        None if compiled is None or compiled.compilation.failure else compiled,
    )


def load_config(config_file: Path | Mapping[str, Any]) -> Any:
    """Build transformers' config class from a config.json (a file or its fields), without code of the checkpoint.

    Raises:
        CheckpointError: not JSON, no ``model_type``, or one that transformers does not know; dimensions that no model
            has; a checkpoint that is quantised already, or asks for attention code that is not PyTorch's.
        ArchitectureError: model_type chatglm with another architecture than ChatGLM2/3's.

    Example:
        >>> load_config(find_config("chatglm3-6b")).num_hidden_layers
        28
    """
    if isinstance(config_file, Path):
        name, fields = config_file.name, read_config_json(config_file)
    else:
        name, fields = "config.json", copy.deepcopy(dict(config_file))  # transformers writes into nested fields
    model_type = fields.get("model_type")
    if not isinstance(model_type, str) or model_type not in transformers.CONFIG_MAPPING:
        raise CheckpointError(
            f"{name} says model_type {model_type!r}, which transformers {transformers.__version__} does "
            "not know; the checkpoint's own code is never executed. Use a checkpoint in transformers' format."
        )
    _refuse_foreign_code(name, fields)
    if fields.get("quantization_config"):
        raise CheckpointError(
            f"{name} has a quantization_config: its tensors are quantised already. Use the unquantised "
            "checkpoint; precision='int8' or 'int4' quantises it on load."
        )
    try:
        config = AutoConfig.for_model(**{key: value for key, value in fields.items() if key not in _OVERRULED})
    except GlmlabError:
        raise
    except Exception as error:  # a strict config class refuses a value with an error of its own
        if isinstance(error.__cause__, GlmlabError):
            raise error.__cause__ from None
        raise CheckpointError(f"{name} is not a usable {model_type} config: {error}") from error
    if type(config) not in transformers.AutoModelForCausalLM._model_mapping:
        raise CheckpointError(
            f"{name} describes a {model_type} model, which is not a causal language model. Use one that generates text."
        )
    for dimension in _DIMENSIONS:
        number = getattr(config, dimension, None)
        most = _MOST_LAYERS if dimension == "num_hidden_layers" else None
        if isinstance(number, int) and (number < 1 or (most and number > most)):
            raise CheckpointError(
                f"{name} says {dimension} = {number}, which no model has{f' (1 to {most})' if most else ''}. "
                "Take config.json from the checkpoint's own repository."
            )
    return config


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


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return f"{device} ({torch.cuda.get_device_name(device)})"
    threads = torch.get_num_threads()
    return f"cpu, {threads} thread{'s' if threads > 1 else ''}"


def quantization_config_of(precision: str, dtype: torch.dtype) -> BitsAndBytesConfig | None:
    """Return how bitsandbytes quantises for a precision; None for one that is a dtype."""
    if precision == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    if precision == "int4":
        return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=dtype)
    return None


def _load_checkpoint(folder: Path, config: Any, precision: str, dtype: torch.dtype, device: torch.device) -> Any:
    try:
        model, info = AutoModelForCausalLM.from_pretrained(
            folder,
            config=config,
            dtype=dtype,
            device_map={"": device},
            quantization_config=quantization_config_of(precision, dtype),
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
        )
    except RuntimeError as error:
        if isinstance(error, torch.OutOfMemoryError):
            raise LoadError(
                f"{device} ran out of memory while loading {folder.name} in {precision}. Close other programs on it "
                "or use a smaller precision."
            ) from error
        raise LoadError(f"{folder} does not fit its own config.json: {_first_lines(error)}") from error
    except Exception as error:  # a broken tensor file or generation_config.json fails in many ways
        raise LoadError(
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
            raise LoadError(
                f"{folder} {what} {', '.join(named[:3])}{f' and {len(named) - 3} more' if len(named) > 3 else ''}. "
                "Weights and config.json belong to different models, or the download is damaged: fetch both again."
            )
    return model.eval()


def _mis_shaped(model: nn.Module) -> list[str]:
    """Quantised layers whose weight is not out_features x in_features: quantising takes any shape without a word."""
    found = []
    for name, module in model.named_modules():
        if isinstance(module, nn.Linear):
            state = getattr(module.weight, "quant_state", None)
            shape = tuple(module.weight.shape if state is None else state.shape)
            if shape != (module.out_features, module.in_features):
                found.append(f"{name}.weight")
    return found


def _first_lines(error: Exception) -> str:
    return " ".join(str(error).split())[:400]


def _build_random(config: Any, precision: str, dtype: torch.dtype, device: torch.device) -> Any:
    """Build from the config, straight on the device."""
    if precision in FLOAT_PRECISIONS:
        return build_random_float(config, dtype, device)
    return fill_random_quantised(quantised_skeleton(config, precision, dtype), config, dtype, device)


def build_random_float(config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Return a model with random weights in a float precision, every tensor made on the device.

    Example:
        >>> config = load_config(find_config("chatglm3-6b"))
        >>> build_random_float(config, torch.float16, torch.device("meta")).lm_head.weight.dtype
        torch.float16
    """
    torch.manual_seed(0)
    with device:
        return AutoModelForCausalLM.from_config(config, dtype=dtype).eval()


def quantised_skeleton(config: Any, precision: str, dtype: torch.dtype) -> Any:
    """Return the model on the meta device, its linear layers but the head replaced by those of bitsandbytes.

    Example:
        >>> skeleton = quantised_skeleton(load_config(find_config("chatglm3-6b")), "int8", torch.float16)
        >>> type(skeleton.model.layers[0].mlp.down_proj).__name__
        'Linear8bitLt'
    """
    from transformers.integrations.bitsandbytes import replace_with_bnb_linear

    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config, dtype=dtype)
    kept = [name for name, module in model.named_modules() if module is model.get_output_embeddings()]
    replace_with_bnb_linear(
        model, modules_to_not_convert=kept, quantization_config=quantization_config_of(precision, dtype)
    )
    return model


def fill_random_quantised(model: Any, config: Any, dtype: torch.dtype, device: torch.device) -> Any:
    """Give a :func:`quantised_skeleton` random weights on the device, layer by layer: none but one is whole in fp16."""
    import bitsandbytes

    torch.manual_seed(0)
    for module in list(model.modules()):
        for key, parameter in list(module._parameters.items()):
            if parameter is None:
                continue
            values = torch.empty(parameter.shape, dtype=dtype, device=device)
            _fill(values, config)
            if isinstance(parameter, bitsandbytes.nn.Params4bit):
                module._parameters[key] = bitsandbytes.nn.Params4bit(
                    values, requires_grad=False, quant_type="nf4", compress_statistics=False, module=module
                ).to(device)
            elif isinstance(parameter, bitsandbytes.nn.Int8Params):
                module._parameters[key] = quantised_int8(values)
            else:
                module._parameters[key] = nn.Parameter(values, requires_grad=False)
    _rebuild_buffers(model, config, device)
    model.tie_weights()
    return model.eval()


def quantised_int8(weight: torch.Tensor) -> Any:
    """Quantise a weight where it lies; ``Int8Params.to`` would do so only on the way from the CPU to a GPU."""
    import bitsandbytes

    rows, scales, _ = bitsandbytes.functional.int8_vectorwise_quant(weight.to(torch.float16))
    return bitsandbytes.nn.Int8Params(rows, requires_grad=False, has_fp16_weights=False, CB=rows, SCB=scales)


def _fill(values: torch.Tensor, config: Any) -> None:
    """Norm weights and biases of one, matrices as transformers initialises them: values that generate without NaN."""
    if values.ndim == 1:
        values.fill_(1.0)
    else:
        values.normal_(0.0, config.initializer_range)


def _rebuild_buffers(model: nn.Module, config: Any, device: torch.device) -> None:
    """Rotary tables are computed, not loaded: build their modules anew on the device."""
    for name, module in list(model.named_modules()):
        if any(buffer.is_meta for buffer in module.buffers(recurse=False)):
            with device:
                model.set_submodule(name, type(module)(config=config))


def _load_tokenizer(name: str, folder: Path, config: Any, weights: Weights) -> tuple[Any, str]:
    if name == EMBEDDED:
        return AutoTokenizer.from_pretrained(data_path("tiny-chatglm3"), trust_remote_code=False), "the model's own"
    if weights == "checkpoint" or has_tokenizer(folder):
        try:
            return AutoTokenizer.from_pretrained(folder, config=config, trust_remote_code=False), "the model's own"
        except GlmlabError:
            raise
        except Exception as error:  # every tokenizer class has its own way to fail on a broken file
            raise LoadError(
                f"the tokenizer of {folder} cannot be read: {_first_lines(error)}. Copy the tokenizer files of the "
                "same model into the folder."
            ) from error
    tokenizer = AutoTokenizer.from_pretrained(data_path("tiny-chatglm3"), trust_remote_code=False)
    return tokenizer, "the embedded model's, standing in"


def _set_stop_tokens(model: Any, tokenizer: Any) -> None:
    """ChatGLM3 ends an answer with the next role's token, which its published config does not say."""
    if model.config.model_type == MODEL_TYPE and isinstance(tokenizer, ChatGLMTokenizer):
        stops = ["<|user|>", "<|observation|>"]
        model.generation_config.eos_token_id = [tokenizer.eos_token_id, *tokenizer.convert_tokens_to_ids(stops)]
        model.generation_config.pad_token_id = tokenizer.pad_token_id


@contextmanager
def _quiet_loading(n_bytes: int) -> Iterator[None]:
    """Turn transformers' own reports off (load_model raises), and its bar too where loading is instant."""
    from transformers.utils import logging

    getLogger("bitsandbytes").setLevel(ERROR)  # it logs an optional kernel package that is not installed
    verbosity, had_bar = logging.get_verbosity(), logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    if n_bytes < _LARGE_FROM_BYTES:
        logging.disable_progress_bar()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        if had_bar:
            logging.enable_progress_bar()
