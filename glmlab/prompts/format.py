"""The rules of ChatGLM3's chat format: messages of four roles, and the segments that a prompt is made of.

A ChatGLM3 prompt is a row of segments, each encoded alone:

    [gMASK] sop                              prefix
    <|system|>  "\\n"  "You are …"            role, metadata, text
    <|user|>    "\\n"  "Hello"
    <|assistant|>                            generation prompt

A role becomes one special id. Metadata (the name of the tool that an assistant message calls, else empty) and its
newline, and then the text, are ordinary pieces, whatever they contain: a role token typed by a user stays text.
"""

import json
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pandas as pd

from glmlab.core.errors import GlmlabError
from glmlab.models.chatglm3 import ChatGLMTokenizer

Message = Mapping[str, Any]
"""``{"role": …, "content": …}``, and where there are such, ``"metadata"`` (one line) and ``"tools"`` (a list)."""

SegmentKind = Literal["prefix", "role", "metadata", "text", "generation prompt"]

ROLES = ("system", "user", "assistant", "observation")
PREFIX_TOKENS = ("[gMASK]", "sop")


class PromptError(GlmlabError):
    """Messages break a rule of the chat format; the text names the message, the rule and the mend."""


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
        """Whether the text is one special token rather than ordinary text."""
        return self.kind in ("prefix", "role", "generation prompt")


def check_mappings(messages: Sequence[Message]) -> None:
    """Raise :class:`PromptError` where a message is no mapping, such as a text alone."""
    for index, message in enumerate(messages):
        if not isinstance(message, Mapping):
            raise PromptError(
                f"message {index} is {type(message).__name__} {str(message)[:40]!r}, not a mapping. Give a list of "
                "messages such as {'role': 'user', 'content': 'Hello'}."
            )


def check_messages(messages: Sequence[Message]) -> None:
    """Hold the messages against the rules of the four roles.

    system only as the first message; user never twice in a row; assistant only once a user has spoken; observation
    only right after an assistant; content a text; metadata one line.

    Raises:
        PromptError: names the first message that breaks a rule, the rule, and how to mend it.

    Example:
        >>> check_messages([{"role": "user", "content": "Hello"}, {"role": "user", "content": "Hello?"}])
        Traceback (most recent call last):
        ...
        glmlab.prompts.format.PromptError: message 1 (user): two user messages in a row. ...
    """
    if not messages:
        raise PromptError("no messages: a chat needs at least one, such as {'role': 'user', 'content': 'Hello'}.")
    check_mappings(messages)
    previous = None
    seen_user = False
    for index, message in enumerate(messages):
        role = message.get("role")
        where = f"message {index} ({role})"
        if role not in ROLES:
            raise PromptError(f"message {index}: role {role!r} is none of {', '.join(ROLES)}. Give it one of the four.")
        if role == "system" and index > 0:
            raise PromptError(f"{where}: a system message may only come first. Move it to the start of the chat.")
        if role == "user" and previous == "user":
            raise PromptError(
                f"{where}: two user messages in a row. Join them into one, or put the assistant's answer between them."
            )
        if role == "assistant" and not seen_user:
            raise PromptError(f"{where}: an assistant message needs a user message before it. Put the question first.")
        if role == "observation" and previous != "assistant":
            raise PromptError(
                f"{where}: an observation answers a tool call, so it must follow an assistant message. "
                "Put the assistant message with the call before it."
            )
        content = message.get("content")
        if content is not None and not isinstance(content, str):
            raise PromptError(f"{where}: content is {type(content).__name__}, not text. Pass a str.")
        metadata = message.get("metadata") or ""
        if not isinstance(metadata, str) or "\n" in metadata:
            raise PromptError(
                f"{where}: metadata must be one line of text, not {metadata!r}. Put the rest into content."
            )
        _check_characters(where, f"{content or ''}{metadata}")
        seen_user = seen_user or role == "user"
        previous = role


def _check_characters(where: str, text: str) -> None:
    """Refuse half of a character: a lone surrogate, as a cut JSON escape leaves it, has no bytes and so no tokens."""
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        raise PromptError(
            f"{where}: character {error.start} is half of a character (the lone surrogate "
            f"U+{ord(text[error.start]):04X}), which no tokenizer can spell. Take it out, or decode the text again "
            "where it was cut."
        ) from error


def role_transitions() -> pd.DataFrame:
    """Which role may follow which, found by asking :func:`check_messages`.

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
    return pd.DataFrame(
        {role: [_follows_the_rules([*roles, role]) for roles in before.values()] for role in ROLES}, index=list(before)
    )


def _follows_the_rules(roles: Iterable[str]) -> bool:
    try:
        check_messages([{"role": role, "content": ""} for role in roles])
    except PromptError:
        return False
    return True


def message_segments(message: Message, index: int | None = None) -> list[Segment]:
    """Role, metadata and text of one message; a system message's tools are appended to its text as JSON."""
    role = message["role"]
    text = message.get("content") or ""
    if role == "system" and message.get("tools") is not None:
        text = f"{text}\n{json.dumps(message['tools'], indent=4, ensure_ascii=False)}"
    return [
        Segment("role", f"<|{role}|>", role, index),
        Segment("metadata", f"{message.get('metadata') or ''}\n", role, index),
        Segment("text", text, role, index),
    ]


def chat_segments(
    messages: Sequence[Message], tools: Sequence[Any] | None = None, *, add_generation_prompt: bool = True
) -> list[Segment]:
    """The segments of a whole ChatGLM3 prompt, in order.

    Raises:
        PromptError: the messages break a rule, tools are given without a system message to list them in, or are
            nothing that JSON can hold.

    Example:
        >>> [(part.kind, part.text) for part in chat_segments([{"role": "user", "content": "Hello"}])][2:5]
        [('role', '<|user|>'), ('metadata', '\\n'), ('text', 'Hello')]
    """
    check_messages(messages)
    if tools is not None:
        if messages[0]["role"] != "system":
            raise PromptError(
                "tools are listed in the system message, but message 0 is not one. Begin the chat with a system "
                "message, such as 'Answer the following questions as best as you can. You have access to the "
                "following tools:'."
            )
        messages = [{"tools": tools, **messages[0]}, *messages[1:]]
    try:
        listed = json.dumps(messages[0].get("tools"), ensure_ascii=False)
    except (TypeError, ValueError) as error:
        raise PromptError(f"the tools cannot be written as JSON ({error}). Describe each in a dict.") from error
    _check_characters("tools", listed)
    segments = [Segment("prefix", token) for token in PREFIX_TOKENS]
    for index, message in enumerate(messages):
        segments += message_segments(message, index)
    if add_generation_prompt:
        segments.append(Segment("generation prompt", "<|assistant|>", "assistant"))
    return segments


def encode_segments(tokenizer: ChatGLMTokenizer, segments: Sequence[Segment]) -> list[list[int]]:
    """Token ids of each segment: one special id, or the ordinary pieces of its text (possibly none)."""
    texts = [segment.text for segment in segments if not segment.special]
    encoded = iter(
        tokenizer(texts, add_special_tokens=False, split_special_tokens=True, return_attention_mask=False)["input_ids"]
        if texts
        else []
    )
    return [
        [tokenizer.convert_tokens_to_ids(segment.text)] if segment.special else next(encoded) for segment in segments
    ]
