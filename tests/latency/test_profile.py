"""The parts of a token's time add up, come from the layers that they are named after, and leave no hook behind."""

from types import SimpleNamespace

import pytest
from torch._C._autograd import DeviceType

from glmlab import load_model
from glmlab.latency import profile
from glmlab.latency.measure import LatencyError
from glmlab.latency.profile import PARTS, profile_token


@pytest.mark.parametrize("precision", ["fp32", "int8", "int4"])
def test_parts_add_up_to_the_step(precision):
    loaded = load_model("embedded", precision=precision, device="cpu")
    table = profile_token(loaded, context=16, tokens=4)
    assert tuple(table["part"]) == PARTS
    assert table["ms"].sum() == pytest.approx(table.attrs["step_ms"])
    assert table["share"].sum() == pytest.approx(1)
    assert (table["ms"].head(4) > 0).all()
    assert table.attrs["operations"] > 200
    assert table.attrs["conditions"]["precision"] == precision


def test_hooks_are_gone_afterwards(embedded):
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in embedded.model.modules())

    before = hooks()  # transformers leaves its own on a model that once returned hidden states
    profile_token(embedded, context=8, tokens=2)
    assert hooks() == before


def test_layers_are_told_apart_by_what_they_are(embedded):
    model = embedded.model
    parts = {
        name: profile._part_of(name, module, model, model.get_output_embeddings())
        for name, module in model.named_modules()
    }
    assert parts[""] == "norms, activations, rest"
    assert parts["lm_head"] == "head"
    assert parts["model.layers.0.self_attn"] == "attention"
    assert parts["model.layers.0.self_attn.q_proj"] == "weights"
    assert parts["model.layers.0.mlp.down_proj"] == "weights"
    assert parts["model.norm"] is parts["model.layers.0.input_layernorm"] is parts["model.embed_tokens"] is None


def _event(name, parent=None, host_us=0, device_us=0, on=DeviceType.CPU):
    return SimpleNamespace(
        name=name,
        cpu_parent=parent,
        device_type=on,
        is_user_annotation=name.startswith("glmlab"),
        time_range=SimpleNamespace(elapsed_us=lambda: host_us),
        device_time_total=device_us,
    )


def test_operations_belong_to_the_innermost_mark_and_those_within_others_count_once():
    first = _event("glmlab: norms, activations, rest")
    attention = _event("glmlab: attention", first)
    linear = _event("glmlab: weights", attention)
    product = _event("aten::linear", linear, host_us=50, device_us=400)
    events = [
        first, attention, linear, product,
        _event("aten::addmm", product, host_us=40, device_us=400),
        _event("cudaLaunchKernel", product, host_us=5),
        _event("aten::softmax", attention, host_us=7, device_us=30),
        _event("volta_sgemm", None, host_us=400, on=DeviceType.CUDA),
        _event("aten::argmax", None, host_us=9),
    ]  # fmt: skip
    second = _event("glmlab: norms, activations, rest")
    events += [second, _event("aten::mul", second, host_us=3, device_us=20)]
    on_host, on_gpu = (profile._by_pass(events, on_cuda=on_cuda) for on_cuda in (False, True))
    assert on_host == [
        [("weights", 50e-6, 2, 40e-6), ("attention", 7e-6, 1, 7e-6)],
        [("norms, activations, rest", 3e-6, 1, 3e-6)],
    ]
    assert [operation.seconds for operation in on_gpu[0]] == [400e-6, 30e-6]


@pytest.mark.parametrize(
    ("event_us", "left_us"),
    [(0, 50), (2, 44), (4, 40), (100, 40)],  # 3 operations inside; what the innermost took is the least that is left
)
def test_writing_down_what_is_inside_is_taken_off_as_far_as_it_can_have_cost(event_us, left_us):
    operation = profile._Operation("weights", 50e-6, events=4, innermost_s=40e-6)
    assert operation.without_writing(event_us * 1e-6) == pytest.approx(left_us * 1e-6)


class TestBadInput:
    def test_a_compiled_model_is_refused(self, compiled):
        with pytest.raises(LatencyError, match="cannot be taken apart by layers. Load it without compile=True"):
            profile_token(compiled)

    @pytest.mark.parametrize(("context", "tokens"), [(0, 1), (8, 0), (8180, 16)])
    def test_lengths(self, embedded, context, tokens):
        with pytest.raises(LatencyError, match=f"context={context}, tokens={tokens}: .*limit of 8,192"):
            profile_token(embedded, context=context, tokens=tokens)
