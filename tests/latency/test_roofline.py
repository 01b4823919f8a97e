"""The floor is arithmetic: checked by hand for ChatGLM3-6B, and against what a loaded model holds."""

import pytest
import torch
from transformers import LlamaConfig

from glmlab.core.cards import Card, CardError, cards
from glmlab.core.errors import GlmlabError
from glmlab.latency.measure import LatencyError
from glmlab.latency.roofline import Rates, card_rates, measure_rates, roofline
from glmlab.models.checkpoints import find_config
from glmlab.models.loading import load_config

UNIT = Rates("unit", 1e9, 1e12, "made up")
LAYER = 4096 * 4608 + 4096 * 4096 + 4096 * 2 * 13696 + 13696 * 4096  # QKV, output, gate and up, down


@pytest.fixture(scope="module")
def chatglm3():
    return load_config(find_config("chatglm3-6b"))


def test_bytes_of_a_token_by_hand(chatglm3):
    floor = roofline(chatglm3, UNIT, precision="fp16", contexts=[0, 1000])
    weights = 2 * (6_243_584_000 - 65024 * 4096 + 4096)  # one row of the embedding table
    assert floor["weight_bytes"].between(weights, weights + 1024).all()  # the rotary tables
    assert floor["kv_read_bytes"].tolist() == [0, 28_672_000]
    assert floor["kv_written_bytes"].tolist() == [28_672, 28_672]
    assert floor["memory_ms"].iloc[0] == pytest.approx((weights + 28_672) / 1e9 * 1e3, rel=1e-6)


def test_operations_of_a_token_by_hand(chatglm3):
    floor = roofline(chatglm3, UNIT, precision="fp16", contexts=[0, 1000])
    assert floor["operations"].iloc[0] == 2 * (28 * LAYER + 4096 * 65024)
    assert floor["operations"].diff().iloc[1] == 4 * 28 * 4096 * 1000
    assert floor["compute_ms"].iloc[0] == pytest.approx(floor["operations"].iloc[0] / 1e12 * 1e3)


def test_the_larger_time_is_the_floor(chatglm3):
    slow = roofline(chatglm3, Rates("slow to compute", 1e15, 1e9, ""), precision="fp16", contexts=[10]).iloc[0]
    assert (slow["limited_by"], slow["floor_ms"]) == ("operations", slow["compute_ms"])
    unknown = roofline(chatglm3, Rates("rate unknown", 1e9, None, ""), precision="fp16", contexts=[10]).iloc[0]
    assert (unknown["limited_by"], unknown["floor_ms"]) == ("bytes", unknown["memory_ms"])


def test_fewer_bits_lower_the_floor(chatglm3):
    floors = [
        roofline(chatglm3, card_rates("RTX 4060 Laptop"), precision=precision, contexts=[0])["floor_ms"].iloc[0]
        for precision in ("fp32", "fp16", "int8", "int4")
    ]
    assert floors == sorted(floors, reverse=True)
    assert 14 < floors[-1] < 15  # 3.7e9 B at 256e9 B/s


def test_what_is_read_is_what_a_loaded_model_holds(embedded):
    floor = roofline(embedded.model.config, UNIT, precision="fp32", contexts=[0], dtype=torch.float32).iloc[0]
    sizes = embedded.report.bytes_by_component
    row_bytes = 4 * embedded.model.config.hidden_size
    assert floor["weight_bytes"] == sum(sizes.values()) - sizes["embedding"] + row_bytes


def test_a_tied_head_reads_the_whole_table():
    fields = {
        "vocab_size": 128, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 1,
    }  # fmt: skip
    floors = [
        roofline(LlamaConfig(**fields, tie_word_embeddings=tied), UNIT, precision="fp32", contexts=[0])
        for tied in (True, False)
    ]
    assert floors[0]["weight_bytes"].iloc[0] == floors[1]["weight_bytes"].iloc[0]


def test_measured_rates_say_how():
    rates = measure_rates("cpu", block_bytes=2**20)
    assert rates.device == "CPU"
    assert "1.0 MiB copied and read" in rates.source


def test_rates_are_those_of_the_threads_asked_for(monkeypatch):
    seen = []
    monkeypatch.setattr(
        "glmlab.latency.roofline._fastest_s", lambda run, device: seen.append(torch.get_num_threads()) or 1.0
    )
    measure_rates("cpu", block_bytes=2**20, threads=2)
    assert set(seen) == {2}
    assert torch.get_num_threads() == 1


class TestCards:
    def test_every_card_has_a_peak_rate_and_its_source(self):
        for card in cards().values():
            assert card.fp16_flops_per_s > 1e12
            assert "fp16: " in card.source

    def test_an_unknown_card_is_refused(self):
        with pytest.raises(CardError, match=r"no card 'RTX 9999' in data/gpus.csv"):
            card_rates("RTX 9999")

    def test_a_card_without_bandwidth_is_refused(self, monkeypatch):
        card = Card("Old", 1024, "volta", None, None, None, "made up")
        monkeypatch.setattr("glmlab.latency.roofline.find_card", lambda name: card)
        with pytest.raises(LatencyError, match=r"data/gpus.csv has no bandwidth of Old"):
            card_rates("Old")


class TestBadInput:
    @pytest.mark.parametrize("context", [-1, float("nan"), float("inf")])
    def test_a_context_that_is_none(self, chatglm3, context):
        with pytest.raises(LatencyError, match="is no number of cached tokens. Give 0 or more"):
            roofline(chatglm3, UNIT, precision="fp16", contexts=[10, context])

    @pytest.mark.parametrize(("bandwidth", "flops"), [(0.0, 1.0), (-1.0, None), (1.0, float("nan"))])
    def test_rates_that_move_nothing(self, chatglm3, bandwidth, flops):
        with pytest.raises(LatencyError, match=r"the rates of broken .* are not above 0. Measure them"):
            roofline(chatglm3, Rates("broken", bandwidth, flops, ""), precision="fp16", contexts=[10])

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"device": "foo"}, "device='foo' is not known"),
            ({"device": "meta"}, "device='meta' is not supported"),
            ({"block_bytes": 0}, "block_bytes=0 moves nothing. Give at least 4"),
        ],
    )
    def test_nothing_to_measure(self, arguments, message):
        with pytest.raises(GlmlabError, match=message):
            measure_rates(**arguments)
