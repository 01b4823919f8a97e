"""The same conversation in several families' chat formats, side by side.

Characters and special tokens follow from a format's template alone. Token counts need the family's tokenizer; without
it they are left out, never estimated.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, get_args

import pandas as pd
from transformers import PreTrainedTokenizerBase
from transformers.utils.chat_template_utils import render_jinja_template

from glmlab.core.resources import data_path
from glmlab.prompts.format import Message, PromptError, Segment, SegmentKind, chat_segments, check_messages
from glmlab.prompts.table import dissect
from glmlab.prompts.templates import template_segments

FORMATS = ("ChatGLM3", "Qwen2.5", "GLM-4")

_ONE_TURN: tuple[Message, ...] = ({"role": "user", "content": "x"}, {"role": "assistant", "content": "y"})


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
        ``special_tokens`` among the latter; tokens by kind, such as ``prefix_tokens`` and ``text_tokens``, and all
        ``tokens``; and what a turn of one user message and one answer adds beside its texts:
        ``special_tokens_per_turn``, ``frame_characters_per_turn``, ``frame_tokens_per_turn``. A count is missing (<NA>)
        where the format's tokenizer was not given.

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
    rows = {}
    for name in FORMATS:
        chat, tokenizer = chat_format(name), tokenizers.get(name)
        counts = _counts(chat, tokenizer, messages, add_generation_prompt=True)
        one, two = (_counts(chat, tokenizer, _ONE_TURN * n, add_generation_prompt=False) for n in (1, 2))
        per_turn = {
            f"{count}_per_turn": None if one[count] is None else two[count] - one[count]
            for count in ("special_tokens", "frame_characters", "frame_tokens")
        }
        del counts["frame_tokens"]
        rows[name] = {**counts, **per_turn}
    return pd.DataFrame.from_dict(rows, orient="index").astype("Int64").rename_axis("format")


def _counts(
    chat: ChatFormat,
    tokenizer: PreTrainedTokenizerBase | None,
    messages: Sequence[Message],
    *,
    add_generation_prompt: bool,
) -> dict[str, Any]:
    segments = chat.segments(messages, add_generation_prompt=add_generation_prompt)
    written = "\n".join(segment.text for segment in segments if segment.kind not in ("metadata", "text"))
    counts: dict[str, Any] = {
        "text_characters": sum(len(segment.text) for segment in segments if segment.kind == "text"),
        "frame_characters": sum(len(segment.text) for segment in segments if segment.kind != "text"),
        "special_tokens": sum(written.count(token) for token in chat.special_tokens),
    }
    kinds = get_args(SegmentKind)
    names = ["frame_tokens", *(f"{kind.replace(' ', '_')}_tokens" for kind in kinds), "tokens"]
    if tokenizer is None:
        return counts | dict.fromkeys(names)
    kind = dissect(tokenizer, messages, add_generation_prompt=add_generation_prompt)["kind"]
    numbers = [(kind != "text").sum(), *((kind == each).sum() for each in kinds), len(kind)]
    return counts | dict(zip(names, map(int, numbers), strict=True))


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
