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


def _logits_of_whole(session):
    with torch.no_grad():
        return session.loaded.model(torch.tensor([session._ids])).logits[0, -1]


def _logits_of_cached(session):
    with torch.no_grad():
        fed = session._ids[session.context_tokens :]
        return session.loaded.model(torch.tensor([fed]), past_key_values=session._cache).logits[0, -1]


def _rewriting(embedded) -> LoadedModel:
    """The embedded model behind a template that numbers all messages anew with each new one."""
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=embedded.tokenizer.backend_tokenizer,
        chat_template="{% for m in messages %}{{ loop.revindex }}{{ m.role }}:{{ m.content }};{% endfor %}",
    )
    return LoadedModel(embedded.model, tokenizer, embedded.report)


@pytest.fixture
def session(embedded) -> ChatSession:
    return ChatSession(embedded, max_new_tokens=150)


class TestTurns:
    def test_the_answer_streams(self, session):
        turns = list(session.say("你好"))
        assert "".join(turn.new_text for turn in turns) == turns[-1].text
        assert [turn.generated_tokens for turn in turns] == list(range(1, len(turns) + 1))
        assert {turn.stop_reason for turn in turns[:-1]} == {None}
        assert turns[-1].stop_reason == "stop token"
        assert "TinyGLM" in turns[-1].text

    def test_only_new_tokens_are_fed(self, session, embedded):
        first = _last(session.say("你好"))
        second = _last(session.say("Hello"))
        assert first.prompt_tokens == len(encode_chat(embedded.tokenizer, [{"role": "user", "content": "你好"}]))
        assert second.number == 2
        assert second.context_tokens == first.context_tokens + second.prompt_tokens + second.generated_tokens - 1
        assert second.prompt_tokens < 12

    def test_the_cache_is_that_of_the_whole_conversation(self, session):
        for text in ("你好", "3 + 4 = ?", "谢谢"):
            _last(session.say(text))
        expected = _logits_of_whole(session)
        torch.testing.assert_close(_logits_of_cached(session), expected, atol=1e-4, rtol=1e-4)

    def test_ids_are_those_of_the_chat_format(self, session, embedded):
        answers = [_last(session.say(text)).text for text in ("你好", "3 + 4 = ?")]
        messages = [
            {"role": "user", "content": "你好"},
            {"role": "assistant", "content": answers[0]},
            {"role": "user", "content": "3 + 4 = ?"},
            {"role": "assistant", "content": answers[1]},
        ]
        assert session._ids[:-1] == encode_chat(embedded.tokenizer, messages, add_generation_prompt=False)

    def test_characters_and_bytes_are_counted(self, session, embedded):
        turn = _last(session.say("你好"))
        config = embedded.model.config
        bytes_per_token = 2 * config.num_hidden_layers * config.num_key_value_heads * config.head_dim * 4
        assert turn.context_characters == session.context_characters == len("你好") + len(turn.text)
        assert turn.kv_bytes == bytes_per_token * turn.context_tokens

    def test_times_are_of_this_turn(self, session):
        turn = _last(session.say("你好"))
        assert 0 < turn.token_s < 5
        assert 0 < turn.first_token_s < 5


def test_a_tool_is_called_and_its_answer_used(weather_session):
    call = _last(weather_session.say("What is the weather in Paris?"))
    assert call.metadata == "get_weather"
    assert "tool_call(city='Paris')" in call.text
    answer = _last(weather_session.say('{"temperature": 21, "condition": "sunny"}', role="observation"))
    assert "21" in answer.text
    assert "sunny" in answer.text


def test_clear_forgets(session):
    first = _last(session.say("你好"))
    session.clear()
    assert session.context_tokens == session.context_characters == 0
    assert _last(session.say("你好")).token_ids == first.token_ids


def test_a_turn_that_is_left_is_kept_as_far_as_it_came(session):
    turns = session.say("Tell me a long story.")
    seen = [next(turns) for _ in range(5)]
    turns.close()
    assert session.turns[-1].stop_reason == "interrupted"
    assert session.turns[-1].token_ids == seen[-1].token_ids
    _last(session.say("3 + 4 = ?"))
    torch.testing.assert_close(_logits_of_cached(session), _logits_of_whole(session), atol=1e-4, rtol=1e-4)


def test_a_turn_that_was_never_begun_changes_nothing(session):
    session.say("Hello")
    assert session.turns == []
    assert session.context_tokens == 0


def test_exact_length_on_request(session, monkeypatch):
    seen = []
    run = decoding._run_processors
    monkeypatch.setattr(decoding, "_run_processors", lambda *args: [seen.append(len(args[0])), run(*args)][1])
    turn = _last(session.say("你好", stops=False, max_new_tokens=90))
    assert (turn.generated_tokens, turn.stop_reason) == (90, "length")
    assert set(session.loaded.model.generation_config.eos_token_id) & set(turn.token_ids)
    assert seen == [0] * 90  # no processor: none that would take memory in every step


def test_restored_session_goes_on_as_if_never_stopped(embedded, session):
    for text in ("你好", "3 + 4 = ?"):
        _last(session.say(text))
    again = ChatSession(embedded, max_new_tokens=150)
    again.restore([(turn.user_text, turn.token_ids) for turn in session.turns])
    assert again.context_tokens == session.context_tokens
    assert again.context_characters == session.context_characters
    assert [turn.stop_reason for turn in again.turns] == ["restored", "restored"]
    assert _last(again.say("谢谢")).token_ids == _last(session.say("谢谢")).token_ids


class TestFullContext:
    @pytest.fixture
    def short(self, embedded, monkeypatch):
        monkeypatch.setattr(embedded.model.config, "max_position_embeddings", 64)
        return ChatSession(embedded)

    def test_the_answer_ends_at_the_limit(self, short):
        turn = _last(short.say("Tell me a long story."))
        assert (turn.stop_reason, turn.context_tokens) == ("context limit", 64)

    def test_the_next_message_is_refused_and_nothing_is_dropped(self, short):
        _last(short.say("Tell me a long story."))
        with pytest.raises(ContextFullError, match=r"limit is 64 tokens .* history holds 64 and this message adds \d+"):
            short.say("And then?")
        assert short.context_tokens == 64

    def test_restoring_too_much_is_refused(self, short):
        with pytest.raises(ContextFullError, match=r"the turns to restore have \d+ tokens"):
            short.restore([("Hello", [5] * 80)])


def test_bytes_that_never_become_a_character_do_not_end_the_stream(embedded):
    loaded = load_model("embedded", precision="fp32", device="cpu", weights="random")
    session = ChatSession(loaded, max_new_tokens=120, generation_config=GenerationConfig(do_sample=True))
    torch.manual_seed(0)
    turn = _last(session.say("Hello", stops=False))
    assert turn.generated_tokens == 120
    assert "\ufffd" in turn.text


def test_rules_of_the_roles_hold(session):
    with pytest.raises(PromptError, match="an observation answers a tool call"):
        session.say("25", role="observation")


def test_another_family_chats_over_its_own_template(embedded):
    """A template that rewrites earlier messages makes the cache shrink to what is still true, never go wrong."""
    session = ChatSession(_rewriting(embedded), max_new_tokens=8)
    for text in ("one", "two", "three"):
        _last(session.say(text))
    torch.testing.assert_close(_logits_of_cached(session), _logits_of_whole(session), atol=1e-4, rtol=1e-4)


class TestStaticCache:
    """A chat over a cache of fixed length says what it says over one that grows."""

    TOKENS = 700

    @pytest.fixture
    def both(self, embedded):
        return [ChatSession(embedded, max_new_tokens=150, static_tokens=tokens) for tokens in (None, self.TOKENS)]

    @staticmethod
    def _said(session):
        return [(turn.token_ids, turn.stop_reason, turn.prompt_tokens, turn.context_tokens) for turn in session.turns]

    def test_turns_and_an_interruption(self, both):
        for session in both:
            for text in ("你好", "3 + 4 = ?"):
                _last(session.say(text))
            turns = session.say("Tell me a long story.")
            for _ in range(5):
                next(turns)
            turns.close()
            _last(session.say("谢谢"))
        dynamic, static = both
        assert self._said(dynamic) == self._said(static)
        assert static.turns[2].stop_reason == "interrupted"
        assert [layer.keys.shape[2] for layer in static._cache.layers] == [self.TOKENS] * 4
        torch.testing.assert_close(_logits_of_cached(static), _logits_of_whole(static), atol=1e-4, rtol=1e-4)

    def test_clear_and_restore(self, both, embedded):
        for session in both:
            _last(session.say("Tell me a long story."))
            session.clear()
            assert session.context_tokens == 0
            session.restore([("你好", [5] * 40), ("Hello", [6] * 30)])
            _last(session.say("3 + 4 = ?"))
        dynamic, static = both
        assert self._said(dynamic) == self._said(static)
        assert static._cache.layers[0].keys.shape[2] == self.TOKENS

    def test_a_history_that_changes_is_cropped(self, embedded):
        sessions = [ChatSession(_rewriting(embedded), max_new_tokens=8, static_tokens=n) for n in (None, 200)]
        for session in sessions:
            for text in ("one", "two", "three"):
                _last(session.say(text))
        assert self._said(sessions[0]) == self._said(sessions[1])
        assert sessions[1].turns[1].prompt_tokens > 20  # fed anew
        static = sessions[1]
        torch.testing.assert_close(_logits_of_cached(static), _logits_of_whole(static), atol=1e-4, rtol=1e-4)

    def test_the_conversation_ends_where_the_cache_is_full(self, embedded):
        session = ChatSession(embedded, static_tokens=64)
        turn = _last(session.say("Tell me a long story."))
        assert (turn.stop_reason, turn.context_tokens, session.context_limit) == ("context limit", 64, 64)
        with pytest.raises(
            ContextFullError, match=r"the static cache's limit is 64 tokens \(static_tokens\), the history holds 64 and"
        ):
            session.say("And then?")
        with pytest.raises(ContextFullError, match=r"have \d+ tokens, but the static cache's limit is 64 tokens"):
            session.restore([("Hello", [5] * 70)])

    def test_a_length_that_cannot_be_is_refused(self, embedded):
        with pytest.raises(DecodeError, match="static_tokens=0: a static cache holds at least one token"):
            ChatSession(embedded, static_tokens=0)
        with pytest.raises(DecodeError, match=r"static_tokens=1000000000000: the model's limit is \d+ tokens"):
            ChatSession(embedded, static_tokens=10**12)
        with pytest.raises(DecodeError, match=r"static_tokens=1.5 is not a whole number of tokens. Give one"):
            ChatSession(embedded, static_tokens=1.5)
