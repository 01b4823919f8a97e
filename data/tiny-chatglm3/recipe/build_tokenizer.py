"""Trains the embedded model's sentencepiece model on the text of its dialogues; settings as in ChatGLM3's."""

import io
import string
from collections.abc import Iterator
from random import Random

import sentencepiece
from chat_format import full_text
from dialogues import training_conversation, training_dialogue
from phrases import LANGUAGES
from sentencepiece import SentencePieceProcessor

PIECES = 1783  # with the nine special tokens 1,792: a multiple of 64
DIALOGUES = 5000
CONVERSATIONS = 60
SEED = 0
LEFT_TO_BYTES = "👋"  # spelled as four byte pieces, as ChatGLM3-6B's tokenizer does
CHARACTERS = {*string.printable, *repr(LANGUAGES)} - {LEFT_TO_BYTES}  # those with a piece; the rest is spelled in bytes


def corpus() -> Iterator[str]:
    """Lines of training dialogues, and the word lists a few times, so that every character gets a piece."""
    random = Random(SEED)
    dialogues = [training_dialogue(random) for _ in range(DIALOGUES)]
    dialogues += [training_conversation(random, stories=1) for _ in range(CONVERSATIONS)]
    for dialogue in dialogues:
        for message in dialogue:
            text = message.get("metadata", "") + "\n" + full_text(message)
            for line in text.split("\n"):
                if line.strip():
                    yield "".join(character for character in line if character in CHARACTERS)
    for language in LANGUAGES:
        for words in (language.cities, language.names, language.conditions):
            yield from words * 3


def build_tokenizer() -> bytes:
    """The trained model, as the bytes of a tokenizer.model file."""
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=corpus(),
        model_writer=model,
        vocab_size=PIECES,
        model_type="bpe",
        byte_fallback=True,
        character_coverage=0.99999,
        split_digits=True,
        normalization_rule_name="identity",
        remove_extra_whitespaces=False,
        allow_whitespace_only_pieces=True,
        add_dummy_prefix=True,
        num_threads=1,
        max_sentence_length=100_000,
        unk_id=0,
        bos_id=1,
        eos_id=2,
        pad_id=-1,
        minloglevel=1,
    )
    return model.getvalue()


if __name__ == "__main__":
    pieces = SentencePieceProcessor(model_proto=build_tokenizer())
    print(f"{pieces.get_piece_size()} pieces; {pieces.encode('你好👋，我想了解 KV 缓存。', out_type=str)}")
