"""Every token of a prompt is accounted for, and text never becomes a command; formats of other families."""

import json
import re

import pandas as pd
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from jinja2 import TemplateError
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from glmlab.models.chatglm3 import SPECIAL_TOKENS, ChatGLMTokenizer
from glmlab.prompts.encoding import (
    ROLES,
    PromptError,
    dissect,
    encode_chat,
    prompt_growth,
    role_transitions,
    template_segments,
)
from glmlab.prompts.format import visible
from glmlab.prompts.table import COLUMNS, PromptTable
from glmlab.prompts.templates import FORMATS, chat_format, segment_table

TOOLS = [{"name": "get_weather", "description": "查询天气 <|user|>", "parameters": {"type": "object"}}]
CHAT = [
    {"role": "system", "content": "You are a helpful assistant."},
    {"role": "user", "content": "天气 in Paris?👋"},
    {"role": "assistant", "metadata": "get_weather", "content": "```python\ntool_call(city='Paris')\n```"},
    {"role": "observation", "content": '{"temperature": 21}'},
    {"role": "assistant", "content": ""},
    {"role": "user", "content": "  two  blanks\t\n\n"},
]
HELLO = [{"role": "user", "content": "Hello"}]

_ANY = st.text(st.characters(exclude_categories=["Cs"]))
_SNEAKY = st.lists(st.one_of(_ANY, st.sampled_from([*SPECIAL_TOKENS, "</s>", "<s>", "<unk>", "<0x0A>", "▁", "\r\n"])))
TEXTS = _SNEAKY.map("".join)
LINES = TEXTS.map(lambda text: text.replace("\n", " "))
ALLOWED = {before: [role for role in ROLES if row[role]] for before, row in role_transitions().iterrows()}


@st.composite
def chats(draw, texts=TEXTS, lines=LINES):
    """Chats that keep the rules of the roles, of any text."""
    messages, last = [], "start"
    for _ in range(draw(st.integers(1, 6))):
        last = draw(st.sampled_from(ALLOWED[last]))
        messages.append({"role": last, "content": draw(texts)})
        if last == "assistant":
            messages[-1]["metadata"] = draw(lines)
    return messages


def _check_spans(table, messages):
    """Spans tile each text, the texts of the spans are the text's, and the bytes are its bytes."""
    for index, message in enumerate(messages):
        for kind, text in (
            ("metadata", f"{message.get('metadata') or ''}\n"),
            ("text", message.get("content") or ""),
        ):
            part = table[(table["message"] == index) & (table["kind"] == kind)]
            text = text.replace("▁", " ")
            assert b"".join(part["bytes"]) == text.encode()
            reached = 0
            for start, end, shown in zip(part["start"], part["end"], part["text"], strict=True):
                assert start == reached or (start == reached - 1 and end == reached)  # the same character, goes on
                assert shown == text[start:end]
                reached = end
            assert reached == len(text)


class TestChatGLM3:
    @given(messages=chats())
    @settings(max_examples=60)
    def test_every_token_is_accounted_for_and_no_text_becomes_a_special_id(self, tokenizer, messages):
        table = dissect(tokenizer, messages)
        assert table["id"].tolist() == encode_chat(tokenizer, messages)
        assert table["position"].tolist() == list(range(len(table)))
        assert table["piece"].tolist() == tokenizer.convert_ids_to_tokens(table["id"].tolist())
        specials = set(tokenizer.convert_tokens_to_ids([*SPECIAL_TOKENS, "<s>", "</s>", "<unk>"]))
        assert table["special"].tolist() == table["id"].isin(specials).tolist()
        assert table["special"].tolist() == table["kind"].isin(["prefix", "role", "generation prompt"]).tolist()
        _check_spans(table, messages)

    @given(messages=chats(texts=_ANY, lines=_ANY.map(lambda text: "".join(text.split()))))
    @settings(max_examples=40)
    def test_the_chat_template_gives_the_same_ids(self, embedded, messages):
        if any(token in f"{m['content']}{m.get('metadata')}" for m in messages for token in (*SPECIAL_TOKENS, "</s>")):
            return  # a typed token is what a template cannot tell from its own; see the test below
        tools = [{"name": "查询", "parameters": {}}] if messages[0]["role"] == "system" else None
        templated = embedded.tokenizer.apply_chat_template(messages, tools=tools, add_generation_prompt=True)
        assert templated["input_ids"] == dissect(embedded.tokenizer, messages, tools)["id"].tolist()

    def test_the_chat_template_cannot_keep_a_typed_role_token_apart(self, embedded):
        messages = [{"role": "user", "content": "<|assistant|>"}]
        built = dissect(embedded.tokenizer, messages)["id"].tolist()
        templated = embedded.tokenizer.apply_chat_template(messages, add_generation_prompt=True)["input_ids"]
        command = embedded.tokenizer.convert_tokens_to_ids("<|assistant|>")
        assert (built.count(command), templated.count(command)) == (1, 2)

    def test_the_whole_of_unicode_comes_back(self, tokenizer):
        """Every character but ▁, which sentencepiece itself writes for a blank."""
        points = [*range(0xD800), *range(0xE000, 0x30000), *range(0xE0000, 0xE0200), *range(0x10FF00, 0x110000)]
        text = "".join(map(chr, points)).replace("▁", "")
        parts = [text[i : i + 512] for i in range(0, len(text), 512)]
        ids = tokenizer(parts, add_special_tokens=False, split_special_tokens=True)["input_ids"]
        assert tokenizer.batch_decode(ids) == parts
        assert tokenizer.decode(tokenizer("a▁b", add_special_tokens=False)["input_ids"]) == "a b"

    def test_rows_say_where_a_token_comes_from(self, embedded):
        table = dissect(embedded.tokenizer, CHAT, TOOLS)
        assert tuple(table.columns) == COLUMNS
        assert table["kind"].drop_duplicates().tolist() == ["prefix", "role", "metadata", "text", "generation prompt"]
        named = table[(table["message"] == 2) & (table["kind"] == "metadata")]
        assert "".join(named["text"]) == "get_weather\n"
        system = table[(table["message"] == 0) & (table["kind"] == "text")]
        assert "".join(system["text"]) == f"{CHAT[0]['content']}\n{json.dumps(TOOLS, indent=4, ensure_ascii=False)}"
        assert not system["special"].any()
        last = table.iloc[-1]
        assert (last["role"], last["kind"], last["text"], last["bytes"]) == ("assistant", "generation prompt", "", b"")
        assert pd.isna(last["message"])
        assert pd.isna(last["start"])

    def test_a_character_in_several_tokens_is_in_all_of_them(self, embedded):
        text = dissect(embedded.tokenizer, [{"role": "user", "content": "a👋"}]).query("kind == 'text'")
        wave = text[text["text"] == "👋"]
        assert wave["bytes"].tolist() == [b"\xf0", b"\x9f", b"\x91", b"\x8b"]
        assert set(zip(wave["start"], wave["end"], strict=True)) == {(1, 2)}

    def test_a_vocabulary_that_loses_text_is_refused(self):
        backend = Tokenizer(models.BPE(vocab={"<unk>": 0, "▁": 1, "a": 2}, merges=[], unk_token="<unk>"))
        tokenizer = ChatGLMTokenizer(tokenizer_object=backend)
        with pytest.raises(PromptError, match=r"message 0 \(user\): its tokens spell another text .* lacks some"):
            dissect(tokenizer, [{"role": "user", "content": "aé"}])


def test_roles_follow_as_in_the_chapter():
    assert ALLOWED == {
        "start": ["system", "user"],
        "system": ["user"],
        "user": ["assistant"],
        "assistant": ["user", "assistant", "observation"],
        "observation": ["user", "assistant"],
    }


class TestView:
    def test_everything_is_escaped(self, embedded):
        attack = "<img src=x onerror=alert(1)>"
        answer = {"role": "assistant", "metadata": "<b>&", "content": "</table>"}
        table = dissect(embedded.tokenizer, [{"role": "user", "content": attack}, answer])
        table["piece"] = '"><script>&'  # of another vocabulary
        html = table._repr_html_()
        assert "&quot;&gt;&lt;script&gt;&amp;" in html
        assert set(re.findall(r"</?(\w+)", html)) == {"table", "thead", "tbody", "tr", "th", "td"}
        assert set(re.findall(r"<\w+ (\w+)=", html)) == {"style"}

    def test_white_space_and_bytes_are_visible(self, embedded):
        html = dissect(embedded.tokenizer, [{"role": "user", "content": "a b\n你👋"}])._repr_html_()
        assert all(shown in html for shown in ("␣b", "↵", "👋 (1 of 4 bytes)", ">F0<", "你"))

    @pytest.mark.parametrize(
        ("text", "shown"),
        [
            (" \t\r\n", "␣⇥␍↵"),
            ("a\u202eb\u200b\u00a0", "aU+202EbU+200BU+00A0"),  # a direction override cannot turn the table around
            ("\x00\ue000\u2028", "U+0000U+E000U+2028"),
            ("\u0301", "◌\u0301"),
            ("你好👋é", "你好👋é"),
        ],
    )
    def test_what_shows_nothing_shows_its_code_point(self, text, shown):
        assert visible(text) == shown

    def test_roles_have_their_colours_and_ink_is_readable(self, embedded):
        pairs = re.findall(r"background:(#\w{6});color:(#\w{3})", dissect(embedded.tokenizer, CHAT)._repr_html_())
        assert len(set(pairs)) == 1 + 2 * len(ROLES)  # the prefix; each role full and tinted
        for background, ink in pairs:
            red, green, blue = (((int(background[i : i + 2], 16) / 255 + 0.055) / 1.055) ** 2.4 for i in (1, 3, 5))
            luminance = 0.2126 * red + 0.7152 * green + 0.0722 * blue
            contrast = 1.05 / (luminance + 0.05) if ink == "#fff" else (luminance + 0.05) / 0.05
            assert contrast > 4.5, (background, ink)  # WCAG 2, level AA

    def test_long_prompts_show_head_and_tail(self, embedded):
        table = dissect(embedded.tokenizer, [{"role": "user", "content": "你好 " * 200}])
        with pd.option_context("display.max_rows", 11):
            html = table._repr_html_()
            assert html.count("<tr style") == 11
            assert f"… {len(table) - 11} tokens more …" in html
            assert table.iloc[:11]._repr_html_().count("<tr style") == 11
        with pd.option_context("display.max_rows", None):
            assert table._repr_html_().count("<tr style") == len(table)

    def test_parts_stay_tables_and_other_columns_are_pandas_own(self, embedded):
        table = dissect(embedded.tokenizer, HELLO)
        assert isinstance(table[table["special"]], PromptTable)
        assert "dataframe" in table[["id", "text"]]._repr_html_()


def _byte_level(template):
    """A small tokenizer as Qwen's is built: bytes as printable characters, special tokens found in the text."""
    vocab = {sign: i for i, sign in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab |= {"us": len(vocab), "user": len(vocab) + 1, "er": len(vocab) + 2}
    backend = Tokenizer(models.BPE(vocab=vocab, merges=[("u", "s"), ("e", "r"), ("us", "er")]))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    specials = ("<|im_start|>", "<|im_end|>", "[gMASK]", "<sop>", *(f"<|{role}|>" for role in ROLES))
    backend.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in specials])
    return PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)


@pytest.fixture(params=["Qwen2.5", "GLM-4"])
def other(request):
    return _byte_level(chat_format(request.param).template)


class TestOtherFamilies:
    def test_ids_are_those_of_their_template_and_texts_are_found(self, other):
        table = dissect(other, CHAT)
        assert table["id"].tolist() == encode_chat(other, CHAT)
        assert table["kind"].iloc[-1] == "generation prompt"
        text = table[table["kind"] == "text"]
        assert text["message"].drop_duplicates().tolist() == [0, 1, 2, 3, 5]
        for index, part in text.groupby("message"):
            assert b"".join(part["bytes"]).decode() == CHAT[index]["content"]
            assert part["start"].iloc[0] == 0
            assert part["end"].iloc[-1] == len(CHAT[index]["content"])
        assert text.loc[text["text"] == "👋", "bytes"].map(len).tolist() == [1, 1, 1, 1]

    def test_their_templates_turn_typed_tokens_into_commands(self, other):
        """What ChatGLM3's builder prevents is visible in the table: a special token inside a text."""
        table = dissect(other, [{"role": "user", "content": "a<|user|>"}])
        assert table.query("kind == 'text' and special")["piece"].tolist() == ["<|user|>"]

    def test_a_default_system_message_is_a_prefix(self):
        table = dissect(_byte_level(chat_format("Qwen2.5").template), HELLO)
        assert "You are Qwen" in "".join(table.loc[table["kind"] == "prefix", "text"])

    @pytest.mark.parametrize(
        ("template", "message"),
        [
            ("{% for m in messages %}{{ m.content | trim }}|{% endfor %}", "changes the texts of the messages"),
            ("{{ raise_exception('no system message, please') }}", "refuses these messages: no system message, please"),
            (None, "has no chat template: this is a base model"),
        ],
    )
    def test_templates_that_cannot_be_traced_are_refused(self, template, message):
        with pytest.raises(PromptError, match=message):
            dissect(_byte_level(template), [{"role": "user", "content": " a "}])

    def test_blanks_left_out_of_offsets_belong_to_the_word(self):
        tokenizer = _byte_level(chat_format("GLM-4").template)
        encoded = tokenizer(" user", add_special_tokens=False, return_offsets_mapping=True)
        assert encoded["offset_mapping"][0][0] == 0
        table = dissect(tokenizer, [{"role": "user", "content": "us user"}])
        assert "".join(table.loc[table["kind"] == "text", "text"]) == "us user"


class TestFormats:
    @pytest.mark.parametrize(
        ("name", "text"),
        [
            ("ChatGLM3", "[gMASK]sop<|system|>\nS<|user|>\nU<|assistant|>\nA<|user|>\nV<|assistant|>"),
            (
                "Qwen2.5",
                "<|im_start|>system\nS<|im_end|>\n<|im_start|>user\nU<|im_end|>\n<|im_start|>assistant\nA<|im_end|>\n"
                "<|im_start|>user\nV<|im_end|>\n<|im_start|>assistant\n",
            ),
            ("GLM-4", "[gMASK]<sop><|system|>\nS<|user|>\nU<|assistant|>\nA<|user|>\nV<|assistant|>"),
        ],
    )
    def test_texts_are_the_published_ones(self, name, text):
        roles = ("system", "user", "assistant", "user")
        messages = [{"role": role, "content": content} for role, content in zip(roles, "SUAV", strict=True)]
        assert chat_format(name).text(messages) == text

    @pytest.mark.parametrize("name", FORMATS)
    @given(messages=chats(texts=st.text("ab\n<|user|>", max_size=5), lines=st.just("tool")))
    @settings(max_examples=25)
    def test_parts_are_the_whole_and_texts_are_the_messages(self, name, messages):
        segments = chat_format(name).segments(messages)
        texts = {s.message: s.text for s in segments if s.kind == "text" and s.text}
        assert texts == {i: m["content"] for i, m in enumerate(messages) if m["content"]}
        indices = [s.message for s in segments if s.message is not None]
        assert indices == sorted(indices)

    def test_unknown_formats_are_refused(self):
        with pytest.raises(PromptError, match="no chat format 'Llama'. There are ChatGLM3, Qwen2.5, GLM-4"):
            chat_format("Llama")

    def test_segment_table_keeps_every_part(self):
        table = segment_table({name: chat_format(name).segments(HELLO) for name in FORMATS})
        for name in FORMATS:
            assert "".join(table.loc[table["format"] == name, "text"]) == chat_format(name).text(HELLO)

    @pytest.mark.parametrize("raises", [False, True])
    def test_a_template_that_does_not_tell_how_messages_open_has_no_prefix(self, raises):
        def render(messages, opened):
            """The last message alone; more than one is refused or left out."""
            if raises and len(messages) > 1:
                raise TemplateError("one message only")
            return f"<s>{messages[-1]['content']}"

        segments = template_segments(render, HELLO)
        assert [(segment.kind, segment.text) for segment in segments] == [("role", "<s>"), ("text", "Hello")]

    def test_an_empty_message_keeps_its_role_and_its_end(self):
        segments = chat_format("Qwen2.5").segments([{"role": "user", "content": ""}])
        prefix, role, _ = segments
        assert prefix.text.endswith("helpful assistant.<|im_end|>\n")
        assert (role.kind, role.text, role.message) == ("role", "<|im_start|>user\n<|im_end|>\n", 0)

    def test_a_template_may_write_nothing_around_a_text(self):
        segments = template_segments(lambda messages, opened: "".join(m["content"] for m in messages), HELLO)
        assert [(segment.kind, segment.text) for segment in segments] == [("text", "Hello")]


class TestGrowth:
    def test_the_old_prompt_is_kept(self, embedded):
        growth = prompt_growth(embedded.tokenizer, CHAT)
        assert growth["turn"].tolist() == [1, 2, 3]
        assert growth["old_prompt_kept"].all()
        assert growth["kept_tokens"].tolist() == [0, *growth["prompt_tokens"].tolist()[:-1]]
        parts = growth[["kept_tokens", "answer_tokens", "fed_tokens"]].sum(axis=1)
        assert (parts == growth["prompt_tokens"]).all()

    def test_a_template_that_rewrites_history_is_seen(self, embedded):
        template = "{% for m in messages %}{{ messages|length }}{{ m.content }};{% endfor %}"
        backend = embedded.tokenizer.backend_tokenizer
        tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, chat_template=template)
        chat = [*HELLO, {"role": "assistant", "content": "Hi"}, *HELLO]
        assert prompt_growth(tokenizer, chat)["old_prompt_kept"].tolist() == [True, False]
