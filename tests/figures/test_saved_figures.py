"""Every figure of data/figures, drawn again from its csv and json: glyphs, sizes, contrast, words; and bad files."""

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from hypothesis import given
from hypothesis import strategies as st
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image
from pypdf import PdfReader

from glmlab.core.resources import data_path
from glmlab.figures import FORMATS, FigureError, decode_strip, figure_settings, read_figure, redraw, save_figure
from glmlab.figures.labels import luminance
from glmlab.figures.saving import FUNCTIONS, _csv, _read_table, find_figures, saved_figures
from glmlab.figures.style import STYLES, FigureSettings, SuiteFigure, parse_width

ROOT = Path(__file__).resolve().parents[2]
FOLDER = data_path("figures")
NAMES = saved_figures(FOLDER)
COLUMN_MM = 86.0
"""Width of a column of a journal."""

WIDER = ("class_hierarchy", "original_hierarchy", "module_tree")
"""Figures that need more than a column for letters of 6 pt."""

UNTRANSLATED = {
    "B",
    "MiB",
    "KiB",
    "ms",
    "bits",
    "token",
    "tokens",
    "KV",
    "CUDA",
    "CPU",
    "GPU",
    "GiB",
    "nn",
    "PyTorch",
    "Auto",
    "U",
}
"""Units and names that are the same in both languages."""


@cache
def drawn(name: str, lang: str = "en", width_mm: float | None = None, style: str = "paper") -> SuiteFigure:
    with figure_settings(lang=lang, width_mm=width_mm, style=style):
        figure, _ = read_figure(FOLDER / name)
    figure.draw_without_rendering()  # a missing glyph is a warning, and warnings are errors here
    return figure


def shown_texts(figure: SuiteFigure) -> list[Text]:
    """Every text that is drawn: not the labels of ticks outside of what an axis shows."""
    shown: list[Text] = []

    def draw(text: Text, renderer: object) -> None:
        if text.get_visible() and text.get_text().strip():
            shown.append(text)

    with patch.object(Text, "draw", draw):
        figure.draw_without_rendering()
    return shown


@pytest.fixture(params=NAMES)
def name(request) -> str:
    return request.param


class TestEveryFigure:
    @pytest.mark.parametrize(("lang", "width_mm"), [("en", None), ("en", COLUMN_MM), ("zh", COLUMN_MM)])
    def test_every_letter_has_a_glyph_six_points_and_a_place_inside(self, name, lang, width_mm):
        figure = drawn(name, lang, width_mm)
        width, height = figure.bbox.size
        for text in shown_texts(figure):
            assert text.get_fontsize() >= 6 - 1e-6
            box = text.get_window_extent()
            assert min(box.x0, box.y0) >= -1, text
            assert (box.x1 <= width + 1, box.y1 <= height + 1) == (True, True), text

    def test_texts_contrast_with_what_is_behind_them(self, name):
        """At least 4.5:1 (WCAG AA) over nine tenths of the pixels behind a text; a line may cross the rest."""
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        figure = drawn(name)
        texts = shown_texts(figure)
        boxes = [text.get_window_extent() for text in texts]
        for text in texts:
            text.set_alpha(0)  # hidden, it would take no room, and the panels would grow
        try:
            canvas = FigureCanvasAgg(figure)
            canvas.draw()
            behind = np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255
        finally:
            for text in texts:
                text.set_alpha(None)
        for text, box in zip(texts, boxes, strict=True):
            x0, x1 = (int(np.clip(x, 0, behind.shape[1])) for x in (box.x0, box.x1 + 1))
            y0, y1 = (int(np.clip(y, 0, behind.shape[0])) for y in (box.y0, box.y1 + 1))
            found, counts = np.unique(behind[y0:y1, x0:x1].reshape(-1, 3).round(2), axis=0, return_counts=True)
            ink = luminance(to_rgb(text.get_color()))
            grounds = np.array([luminance(tuple(pixel)) for pixel in found])
            contrast = (np.maximum(grounds, ink) + 0.05) / (np.minimum(grounds, ink) + 0.05)
            assert counts[contrast >= 4.5].sum() >= 0.9 * counts.sum(), f"{text.get_text()!r}: {contrast.min():.1f}"

    def test_no_label_is_left_in_english(self, name):
        """A text with the same words in both languages is data, a number or a name."""
        figures = [drawn(name, lang, COLUMN_MM) for lang in ("en", "zh")]
        english, chinese = ({text.get_text() for text in shown_texts(figure)} for figure in figures)
        table, arguments = figures[0].table, figures[0].arguments
        data = [*table.columns, *table.to_numpy().ravel(), *arguments.values()]
        known = set(re.findall(r"[A-Za-z]+", " ".join(map(str, data)))) | UNTRANSLATED
        for text in english & chinese:
            piece_of_a_token = re.search(r"U\+|[▁␣↵<|\[{}\"'`]", text)
            assert piece_of_a_token or set(re.findall(r"[A-Za-z]+", text)) <= known, text

    def test_captions_and_alternative_texts_speak_the_language(self, name):
        for lang in ("en", "zh"):
            figure = drawn(name, lang, COLUMN_MM)
            of_data = set(figure.table.to_csv())
            for text in (figure.caption, figure.alt_text):
                assert len(text) > 15
                own = "".join(character for character in text if character not in of_data)
                assert bool(re.search("[\u4e00-\u9fff]", own)) == (lang == "zh"), text

    def test_drawn_again_it_has_the_same_data_and_is_as_wide_as_asked_or_says_so(self, name, tmp_path):
        settings = FigureSettings(width_mm=COLUMN_MM)
        (line,) = redraw(FOLDER, tmp_path, [name], formats=[], settings=settings)
        assert (tmp_path / f"{name}.csv").read_bytes() == (FOLDER / f"{name}.csv").read_bytes()
        before, after = (json.loads((folder / f"{name}.json").read_text()) for folder in (FOLDER, tmp_path))
        assert after == before, "figures of data/figures are those of a run of the notebooks: make refresh"
        why = " (86 mm asked: narrower, its letters would be too small)" if name in WIDER else ""
        width_mm = re.fullmatch(rf"{name}: (\d+) mm{re.escape(why)}", line)[1]
        assert (width_mm == "86") == (name not in WIDER)
        assert f"- size: {width_mm} mm x" in (tmp_path / f"{name}.md").read_text()


def test_they_are_those_of_the_notebooks_and_show_every_function():
    notebooks = "".join(path.read_text(encoding="utf-8") for path in sorted((ROOT / "notebooks").glob("0*.ipynb")))
    assert set(re.findall(r'Path\(output\) / \\"(\w+)\\"', notebooks)) == set(NAMES)
    assert {json.loads((FOLDER / f"{name}.json").read_text())["function"] for name in NAMES} == set(FUNCTIONS)
    files = [file for suffix in ("csv", "json") for file in FOLDER.glob(f"*.{suffix}")]
    assert sum(file.stat().st_size for file in files) < 600_000
    for file in files:
        assert not re.search(r"/(home|root|tmp|work|Users)/", file.read_text(encoding="utf-8")), "the path of a machine"


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    list(redraw(FOLDER, folder, ["prompt_growth"], settings=FigureSettings(lang="zh")))
    return folder


class TestFiles:
    def test_each_has_pictures_data_provenance_and_words(self, folder):
        assert {path.suffix[1:] for path in folder.iterdir()} == {*FORMATS, "csv", "json", "md"}
        figure = drawn("prompt_growth", "zh")
        told = json.loads((folder / "prompt_growth.json").read_text())
        assert (told["function"], told["arguments"]) == ("growth_figure", {})
        assert (told["caption"], told["alternative_text"]) == (figure.caption, figure.alt_text)
        words = (folder / "prompt_growth.md").read_text()
        assert figure.caption in words
        assert figure.alt_text in words
        assert "- model: embedded" in words

    def test_every_picture_describes_itself(self, folder):
        alt_text = drawn("prompt_growth", "zh").alt_text
        svg = (folder / "prompt_growth.svg").read_text()
        assert '<svg role="img" lang="zh-Hant" ' in svg
        assert "<title>prompt_growth</title>" in svg
        assert f"<desc>{alt_text}</desc>" in svg
        assert "<text" not in svg, "letters are outlines, the same where the fonts are not installed"
        with Image.open(folder / "prompt_growth.png") as image:
            assert image.text["Description"] == alt_text
        metadata = PdfReader(folder / "prompt_growth.pdf").metadata
        assert (metadata.title, metadata.subject) == ("prompt_growth", alt_text)

    def test_a_pdf_embeds_its_fonts_as_truetype(self, folder):
        page = PdfReader(folder / "prompt_growth.pdf").pages[0]
        fonts = [font.get_object() for font in page["/Resources"]["/Font"].values()]
        for font in fonts:
            inner = font["/DescendantFonts"][0].get_object() if font["/Subtype"] == "/Type0" else font
            assert inner["/Subtype"] in ("/TrueType", "/CIDFontType2")
            assert "/FontFile2" in inner["/FontDescriptor"].get_object()
        assert any("NotoSansSCSubset" in font["/BaseFont"] for font in fonts)
        assert "新增，尚待讀入" in page.extract_text()

    def test_equal_input_gives_equal_bytes_and_no_torch(self, tmp_path, monkeypatch):
        """Another process, with other orders of sets and dicts, writes the same files."""
        monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
        names = ["logit_lens", "original_hierarchy"]
        list(redraw(FOLDER, tmp_path / "here", names, settings=FigureSettings(lang="zh")))
        code = "import sys; from glmlab.cli import app; app(standalone_mode=False); assert 'torch' not in sys.modules"
        command = [sys.executable, "-c", code, "figures", "--out", str(tmp_path / "there"), "--lang", "zh", *names]
        environment = {**os.environ, "PYTHONUTF8": "1"}
        done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stderr
        assert done.stdout.splitlines()[0] == "logit_lens: 160 mm"
        files = sorted(path.name for path in (tmp_path / "here").iterdir())
        assert len(files) == 6 * len(names)
        for file in files:
            assert (tmp_path / "here" / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file
        assert b"2023" in (tmp_path / "here" / "logit_lens.pdf").read_bytes()

    def test_a_figure_without_a_table_is_refused(self, tmp_path):
        with pytest.raises(FigureError, match="the figure has no table to save. Draw it with a function of glmlab.fig"):
            save_figure(SuiteFigure(), tmp_path / "figure", provenance={})


@given(st.lists(st.text(st.characters(exclude_categories=["Cs"]), max_size=8), min_size=1, max_size=5))
def test_texts_of_a_table_survive_the_csv(tmp_path_factory, texts):
    """Also NA, numbers, quotes and ends of lines."""
    path = tmp_path_factory.mktemp("table") / "table.csv"
    table = pd.DataFrame({"text": [*texts, "NA", "1e3", "a\r\nb\rc"]})
    path.write_bytes(_csv(table).encode())
    assert _read_table(path, {"text": str})["text"].tolist() == table["text"].tolist()


def test_styles_scale_letters_lines_and_widths_alike():
    paper, slide = (drawn("prompt_growth", style=style) for style in ("paper", "slide"))
    assert slide.get_figwidth() / paper.get_figwidth() == pytest.approx(STYLES["slide"][0])
    sizes = [[text.get_fontsize() for text in figure.findobj(Text)] for figure in (paper, slide)]
    np.testing.assert_allclose(np.array(sizes[1]) / np.array(sizes[0]), STYLES["slide"][0])


class TestWhatIsDrawn:
    def test_a_folder_is_told_from_names(self, tmp_path, monkeypatch):
        monkeypatch.chdir(tmp_path)
        assert find_figures(["polling"]) == (FOLDER, ["polling"], Path("figures"))
        (tmp_path / "mine").mkdir()
        assert find_figures(["mine", "polling"]) == (Path("mine"), ["polling"], Path("mine"))
        with pytest.raises(FigureError, match="mine and other/folder are two folders. Give one folder, and names"):
            find_figures(["mine", "other/folder"])
        shutil.copytree(FOLDER, tmp_path / "figures")
        assert find_figures([]) == (Path("figures"), [], Path("figures"))

    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            (
                {"folder": Path("nowhere")},
                "nowhere is not a folder. Give one that keeps saved figures, or run make note",
            ),
            (
                {"folder": ROOT / "notebooks"},
                "notebooks keeps no figures (NAME.json with NAME.csv). Run make notebooks",
            ),
            ({"names": ["no_such"]}, "figure 'no_such' is not known in "),
            ({"formats": ["bmp"]}, "format 'bmp' is not known. Use pdf, svg, png."),
            ({"out": ROOT / "README.md"}, "README.md is a file, so no figures can go into it. Give another --out."),
        ],
    )
    def test_a_bad_wish_is_refused_before_anything_is_drawn(self, tmp_path, arguments, message):
        with pytest.raises(FigureError, match=re.escape(message)):
            redraw(**{"folder": FOLDER, "out": tmp_path / "out", **arguments})
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize(
        ("settings", "message"),
        [
            ({"style": "poster"}, "style 'poster' is not known. Use paper, slide, web."),
            ({"lang": "fr"}, "language 'fr' is not known. Use en, zh."),
            ({"width_mm": 0}, "a width of 0mm cannot be drawn. In the style paper, give 60mm to 600mm."),
            ({"width_mm": 80, "style": "slide"}, "In the style slide, give 96mm to 960mm."),
        ],
    )
    def test_settings_that_cannot_be(self, settings, message):
        with pytest.raises(FigureError, match=re.escape(message)):
            FigureSettings(**settings)

    @pytest.mark.parametrize("text", ["86", "3km", "mm", "-5mm", "1e9mm", "86 mm wide", "٨٦mm", ""])
    def test_a_width_is_a_number_with_a_unit(self, text):
        with pytest.raises(FigureError, match="is not a length. Give a number and mm, cm or in, such as 86mm"):
            parse_width(text)

    def test_a_file_that_cannot_be_written(self, tmp_path):
        (tmp_path / "prompt_roles.md").mkdir()
        with pytest.raises(FigureError, match="prompt_roles.md cannot be written"):
            list(redraw(FOLDER, tmp_path, ["prompt_roles"], formats=["png"]))
        (tmp_path / "in the way").write_text("a file")
        with pytest.raises(FigureError, match=r"cannot be written .* Choose another folder"):
            list(redraw(FOLDER, tmp_path / "in the way" / "out", ["prompt_roles"], formats=["png"]))


@pytest.mark.parametrize("function", FUNCTIONS)
def test_every_function_refuses_a_table_without_its_columns_or_rows(function):
    known = FUNCTIONS[function]
    arguments = {"card": "a card", "card_mib": 1.0} if function == "precision_chart" else {}
    with pytest.raises(FigureError, match=r"the table has no column '\w+'; it has nothing|'nothing' (is not|has no)"):
        known.draw(pd.DataFrame({"nothing": ["at all"]}), **arguments)
    with pytest.raises(FigureError, match=r"^(no \w+ to draw: |0 tokens cannot be drawn)"):
        known.draw(pd.DataFrame(columns=list({**known.columns, "precision": str})), **arguments)


class TestAStrangersFiles:
    """Nothing of a json is executed, and whatever is wrong is one error that names the file."""

    @pytest.fixture
    def stem(self, tmp_path) -> Path:
        for suffix in ("csv", "json"):
            shutil.copy(FOLDER / f"bytes_by_precision.{suffix}", tmp_path)
        return tmp_path / "bytes_by_precision"

    @pytest.mark.parametrize(
        ("change", "message"),
        [
            ({"function": "os.system"}, r"json asks for the function 'os.system'. Known are .*latency_curve"),
            ({"function": "__import__('os').getcwd()"}, "json asks for the function "),
            ({"function": "save_figure"}, "json asks for the function 'save_figure'"),
            ({"function": ["memory_curve"]}, "json asks for the function "),
            ({"function": "memory_curve", "arguments": {}}, "csv has no column 'number'; it has precision, embedding"),
            ({"arguments": []}, "json needs objects under arguments and provenance"),
            ({"provenance": "me"}, "json needs objects under arguments and provenance"),
            (
                {"arguments": {"card": "a", "card_mib": 1, "stem": "/etc"}},
                r"gives the argument 'stem', .* \(card, card_mib\)",
            ),
            ({"arguments": {"card": "a"}}, "json lacks the argument 'card_mib'"),
            ({"arguments": {"card": "a", "card_mib": "1"}}, "the argument 'card_mib' is '1', not int or float"),
            ({"arguments": {"card": ["a"], "card_mib": 1}}, r"the argument 'card' is \['a'\], not str"),
            ({"arguments": {"card": "a", "card_mib": True}}, "the argument 'card_mib' is True, not int or float"),
            (
                {"arguments": {"card": "a", "card_mib": float("nan")}},
                "cannot be read as JSON .*NaN is not a number of JSON",
            ),
        ],
    )
    def test_a_json_that_asks_for_something_else(self, stem, change, message):
        path = stem.with_suffix(".json")
        path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
        with pytest.raises(FigureError, match=message):
            read_figure(stem)

    @pytest.mark.parametrize(
        ("text", "message"),
        [
            ("", "cannot be read as JSON"),
            ("[" * 100_000, "cannot be read as JSON"),
            ("[1]", "is not the .json of a figure: it holds no object"),
            (b"\xff", "cannot be read as JSON"),
        ],
    )
    def test_a_json_that_is_none(self, stem, text, message):
        stem.with_suffix(".json").write_bytes(text if isinstance(text, bytes) else text.encode())
        with pytest.raises(FigureError, match=message):
            read_figure(stem)

    @pytest.mark.parametrize(
        ("csv", "message"),
        [
            ("no file", "csv cannot be read as a table .*Copy it beside its .json again"),
            ("", "csv cannot be read as a table"),
            ("step,text\n", "csv has no column 'surprisal_bits'; it has step, text"),
            ("lots", "row 1 of the column 'kv_bytes' is 'lots', not float"),
            ("inf", "row 1 of the column 'kv_bytes' is 'inf', not float"),
            ("-1e400", "row 1 of the column 'kv_bytes' is '-1e400', not float"),
            ("no rows", "no steps to draw: generate at least one token"),
        ],
    )
    def test_a_table_that_does_not_fit(self, tmp_path, csv, message):
        steps = pd.DataFrame({"text": ["Hi"], "surprisal_bits": 0.1, "kv_bytes": 4096, "survivors: logits": 96,
                              "forward_ms": 5.0, "choose_ms": 1.0, "stop_check_ms": 0.0})  # fmt: skip
        save_figure(decode_strip(steps), tmp_path / "steps", provenance={}, formats=[])
        path = tmp_path / "steps.csv"
        texts = {"no rows": path.read_text().splitlines()[0] + "\n", "": "", "step,text\n": "step,text\n"}
        path.write_text(texts.get(csv, path.read_text().replace("4096", csv)))
        if csv == "no file":
            path.unlink()
        with pytest.raises(FigureError, match=message):
            read_figure(tmp_path / "steps")

    @pytest.mark.parametrize(
        ("cell", "message"),
        [("1.5", "row 1 of the column 'layer' is '1.5', not int"), ("", "row 1 of the column 'layer' is '', not int"),
         ("no", "row 1 of the column 'chosen' is 'no', not bool")],
    )  # fmt: skip
    def test_a_cell_of_another_type(self, tmp_path, cell, message):
        table = pd.read_csv(FOLDER / "logit_lens.csv", dtype=str, keep_default_na=False)
        table.loc[0, message.split("'")[1]] = cell
        shutil.copy(FOLDER / "logit_lens.json", tmp_path)
        table.to_csv(tmp_path / "logit_lens.csv", index=False)
        with pytest.raises(FigureError, match=message):
            read_figure(tmp_path / "logit_lens")

    def test_what_a_drawing_function_stumbles_over(self, tmp_path):
        for suffix in ("csv", "json"):
            shutil.copy(FOLDER / f"logit_lens.{suffix}", tmp_path)
        path = tmp_path / "logit_lens.csv"
        path.write_text(path.read_text() + path.read_text().split("\n", 1)[1])
        with pytest.raises(FigureError, match="logit_lens cannot be drawn by lens_heatmap: Index contains duplicate"):
            read_figure(tmp_path / "logit_lens")

    def test_mathematics_braces_and_markup_are_plain_text(self, stem, tmp_path):
        path = stem.with_suffix(".json")
        card = r"$\frac{1$ {0.__class__} <script>&\write18{id}"
        path.write_text(json.dumps({**json.loads(path.read_text()), "arguments": {"card": card, "card_mib": 8188}}))
        list(redraw(tmp_path, tmp_path / "out", formats=["svg"], settings=FigureSettings(lang="zh")))
        assert "<script>" not in (tmp_path / "out" / "bytes_by_precision.svg").read_text()
        assert card in json.loads((tmp_path / "out" / "bytes_by_precision.json").read_text())["alternative_text"]
