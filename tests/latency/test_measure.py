"""Times are taken by the suite's own loop, bad lengths are refused, a failing device leaves what was measured."""

import pandas as pd
import pytest
import torch

from glmlab.latency import measure
from glmlab.latency.measure import LatencyError, measure_decode, measure_first_token


def test_every_context_has_its_row_and_the_conditions_are_told(embedded):
    table = measure_decode(embedded, [64, 16], tokens=5)
    assert table["context_tokens"].tolist() == [64, 16]
    assert table["tokens"].tolist() == [5, 5]
    assert (table["p10_ms"] <= table["token_ms"]).all()
    assert (table["token_ms"] <= table["p90_ms"]).all()
    found = table.attrs["conditions"]
    assert (found["model"], found["dtype"], found["compiled"]) == ("embedded", "fp32", False)
    assert (found["driver"], found["gpus"], found["threads"]) == (None, [], torch.get_num_threads())
    assert {"torch", "transformers", "python", "glmlab"} <= set(found["versions"])
    assert found["date"].endswith("+00:00")


def test_the_steps_that_count_begin_at_the_context_and_come_after_warm_up(embedded, monkeypatch):
    lengths = []

    def clocked(steps):
        lengths.append(next(steps).cached_tokens)
        return 0.25 if lengths[-1] >= 35 else 9.0

    monkeypatch.setattr(measure, "_next_s", clocked)
    table = measure_decode(embedded, [32], tokens=4)
    assert lengths == [0, *range(32, 39)]
    assert table[["token_ms", "p10_ms", "p90_ms", "tokens"]].values.tolist() == [[250.0, 250.0, 250.0, 4]]


def test_a_compiled_model_is_measured_by_the_same_call(compiled):
    table = measure_decode(compiled, [16], tokens=3)
    assert table.attrs["conditions"]["compiled"]
    assert (table["token_ms"] > 0).all()


def test_prompts_are_prefilled_whole(embedded, monkeypatch):
    lengths = []

    def clocked(steps):
        lengths.append(next(steps).input_shapes["input_ids"][1])
        return 0.5

    monkeypatch.setattr(measure, "_next_s", clocked)
    table = measure_first_token(embedded, [8, 24], repetitions=2)
    assert lengths == [8] * 3 + [24] * 3
    assert table["first_token_ms"].tolist() == [500.0, 500.0]


@pytest.mark.parametrize(
    ("measure_it", "message"),
    [
        (
            lambda model: measure_decode(model, []),
            r"no context lengths to measure. Give at least one, such as \[256, 1",
        ),
        (lambda model: measure_decode(model, [16, 0]), "a context of 0 tokens: lengths start at 1"),
        (
            lambda model: measure_decode(model, [8190], tokens=4),
            "a context of 8,190 tokens and 7 decode steps pass the model's limit of 8,192 .* up to 8,185",
        ),
        (lambda model: measure_first_token(model, [9000]), "a prompt of 9,000 tokens pass the model's limit of 8,192"),
        (lambda model: measure_decode(model, [16], tokens=0), "tokens=0: at least one decode step"),
        (lambda model: measure_first_token(model, [16], repetitions=0), "repetitions=0: at least one prefill"),
    ],
)
def test_bad_lengths_are_refused(embedded, measure_it, message):
    with pytest.raises(LatencyError, match=message):
        measure_it(embedded)


class TestADeviceThatFails:
    @pytest.fixture
    def failing(self, embedded, monkeypatch):
        """The embedded model on a device that fails with a given error once the context passes 100 tokens."""

        def fail_with(error):
            forward = embedded.model.model.forward

            def fragile(*args, **kwargs):
                if int(kwargs["past_key_values"].get_seq_length()) > 100:
                    raise error
                return forward(*args, **kwargs)

            monkeypatch.setattr(embedded.model.model, "forward", fragile)
            return embedded

        return fail_with

    def test_what_was_measured_is_kept(self, failing):
        loaded = failing(torch.AcceleratorError("CUDA error: unspecified launch failure\nCompile with TORCH_USE_..."))
        with pytest.raises(LatencyError) as caught:
            measure_decode(loaded, [16, 32, 128], tokens=4)
        assert str(caught.value) == (
            "the device failed at 128 tokens (CUDA error: unspecified launch failure); 2 rows were measured before and "
            "are kept in this error's 'measured'. Check it with nvidia-smi, restart this process, and measure again."
        )
        measured = caught.value.measured
        assert isinstance(measured, pd.DataFrame)
        assert measured["context_tokens"].tolist() == [16, 32]
        assert measured.attrs["conditions"]["model"] == "embedded"

    def test_out_of_memory_says_what_to_change(self, failing):
        loaded = failing(torch.OutOfMemoryError("CUDA out of memory."))
        with pytest.raises(LatencyError, match="ran out of memory at 128 tokens; 0 rows .* smaller precision"):
            measure_decode(loaded, [128], tokens=4)

    def test_an_error_of_the_program_is_not_taken_for_the_device(self, failing):
        loaded = failing(RuntimeError("shapes do not fit"))
        with pytest.raises(RuntimeError, match="shapes do not fit"):
            measure_decode(loaded, [128], tokens=4)
