"""Compiled decode steps: the same tokens, few compilations, and eager mode, said aloud, where compiling fails."""

import contextlib
import os

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache
from transformers import DynamicCache, GenerationConfig, MistralConfig, MistralForCausalLM, StaticCache

from glmlab import ChatSession, decode_steps, load_model
from glmlab.generation.decoding import DecodeError, Keep, new_cache
from glmlab.models.compiling import CompiledForward, CompileWarning, make_room

PROMPT = [5, 6, 7]
NO_COMPILER = "torch.compile cannot be used here: InvalidCxxCompiler: .*no-such-compiler"


def ids(loaded, prompt=PROMPT, tokens=40, **settings):
    return [step.token_ids for step in decode_steps(loaded, prompt, max_new_tokens=tokens, **settings)]


@contextlib.contextmanager
def no_compiler():
    """A machine on which nothing is compiled yet, and which cannot compile."""
    with fresh_cache(), inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


class TestCompiled:
    def test_the_report_tells(self, compiled, embedded):
        assert compiled.report.compilation.failure is None
        assert compiled.report.compilation.seconds > 0
        assert f"decode steps, {compiled.report.compilation.seconds:.1f} s" in repr(compiled)
        assert embedded.report.compilation is None
        assert "compiled" not in repr(embedded)

    def test_ids_equal_eager_across_cache_lengths_and_compile_twice_at_most(self, compiled, embedded):
        never_ends = GenerationConfig(eos_token_id=[], pad_token_id=0)
        ids(compiled)  # compiled anew where a test before this one has built a model of another class
        counters.clear()
        for tokens in (40, 700, 1100):  # caches of 256, then up to 768, then up to 1280
            fast = ids(compiled, tokens=tokens, generation_config=never_ends)
            assert len(fast) == tokens
            assert fast == ids(embedded, tokens=tokens, generation_config=never_ends)
        assert counters["stats"]["unique_graphs"] <= 1  # the length as a variable; the first was compiled on loading
        assert not counters["graph_break"]

    def test_sampling_and_logits_too(self, compiled, embedded):
        sampling = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.9)
        runs = []
        for loaded in (compiled, embedded):
            torch.manual_seed(3)
            runs.append(
                list(
                    decode_steps(loaded, PROMPT, max_new_tokens=12, generation_config=sampling, keep=Keep(logits=True))
                )
            )
        for fast, slow in zip(*runs, strict=True):
            assert fast.token_ids == slow.token_ids
            torch.testing.assert_close(fast.logits, slow.logits, rtol=1e-3, atol=1e-3)

    def test_attention_reads_shared_heads_once(self, compiled):
        """The embedded model has 4 query heads on 2 heads of keys and values."""
        steps = decode_steps(compiled, PROMPT, max_new_tokens=3, keep=Keep(top_k=0))
        list(zip(range(2), steps, strict=False))
        with torch.profiler.profile(record_shapes=True, acc_events=True) as profiler:
            next(steps)
        kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
        shapes = [event.input_shapes[:2] for event in profiler.events() if event.name == kernel]
        assert shapes == [[[1, 4, 1, 64], [1, 2, 256, 64]]] * 4
        assert "TRANSFORMERS_SDPA_FORCE_GQA" not in os.environ

    def test_a_batch_with_padding(self, compiled, embedded):
        rows = [[5, 6, 7, 8], [9, 10]]
        assert ids(compiled, rows, 6) == ids(embedded, rows, 6)

    def test_a_chat_says_the_same_over_one_static_cache(self, compiled, embedded):
        answers = []
        for loaded in (compiled, embedded):
            session = ChatSession(loaded, max_new_tokens=300)
            for text in ("你好", "Tell me a long story about a fox."):
                *_, _ = session.say(text)
            stream = session.say("What is 7 + 8?")
            next(stream)
            stream.close()  # interrupted: what is cached beyond the common beginning has to go
            *_, _ = session.say("What is 7 + 8?")
            answers.append([(turn.token_ids, turn.stop_reason, turn.context_tokens) for turn in session.turns])
            assert type(session._cache) is (StaticCache if loaded is compiled else DynamicCache)
        assert answers[0] == answers[1]
        assert answers[0][2][1] == "interrupted"

    def test_a_chat_can_be_restored(self, compiled, embedded):
        answers = []
        for loaded in (compiled, embedded):
            session = ChatSession(loaded, max_new_tokens=300)
            session.restore([("你好", [5] * 400)])  # more than the shortest cache holds
            *_, turn = session.say("What is 7 + 8?")
            answers.append((turn.token_ids, turn.context_tokens))
        assert answers[0] == answers[1]

    def test_a_chat_over_a_fixed_length_keeps_it(self, compiled, embedded):
        sessions = [ChatSession(compiled, static_tokens=300), ChatSession(embedded, static_tokens=300)]
        for session in sessions:
            *_, _ = session.say("Tell me a long story about a fox.")
        assert sessions[0].turns[0].token_ids == sessions[1].turns[0].token_ids
        assert sessions[0].turns[0].stop_reason == "context limit"
        assert sessions[0]._cache.layers[0].keys.shape[2] == 300

    def test_a_dynamic_cache_is_refused(self, compiled):
        with pytest.raises(
            DecodeError, match=r"needs a StaticCache, and this is a DynamicCache. Make it with .*new_cache"
        ):
            decode_steps(compiled, PROMPT, max_new_tokens=2, cache=DynamicCache(config=compiled.model.config))


class TestRoom:
    def test_what_is_cached_stays(self, compiled):
        cache = new_cache(compiled)
        list(decode_steps(compiled, PROMPT, max_new_tokens=5, cache=cache))
        cached = int(cache.get_seq_length())
        before = [layer.keys[:, :, :cached].clone() for layer in cache.layers]
        make_room(cache, 300, 8192, torch.device("cpu"))
        assert [layer.keys.shape[2] for layer in cache.layers] == [512] * 4
        assert all(
            torch.equal(layer.keys[:, :, :cached], keys) for layer, keys in zip(cache.layers, before, strict=True)
        )
        assert int(cache.get_seq_length()) == cached >= len(PROMPT)

    def test_no_more_than_a_step_of_the_cache_is_idle(self, compiled):
        cache = new_cache(compiled)
        steps = decode_steps(compiled, PROMPT * 683, max_new_tokens=2, cache=cache)
        assert next(steps).context_length == 2049
        assert [layer.keys.shape[2] for layer in cache.layers] == [2304] * 4

    def test_room_that_is_there_changes_nothing(self, compiled):
        cache = new_cache(compiled)
        list(decode_steps(compiled, PROMPT, max_new_tokens=2, cache=cache))
        keys = cache.layers[0].keys
        make_room(cache, 256, 8192, torch.device("cpu"))
        assert cache.layers[0].keys is keys


class TestWhereCompilingFails:
    def test_loading_falls_back_and_says_so(self):
        with no_compiler(), pytest.warns(CompileWarning, match=NO_COMPILER) as caught:
            loaded = load_model("embedded", precision="bf16", device="cpu", compile=True)
        (text,) = [str(warning.message) for warning in caught if warning.category is CompileWarning]
        assert "Decode steps run in eager mode, with the same tokens" in text
        assert "needs a C++ compiler" in text
        assert "no, eager mode (InvalidCxxCompiler)" in repr(loaded)
        assert loaded.compiled is None
        assert ids(loaded) == ids(load_model("embedded", precision="bf16", device="cpu"))

    def test_a_later_compilation_that_fails_is_said_once(self, compiled, embedded, monkeypatch):
        monkeypatch.setattr(compiled.compiled.compilation, "failure", None)  # put back after the test
        three = [[5, 6], [7, 8], [9, 10]]  # a batch of this size was not compiled before
        with no_compiler(), pytest.warns(CompileWarning, match=NO_COMPILER) as caught:
            assert ids(compiled, three, 6) == ids(embedded, three, 6)
        assert [warning.category for warning in caught].count(CompileWarning) == 1
        assert "no, eager mode" in repr(compiled)

    def test_layers_that_keep_a_window_only_are_not_compiled(self):
        config = MistralConfig(
            vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
            num_key_value_heads=1, sliding_window=16,
        )  # fmt: skip
        model = MistralForCausalLM(config).eval()
        with pytest.warns(CompileWarning, match="layers of kind StaticSlidingWindowLayer, not in full"):
            assert CompiledForward(model).compilation.failure
