"""ChatGLM3's way to write a dialogue as token ids, and which of them the model has to learn.

    [gMASK] sop <|user|> "\\n" question <|assistant|> metadata"\\n" answer <|user|> …

A role token, then the metadata with its line break, then the text; each is encoded alone, so that text never turns into
a special id. An answer ends where the next role token stands: ``<|observation|>`` after a tool call, else ``<|user|>``.
"""

import json
from typing import Any

from sentencepiece import SentencePieceProcessor

from glmlab.models.chatglm3 import SPECIAL_TOKENS

Message = dict[str, Any]  # role, content, and where needed metadata (a tool's name) or tools (a list)
Dialogue = list[Message]


def special_id(pieces: SentencePieceProcessor, token: str) -> int:
    """Id of one of the nine special tokens."""
    return int(pieces.get_piece_size()) + SPECIAL_TOKENS.index(token)


def full_text(message: Message) -> str:
    """Text of a message as the model reads it: a list of tools follows the system prompt as JSON."""
    text: str = message["content"]
    if message.get("tools"):
        text += "\n" + json.dumps(message["tools"], indent=4, ensure_ascii=False)
    return text


def encode_dialogue(pieces: SentencePieceProcessor, dialogue: Dialogue) -> tuple[list[int], list[bool]]:
    """Ids of a whole dialogue, and for each id whether it is a target: answers and the role token that ends them."""
    ids = [special_id(pieces, "[gMASK]"), special_id(pieces, "sop")]
    is_target = [False, False]
    ends_an_answer = False
    for message in dialogue:
        answers = message["role"] == "assistant"
        content = pieces.encode(message.get("metadata", "") + "\n") + pieces.encode(full_text(message))
        ids += [special_id(pieces, f"<|{message['role']}|>"), *content]
        is_target += [ends_an_answer] + [answers] * len(content)
        ends_an_answer = answers
    if ends_an_answer:
        ids.append(special_id(pieces, "<|observation|>" if dialogue[-1].get("metadata") else "<|user|>"))
        is_target.append(True)
    return ids, is_target
