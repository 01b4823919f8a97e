"""Every figure of the catalogue, in both languages and at two widths: glyphs, sizes, contrast, words, bytes."""

import ast
import json
import os
import re
import subprocess
import sys
from pathlib import Path
from unittest.mock import patch

import numpy as np
import pandas as pd
import pytest
from matplotlib.colors import to_rgb
from matplotlib.text import Text
from PIL import Image

from glmlab.figures import FORMATS, FigureError, figure_settings
from glmlab.figures.chinese import CHINESE
from glmlab.figures.settings import STYLES, parse_width, tr
from glmlab.figures.style import luminance
from glmlab.gallery import CATALOGUE, GalleryError, Plate, find_entries, make_figures
from glmlab.gallery.captions import CAPTIONS
from glmlab.gallery.plate import embedded

ROOT = Path(__file__).resolve().parents[2]
COLUMN_MM = 86.0
"""Width of a column of a journal."""

_MADE: dict[tuple[str, str, float | None], Plate] = {}


def plate(name: str, lang: str = "en", width_mm: float | None = None) -> Plate:
    """The plate of a name, made once for all tests."""
    key = (name, lang, width_mm)
    if key not in _MADE:
        (entry,) = find_entries([name])
        with figure_settings(lang=lang, width_mm=width_mm):
            _MADE[key] = entry.build()
            _MADE[key].figure.draw_without_rendering()  # a missing glyph is a warning, and warnings are errors here
    return _MADE[key]


def shown_texts(made: Plate) -> list[Text]:
    """Every text that is drawn: not the labels of ticks outside of what an axis shows."""
    drawn: list[Text] = []

    def draw(text: Text, renderer: object) -> None:
        if text.get_visible() and text.get_text().strip():
            drawn.append(text)

    with patch.object(Text, "draw", draw):
        made.figure.draw_without_rendering()
    return drawn


@pytest.fixture(params=CATALOGUE, ids=lambda entry: entry.name)
def name(request) -> str:
    return request.param.name


def test_every_figure_a_notebook_saves_is_in_the_catalogue():
    names = {entry.name for entry in CATALOGUE}
    assert len(names) == len(CATALOGUE)
    notebooks = {path.stem: path.read_text(encoding="utf-8") for path in sorted((ROOT / "notebooks").glob("0*.ipynb"))}
    saved = {stem: set(re.findall(r'Path\(output\) / \\"(\w+)\\"', text)) for stem, text in notebooks.items()}
    assert all(saved.values())
    assert set().union(*saved.values()) <= names
    for entry in CATALOGUE:
        assert entry.notebook in notebooks


@pytest.mark.parametrize("width_mm", [None, COLUMN_MM])
@pytest.mark.parametrize("lang", ["en", "zh"])
def test_every_letter_has_a_glyph_and_six_points(name, lang, width_mm):
    texts = shown_texts(plate(name, lang, width_mm))
    assert min(text.get_fontsize() for text in texts) >= 6 - 1e-6


@pytest.mark.parametrize("lang", ["en", "zh"])
def test_labels_stay_inside_at_the_width_of_a_column(name, lang):
    made = plate(name, lang, COLUMN_MM)
    width, height = made.figure.bbox.size
    for text in shown_texts(made):
        box = text.get_window_extent()
        assert min(box.x0, box.y0) >= -1, text
        assert box.x1 <= width + 1, text
        assert box.y1 <= height + 1, text


def test_a_figure_is_as_wide_as_asked_or_says_so(name, tmp_path):
    (made,) = make_figures(tmp_path, [name], formats=["png"], width_mm=COLUMN_MM)
    if name in ("class_hierarchy", "original_hierarchy", "module_tree"):
        assert made.width_mm > COLUMN_MM
        assert str(made).endswith("mm (86 mm asked: narrower, its letters would be too small)")
    else:
        assert str(made) == f"{name}: 86 mm"
    assert f"- size: {made.width_mm:.0f} mm x" in (tmp_path / f"{name}.md").read_text()


def test_texts_contrast_with_what_is_behind_them(name):
    """At least 4.5:1 (WCAG AA) over nine tenths of the pixels behind a text; the rest may be a line that crosses it."""
    made = plate(name)
    texts = shown_texts(made)
    boxes = [text.get_window_extent() for text in texts]
    colors = [to_rgb(text.get_color()) for text in texts]
    for text in texts:
        text.set_alpha(0)  # hidden, it would take no room, and the panels would grow
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg

        canvas = FigureCanvasAgg(made.figure)
        canvas.draw()
        behind = np.asarray(canvas.buffer_rgba())[::-1, :, :3] / 255
    finally:
        for text in texts:
            text.set_alpha(None)
    for text, box, color in zip(texts, boxes, colors, strict=True):
        x0, x1 = (int(np.clip(x, 0, behind.shape[1])) for x in (box.x0, box.x1 + 1))
        y0, y1 = (int(np.clip(y, 0, behind.shape[0])) for y in (box.y0, box.y1 + 1))
        pixels = behind[y0:y1, x0:x1].reshape(-1, 3)
        found, counts = np.unique(pixels.round(2), axis=0, return_counts=True)
        ink = luminance(color)
        grounds = np.array([luminance(tuple(pixel)) for pixel in found])
        contrast = (np.maximum(grounds, ink) + 0.05) / (np.minimum(grounds, ink) + 0.05)
        assert counts[contrast >= 4.5].sum() >= 0.9 * counts.sum(), f"{text.get_text()!r}: {contrast.min():.1f}"


def _data_words(made: Plate) -> set[str]:
    """Words of the data and its provenance, which are the same in every language."""
    cells = [str(value) for column in made.data.columns for value in made.data[column].unique()]
    told = json.dumps([list(made.data.columns), dict(made.provenance)], default=str, ensure_ascii=False)
    return set(re.findall(r"[A-Za-z]+", " ".join([*cells, told])))


UNTRANSLATED = {
    "MiB",
    "KiB",
    "ms",
    "bits",
    "token",
    "tokens",
    "logits",
    "top",
    "min",
    "p",
    "k",
    "KV",
    "CUDA",
    "CPU",
    "GPU",
    "GB",
    "RTX",
    "Laptop",
    "PyTorch",
    "Auto",
    "nn",
    "U",
}
"""Units and names that are the same in both languages."""


def test_no_label_is_left_in_english(name):
    """A text with the same words in both languages is data, a number or a name."""
    english, chinese = ({text.get_text() for text in shown_texts(plate(name, lang))} for lang in ("en", "zh"))
    from_classes = {"class_hierarchy", "original_hierarchy", "module_tree"}
    for text in english & chinese:
        words = set(re.findall(r"[A-Za-z]+", text))
        known = _data_words(plate(name)) | UNTRANSLATED
        if name in from_classes:  # members and attributes of classes: names of code
            assert re.fullmatch(r"[\w.…:<>()*,' \-]+|[^A-Za-z]+|.* x \w+.*|.*(/|=|×|\|).*", text), text
        else:
            assert words <= known or not words - known - _bytes_in(text), text


def _bytes_in(text: str) -> set[str]:
    """Code points and pieces of tokens are data, too."""
    return set(re.findall(r"[A-Za-z]+", text)) if re.search(r"U\+|[▁␣↵<|\[{}\"'`]", text) else set()


def test_captions_and_alternative_texts_speak_the_language(name):
    for lang in ("en", "zh"):
        made = plate(name, lang)
        for text in (made.caption, made.figure.alt_text):
            assert len(text) > 15
            own = re.sub("你好|你是誰|[物量数那组键和值巴黎]", "", text)  # what is not of the data
            assert bool(re.search("[\u4e00-\u9fff]", own)) == (lang == "zh"), text


def test_the_table_of_translations_has_nothing_that_is_not_said():
    """Every key stands in the code; fields have the same names in both languages."""
    said = set()
    for path in (ROOT / "glmlab").rglob("*.py"):
        if path.name != "chinese.py":
            tree = ast.parse(path.read_text(encoding="utf-8"))
            said |= {node.value for node in ast.walk(tree) if isinstance(node, ast.Constant)}
    columns = {"tokens", "characters"}  # of a Curve: what stands behind context_
    labels = {part for path in (ROOT / "data" / "recordings").glob("*.json")
              for part in str(json.loads(path.read_text(encoding="utf-8")).get("label", "")).split(", ")}  # fmt: skip
    labels |= {"original code", "dynamic cache", "static cache"}
    assert set(CHINESE) - said - columns - labels == set()
    for english, chinese in CHINESE.items():
        assert sorted(re.findall(r"\{[^}]*\}", english)) == sorted(re.findall(r"\{[^}]*\}", chinese)), english
    for texts in CAPTIONS.values():
        assert set(texts) == {"en", "zh"}


def test_a_label_without_translation_is_refused():
    with figure_settings(lang="zh"), pytest.raises(FigureError, match="'a new label' has no Chinese. Add it to"):
        tr("a new label")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("figures")
    list(make_figures(folder, ["prompt_growth", "pools_after_the_move"], lang="zh"))
    return folder


class TestFiles:
    @pytest.mark.parametrize("stem", ["prompt_growth", "pools_after_the_move"])
    def test_each_has_pictures_data_provenance_and_words(self, folder, stem):
        assert {path.suffix for path in folder.glob(f"{stem}.*")} == {
            f".{end}" for end in (*FORMATS, "csv", "json", "md")
        }
        alt_text = plate(stem, "zh").figure.alt_text
        words = (folder / f"{stem}.md").read_text(encoding="utf-8")
        assert plate(stem, "zh").caption in words
        assert " ".join(alt_text.split()) in words
        assert "- versions: torch: " in words
        assert len(pd.read_csv(folder / f"{stem}.csv")) == len(plate(stem, "zh").data)

    def test_an_svg_describes_itself(self, folder):
        text = (folder / "prompt_growth.svg").read_text(encoding="utf-8")
        assert '<svg role="img" lang="zh-Hant" ' in text
        assert "<title>prompt_growth</title>" in text
        assert f"<desc>{plate('prompt_growth', 'zh').figure.alt_text}</desc>" in text
        assert "<text" not in text, "letters are outlines, the same where the fonts are not installed"

    def test_a_png_describes_itself(self, folder):
        with Image.open(folder / "prompt_growth.png") as image:
            assert image.text["Description"] == plate("prompt_growth", "zh").figure.alt_text

    def test_a_pdf_describes_itself_and_embeds_its_fonts(self, folder):
        from pypdf import PdfReader

        reader = PdfReader(folder / "prompt_growth.pdf")
        assert reader.metadata.title == "prompt_growth"
        assert reader.metadata.subject == plate("prompt_growth", "zh").figure.alt_text
        fonts = [font.get_object() for font in reader.pages[0]["/Resources"]["/Font"].values()]
        for font in fonts:
            inner = font["/DescendantFonts"][0].get_object() if font["/Subtype"] == "/Type0" else font
            assert inner["/Subtype"] in ("/TrueType", "/CIDFontType2")
            assert "/FontFile2" in inner["/FontDescriptor"].get_object()
        assert any("NotoSansSCSubset" in font["/BaseFont"] for font in fonts)
        assert "新增，尚待讀入" in reader.pages[0].extract_text()


def test_equal_input_gives_equal_bytes(tmp_path, monkeypatch):
    """Another process, with other orders of sets and dicts, writes the same files."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    names = ["original_hierarchy", "logit_lens", "prompt_tokens", "memory_vs_context", "pools_after_the_move"]
    here = tmp_path / "here"
    assert len(list(make_figures(here, names, lang="zh"))) == len(names)
    command = [sys.executable, "-m", "glmlab", "figures", "--out", str(tmp_path / "there"), "--lang", "zh", *names]
    done = subprocess.run(
        command, env={**os.environ, "PYTHONUTF8": "1"}, capture_output=True, text=True, encoding="utf-8"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[1].startswith("logit_lens: 160 mm")
    files = sorted(path.name for path in here.iterdir())
    assert len(files) == 6 * len(names)
    for file in files:
        assert (here / file).read_bytes() == (tmp_path / "there" / file).read_bytes(), file
    assert b"2023" in (here / "logit_lens.pdf").read_bytes()


def test_styles_scale_letters_lines_and_widths_alike():
    (entry,) = find_entries(["prompt_growth"])
    made = {}
    for style in STYLES:
        with figure_settings(style=style):
            made[style] = entry.build().figure
    paper, slide = made["paper"], made["slide"]
    assert slide.get_figwidth() / paper.get_figwidth() == pytest.approx(1.6)
    sizes = [[text.get_fontsize() for text in figure.findobj(Text)] for figure in (paper, slide)]
    np.testing.assert_allclose(np.array(sizes[1]) / np.array(sizes[0]), 1.6)


def test_the_recorded_steps_are_those_of_the_run():
    """Times apart, the committed table is what the embedded model does."""
    from glmlab.gallery.decoding import decode_run
    from glmlab.generation.step_tables import steps_table

    recorded = plate("decode_steps").data
    fresh = steps_table(embedded().tokenizer, decode_run())
    exact = ["step", "phase", "token_id", "text", "fed_tokens", "cached_tokens", "context_tokens", "kv_bytes"]
    assert recorded[exact].values.tolist() == fresh[exact].values.tolist()
    np.testing.assert_allclose(recorded["surprisal_bits"], fresh["surprisal_bits"], atol=1e-4)


def _cell_values(stem: str) -> dict[str, object]:
    """Names that a notebook's cells assign plain values to."""
    notebook = json.loads((ROOT / "notebooks" / f"{stem}.ipynb").read_text(encoding="utf-8"))
    values = {}
    for cell in notebook["cells"]:
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse("".join(cell["source"]))):
                if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
                    try:
                        values[node.targets[0].id] = ast.literal_eval(node.value)
                    except ValueError:
                        continue
    return values


def test_the_catalogue_shows_what_the_notebooks_show():
    """Prompts, seeds and turns that both name are the same."""
    from glmlab.gallery import decoding, deployment, latency, memory, prompts

    assert _cell_values("00_deployment")["context_tokens"] == deployment.CONTEXT_TOKENS
    two, three = _cell_values("02_one_decode_step"), _cell_values("03_prompt_tokens")
    five = _cell_values("05_why_the_curve_bends")
    assert (two["seed"], two["temperature"]) == (decoding.SEED, decoding.SAMPLING["temperature"])
    assert three["every_role"] == prompts.EVERY_ROLE
    assert three["system_text"] == prompts.CHAPTER[0]["content"]
    six = _cell_values("06_decode_latency")
    assert tuple(six["precisions"]) == latency.PRECISIONS
    assert (tuple(six["contexts"]), tuple(six["prompts"])) == (latency.CONTEXTS, latency.PROMPTS)
    assert six["compiled_precision"] == latency.COMPILED_PRECISION
    assert (five["trace"], five["turns"]) == (memory.TRACE, memory.TURNS)


class TestBadInput:
    @pytest.mark.parametrize(
        ("arguments", "message"),
        [
            ({"names": ["no_such_figure"]}, "figure 'no_such_figure' is not known. Choose from bytes_by_precision, "),
            ({"formats": ["bmp"]}, "format 'bmp' is not known. Use pdf, svg, png."),
            ({"style": "poster"}, "style 'poster' is not known. Use paper, slide, web."),
            ({"lang": "fr"}, "language 'fr' is not known. Use en, zh."),
            ({"width_mm": 0}, "a width of 0mm cannot be drawn. In the style paper, give 60mm to 600mm."),
            ({"width_mm": 80, "style": "slide"}, "In the style slide, give 96mm to 960mm."),
        ],
    )
    def test_it_is_refused_before_anything_is_made(self, tmp_path, arguments, message):
        with pytest.raises((FigureError, GalleryError), match=re.escape(message)):
            make_figures(tmp_path / "out", **arguments)
        assert not (tmp_path / "out").exists()

    @pytest.mark.parametrize("text", ["86", "3km", "mm", "-5mm", "1e9mm", "86 mm wide", "٨٦mm", ""])
    def test_a_width_is_a_number_with_a_unit(self, text):
        with pytest.raises(FigureError, match="is not a length. Give a number and mm, cm or in, such as 86mm"):
            parse_width(text)

    def test_a_folder_that_is_a_file(self, tmp_path):
        (tmp_path / "out").write_text("in the way")
        with pytest.raises(GalleryError, match="out is a file, so no figures can go into it. Give another --out"):
            make_figures(tmp_path / "out")

    def test_a_file_that_cannot_be_written(self, tmp_path):
        (tmp_path / "prompt_roles.md").mkdir()
        with pytest.raises(FigureError, match="prompt_roles.md cannot be written"):
            list(make_figures(tmp_path, ["prompt_roles"], formats=["png"]))
