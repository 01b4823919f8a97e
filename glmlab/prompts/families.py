"""The same conversation in several families' chat formats, side by side.

A format can be compared by its template alone: its text, what surrounds the messages, its special tokens. Token counts
need the family's tokenizer; where it is not on the machine they are left out, never estimated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import get_args

import pandas as pd
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import data_path
from glmlab.prompts.encoding import dissect
from glmlab.prompts.format import Message, Segment, SegmentKind, chat_segments, check_messages
from glmlab.prompts.templates import template_segments


class FormatError(GlmlabError):
    """A chat format that the suite does not know."""


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
        FormatError: another name.

    Example:
        >>> print(chat_format("GLM-4").text([{"role": "user", "content": "你是谁"}]))
        [gMASK]<sop><|user|>
        你是谁<|assistant|>
    """
    known = json.loads(data_path("templates", "formats.json").read_text(encoding="utf-8"))
    if name not in known:
        raise FormatError(f"no chat format {name!r}. There are {', '.join(known)}.")
    entry = known[name]
    file = entry.get("template")
    return ChatFormat(
        name,
        None if file is None else data_path("templates", file).read_text(encoding="utf-8").removesuffix("\n"),
        tuple(entry["special_tokens"]),
        entry["source"],
    )


FORMATS = ("ChatGLM3", "Qwen2.5", "GLM-4")

_ONE_TURN: tuple[Message, ...] = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})


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
        PromptError: the messages break a rule.
        FormatError: a tokenizer for a format that is not compared.

    Example:
        >>> table = compare_formats([{"role": "user", "content": "你好"}])
        >>> table["special_tokens_per_turn"].to_dict()
        {'ChatGLM3': 2, 'Qwen2.5': 4, 'GLM-4': 2}
    """
    tokenizers = tokenizers or {}
    if unknown := [name for name in tokenizers if name not in FORMATS]:
        raise FormatError(f"no chat format {unknown[0]!r}. There are {', '.join(FORMATS)}.")
    rows = {name: _compared(chat_format(name), messages, tokenizers.get(name)) for name in FORMATS}
    table = pd.DataFrame.from_dict(rows, orient="index").astype("Int64")
    table.index.name = "format"
    return table


def _compared(chat: ChatFormat, messages: Sequence[Message], tokenizer: PreTrainedTokenizerBase | None) -> pd.Series:
    segments = chat.segments(messages)
    one, two = (chat.segments(_ONE_TURN * turns, add_generation_prompt=False) for turns in (1, 2))
    counts: dict[str, int | None] = {
        "text_characters": sum(len(segment.text) for segment in segments if segment.kind == "text"),
        "frame_characters": _frame_characters(segments),
        "special_tokens": _special_count(chat, segments),
        "special_tokens_per_turn": _special_count(chat, two) - _special_count(chat, one),
        "frame_characters_per_turn": _frame_characters(two) - _frame_characters(one),
        "frame_tokens_per_turn": None,
    }
    kinds = get_args(SegmentKind)
    counts |= {f"{kind.replace(' ', '_')}_tokens": None for kind in kinds}
    counts["tokens"] = None
    if tokenizer is not None:
        one_turn, two_turns = (
            int((dissect(tokenizer, _ONE_TURN * turns, add_generation_prompt=False)["kind"] != "text").sum())
            for turns in (1, 2)
        )
        counts["frame_tokens_per_turn"] = two_turns - one_turn
        tokens = dissect(tokenizer, messages)["kind"].value_counts()
        counts |= {f"{kind.replace(' ', '_')}_tokens": int(tokens.get(kind, 0)) for kind in kinds}
        counts["tokens"] = int(tokens.sum())
    return pd.Series(counts, dtype="object")


def _frame_characters(segments: Sequence[Segment]) -> int:
    return sum(len(segment.text) for segment in segments if segment.kind != "text")


def _special_count(chat: ChatFormat, segments: Sequence[Segment]) -> int:
    written = [segment.text for segment in segments if segment.kind not in ("metadata", "text")]
    return sum(text.count(token) for text in written for token in chat.special_tokens)


def characters_per_token(tokenizers: Mapping[str, PreTrainedTokenizerBase], texts: Mapping[str, str]) -> pd.DataFrame:
    """How many characters a token holds on average, by kind of text (rows) and tokenizer (columns).

    Raises:
        FormatError: an empty text, which has no tokens to share it.

    Example:
        >>> from glmlab import load_model
        >>> table = characters_per_token({"embedded": load_model("embedded").tokenizer}, {"emoji": "👋👋👋👋"})
        >>> bool(table.loc["emoji", "embedded"] < 1)  # four bytes each, and the dummy prefix
        True
    """
    if empty := [kind for kind, text in texts.items() if not text]:
        raise FormatError(f"the text {empty[0]!r} is empty. Give a text of at least one character.")
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
    return pd.DataFrame(
        [
            (name, segment.kind, segment.role or "", segment.message, segment.text)
            for name, parts in segments.items()
            for segment in parts
        ],
        columns=["format", "kind", "role", "message", "text"],
    ).astype({"message": "Int64"})
