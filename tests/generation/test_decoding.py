"""The loop shows what generate() does, and refuses what it cannot do before the first forward pass."""

import warnings

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from transformers import (
    GenerationConfig,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from glmlab.generation.decoding import DecodeError, Keep, decode_steps
from glmlab.generation.prompts import encode_chat
from glmlab.models.loading import LoadedModel

STOPS = {"eos_token_id": [2, 7], "pad_token_id": 0}


def _tiny(config_class, model_class, embedded) -> LoadedModel:
    torch.manual_seed(1)
    config = config_class(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, bos_token_id=1, max_position_embeddings=128, **STOPS,
    )  # fmt: skip
    model = model_class(config).eval()
    for parameter in model.parameters():
        parameter.data.mul_(6)  # far from uniform, so that warpers and stop tokens have something to do
    return LoadedModel(model, embedded.tokenizer, embedded.report)


@pytest.fixture(scope="module")
def tiny_models(embedded):
    return [
        _tiny(GlmConfig, GlmForCausalLM, embedded),
        _tiny(Qwen2Config, Qwen2ForCausalLM, embedded),
        _tiny(LlamaConfig, LlamaForCausalLM, embedded),
    ]


def _generated(loaded, rows, config, n):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings_ = GenerationConfig(**{**config.to_dict(), "max_new_tokens": n})
        return loaded.model.generate(ids, attention_mask=mask, generation_config=settings_)[:, width:].tolist()


def _stepped(loaded, rows, config, n):
    torch.manual_seed(3)
    steps = decode_steps(loaded, rows, max_new_tokens=n, generation_config=config)
    return [list(row) for row in zip(*(step.token_ids for step in steps), strict=True)]


@settings(max_examples=40, deadline=None)
@given(
    family=st.integers(0, 2),
    rows=st.lists(st.lists(st.integers(3, 95), min_size=1, max_size=9), min_size=1, max_size=3),
    sampling=st.one_of(
        st.just({"do_sample": False}),
        st.fixed_dictionaries(
            {"do_sample": st.just(True)},
            optional={
                "temperature": st.floats(0.2, 2.0),
                "top_k": st.integers(1, 60),
                "top_p": st.floats(0.1, 1.0),
                "min_p": st.floats(0.0, 0.3),
                "typical_p": st.floats(0.2, 0.95),
            },
        ),
    ),
    penalty=st.floats(1.0, 1.5),
    static=st.booleans(),
)
def test_ids_equal_generate(tiny_models, family, rows, sampling, penalty, static):
    cache = {"cache_implementation": "static", "disable_compile": True} if static else {}
    config = GenerationConfig(**sampling, **STOPS, **cache, repetition_penalty=penalty)
    loaded = tiny_models[family]
    assert _stepped(loaded, rows, config, 12) == _generated(loaded, rows, config, 12)


@pytest.mark.parametrize(
    "config",
    [
        GenerationConfig(do_sample=False),
        GenerationConfig(do_sample=True, temperature=0.7, top_k=20, top_p=0.9, repetition_penalty=1.2),
    ],
)
def test_embedded_model_equals_generate(embedded, config):
    prompt = encode_chat(embedded.tokenizer, [{"role": "user", "content": "Hello"}])
    torch.manual_seed(0)
    stepped = [step.token_id for step in decode_steps(embedded, prompt, max_new_tokens=60, generation_config=config)]
    full = GenerationConfig(**{**config.to_dict(), "max_new_tokens": 60})
    full.eos_token_id = embedded.model.generation_config.eos_token_id
    full.pad_token_id = 0
    torch.manual_seed(0)
    generated = embedded.model.generate(torch.tensor([prompt]), generation_config=full)[0, len(prompt) :].tolist()
    assert stepped == generated


@pytest.fixture(scope="module")
def steps(embedded):
    prompt = encode_chat(embedded.tokenizer, [{"role": "user", "content": "你好"}])
    keep = Keep(top_k=5, logits=True)
    return prompt, list(decode_steps(embedded, prompt, max_new_tokens=100, keep=keep))


class TestStep:
    def test_the_prefill_reads_the_prompt_and_every_later_step_one_token(self, steps):
        prompt, steps = steps
        assert [step.phase for step in steps] == ["prefill"] + ["decode"] * (len(steps) - 1)
        assert steps[0].input_shapes["input_ids"] == (1, len(prompt))
        assert {step.input_shapes["input_ids"] for step in steps[1:]} == {(1, 1)}
        assert [step.cached_tokens for step in steps] == [0, *range(len(prompt), len(prompt) + len(steps) - 1)]
        assert [step.context_length for step in steps] == [*range(len(prompt), len(prompt) + len(steps))]

    def test_kv_bytes_are_the_payload(self, steps, embedded):
        _, steps = steps
        config = embedded.model.config
        bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        assert [step.kv_bytes for step in steps] == [bytes_per_token * step.context_length for step in steps]

    def test_only_the_last_step_says_why_it_stopped(self, steps):
        _, steps = steps
        assert [step.stop_reason for step in steps] == [None] * (len(steps) - 1) + ["stop token"]

    def test_greedy_takes_the_best_candidate(self, steps):
        for step in steps[1]:
            assert step.token_id == step.stages[-1].token_ids[0, 0] == step.logits.argmax()
            assert step.chosen_probability[0] == pytest.approx(torch.softmax(step.logits, -1).max().item())
            assert step.surprisal_bits[0] == pytest.approx(-torch.log2(step.chosen_probability[0]).item())

    def test_budget_ends_it(self, embedded):
        *_, last = decode_steps(embedded, "你好", max_new_tokens=2)
        assert (last.index, last.stop_reason) == (1, "length")


def test_survivors_of_every_warper(embedded):
    config = GenerationConfig(do_sample=True, temperature=0.5, top_k=7, top_p=0.5)
    step = next(decode_steps(embedded, "Hello", max_new_tokens=1, generation_config=config))
    survivors = {stage.name: int(stage.survivors[0]) for stage in step.stages}
    vocabulary = embedded.model.config.vocab_size
    assert list(survivors) == ["logits", "TemperatureLogitsWarper", "TopKLogitsWarper", "TopPLogitsWarper"]
    assert survivors["logits"] == survivors["TemperatureLogitsWarper"] == vocabulary
    assert survivors["TopKLogitsWarper"] == 7
    assert 1 <= survivors["TopPLogitsWarper"] <= 7
    for stage in step.stages:
        kept = stage.probabilities[stage.probabilities > 0].sum().item()
        assert kept <= 1 + 1e-5


def test_hidden_states_on_request(embedded):
    step = next(decode_steps(embedded, "Hello", max_new_tokens=1, keep=Keep(hidden_states=True)))
    assert len(step.hidden_states) == embedded.model.config.num_hidden_layers + 1
    assert step.attentions is None


def test_closing_the_loop_keeps_what_was_seen(embedded):
    steps = decode_steps(embedded, "Tell me a long story.", max_new_tokens=50)
    seen = [next(steps), next(steps)]
    steps.close()
    assert [step.index for step in seen] == [0, 1]


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([[3], []], {}, "the prompt is empty"),
        ([5, 10**6], {}, r"the prompt holds id 1000000, but the vocabulary has ids 0 to \d+"),
        ([5, -1], {}, "the prompt holds id -1"),
        ([5] * 8193, {}, "the prompt has 8193 tokens, but the model's context limit is 8192"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens=0: at least one token"),
        ([5], {"generation_config": GenerationConfig(num_beams=2)}, "beam search and several returned sequences"),
        ([5], {"generation_config": GenerationConfig(min_new_tokens=9)}, "min_new_tokens=9 is more than max_new_tok"),
        ([5], {"keep": Keep(attentions=True)}, "attentions are never formed by 'sdpa' attention"),
    ],
)
def test_bad_input_is_refused_before_the_first_pass(embedded, monkeypatch, prompt, arguments, message):
    monkeypatch.setattr(type(embedded.model), "forward", lambda *_, **__: pytest.fail("a forward pass ran"))
    with pytest.raises(DecodeError, match=message):
        decode_steps(embedded, prompt, **{"max_new_tokens": 3, **arguments})


def test_sampling_settings_without_sampling_are_refused(embedded):
    config = GenerationConfig(do_sample=False)
    config.temperature = 0.5
    with pytest.raises(DecodeError, match="temperature need do_sample=True"):
        decode_steps(embedded, [5], max_new_tokens=1, generation_config=config)
