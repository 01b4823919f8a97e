"""From messages to token ids, segment by segment, as ChatGLM3 was trained.

A ChatGLM3 prompt is a row of segments, each encoded alone:

    [gMASK] sop                              prefix
    <|system|>  "\\n"  "You are …"            role, metadata, text
    <|user|>    "\\n"  "Hello"
    <|assistant|>                            generation prompt

A role becomes one special id. Metadata (the name of the tool that an assistant message calls, else empty) and its
newline, and then the text, are ordinary pieces, whatever they contain: a role token typed by a user stays text.

:func:`encode_chat` gives the ids, :func:`dissect` says where each of them comes from, :func:`prompt_growth` which of
them are new from turn to turn. Other families' prompts are rendered by their chat template and taken apart likewise.
"""

import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any, Literal

import numpy as np
import pandas as pd
from jinja2 import TemplateError
from transformers import PreTrainedTokenizerBase
from transformers.convert_slow_tokenizer import bytes_to_unicode

from glmlab.errors import GlmlabError
from glmlab.generation.prompt_table import COLUMNS, PromptTable
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
    _check_characters("tools", json.dumps(messages[0].get("tools"), ensure_ascii=False))
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
    _check_chat_template(tokenizer)
    ids: list[int] = tokenizer.apply_chat_template(
        [dict(message) for message in messages],
        tools=None if tools is None else list(tools),
        add_generation_prompt=add_generation_prompt,
        tokenize=True,
        return_dict=False,
    )
    return ids


def _check_chat_template(tokenizer: PreTrainedTokenizerBase) -> None:
    if tokenizer.chat_template is None:
        raise PromptError(
            f"{type(tokenizer).__name__} has no chat template: this is a base model, not a chat model. "
            "Use its chat variant (names end in -chat or -Instruct), or set tokenizer.chat_template."
        )


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
        One row a token; :class:`~glmlab.generation.prompt_table.PromptTable` describes the columns.

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
        segments = _template_segments(tokenizer, messages, tools, add_generation_prompt=add_generation_prompt)
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


# ------------------------------------------------------------------------------------------------- other families

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
    try:
        return render(messages, opened)
    except TemplateError as error:
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
    """What opens a message: read from the second user message of a conversation, where no prefix stands before it."""
    probe = [{"role": name, "content": _mark(i)} for i, name in enumerate(("user", "assistant", "user"))]
    between = _MARK.split(_rendered(render, probe, False))[4]
    return between.removeprefix(_closing(render, probe, 1)).replace("user", role)


def _template_segments(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    tools: Sequence[Any] | None,
    *,
    add_generation_prompt: bool,
) -> list[Segment]:
    """Segments of another family's prompt, from the template that its tokenizer carries."""
    check_messages(messages)
    _check_chat_template(tokenizer)

    def render(messages: Sequence[Message], opened: bool) -> str:
        text: str = tokenizer.apply_chat_template(
            [dict(message) for message in messages],
            tools=None if tools is None else list(tools),
            add_generation_prompt=opened,
            tokenize=False,
        )
        return text

    return template_segments(render, messages, add_generation_prompt=add_generation_prompt)


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
