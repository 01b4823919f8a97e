"""A chat feeds only what is new, and its cache is the one of the whole conversation."""

import pytest
import torch
from transformers import GenerationConfig, PreTrainedTokenizerFast

from glmlab import load_model
from glmlab.generation import decoding
from glmlab.generation.chat import ChatSession, ContextFullError
from glmlab.generation.decoding import DecodeError
from glmlab.models.loading import LoadedModel
from glmlab.prompts.encoding import PromptError, encode_chat


def _last(turns):
    *_, turn = turns
    return turn


def _said(session):
    return [(turn.token_ids, turn.stop_reason, turn.prompt_tokens, turn.context_tokens) for turn in session.turns]


def _assert_cache_is_that_of_the_whole_conversation(session):
    model, fed = session.loaded.model, session._ids[session.context_tokens :]
    with torch.no_grad():
        whole = model(torch.tensor([session._ids])).logits[0, -1]
        cached = model(torch.tensor([fed]), past_key_values=session._cache).logits[0, -1]
    torch.testing.assert_close(cached, whole, atol=1e-4, rtol=1e-4)


def _rewriting(embedded) -> LoadedModel:
    """The embedded model behind a template that numbers all messages anew with each new one."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=embedded.tokenizer.backend_tokenizer,
        chat_template="{% for m in messages %}{{ loop.revindex }}{{ m.role }}:{{ m.content }};{% endfor %}",
    )
    return LoadedModel(embedded.model, tokenizer, embedded.report)


@pytest.fixture
def session(embedded) -> ChatSession:
    return ChatSession(embedded, max_new_tokens=40)


@pytest.fixture(scope="module")
def talk(embedded) -> tuple[ChatSession, list]:
    """Three turns, and all that the first of them streamed; tests must not go on with it."""
    session = ChatSession(embedded, max_new_tokens=60)
    streamed = list(session.say("你好"))
    for text in ("3 + 4 = ?", "谢谢"):
        _last(session.say(text))
    return session, streamed


class TestTurns:
    def test_the_answer_streams(self, talk):
        session, streamed = talk
        assert "".join(turn.new_text for turn in streamed) == streamed[-1].text == session.turns[0].text
        assert [turn.generated_tokens for turn in streamed] == list(range(1, len(streamed) + 1))
        assert {turn.stop_reason for turn in streamed[:-1]} == {None}
        assert streamed[-1].stop_reason == "stop token"
        assert "TinyGLM" in streamed[-1].text
        assert streamed[-1].first_token_s > 0
        assert streamed[-1].token_s > 0

    def test_ids_are_those_of_the_chat_format_and_only_new_ones_are_fed(self, talk, embedded):
        session, _ = talk
        messages = []
        cached = 0
        for number, turn in enumerate(session.turns, start=1):
            messages.append({"role": "user", "content": turn.user_text})
            prompt = encode_chat(embedded.tokenizer, messages)
            assert (turn.number, turn.prompt_tokens) == (number, len(prompt) - cached)
            messages.append({"role": "assistant", "content": turn.text})
            cached = turn.context_tokens
        assert cached == len(session._ids) - 1
        assert session._ids[:-1] == encode_chat(embedded.tokenizer, messages, add_generation_prompt=False)

    def test_the_cache_is_that_of_the_whole_conversation(self, session):
        for text in ("你好", "3 + 4 = ?"):
            _last(session.say(text))
        _assert_cache_is_that_of_the_whole_conversation(session)

    def test_characters_and_bytes_are_counted(self, talk, embedded):
        session, _ = talk
        first, *_, last = session.turns
        config = embedded.model.config
        bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        assert first.context_characters == len("你好") + len(first.text)
        assert last.context_characters == session.context_characters
        assert last.kv_bytes == bytes_per_token * last.context_tokens

    def test_a_restored_session_goes_on_as_if_never_stopped(self, talk, embedded):
        session, _ = talk
        again = ChatSession(embedded, max_new_tokens=60)
        again.restore([(turn.user_text, turn.token_ids) for turn in session.turns[:2]])
        restored = again.turns[1]
        assert [turn.stop_reason for turn in again.turns] == ["restored", "restored"]
        assert restored.context_tokens == again.context_tokens == session.turns[1].context_tokens
        assert restored.context_characters == again.context_characters == session.turns[1].context_characters
        assert _last(again.say("谢谢")).token_ids == session.turns[2].token_ids

    def test_clear_forgets(self, talk, session):
        _last(session.say("Hello"))
        session.clear()
        assert session.context_tokens == session.context_characters == 0
        assert _last(session.say("你好")).token_ids == talk[1][-1].token_ids


def test_a_turn_that_is_left_is_kept_as_far_as_it_came(session):
    turns = session.say("Tell me a long story.")
    seen = [next(turns) for _ in range(5)]
    turns.close()
    assert session.turns[-1].stop_reason == "interrupted"
    assert session.turns[-1].token_ids == seen[-1].token_ids
    _last(session.say("3 + 4 = ?"))
    _assert_cache_is_that_of_the_whole_conversation(session)


def test_a_turn_that_was_never_begun_changes_nothing(session):
    session.say("Hello")
    assert session.turns == []
    assert session.context_tokens == 0


def test_exact_length_on_request(session, monkeypatch):
    seen = []
    run = decoding._run_processors
    monkeypatch.setattr(decoding, "_run_processors", lambda *args: [seen.append(len(args[0])), run(*args)][1])
    turn = _last(session.say("你好", stops=False, max_new_tokens=60))
    assert (turn.generated_tokens, turn.stop_reason) == (60, "length")
    assert set(session.loaded.model.generation_config.eos_token_id) & set(turn.token_ids)
    assert seen == [0] * 60  # no processor: none that would take memory in every step


def test_bytes_that_never_become_a_character_do_not_end_the_stream():
    loaded = load_model("embedded", precision="fp32", device="cpu", weights="random")
    session = ChatSession(loaded, max_new_tokens=80, generation_config=GenerationConfig(do_sample=True))
    torch.manual_seed(0)
    turn = _last(session.say("Hello", stops=False))
    assert turn.generated_tokens == 80
    assert "\ufffd" in turn.text


def test_rules_of_the_roles_hold(session):
    with pytest.raises(PromptError, match="an observation answers a tool call"):
        session.say("25", role="observation")


class TestFullContext:
    @pytest.fixture(params=["model", "static cache"])
    def short(self, request, embedded, monkeypatch):
        if request.param == "static cache":
            return ChatSession(embedded, static_tokens=64), r"static cache's limit is 64 tokens \(static_tokens\)"
        monkeypatch.setattr(embedded.model.config, "max_position_embeddings", 64)
        return ChatSession(embedded), r"model's limit is 64 tokens \(max_position_embeddings\)"

    def test_the_answer_ends_at_the_limit_and_nothing_is_dropped(self, short):
        session, limit = short
        turn = _last(session.say("Tell me a long story."))
        assert (turn.stop_reason, turn.context_tokens, session.context_limit) == ("context limit", 64, 64)
        with pytest.raises(ContextFullError, match=rf"{limit}, the history holds 64 and this message adds \d+"):
            session.say("And then?")
        assert session.context_tokens == 64
        with pytest.raises(ContextFullError, match=rf"the turns to restore have \d+ tokens, but the {limit}"):
            session.restore([("Hello", [5] * 80)])


class TestStaticCache:
    """A chat over a cache of fixed length says what it says over one that grows."""

    def test_turns_an_interruption_and_restoring(self, embedded):
        sessions = [ChatSession(embedded, max_new_tokens=30, static_tokens=tokens) for tokens in (None, 300)]
        for session in sessions:
            session.restore([("你好", [5] * 40), ("Hello", [6] * 30)])
            _last(session.say("3 + 4 = ?"))
            turns = session.say("Tell me a long story.")
            next(turns)
            turns.close()
            _last(session.say("谢谢"))
        dynamic, static = sessions
        assert _said(dynamic) == _said(static)
        assert static.turns[3].stop_reason == "interrupted"
        _assert_cache_is_that_of_the_whole_conversation(static)
        static.clear()
        assert static.context_tokens == 0
        _last(static.say("Hello", max_new_tokens=2))
        assert [layer.keys.shape[2] for layer in static._cache.layers] == [300] * 4

    def test_a_history_that_a_template_rewrites_is_cropped(self, embedded):
        """The cache shrinks to what is still true."""
        sessions = [ChatSession(_rewriting(embedded), max_new_tokens=8, static_tokens=n) for n in (None, 200)]
        for session in sessions:
            for text in ("one", "two", "three"):
                _last(session.say(text))
            assert session.turns[1].prompt_tokens > 20  # fed anew
        assert _said(sessions[0]) == _said(sessions[1])
        for session in sessions:
            _assert_cache_is_that_of_the_whole_conversation(session)

    @pytest.mark.parametrize(
        ("tokens", "message"),
        [
            (0, "static_tokens=0: a static cache holds at least one token"),
            (10**12, r"static_tokens=1000000000000: the model's limit is \d+ tokens"),
            (1.5, r"static_tokens=1.5 is not a whole number of tokens. Give one"),
        ],
    )
    def test_a_length_that_cannot_be_is_refused(self, embedded, tokens, message):
        with pytest.raises(DecodeError, match=message):
            ChatSession(embedded, static_tokens=tokens)
