"""Tool calls: read out of an answer, never run as code, and answered by a Python function of the caller's.

ChatGLM3 calls a tool with an answer whose metadata line names it and whose text holds the call:

    <|assistant|>get_weather
     ```python
    tool_call(city='Paris')
    ```

The next message, of role observation, brings the result. The published code gives that text to ``eval``; here it is
parsed, and only literals are taken from it: a model's output is data, whoever has written it.
"""

import ast
import inspect
import json
import re
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from transformers import PreTrainedTokenizerBase

from glmlab.core.errors import GlmlabError
from glmlab.prompts.format import split_answer

_FENCE = re.compile(r"```[ \t]*(?:python)?[ \t]*\n(.*?)```", re.DOTALL)
_MOST_CHARACTERS = 100_000  # of a call; Python's parser can exhaust memory on absurd inputs


class ToolCallError(GlmlabError):
    """An answer that calls a tool is malformed, or the call does not fit the given tools."""


@dataclass(frozen=True)
class ToolCall:
    """The tool that an answer calls, and its arguments: plain literals."""

    name: str
    arguments: dict[str, Any]


def read_tool_call(tokenizer: PreTrainedTokenizerBase, token_ids: Sequence[int]) -> ToolCall | None:
    """The call in all generated ids of a ChatGLM3 answer, or None where its metadata line is empty.

    Raises:
        ToolCallError: as :func:`parse_tool_call`.

    Example:
        >>> from glmlab import load_model
        >>> tokenizer = load_model("embedded").tokenizer
        >>> answer = "get_weather\\n ```python\\ntool_call(city='Paris')\\n```"
        >>> read_tool_call(tokenizer, tokenizer(answer, add_special_tokens=False)["input_ids"])
        ToolCall(name='get_weather', arguments={'city': 'Paris'})
    """
    metadata, text = split_answer(tokenizer.decode(list(token_ids), skip_special_tokens=True))
    return parse_tool_call(metadata, text) if metadata else None


def parse_tool_call(metadata: str, text: str) -> ToolCall:
    """The call that an assistant message makes; nothing of it is executed.

    Args:
        metadata: the line that names the tool.
        text: the message: one code block with ``tool_call(name=literal, ...)``, words around it allowed.

    Raises:
        ToolCallError: no tool named, or no such code block; says what is wrong with the answer.

    Example:
        >>> parse_tool_call("add", "```python\\ntool_call(numbers=[1, -2])\\n```").arguments
        {'numbers': [1, -2]}
        >>> parse_tool_call("add", "```python\\ntool_call(number=open('secret'))\\n```")
        Traceback (most recent call last):
        ...
        glmlab.prompts.tools.ToolCallError: malformed call of 'add': argument 'number' is no literal ...
    """
    name = metadata.strip()
    if not name:
        raise ToolCallError(
            "the answer calls no tool: its metadata line is empty. Show its text to the user instead of calling a tool."
        )
    blocks = _FENCE.findall(text)
    code = blocks[0].strip() if len(blocks) == 1 else text
    try:
        if len(blocks) != 1:
            raise ValueError(f"it has {len(blocks)} code blocks (closed by ```), not one")
        return ToolCall(name, _literal_arguments(code))
    except ValueError as fault:
        shown = code if len(code) <= 80 else f"{code[:80]}…"
        raise ToolCallError(
            f"malformed call of {name!r}: {fault}: {shown!r}. Nothing was run. Ask again, or tell the model in an "
            "observation what is wrong."
        ) from fault


def _literal_arguments(code: str) -> dict[str, Any]:
    """Arguments of ``tool_call(name=literal, ...)``; ValueError says what else the code is."""
    if len(code) > _MOST_CHARACTERS:
        raise ValueError(f"it is {len(code):,} characters long")
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of the parser, on the model's style
            call = ast.parse(code, mode="eval").body
    except (SyntaxError, ValueError, RecursionError, MemoryError) as error:
        why = str(error.msg if isinstance(error, SyntaxError) else error).partition("\n")[0]
        raise ValueError(f"it is no Python expression ({why})") from error
    if not (isinstance(call, ast.Call) and isinstance(call.func, ast.Name) and call.func.id == "tool_call"):
        raise ValueError("it is not tool_call(...)")
    arguments: dict[str, Any] = {}
    for keyword in [*(ast.keyword(None, value) for value in call.args), *call.keywords]:
        if keyword.arg is None:
            raise ValueError("an argument has no name")
        if keyword.arg in arguments:
            raise ValueError(f"argument {keyword.arg!r} is given twice")
        try:
            arguments[keyword.arg] = ast.literal_eval(keyword.value)
        except (ValueError, TypeError, SyntaxError, RecursionError, MemoryError) as error:
            raise ValueError(
                f"argument {keyword.arg!r} is no literal (text, number, list, dict, True, False, None)"
            ) from error
    return arguments


def answer_tool_call(call: ToolCall, functions: Mapping[str, Callable[..., Any]]) -> str:
    """Call the Python function of a tool's name and return its result as the text of an observation (JSON).

    Args:
        call: from :func:`read_tool_call` or :func:`parse_tool_call`.
        functions: by tool name; only these can be called.

    Raises:
        ToolCallError: no function of that name, arguments that do not fit its signature, or a result that JSON cannot
            hold. What the function itself raises is left as it is.

    Example:
        >>> answer_tool_call(ToolCall("get_weather", {"city": "Paris"}), {"get_weather": lambda city: {"city": city}})
        '{"city": "Paris"}'
    """
    if call.name not in functions:
        known = ", ".join(sorted(functions)) or "none"
        raise ToolCallError(f"the model calls {call.name!r}, but the tools given are: {known}. List it, or ask again.")
    function = functions[call.name]
    try:
        bound = inspect.signature(function).bind(**call.arguments)
    except (TypeError, ValueError) as error:  # ValueError: a function of C without a signature
        raise ToolCallError(
            f"the call of {call.name!r} does not fit its function ({error}): arguments {call.arguments!r}. "
            "Describe the parameters in the tool list as the function has them."
        ) from error
    result = function(*bound.args, **bound.kwargs)
    try:
        return json.dumps(result, ensure_ascii=False, allow_nan=False)
    except (TypeError, ValueError) as error:
        raise ToolCallError(
            f"the result of {call.name!r} cannot be written as JSON ({error}). Return text, numbers, lists or dicts."
        ) from error
