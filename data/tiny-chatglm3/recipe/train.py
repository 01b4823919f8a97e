"""Trains the embedded model from scratch and writes its checkpoint: ``python data/tiny-chatglm3/recipe/train.py``.

Two phases, fixed step counts and seeds, two cores, fp32:

1. copy: random pieces, said again. Attention heads that copy form here; without this phase, names and cities that
   the model has never seen are not copied later.
2. dialogues: each step reads short dialogues, extra sums, some more copying and, every third step, one long
   conversation of stories and other exchanges. Learning rates fall linearly to zero.

Only answers, and the token that ends them, are targets. Layer matrices are trained with Muon, the rest with AdamW.
"""

import argparse
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from build_tokenizer import build_tokenizer
from chat_format import encode_dialogue, special_id
from checkpoint import new_model, save_checkpoint
from dialogues import addition, training_conversation, training_dialogue
from phrases import LANGUAGES
from sentencepiece import SentencePieceProcessor
from torch import Tensor
from transformers import GlmForCausalLM

SEED = 0
THREADS = 2
COPY_STEPS = 200
DIALOGUE_STEPS = 1000
WARM_UP_STEPS = 40
DIALOGUES_A_STEP = 28
SUMS_A_STEP = 20
COPIES_A_STEP = 3
STEPS_A_CONVERSATION = 3  # a long conversation every so many steps
SHARE_TWO_STORIES = 0.3  # of the long conversations; the others tell one
CONVERSATION_WEIGHT = 0.5  # of its loss beside that of the short dialogues
LARGEST_POSITION = 7000
MUON_RATE = 0.02
ADAMW_RATE = 3e-3
FIRST_PIECE = 3  # after <unk>, <s>, </s>


@dataclass(frozen=True)
class Example:
    """Token ids, and which of them are targets."""

    ids: list[int]
    is_target: list[bool]


class Optimizers:
    """Muon for the layers' matrices, AdamW for embeddings, biases and norms; one schedule for both."""

    def __init__(self, model: GlmForCausalLM) -> None:
        self._parameters = list(model.parameters())
        matrices = [p for name, p in model.named_parameters() if p.ndim == 2 and "layers" in name]
        others = [p for name, p in model.named_parameters() if not (p.ndim == 2 and "layers" in name)]
        self._optimizers = [
            torch.optim.Muon(matrices, lr=MUON_RATE, weight_decay=0.01, momentum=0.95, nesterov=True),
            torch.optim.AdamW(others, lr=ADAMW_RATE, betas=(0.9, 0.98), weight_decay=0.0, fused=True),
        ]
        self._rates = [MUON_RATE, ADAMW_RATE]

    def step(self, scale: float) -> None:
        """Clip the gradients, update with the learning rates times ``scale``, clear the gradients."""
        torch.nn.utils.clip_grad_norm_(self._parameters, 1.0)
        for optimizer, rate in zip(self._optimizers, self._rates, strict=True):
            optimizer.param_groups[0]["lr"] = rate * scale
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)


def copy_example(pieces: SentencePieceProcessor, random: Random, length: int) -> Example:
    """Random pieces said by the user and said again by the model."""
    said = [random.randrange(FIRST_PIECE, pieces.get_piece_size()) for _ in range(length)]
    ids = [special_id(pieces, "<|user|>"), *said, special_id(pieces, "<|assistant|>"), *said]
    return Example(ids, [False] * (length + 2) + [True] * length)


def short_examples(pieces: SentencePieceProcessor, random: Random) -> list[Example]:
    """One step's short dialogues, sums and copies."""
    dialogues = [training_dialogue(random) for _ in range(DIALOGUES_A_STEP)]
    dialogues += [addition(random, random.choice(LANGUAGES), "train") for _ in range(SUMS_A_STEP)]
    copies = [copy_example(pieces, random, random.choice((4, 8, 12))) for _ in range(COPIES_A_STEP)]
    return [Example(*encode_dialogue(pieces, dialogue)) for dialogue in dialogues] + copies


def by_length(examples: list[Example]) -> Iterator[list[Example]]:
    """The examples in groups of similar length, so that little is computed on padding."""
    group: list[Example] = []
    for example in sorted(examples, key=lambda example: len(example.ids)):
        if group and len(example.ids) > 1.4 * len(group[0].ids) + 16:
            yield group
            group = []
        group.append(example)
    yield group


def stretched_positions(ids: Tensor, new_turn: int, random: Random) -> Tensor:
    """Positions that jump ahead at some turns, so that distances of long chats are met in a conversation of one story.

    Rotary embeddings see only differences of positions; a gap stands for turns that were not computed.
    """
    tokens = ids.shape[1]
    gaps = torch.zeros(tokens, dtype=torch.long)
    turns = (ids[0] == new_turn).nonzero().flatten().tolist()
    for turn in random.sample(turns, k=min(3, len(turns))):
        gaps[turn] = random.randrange((LARGEST_POSITION - tokens) // 3)
    return (torch.arange(tokens) + gaps.cumsum(0))[None]


def target_loss(model: GlmForCausalLM, examples: list[Example], positions: Tensor | None = None) -> Tensor:
    """Sum of the cross-entropies of the examples' targets."""
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)  # (examples, tokens), padded on the right
    is_target = torch.zeros(len(examples), width, dtype=torch.bool)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        is_target[row, : len(example.is_target)] = torch.tensor(example.is_target)
    hidden = model.model(
        input_ids=ids[:, :-1],
        # all ones: padding on the right needs no mask, and without one a gap in the positions would cut the sequence
        attention_mask=torch.ones_like(ids[:, :-1]),
        position_ids=None if positions is None else positions[:, :-1],
        use_cache=False,
    ).last_hidden_state  # (examples, tokens - 1, hidden)
    logits = model.lm_head(hidden[is_target[:, 1:]])  # (targets, vocabulary)
    return F.cross_entropy(logits, ids[:, 1:][is_target[:, 1:]], reduction="sum")


def targets_in(examples: list[Example]) -> int:
    """Number of targets."""
    return sum(sum(example.is_target) for example in examples)


def learn_to_copy(
    model: GlmForCausalLM, pieces: SentencePieceProcessor, optimizers: Optimizers, random: Random
) -> None:
    """Phase 1."""
    for step in range(COPY_STEPS):
        length = random.choice((4, 6, 8, 10, 12, 16))
        examples = [copy_example(pieces, random, length) for _ in range(384 // length)]
        loss = target_loss(model, examples) / targets_in(examples)
        loss.backward()
        optimizers.step(scale=min(1.0, (step + 1) / WARM_UP_STEPS))
        if (step + 1) % 50 == 0:
            print(f"copy {step + 1}/{COPY_STEPS}: loss {loss.item():.3f}", flush=True)


def learn_dialogues(
    model: GlmForCausalLM, pieces: SentencePieceProcessor, optimizers: Optimizers, random: Random
) -> None:
    """Phase 2."""
    started = time.monotonic()
    tokens, mean_loss, conversation_loss = 0, 0.0, 0.0
    for step in range(DIALOGUE_STEPS):
        examples = short_examples(pieces, random)
        targets = targets_in(examples)
        loss_value = 0.0
        for group in by_length(examples):
            loss = target_loss(model, group) / targets
            loss.backward()
            loss_value += loss.item()
        tokens += sum(len(example.ids) for example in examples)
        if step % STEPS_A_CONVERSATION == 0:
            stories = 2 if random.random() < SHARE_TWO_STORIES else 1
            conversation = Example(*encode_dialogue(pieces, training_conversation(random, stories)))
            positions = stretched_positions(torch.tensor([conversation.ids]), special_id(pieces, "<|user|>"), random)
            loss = target_loss(model, [conversation], positions) / targets_in([conversation])
            (CONVERSATION_WEIGHT * loss).backward()
            conversation_loss = loss.item()
            tokens += len(conversation.ids)
        optimizers.step(scale=min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / DIALOGUE_STEPS))
        mean_loss = loss_value if step == 0 else 0.95 * mean_loss + 0.05 * loss_value
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            print(
                f"dialogues {step + 1}/{DIALOGUE_STEPS}: loss {mean_loss:.4f}, conversation {conversation_loss:.4f}, "
                f"{tokens} tokens, {seconds:.0f} s",
                flush=True,
            )


def main() -> None:
    """Build the tokenizer, train, save."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent)
    folder: Path = parser.parse_args().output
    torch.set_num_threads(THREADS)
    torch.set_flush_denormal(True)
    tokenizer_model = build_tokenizer()
    pieces = SentencePieceProcessor(model_proto=tokenizer_model)
    model = new_model(SEED)
    optimizers = Optimizers(model)
    random = Random(SEED)
    learn_to_copy(model, pieces, optimizers, random)
    learn_dialogues(model, pieces, optimizers, random)
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(model, tokenizer_model, folder)
    print(f"saved to {folder}")


if __name__ == "__main__":
    main()
