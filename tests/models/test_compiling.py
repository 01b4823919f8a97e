"""Compiled decode steps: the same tokens, few compilations, and eager mode, said aloud, where compiling fails."""

import contextlib
import functools
import json
import os

import pytest
import torch
from torch._dynamo.utils import counters
from torch._inductor import config as inductor_config
from torch._inductor.utils import fresh_cache
from transformers import (
    DynamicCache,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    StaticCache,
)

from glmlab import ChatSession, decode_steps, encode_chat, load_model
from glmlab.generation.decoding import DecodeError, Keep
from glmlab.generation.preparation import new_cache
from glmlab.models.checkpoints import find_config
from glmlab.models.compiling import CompiledForward, CompileWarning, make_room

PROMPT = [5, 6, 7]
NO_COMPILER = "torch.compile cannot be used here: InvalidCxxCompiler: .*no-such-compiler"


def ids(loaded, prompt=PROMPT, tokens=12):
    never_ends = GenerationConfig(eos_token_id=[], pad_token_id=0)
    steps = decode_steps(loaded, prompt, max_new_tokens=tokens, generation_config=never_ends)
    return [step.token_ids for step in steps]


def sums(loaded, earlier):
    """A chat that asks for sums: the model is sure of every token, on any processor."""
    question, answer = {"role": "user", "content": "What is 7 + 8?"}, {"role": "assistant", "content": "7 + 8 = 15."}
    return encode_chat(loaded.tokenizer, [question, answer] * 2 * earlier + [question])


@contextlib.contextmanager
def no_compiler():
    """A machine on which nothing is compiled yet, and which cannot compile."""
    with fresh_cache(), inductor_config.patch({"cpp.cxx": ("no-such-compiler",)}):
        yield


@pytest.fixture(scope="module")
def traced():
    """The model with decode steps traced as always, and run by PyTorch's own kernels: nothing has to be built."""
    with pytest.MonkeyPatch.context() as patched:
        patched.setattr(torch, "compile", functools.partial(torch.compile, backend="eager"))
        return load_model("embedded", precision="fp32", device="cpu", compile=True)


class TestCompiled:
    def test_the_report_tells(self, compiled, embedded):
        assert compiled.report.compilation.failure is None
        assert compiled.report.compilation.seconds > 0
        assert f"decode steps, {compiled.report.compilation.seconds:.1f} s" in repr(compiled)
        assert embedded.report.compilation is None
        assert "compiled" not in repr(embedded)

    def test_ids_equal_eager_across_cache_lengths_and_compile_twice_at_most(self, compiled, embedded):
        ids(compiled)  # compiled anew where a test before this one has built a model of another class
        counters.clear()
        for earlier in (0, 6, 20):  # caches of 256, 512 and 1024
            prompt = sums(embedded, earlier)
            assert ids(compiled, prompt) == ids(embedded, prompt)
        assert counters["stats"]["unique_graphs"] <= 1  # the length as a variable; the first was compiled on loading
        assert not counters["graph_break"]

    def test_sampling_and_logits_too(self, traced, embedded):
        sampling = GenerationConfig(do_sample=True, temperature=0.8, top_p=0.9)
        runs = []
        for loaded in (traced, embedded):
            torch.manual_seed(3)
            steps = decode_steps(loaded, PROMPT, max_new_tokens=6, generation_config=sampling, keep=Keep(logits=True))
            runs.append(list(steps))
        for fast, slow in zip(*runs, strict=True):
            assert fast.token_ids == slow.token_ids
            torch.testing.assert_close(fast.logits, slow.logits, rtol=1e-3, atol=1e-3)

    def test_attention_reads_shared_heads_once(self, traced):
        """The embedded model has 4 query heads on 2 heads of keys and values."""
        steps = decode_steps(traced, PROMPT, max_new_tokens=3, keep=Keep(top_k=0))
        list(zip(range(2), steps, strict=False))
        with torch.profiler.profile(record_shapes=True, acc_events=True) as profiler:
            next(steps)
        kernel = "aten::_scaled_dot_product_flash_attention_for_cpu"
        shapes = [event.input_shapes[:2] for event in profiler.events() if event.name == kernel]
        assert shapes == [[[1, 4, 1, 64], [1, 2, 256, 64]]] * 4
        assert "TRANSFORMERS_SDPA_FORCE_GQA" not in os.environ

    def test_a_batch_with_padding(self, traced, embedded):
        rows = [sums(embedded, 0), sums(embedded, 1)]
        assert ids(traced, rows, 4) == ids(embedded, rows, 4)

    def test_a_chat_says_the_same_over_one_static_cache(self, traced, embedded):
        answers = []
        for loaded in (traced, embedded):
            session = ChatSession(loaded, max_new_tokens=30)
            session.restore([("你好", [5] * 240)])  # nearly what the shortest cache holds
            *_, _ = session.say("Tell me a long story about a fox.")
            stream = session.say("What is 7 + 8?")
            next(stream)
            stream.close()  # interrupted: what is cached beyond the common beginning has to go
            *_, _ = session.say("What is 7 + 8?")
            answers.append([(turn.token_ids, turn.stop_reason, turn.context_tokens) for turn in session.turns])
            assert type(session._cache) is (StaticCache if loaded is traced else DynamicCache)
        assert answers[0] == answers[1]
        assert answers[0][2][1] == "interrupted"

    def test_a_chat_over_a_fixed_length_keeps_it(self, traced, embedded):
        sessions = [ChatSession(traced, static_tokens=64), ChatSession(embedded, static_tokens=64)]
        for session in sessions:
            *_, _ = session.say("Tell me a long story about a fox.")
        assert sessions[0].turns[0].token_ids == sessions[1].turns[0].token_ids
        assert sessions[0].turns[0].stop_reason == "context limit"
        assert sessions[0]._cache.layers[0].keys.shape[2] == 64

    def test_a_dynamic_cache_is_refused(self, traced):
        with pytest.raises(
            DecodeError, match=r"needs a StaticCache, and this is a DynamicCache. Make it with .*new_cache"
        ):
            decode_steps(traced, PROMPT, max_new_tokens=2, cache=DynamicCache(config=traced.model.config))


class TestRoom:
    def test_what_is_cached_stays_and_no_room_is_made_twice(self, embedded):
        cache = new_cache(embedded, 256)
        list(decode_steps(embedded, PROMPT, max_new_tokens=5, cache=cache))
        cached = int(cache.get_seq_length())
        before = [layer.keys[:, :, :cached].clone() for layer in cache.layers]
        make_room(cache, 300, 8192, torch.device("cpu"))
        assert [layer.keys.shape[2] for layer in cache.layers] == [512] * 4
        for layer, keys in zip(cache.layers, before, strict=True):
            assert torch.equal(layer.keys[:, :, :cached], keys)
        assert int(cache.get_seq_length()) == cached >= len(PROMPT)
        grown = cache.layers[0].keys
        make_room(cache, 256, 8192, torch.device("cpu"))
        assert cache.layers[0].keys is grown

    def test_no_more_than_a_step_of_the_cache_is_idle(self, traced):
        cache = new_cache(traced)
        steps = decode_steps(traced, PROMPT * 683, max_new_tokens=2, cache=cache)
        assert next(steps).context_length == 2049
        assert [layer.keys.shape[2] for layer in cache.layers] == [2304] * 4


class TestWhereCompilingFails:
    def test_loading_falls_back_and_says_so(self, tmp_path):
        fields = json.loads(find_config("embedded").read_text())
        (tmp_path / "config.json").write_text(json.dumps({**fields, "num_layers": 1}))
        arguments = {"precision": "bf16", "device": "cpu", "weights": "random"}
        with no_compiler(), pytest.warns(CompileWarning, match=NO_COMPILER) as caught:
            loaded = load_model(str(tmp_path), **arguments, compile=True)
        (text,) = [str(warning.message) for warning in caught if warning.category is CompileWarning]
        assert "Decode steps run in eager mode, with the same tokens" in text
        assert "needs a C++ compiler" in text
        assert "no, eager mode (InvalidCxxCompiler)" in repr(loaded)
        assert loaded.compiled is None
        assert ids(loaded) == ids(load_model(str(tmp_path), **arguments))

    def test_a_later_compilation_that_fails_is_said_once(self, monkeypatch):
        """GIVEN a compiler that works once, WHEN a batch of another size comes, THEN it runs in eager mode."""

        def build(graph, _inputs, built=[]):  # noqa: B006 - it counts
            built.append(graph)
            assert len(built) == 1, "no compiler any more"
            return graph.forward

        monkeypatch.setattr(torch, "compile", functools.partial(torch.compile, backend=build))
        forward = CompiledForward(_one_layer(LlamaConfig, LlamaForCausalLM))
        assert forward.compilation.failure is None
        three = {"input_ids": torch.ones((3, 1), dtype=torch.long)}
        with (
            pytest.warns(CompileWarning, match="AssertionError: no compiler any more") as caught,
            torch.inference_mode(),
        ):
            logits = [forward(**three).logits for _ in range(2)]
        assert torch.equal(*logits)
        assert len(caught) == 1
        assert str(forward.compilation) == "no, eager mode (AssertionError)"

    def test_layers_that_keep_a_window_only_are_not_compiled(self):
        with pytest.warns(CompileWarning, match="layers of kind StaticSlidingWindowLayer, not in full"):
            assert CompiledForward(_one_layer(MistralConfig, MistralForCausalLM, sliding_window=16)).compilation.failure


def _one_layer(config_class, model_class, **fields):
    config = config_class(
        vocab_size=64, hidden_size=32, intermediate_size=32, num_hidden_layers=1, num_attention_heads=2,
        num_key_value_heads=1, **fields,
    )  # fmt: skip
    return model_class(config).eval()
