"""The stepper shows the step it stands on; its sliders weigh recorded logits without running the model."""

import pytest
import torch
from transformers import GenerationConfig

from glmlab.generation.decoding import DecodeError, Keep, decode_steps
from glmlab.generation.stepper import Stepper
from glmlab.prompts.encoding import encode_chat


@pytest.fixture(scope="module")
def steps(embedded):
    prompt = encode_chat(embedded.tokenizer, [{"role": "user", "content": "Tell me a long story about a fox."}])
    config = GenerationConfig(do_sample=True, temperature=1.5, top_k=20, top_p=0.9)
    torch.manual_seed(0)
    keep = Keep(logits=True)
    return list(decode_steps(embedded, prompt, max_new_tokens=6, generation_config=config, keep=keep))


@pytest.fixture
def walk(embedded, steps):
    return Stepper(embedded.tokenizer, steps)


def test_buttons_move_and_stay_inside(walk):
    walk.previous_button.click()
    assert walk.position.value == 0
    for _ in range(9):
        walk.next_button.click()
    assert walk.position.value == 5
    walk.previous_button.click()
    assert walk.position.value == 4
    assert (walk.play.min, walk.play.max) == (0, 5)


def test_it_shows_the_step_it_stands_on(walk, steps):
    first = walk.recorded.value
    walk.position.value = 3
    shown = walk.recorded.value
    assert "step 0 (prefill)" in first
    assert "step 3 (decode)" in shown
    assert f"KV cache: {steps[3].context_length} tokens" in shown
    for stage in ("logits", "temperature", "top-k: 20 survive", "top-p"):
        assert f">{stage}" in shown
    assert "goes on" in shown
    walk.position.value = 5
    assert "stops: length" in walk.recorded.value
    cache_bar = walk.recorded.value.split("KV cache:")[1].split("</div>")[0]
    assert "width:100.0%;height:.8em" in cache_bar  # full at the last step


def test_sliders_weigh_the_recorded_logits_without_the_model(walk, embedded, monkeypatch):
    monkeypatch.setattr(type(embedded.model), "forward", lambda *_, **__: pytest.fail("the model ran"))
    assert ">logits: " in walk.reweighed.value
    assert "temperature" not in walk.reweighed.value
    walk.temperature.value = 2.0
    hot = walk.reweighed.value
    assert ">temperature: " in hot
    walk.top_p.value = 0.3
    assert ">top-p: " in walk.reweighed.value
    walk.temperature.value = 0.2
    assert walk.reweighed.value != hot


def test_without_logits_there_are_no_sliders(embedded):
    steps = list(decode_steps(embedded, "Hello", max_new_tokens=2))
    walk = Stepper(embedded.tokenizer, steps)
    assert len(walk.children) == 2
    walk.next_button.click()
    assert walk.reweighed.value == ""


def test_tokens_are_shown_as_text_never_as_html(embedded, steps):
    walk = Stepper(embedded.tokenizer, steps)
    walk._texts = ["<script>alert(1)</script>"] * len(steps)
    walk.position.value = 2
    assert "<script>" not in walk.recorded.value
    assert "&lt;script&gt;" in walk.recorded.value


def test_no_steps(embedded):
    with pytest.raises(DecodeError, match="there are no steps to show"):
        Stepper(embedded.tokenizer, [])
