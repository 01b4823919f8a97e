"""Every operation of a token lands in the part that its layer is named after, and no hook stays behind."""

from collections import Counter
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from torch import nn
from torch._C._autograd import DeviceType

from glmlab import load_model
from glmlab.latency import profile
from glmlab.latency.measure import LatencyError
from glmlab.latency.profile import PARTS, profile_token


@pytest.mark.parametrize(("precision", "weights_a_layer"), [("fp32", 1), ("int8", 3), ("int4", 1)])
def test_operations_are_counted_by_part(precision, weights_a_layer, monkeypatch):
    """Of 24 linear layers and the head, and of no clock: quantised layers unpack in operations of their own."""
    loaded = load_model("embedded", precision=precision, device="cpu")
    find = profile._passes
    n_linear = sum(isinstance(module, nn.Linear) for module in loaded.model.modules()) - 1
    passes = []
    monkeypatch.setattr(profile, "_passes", lambda *events, **how: passes.extend(find(*events, **how)) or passes)
    table = profile_token(loaded, context=16, tokens=2)
    counts = [Counter(part for part, _ in operations) for operations in passes[-2:]]
    assert counts[0] == counts[1]
    assert counts[0]["head"] == 1
    assert counts[0]["weights"] >= weights_a_layer * n_linear
    assert counts[0]["weights"] % n_linear == 0
    assert table.attrs["operations"] == counts[0].total() > 200
    assert table["part"].tolist() == list(PARTS)
    assert (table["ms"].head(4) > 0).all()
    assert table.attrs["conditions"]["precision"] == precision


def test_the_decode_loops_own_clocks_lie_within_the_step(embedded):
    parts = profile_token(embedded, context=8, tokens=2).set_index("part")["ms"]
    assert parts["sampling"] > 0
    assert parts["unexplained"] > 0


def test_hooks_are_gone_afterwards(embedded):
    def hooks() -> int:
        return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in embedded.model.modules())

    before = hooks()  # transformers leaves its own on a model that once returned hidden states
    profile_token(embedded, context=8, tokens=2)
    assert hooks() == before


def test_the_tiny_operation_has_as_many_records_as_its_price_is_divided_by():
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], acc_events=True) as profiler:
        torch.ones(1, 1).t()
    (tiny,) = [event for event in profiler.events() if event.name == "aten::t"]
    assert 1 + profile._records_inside(tiny) == profile._TINY_RECORDS


def _event(name, *inside, host_us=0, device_us=0, on=DeviceType.CPU):
    return SimpleNamespace(
        name=name,
        cpu_children=inside,
        device_type=on,
        time_range=SimpleNamespace(elapsed_us=lambda: host_us),
        device_time_total=device_us,
    )


def test_operations_belong_to_the_innermost_mark_and_those_inside_others_count_once():
    addmm = _event("aten::addmm", _event("aten::resolve_conj", host_us=1), host_us=40, device_us=400)
    linear = _event("aten::linear", addmm, _event("cudaLaunchKernel", host_us=5), host_us=50, device_us=400)
    weights = _event("glmlab: weights", _event("MatMul8bitLt", linear, host_us=80))
    attention = _event("glmlab: attention", weights, _event("aten::softmax", host_us=7, device_us=30))
    first = _event("glmlab: norms, activations, rest", attention)
    second = _event("glmlab: norms, activations, rest", _event("aten::mul", host_us=3, device_us=20))
    kernel = _event("glmlab: norms, activations, rest", on=DeviceType.CUDA)
    events = [first, attention, weights, kernel, _event("aten::argmax", host_us=9), second]

    def passes(**given):
        found = profile._passes(events, **given)
        return [[(part, pytest.approx(seconds * 1e6)) for part, seconds in operations] for operations in found]

    rest = "norms, activations, rest"
    assert passes(record_s=0.0, on_cuda=False) == [[("weights", 50), ("attention", 7)], [(rest, 3)]]
    assert passes(record_s=2e-6, on_cuda=False) == [[("weights", 44), ("attention", 7)], [(rest, 3)]]
    assert passes(record_s=1.0, on_cuda=False)[0] == [("weights", 0), ("attention", 7)]
    assert passes(record_s=2e-6, on_cuda=True) == [[("weights", 400), ("attention", 30)], [(rest, 20)]]


def test_each_operation_is_as_fast_as_in_any_pass_of_the_same_operations():
    passes = [[("weights", 5.0), ("head", 1.0)], [("weights", 4.0), ("head", 2.0)], [("weights", 1.0)]]
    assert profile._fastest_operations(passes, 1) == [("weights", 4.0), ("head", 1.0)]


def test_a_compiled_model_is_refused(embedded):
    with pytest.raises(LatencyError, match="cannot be taken apart by layers. Load it without compile=True"):
        profile_token(replace(embedded, compiled=embedded.model))


@pytest.mark.parametrize(("context", "tokens"), [(0, 1), (8, 0), (8180, 16)])
def test_lengths_that_do_not_fit_are_refused(embedded, context, tokens):
    with pytest.raises(LatencyError, match=f"context={context}, tokens={tokens}: .*limit of 8,192"):
        profile_token(embedded, context=context, tokens=tokens)
