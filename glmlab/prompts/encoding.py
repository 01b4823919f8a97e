"""Prompts as token ids: which they are, where each comes from, and which are new from turn to turn.

:func:`encode_chat` gives the ids, :func:`dissect` says where each of them comes from, :func:`prompt_growth` which of
them are new from turn to turn. ChatGLM3's prompts are built segment by segment (``segments.py`` tells the format);
those of other families are rendered by their chat template and taken apart likewise (``templates.py``).
"""

import re
from collections.abc import Sequence
from functools import cache
from typing import Any

import numpy as np
import pandas as pd
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from glmlab.models.chatglm3 import ChatGLMTokenizer
from glmlab.prompts.format import (
    ROLES,
    Message,
    PromptError,
    Segment,
    chat_segments,
    check_mappings,
    check_messages,
    encode_segments,
    role_transitions,
)
from glmlab.prompts.table import COLUMNS, PromptTable
from glmlab.prompts.templates import check_chat_template, template_errors, template_segments, tokenizer_segments

__all__ = [
    "ROLES",
    "Message",
    "PromptError",
    "Segment",
    "chat_segments",
    "check_messages",
    "dissect",
    "encode_chat",
    "encode_segments",
    "prompt_growth",
    "role_transitions",
    "template_segments",
]


def encode_chat(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    add_generation_prompt: bool = True,
) -> list[int]:
    """Token ids of a chat: segment by segment for ChatGLM3, by the tokenizer's own chat template for other models.

    Raises:
        PromptError: the messages break a rule of the format, the tokenizer has no chat format, or its template refuses
            them.

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
    check_chat_template(tokenizer)
    check_mappings(messages)
    with template_errors():
        ids: list[int] = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            add_generation_prompt=add_generation_prompt,
            tokenize=True,
            return_dict=False,
        )
    return ids


# ------------------------------------------------------------------------------------------------- token by token


def dissect(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None = None,
    *,
    add_generation_prompt: bool = True,
) -> PromptTable:
    """Every token of a prompt with where it comes from; the ids are those of :func:`encode_chat`.

    For ChatGLM3 the parts are its segments. For other families the prompt is what their chat template renders: what
    stands around the texts is of kind "role" (before the first message, such as a system message that the template
    adds, "prefix"), and a token that reaches over a border counts where it begins.

    Returns:
        One row a token; :class:`~glmlab.prompts.table.PromptTable` describes the columns.

    Raises:
        PromptError: the messages break a rule of the format, or the tokenizer has no chat format, or its template
            changes the texts, so that its tokens cannot be traced back to them.

    Example:
        >>> from glmlab import load_model
        >>> table = dissect(load_model("embedded").tokenizer, [{"role": "user", "content": "你好"}])
        >>> table[["id", "piece", "text", "kind"]].to_string(index=False).splitlines()[3].split()
        ['1789', '<|user|>', 'role']
    """
    if isinstance(tokenizer, ChatGLMTokenizer):
        segments = chat_segments(messages, tools, add_generation_prompt=add_generation_prompt)
        tokens = _trace_segments(tokenizer, segments)
    else:
        segments = tokenizer_segments(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt)
        tokens = _trace_rendered(tokenizer, segments)
    index = tokens["segment"]
    table = pd.DataFrame(
        {
            "position": np.arange(len(index)),
            **{name: tokens[name] for name in ("id", "piece", "text", "bytes")},
            "start": pd.array(tokens["start"], dtype="Int64"),
            "end": pd.array(tokens["end"], dtype="Int64"),
            "message": pd.array([segments[i].message for i in index], dtype="Int64"),
            "role": [segments[i].role or "" for i in index],
            "kind": [segments[i].kind for i in index],
            "special": pd.array(tokens["special"], dtype="bool"),
        },
        columns=list(COLUMNS),
    )
    return PromptTable(table)


_Tokens = dict[str, list[Any]]
"""Columns, one entry a token: segment (its index), id, piece, text, bytes, start, end, special."""


def _no_tokens() -> _Tokens:
    return {name: [] for name in ("segment", "id", "piece", "text", "bytes", "start", "end", "special")}


def _trace_segments(tokenizer: ChatGLMTokenizer, segments: Sequence[Segment]) -> _Tokens:
    """Tokens of segments that are encoded one by one: each holds the bytes that follow those of the token before."""
    tokens = _no_tokens()
    encoded = encode_segments(tokenizer, segments)
    known = sorted({token_id for ids in encoded for token_id in ids})
    pieces = dict(zip(known, tokenizer.convert_ids_to_tokens(known), strict=True))
    spelled = {token_id: _sentencepiece_bytes(piece) for token_id, piece in pieces.items()}
    for index, (segment, ids) in enumerate(zip(segments, encoded, strict=True)):
        count = len(ids)
        tokens["segment"] += [index] * count
        tokens["id"] += ids
        tokens["piece"] += [pieces[token_id] for token_id in ids]
        tokens["special"] += [segment.special] * count
        if segment.special:
            tokens["text"].append("")
            tokens["bytes"].append(b"")
            tokens["start"].append(None)
            tokens["end"].append(None)
            continue
        held = [spelled[token_id] for token_id in ids]
        if held:
            held[0] = held[0].removeprefix(b" ")  # the dummy prefix
        text = segment.text.replace("▁", " ")  # sentencepiece's own sign for a blank: the model cannot tell them apart
        if b"".join(held) != text.encode("utf-8"):
            raise PromptError(
                f"{_place(segment)}: its tokens spell another text than the one given, so this vocabulary lacks some "
                "of its characters. Take tokenizer.model from the checkpoint's own repository."
            )
        starts, ends = _character_spans(text, held)
        tokens["text"] += [text[start:end] for start, end in zip(starts, ends, strict=True)]
        tokens["bytes"] += held
        tokens["start"] += starts
        tokens["end"] += ends
    return tokens


def _place(segment: Segment) -> str:
    return "prompt" if segment.message is None else f"message {segment.message} ({segment.role})"


def _sentencepiece_bytes(piece: str) -> bytes:
    """UTF-8 that a piece stands for: one byte for <0x0A>, else its characters with blanks for ▁."""
    if re.fullmatch(r"<0x[0-9A-F]{2}>", piece):
        return bytes([int(piece[3:5], 16)])
    return piece.replace("▁", " ").encode("utf-8")


def _character_spans(text: str, held: Sequence[bytes]) -> tuple[list[int], list[int]]:
    """First and last (exclusive) character of a text that each of the byte strings it is cut into belongs to."""
    borders = np.concatenate([[0], np.cumsum([len(character.encode("utf-8")) for character in text], dtype=np.int64)])
    ends = np.cumsum([len(part) for part in held], dtype=np.int64)
    begins = np.concatenate([[0], ends[:-1]])[: len(held)]
    first: list[int] = (np.searchsorted(borders, begins, side="right") - 1).tolist()
    last: list[int] = np.searchsorted(borders, ends, side="left").tolist()
    return first, last


def _trace_rendered(tokenizer: PreTrainedTokenizerBase, segments: Sequence[Segment]) -> _Tokens:
    """Tokens of a prompt that is encoded as one text, by the offsets that the tokenizer gives."""
    rendered = "".join(segment.text for segment in segments)
    encoded = tokenizer(rendered, add_special_tokens=False, return_offsets_mapping=True)
    ids: list[int] = encoded["input_ids"]
    pieces: list[str] = tokenizer.convert_ids_to_tokens(ids)
    added = tokenizer.added_tokens_decoder
    byte_level = "ByteLevel" in repr(tokenizer.backend_tokenizer.decoder)
    begins = np.concatenate([[0], np.cumsum([len(segment.text) for segment in segments])]).tolist()
    tokens = _no_tokens()
    reached = 0
    for token_id, piece, (start, end) in zip(ids, pieces, encoded["offset_mapping"], strict=True):
        start = min(start, reached)  # some families leave the blank before a word out of its offsets
        reached = max(reached, end)
        index = min(int(np.searchsorted(begins, start, side="right")) - 1, len(segments) - 1)
        segment, begin = segments[index], begins[index]
        special = token_id in added and added[token_id].special
        traced = not special and segment.kind in ("metadata", "text")
        tokens["segment"].append(index)
        tokens["id"].append(token_id)
        tokens["piece"].append(piece)
        tokens["text"].append("" if special else rendered[start:end])
        tokens["bytes"].append(b"" if special else _piece_bytes(piece, token_id in added, byte_level))
        tokens["start"].append(start - begin if traced else None)
        tokens["end"].append(min(end - begin, len(segment.text)) if traced else None)
        tokens["special"].append(special)
    return tokens


def _piece_bytes(piece: str, added: bool, byte_level: bool) -> bytes:
    if added:
        return piece.encode("utf-8")
    if byte_level:
        return bytes(_byte_of_sign()[sign] for sign in piece)
    return _sentencepiece_bytes(piece)


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
        kept = _common_beginning(before, ids)
        new = table.iloc[kept:]
        answer = int(((new["role"] == "assistant") & new["kind"].isin(["metadata", "text"])).sum()) if turn > 1 else 0
        rows.append((turn, len(ids), kept, answer, len(ids) - kept - answer, kept == len(before)))
        before = ids
    columns = ("turn", "prompt_tokens", "kept_tokens", "answer_tokens", "fed_tokens", "old_prompt_kept")
    return pd.DataFrame(rows, columns=list(columns))


def _common_beginning(one: Sequence[int], other: Sequence[int]) -> int:
    return next((i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
