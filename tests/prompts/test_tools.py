"""Tool calls are read as data: nothing that a model writes is run."""

import contextlib
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from glmlab.prompts.tools import ToolCall, ToolCallError, answer_tool_call, parse_tool_call, read_tool_call

LITERALS = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**12), 10**12)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(), inner, max_size=3),
    max_leaves=8,
)


def _block(code):
    return f"```python\n{code}\n```"


class TestParsing:
    @given(value=LITERALS)
    def test_literals_come_back(self, value):
        text = f"tool_call(value={value!r})"
        if "```" in text:
            return
        assert parse_tool_call("tool", _block(text)) == ToolCall("tool", {"value": value})

    @pytest.mark.parametrize(
        ("text", "arguments"),
        [
            (f" I ask the tool.\n{_block('tool_call(a=1, b=-2.5)')}\nWait.", {"a": 1, "b": -2.5}),
            (_block(r"tool_call(a='\d')"), {"a": r"\d"}),  # an odd escape, of which Python warns
            ("```\ntool_call()\n```", {}),
        ],
    )
    def test_calls(self, text, arguments):
        assert parse_tool_call(" tool ", text) == ToolCall("tool", arguments)

    @pytest.mark.parametrize(
        ("metadata", "text", "fault"),
        [
            ("", _block("tool_call()"), "calls no tool: its metadata line is empty"),
            ("t", "tool_call()", "it has 0 code blocks"),
            ("t", "```python\ntool_call()", "it has 0 code blocks"),
            ("t", _block("tool_call()") + _block("tool_call()"), "it has 2 code blocks"),
            ("t", _block("tool_call(city='Par"), "it is no Python expression"),
            ("t", _block("tool_call(a=1)\ntool_call(a=2)"), "it is no Python expression"),
            ("t", _block("import os"), "it is no Python expression"),
            ("t", _block("tool_call(a=1, a=2)"), "argument 'a' is given twice"),
            ("t", _block("print(a=1)"), r"it is not tool_call\(...\)"),
            ("t", _block("x.tool_call(a=1)"), r"it is not tool_call\(...\)"),
            ("t", _block("'Paris'"), r"it is not tool_call\(...\)"),
            ("t", _block("tool_call('Paris')"), "an argument has no name"),
            ("t", _block("tool_call(**{'a': 1})"), "an argument has no name"),
            ("t", _block("tool_call(a=city)"), "argument 'a' is no literal"),
            ("t", _block("tool_call(a=f'{1}')"), "argument 'a' is no literal"),
            ("t", _block("tool_call(a=2**9)"), "argument 'a' is no literal"),
            ("t", _block("tool_call(a={[]: 1})"), "argument 'a' is no literal"),
            ("t", _block("tool_call(a=" + "[" * 400 + "]" * 400 + ")"), "it is no Python expression"),
            ("t", _block("tool_call(a='" + "x" * 100_001 + "')"), "it is 100,016 characters long"),
            ("t", _block("tool_call(a='\x00')"), "it is no Python expression"),
        ],
    )
    def test_malformed_calls_are_reported(self, metadata, text, fault):
        with pytest.raises(ToolCallError, match=fault):
            parse_tool_call(metadata, text)

    @pytest.mark.parametrize(
        "code",
        [
            "tool_call(a=__import__('sys').exit(3))",
            "tool_call(a=[sys.modules.clear() for _ in '1'])",
            "tool_call(a=(lambda: 1)())",
            "(tool_call := print)(a=1)",
            "__import__('sys').modules.__setitem__('tool_was_run', 1) or tool_call()",
        ],
    )
    def test_nothing_is_run(self, code):
        with pytest.raises(ToolCallError, match="Nothing was run"):
            parse_tool_call("t", _block(code))
        assert "tool_was_run" not in sys.modules

    @given(text=st.text())
    def test_any_text_is_a_call_or_an_error_of_ours(self, text):
        for candidate in (text, _block(text), _block(f"tool_call(a={text})")):
            with contextlib.suppress(ToolCallError):
                assert isinstance(parse_tool_call("t", candidate), ToolCall)


class TestAnswering:
    def test_the_result_is_json(self):
        answer = answer_tool_call(ToolCall("f", {"city": "巴黎"}), {"f": lambda city: {"city": city}})
        assert answer == '{"city": "巴黎"}'

    @pytest.mark.parametrize(
        ("call", "message"),
        [
            (ToolCall("g", {}), "calls 'g', but the tools given are: f"),
            (ToolCall("f", {"town": "Paris"}), "does not fit its function .*missing a required argument: 'city'"),
            (ToolCall("f", {"city": 1, "x": 2}), "does not fit its function .*unexpected keyword argument 'x'"),
            (ToolCall("f", {"city": float("nan")}), "the result of 'f' cannot be written as JSON"),
            (ToolCall("f", {"city": {1}}), "the result of 'f' cannot be written as JSON"),
        ],
    )
    def test_calls_that_do_not_fit_are_reported(self, call, message):
        with pytest.raises(ToolCallError, match=message):
            answer_tool_call(call, {"f": lambda city: city})

    def test_a_function_without_a_signature_is_reported(self):
        with pytest.raises(ToolCallError, match="no signature found for builtin"):
            answer_tool_call(ToolCall("max", {"a": 1}), {"max": max})

    def test_errors_of_the_tool_itself_are_left_as_they_are(self):
        with pytest.raises(ZeroDivisionError):
            answer_tool_call(ToolCall("f", {}), {"f": lambda: 1 / 0})


class TestRoundTrip:
    def test_the_model_calls_and_uses_the_answer(self, embedded, weather_session):
        asked = []

        def get_weather(city: str) -> dict:
            asked.append(city)
            return {"temperature": 21, "condition": "sunny"}

        *_, turn = weather_session.say("What is the weather in Paris?")
        assert turn.metadata == "get_weather"
        assert "tool_call(city='Paris')" in turn.text
        call = read_tool_call(embedded.tokenizer, turn.token_ids)
        assert call == ToolCall("get_weather", {"city": "Paris"})
        *_, turn = weather_session.say(answer_tool_call(call, {"get_weather": get_weather}), role="observation")
        assert asked == ["Paris"]
        assert "21" in turn.text
        assert "sunny" in turn.text
        assert read_tool_call(embedded.tokenizer, turn.token_ids) is None

    def test_a_cut_call_is_malformed(self, embedded, weather_session):
        *_, whole = weather_session.say("What is the weather in Paris?")
        with pytest.raises(ToolCallError, match="malformed call of 'get_weather': it has 0 code blocks"):
            read_tool_call(embedded.tokenizer, whole.token_ids[:-4])

    @pytest.mark.parametrize("answer", ["", "\n Hello", "Hello", "no newline: ```python\\ntool_call()"])
    def test_an_answer_without_a_metadata_line_is_no_call(self, embedded, answer):
        ids = embedded.tokenizer(answer, add_special_tokens=False)["input_ids"]
        assert read_tool_call(embedded.tokenizer, ids) is None
