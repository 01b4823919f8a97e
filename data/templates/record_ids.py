"""Records the token ids of one conversation under tokenizers that are not part of this repository.

    python data/templates/record_ids.py QWEN.TIKTOKEN TOKENIZER.MODEL

Needs the package ``tiktoken``. The Qwen file is the vocabulary as Qwen 1 published it (151,643 entries in tiktoken's
format, the base of Qwen 2 to 3, too); special tokens follow it in the order of Qwen's own tokenizer code. Writes
``recorded-ids.json``.
"""

import base64
import json
import sys
from pathlib import Path

import tiktoken

from glmlab import encode_chat
from glmlab.models.chatglm3 import ChatGLMTokenizer, build_tokenizer_backend

HERE = Path(__file__).resolve().parent
CONVERSATION = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "你是誰"},
]
"""The conversation that the chapter shows in Qwen's format."""

PATTERN = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
SPECIAL = ("<|endoftext|>", "<|im_start|>", "<|im_end|>")


def qwen(file: Path) -> tiktoken.Encoding:
    """Qwen's tokenizer from its published vocabulary: lines of a base64 piece and its rank."""
    lines = (line.split() for line in file.read_bytes().splitlines() if line)
    ranks = {base64.b64decode(piece): int(rank) for piece, rank in lines}
    special = {token: len(ranks) + i for i, token in enumerate(SPECIAL)}
    return tiktoken.Encoding("qwen", pat_str=PATTERN, mergeable_ranks=ranks, special_tokens=special)


def main(qwen_file: Path, chatglm3_file: Path) -> None:
    """Write ``recorded-ids.json``."""
    encoding = qwen(qwen_file)
    text = (
        "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in CONVERSATION)
        + "<|im_start|>assistant\n"
    )
    ids = encoding.encode(text, allowed_special="all")
    recorded = {
        "conversation": CONVERSATION,
        "Qwen": {
            "ids": ids,
            "pieces": [encoding.decode_single_token_bytes(i).decode("utf-8", "replace") for i in ids],
            "source": f"qwen.tiktoken of Qwen/Qwen-7B ({encoding.n_vocab - len(SPECIAL):,} entries), tiktoken "
            f"{tiktoken.__version__}",
        },
        "ChatGLM3": {
            "ids": encode_chat(ChatGLMTokenizer(tokenizer_object=build_tokenizer_backend(chatglm3_file)), CONVERSATION),
            "source": "tokenizer.model of THUDM/chatglm3-6b, encoded segment by segment",
        },
    }
    (HERE / "recorded-ids.json").write_text(json.dumps(recorded, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main(*map(Path, sys.argv[1:]))
