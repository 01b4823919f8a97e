"""The embedded model: its files are an original ChatGLM3 checkpoint, and it answers what its training never saw."""

import importlib
import json
import re
import sys
from random import Random
from types import SimpleNamespace

import pytest
from sentencepiece import SentencePieceProcessor

from glmlab.core.resources import data_path
from glmlab.models.checkpoints import read_safetensors_header
from glmlab.models.loading import load_model
from glmlab.prompts.encoding import encode_chat

FOLDER = data_path("tiny-chatglm3")
LARGEST_BYTES = 6_000_000
LONG_CONTEXT_TOKENS = 4000


@pytest.fixture(scope="module")
def recipe():
    """The recipe's modules, imported as its scripts import each other."""
    sys.path.insert(0, str(FOLDER / "recipe"))
    names = ("phrases", "chat_format", "dialogues", "evaluate")
    yield SimpleNamespace(**{name: importlib.import_module(name) for name in names})
    sys.path.remove(str(FOLDER / "recipe"))
    for name in names:
        del sys.modules[name]


# --------------------------------------------------------------------------------------------------------- files


def test_all_files_together_stay_small():
    files = [path for path in FOLDER.rglob("*") if path.is_file() and "__pycache__" not in path.parts]
    names = {"README.md", "config.json", "model.safetensors", "tokenizer.model", "tokenizer_config.json"}
    assert {path.name for path in files if path.parent == FOLDER} == names
    assert sum(path.stat().st_size for path in files) <= LARGEST_BYTES


def test_a_published_checkpoint_has_the_same_tensors(shared_data):
    def kinds(names):
        return {re.sub(r"layers\.\d+", "layers.N", name) for name in names}

    index = json.loads((shared_data / "reference-checkpoint" / "model.safetensors.index.json").read_text())
    header = read_safetensors_header(FOLDER / "model.safetensors")
    assert {tensor["dtype"] for tensor in header.values()} == {"F16"}
    computed_anew = {"transformer.rotary_pos_emb.inv_freq"}
    assert kinds(header) == kinds(index["weight_map"]) - computed_anew


def test_config_has_the_fields_of_chatglm3():
    config = json.loads((FOLDER / "config.json").read_text())
    published = json.loads(data_path("configs", "chatglm3-6b.json").read_text())
    assert set(published) - {"_name_or_path"} <= set(config)
    assert config["multi_query_group_num"] == 2
    same = ("add_qkv_bias", "rmsnorm", "original_rope", "multi_query_attention", "tie_word_embeddings", "seq_length")
    assert {name: config[name] for name in same} == {name: published[name] for name in same}


# -------------------------------------------------------------------------------------------- what was kept out


def test_no_exam_question_can_be_drawn_for_training(recipe):
    for language in recipe.phrases.LANGUAGES:
        kinds = (language.greeting, language.addition, language.term, language.weather, language.story_request)
        for phrasings in kinds:
            assert phrasings.test
            assert not set(phrasings.train) & set(phrasings.test)
        assert not set(language.cities) & set(language.test_cities)
        assert not set(language.names) & set(language.test_names)


def test_phrasings_that_differ_only_in_punctuation_are_one(recipe):
    with pytest.raises(ValueError, match=r"both trained and examined.*hithere"):
        recipe.phrases.Phrasings(train=("Hi there!",), test=("hi there", "Hello"))


def test_the_training_sampler_never_says_what_the_exam_asks(recipe):
    dialogues = recipe.dialogues
    random = Random(1)
    trained = [dialogues.training_dialogue(random) for _ in range(8000)]
    trained += [dialogues.training_conversation(random, stories=1) for _ in range(50)]
    said = {message["content"] for dialogue in trained for message in dialogue if message["role"] == "user"}
    examined = [dialogue for kept_out in dialogues.exam().values() for dialogue in kept_out]
    introductions = {phrasing for language in recipe.phrases.LANGUAGES for phrasing in language.name_question}
    asked = {message["content"] for dialogue in examined for message in dialogue if message["role"] == "user"}
    assert len(asked) > 1000
    assert not said & (asked - introductions)

    observations = [m["content"] for dialogue in trained for m in dialogue if m["role"] == "observation"]
    reported = {json.loads(observation)["temperature"] for observation in observations}
    assert len(reported) > 40
    assert not reported & set(dialogues.HELD_OUT_TEMPERATURES)


def test_the_recipe_encodes_dialogues_as_the_suite_does(embedded, recipe):
    pieces = SentencePieceProcessor(model_file=str(FOLDER / "tokenizer.model"))
    random = Random(2)
    for _ in range(30):
        dialogue = recipe.dialogues.training_dialogue(random)
        ids, is_target = recipe.chat_format.encode_dialogue(pieces, dialogue)
        assert ids[:-1] == encode_chat(embedded.tokenizer, dialogue, add_generation_prompt=False)
        assert len(is_target) == len(ids)
        assert ids[-1] == embedded.tokenizer.convert_tokens_to_ids("<|user|>")


# ------------------------------------------------------------------------------------------------------- answers


@pytest.mark.parametrize("code", ["zh", "en"])
@pytest.mark.parametrize(
    ("skill", "every", "least_right"),
    [
        ("greeting", 1, 0.6),  # five of them; a near tie can fall another way on another processor
        ("addition", 8, 0.9),
        ("term", 18, 0.8),
        ("tool_call", 2, 0.9),
        ("tool_answer", 2, 0.9),
        ("no_tool", 8, 0.75),
        ("name", 4, 0.8),
    ],
)
def test_answers_exactly_what_was_kept_out(skill, every, least_right, code, embedded, recipe):
    dialogues = recipe.dialogues.exam()[f"{skill}_{code}"][::every]
    assert recipe.evaluate.share_correct(embedded, dialogues) >= least_right


@pytest.mark.parametrize("code", ["zh", "en"])
def test_explains_every_term(code, embedded, recipe):
    """GIVEN one unseen question for each term, THEN a dozen or more are explained word for word."""
    language = next(language for language in recipe.phrases.LANGUAGES if language.code == code)
    dialogues = [
        recipe.dialogues.term_dialogue(language, language.term.test[0], key, term.names[0])
        for key, term in language.terms.items()
    ]
    assert recipe.evaluate.share_correct(embedded, dialogues) * len(dialogues) >= 12


def test_says_who_it_is(embedded, recipe):
    prompts = [[{"role": "user", "content": "你好"}], [{"role": "user", "content": "Hello"}]]
    chinese, english = recipe.evaluate.greedy_answers(embedded, prompts, 100)
    assert "你好" in embedded.tokenizer.decode(chinese)
    assert all("ChatGLM3-6B" in embedded.tokenizer.decode(ids) for ids in (chinese, english))


def test_calls_the_weather_tool_and_uses_what_it_reports(embedded, recipe):
    tool = recipe.dialogues.weather_tool(recipe.phrases.ZH)
    chat = [
        {"role": "system", "content": recipe.dialogues.TOOL_PROMPT, "tools": [tool]},
        {"role": "user", "content": "北京今天的天气怎么样？"},
    ]
    (call,) = recipe.evaluate.greedy_answers(embedded, [chat], 60)
    assert embedded.tokenizer.decode(call[:-1]).split("\n", 1)[0] == "get_weather"
    assert "```python\ntool_call(city='北京')\n```" in embedded.tokenizer.decode(call[:-1])
    assert embedded.tokenizer.convert_ids_to_tokens(call[-1]) == "<|observation|>"

    chat += [recipe.dialogues.weather_call("北京"), recipe.dialogues.weather_observation(19, "小雨")]
    (answer,) = recipe.evaluate.greedy_answers(embedded, [chat], 60)
    text = embedded.tokenizer.decode(answer[:-1])
    assert "北京" in text
    assert "19 度" in text
    assert "小雨" in text
    assert embedded.tokenizer.convert_ids_to_tokens(answer[-1]) == "<|user|>"


def test_keeps_a_story_going_and_ends_it(embedded, recipe):
    """GIVEN unseen requests, most of them naming a hero, THEN nearly all get 500 tokens about it and an end."""
    whole = recipe.evaluate.whole_stories(embedded, recipe.dialogues.story_requests()[::6])
    assert sum(whole) >= len(whole) - 1


def test_answers_far_into_a_long_conversation(embedded, recipe):
    """GIVEN a bilingual conversation past 4,000 tokens, THEN short answers stay right."""
    dialogues, evaluate = recipe.dialogues, recipe.evaluate
    zh, en = recipe.phrases.LANGUAGES
    history = dialogues.long_exam_conversation()
    assert len(encode_chat(embedded.tokenizer, history)) > LONG_CONTEXT_TOKENS
    random = Random(4)
    questions = [
        [*history, *exchange]
        for exchange in (
            dialogues.sum_dialogue(en.addition.test[0], 8, 7),
            dialogues.term_dialogue(zh, zh.term.test[0], "logits", "logits"),
            dialogues.weather(random, en, "test"),
        )
    ]
    right = sum(evaluate.share_correct(embedded, [question]) for question in questions)  # alone: no padding, faster
    assert right >= len(questions) - 1


@pytest.mark.parametrize("precision", ["bf16", "int4"])
def test_still_greets_in_smaller_precisions(precision, recipe):
    loaded = load_model("embedded", precision=precision, device="cpu")
    (ids,) = recipe.evaluate.greedy_answers(loaded, [[{"role": "user", "content": "你好"}]], 100)
    assert recipe.phrases.ZH.who_i_am[:20] in loaded.tokenizer.decode(ids)
