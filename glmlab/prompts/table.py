"""A prompt as a table: one row a token with where it comes from, and what each turn adds.

ChatGLM3's prompts are encoded segment by segment (``format.py``); those of other families are rendered by their chat
template as one text and taken apart into segments (``templates.py``).
"""

import re
from bisect import bisect_right
from collections.abc import Callable, Iterator, Sequence
from functools import cache
from html import escape
from itertools import accumulate
from typing import Any

import pandas as pd
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from glmlab.models.chatglm3 import ChatGLMTokenizer
from glmlab.prompts.format import (
    ROLE_COLORS,
    Message,
    PromptError,
    Segment,
    chat_segments,
    check_messages,
    encode_segments,
    visible,
)
from glmlab.prompts.templates import render_chat, template_segments

COLUMNS = ("position", "id", "piece", "text", "bytes", "start", "end", "message", "role", "kind", "special")

_Token = tuple[Segment, int, str, str, bytes, int | None, int | None, bool]
"""Segment, id, piece, text, bytes, start, end, special."""


class PromptTable(pd.DataFrame):
    """Every token of a prompt, in order; in a notebook a table coloured by role, in which all text is escaped.

    Columns:
        position: from 0.
        id, piece: the token's number and its entry in the vocabulary.
        text: the characters that it stands for; a character spelled in several tokens is in all of them.
        bytes: the bytes that it adds to the text, in UTF-8. Special tokens and the dummy prefix add none.
        start, end: those characters in the metadata line or in the message's text (with its list of tools); missing
            for tokens that are no text.
        message: index of the message; missing for the prefix and the generation prompt.
        role: of the message, or of the answer that the generation prompt opens; empty for the prefix.
        kind: prefix, role, metadata, text or generation prompt.
        special: whether it is a special token.
    """

    @property
    def _constructor(self) -> Callable[..., "PromptTable"]:
        return PromptTable

    def _repr_html_(self) -> str | None:
        """The first and last rows, as many as pandas' ``display.max_rows``."""
        if not set(COLUMNS) <= set(self.columns):
            plain: str | None = pd.DataFrame(self)._repr_html_()  # type: ignore[operator]  # pandas-stubs leave it out
            return plain
        limit = pd.get_option("display.max_rows") or len(self)
        head = min(len(self), -(-limit // 2))
        tail = max(len(self) - limit // 2, head)
        body = [_html_row(row) for row in self.iloc[:head].to_dict("records")]
        if tail > head:
            body.append(f'<tr><td colspan="9" style="text-align:center">… {tail - head:,} tokens more …</td></tr>')
        body += [_html_row(row) for row in self.iloc[tail:].to_dict("records")]
        titles = ("position", "id", "piece", "text", "bytes", "span", "message", "role", "kind")
        header = "".join(f'<th style="text-align:left">{title}</th>' for title in titles)
        return f"<table><thead><tr>{header}</tr></thead><tbody>{''.join(body)}</tbody></table>"


def _html_row(row: dict[Any, Any]) -> str:
    """Special tokens on the role's full colour, text on a tint of it; the ink is set too, for dark pages."""
    channels = [int(ROLE_COLORS[row["role"]][i : i + 2], 16) for i in (1, 3, 5)]
    if not row["special"]:
        channels = [round(255 - 0.25 * (255 - channel)) for channel in channels]
    red, green, blue = channels
    ink = "#fff" if 0.3 * red + 0.59 * green + 0.11 * blue < 100 else "#000"
    characters = row["text"].encode("utf-8", "surrogatepass")
    share = f" ({len(row['bytes'])} of {len(characters)} bytes)" if len(row["bytes"]) != len(characters) else ""
    cells = (
        row["position"],
        row["id"],
        visible(row["piece"]),
        visible(row["text"]) + share,
        row["bytes"].hex(" ").upper(),
        "" if pd.isna(row["start"]) else f"{row['start']}–{row['end']}",
        "" if pd.isna(row["message"]) else row["message"],
        row["role"],
        row["kind"],
    )
    body = "".join(f'<td style="text-align:left">{escape(str(cell))}</td>' for cell in cells)
    return f'<tr style="background:#{red:02x}{green:02x}{blue:02x};color:{ink}">{body}</tr>'


# ------------------------------------------------------------------------------------------------- token by token


def dissect(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> PromptTable:
    """Every token of a prompt with where it comes from; the ids are those of ``encode_chat``.

    For families other than ChatGLM3, what their chat template puts around the texts is of kind "role" (before the
    first message "prefix"), and a token that reaches over a border counts where it begins.

    Raises:
        PromptError: the messages break a rule of the format, the tokenizer has no chat template, or its template
            changes the texts, so that tokens cannot be traced back to them.

    Example:
        >>> from glmlab import load_model
        >>> table = dissect(load_model("embedded").tokenizer, [{"role": "user", "content": "你好"}])
        >>> table[["id", "piece", "text", "kind"]].to_string(index=False).splitlines()[3].split()
        ['1789', '<|user|>', 'role']
    """
    if isinstance(tokenizer, ChatGLMTokenizer):
        tokens = _tokens_of_segments(tokenizer, chat_segments(messages, tools))
    else:
        check_messages(messages)
        segments = template_segments(lambda chat, opened: render_chat(tokenizer, chat, tools, opened), messages)
        tokens = _tokens_of_text(tokenizer, segments)
    rows = [
        (position, *token, segment.message, segment.role or "", segment.kind, special)
        for position, (segment, *token, special) in enumerate(tokens)
    ]
    table = pd.DataFrame(rows, columns=list(COLUMNS))
    return PromptTable(table.astype({"start": "Int64", "end": "Int64", "message": "Int64", "special": "bool"}))


def _tokens_of_segments(tokenizer: ChatGLMTokenizer, segments: Sequence[Segment]) -> Iterator[_Token]:
    """Tokens of segments that are encoded one by one: each holds the bytes that follow those of the token before."""
    for segment, ids in zip(segments, encode_segments(tokenizer, segments), strict=True):
        pieces = tokenizer.convert_ids_to_tokens(ids)
        if segment.special:
            yield segment, ids[0], pieces[0], "", b"", None, None, True
            continue
        held = [_sentencepiece_bytes(piece) for piece in pieces]
        if held:
            held[0] = held[0].removeprefix(b" ")  # the dummy prefix
        text = segment.text.replace("▁", " ")  # sentencepiece's own sign for a blank: the model cannot tell them apart
        if b"".join(held) != text.encode("utf-8"):
            raise PromptError(
                f"message {segment.message} ({segment.role}): its tokens spell another text than the one given, so "
                "this vocabulary lacks some of its characters. Take tokenizer.model from the checkpoint's own "
                "repository."
            )
        character_at = [i for i, character in enumerate(text) for _ in character.encode("utf-8")]  # of every byte
        character_at.append(len(text))
        begin = 0
        for token_id, piece, part in zip(ids, pieces, held, strict=True):
            start = end = character_at[begin]
            begin += len(part)
            if part:
                end = character_at[begin - 1] + 1
            yield segment, token_id, piece, text[start:end], part, start, end, False


def _tokens_of_text(tokenizer: PreTrainedTokenizerBase, segments: Sequence[Segment]) -> Iterator[_Token]:
    """Tokens of a prompt that is encoded as one text, by the offsets that the tokenizer gives."""
    rendered = "".join(segment.text for segment in segments)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    added = tokenizer.added_tokens_decoder
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    begins = list(accumulate((len(segment.text) for segment in segments[:-1]), initial=0))
    reached = 0
    for token_id, piece, (start, end) in zip(
        ids, tokenizer.convert_ids_to_tokens(ids), encoded["offset_mapping"], strict=True
    ):
        start = min(start, reached)  # some families leave the blank before a word out of its offsets
        reached = max(reached, end)
        index = bisect_right(begins, start) - 1
        segment, begin = segments[index], begins[index]
        if token_id in added and added[token_id].special:
            yield segment, token_id, piece, "", b"", None, None, True
            continue
        if token_id in added:
            held = piece.encode("utf-8")
        else:
            held = bytes(_byte_of_sign()[sign] for sign in piece) if byte_level else _sentencepiece_bytes(piece)
        traced = segment.kind in ("metadata", "text")
        span = (start - begin, min(end - begin, len(segment.text))) if traced else (None, None)
        yield segment, token_id, piece, rendered[start:end], held, *span, False


def _sentencepiece_bytes(piece: str) -> bytes:
    """UTF-8 that a piece stands for: one byte for <0x0A>, else its characters with blanks for ▁."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode("utf-8")


@cache
def _byte_of_sign() -> dict[str, int]:
    """Byte-level BPE writes every byte as a printable character; this is the way back."""
    return {sign: byte for byte, sign in bytes_to_unicode().items()}


# ------------------------------------------------------------------------------------------------- turn by turn


def prompt_growth(
    tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Any] | None = None
) -> pd.DataFrame:
    """What each turn adds to the prompt: the KV cache of the old prompt stays valid where the new one begins with it.

    Returns:
        One row for every prompt that asks for an answer: ``turn`` (from 1), ``prompt_tokens``, of these ``kept_tokens``
        (equal to the beginning of the prompt before), ``answer_tokens`` (the answer to it, whose keys and values were
        cached as it was generated) and ``fed_tokens`` (what the model still has to read); ``old_prompt_kept`` says
        whether all of the old prompt is the beginning of the new one.

    Example:
        >>> from glmlab import load_model
        >>> chat = [{"role": "user", "content": "你好"}, {"role": "assistant", "content": "你好！"}] * 3
        >>> growth = prompt_growth(load_model("embedded").tokenizer, chat)
        >>> growth["old_prompt_kept"].tolist(), growth["kept_tokens"].tolist() == [0, *growth["prompt_tokens"][:-1]]
        ([True, True, True], True)
    """
    check_messages(messages)
    asked = [index for index, message in enumerate(messages) if message["role"] == "assistant"]
    if messages[-1]["role"] in ("user", "observation"):
        asked.append(len(messages))
    rows = []
    before: list[int] = []
    for turn, end in enumerate(asked, start=1):
        table = dissect(tokenizer, messages[:end], tools)
        ids = table["id"].tolist()
        kept = common_prefix(before, ids)
        new = table.iloc[kept:]
        answer = int(((new["role"] == "assistant") & new["kind"].isin(["metadata", "text"])).sum()) if turn > 1 else 0
        rows.append((turn, len(ids), kept, answer, len(ids) - kept - answer, kept == len(before)))
        before = ids
    columns = ("turn", "prompt_tokens", "kept_tokens", "answer_tokens", "fed_tokens", "old_prompt_kept")
    return pd.DataFrame(rows, columns=list(columns))


def common_prefix(one: Sequence[int], other: Sequence[int]) -> int:
    """Length of the common beginning of two sequences.

    Example:
        >>> common_prefix([1, 2, 3], [1, 2, 4, 5])
        2
    """
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
