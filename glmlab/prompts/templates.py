"""Chat formats of several families side by side, and prompts of chat templates taken apart into segments.

A template is a program: nothing in the rendered text says which characters are a message's own. So every text is
replaced by a mark, and what the template renders between the marks is its frame (role tokens, a system message of its
own, ends of messages).
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import pandas as pd
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from glmlab.core.resources import data_path
from glmlab.prompts.format import (
    Message,
    PromptError,
    Segment,
    SegmentKind,
    chat_segments,
    check_mappings,
    check_messages,
)

Render = Callable[[Sequence[Message], bool], str]
"""Messages, and whether the answer is opened, -> the prompt as text, as a chat template makes it."""

_MARK = re.compile(r"\ue000\d+\ue001")  # private use: no template writes such characters


def render_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
) -> str:
    """The prompt that the tokenizer's own chat template renders.

    Raises:
        PromptError: the tokenizer has no chat template, or the template refuses the messages.
    """
    if tokenizer.chat_template is None:
        raise PromptError(
            f"{type(tokenizer).__name__} has no chat template: this is a base model, not a chat model. "
            "Use its chat variant (names end in -chat or -Instruct), or set tokenizer.chat_template."
        )
    check_mappings(messages)

    def render(messages: Sequence[Message], opened: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            add_generation_prompt=opened,
            tokenize=False,
        )
        return text

    return _rendered(render, messages, add_generation_prompt)


def _rendered(render: Render, messages: Sequence[Message], opened: bool) -> str:
    try:
        return render(messages, opened)
    except (TemplateError, TypeError) as error:
        raise PromptError(
            f"the chat template refuses these messages: {error}. Change them to what this model's format allows."
        ) from error


def template_segments(render: Render, messages: Sequence[Message]) -> list[Segment]:
    """Take a rendered prompt apart: the messages' own texts, and what the template puts around them.

    The frame belongs to the message that it opens or closes; what stands before the first message is the prefix.

    Raises:
        PromptError: the template refuses the messages, or changes their texts.
    """
    marks: dict[str, Segment] = {}
    marked = []
    fields: tuple[tuple[str, SegmentKind], ...] = (("metadata", "metadata"), ("content", "text"))
    for index, message in enumerate(messages):
        replaced = dict(message)
        for name, kind in fields:
            if message.get(name):
                replaced[name] = f"\ue000{len(marks)}\ue001"
                marks[replaced[name]] = Segment(kind, message[name], message["role"], index)
        marked.append(replaced)
    closed, opened = _rendered(render, marked, False), _rendered(render, marked, True)
    ends = _message_ends(render, marked, closed)
    cuts = {0, len(closed), *ends}.union(*(mark.span() for mark in _MARK.finditer(closed)))
    segments: list[Segment] = []
    for start, stop in pairwise(sorted(cuts)):
        part = closed[start:stop]
        if part in marks:
            segments.append(marks[part])
            continue
        index = min(bisect_right(ends, start), len(messages) - 1)
        role = messages[index]["role"]
        if start == 0 and (opening := _opening(render, role)) and opening in part:
            segments.append(Segment("prefix", part[: part.rindex(opening)]))
            part = part[part.rindex(opening) :]
        segments.append(Segment("role", part, role, index))
    segments.append(Segment("generation prompt", opened.removeprefix(closed), "assistant"))
    segments = [segment for segment in segments if segment.text]
    if "".join(segment.text for segment in segments) != _rendered(render, messages, True):
        raise PromptError(
            "this chat template changes the texts of the messages (it trims blanks, or rewrites earlier answers), so "
            "its tokens cannot be traced back to them. Trim the texts first, or look at the rendered prompt itself."
        )
    return segments


def _message_ends(render: Render, marked: Sequence[Message], closed: str) -> list[int]:
    """Where each message ends in the rendered chat: as long as the chat up to it is when it is rendered alone.

    Where a template renders a shorter chat otherwise, or refuses it, a message ends with its text.
    """
    ends: list[int] = []
    for index, message in enumerate(marked):
        text = str(message.get("content") or message.get("metadata") or "")
        end = closed.rfind(text) + len(text) if text and text in closed else 0
        try:
            alone = _rendered(render, marked[: index + 1], False)
        except PromptError:
            alone = ""
        if alone and closed.startswith(alone):
            end = len(alone)
        ends.append(max(end, *ends[-1:], 0))
    return ends


def _opening(render: Render, role: str) -> str:
    """What opens a message of a role, or "" where the template does not show it.

    It is read before the second user message of a chat, where no prefix stands, and is taken to differ from role to
    role by the role's name alone.
    """
    probe = [{"role": name, "content": f"\ue000{i}\ue001"} for i, name in enumerate(("user", "assistant", "user"))]
    try:
        before, whole = _rendered(render, probe[:2], False), _rendered(render, probe, False)
    except PromptError:
        return ""  # refused: this template has rules of its own
    if not whole.startswith(before) or before == whole:
        return ""  # it leaves out earlier messages, or repeats them
    return _MARK.split(whole[len(before) :])[0].replace("user", role)


# ------------------------------------------------------------------------------------------- families side by side


@dataclass(frozen=True)
class ChatFormat:
    """How a family of models writes a conversation down."""

    source: str  # where the format was published
    file: str = ""  # of data/templates; ChatGLM3 has none: its prompts are built segment by segment

    @property
    def template(self) -> str:
        """The chat template, in Jinja."""
        return data_path("templates", self.file).read_text(encoding="utf-8").removesuffix("\n")

    def segments(self, messages: Sequence[Message]) -> list[Segment]:
        """The conversation in this format, part by part; PromptError where it breaks a rule of the four roles."""
        if not self.file:
            return chat_segments(messages)
        check_messages(messages)
        return template_segments(self._render, messages)

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation in this format as one text, special tokens spelled out."""
        return "".join(segment.text for segment in self.segments(messages))

    def _render(self, messages: Sequence[Message], opened: bool) -> str:
        plain = [{**message, "content": message.get("content") or ""} for message in messages]
        (rendered,), _ = render_jinja_template(
            [plain], chat_template=self.template, add_generation_prompt=opened, return_assistant_tokens_mask=False
        )
        return str(rendered)


FORMATS = {
    "ChatGLM3": ChatFormat("https://github.com/THUDM/ChatGLM3/blob/main/PROMPT.md"),
    "Qwen2.5": ChatFormat(
        "https://huggingface.co/Qwen/Qwen2.5-7B-Instruct/blob/main/tokenizer_config.json", "qwen2.5.jinja"
    ),
    "GLM-4": ChatFormat("https://huggingface.co/THUDM/glm-4-9b-chat/blob/main/tokenizer_config.json", "glm-4.jinja"),
}
"""Published formats by name."""


def chat_format(name: str) -> ChatFormat:
    """A format of :data:`FORMATS`; PromptError for another name.

    Example:
        >>> print(chat_format("GLM-4").text([{"role": "user", "content": "你是谁"}]))
        [gMASK]<sop><|user|>
        你是谁<|assistant|>
    """
    if name not in FORMATS:
        raise PromptError(f"no chat format {name!r}. There are {', '.join(FORMATS)}.")
    return FORMATS[name]


def segment_table(segments: Mapping[str, Sequence[Segment]]) -> pd.DataFrame:
    """Parts of prompts as a table, one row each: format, kind, role (empty for the prefix), message, text.

    Example:
        >>> segments = chat_format("GLM-4").segments([{"role": "user", "content": "你是谁"}])
        >>> segment_table({"GLM-4": segments})["kind"].tolist()
        ['prefix', 'role', 'text', 'generation prompt']
    """
    rows = [
        (name, segment.kind, segment.role or "", segment.message, segment.text)
        for name, parts in segments.items()
        for segment in parts
    ]
    return pd.DataFrame(rows, columns=["format", "kind", "role", "message", "text"]).astype({"message": "Int64"})
