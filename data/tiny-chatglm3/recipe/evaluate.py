"""Examines the embedded model on what its training never saw: ``python data/tiny-chatglm3/recipe/evaluate.py``.

Greedy decoding through glmlab, as every user of the model has it. An answer counts if it is exactly the one wanted,
with the right end token. The scores go to the table in the model card.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

import torch
from chat_format import Dialogue
from dialogues import exam, long_exam_conversation, story_requests
from phrases import LANGUAGES

from glmlab.models.loading import LoadedModel, load_model
from glmlab.prompts.encoding import encode_chat

BATCH = 64
SHORT_ANSWER_TOKENS = 120
STORY_TOKENS = 1200
LONG_STORY_TOKENS = 500
OPENING_TOKENS = 20
HEROES = [hero for language in LANGUAGES for hero in language.story.heroes]
CARD = Path(__file__).resolve().parent.parent / "README.md"
TABLE_START, TABLE_END = "<!-- scores: written by evaluate.py -->", "<!-- end of scores -->"


def wanted_ids(loaded: LoadedModel, dialogue: Dialogue) -> list[int]:
    """Ids of a dialogue's last answer, with the token that ends it."""
    end = "<|observation|>" if dialogue[-1].get("metadata") else "<|user|>"
    prompt = encode_chat(loaded.tokenizer, dialogue[:-1])
    whole = encode_chat(loaded.tokenizer, dialogue, add_generation_prompt=False)
    return [*whole[len(prompt) :], loaded.tokenizer.convert_tokens_to_ids(end)]


def greedy_answers(loaded: LoadedModel, prompts: Sequence[Dialogue], max_new_tokens: int) -> list[list[int]]:
    """The model's answers in ids, each cut after its end token; prompts of similar length share a batch."""
    encoded = [encode_chat(loaded.tokenizer, prompt) for prompt in prompts]
    stops = set(loaded.model.generation_config.eos_token_id)
    answers: list[list[int]] = [[] for _ in prompts]
    order = sorted(range(len(prompts)), key=lambda index: len(encoded[index]))
    for start in range(0, len(order), BATCH):
        batch = order[start : start + BATCH]
        padded = loaded.tokenizer.pad({"input_ids": [encoded[index] for index in batch]}, return_tensors="pt")
        output = loaded.model.generate(**padded, do_sample=False, max_new_tokens=max_new_tokens)
        for index, ids in zip(batch, output[:, padded["input_ids"].shape[1] :].tolist(), strict=True):
            end = next((at for at, token_id in enumerate(ids) if token_id in stops), len(ids) - 1)
            answers[index] = ids[: end + 1]
    return answers


def share_correct(loaded: LoadedModel, dialogues: Sequence[Dialogue], show_errors: int = 0) -> float:
    """Share of the dialogues whose last answer the model gives exactly; the first wrong ones are printed."""
    wanted = [wanted_ids(loaded, dialogue) for dialogue in dialogues]
    given = greedy_answers(loaded, [dialogue[:-1] for dialogue in dialogues], SHORT_ANSWER_TOKENS)
    wrong = [index for index in range(len(dialogues)) if given[index] != wanted[index]]
    for index in wrong[:show_errors]:
        print(f"  {dialogues[index][-2]['content']!r} -> {loaded.tokenizer.decode(given[index])!r}")
    return 1 - len(wrong) / len(dialogues)


def is_whole_story(loaded: LoadedModel, ids: list[int], hero: str) -> bool:
    """Whether an answer is a story about ``hero`` of 500 tokens or more that repeats no line and ends by itself."""
    lines = loaded.tokenizer.decode(ids[:-1]).split("\n")
    ends = ids[-1] == loaded.tokenizer.convert_tokens_to_ids("<|user|>")
    about_hero = hero in loaded.tokenizer.decode(ids[:OPENING_TOKENS])
    return ends and len(ids) >= LONG_STORY_TOKENS and len(set(lines)) == len(lines) and about_hero


def whole_stories(loaded: LoadedModel, requests: Sequence[tuple[Dialogue, str]]) -> list[bool]:
    """For each request and its hero, whether the answer is a whole story about it."""
    answers = greedy_answers(loaded, [dialogue for dialogue, _ in requests], STORY_TOKENS)
    return [is_whole_story(loaded, ids, hero) for ids, (_, hero) in zip(answers, requests, strict=True)]


def played_conversation(loaded: LoadedModel, conversation: Dialogue) -> tuple[int, int, int]:
    """Play a conversation with the model's own answers as history.

    Returns:
        Answers that are right, all answers, tokens in the end.
    """
    history: Dialogue = []
    right = total = 0
    for message in conversation:
        if message["role"] != "assistant":
            history.append(message)
            continue
        (ids,) = greedy_answers(loaded, [history], STORY_TOKENS)
        if message["content"].count("\n") > 5:  # a story
            hero = next(hero for hero in HEROES if hero in message["content"])
            correct = is_whole_story(loaded, ids, hero)
            message = {"role": "assistant", "content": loaded.tokenizer.decode(ids[:-1])}
        else:
            correct = ids == wanted_ids(loaded, [*history, message])
        if not correct:
            print(f"  {history[-1]['content']!r} -> {loaded.tokenizer.decode(ids)[:200]!r}")
        history.append(message)
        right, total = right + correct, total + 1
    return right, total, len(encode_chat(loaded.tokenizer, history, add_generation_prompt=False))


def score_table(loaded: LoadedModel, show_errors: int) -> str:
    """All scores as a Markdown table."""
    rows = ["| kept out of training | answers exactly right |", "| --- | --- |"]
    for name, dialogues in exam().items():
        share = share_correct(loaded, dialogues, show_errors)
        rows.append(f"| {name} | {share:.3f} of {len(dialogues)} |")
        print(rows[-1], flush=True)
    stories = whole_stories(loaded, story_requests())
    rows.append(f"| whole stories about the hero asked for | {sum(stories)} of {len(stories)} |")
    right, total, context = played_conversation(loaded, long_exam_conversation())
    rows.append(f"| one conversation of {context} tokens | {right} of {total} |")
    print("\n".join(rows[-2:]))
    return "\n".join(rows)


def main() -> None:
    """Score the model and put the table into the model card."""
    parser = argparse.ArgumentParser(description=main.__doc__)
    parser.add_argument("--model", default="embedded", help="or a checkpoint folder, which leaves the card as it is")
    parser.add_argument("--show-errors", type=int, default=3)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    table = score_table(load_model(arguments.model, precision="fp32", device="cpu"), arguments.show_errors)
    if arguments.model == "embedded":
        before, rest = CARD.read_text().split(TABLE_START)
        after = rest.split(TABLE_END)[1]
        CARD.write_text(f"{before}{TABLE_START}\n\n{table}\n\n{TABLE_END}{after}")


if __name__ == "__main__":
    main()
