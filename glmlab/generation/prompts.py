"""From messages to token ids, segment by segment, as ChatGLM3 was trained.

A ChatGLM3 prompt is a row of segments, each encoded alone:

    [gMASK] sop                              prefix
    <|system|>  "\\n"  "You are …"            role, metadata, text
    <|user|>    "\\n"  "Hello"
    <|assistant|>                            generation prompt

A role becomes one special id. Metadata (the name of the tool that an assistant message calls, else empty) and its
newline, and then the text, are ordinary pieces, whatever they contain: a role token typed by a user stays text.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

from transformers import PreTrainedTokenizerBase

from glmlab.errors import GlmlabError
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
        glmlab.generation.prompts.PromptError: message 1 (user): two user messages in a row. ...
    """
    if not messages:
        raise PromptError("no messages: a chat needs at least one, such as {'role': 'user', 'content': 'Hello'}.")
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
        seen_user = seen_user or role == "user"
        previous = role


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
        PromptError: the messages break a rule, or tools are given without a system message to list them in.
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


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a chat: segment by segment for ChatGLM3, by the tokenizer's own chat template for other models.

    Raises:
        PromptError: the messages break a rule of the format, or the tokenizer has no chat format.

    Example:
        >>> from glmlab import load_model
        >>> tokenizer = load_model("embedded").tokenizer
        >>> ids = encode_chat(tokenizer, [{"role": "user", "content": "你好"}])
        >>> tokenizer.convert_ids_to_tokens(ids)[:5]
        ['[gMASK]', 'sop', '<|user|>', '▁', '<0x0A>']
    """
    if isinstance(tokenizer, ChatGLMTokenizer):
        segments = chat_segments(messages, tools, add_generation_prompt=add_generation_prompt)
        return [token_id for ids in encode_segments(tokenizer, segments) for token_id in ids]
    if tokenizer.chat_template is None:
        raise PromptError(
            f"{type(tokenizer).__name__} has no chat template: this is a base model, not a chat model. "
            "Use its chat variant (names end in -chat or -Instruct), or set tokenizer.chat_template."
        )
    ids: list[int] = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=None if tools is None else list(tools),
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    return ids
