"""The same conversation in several families' chat formats, side by side.

Characters and special tokens follow from a format's template alone. Token counts need the family's tokenizer; without
it they are left out, never estimated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import pandas as pd
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from glmlab.core.resources import data_path
from glmlab.prompts.format import Message, PromptError, Segment, SegmentKind, chat_segments, check_messages
from glmlab.prompts.table import dissect
from glmlab.prompts.templates import template_segments

FORMATS = ("ChatGLM3", "Qwen2.5", "GLM-4")

_ONE_TURN: tuple[Message, ...] = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})
_KINDS = get_args(SegmentKind)


@dataclass(frozen=True)
class ChatFormat:
    """How a family of models writes a conversation down."""

    name: str
    template: str | None
    """Jinja, as in data/templates; None for ChatGLM3, whose prompts are built segment by segment."""
    special_tokens: tuple[str, ...]
    source: str
    """Where the format was published."""

    def segments(self, messages: Sequence[Message], *, add_generation_prompt: bool = True) -> list[Segment]:
        """The conversation in this format, part by part.

        Raises:
            PromptError: the messages break a rule of the four roles.
        """
        if self.template is None:
            return chat_segments(messages, add_generation_prompt=add_generation_prompt)
        check_messages(messages)
        return template_segments(self._render, messages, add_generation_prompt=add_generation_prompt)

    def text(self, messages: Sequence[Message]) -> str:
        """The conversation in this format as one text, special tokens spelled out."""
        return "".join(segment.text for segment in self.segments(messages))

    def _render(self, messages: Sequence[Message], opened: bool) -> str:
        plain = [{**message, "content": message.get("content") or ""} for message in messages]
        (rendered,), _ = render_jinja_template(
            [plain], chat_template=self.template, add_generation_prompt=opened, return_assistant_tokens_mask=False
        )
        return str(rendered)


def chat_format(name: str) -> ChatFormat:
    """A published format: "ChatGLM3", "Qwen2.5" or "GLM-4".

    Raises:
        PromptError: another name.

    Example:
        >>> print(chat_format("GLM-4").text([{"role": "user", "content": "你是谁"}]))
        [gMASK]<sop><|user|>
        你是谁<|assistant|>
    """
    if name not in FORMATS:
        raise PromptError(f"no chat format {name!r}. There are {', '.join(FORMATS)}.")
    entry = json.loads(data_path("templates", "formats.json").read_text(encoding="utf-8"))[name]
    file = entry.get("template")
    template = file and data_path("templates", file).read_text(encoding="utf-8").removesuffix("\n")
    return ChatFormat(name, template, tuple(entry["special_tokens"]), entry["source"])


def compare_formats(
    messages: Sequence[Message], tokenizers: Mapping[str, PreTrainedTokenizerBase] | None = None
) -> pd.DataFrame:
    """What a conversation becomes in each format.

    Args:
        messages: the conversation.
        tokenizers: by format name, those that are on the machine; the token counts of the others are left out.

    Returns:
        One row a format: ``text_characters`` (the messages' own), ``frame_characters`` (all that the format adds),
        ``special_tokens`` among the latter; what a turn of one user message and one answer adds beside its texts:
        ``special_tokens_per_turn``, ``frame_characters_per_turn``, ``frame_tokens_per_turn``; and by kind
        ``prefix_tokens``, ``role_tokens``, ``metadata_tokens``, ``text_tokens``, ``generation_prompt_tokens``, and all
        ``tokens``. A count is missing (<NA>) where the format's tokenizer was not given.

    Raises:
        PromptError: the messages break a rule, or a tokenizer is for a format that is not compared.

    Example:
        >>> table = compare_formats([{"role": "user", "content": "你好"}])
        >>> table["special_tokens_per_turn"].to_dict()
        {'ChatGLM3': 2, 'Qwen2.5': 4, 'GLM-4': 2}
    """
    tokenizers = tokenizers or {}
    for name in tokenizers:
        chat_format(name)
    rows = {
        name: {**_characters(chat_format(name), messages), **_tokens(tokenizers.get(name), messages)}
        for name in FORMATS
    }
    return pd.DataFrame.from_dict(rows, orient="index").astype("Int64").rename_axis("format")


def _characters(chat: ChatFormat, messages: Sequence[Message]) -> dict[str, int]:
    segments = chat.segments(messages)
    one, two = (_frame(chat, chat.segments(_ONE_TURN * turns, add_generation_prompt=False)) for turns in (1, 2))
    characters, special = _frame(chat, segments)
    return {
        "text_characters": sum(len(segment.text) for segment in segments if segment.kind == "text"),
        "frame_characters": characters,
        "special_tokens": special,
        "special_tokens_per_turn": two[1] - one[1],
        "frame_characters_per_turn": two[0] - one[0],
    }


def _frame(chat: ChatFormat, segments: Sequence[Segment]) -> tuple[int, int]:
    """Characters that the format adds to the texts, and special tokens among them."""
    characters = sum(len(segment.text) for segment in segments if segment.kind != "text")
    written = [segment.text for segment in segments if segment.kind not in ("metadata", "text")]
    return characters, sum(text.count(token) for text in written for token in chat.special_tokens)


def _tokens(tokenizer: PreTrainedTokenizerBase | None, messages: Sequence[Message]) -> dict[str, int | None]:
    columns = [f"{kind.replace(' ', '_')}_tokens" for kind in _KINDS]
    if tokenizer is None:
        return dict.fromkeys(["frame_tokens_per_turn", *columns, "tokens"])
    one, two = (
        int((dissect(tokenizer, _ONE_TURN * turns, add_generation_prompt=False)["kind"] != "text").sum())
        for turns in (1, 2)
    )
    kinds = dissect(tokenizer, messages)["kind"]
    counts = {column: int((kinds == kind).sum()) for column, kind in zip(columns, _KINDS, strict=True)}
    return {"frame_tokens_per_turn": two - one, **counts, "tokens": len(kinds)}


def characters_per_token(tokenizers: Mapping[str, PreTrainedTokenizerBase], texts: Mapping[str, str]) -> pd.DataFrame:
    """How many characters a token holds on average, by kind of text (rows) and tokenizer (columns).

    Raises:
        PromptError: an empty text has no tokens.

    Example:
        >>> from glmlab import load_model
        >>> table = characters_per_token({"embedded": load_model("embedded").tokenizer}, {"emoji": "👋👋👋👋"})
        >>> bool(table.loc["emoji", "embedded"] < 1)  # four bytes each, and the dummy prefix
        True
    """
    if empty := [kind for kind, text in texts.items() if not text]:
        raise PromptError(f"the text {empty[0]!r} is empty. Give a text of at least one character.")
    return pd.DataFrame(
        {
            name: {
                kind: len(text) / len(tokenizer(text, add_special_tokens=False)["input_ids"])
                for kind, text in texts.items()
            }
            for name, tokenizer in tokenizers.items()
        }
    )


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
