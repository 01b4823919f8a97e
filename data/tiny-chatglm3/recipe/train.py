"""Trains the embedded model from scratch and writes its checkpoint: ``python data/tiny-chatglm3/recipe/train.py``.

Three phases, fixed step counts and seeds, two cores, fp32:

1. copy: random pieces, said again. Attention heads that copy form here; without this phase, names and cities that
   the model has never seen are not copied later.
2. dialogues: each step reads short dialogues, extra sums, some more copying and, every third step, one long
   conversation of stories and other exchanges. Learning rates fall linearly to zero.
3. conversations: each step reads two longer conversations, one with a single story and a few short dialogues, so
   that answers stay right thousands of tokens into a chat. It starts from the saved checkpoint, so it can be run
   alone: ``--only-phase-3``.

Only answers, and the token that ends them, are targets. Layer matrices are trained with Muon, the rest with AdamW.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from random import Random

import torch
import torch.nn.functional as F
from build_tokenizer import build_tokenizer
from chat_format import Dialogue, encode_dialogue, special_id
from checkpoint import load_weights, new_model, save_checkpoint
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
COPIES_A_STEP = 4
STEPS_A_CONVERSATION = 3  # a long conversation every so many steps
STORIES = (1, 2, 2, 3)  # in a long conversation: one of these
STORY_FROM_TOKENS = 300  # an answer this long is a story
STORY_WEIGHT = 0.15  # of a story's target beside any other: there are many, and they are easy
LARGEST_POSITION = 7000
CONVERSATION_STEPS = 180  # phase 3
CONVERSATION_RATE = 0.4  # of the learning rates, at the start of phase 3
LONGER_STORIES = (2, 3, 3, 4)
STORY_OPENING_TOKENS = 60  # in phase 3 they weigh as any other target: they decide whom the story is about
DIALOGUES_BESIDE = 10
SUMS_BESIDE = 10
MUON_RATE = 0.02
ADAMW_RATE = 3e-3
FIRST_PIECE = 3  # after <unk>, <s>, </s>


@dataclass(frozen=True)
class Example:
    """Token ids, and what each weighs in the loss as a target (0: it is none)."""

    ids: list[int]
    weights: list[float]


@dataclass(frozen=True)
class Batch:
    """Examples that are computed together; their positions, where those are not simply 0, 1, 2 and so on."""

    examples: list[Example]
    positions: Tensor | None = None  # (examples, tokens)


class Gradients:
    """Computes the batches of a step side by side, one thread for each core.

    Each batch is computed by one thread and the gradients are added in the order of the batches, so the sum does not
    depend on the number of threads or on which is done first.
    """

    def __init__(self, model: GlmForCausalLM) -> None:
        self._model = model
        self._parameters = list(model.parameters())
        self._threads = ThreadPoolExecutor(THREADS, initializer=_compute_in_one_thread)

    def __call__(self, batches: list[Batch]) -> float:
        """Set the parameters' gradients of the mean loss over all batches' targets; returns that loss."""
        weight = sum(sum(example.weights) for batch in batches for example in batch.examples)
        results = self._threads.map(lambda batch: self._of(batch, weight), batches)
        total = 0.0
        for loss, gradients in results:
            total += loss
            for parameter, gradient in zip(self._parameters, gradients, strict=True):
                parameter.grad = gradient if parameter.grad is None else parameter.grad.add_(gradient)
        return total

    def _of(self, batch: Batch, weight: float) -> tuple[float, tuple[Tensor, ...]]:
        loss = target_loss(self._model, batch) / weight
        return loss.item(), torch.autograd.grad(loss, self._parameters)


def _compute_in_one_thread() -> None:
    """Settings that PyTorch keeps for each thread."""
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)


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
    return Example(ids, [0.0] * (length + 2) + [1.0] * length)


def dialogue_example(pieces: SentencePieceProcessor, dialogue: Dialogue, opening_tokens: int = 0) -> Example:
    """A dialogue's ids; answers and their end tokens are targets, a story's after its opening with less weight."""
    ids, is_target = encode_dialogue(pieces, dialogue)
    weights: list[float] = []
    for target, run in groupby(is_target):
        length = len(list(run))
        if target and length >= STORY_FROM_TOKENS:
            weights += [1.0] * opening_tokens + [STORY_WEIGHT] * (length - opening_tokens)
        else:
            weights += [1.0 if target else 0.0] * length
    return Example(ids, weights)


def short_examples(
    pieces: SentencePieceProcessor, random: Random, n_dialogues: int, n_sums: int, n_copies: int
) -> list[Example]:
    """Short dialogues, sums and copies."""
    dialogues = [training_dialogue(random) for _ in range(n_dialogues)]
    dialogues += [addition(random, random.choice(LANGUAGES), "train") for _ in range(n_sums)]
    copies = [copy_example(pieces, random, random.choice((4, 8, 12))) for _ in range(n_copies)]
    return [dialogue_example(pieces, dialogue) for dialogue in dialogues] + copies


def batches_by_length(examples: list[Example]) -> list[Batch]:
    """The examples in batches of similar length, so that little is computed on padding; the longest first."""
    batches: list[Batch] = []
    group: list[Example] = []
    for example in sorted(examples, key=lambda example: len(example.ids), reverse=True):
        if group and 1.4 * len(example.ids) + 16 < len(group[0].ids):
            batches.append(Batch(group))
            group = []
        group.append(example)
    return [*batches, Batch(group)]


def stretched_positions(ids: list[int], new_turn: int, random: Random) -> Tensor | None:
    """For half of the conversations, positions that jump ahead at three turns; (1, tokens).

    Rotary embeddings see only differences of positions. A gap stands for turns that were not computed, so that the
    distances of long chats are met in shorter ones.
    """
    if random.random() < 0.5:
        return None
    gaps = torch.zeros(len(ids), dtype=torch.long)
    turns = [at for at, token_id in enumerate(ids) if token_id == new_turn]
    for turn in random.sample(turns, k=min(3, len(turns))):
        gaps[turn] = random.randrange((LARGEST_POSITION - len(ids)) // 3)
    return (torch.arange(len(ids)) + gaps.cumsum(0))[None]


def target_loss(model: GlmForCausalLM, batch: Batch) -> Tensor:
    """Weighted sum of the cross-entropies of the batch's targets."""
    examples, positions = batch.examples, batch.positions
    width = max(len(example.ids) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)  # (examples, tokens), padded on the right
    weights = torch.zeros(len(examples), width)
    for row, example in enumerate(examples):
        ids[row, : len(example.ids)] = torch.tensor(example.ids)
        weights[row, : len(example.weights)] = torch.tensor(example.weights)
    hidden = model.model(
        input_ids=ids[:, :-1],
        # all ones: padding on the right needs no mask, and without one a gap in the positions would cut the sequence
        attention_mask=torch.ones_like(ids[:, :-1]),
        position_ids=None if positions is None else positions[:, :-1],
        use_cache=False,
    ).last_hidden_state  # (examples, tokens - 1, hidden)
    is_target = weights[:, 1:] > 0
    logits = model.lm_head(hidden[is_target])  # (targets, vocabulary)
    losses = F.cross_entropy(logits, ids[:, 1:][is_target], reduction="none")
    return (losses * weights[:, 1:][is_target]).sum()


def learn_to_copy(pieces: SentencePieceProcessor, gradients: Gradients, optimizers: Optimizers, random: Random) -> None:
    """Phase 1."""
    for step in range(COPY_STEPS):
        length = random.choice((4, 6, 8, 10, 12, 16))
        halves = [[copy_example(pieces, random, length) for _ in range(192 // length)] for _ in range(2)]
        loss = gradients([Batch(half) for half in halves])
        optimizers.step(scale=min(1.0, (step + 1) / WARM_UP_STEPS))
        if (step + 1) % 50 == 0:
            print(f"copy {step + 1}/{COPY_STEPS}: loss {loss:.3f}", flush=True)


def learn_dialogues(
    pieces: SentencePieceProcessor, gradients: Gradients, optimizers: Optimizers, random: Random
) -> None:
    """Phase 2."""
    started = time.monotonic()
    tokens, mean_loss = 0, 0.0
    for step in range(DIALOGUE_STEPS):
        batches = batches_by_length(short_examples(pieces, random, DIALOGUES_A_STEP, SUMS_A_STEP, COPIES_A_STEP))
        if step % STEPS_A_CONVERSATION == 0:
            conversation = dialogue_example(pieces, training_conversation(random, random.choice(STORIES)))
            positions = stretched_positions(conversation.ids, special_id(pieces, "<|user|>"), random)
            batches.insert(0, Batch([conversation], positions))
        loss = gradients(batches)
        optimizers.step(scale=min(1.0, (step + 1) / WARM_UP_STEPS) * (1 - step / DIALOGUE_STEPS))
        tokens += sum(len(example.ids) for batch in batches for example in batch.examples)
        mean_loss = loss if step == 0 else 0.95 * mean_loss + 0.05 * loss
        if (step + 1) % 50 == 0:
            seconds = time.monotonic() - started
            print(
                f"dialogues {step + 1}/{DIALOGUE_STEPS}: loss {mean_loss:.4f}, {tokens} tokens, {seconds:.0f} s",
                flush=True,
            )


def learn_conversations(
    pieces: SentencePieceProcessor, gradients: Gradients, optimizers: Optimizers, random: Random
) -> None:
    """Phase 3."""
    mean_loss = 0.0
    for step in range(CONVERSATION_STEPS):
        conversations = [
            dialogue_example(pieces, training_conversation(random, stories), STORY_OPENING_TOKENS)
            for stories in (random.choice(LONGER_STORIES), random.choice(LONGER_STORIES), 1)
        ]
        batches = [Batch([conversation]) for conversation in conversations]
        batches += batches_by_length(short_examples(pieces, random, DIALOGUES_BESIDE, SUMS_BESIDE, COPIES_A_STEP))
        loss = gradients(batches)
        warm_up = min(1.0, (step + 1) / WARM_UP_STEPS)
        optimizers.step(scale=CONVERSATION_RATE * warm_up * (1 - step / CONVERSATION_STEPS))
        mean_loss = loss if step == 0 else 0.9 * mean_loss + 0.1 * loss
        if (step + 1) % 10 == 0:
            print(f"conversations {step + 1}/{CONVERSATION_STEPS}: loss {mean_loss:.4f}", flush=True)


def main() -> None:
    """Build the tokenizer, train, save."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--output", type=Path, default=Path(__file__).resolve().parent.parent)
    parser.add_argument("--only-phase-3", action="store_true", help="go on from the checkpoint in the output folder")
    arguments = parser.parse_args()
    folder: Path = arguments.output
    folder.mkdir(parents=True, exist_ok=True)
    _compute_in_one_thread()
    tokenizer_model = build_tokenizer()
    pieces = SentencePieceProcessor(model_proto=tokenizer_model)
    model = new_model(SEED)

    if not arguments.only_phase_3:
        gradients, optimizers, random = Gradients(model), Optimizers(model), Random(SEED)
        learn_to_copy(pieces, gradients, optimizers, random)
        learn_dialogues(pieces, gradients, optimizers, random)
        save_checkpoint(model, tokenizer_model, folder)

    load_weights(model, folder)  # rounded to fp16, as a run of phase 3 alone finds them
    learn_conversations(pieces, Gradients(model), Optimizers(model), Random(SEED + 1))
    save_checkpoint(model, tokenizer_model, folder)
    print(f"saved to {folder}")


if __name__ == "__main__":
    main()
