"""Prompts of other families, as their chat templates render them, taken apart into segments.

A template is a program: nothing in the rendered text says which characters are a message's own. So every text is
replaced by a mark, and what the template renders between the marks is its frame (role tokens, a system message of its
own, ends of messages).
"""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase

from glmlab.prompts.format import Message, PromptError, Segment, check_messages

Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether the answer is opened, -> the prompt as text, as a chat template makes it."""


def template_segments(
    render: Render, messages: Sequence[Message], *, add_generation_prompt: bool = True
) -> list[Segment]:
    """Take a rendered prompt apart: the messages' own texts, and what the template puts around them.

    Every text is replaced by a mark of its own; what the template renders between the marks is the frame.

    Raises:
        PromptError: the template refuses the messages, or changes their texts.
    """
    marks: dict[str, Segment] = {}
    marked = []
    for index, message in enumerate(messages):
        fields = dict(message)
        for name, kind in (("metadata", "metadata"), ("content", "text")):
            if message.get(name):
                mark = _mark(len(marks))
                marks[mark] = Segment(kind, message[name], message["role"], index)  # type: ignore[arg-type]
                fields[name] = mark
        marked.append(fields)
    closed, opened = _rendered(render, marked, False), _rendered(render, marked, add_generation_prompt)
    segments: list[Segment] = []
    last = -1  # the message whose text or metadata came last
    for part in _MARK.split(closed):
        if part in marks:
            segments.append(marks[part])
            last = marks[part].message or 0
        elif part:
            segments += _frame_segments(render, part, marked, segments, last)
    if opened.startswith(closed) and opened != closed:
        segments.append(Segment("generation prompt", opened[len(closed) :], "assistant"))
    if "".join(segment.text for segment in segments) != _rendered(render, messages, add_generation_prompt):
        raise PromptError(
            "this chat template changes the texts of the messages (it trims blanks, or rewrites earlier answers), so "
            "its tokens cannot be traced back to them. Trim the texts first, or look at the rendered prompt itself."
        )
    return segments


def _rendered(render: Render, messages: Sequence[Message], opened: bool) -> str:
    with template_errors():
        return render(messages, opened)


@contextmanager
def template_errors() -> Iterator[None]:
    """Turn what a template raises, or stumbles over, into a :class:`PromptError`."""
    try:
        yield
    except (TemplateError, TypeError) as error:
        raise PromptError(
            f"the chat template refuses these messages: {error}. Change them to what this model's format allows."
        ) from error


_MARK = re.compile(r"(\ue000\d+\ue001)")  # private use: no template writes such characters


def _mark(number: int) -> str:
    return f"\ue000{number}\ue001"


def _frame_segments(
    render: Render, part: str, marked: Sequence[Message], before: Sequence[Segment], last: int
) -> list[Segment]:
    """What a template writes between two texts: the end of one message, then the opening of the next."""
    if not before:
        role = marked[0]["role"]
        opening = _opening(render, role)
        prefix = part.removesuffix(opening) if opening else ""
        parts = [Segment("prefix", prefix), Segment("role", part[len(prefix) :], role, 0)]
    elif before[-1].kind == "metadata" and marked[last].get("content"):
        parts = [Segment("role", part, marked[last]["role"], last)]  # between the metadata and the text of one message
    else:
        closing = _closing(render, marked, last)
        ended = closing if part.startswith(closing) else ""
        following = min(last + 1, len(marked) - 1)
        parts = [
            Segment("role", ended, marked[last]["role"], last),
            Segment("role", part[len(ended) :], marked[following]["role"], following),
        ]
    return [segment for segment in parts if segment.text]


def _closing(render: Render, marked: Sequence[Message], last: int) -> str:
    """What ends a message, as it stands behind the first message of the same role when nothing follows."""
    role = marked[last]["role"]
    alike = (i for i, message in enumerate(marked) if message["role"] == role)
    first = next(i for i in alike if marked[i].get("content") or marked[i].get("metadata"))
    return _MARK.split(_rendered(render, marked[: first + 1], False))[-1]


def _opening(render: Render, role: str) -> str:
    """What opens a message of a role, or "" where the template does not tell.

    It is read before the second user message of a conversation, where no prefix stands, and is taken to differ from
    role to role by the role's name alone.
    """
    probe = [{"role": name, "content": _mark(i)} for i, name in enumerate(("user", "assistant", "user"))]
    try:
        parts = _MARK.split(_rendered(render, probe, False))  # frame, mark, frame, mark, frame, mark, frame
        closing = _closing(render, probe, 1)
    except PromptError:
        return ""  # refused: this template has rules of its own
    if len(parts) != 7:
        return ""  # it leaves out earlier messages, or repeats them
    return parts[4].removeprefix(closing).replace("user", role)


def tokenizer_segments(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    *,
    add_generation_prompt: bool,
) -> list[Segment]:
    """Segments of another family's prompt, from the template that its tokenizer carries.

    Raises:
        PromptError: as :func:`template_segments`, or the messages break a rule, or the tokenizer has no template.
    """
    check_messages(messages)
    check_chat_template(tokenizer)

    def render(messages: Sequence[Message], opened: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            add_generation_prompt=opened,
            tokenize=False,
        )
        return text

    return template_segments(render, messages, add_generation_prompt=add_generation_prompt)


def check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    """Raise :class:`PromptError` where a tokenizer has no chat template."""
    if tokenizer.chat_template is None:
        raise PromptError(
            f"{type(tokenizer).__name__} has no chat template: this is a base model, not a chat model. "
            "Use its chat variant (names end in -chat or -Instruct), or set tokenizer.chat_template."
        )
