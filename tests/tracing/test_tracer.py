"""Traces of models on the meta device: what is recorded, what is refused, what is cached."""

import warnings
from collections import Counter
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from transformers.models.llama.modeling_llama import LlamaMLP

from glmlab.allocator.program import ALLOCATE, FREE
from glmlab.core.cards import find_card
from glmlab.core.curve import COMPONENTS
from glmlab.core.errors import GlmlabError
from glmlab.core.units import MIB
from glmlab.forecast.forecast import Forecast
from glmlab.forecast.workload import ForecastError
from glmlab.models.checkpoints import find_config, read_config_json
from glmlab.tracing import cached, tracer
from glmlab.tracing.cached import trace
from glmlab.tracing.cuda_rules import CUBLAS_WORKSPACE_BYTES, CUBLAS_WORKSPACE_BYTES_HOPPER
from glmlab.tracing.trace import OWNERS, AllocationTrace, TraceError, TraceSettings, TurnTokens, allocations
from glmlab.tracing.tracer import LONGEST

LAYERS = 2
CHATGLM, LLAMA, MISTRAL, QWEN = "chatglm3-6b", "llama-2-7b", "mistral-7b-v0.1", "qwen2.5-7b"
STATIC = {"cache": "static", "static_tokens": 4096}


def shallow(model: str, **changes: Any) -> dict[str, Any]:
    """The config of a model, full size but for the number of layers."""
    config = read_config_json(find_config(model))
    return {**config, "num_layers" if "num_layers" in config else "num_hidden_layers": LAYERS, **changes}


def settings(model: str = CHATGLM, **fields: Any) -> TraceSettings:
    return TraceSettings(shallow(model), model, **fields)


def forecast(model: str = CHATGLM, **fields: Any) -> Forecast:
    return Forecast.of(shallow(model), **fields)


def labels(made: AllocationTrace, section: str) -> Counter[str]:
    return Counter(made.labels[made.label_of_event[event]][0] for event in allocations(made.program, section))


def assert_equal(one: AllocationTrace, other: AllocationTrace) -> None:
    assert np.array_equal(one.program.events, other.program.events)
    assert np.array_equal(one.program.sizes, other.program.sizes)
    assert (one.labels, one.facts, one.program.carried) == (other.labels, other.facts, other.program.carried)


# ------------------------------------------------------------------------------------ models and variants


@pytest.mark.parametrize(
    ("model", "kv_heads"),
    [(CHATGLM, 2), ("glm-4-9b-chat-hf", 2), (QWEN, 4), (LLAMA, 32), (MISTRAL, 8), ("starcoder2-3b", 2)],
)
def test_models_are_traced(model: str, kv_heads: int) -> None:
    made = trace(settings(model))
    assert made.facts.kv_bytes_per_token == 2 * LAYERS * kv_heads * 128 * 2
    assert made.program.carried["steady"] == made.program.carried["later.step3"]
    assert len(made.program.carried["steady"]) == 2 * LAYERS
    assert made.program.slots("steady") > 40 * LAYERS
    assert {"self_attn", "mlp"} <= {part for _, path in made.labels for part in path.split(".")}
    assert (made.label_of_event >= 0).tolist() == (made.program.events[:, 0] == ALLOCATE).tolist()


@pytest.mark.parametrize(
    "fields",
    [
        {"precision": "fp32"},
        {"precision": "bf16"},
        {"precision": "int8"},
        {"precision": "int4"},
        {"precision": "int4", "turns": "3000:20"},
        {"attention": "eager"},
        STATIC,
        {**STATIC, "attention": "eager"},
        {"batch": 3},
        {"keeps": ("logits",)},
        {"all_logits": True},
        {"architecture": "turing"},
        {"turns": "1:5,1:1,1:2,30:3,1:4"},
        {"turns": "1:5,1:1,1:2,30:3,1:4", **STATIC},
    ],
    ids=str,
)
def test_components_of_every_variant_add_up(fields: dict[str, Any]) -> None:
    made = forecast(**{"turns": "12:40,30:60,200:1,9:2", **fields})
    table = made.curve.table
    assert (table[list(COMPONENTS)].sum(axis=1) - table["used_mib"]).abs().max() == 0
    assert table[list(COMPONENTS)].min().min() >= 0
    inactive = table["inactive_small_after_mib"] + table["inactive_large_after_mib"]
    assert (table["allocated_mib"] + inactive == table["reserved_mib"]).all()
    per_token = 2 * LAYERS * 2 * 128 * (4 if fields.get("precision") == "fp32" else 2) * fields.get("batch", 1)
    assert table["kv_payload_mib"].iloc[-1] == made.workload.context_tokens * per_token / MIB


def test_weights_are_the_models_bytes() -> None:
    config = shallow(CHATGLM)
    rows = {
        precision: forecast(precision=precision, turns="8:3").curve.table.iloc[-1]
        for precision in ("fp16", "int8", "int4")
    }
    hidden, ffn, vocabulary = config["hidden_size"], config["ffn_hidden_size"], config["padded_vocab_size"]
    linear = {"attention": hidden * (2 * hidden + 2 * 2 * 128), "mlp": 3 * hidden * ffn}
    for (precision, row), n_bytes in zip(rows.items(), (2, 1, 0.5), strict=True):
        assert row["weights_embedding_mib"] == row["weights_head_mib"] == vocabulary * hidden * 2 / MIB
        for kind, n_weights in linear.items():
            exact = LAYERS * n_weights * n_bytes / MIB
            assert row[f"weights_{kind}_mib"] == pytest.approx(exact, abs=0.2), precision
    scales_mib = LAYERS * sum(linear.values()) / 64 * 4 / MIB
    assert rows["int4"]["quantisation_state_mib"] == pytest.approx(scales_mib, abs=0.1)
    assert 0 < rows["int8"]["quantisation_state_mib"] < 1
    assert rows["fp16"]["quantisation_state_mib"] == 0


def test_loading_begins_with_the_warm_up_block_and_quantises_tensor_by_tensor() -> None:
    made = trace(settings(precision="int4"))
    first, second = allocations(made.program, "load")[:2]
    assert made.request(int(first), 0, 0).operation == "loader's warm-up block"
    assert made.program.events[first + 1].tolist() == [FREE, 0, 0, 0]
    assert made.request(int(second), 0, 0).operation == "aten._to_copy.default"
    weights_and_scales = 2 * 6  # of q, k, v, o, gate and up, down
    assert labels(made, "load")["bitsandbytes.quantize_4bit.default"] == LAYERS * weights_and_scales


def test_a_small_card_caps_the_warm_up_block() -> None:
    free = forecast(turns="8:3")
    loaded = free.curve.table.iloc[0]
    on_card = free.replace(card="RTX 4060").curve.table
    assert loaded["reserved_mib"] == on_card["reserved_mib"].iloc[0]  # 2 layers fit beside the spared 1.2 GiB
    model_mib = loaded["allocated_mib"]
    tight = free.replace(card=find_card("RTX 4060")._replace(memory_mib=int(model_mib + 1000)))
    first_rise = tight.rises[0]
    assert first_rise.request.operation == "loader's warm-up block"
    assert first_rise.mib == pytest.approx(model_mib + 1000 - 1.2 * 1024, abs=2)


def test_kept_logits_cost_what_they_hold() -> None:
    base, kept = (
        forecast(turns="12:200,30:300", keeps=keeps).curve.table["kv_copies_mib"].iloc[-1]
        for keeps in ((), ("logits",))
    )
    assert kept - base == pytest.approx(65024 * 4 / MIB, abs=0.01)


def test_a_static_cache_does_not_grow() -> None:
    table = forecast(turns="12:2000", **STATIC).curve.table
    after_prefill = table[table["step"] > 2]
    assert after_prefill["reserved_mib"].nunique() == 1
    held = after_prefill["kv_payload_mib"] + after_prefill["kv_copies_mib"]
    assert held.min() == pytest.approx(4096 * 2 * LAYERS * 512 / MIB, abs=0.1)


def test_eager_attention_forms_a_matrix_of_scores() -> None:
    sdpa, eager = (
        forecast(attention=attention, turns="2000:3").curve.table["peak_allocated_mib"].iloc[1]
        for attention in ("sdpa", "eager")
    )
    assert eager - sdpa > 32 * 2000 * 2000 * 2 / MIB


@pytest.mark.parametrize(
    ("architecture", "n_bytes"), [("ada", CUBLAS_WORKSPACE_BYTES), ("hopper", CUBLAS_WORKSPACE_BYTES_HOPPER)]
)
def test_workspace_follows_the_architecture(architecture: str, n_bytes: int) -> None:
    made = trace(settings(architecture=architecture))
    asked = [made.request(int(event), 11, 11) for event in allocations(made.program, "first.prefill")]
    assert [request.requested_bytes for request in asked if request.operation == "cuBLAS workspace"] == [n_bytes]


@pytest.mark.parametrize(
    ("batch", "turns", "in_prefill", "in_step"),
    [(1, "200:5", 0, 0), (2, "200:5", 1, 0), (1, "300:5", 1, 0), (300, "2:5", 1, 1)],
)
def test_4bit_weights_are_dequantised_by_products_of_many_rows(
    batch: int, turns: str, in_prefill: int, in_step: int
) -> None:
    made = forecast(precision="int4", batch=batch, turns=turns).trace
    linears = LAYERS * 6  # q, k, v, o, gate and up, down
    assert labels(made, "first.prefill")["dequantize_4bit"] == linears * in_prefill
    assert labels(made, "steady")["dequantize_4bit"] == linears * in_step


def test_grouped_heads_without_flash_attention_use_the_unfused_form() -> None:
    assert "aten.bmm.default" not in labels(trace(settings()), "steady")
    assert labels(trace(settings(architecture="turing")), "steady")["aten.bmm.default"] == 2 * LAYERS


def test_full_size_fp16_fits_a_card_or_not() -> None:
    full = Forecast.of(CHATGLM, precision="fp16", turns="8:100")
    assert full.curve.table["reserved_mib"].iloc[0] == pytest.approx(6_243_584_000 * 2 / MIB, abs=4)
    assert full.largest_context("RTX 3090").limited_by == "model"
    assert not full.largest_context("RTX 4060").fits


def test_a_static_cache_is_as_long_as_the_card_allows() -> None:
    config = shallow(LLAMA, num_hidden_layers=1, vocab_size=1000, max_position_embeddings=LONGEST + 20)
    static = Forecast.of(config, cache="static", batch=740, card="RTX 4060")  # 11.6 MiB of keys and values a token
    capacity = static.largest_context()
    assert capacity.limited_by == "memory"
    assert LONGEST < capacity.context_tokens < LONGEST + 20
    last = static.replace(tokens=capacity.context_tokens).curve
    assert last.table[["context_tokens", "used_mib"]].iloc[-1].tolist() == [capacity.context_tokens, capacity.used_mib]
    assert "out_of_memory" in static.replace(tokens=capacity.context_tokens + 1).curve.provenance


# ------------------------------------------------------------- sliding windows, prompts of one token, tokens that end


def test_a_sliding_window_bounds_the_context() -> None:
    made = trace(settings(MISTRAL))
    assert made.facts.longest_context == 4095
    assert made.schedule([TurnTokens(4000, 96)])[-1, 2] == 4095
    with pytest.raises(TraceError, match="reach 4,096 tokens, but .* has a sliding window.*Ask for 4,095 tokens"):
        made.schedule([TurnTokens(4000, 97)])
    capacity = forecast(MISTRAL).largest_context("RTX 4060")
    assert (capacity.context_tokens, capacity.limited_by) == (4095, "model")
    assert "beyond 4,095 tokens the model's sliding window drops some" in capacity.message


@pytest.mark.parametrize("attention", ["sdpa", "eager"])
def test_the_order_of_events_changes_where_the_window_is_full(attention: str, monkeypatch: pytest.MonkeyPatch) -> None:
    window = LONGEST + 40
    of_window = replace(settings(MISTRAL, attention=attention), config=shallow(MISTRAL, sliding_window=window))
    until, beyond = ((*tracer.CONVERSATIONS, (TurnTokens(LONGEST, n),)) for n in (40, 41))
    monkeypatch.setattr(tracer, "CONVERSATIONS", until)
    assert trace(of_window, refresh=True).facts.longest_context == window - 1
    monkeypatch.setattr(tracer, "CONVERSATIONS", beyond)
    with pytest.raises(
        TraceError, match=f"after {window} tokens the cache holds keys or values of shape .*, {window - 1}, 128"
    ):
        trace(of_window, refresh=True)


def test_a_window_that_is_switched_off_bounds_nothing() -> None:
    config = shallow(QWEN, sliding_window=4096, use_sliding_window=False, layer_types=["full_attention"] * LAYERS)
    assert trace(TraceSettings(config, QWEN)).facts.longest_context == 0


def test_prompts_of_one_token_have_a_prefill_of_their_own() -> None:
    usual = trace(settings())
    with pytest.raises(TraceError, match="turn 2 is 1:5, but this trace holds for prompts of at least 2 tokens there"):
        usual.schedule([TurnTokens(8, 5), TurnTokens(1, 5)])
    made = trace(settings(one_token_prompts=True))
    n_usual = len(usual.program.section_names)
    assert made.program.section_names[:n_usual] == usual.program.section_names
    assert np.array_equal(made.program.events[: len(usual.program.events)], usual.program.events)
    names = [
        made.program.section_names[section] for section in made.schedule([TurnTokens(1, 1), TurnTokens(1, 4)])[:, 1]
    ]
    assert names == [
        *("load", "first-one.prefill", "first-one.end1"),
        *("later-one.prefill", "later-one.step2", "later.step3", "steady", "later.end"),
    ]


def test_a_token_that_ends_answers_does_not_end_the_tracing() -> None:
    zero = TraceSettings(shallow(LLAMA, eos_token_id=0), LLAMA)
    assert np.array_equal(trace(zero).program.events, trace(settings(LLAMA)).program.events)


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
def test_impossible_configs_are_refused(
    change: dict[str, Any], message: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("GLMLAB_CACHE", str(tmp_path))
    with pytest.raises(GlmlabError, match=message):
        trace(TraceSettings(shallow(CHATGLM, **change), CHATGLM))
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("model", "change", "fields", "message"),
    [
        (CHATGLM, {"ffn_hidden_size": 1000}, {"precision": "int4"}, "mlp.down_proj has 1000 inputs. Use int8"),
        (CHATGLM, {}, {"cache": "static", "static_tokens": 50}, f"Use static_tokens={LONGEST}"),
        (MISTRAL, {"sliding_window": 512}, {}, f"sliding window of 512 tokens, .* more than {LONGEST}"),
    ],
)
def test_what_cannot_be_traced_is_refused(
    model: str, change: dict[str, Any], fields: dict[str, Any], message: str
) -> None:
    with pytest.raises(TraceError, match=message):
        trace(TraceSettings(shallow(model, **change), model, **fields))


def test_a_static_cache_must_hold_the_turns() -> None:
    with pytest.raises(ForecastError, match="static cache of 100 tokens cannot hold"):
        _ = forecast(cache="static", static_tokens=100, turns="8:200").trace


def test_what_outlives_its_step_unowned_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    kept = []
    forward = LlamaMLP.forward
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: kept.append(forward(self, x)) or kept[-1])
    with pytest.raises(TraceError, match=r"90112 B of aten.mm.default in model.layers.0.mlp.down_proj outlive their"):
        trace(settings(LLAMA), refresh=True)


# ----------------------------------------------------------------------------------------------- cache


def test_the_cache_is_used_and_follows_the_content(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLMLAB_CACHE", str(tmp_path))
    made = trace(settings(LLAMA))
    (file,) = tmp_path.iterdir()

    def refuse(*_: object) -> AllocationTrace:
        raise AssertionError("traced again")

    monkeypatch.setattr(tracer, "record_trace", refuse)
    assert_equal(trace(settings(LLAMA)), made)
    for again in ({"settings": settings(LLAMA, batch=2)}, {"settings": settings(LLAMA), "refresh": True}):
        with pytest.raises(AssertionError, match="traced again"):
            trace(**again)
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_an_edit_of_imported_code_makes_the_trace_anew_and_no_other(monkeypatch: pytest.MonkeyPatch) -> None:
    package = Path(tracer.__file__).parent.parent
    code = {str(path.relative_to(package)) for path in cached._code()}
    assert {"tracing/recorder.py", "generation/decoding.py", "models/chatglm3.py", "core/units.py"} <= code
    assert not {path for path in code if path.startswith(("memory/", "forecast/", "figures/", "evidence/"))}
    name = cached._digest(settings(LLAMA))
    assert cached._digest(settings(LLAMA)) == name
    read_bytes = Path.read_bytes
    edited = package / "models" / "loading.py"
    monkeypatch.setattr(Path, "read_bytes", lambda file: read_bytes(file) + b"#" * (file == edited))
    assert cached._digest(settings(LLAMA)) != name


def test_a_damaged_cache_file_is_traced_again_and_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("GLMLAB_CACHE", str(tmp_path))
    made = trace(settings(LLAMA))
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:1000])
    with pytest.warns(UserWarning, match="cached trace is damaged and made again"):
        assert_equal(trace(settings(LLAMA)), made)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        trace(settings(LLAMA))


def test_a_cache_that_cannot_be_written_is_said(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    monkeypatch.setenv("GLMLAB_CACHE", str(tmp_path / "file" / "cache"))
    with pytest.warns(UserWarning, match="could not be cached"):
        trace(settings(LLAMA))


@pytest.mark.parametrize("fields", [{"attention": "eager"}, {"precision": "int8", **STATIC}], ids=str)
def test_repeating_known_operations_changes_nothing(fields: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    remembered = trace(settings(**fields), refresh=True)
    monkeypatch.setattr("glmlab.tracing.recorder._gives_fresh_tensor", lambda _: False)
    assert_equal(trace(settings(**fields), refresh=True), remembered)
    assert tuple(remembered.program.owners) == OWNERS
