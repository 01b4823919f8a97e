"""The loading of a model as transformers does it on a GPU, recorded on the meta device.

transformers' own ``convert_and_load_state_dict_in_model`` runs over a checkpoint whose tensors have shapes and no
content: it decides the order of the tensors (sorted by name across all shards), their conversion (the fused
query_key_value of ChatGLM3 is split into three views of one tensor), and bitsandbytes quantises tensor by tensor.
Before that transformers asks for one block as large as the whole model and frees it, so that all large weights lie in
one segment.
"""

import contextlib
from collections.abc import Iterator
from typing import Any
from unittest.mock import patch

import torch
from torch import Tensor, nn
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import convert_and_load_state_dict_in_model, revert_weight_conversion
from transformers.modeling_utils import LoadStateDictConfig, get_total_byte_count, local_torch_dtype
from transformers.quantizers.auto import AutoHfQuantizer

from glmlab.core.resources import environment_variable
from glmlab.models.placement import (
    BLOCK_4BIT,
    FLOAT_PRECISIONS,
    build_random_float,
    component_of,
    fill_random_quantised,
    own_tensors,
    quantisation_state_of,
    quantised_int8,
    quantised_skeleton,
    quantization_config_of,
    quantized_linears,
)
from glmlab.tracing.recorder import META, AllocationRecorder
from glmlab.tracing.trace import WARM_UP, TraceError

_OWNERS = {"MLP": "weights_mlp", "other": "weights_norms"}
"""Owners of a model's components whose name is not theirs after "weights_"."""


class _CheckpointTensor:
    """A tensor of a checkpoint file: shape and dtype; read, it is host memory that nobody touches."""

    def __init__(self, shape: torch.Size, dtype: torch.dtype) -> None:
        self.shape, self.dtype = shape, dtype

    def __getitem__(self, _: Any) -> Tensor:
        return torch.empty(self.shape, dtype=self.dtype, device="cpu")


def load_on_meta(recorder: AllocationRecorder, model: Any, precision: str, stored_dtype: torch.dtype | None) -> Any:
    """Load ``model`` while :func:`~glmlab.tracing.recorder.record_allocations` records; return it.

    Args:
        recorder: its current row is the loading.
        model: skeleton on the meta device, in the dtype of everything that is not quantised.
        precision: as in :class:`~glmlab.tracing.trace.TraceSettings`.
        stored_dtype: dtype of the checkpoint's tensors; None = that of the model.

    Raises:
        TraceError: a layer that int4 cannot quantise.
    """
    dtype: torch.dtype = model.dtype
    with recorder.pause():
        stored = {
            name: _CheckpointTensor(tensor.shape, stored_dtype or dtype)
            for name, tensor in revert_weight_conversion(model, dict(_saved_tensors(model))).items()
        }
        with local_torch_dtype(dtype):
            quantizer = _quantizer(model, precision, dtype)
    names = dict.fromkeys(model.state_dict(), META)
    warm_up_bytes = int(get_total_byte_count(model, names, quantizer)[META]) // 2 * 2
    recorder.temporary(WARM_UP, warm_up_bytes)
    # in this thread alone: the recorder does not see others, and the order is then that of the names
    with _quantising_on_meta(precision), environment_variable("HF_DEACTIVATE_ASYNC_LOAD", "1"):
        load_config = LoadStateDictConfig(
            device_map={"": META},
            dtype=dtype,
            dtype_plan=model._get_dtype_plan(dtype),
            hf_quantizer=quantizer,
            weight_mapping=get_model_conversion_mapping(model, None, quantizer),
        )
        info, _ = convert_and_load_state_dict_in_model(model, stored, load_config, None)
    failed = {*info.conversion_errors, *info.mismatched_keys}
    if failed:
        raise TraceError(
            f"transformers could not load these tensors: {', '.join(sorted(map(str, failed))[:3])}: "
            f"{next(iter(info.conversion_errors.values()), 'wrong shapes')[-300:]}."
        )
    for name, buffer in model.named_buffers():
        owner, _, key = name.rpartition(".")
        model.get_submodule(owner).register_buffer(key, torch.empty_like(buffer, device=META), persistent=False)
    model.tie_weights()
    if quantizer is not None:
        quantizer.postprocess_model(model)
    return model.eval()


def build_random_on_meta(recorder: AllocationRecorder, config: Any, precision: str, dtype: torch.dtype) -> Any:
    """Build a model with random weights as :func:`~glmlab.models.loading.load_model` does; arguments as above."""
    if precision in FLOAT_PRECISIONS:
        return build_random_float(config, dtype, META)
    with recorder.pause():
        skeleton = quantised_skeleton(config, precision, dtype)
    with _quantising_on_meta(precision):
        return fill_random_quantised(skeleton, config, dtype, META)


def note_owners(recorder: AllocationRecorder, model: nn.Module) -> None:
    """Note the owner of every allocation that loading leaves behind.

    Raises:
        TraceError: one that no parameter, buffer or quantisation state of the model holds.
    """
    for path, module in model.named_modules():
        for _, tensor in own_tensors(module):
            for state in quantisation_state_of(module, tensor):
                recorder.owners.setdefault(recorder.number_of(state), "quantisation_state")
            component = component_of(path)
            recorder.owners[recorder.number_of(tensor)] = _OWNERS.get(component, f"weights_{component}")
    for number in recorder.live():
        left = recorder.allocations[number]
        if number not in recorder.owners and left.n_bytes > 4096:  # bitsandbytes keeps its code tables in a global
            raise TraceError(
                f"after loading, {left.n_bytes} B of {left.operation} are alive that no tensor of the model holds. "
                "Please report this."
            )
        recorder.owners.setdefault(number, "quantisation_state")


def _saved_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Tensors that a checkpoint of the model holds: a tied head is stored once."""
    tied: Any = getattr(model, "all_tied_weights_keys", {}) or {}
    for name, tensor in model.state_dict().items():
        if name not in tied:
            yield name, tensor


def _quantizer(model: Any, precision: str, dtype: torch.dtype) -> Any:
    """The quantiser of transformers, with the model's linear layers replaced, or None."""
    settings = quantization_config_of(precision, dtype)
    if settings is None:
        return None
    if precision == "int4":
        for path, linear in quantized_linears(model):
            if linear.in_features % BLOCK_4BIT:
                raise TraceError(
                    f"int4 quantises blocks of {BLOCK_4BIT} weights, but {path} has {linear.in_features} inputs. Use "
                    "int8."
                )
    quantizer = AutoHfQuantizer.from_config(settings, pre_quantized=False)
    quantizer.preprocess_model(model, device_map={"": META}, dtype=dtype)
    return quantizer


@contextlib.contextmanager
def _quantising_on_meta(precision: str) -> Iterator[None]:
    """Let bitsandbytes quantise on its way to "meta", which it takes for a model without weights otherwise."""
    if precision in FLOAT_PRECISIONS:
        yield
        return
    from bitsandbytes.nn import Int8Params, Params4bit

    to_4bit, to_int8 = Params4bit.to, Int8Params.to

    def quantise_4bit(self: Any, *args: Any, **kwargs: Any) -> Any:
        return to_4bit(self, *args, **kwargs) if self.bnb_quantized else self._quantize(META)

    def quantise_int8(self: Any, *args: Any, **kwargs: Any) -> Any:
        if self.data.dtype == torch.int8 or self.data.device.type != "cpu":
            return to_int8(self, *args, **kwargs)
        # Int8Params._quantize, whose last step (self.data = CB) PyTorch refuses from host to meta
        return quantised_int8(self.data.contiguous().to(device=META, dtype=torch.float16))

    with patch.object(Params4bit, "to", quantise_4bit), patch.object(Int8Params, "to", quantise_int8):
        yield
