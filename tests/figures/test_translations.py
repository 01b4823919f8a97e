"""data/locale has every text of the figures in Chinese, and nothing that no figure says."""

import re
from pathlib import Path

import pytest
from babel.messages.extract import extract_from_dir
from babel.messages.pofile import read_po

from glmlab.core.resources import data_path
from glmlab.figures import FigureError, figure_settings
from glmlab.figures.labels import LOCALES, printable, tr, tr_label

FIGURES = Path(__file__).resolve().parents[2] / "glmlab" / "figures"


@pytest.fixture(scope="module", params=LOCALES.values())
def catalog(request):
    with data_path("locale", request.param, "LC_MESSAGES", "glmlab.po").open("rb") as file:
        return read_po(file, locale=request.param)


def test_no_message_is_missing_or_stale(catalog):
    said = {found[2] for found in extract_from_dir(FIGURES, keywords={"tr": None, "msg": None})}
    translated = {message.id for message in catalog if message.id and message.string and not message.fuzzy}
    assert len(said) > 100
    assert (said - translated, translated - said) == (set(), set()), "run make messages, and translate what is new"
    assert not catalog.obsolete


def test_fields_have_the_same_names(catalog):
    for message in catalog:
        assert sorted(re.findall(r"\{[^}]*\}", message.id)) == sorted(re.findall(r"\{[^}]*\}", message.string))


def test_a_text_without_translation_is_refused():
    assert tr("a new label of {n}", n=1) == "a new label of 1"
    with figure_settings(lang="zh"), pytest.raises(FigureError, match="'a new label' has no Chinese. Run make mess"):
        tr("a new label")


def test_labels_of_the_data_are_translated_as_far_as_they_are_known():
    with figure_settings(lang="zh"):
        assert tr_label("norms, activations, rest") == "歸一化、激活與其餘"
        assert tr_label("my model, int4, {braces}") == "my model，int4，{braces}"


@pytest.mark.parametrize(
    ("text", "shown"),
    [
        ("你好 world\n", "你好␣world↵"),
        ("👋😀", "U+1F44BU+1F600"),
        ("a▁你⏎龘", "a␣你⏎U+9F98"),
        ("\u202e", "U+202E"),
        ("顯存使用與上下文長度分析", "顯存使用與上下文長度分析"),
    ],
)
def test_every_character_is_drawn_or_named(text, shown):
    assert printable(text) == shown
