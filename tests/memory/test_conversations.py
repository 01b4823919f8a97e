"""Conversation files: what comes with the suite, and what is refused."""

import json
from pathlib import Path

import pytest

from glmlab.core.errors import GlmlabError
from glmlab.memory.conversations import load_conversation


def test_bundled_conversations_hold_what_they_promise() -> None:
    long, short = load_conversation("long"), load_conversation("short")

    spoken = [question.user for question in long.turns]
    chinese = [text for text in spoken if not text.isascii()]
    assert len(long.turns) >= 8
    assert min(len(chinese), len(spoken) - len(chinese)) >= 4
    assert sum(question.max_new_tokens for question in long.turns) + 500 < 8192  # every model of the suite takes it
    assert 1 < len(short.turns) < 8


GOOD = {"name": "n", "language": "en", "turns": [{"user": "Hello", "max_new_tokens": 5}]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ('{"name": ', "not readable as JSON"),
        (b"\xff\xfe", "not readable as JSON in UTF-8"),
        ("[]", "has no list of turns"),
        ({**GOOD, "turns": []}, "has no list of turns"),
        ({"language": "en", "turns": GOOD["turns"]}, "has no name"),
        ({"name": "n", "turns": GOOD["turns"]}, "has no language"),
        ({**GOOD, "turns": [*GOOD["turns"], {"max_new_tokens": 5}]}, "turn 2 says nothing"),
        ({**GOOD, "turns": ["Hello"]}, "turn 1 says nothing"),
        ({**GOOD, "turns": [{"user": " ", "max_new_tokens": 5}]}, "turn 1 says nothing"),
        ({**GOOD, "turns": [{"user": "Hello"}]}, "turn 1 has max_new_tokens None"),
        ({**GOOD, "turns": [{"user": "Hello", "max_new_tokens": 0}]}, "turn 1 has max_new_tokens 0"),
        ({**GOOD, "turns": [{"user": "Hello", "max_new_tokens": "9"}]}, "turn 1 has max_new_tokens '9'"),
        (None, r"chat\.json is not there. Give a conversation file, or one of long, "),
    ],
)
def test_bad_conversation_files_are_refused(tmp_path: Path, content: object, message: str) -> None:
    file = tmp_path / "chat.json"
    if isinstance(content, bytes):
        file.write_bytes(content)
    elif content is not None:
        file.write_text(content if isinstance(content, str) else json.dumps(content), encoding="utf-8")

    with pytest.raises(GlmlabError, match=message):
        load_conversation(file)
