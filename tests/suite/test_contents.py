"""The table of contents says what the notebooks say, and nothing of its own."""

import base64
import re
from io import BytesIO
from pathlib import Path

import nbformat
import pytest
from PIL import Image

from glmlab.figures.style import picture_bundle
from glmlab.suite.contents import read_contents
from glmlab.suite.notebooks import NotebookError

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


@pytest.fixture
def folder(tmp_path):
    """A folder with one made-up notebook, 01_why.ipynb."""
    png = BytesIO()
    Image.new("RGB", (1280, 320), "white").save(png, "png")
    data, metadata = picture_bundle(png.getvalue(), "A white sheet.", 640, 160)
    output = nbformat.v4.new_output("display_data", data, metadata=metadata)
    head = "**Answer in one sentence:** because `a` is\nthe *first* letter.\n\n*Reading time:* 7 minutes."
    cells = [
        nbformat.v4.new_markdown_cell("# Why?\n\nAn introduction."),
        nbformat.v4.new_markdown_cell(head),
        nbformat.v4.new_code_cell("sheet", outputs=[output]),
    ]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "01_why.ipynb")
    return tmp_path


def test_an_entry_is_read_from_its_notebook(folder):
    (entry,) = read_contents(folder)
    assert (entry.name, entry.question, entry.minutes) == ("01_why.ipynb", "Why?", 7)
    assert entry.answer == "Because a is the first letter."
    assert (entry.thumbnail.width, entry.thumbnail.height, entry.thumbnail.alt) == (640, 160, "A white sheet.")
    assert '<a href="01_why.ipynb">Why?</a>' in entry._repr_html_()
    assert "Reading time: 7 minutes" in repr(entry)


@pytest.mark.parametrize(
    ("there", "instead", "message"),
    [
        ("# Why?", "# Because", "01_why.ipynb has no question at its head"),
        ("**Answer in one sentence:**", "", "01_why.ipynb has no answer at its head"),
        ("7 minutes", "some minutes", "01_why.ipynb has no reading time at its head"),
        ("image/png", "image/gif", "01_why.ipynb shows no picture. Run it first: glmlab notebooks 01_why --in-place"),
    ],
)
def test_what_is_missing_is_said(folder, there, instead, message):
    path = folder / "01_why.ipynb"
    path.write_text(path.read_text().replace(there, instead))
    with pytest.raises(NotebookError, match=re.escape(message)):
        list(read_contents(folder))


def test_the_committed_page_lists_every_notebook_and_is_small():
    page = nbformat.read(FOLDER / "index.ipynb", as_version=4)
    outputs = [output for cell in page.cells for output in cell.get("outputs", [])]
    links = re.findall(r'href="([^"]+)"', "".join(output.data.get("text/html", "") for output in outputs))
    assert links == sorted(path.name for path in FOLDER.glob("[0-9]*.ipynb"))
    chart, *pictures = [output.data["image/png"] for output in outputs if "image/png" in output.data]
    assert Image.open(BytesIO(base64.b64decode(chart))).width > 640
    assert len(pictures) == len(links)
    assert all(Image.open(BytesIO(base64.b64decode(picture))).width <= 640 for picture in pictures)
    assert (FOLDER / "index.ipynb").stat().st_size < 300 * 2**10


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda picture: picture.data.update({"image/png": "AAAA"}), "is no PNG that can be read"),
        (lambda picture: picture.data.update({"image/png": "not base64"}), "is no PNG that can be read"),
        (
            lambda picture: picture.metadata.clear(),
            "has no alternative text. Show it with a function of glmlab.figures",
        ),
    ],
)
def test_a_first_picture_that_is_none_is_said(folder, change, message):
    path = folder / "01_why.ipynb"
    notebook = nbformat.read(path, 4)
    change(notebook.cells[-1].outputs[0])
    nbformat.write(notebook, path)
    with pytest.raises(NotebookError, match=f"the first picture of 01_why.ipynb {message}"):
        list(read_contents(folder))
