"""A conversation: the user's side of a chat, fixed in a file, so that two recordings ask the same.

The file is JSON: ``{"name": …, "language": …, "turns": [{"user": …, "max_new_tokens": …}, …]}``.
"""

import hashlib
import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from glmlab.core.errors import GlmlabError
from glmlab.core.resources import data_path

BUNDLED_CONVERSATIONS = ("long", "short")  # of data/conversations


@dataclass(frozen=True)
class Question:
    """What the user says in one turn, and the longest answer."""

    user: str
    max_new_tokens: int


@dataclass(frozen=True)
class Conversation:
    """The user's side of a chat, fixed in a file."""

    name: str
    language: str
    turns: tuple[Question, ...]
    sha256: str  # of the file's bytes


def load_conversation(path: str | os.PathLike[str]) -> Conversation:
    """Read a conversation: a file, or "long" or "short" for those that come with the suite.

    Raises:
        GlmlabError: the file is missing, is not JSON, or a turn lacks something.

    Example:
        >>> load_conversation("short").turns[0].user
        '你好'
    """
    file = data_path("conversations", f"{path}.json") if path in BUNDLED_CONVERSATIONS else Path(path)
    try:
        content = file.read_bytes()
        document = json.loads(content.decode("utf-8"))
    except FileNotFoundError:
        raise GlmlabError(
            f"{file} is not there. Give a conversation file, or one of {', '.join(BUNDLED_CONVERSATIONS)}."
        ) from None
    except (OSError, ValueError, RecursionError) as error:
        raise GlmlabError(f"{file} is not readable as JSON in UTF-8 ({error}). Fix the file.") from error
    if not isinstance(document, dict) or not isinstance(document.get("turns"), list) or not document["turns"]:
        raise GlmlabError(f'{file} has no list of turns. It needs "turns": [{{"user": …, "max_new_tokens": …}}, …].')
    for field in ("name", "language"):
        if not isinstance(document.get(field), str):
            raise GlmlabError(f'{file} has no {field}. Add "{field}": "…".')
    turns = tuple(_question(f"{file}: turn {number}", turn) for number, turn in enumerate(document["turns"], start=1))
    return Conversation(document["name"], document["language"], turns, hashlib.sha256(content).hexdigest())


def _question(where: str, turn: Any) -> Question:
    user = turn.get("user") if isinstance(turn, dict) else None
    if not isinstance(user, str) or not user.strip():
        raise GlmlabError(f'{where} says nothing. Give it "user": "…".')
    longest = turn.get("max_new_tokens")
    if not isinstance(longest, int) or isinstance(longest, bool) or longest < 1:
        raise GlmlabError(
            f'{where} has max_new_tokens {longest!r}. Give it "max_new_tokens": a whole number from 1 on.'
        )
    return Question(user, longest)
