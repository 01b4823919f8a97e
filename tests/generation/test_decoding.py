"""The loop shows what generate() does, and refuses what it cannot do before the first forward pass."""

import time
import warnings
from itertools import count

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from transformers import (
    DynamicCache,
    GenerationConfig,
    GlmConfig,
    GlmForCausalLM,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    Qwen2Config,
    Qwen2ForCausalLM,
    StaticCache,
)

from glmlab.generation.decoding import DecodeError, Keep, decode_steps, kv_bytes, reweigh
from glmlab.generation.preparation import crop_cache
from glmlab.models.loading import LoadedModel
from glmlab.prompts.encoding import encode_chat

PROMPT = [5, 9, 4]


def _tiny(config_class, model_class, embedded) -> LoadedModel:
    torch.manual_seed(1)
    config = config_class(
        vocab_size=96, hidden_size=64, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, head_dim=32, bos_token_id=1, max_position_embeddings=128,
        eos_token_id=[2, 7], pad_token_id=0,
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


@pytest.fixture(scope="module")
def tiny(tiny_models):
    return tiny_models[0]


def _generated(loaded, rows, config, n):
    width = max(map(len, rows))
    ids = torch.tensor([[0] * (width - len(row)) + row for row in rows])
    mask = torch.tensor([[0] * (width - len(row)) + [1] * len(row) for row in rows])
    torch.manual_seed(3)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        settings_ = GenerationConfig(**{**config.to_dict(), "max_new_tokens": n})
        return loaded.model.generate(ids, attention_mask=mask, generation_config=settings_)[:, width:].tolist()


def _stepped(loaded, rows, config, n, keep):
    torch.manual_seed(3)
    steps = decode_steps(loaded, rows, max_new_tokens=n, generation_config=config, keep=keep)
    return [list(row) for row in zip(*(step.token_ids for step in steps), strict=True)]


SAMPLING = st.one_of(
    st.just({"do_sample": False}),
    st.fixed_dictionaries(
        {"do_sample": st.just(True)},
        optional={
            "temperature": st.floats(0.2, 2.0),
            "top_k": st.integers(1, 60),
            "top_p": st.floats(0.1, 1.0),
            "min_p": st.floats(0.0, 0.3),
            "typical_p": st.floats(0.2, 0.95),
            "top_h": st.floats(0.1, 0.9),
            "epsilon_cutoff": st.floats(0.0, 0.01),
            "eta_cutoff": st.floats(0.0, 0.01),
        },
    ),
)
PROCESSORS = st.fixed_dictionaries(
    {},
    optional={
        "repetition_penalty": st.floats(1.0, 1.5),
        "no_repeat_ngram_size": st.integers(1, 3),
        "min_new_tokens": st.integers(1, 6),
        "bad_words_ids": st.just([[9], [10, 11]]),
        "suppress_tokens": st.just([12, 13]),
        "renormalize_logits": st.booleans(),
        "remove_invalid_values": st.booleans(),
    },
)


@settings(max_examples=70, deadline=None)
@example(family=2, rows=[[5]], sampling={}, processors={}, eos=0, static=False, keep=Keep())
@given(
    family=st.integers(0, 2),
    rows=st.lists(st.lists(st.integers(3, 95), min_size=1, max_size=9), min_size=1, max_size=3),
    sampling=SAMPLING,
    processors=PROCESSORS,
    eos=st.sampled_from([[2, 7], list(range(40)), 0]),
    static=st.booleans(),
    keep=st.builds(Keep, top_k=st.sampled_from([0, 1, 10, 200]), logits=st.booleans(), hidden_states=st.booleans()),
)
def test_ids_equal_generate(tiny_models, family, rows, sampling, processors, eos, static, keep):
    cache = {"cache_implementation": "static", "disable_compile": True} if static else {}
    config = GenerationConfig(**sampling, **processors, **cache, eos_token_id=eos, pad_token_id=0)
    loaded = tiny_models[family]
    assert _stepped(loaded, rows, config, 8, keep) == _generated(loaded, rows, config, 8)


@pytest.mark.parametrize("keep", [Keep(top_k=0), Keep(logits=True, hidden_states=True)])
@pytest.mark.parametrize("family", [0, 1, 2])
def test_logits_and_cache_equal_generate_to_the_last_bit(tiny_models, family, keep):
    """Equal ids could hide small differences; logits and cached keys may not differ either."""
    loaded = tiny_models[family]
    config = GenerationConfig(do_sample=True, temperature=0.9, pad_token_id=0, max_new_tokens=9)
    cache = DynamicCache(config=loaded.model.config)
    torch.manual_seed(3)
    steps = list(decode_steps(loaded, PROMPT, max_new_tokens=9, generation_config=config, keep=keep, cache=cache))
    torch.manual_seed(3)
    config.eos_token_id = loaded.model.generation_config.eos_token_id
    generated = loaded.model.generate(
        torch.tensor([PROMPT]), generation_config=config, return_dict_in_generate=True, output_logits=True
    )
    assert generated.sequences[0, 3:].tolist() == [step.token_id for step in steps]
    if keep.logits:
        assert all(torch.equal(step.logits, logits) for step, logits in zip(steps, generated.logits, strict=True))
    for ours, theirs in zip(cache.layers, generated.past_key_values.layers, strict=True):
        assert torch.equal(ours.keys, theirs.keys)
        assert torch.equal(ours.values, theirs.values)


@pytest.fixture(scope="module")
def greeting(embedded):
    prompt = encode_chat(embedded.tokenizer, [{"role": "user", "content": "你好"}])
    return prompt, list(decode_steps(embedded, prompt, max_new_tokens=100, keep=Keep(top_k=5, logits=True)))


class TestStep:
    def test_the_prefill_reads_the_prompt_and_every_later_step_one_token(self, greeting):
        prompt, steps = greeting
        assert [step.phase for step in steps] == ["prefill"] + ["decode"] * (len(steps) - 1)
        assert steps[0].input_shapes["input_ids"] == (1, len(prompt))
        assert {step.input_shapes["input_ids"] for step in steps[1:]} == {(1, 1)}
        assert [step.cached_tokens for step in steps] == [0, *range(len(prompt), len(prompt) + len(steps) - 1)]
        assert [step.context_length for step in steps] == [*range(len(prompt), len(prompt) + len(steps))]
        assert [step.stop_reason for step in steps] == [None] * (len(steps) - 1) + ["stop token"]

    def test_kv_bytes_are_the_payload(self, greeting, embedded):
        config = embedded.model.config
        bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        assert all(step.kv_bytes == bytes_per_token * step.context_length for step in greeting[1])

    def test_greedy_takes_the_best_candidate(self, greeting):
        for step in greeting[1]:
            assert step.token_id == step.stages[-1].token_ids[0, 0] == step.logits.argmax()
            assert step.chosen_probability[0] == pytest.approx(torch.softmax(step.logits, -1).max().item())
            assert step.surprisal_bits[0] == pytest.approx(-torch.log2(step.chosen_probability[0]).item())

    def test_no_stop_token_ends_a_run_that_does_not_stop(self, greeting, embedded):
        prompt, steps = greeting
        n = len(steps) + 5
        more = list(decode_steps(embedded, prompt, max_new_tokens=n, keep=Keep(top_k=0), stops=False))
        assert [step.token_id for step in more[: len(steps)]] == [step.token_id for step in steps]
        assert (more[-1].index, more[-1].stop_reason) == (n - 1, "length")

    def test_survivors_of_every_warper(self, tiny):
        config = GenerationConfig(do_sample=True, temperature=0.5, top_k=7, top_p=0.5)
        step = next(decode_steps(tiny, PROMPT, max_new_tokens=1, generation_config=config))
        survivors = {stage.name: int(stage.survivors[0]) for stage in step.stages}
        top_p = survivors.pop("TopPLogitsWarper")
        assert survivors == {"logits": 96, "TemperatureLogitsWarper": 96, "TopKLogitsWarper": 7}
        assert 1 <= top_p <= 7
        assert all(stage.probabilities.sum() <= 1 + 1e-5 for stage in step.stages)

    def test_by_default_steps_keep_only_candidates(self, tiny):
        for step in decode_steps(tiny, PROMPT, max_new_tokens=3, stops=False):
            assert (step.logits, step.hidden_states, step.attentions) == (None, None, None)
            tensors = [tensor for stage in step.stages for tensor in (stage.token_ids, stage.probabilities)]
            assert {tensor.untyped_storage().nbytes() for tensor in tensors} <= {10 * 4, 10 * 8}

    def test_kept_tensors_are_ordinary_ones(self, tiny):
        """The loop runs without autograd's bookkeeping, but what it hands out can be computed with and written to."""
        step = next(decode_steps(tiny, PROMPT, max_new_tokens=1, keep=Keep(logits=True, hidden_states=True)))
        assert (len(step.hidden_states), step.attentions) == (3, None)
        step.logits[0, 0] = -torch.inf
        again = tiny.model.get_output_embeddings()(step.hidden_states[-1][:, -1:])[:, -1]
        assert torch.equal(again[0, 1:], step.logits[0, 1:])
        assert again.requires_grad

    def test_no_candidates_no_probability(self, tiny):
        step = next(decode_steps(tiny, PROMPT, max_new_tokens=1, keep=Keep(top_k=0)))
        assert (step.stages, step.chosen_probability) == ((), None)
        with pytest.raises(DecodeError, match=r"Keep\(top_k=0\) keeps no probabilities"):
            _ = step.surprisal_bits

    def test_every_act_has_its_time(self, tiny, monkeypatch):
        """The clock goes on by one second each time that it is read, here too."""
        monkeypatch.setattr(time, "perf_counter", count().__next__)
        steps = []
        for step in decode_steps(tiny, PROMPT, max_new_tokens=3, stops=False):
            steps.append(step)
            for _ in range(4):
                time.perf_counter()
        assert {(step.forward_s, step.choose_s, step.stop_check_s) for step in steps} == {(1, 1, 1)}
        assert [step.caller_s for step in steps] == [0, 5, 5]


class TestStopReasons:
    def test_a_stop_string(self, embedded):
        greedy = [step.token_id for step in decode_steps(embedded, "Hello", max_new_tokens=30, stops=False)]
        text = embedded.tokenizer.decode(greedy[:4])[-3:]
        config = GenerationConfig(stop_strings=[text])
        steps = list(decode_steps(embedded, "Hello", max_new_tokens=30, generation_config=config, stops=False))
        assert [step.stop_reason for step in steps] == [None] * (len(steps) - 1) + ["stop string"]
        ids = [step.token_id for step in steps]
        assert ids == greedy[: len(ids)]
        assert text in embedded.tokenizer.decode(ids)

    def test_time(self, tiny):
        config = GenerationConfig(max_time=1e-9)
        (step,) = decode_steps(tiny, PROMPT, max_new_tokens=30, generation_config=config, stops=False)
        assert step.stop_reason == "time"

    def test_each_sequence_of_a_batch_has_its_own(self, tiny):
        rows = [PROMPT, [8, 3], [33, 12, 15, 44]]
        config = GenerationConfig(do_sample=True, temperature=3.0, eos_token_id=list(range(1, 30)), pad_token_id=0)
        torch.manual_seed(0)
        steps = list(decode_steps(tiny, rows, max_new_tokens=12, generation_config=config))
        ends = []
        for row in range(3):
            ids = [step.token_ids[row] for step in steps]
            reasons = [step.stop_reasons[row] for step in steps]
            (end,) = [i for i, reason in enumerate(reasons) if reason is not None]
            assert reasons[end] == ("stop token" if 1 <= ids[end] < 30 else "length")
            assert set(ids[end + 1 :]) <= {0}
            ends.append(end)
        assert len(set(ends)) > 1


class TestInterrupted:
    @staticmethod
    def _interrupt(monkeypatch, module, call):
        """Interrupt the n-th call of a module, as Ctrl+C in the middle of a pass does."""
        calls, forward = count(1), module.forward

        def interrupted(*args, **kwargs):
            if next(calls) == call:
                raise KeyboardInterrupt
            return forward(*args, **kwargs)

        monkeypatch.setattr(module, "forward", interrupted)

    @pytest.mark.parametrize("static", [False, True])
    @pytest.mark.parametrize("layer", [0, 1])
    def test_the_steps_so_far_and_the_cache_stay_usable(self, tiny, monkeypatch, static, layer):
        config = tiny.model.config
        cache = StaticCache(config=config, max_cache_len=64) if static else DynamicCache(config=config)
        whole = [step.token_id for step in decode_steps(tiny, PROMPT, max_new_tokens=8, stops=False)]
        steps = []
        with monkeypatch.context() as patch:
            self._interrupt(patch, tiny.model.model.layers[layer], 4)
            with pytest.raises(KeyboardInterrupt):
                steps.extend(decode_steps(tiny, PROMPT, max_new_tokens=8, cache=cache, stops=False))
        assert [step.token_id for step in steps] == whole[:3]
        assert {int(each.get_seq_length()) for each in cache.layers} == {steps[-1].context_length} == {5}
        rest = decode_steps(tiny, PROMPT + whole[:3], max_new_tokens=5, cache=cache, stops=False)
        assert [step.token_id for step in rest] == whole[3:]

    def test_an_interrupted_prefill_leaves_an_empty_cache(self, tiny, monkeypatch):
        cache = DynamicCache(config=tiny.model.config)
        self._interrupt(monkeypatch, tiny.model.model.layers[1], 1)
        with pytest.raises(KeyboardInterrupt):
            next(decode_steps(tiny, PROMPT, max_new_tokens=8, cache=cache))
        assert (cache.get_seq_length(), kv_bytes(cache)) == (0, 0)

    def test_a_cache_past_its_sliding_window_cannot_forget(self):
        config = MistralConfig(num_hidden_layers=1, hidden_size=8, num_attention_heads=1, sliding_window=4)
        cache = DynamicCache(config=config)
        cache.update(torch.zeros(1, 1, 3, 8), torch.zeros(1, 1, 3, 8), 0)
        crop_cache(cache, 2)
        assert cache.get_seq_length() == 2
        cache.update(torch.zeros(1, 1, 6, 8), torch.zeros(1, 1, 6, 8), 0)
        with pytest.raises(DecodeError, match="a DynamicSlidingWindowLayer does not keep what came before its window"):
            crop_cache(cache, 7)


class TestReweigh:
    @settings(max_examples=20, deadline=None)
    @given(temperature=st.floats(0.2, 3), top_k=st.integers(0, 60), top_p=st.floats(0.1, 1))
    def test_gives_the_stages_that_a_run_with_these_settings_records(self, tiny, temperature, top_k, top_p):
        config = GenerationConfig(do_sample=True, temperature=temperature, top_k=top_k, top_p=top_p)
        keep = Keep(logits=True)
        (recorded,) = decode_steps(tiny, PROMPT, max_new_tokens=1, generation_config=config, keep=keep)
        stages = reweigh(recorded.logits, temperature=temperature, top_k=top_k, top_p=top_p)
        assert [stage.name for stage in stages] == [stage.name for stage in recorded.stages]
        for ours, theirs in zip(stages, recorded.stages, strict=True):
            assert torch.equal(ours.probabilities, theirs.probabilities)
            assert torch.equal(ours.survivors, theirs.survivors)

    def test_a_temperature_of_zero_is_refused(self):
        with pytest.raises(DecodeError, match="these warpers cannot be built: .*temperature"):
            reweigh(torch.zeros(1, 4), temperature=0.0)


def _unchecked(**fields) -> dict:
    """Settings with values that GenerationConfig itself would report or refuse."""
    config = GenerationConfig(do_sample=fields.pop("do_sample", False))
    for name, value in fields.items():
        setattr(config, name, value)
    return {"generation_config": config}


@pytest.mark.parametrize(
    ("prompt", "arguments", "message"),
    [
        ([], {}, "the prompt is empty"),
        ([[3], []], {}, "the prompt is empty"),
        ([5, 10**6], {}, r"the prompt holds id 1000000, but the vocabulary has ids 0 to 95"),
        ([5, -1], {}, "the prompt holds id -1"),
        ([5], {"max_new_tokens": 0}, "max_new_tokens=0: at least one token"),
        ([5], _unchecked(num_beams=2), "beam search is not shown by this loop"),
        ([5], _unchecked(penalty_alpha=0.5, top_k=4), "contrastive search is not shown"),
        ([5], _unchecked(do_sample=True, num_return_sequences=2), "num_return_sequences=2 is not shown"),
        ([5], _unchecked(min_new_tokens=9), "min_new_tokens=9 is more than max_new_tokens=3"),
        ([5], _unchecked(use_cache=False), "use_cache=False: this loop feeds one token"),
        ([5], _unchecked(temperature=0.5), "temperature need do_sample=True"),
        ([5], _unchecked(do_sample=True, temperature=0.0), "the generation settings cannot be used: .*temperature"),
        ([5], _unchecked(no_repeat_ngram_size="x"), "the generation settings cannot be used: "),
        ([5], {"keep": Keep(attentions=True)}, "attentions are never formed by 'sdpa' attention"),
    ],
)
def test_bad_input_is_refused_before_the_first_pass(tiny, monkeypatch, prompt, arguments, message):
    monkeypatch.setattr(type(tiny.model), "forward", lambda *_, **__: pytest.fail("a forward pass ran"))
    with pytest.raises(DecodeError, match=message):
        decode_steps(tiny, prompt, **{"max_new_tokens": 3, **arguments})


def test_beyond_the_context_limit_it_warns(tiny):
    with pytest.warns(UserWarning, match="the prompt has 129 tokens, but the model's context limit is 128"):
        (step,) = decode_steps(tiny, [5] * 129, max_new_tokens=1)
    assert step.context_length == 129
