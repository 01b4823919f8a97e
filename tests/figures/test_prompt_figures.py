"""Figures of prompts: every token has its chip, and every character is drawn or named."""

from pathlib import Path

import pytest
from matplotlib import font_manager, ft2font
from matplotlib.colors import to_hex
from matplotlib.patches import FancyArrowPatch

from glmlab.core.resources import data_path
from glmlab.figures import FigureError, format_figure, growth_figure, prompt_figure, roles_figure
from glmlab.figures.labels import printable
from glmlab.figures.style import CJK_FAMILY, register_cjk_font
from glmlab.prompts.encoding import dissect, prompt_growth, role_transitions
from glmlab.prompts.format import ROLE_COLORS
from glmlab.prompts.templates import FORMATS, chat_format, segment_table
from glmlab.suite.doctor import examine

CHECKOUT = Path(__file__).resolve().parents[2]
CHAT = [
    {"role": "system", "content": "$x_1$ is <b> & 顯存"},
    {"role": "user", "content": "你好👋 龘"},
    {"role": "assistant", "metadata": "get_weather", "content": "ok"},
    {"role": "observation", "content": "25"},
]


def _texts(axes) -> list[str]:
    return [text.get_text() for text in axes.texts]


class TestFont:
    def test_it_covers_the_chinese_of_the_suite(self):
        """Notebooks, conversations, translations, the embedded model's vocabulary: whatever could stand in a figure."""
        from sentencepiece import SentencePieceProcessor

        patterns = ("notebooks/*.ipynb", "data/conversations/*.json", "data/locale/**/*.po")
        files = [path for pattern in patterns for path in CHECKOUT.glob(pattern)]
        text = "".join(path.read_text(encoding="utf-8") for path in files)
        model = SentencePieceProcessor(model_file=str(data_path("tiny-chatglm3", "tokenizer.model")))
        text += "".join(model.id_to_piece(i) for i in range(model.vocab_size()))
        chinese = {
            character for character in text if "\u3000" < character <= "\u9fff" or "\uff00" < character <= "\uffef"
        }
        assert len(chinese) > 100
        missing = {character for character in chinese if printable(character) != character}
        assert missing == set(), "add them to data/fonts/characters.txt and run data/fonts/build_subset.py"

    def test_it_is_what_its_list_says(self):
        listed = set("".join(data_path("fonts", "characters.txt").read_text(encoding="utf-8").split()))
        charmap = ft2font.FT2Font(register_cjk_font()).get_charmap()
        assert {chr(code) for code in charmap} == listed
        assert register_cjk_font().stat().st_size < 300 * 1024
        assert "SIL OPEN FONT LICENSE Version 1.1" in data_path("fonts", "OFL.txt").read_text(encoding="utf-8")

    def test_it_is_registered_once_and_the_doctor_says_so(self, monkeypatch):
        register_cjk_font()
        entries = [font.weight for font in font_manager.fontManager.ttflist if font.name == CJK_FAMILY]
        assert sorted(entries) == [400, 700]
        (finding,) = [finding for finding in examine() if finding.what == "CJK font"]
        assert finding.good
        count = len("".join(data_path("fonts", "characters.txt").read_text(encoding="utf-8").split()))
        assert finding.found.startswith(f"{CJK_FAMILY} (bundled), {count:,} characters")
        monkeypatch.setattr("glmlab.figures.style.CJK_FAMILY", "No Such Family")
        (finding,) = [finding for finding in examine() if finding.what == "CJK font"]
        assert not finding.good
        assert "Figures cannot draw Chinese" in finding.follows


class TestPromptFigure:
    @pytest.fixture
    def table(self, embedded):
        return dissect(embedded.tokenizer, CHAT)

    def test_every_token_has_a_chip_and_its_id(self, table):
        axes = prompt_figure(table).axes[0]
        assert len(axes.patches) == len(table)
        shown = _texts(axes)
        assert [text for text in shown if text in set(map(str, table["id"]))] == list(map(str, table["id"]))
        assert {"prefix", "system", "user", "assistant", "observation", "answer"} <= set(shown)
        assert {"<0xF0>", "∅"} <= set(shown)
        assert "<|observation|>" in shown

    def test_chips_have_their_roles_colour_and_stay_on_the_page(self, table):
        figure = prompt_figure(table)
        axes = figure.axes[0]
        assert [to_hex(chip.get_facecolor()) for chip in axes.patches] == [ROLE_COLORS[role] for role in table["role"]]
        width, height = figure.get_size_inches()
        for chip in axes.patches:
            assert chip.get_x() >= 0
            assert chip.get_x() + chip.get_width() <= width
            assert chip.get_y() + chip.get_height() <= height
        for one, other in zip(axes.patches, axes.patches[1:], strict=False):
            assert other.get_y() > one.get_y() or other.get_x() >= one.get_x() + one.get_width()

    def test_a_long_prompt_is_refused(self, embedded):
        table = dissect(embedded.tokenizer, [{"role": "user", "content": "a b " * 300}])
        with pytest.raises(FigureError, match=r"\d+ tokens cannot be drawn: a figure shows 1 to 400"):
            prompt_figure(table)
        assert len(prompt_figure(table.head(400)).axes[0].patches) == 400


class TestFormatFigure:
    def test_each_column_holds_the_whole_text(self):
        segments = {name: chat_format(name).segments(CHAT) for name in FORMATS}
        figure = format_figure(segment_table(segments))
        shown = "".join(text for text in _texts(figure.axes[0]) if text not in FORMATS)
        assert shown == "".join(printable(chat_format(name).text(CHAT)) for name in FORMATS)
        assert f"GLM-4: {chat_format('GLM-4').text(CHAT)!r}" in figure.alt_text

    def test_lines_stay_in_their_column(self):
        long = [{"role": "user", "content": "one two three " * 20 + "x" * 200 + "\n\n" + "你好" * 60}]
        figure = format_figure(segment_table({name: chat_format(name).segments(long) for name in FORMATS}))
        width, height = figure.get_size_inches()
        column = width / len(FORMATS)
        for patch in figure.axes[0].patches:
            left = int(patch.get_x() // column) * column
            assert patch.get_x() + patch.get_width() <= left + column
            assert patch.get_y() + patch.get_height() < height


def test_roles_figure_shows_the_rules():
    figure = roles_figure(role_transitions())
    assert _texts(figure.axes[0]) == ["start", "system", "user", "assistant", "observation"]
    assert sum(isinstance(patch, FancyArrowPatch) for patch in figure.axes[0].patches) == 9
    assert "After observation: user, assistant." in figure.alt_text


def test_bars_of_growth_add_up_to_the_prompts(embedded):
    growth = prompt_growth(embedded.tokenizer, [*CHAT, {"role": "assistant", "content": "25 °C"}])
    axes = growth_figure(growth).axes[0]
    ends = [bar.get_x() + bar.get_width() for bar in axes.containers[-1]]
    assert ends == growth["prompt_tokens"].tolist()
