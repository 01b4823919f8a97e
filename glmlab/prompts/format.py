"""ChatGLM3's chat format: messages of four roles, and the segments that a prompt is made of; imports no torch.

A ChatGLM3 prompt is a row of segments, each encoded alone:

    [gMASK] sop                              prefix
    <|system|>  "\\n"  "You are …"            role, metadata, text
    <|user|>    "\\n"  "Hello"
    <|assistant|>                            generation prompt

A role becomes one special id. Metadata (the name of the tool that an assistant message calls, else empty) with its
newline, and the text, become ordinary pieces, whatever they contain: a role token typed by a user stays text.
"""

import json
import unicodedata
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import pandas as pd

from glmlab.core.errors import GlmlabError

if TYPE_CHECKING:
    from glmlab.models.chatglm3 import ChatGLMTokenizer

Message = Mapping[str, Any]
"""``{"role": …, "content": …}``, optionally with ``"metadata"`` (one line) and ``"tools"`` (a list)."""

SegmentKind = Literal["prefix", "role", "metadata", "text", "generation prompt"]

ROLES = ("system", "user", "assistant", "observation")

ROLE_COLORS = {
    "system": "#cc79a7",
    "user": "#0072b2",
    "assistant": "#009e73",
    "observation": "#e69f00",
    "": "#8c8c8c",  # the prefix belongs to no message
}
"""Colour of every role, the same in tables and figures (Okabe and Ito's palette)."""

_SIGNS = {" ": "␣", "\n": "↵", "\t": "⇥", "\r": "␍"}
_UNSEEN = {"Cc", "Cf", "Cn", "Co", "Cs", "Zl", "Zp", "Zs"}  # control, format, unassigned, private, surrogate, blanks


class PromptError(GlmlabError):
    """The messages break a rule of the chat format: says which message breaks which rule, and how to fix it."""


@dataclass(frozen=True)
class Segment:
    """A part of a prompt that is encoded alone: one special token, or a text of ordinary pieces."""

    kind: SegmentKind
    text: str
    role: str | None = None
    message: int | None = None
    """Index of the message it belongs to; None for the prefix and the generation prompt."""

    @property
    def special(self) -> bool:
        """Whether a ChatGLM3 segment is one special token."""
        return self.kind in ("prefix", "role", "generation prompt")


def visible(text: str) -> str:
    """Text with its white space as signs, and every character that shows nothing as its code point.

    Example:
        >>> visible("two  blanks\\n"), visible("a\\u202eb"), visible("\\u0301")
        ('two␣␣blanks↵', 'aU+202Eb', '◌́')
    """
    shown = "".join(
        _SIGNS.get(character)
        or (f"U+{ord(character):04X}" if unicodedata.category(character) in _UNSEEN else character)
        for character in text
    )
    return f"◌{shown}" if text and unicodedata.category(text[0]).startswith("M") else shown


def check_mappings(messages: Sequence[Message]) -> None:
    """Raise :class:`PromptError` where a message is not a mapping, such as a text alone."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(
                f"message {index} is {type(message).__name__} {str(message)[:40]!r}, not a mapping. Give a list of "
                "messages such as {'role': 'user', 'content': 'Hello'}."
            )


def check_messages(messages: Sequence[Message]) -> None:
    """Check the messages against the rules of the four roles.

    system only as the first message; user never twice in a row; assistant only after a user has spoken; observation
    only right after an assistant; content is text; metadata is one line.

    Raises:
        PromptError: says which message breaks which rule, and how to fix it.

    Example:
        >>> check_messages([{"role": "user", "content": "Hello"}, {"role": "user", "content": "Hello?"}])
        Traceback (most recent call last):
        ...
        glmlab.prompts.format.PromptError: message 1 (user): two user messages in a row. ...
    """
    if not messages:
        raise PromptError("no messages: a chat needs at least one, such as {'role': 'user', 'content': 'Hello'}.")
    check_mappings(messages)
    roles = [message.get("role") for message in messages]
    for index, (role, message) in enumerate(zip(roles, messages, strict=True)):
        where = f"message {index} ({role})"
        if role not in ROLES:
            raise PromptError(f"message {index}: role {role!r} is none of {', '.join(ROLES)}. Give it one of the four.")
        if broken := _broken_rule(role, roles[:index]):
            raise PromptError(f"{where}: {broken}")
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise PromptError(f"{where}: content is {type(content).__name__}, not text. Pass a str.")
        metadata = message.get("metadata") or ""
        if not isinstance(metadata, str) or "\n" in metadata:
            raise PromptError(
                f"{where}: metadata must be one line of text, not {metadata!r}. Put the rest into content."
            )
        _check_characters(where, f"{content or ''}{metadata}")


def _broken_rule(role: str, before: Sequence[Any]) -> str | None:
    """The rule that a message of this role breaks after messages of the roles ``before``, and how to fix it."""
    previous = before[-1] if before else None
    if role == "system" and before:
        return "a system message may only come first. Move it to the start of the chat."
    if role == "user" and previous == "user":
        return "two user messages in a row. Join them into one, or put the assistant's answer between them."
    if role == "assistant" and "user" not in before:
        return "an assistant message needs a user message before it. Put the question first."
    if role == "observation" and previous != "assistant":
        return (
            "an observation answers a tool call, so it must follow an assistant message. "
            "Put the assistant message with the call before it."
        )
    return None


def _check_characters(where: str, text: str) -> None:
    """Refuse a lone surrogate, as a cut JSON escape leaves it: half of a character has no bytes, so no tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: character {error.start} is half of a character (the lone surrogate "
            f"U+{ord(text[error.start]):04X}), which no tokenizer can spell. Take it out, or decode the text again "
            "where it was cut."
        ) from error


def role_transitions() -> pd.DataFrame:
    """Which role may follow which, by the rules of :func:`check_messages`.

    Returns:
        Rows: what came last, "start" or one of the four roles (before an assistant or an observation, a user has
        spoken). Columns: the four roles. Values: allowed or not.

    Example:
        >>> role_transitions().loc["user"].to_dict()
        {'system': False, 'user': False, 'assistant': True, 'observation': False}
    """
    before = {
        "start": [],
        "system": ["system"],
        "user": ["user"],
        "assistant": ["user", "assistant"],
        "observation": ["user", "assistant", "observation"],
    }
    rows = {last: [_broken_rule(role, roles) is None for role in ROLES] for last, roles in before.items()}
    return pd.DataFrame.from_dict(rows, orient="index", columns=list(ROLES))


def chat_segments(
    messages: Sequence[Message], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = True
) -> list[Segment]:
    """The segments of a whole ChatGLM3 prompt, in order: two of the prefix, three a message, the generation prompt.

    Tools are listed as JSON behind the text of the system message.

    Raises:
        PromptError: the messages break a rule, or the tools have no system message, or cannot be written as JSON.

    Example:
        >>> [(part.kind, part.text) for part in chat_segments([{"role": "user", "content": "Hello"}])][2:5]
        [('role', '<|user|>'), ('metadata', '\\n'), ('text', 'Hello')]
    """
    check_messages(messages)
    if tools is not None and messages[0]["role"] != "system":
        raise PromptError(
            "tools are listed in the system message, but message 0 is not one. Begin the chat with a system "
            "message, such as 'Answer the following questions as best as you can. You have access to the "
            "following tools:'."
        )
    tools = messages[0].get("tools", tools)
    try:
        listed = json.dumps(tools, indent=4, ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise PromptError(f"the tools cannot be written as JSON ({error}). Describe each in a dict.") from error
    _check_characters("tools", listed)
    segments = [Segment("prefix", "[gMASK]"), Segment("prefix", "sop")]
    for index, message in enumerate(messages):
        role, text = message["role"], message.get("content") or ""
        segments += [
            Segment("role", f"<|{role}|>", role, index),
            Segment("metadata", f"{message.get('metadata') or ''}\n", role, index),
            Segment("text", f"{text}\n{listed}" if role == "system" and tools is not None else text, role, index),
        ]
    if add_generation_prompt:
        segments.append(Segment("generation prompt", "<|assistant|>", "assistant"))
    return segments


def encode_segments(tokenizer: "ChatGLMTokenizer", segments: Sequence[Segment]) -> list[list[int]]:
    """Token ids of each segment: one special id, or the ordinary pieces of its text (possibly none)."""
    texts = [segment.text for segment in segments if not segment.special]
    pieces = iter(tokenizer(texts, add_special_tokens=False, split_special_tokens=True)["input_ids"] if texts else [])
    return [
        [tokenizer.convert_tokens_to_ids(segment.text)] if segment.special else next(pieces) for segment in segments
    ]


def split_answer(answer: str) -> tuple[str, str]:
    """Metadata line (the name of the tool that is called, else empty) and text of a whole ChatGLM3 answer.

    Without a line break there is no metadata line: the answer is all text.

    Example:
        >>> split_answer("get_weather\\n tool_call()"), split_answer("\\n Hello"), split_answer("Hello")
        (('get_weather', 'tool_call()'), ('', 'Hello'), ('', 'Hello'))
    """
    metadata, newline, text = answer.partition("\n")
    return (metadata.strip(), text.removeprefix(" ")) if newline else ("", answer)
