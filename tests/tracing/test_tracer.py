"""Traces of models on the meta device: what is recorded, what is checked, what is refused, what is cached."""

import json
import warnings
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn
from torch.nn import functional as F

from glmlab.allocator.program import ALLOCATE, FREE
from glmlab.core.cards import find_card
from glmlab.core.curve import COMPONENTS
from glmlab.core.errors import GlmlabError
from glmlab.core.units import MIB
from glmlab.forecast.forecast import Forecast
from glmlab.forecast.workload import ForecastError
from glmlab.models.checkpoints import find_config, read_config_json
from glmlab.tracing import tracer as tracing
from glmlab.tracing.cuda_rules import (
    CUBLAS_WORKSPACE_BYTES,
    CUBLAS_WORKSPACE_BYTES_HOPPER,
    EFFECTS,
    NOT_MODELLED,
    DeviceRules,
)
from glmlab.tracing.fitting import Step, build_trace
from glmlab.tracing.recorder import META, AllocationRecorder, module_paths, record_allocations
from glmlab.tracing.trace import OWNERS, AllocationTrace, TraceError, TraceFacts, Turn, allocations
from glmlab.tracing.tracer import LONGEST, trace

LAYERS = 2
SMALL = {
    "chatglm3-6b": {"num_layers": LAYERS},
    "glm-4-9b-chat-hf": {"num_hidden_layers": LAYERS},
    "qwen2.5-7b": {"num_hidden_layers": LAYERS, "layer_types": None},
    "llama-2-7b": {"num_hidden_layers": LAYERS},
}
"""The suite's models, full size but for the number of layers."""


@pytest.fixture(scope="module", autouse=True)
def cache_folder(tmp_path_factory: pytest.TempPathFactory) -> Any:
    with pytest.MonkeyPatch.context() as patch:
        folder = tmp_path_factory.mktemp("cache")
        patch.setenv("GLMLAB_CACHE", str(folder))
        yield folder


def shallow(model: str, **fields: Any) -> Forecast:
    config = {**read_config_json(find_config(model)), **SMALL[model]}
    return Forecast.of({name: value for name, value in config.items() if value is not None}, **fields)


def labels(made: AllocationTrace, section: str) -> Counter[str]:
    return Counter(made.labels[made.label_of_event[event]][0] for event in allocations(made.program, section))


# ------------------------------------------------------------------------------------ models and variants


@pytest.mark.parametrize(
    ("model", "kv_heads"), [("chatglm3-6b", 2), ("glm-4-9b-chat-hf", 2), ("qwen2.5-7b", 4), ("llama-2-7b", 32)]
)
def test_every_model_of_the_suite_is_traced(model: str, kv_heads: int) -> None:
    made = shallow(model).trace
    assert made.facts.kv_bytes_per_token == 2 * LAYERS * kv_heads * 128 * 2
    assert made.program.carried["steady"] == made.program.carried["later.step3"]
    assert len(made.program.carried["steady"]) == 2 * LAYERS
    assert made.program.slots("steady") > 50 * LAYERS
    assert {"self_attn", "mlp"} <= {part for _, path in made.labels for part in path.split(".")}


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "int8"},
        {"precision": "int4"},
        {"precision": "int4", "turns": "3000:20"},
        {"attention": "eager"},
        {"cache": "static", "static_tokens": 4096},
        {"cache": "static", "static_tokens": 4096, "attention": "eager"},
        {"batch": 3},
        {"keeps": ("logits",)},
        {"keeps": ("previous cache",)},
        {"all_logits": True},
        {"architecture": "turing"},
        {"architecture": "hopper"},
        {"without_effects": tuple(EFFECTS)},
    ],
    ids=str,
)
def test_components_of_every_variant_add_up(fields: dict[str, Any]) -> None:
    fields = {"turns": "12:40,30:60,200:1,9:2", **fields}
    forecast = shallow("chatglm3-6b", **fields)
    table = forecast.curve.table
    assert (table[list(COMPONENTS)].sum(axis=1) - table["used_mib"]).abs().max() == 0
    assert table[list(COMPONENTS)].min().min() >= 0
    assert (
        table[["allocated_mib", "inactive_small_after_mib", "inactive_large_after_mib"]].sum(axis=1)
        == table["reserved_mib"]
    ).all()
    per_token = 2 * LAYERS * 2 * 128 * (4 if fields.get("precision") == "fp32" else 2) * fields.get("batch", 1)
    assert table["kv_payload_mib"].iloc[-1] == forecast.workload.context_tokens * per_token / MIB


def test_weights_are_the_models_bytes() -> None:
    config = read_config_json(find_config("chatglm3-6b"))
    rows = {}
    for precision in ("fp16", "int8", "int4"):
        rows[precision] = shallow("chatglm3-6b", precision=precision, turns="8:3").curve.table.iloc[-1]
    hidden, ffn, vocabulary = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    linear = {"attention": hidden * (2 * hidden + 2 * 2 * 128), "mlp": 3 * hidden * ffn}
    for row in rows.values():
        assert row["weights_embedding_mib"] == row["weights_head_mib"] == vocabulary * hidden * 2 / MIB
    for kind, n_weights in linear.items():
        for precision, n_bytes in (("fp16", 2), ("int8", 1), ("int4", 0.5)):
            exact = LAYERS * n_weights * n_bytes / MIB
            assert rows[precision][f"weights_{kind}_mib"] == pytest.approx(exact, abs=0.2)
    scales_mib = LAYERS * sum(linear.values()) / 64 * 4 / MIB
    assert rows["int4"]["quantisation_state_mib"] == pytest.approx(scales_mib, abs=0.1)
    assert 0 < rows["int8"]["quantisation_state_mib"] < 1
    assert rows["fp16"]["quantisation_state_mib"] == 0


def test_loading_begins_with_the_warm_up_block_and_quantises_tensor_by_tensor() -> None:
    made = shallow("chatglm3-6b", precision="int4").trace
    first, second = allocations(made.program, "load")[:2]
    warm_up = made.request(int(first), 0, 0)
    assert warm_up.operation == "loader's warm-up block"
    assert made.program.events[first + 1].tolist() == [FREE, 0, 0, 0]
    assert made.request(int(second), 0, 0).operation == "aten._to_copy.default"
    counted = labels(made, "load")
    assert (
        counted["bitsandbytes.quantize_4bit.default"] == 2 * LAYERS * 6
    )  # weight and scales of q, k, v, o, gate-up, down


def test_a_small_card_caps_the_warm_up_block() -> None:
    free = shallow("chatglm3-6b", precision="fp16", turns="8:3")
    loaded = free.curve.table.iloc[0]
    on_card = free.replace(card="RTX 4060").curve.table
    assert loaded["reserved_mib"] == on_card["reserved_mib"].iloc[0]  # 2 layers fit beside the spared 1.2 GiB
    model_mib = loaded["allocated_mib"]
    tight = free.replace(card=find_card("RTX 4060")._replace(memory_mib=int(model_mib + 1000)))
    first_rise = tight.rises[0]
    assert first_rise.request.operation == "loader's warm-up block"
    assert first_rise.mib == pytest.approx(model_mib + 1000 - 1.2 * 1024, abs=2)


def test_kept_objects_cost_what_they_hold() -> None:
    base, cached, logits = (
        shallow("chatglm3-6b", turns="12:200,30:300", keeps=keeps).curve.table.iloc[-1]
        for keeps in ((), ("previous cache",), ("logits",))
    )
    previous_mib = (12 + 200 - 1) * 2 * LAYERS * 2 * 128 * 2 / MIB
    assert cached["kv_copies_mib"] - base["kv_copies_mib"] == pytest.approx(previous_mib, abs=0.01)
    assert logits["kv_copies_mib"] - base["kv_copies_mib"] == pytest.approx(65024 * 4 / MIB, abs=0.01)


def test_a_static_cache_does_not_grow() -> None:
    table = shallow("chatglm3-6b", cache="static", static_tokens=4096, turns="12:2000").curve.table
    after_prefill = table[table["step"] > 2]
    assert after_prefill["reserved_mib"].nunique() == 1
    held = after_prefill["kv_payload_mib"] + after_prefill["kv_copies_mib"]
    assert held.min() == pytest.approx(4096 * 2 * LAYERS * 512 / MIB, abs=0.1)


def test_eager_attention_forms_a_matrix_of_scores() -> None:
    sdpa, eager = (
        shallow("chatglm3-6b", attention=attention, turns="2000:3").curve.table["peak_allocated_mib"].iloc[1]
        for attention in ("sdpa", "eager")
    )
    assert eager - sdpa > 32 * 2000 * 2000 * 2 / MIB


def test_workspace_follows_the_architecture() -> None:
    sizes = {}
    for architecture in ("ada", "hopper"):
        made = shallow("chatglm3-6b", architecture=architecture).trace
        workspace = [
            made.request(int(event), 11, 11).requested_bytes
            for event in allocations(made.program, "first.prefill")
            if made.labels[made.label_of_event[event]][0] == "cuBLAS workspace"
        ]
        assert len(workspace) == 1
        sizes[architecture] = workspace[0]
    assert sizes == {"ada": CUBLAS_WORKSPACE_BYTES, "hopper": CUBLAS_WORKSPACE_BYTES_HOPPER}


@pytest.mark.parametrize(
    ("batch", "turns", "in_prefill", "in_step"),
    [(1, "200:5", 0, 0), (2, "200:5", 1, 0), (1, "300:5", 1, 0), (300, "2:5", 1, 1)],
)
def test_4bit_weights_are_dequantised_by_products_of_many_rows(
    batch: int, turns: str, in_prefill: int, in_step: int
) -> None:
    made = shallow("chatglm3-6b", precision="int4", batch=batch, turns=turns).trace
    linears = LAYERS * 6  # q, k, v, o, gate and up, down
    assert labels(made, "first.prefill")["dequantize_4bit"] == linears * in_prefill
    assert labels(made, "steady")["dequantize_4bit"] == linears * in_step


def test_grouped_heads_without_flash_attention_use_the_unfused_form() -> None:
    fused = labels(shallow("chatglm3-6b", architecture="ada").trace, "steady")
    unfused = labels(shallow("chatglm3-6b", architecture="turing").trace, "steady")
    assert "aten.bmm.default" not in fused
    assert unfused["aten.bmm.default"] == 2 * LAYERS


def test_full_size_fp16_fits_a_card_or_not() -> None:
    forecast = Forecast.of("chatglm3-6b", precision="fp16", turns="8:100")
    assert forecast.curve.table["reserved_mib"].iloc[0] == pytest.approx(6_243_584_000 * 2 / MIB, abs=4)
    assert forecast.largest_context("RTX 3090").limited_by == "model"
    assert not forecast.largest_context("RTX 4060").fits


def test_a_static_cache_is_as_long_as_the_card_allows() -> None:
    heads = {"num_attention_heads": 32, "num_key_value_heads": 32, "hidden_size": 4096, "head_dim": 128}
    config = {**read_config_json(find_config("llama-2-7b")), **heads, "num_hidden_layers": 1, "vocab_size": 1000}
    config["max_position_embeddings"] = 1024
    forecast = Forecast.of(config, cache="static", batch=640, card="RTX 4060")  # 10 MiB of keys and values a token
    capacity = forecast.largest_context()
    assert capacity.limited_by == "memory"
    assert capacity.context_tokens < 1024
    last = forecast.replace(tokens=capacity.context_tokens).curve
    assert last.table["context_tokens"].iloc[-1] == capacity.context_tokens
    assert last.table["used_mib"].iloc[-1] == capacity.used_mib
    one_more = forecast.replace(tokens=capacity.context_tokens + 1).curve
    assert "out_of_memory" in one_more.provenance


# -------------------------------------------------------------------------------------- the recorder


def test_recorder_sees_allocations_frees_and_who_asked() -> None:
    model = nn.Sequential(nn.Linear(8, 16), nn.ReLU()).to("meta")
    recorder = AllocationRecorder()
    recorder.begin("step")
    with record_allocations(recorder), module_paths(recorder, model):
        with recorder.pause():
            for parameter in model.parameters():
                recorder.see(parameter, "weights")
        output = model(torch.empty(4, 8, device="cuda"))
        assert recorder.number_of(output) == 2
        del output
    made = recorder.allocations
    assert [(a.n_bytes, a.module) for a in made] == [(128, ""), (256, "0"), (256, "1")]
    assert recorder.rows[0].events == [0, 1, 2, ~1, ~0, ~2]  # the input dies after the call, with its caller's frame
    assert recorder.live() == []


def test_recorder_knows_views_and_repeats_operations_exactly() -> None:
    recorder = AllocationRecorder()
    recorder.begin("step")
    with record_allocations(recorder):
        source = torch.empty(4, 8, device="cuda")
        for _ in range(3):
            grown = torch.cat([source, source])
            assert grown.shape == (8, 8)
            assert grown.t().contiguous().stride() == (8, 1)
            unsafe = torch.ops.aten._unsafe_view(source, [32])
            assert recorder.number_of(unsafe) == recorder.number_of(source)
    sizes = Counter((a.operation, a.n_bytes) for a in recorder.allocations)
    assert sizes == {("aten.empty.memory_format", 128): 1, ("aten.cat.default", 256): 3, ("aten.clone.default", 256): 3}


def test_paused_storages_are_not_recorded() -> None:
    recorder = AllocationRecorder()
    recorder.begin("load")
    with record_allocations(recorder):
        with recorder.pause():
            hidden = torch.empty(100, device="cuda")
        shown = torch.empty(100, device="cuda")
        del hidden, shown
    assert len(recorder.allocations) == 1


@pytest.mark.parametrize(("dtype", "copies"), [(torch.float16, 0), (torch.bfloat16, 1)])
def test_softmax_in_fp32_reads_fp16_without_a_copy(dtype: torch.dtype, copies: int) -> None:
    recorder = AllocationRecorder()
    recorder.begin("step")
    rules = DeviceRules("ada")
    with record_allocations(recorder, operations=rules.operations(), functions=rules.functions()):
        scores = torch.empty(4, 100, dtype=dtype, device=META)
        F.softmax(scores, dim=-1, dtype=torch.float32)
    assert sum(a.n_bytes == 1600 for a in recorder.allocations) == 1 + copies


def test_every_effect_has_a_source_and_a_size() -> None:
    for effect in (*EFFECTS.values(), *NOT_MODELLED.values()):
        assert effect.what
        assert any(character.isdigit() for character in effect.size) or effect.size
        assert any(suffix in effect.source for suffix in (".cpp", ".py", ".cu", ".cuh"))
    assert not EFFECTS.keys() & NOT_MODELLED.keys()


# ----------------------------------------------------------------------------- building, and its refusals


def recorded(sizes: list[list[int]], *, module: str = "", keep: bool = False) -> tuple[AllocationRecorder, list[Step]]:
    """A made-up recording: loading, then conversations of one turn, with one request a step of the given sizes."""
    recorder, steps = AllocationRecorder(), []
    recorder.begin("load")
    recorder.allocate(1000, "weights")
    for turn, of_turn in enumerate(sizes, start=1):
        for i, n_bytes in enumerate(of_turn):
            name = f"first.{('prefill', 'step2', 'step3')[i]}" if i < 3 else "steady"
            recorder.begin(name, turn, 100 * turn + i, 10 + i)
            recorder.module = module
            number = recorder.allocate(n_bytes, "aten.cat.default")
            if not keep:
                recorder.free(number)
            live = (0, number) if keep else (0,)
            steps.append(Step(len(recorder.rows) - 1, turn, i, (), (), frozenset(), live, -1))
        recorder.module = ""
        recorder.begin("first.end", turn, 100 * turn + 5, 15)
        recorder.begin("between conversations")
    return recorder, steps


FACTS = TraceFacts(model="made up", precision="fp16", kv_bytes_per_token=0, context_limit=0)


def test_affine_sizes_are_found_exactly() -> None:
    sizes = [[512 * (100 * turn + i) + 64 for i in range(6)] for turn in (1, 2, 3)]
    made = build_trace(*recorded(sizes), {0: "weights_mlp"}, FACTS)
    event = int(allocations(made.program, "steady")[0])
    assert made.request(event, 123_456, 9).requested_bytes == 512 * 123_456 + 64
    assert made.schedule([Turn(8, 5)])[-2].tolist() == [1, made.program.section("steady"), 12, 12]


def test_sizes_that_stop_being_affine_are_refused() -> None:
    sizes = [[512 * (100 * turn + i) + 64 for i in range(6)] for turn in (1, 2, 3)]
    sizes[2][5] += 512
    with pytest.raises(
        TraceError, match=r"steady: aten.cat.default in the loop is not affine.*154176 B at 300|not affine"
    ):
        build_trace(*recorded(sizes), {0: "weights_mlp"}, FACTS)


def test_an_order_that_changes_is_refused() -> None:
    recorder, steps = recorded([[512] * 6, [512] * 6])
    recorder.rows[5].events.append(recorder.rows[5].events[0])
    with pytest.raises(TraceError, match="the order of events of 'steady' changes"):
        build_trace(recorder, steps, {0: "weights_mlp"}, FACTS)


def test_what_outlives_its_step_unowned_is_refused() -> None:
    with pytest.raises(TraceError, match="512 B of aten.cat.default in model.layers.0.mlp outlive their step"):
        build_trace(*recorded([[512] * 6], module="model.layers.0.mlp", keep=True), {0: "weights_mlp"}, FACTS)


# ------------------------------------------------------------------------------------------- bad input


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"model_type": "transformer-xxl"}, "transformer-xxl"),
        ({"hidden_size": -4096}, "hidden_size = -4096, which no model has"),
        ({"num_attention_heads": 31}, "cannot be traced|no model can be built|not a usable"),
        ({"multi_query_group_num": 5}, "cannot be traced|no model can be built|not a usable"),
        ({"padded_vocab_size": 0}, "vocab_size = 0, which no model has"),
        ({"rmsnorm": False}, "rmsnorm"),
    ],
)
def test_impossible_configs_are_refused(change: dict[str, Any], message: str, cache_folder: Path) -> None:
    before = sorted(cache_folder.iterdir())
    config = {**read_config_json(find_config("chatglm3-6b")), "num_layers": 1, **change}
    with pytest.raises(GlmlabError, match=message):
        _ = Forecast.of(config).trace
    assert sorted(cache_folder.iterdir()) == before


def test_int4_needs_blocks_of_64() -> None:
    config = {**read_config_json(find_config("chatglm3-6b")), "num_layers": 1, "ffn_hidden_size": 1000}
    with pytest.raises(TraceError, match="mlp.down_proj has 1000 inputs. Use int8"):
        _ = Forecast.of(config, precision="int4").trace


def test_a_static_cache_must_hold_the_turns() -> None:
    with pytest.raises(ForecastError, match="static cache of 100 tokens cannot hold"):
        _ = shallow("chatglm3-6b", cache="static", static_tokens=100, turns="8:200").trace
    with pytest.raises(TraceError, match=f"Use static_tokens={LONGEST}"):
        _ = shallow("chatglm3-6b", cache="static", turns="8:50").trace


def test_unknown_effects_are_named() -> None:
    with pytest.raises(TraceError, match="no effect 'magic'.*cublas-workspace"):
        _ = shallow("chatglm3-6b", without_effects=("magic",)).trace


# ----------------------------------------------------------------------------------------------- cache


def test_the_cache_is_used_and_follows_the_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLMLAB_CACHE", str(tmp_path))
    made = shallow("llama-2-7b").trace
    (file,) = tmp_path.iterdir()

    def refuse(*_: object) -> AllocationTrace:
        raise AssertionError("traced again")

    monkeypatch.setattr(tracing, "_record", refuse)
    again = shallow("llama-2-7b", turns="30:7").trace  # turns do not matter
    assert np.array_equal(again.program.events, made.program.events)
    with pytest.raises(AssertionError, match="traced again"):
        _ = shallow("llama-2-7b", batch=2).trace
    with pytest.raises(AssertionError, match="traced again"):
        trace(shallow("llama-2-7b").workload.trace_settings(), refresh=True)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_an_edit_of_the_code_makes_the_trace_anew(monkeypatch: pytest.MonkeyPatch) -> None:
    settings = shallow("llama-2-7b").workload.trace_settings()
    name = tracing._digest(settings)
    assert tracing._digest(settings) == name
    edited = Path(tracing.__file__).with_name("recorder.py")
    read_bytes = Path.read_bytes
    monkeypatch.setattr(Path, "read_bytes", lambda file: read_bytes(file) + b"#" * (file == edited))
    assert tracing._digest(settings) != name


def test_a_damaged_cache_file_is_traced_again_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLMLAB_CACHE", str(tmp_path))
    made = shallow("llama-2-7b").trace
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="cached trace is damaged and made again"):
        again = shallow("llama-2-7b").trace
    assert again.facts == made.facts
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        _ = shallow("llama-2-7b").trace


def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    blocked = tmp_path / "file"
    blocked.write_text("no folder")
    monkeypatch.setenv("GLMLAB_CACHE", str(blocked / "cache"))
    with pytest.warns(UserWarning, match="could not be cached"):
        _ = shallow("llama-2-7b").trace


def test_traces_of_two_runs_are_equal() -> None:
    one, two = (trace(shallow("qwen2.5-7b").workload.trace_settings(), refresh=True) for _ in range(2))
    assert np.array_equal(one.program.events, two.program.events)
    assert np.array_equal(one.program.sizes, two.program.sizes)
    assert tuple(one.program.owners) == OWNERS
    assert json.dumps(one.facts.effects) == json.dumps(two.facts.effects)
    assert (one.label_of_event >= 0).tolist() == (one.program.events[:, 0] == ALLOCATE).tolist()


@pytest.mark.parametrize(
    "fields", [{}, {"attention": "eager"}, {"precision": "int8"}, {"cache": "static", "static_tokens": 4096}], ids=str
)
def test_repeating_known_operations_changes_nothing(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = trace(shallow("chatglm3-6b", **fields).workload.trace_settings(), refresh=True)
    monkeypatch.setattr("glmlab.tracing.recorder._gives_fresh_tensor", lambda _: False)
    computed = trace(shallow("chatglm3-6b", **fields).workload.trace_settings(), refresh=True)
    assert np.array_equal(remembered.program.events, computed.program.events)
    assert np.array_equal(remembered.program.sizes, computed.program.sizes)
    assert remembered.labels == computed.labels
