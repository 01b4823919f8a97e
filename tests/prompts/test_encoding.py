"""Messages become the ids that ChatGLM3 was trained on."""

import json

import pytest
from transformers import AutoTokenizer, PreTrainedTokenizerFast

from glmlab.prompts.encoding import PromptError, chat_segments, dissect, encode_chat, encode_segments

USER = {"role": "user", "content": "Hello"}
ASSISTANT = {"role": "assistant", "content": "Hi"}
SYSTEM = {"role": "system", "content": "You are helpful."}
OBSERVATION = {"role": "observation", "content": "25"}
TOOLS = [{"name": "get_weather", "description": "查询天气", "parameters": {"type": "object"}}]


def test_golden_chats(published, shared_data):
    golden = json.loads((shared_data / "chatglm3-tokenizer" / "golden.json").read_text())
    for chat in golden["chat"]:
        assert encode_chat(published, chat["messages"]) == chat["ids"], chat["name"]
        assert dissect(published, chat["messages"])["id"].tolist() == chat["ids"], chat["name"]
        if chat["name"] != "injection":  # Jinja cannot tell a typed role token from one that the template writes
            templated = published.apply_chat_template(chat["messages"], add_generation_prompt=True)
            assert templated["input_ids"] == chat["ids"], chat["name"]


@pytest.mark.parametrize(
    ("messages", "tools"),
    [
        ([SYSTEM, USER, ASSISTANT, USER], None),
        ([SYSTEM, USER], TOOLS),
        ([SYSTEM, USER], []),
        ([USER, {**ASSISTANT, "metadata": "get_weather"}, OBSERVATION], None),
    ],
)
def test_a_template_that_a_checkpoint_brings_does_not_change_the_ids(checkpoint, embedded, messages, tools):
    settings = json.loads((checkpoint / "tokenizer_config.json").read_text())
    (checkpoint / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": "{{ messages }}"}))
    tokenizer = AutoTokenizer.from_pretrained(checkpoint)
    templated = tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
    assert templated["input_ids"] == encode_chat(embedded.tokenizer, messages, tools)


def test_tools_stand_in_the_system_message(embedded):
    ids = encode_chat(embedded.tokenizer, [SYSTEM, USER], TOOLS)
    assert ids == encode_chat(embedded.tokenizer, [{**SYSTEM, "tools": TOOLS}, USER])
    assert json.dumps(TOOLS, indent=4, ensure_ascii=False) in embedded.tokenizer.decode(ids)


def test_empty_texts_have_no_ids(embedded):
    segments = chat_segments([{"role": "user", "content": ""}])
    assert encode_segments(embedded.tokenizer, segments)[-2] == []


@pytest.mark.parametrize(
    ("messages", "tools", "message"),
    [
        ([], None, "no messages: a chat needs at least one"),
        ([{"role": "robot", "content": ""}], None, "message 0: role 'robot' is none of system, user, assistant"),
        ([USER, SYSTEM], None, r"message 1 \(system\): a system message may only come first"),
        ([USER, USER], None, r"message 1 \(user\): two user messages in a row"),
        ([ASSISTANT], None, r"message 0 \(assistant\): an assistant message needs a user message before it"),
        ([USER, OBSERVATION], None, r"message 1 \(observation\): an observation answers a tool call"),
        ([{"role": "user", "content": 3}], None, r"message 0 \(user\): content is int, not text"),
        ([USER, {**ASSISTANT, "metadata": "a\nb"}], None, r"message 1 \(assistant\): metadata must be one line"),
        ([{"role": "user", "content": "a\ud83d"}], None, r"message 0 \(user\): character 1 is half of a character"),
        ([SYSTEM, USER], ["\udc4b"], r"tools: character \d is half of a character .* Take it out"),
        ([USER], TOOLS, "tools are listed in the system message, but message 0 is not one"),
        ([SYSTEM, USER], [print], "the tools cannot be written as JSON"),
        ("Hello", None, "message 0 is str 'H', not a mapping. Give a list of messages such as"),
    ],
)
def test_rules_of_the_roles(embedded, messages, tools, message):
    with pytest.raises(PromptError, match=message):
        encode_chat(embedded.tokenizer, messages, tools)


class TestOtherFamilies:
    @staticmethod
    def _tokenizer(embedded, template):
        return PreTrainedTokenizerFast(tokenizer_object=embedded.tokenizer.backend_tokenizer, chat_template=template)

    def test_their_own_template_is_used(self, embedded):
        tokenizer = self._tokenizer(embedded, "{% for m in messages %}[{{ m.role }}]{{ m.content }}{% endfor %}")
        assert encode_chat(tokenizer, [USER]) == tokenizer("[user]Hello", add_special_tokens=False)["input_ids"]

    @pytest.mark.parametrize(
        ("template", "messages", "message"),
        [
            (None, [USER], "has no chat template: this is a base model"),
            ("{{ raise_exception('no users') }}", [USER], "the chat template refuses these messages: no users"),
            ("{{ messages[0].content + 1 }}", [USER], "template refuses these messages: can only concatenate str"),
            ("{{ messages }}", ["Hello"], "message 0 is str 'Hello', not a mapping"),
        ],
    )
    def test_what_a_template_refuses_is_said(self, embedded, template, messages, message):
        with pytest.raises(PromptError, match=message):
            encode_chat(self._tokenizer(embedded, template), messages)
