"""What the recorder sees, what a GPU's rules change, and how a record becomes a trace."""

from collections import Counter

import pytest
import torch
from torch import nn
from torch.nn import functional as F

from glmlab.models.module_paths import follow_modules
from glmlab.tracing.cuda_rules import EFFECTS, NOT_MODELLED, DeviceRules
from glmlab.tracing.fitting import BETWEEN, build_trace
from glmlab.tracing.recorder import META, AllocationRecorder, record_allocations
from glmlab.tracing.trace import TraceError, TraceFacts, TraceSettings, TurnTokens, allocations, turn_sections

FACTS = TraceFacts(model="made up", precision="fp16", kv_bytes_per_token=0, context_limit=0)


@pytest.fixture
def recorder() -> AllocationRecorder:
    recorder = AllocationRecorder()
    recorder.begin("step")
    return recorder


def test_allocations_frees_and_who_asked(recorder: AllocationRecorder) -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU()).to(META)
    with record_allocations(recorder), follow_modules(model.named_modules(), recorder.run_in, recorder.run_in):
        with recorder.pause():
            for parameter in model.parameters():
                recorder.see(parameter, "weights")
        output = model(torch.empty(4, 8, device=META))
        assert recorder.number_of(output) == 2
        del output
    made = recorder.allocations
    assert [(a.n_bytes, a.module) for a in made] == [(128, ""), (256, "0"), (256, "1")]
    assert recorder.rows[0].events == [0, 1, 2, ~1, ~0, ~2]  # the input dies after the call, with its caller's frame
    assert recorder.live() == []


def test_views_are_no_allocations_and_operations_repeat_exactly(recorder: AllocationRecorder) -> None:
    with record_allocations(recorder):
        source = torch.empty(4, 8, device=META)
        for _ in range(3):
            grown = torch.cat([source, source])
            assert grown.shape == (8, 8)
            assert grown.t().contiguous().stride() == (8, 1)
            unsafe = torch.ops.aten._unsafe_view(source, [32])
            assert recorder.number_of(unsafe) == recorder.number_of(source)
    sizes = Counter((a.operation, a.n_bytes) for a in recorder.allocations)
    assert sizes == {("aten.empty.memory_format", 128): 1, ("aten.cat.default", 256): 3, ("aten.clone.default", 256): 3}


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_softmax_in_fp32_reads_fp16_without_a_copy(
    recorder: AllocationRecorder, dtype: torch.dtype, copies: int
) -> None:
    rules = DeviceRules(TraceSettings({}, "none"))
    with record_allocations(recorder, operations=rules.operations, functions=rules.functions):
        scores = torch.empty(4, 100, dtype=dtype, device=META)
        F.softmax(scores, dim=-1, dtype=torch.float32)
    assert sum(a.n_bytes == 1600 for a in recorder.allocations) == 1 + copies


def test_every_effect_has_a_source() -> None:
    for effect in (*EFFECTS.values(), *NOT_MODELLED.values()):
        assert effect.what
        assert effect.size
        assert any(suffix in effect.source for suffix in (".cpp", ".py", ".cu", ".cuh"))
    assert not EFFECTS.keys() & NOT_MODELLED.keys()


def recorded(sizes: list[list[int]]) -> AllocationRecorder:
    """A made-up recording: loading, then conversations of one turn, with one request a step of the given sizes."""
    recorder = AllocationRecorder()
    recorder.begin("load")
    recorder.allocate(1000, "weights")
    for number, of_turn in enumerate(sizes, start=1):
        *names, end = turn_sections(TurnTokens(10, len(of_turn)), is_first=True)
        for i, (name, n_bytes) in enumerate(zip(names, of_turn, strict=True)):
            recorder.begin(name, number, 100 * number + i, 10 + i).is_step = True
            recorder.free(recorder.allocate(n_bytes, "aten.cat.default"))
        recorder.begin(end, number, 100 * number + 5, 15)
        recorder.begin(BETWEEN)
    return recorder


AFFINE = [[512 * (100 * turn + i) + 64 for i in range(6)] for turn in (1, 2, 3)]


def test_affine_sizes_are_found_exactly() -> None:
    made = build_trace(recorded(AFFINE), FACTS)
    event = int(allocations(made.program, "steady")[0])
    assert made.request(event, 123_456, 9).requested_bytes == 512 * 123_456 + 64
    assert made.schedule([TurnTokens(8, 5)])[-2].tolist() == [1, made.program.section("steady"), 12, 12]


def test_sizes_that_stop_being_affine_are_refused() -> None:
    bent = [*AFFINE[:2], [*AFFINE[2][:5], AFFINE[2][5] + 512]]
    with pytest.raises(TraceError, match=r"aten.cat.default in the loop is not affine in .*156736 B at 305"):
        build_trace(recorded(bent), FACTS)


def test_an_order_that_changes_is_refused() -> None:
    recorder = recorded(AFFINE)
    recorder.rows[5].events.append(recorder.rows[5].events[0])
    with pytest.raises(TraceError, match="the order of events of 'steady' changes .* event 2 is .* at 104"):
        build_trace(recorder, FACTS)
