"""Whether a model fits, on a machine without GPU and on GPUs that a stand-in driver reports."""

import json

import bitsandbytes  # noqa: F401 - before a GPU is pretended, which it would look for
import pytest
import torch
from fake_gpu import GPU_UUIDS, FakeCuda
from typer.testing import CliRunner

from glmlab.cli import app
from glmlab.core.errors import GlmlabError
from glmlab.core.units import GIB, MIB
from glmlab.forecast import fit
from glmlab.forecast.fit import will_it_fit
from glmlab.forecast.forecast import Forecast
from glmlab.models import placement
from glmlab.models.checkpoints import find_config, read_config_json
from glmlab.models.loading import build_skeleton, load_config
from glmlab.models.placement import predict_bytes


@pytest.fixture
def gpu(driver, monkeypatch):
    """Let this process have one GPU with so many MiB used, in all and by this process."""

    def have(total_mib: int, used_mib: int, own_mib: int = 0, name: str = "") -> None:
        driver.says(f"gpu {total_mib} {used_mib} self={own_mib}")
        FakeCuda(GPU_UUIDS[:1]).install(monkeypatch)
        monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
        monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)

    return have


class TestHost:
    def test_needs_what_loading_asks_for_and_the_keys_and_values(self):
        found = will_it_fit("embedded", precision="int4", tokens=1000, device="cpu")
        skeleton = build_skeleton(load_config(find_config("embedded")))
        predicted = predict_bytes(skeleton, "int4", torch.float32)
        uses = found.asked.bytes_by_use
        assert uses["weights"] + uses["quantisation state"] == sum(predicted.values())
        assert uses["KV payload"] == 1000 * 2 * 4 * 2 * 64 * 4  # layers, KV heads of 64 in fp32
        assert found.asked.total_bytes == sum(uses.values())
        assert found.fits
        assert found.fitting is found.asked

    @pytest.mark.parametrize(
        ("free_gib", "asked", "fits"),
        [(30, "fp32", "fp32"), (8, "fp32", "int8"), (8, "bf16", "int8"), (1, "bf16", None)],
    )
    def test_the_largest_precision_that_fits_is_named(self, monkeypatch, free_gib, asked, fits):
        monkeypatch.setattr(fit, "free_bytes", lambda device: free_gib * GIB)
        found = will_it_fit("chatglm3-6b", precision=asked, tokens=100, device="cpu")
        assert found.asked.precision == asked
        assert (found.fitting and found.fitting.precision) == fits
        assert found.fits == (asked == fits)

    def test_a_context_beyond_the_models_limit_is_noted(self):
        found = will_it_fit("embedded", precision="fp32", tokens=10_000, device="cpu")
        assert found.assumed.startswith("the turns reach 10,000 tokens, but embedded is made for 8,192")

    def test_auto_is_what_load_model_would_take(self, monkeypatch):
        for module in (fit, placement):
            monkeypatch.setattr(module, "free_bytes", lambda device: 8 * GIB)
        skeleton = build_skeleton(load_config(find_config("chatglm3-6b")))
        chosen = placement.choose_precision("chatglm3-6b", skeleton, "auto", torch.device("cpu"))
        assert will_it_fit("chatglm3-6b", tokens=100, device="cpu").asked.precision == chosen == "int8"


class TestGpu:
    def test_needs_the_forecasts_peak_and_the_cards_context(self, gpu):
        gpu(8188, 500)
        found = will_it_fit("embedded", precision="fp16", tokens=500, device="cuda")
        table = Forecast.of("embedded", precision="fp16", tokens=500).curve.table
        assert found.asked.total_bytes == pytest.approx(table["used_mib"].max() * MIB, abs=8)
        assert found.asked.bytes_by_use["KV payload"] == 500 * 2048
        assert found.free_bytes == (8188 - 500) * MIB
        assert found.assumed.startswith("CUDA context: assumed")

    def test_what_this_process_holds_already_counts_as_free(self, gpu):
        gpu(8188, 700, own_mib=600)
        assert will_it_fit("embedded", precision="fp16", tokens=100, device="cuda").free_bytes == (8188 - 100) * MIB

    def test_what_would_fit_is_named(self, gpu, tmp_path):
        gpu(2000, 100)
        config = {**read_config_json(find_config("chatglm3-6b")), "num_layers": 2}
        (tmp_path / "config.json").write_text(json.dumps(config))
        found = will_it_fit(str(tmp_path / "config.json"), precision="fp16", tokens=100, device="cuda")
        assert not found.fits
        assert found.fitting.precision == "int4"  # quantising to int8 would leave more inactive blocks than it saves
        assert found.fitting.total_bytes <= found.free_bytes < found.asked.total_bytes


class TestRefusals:
    @pytest.mark.parametrize(
        ("arguments", "error", "message"),
        [
            ({"precision": "int2"}, GlmlabError, "precision='int2' is not known"),
            ({"device": "tpu"}, GlmlabError, "device='tpu' is not known"),
        ],
    )
    def test_bad_questions(self, arguments, error, message):
        with pytest.raises(error, match=message):
            will_it_fit("embedded", **{"device": "cpu", **arguments})


class TestCommand:
    def _doctor(self, *arguments: str) -> str:
        result = CliRunner().invoke(app, ["doctor", *arguments])
        assert result.exit_code == 0, result.output
        return result.output

    def test_says_that_it_fits(self):
        shown = self._doctor("--model", "embedded", "--precision", "bf16", "--tokens", "100", "--device", "cpu")
        assert "ok  checkpoint     on this machine" in shown
        assert "bf16 needs 132.89 MiB: weights 4.69 MiB, KV payload 200.00 KiB, room to work 128.00 MiB" in shown
        assert "It fits, with" in shown

    def test_says_what_would_fit_and_how_to_fetch_it(self, monkeypatch, tmp_path):
        monkeypatch.setattr("huggingface_hub.constants.HF_HUB_CACHE", str(tmp_path))
        monkeypatch.setattr(fit, "free_bytes", lambda device: 5 * GIB)
        shown = self._doctor(
            "--model", "zai-org/chatglm3-6b", "--precision", "bf16", "--tokens", "100", "--device", "cpu"
        )
        assert "--  checkpoint     not on this machine" in shown
        assert "Fetch it: glmlab fetch zai-org/chatglm3-6b" in shown
        assert "It does not fit: 6.7" in shown
        assert "No precision fits: take a smaller model or context." in shown
