"""The report holds every chapter and figure, loads nothing, runs nothing, and prints."""

import os
import re
import shutil
import sys
from pathlib import Path

import nbformat
import pytest
from bs4 import BeautifulSoup

from glmlab.suite.notebooks import NotebookError
from glmlab.suite.report import TITLE, ReportError, clean, find_browser, print_pdf, report_html, write_report

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
NOTEBOOKS = [path for path in sorted(FOLDER.glob("*.ipynb")) if path.stem != "index"]

HOSTILE = (
    '<script>document.title = "run"</script>',
    '<img src="x" onerror="document.title = \'run\'">',
    '<img src="https://example.com/a.png">',
    '<svg onload="document.title = 1"><script>1</script></svg>',
    '<a href="javascript:document.title = 1">link</a>',
    '<a href=" JaVaScRiPt:alert(1)">link</a>',
    '<iframe src="https://example.com"></iframe>',
    '<div style="background: url(https://example.com/b.png)">styled</div>',
    '<div style="background-image: url(https://example.com/c.png); color: red">styled</div>',
    "<style>@import 'https://example.com/d.css';</style>",
    '<meta http-equiv="refresh" content="0;url=https://example.com">',
    '<form action="https://example.com"><input autofocus onfocus="alert(1)"></form>',
    '<noscript><p title="</noscript><img src=x onerror=alert(1)>"></noscript>',
    "<math><mtext><table><mglyph><style><img src=x onerror=alert(1)></style></table></mtext></math>",
)


@pytest.fixture(scope="module")
def html() -> str:
    return report_html(FOLDER)


@pytest.fixture(scope="module")
def soup(html) -> BeautifulSoup:
    return BeautifulSoup(html, "html.parser")


def _with_outputs(folder: Path, *outputs, name: str = "01_odd.ipynb", text: str = "") -> Path:
    """A folder with one notebook: a text and a cell that was run."""
    cells = [nbformat.v4.new_markdown_cell(text), nbformat.v4.new_code_cell("1 < 2", execution_count=1)]
    cells[1].outputs = list(outputs)
    nbformat.write(nbformat.v4.new_notebook(cells=cells), folder / name)
    return folder


def _shown(data, **about):
    return nbformat.v4.new_output("display_data", data, metadata=about)


def _titles() -> list[str]:
    return [nbformat.read(path, 4).cells[0].source.splitlines()[0].removeprefix("# ") for path in NOTEBOOKS]


def _pictures(path: Path) -> int:
    cells = nbformat.read(path, 4).cells
    return sum("image/png" in output.get("data", {}) for cell in cells for output in cell.get("outputs", []))


class TestHtml:
    def test_chapters_stand_in_order_and_in_the_contents(self, soup):
        assert [section["id"] for section in soup.find_all("section")] == [path.stem for path in NOTEBOOKS]
        assert [section.h1.get_text() for section in soup.find_all("section")] == _titles()
        assert [item.a.get_text() for item in soup.nav.ol.find_all("li", recursive=False)] == _titles()

    def test_every_picture_is_there_with_its_words(self, soup):
        for section, path in zip(soup.find_all("section"), NOTEBOOKS, strict=True):
            pictures = section.find_all("img")
            assert len(pictures) == _pictures(path) > 0
            for picture in pictures:
                assert len(picture["alt"]) > 40
                assert picture["src"].startswith("data:image/png;base64,")

    def test_links_lead_somewhere_and_names_are_used_once(self, soup):
        names = [tag["id"] for tag in soup.find_all(id=True)]
        assert len(names) == len(set(names))
        for link in soup.find_all("a", href=True):
            assert link["href"].startswith("https://") or link["href"].removeprefix("#") in names, link["href"]

    def test_nothing_is_loaded_and_nothing_runs(self, html, soup):
        assert soup.find_all(["script", "link", "iframe", "object", "embed", "base", "form"]) == []
        for tag in soup.find_all(True):
            assert not [name for name in tag.attrs if name.startswith("on")]
            assert str(tag.get("src", "data:")).startswith("data:")
        assert not re.search(r"url\((?!\"data:)|@import", html)
        policy = soup.find("meta", attrs={"http-equiv": "Content-Security-Policy"})["content"]
        assert policy.startswith("default-src 'none';")
        assert "script-src" not in policy

    def test_it_says_where_its_contents_come_from(self, soup):
        told = soup.footer.get_text(" ")
        for word in [path.name for path in NOTEBOOKS] + ["torch", "embedded-fp32-cpu", "RTX 4060 Laptop"]:
            assert word in told
        assert not re.search(r"/(home|root|tmp|work|Users)/", soup.get_text())


@pytest.fixture
def hostile_folder(tmp_path) -> Path:
    """A notebook in which texts, outputs, alternative texts and names are somebody else's."""
    outputs = [
        _shown({"text/html": "".join(HOSTILE), "text/plain": "x"}),
        _shown({"application/javascript": "document.title = 'run'"}),
        nbformat.v4.new_output("stream", text="<script>document.title = 'run'</script>\n"),
        _shown({"image/svg+xml": HOSTILE[3]}),
        _shown(
            {"image/png": "iVBORw0KGgo=", "text/plain": "x"},
            **{"image/png": {"alt": '"><script>document.title = "run"</script>', "width": '1" onerror="alert(1)'}},
        ),
    ]
    return _with_outputs(tmp_path, *outputs, text="# A title?\n\n" + "\n\n".join(HOSTILE))


class TestHostile:
    @pytest.mark.parametrize("markup", HOSTILE)
    def test_markup_is_taken_out(self, markup):
        cleaned = clean(markup, chapter="01", chapters=frozenset())
        assert not re.search(r"<(script|svg|iframe|style|meta|form|input|math|object)", cleaned, re.IGNORECASE)
        assert not re.search(r"\son\w+=|example\.com|javascript:", cleaned, re.IGNORECASE)

    @pytest.mark.parametrize(
        "style",
        [
            "color:url(http://a.test)",
            "width:-webkit-image-set(url(http://a.test) 1x)",
            "color:\\75rl(http://a.test)",
            "background-color:expression(alert(1))",
            "height:src('//a.test')",
        ],
    )
    def test_a_style_that_names_an_address_is_gone_and_a_plain_one_stays(self, style):
        plain = '<p style="color:rgb(1, 2, 3);background:#fff">a</p>'
        assert clean(f'<p style="{style}">a</p>{plain}', chapter="01", chapters=frozenset()) == f"<p>a</p>{plain}"

    def test_a_notebook_becomes_a_harmless_chapter(self, hostile_folder):
        html = report_html(hostile_folder)
        soup = BeautifulSoup(html, "html.parser")
        assert soup.find_all(["script", "iframe", "svg", "form"]) == []
        assert not [name for tag in soup.find_all(True) for name in tag.attrs if name.startswith("on")]
        assert not [tag for tag in soup.find_all(src=True) if not tag["src"].startswith("data:image/png")]
        assert "&lt;script&gt;document.title" in html  # what was printed is shown as text

    @pytest.mark.parametrize("width", [float("inf"), [1], "1 onerror=x"])
    def test_a_width_that_is_no_number_is_left_out(self, tmp_path, width):
        _with_outputs(tmp_path, _shown({"image/png": "AAAA"}, **{"image/png": {"alt": "a", "width": width}}))
        picture = BeautifulSoup(report_html(tmp_path), "html.parser").img
        assert picture.attrs.pop("width", "1") == "1"
        assert picture.attrs == {"alt": "a", "src": "data:image/png;base64,AAAA"}

    def test_the_state_of_live_views_is_not_looked_at(self, tmp_path):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_markdown_cell("# A title")])
        notebook.metadata["widgets"] = {"application/vnd.jupyter.widget-state+json": "<script>run()</script>"}
        nbformat.write(notebook, tmp_path / "01_odd.ipynb")
        assert "run()" not in report_html(tmp_path)


@pytest.mark.browser
class TestInABrowser:
    @pytest.mark.parametrize("hostile", [False, True])
    def test_it_is_shown_without_a_request(self, html, hostile_folder, tmp_path, hostile, browser):
        page_file = tmp_path / "report.html"
        page_file.write_text(report_html(hostile_folder) if hostile else html, encoding="utf-8")
        page = browser.new_page()
        requests: list[str] = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(page_file.as_uri(), wait_until="load")
        assert [url for url in requests if not url.startswith("data:")] == [page_file.as_uri()]
        assert page.title() == TITLE
        if not hostile:
            assert min(page.evaluate("[...document.images].map(i => i.naturalWidth)")) > 100
            assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        page.close()

    @pytest.mark.skipif(
        not any(map(shutil.which, ("chromium", "google-chrome"))), reason="no Chromium is installed on this machine"
    )
    def test_the_pdf_has_pages_fonts_and_chapters(self, tmp_path):
        reader = pytest.importorskip("pypdf").PdfReader(write_report(tmp_path / "new" / "report.pdf", folder=FOLDER))
        assert 5 * len(NOTEBOOKS) < len(reader.pages) < 12 * len(NOTEBOOKS)
        texts = [" ".join(page.extract_text().split()) for page in reader.pages]
        for title in _titles():
            first = [text for text in texts if text.lstrip("0123456789 ").startswith(title)]
            assert len(first) == 1, "a chapter begins on a page of its own"
        assert "你好U+1F44B" in "".join(texts)
        assert min(len(text) for text in texts[1:]) > 100, "no page with a lost line"
        for font in (font for page in reader.pages for font in page["/Resources"].get("/Font", {}).values()):
            inner = font.get_object()
            inner = inner["/DescendantFonts"][0].get_object() if "/DescendantFonts" in inner else inner
            assert inner["/Subtype"] == "/Type3" or {"/FontFile2", "/FontFile3"} & set(
                inner["/FontDescriptor"].get_object()
            )


class TestBadInput:
    def test_another_suffix(self, tmp_path):
        with pytest.raises(ReportError, match=r"report.docx is neither .html nor .pdf. Let --out end in one of them"):
            write_report(tmp_path / "report.docx", folder=FOLDER)

    def test_no_notebooks(self, tmp_path):
        with pytest.raises(NotebookError, match="holds no notebooks. Run this in the suite's checkout"):
            write_report(tmp_path / "report.html", folder=tmp_path)
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / "index.ipynb")
        with pytest.raises(ReportError, match="holds no notebook but the index. Give the folder"):
            write_report(tmp_path / "report.html", folder=tmp_path)

    def test_a_notebook_that_was_not_run(self, tmp_path):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("1")])
        nbformat.write(notebook, tmp_path / "01_new.ipynb")
        with pytest.raises(ReportError, match="01_new.ipynb has cells that were not run.*--in-place"):
            write_report(tmp_path / "report.html", folder=tmp_path)

    def test_a_place_that_cannot_be_written(self, tmp_path):
        (tmp_path / "file").write_text("in the way")
        with pytest.raises(ReportError, match="cannot be written .* Choose another --out"):
            write_report(tmp_path / "file" / "report.html", folder=_with_outputs(tmp_path))

    def test_no_browser(self, tmp_path, monkeypatch):
        monkeypatch.setenv("PATH", str(tmp_path))
        with pytest.raises(ReportError, match=r"no browser that prints is on PATH. Install Chromium \(Debian: apt-get"):
            write_report(tmp_path / "report.pdf", folder=FOLDER)
        with pytest.raises(ReportError, match="'netscape' is no program. Install Chromium"):
            find_browser("netscape")

    @pytest.mark.skipif(os.name == "nt", reason="the stand-in for a browser is a shell script")
    def test_a_browser_that_fails_leaves_the_old_document(self, tmp_path):
        broken, old = tmp_path / "browser", tmp_path / "report.pdf"
        broken.write_text("#!/bin/sh\necho no display >&2\nexit 3\n")
        broken.chmod(0o755)
        old.write_bytes(b"old")
        with pytest.raises(ReportError, match=r"browser printed no PDF \(exit 3: no display\). Name another with"):
            write_report(old, folder=_with_outputs(tmp_path), browser=str(broken))
        assert old.read_bytes() == b"old"
        with pytest.raises(ReportError, match="did not print"):
            print_pdf("<p>", f"{sys.executable}-nowhere")

    def test_markup_that_no_parser_reads(self, tmp_path):
        with pytest.raises(
            ReportError, match=r"01_odd.ipynb holds HTML that cannot be read, .* Take it from the suite"
        ):
            report_html(_with_outputs(tmp_path, _shown({"text/html": "<![foo"})))

    def test_a_file_name_that_is_markup(self, tmp_path):
        with pytest.raises(ReportError, match="cannot name a chapter: rename it with letters, digits"):
            report_html(_with_outputs(tmp_path, name='01"><b onclick=x>.ipynb'))
