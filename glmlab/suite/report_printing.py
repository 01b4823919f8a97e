"""Write the report: as HTML, or as a PDF through a browser without a window."""

import os
import shutil
import subprocess
import tempfile
from pathlib import Path

from glmlab.core.files import write_atomically
from glmlab.suite.report_document import ReportError, report_html

BROWSERS = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable", "chrome", "msedge")
"""Names of browsers that print without a window, as they are on PATH."""

_LONGEST_S = 300


def write_report(out: Path, *, folder: Path, browser: str | None = None) -> Path:
    """Bind the notebooks of a folder into ``out``: ``.html``, or ``.pdf``.

    Args:
        out: the file to write; its folder is made.
        folder: of the executed notebooks.
        browser: name or path of the browser that prints the PDF; without it, the first of :data:`BROWSERS` on PATH.

    Raises:
        ReportError: another suffix, a place that cannot be written, no browser, or one that failed.
        NotebookError: no notebooks, or a file that is none.
    """
    if out.suffix not in (".html", ".pdf"):
        raise ReportError(f"{out} is neither .html nor .pdf. Let --out end in one of them.")
    program = find_browser(browser) if out.suffix == ".pdf" else ""
    html = report_html(folder)
    try:
        out.parent.mkdir(parents=True, exist_ok=True)
        if out.suffix == ".html":
            write_atomically(out, html)
        else:
            with tempfile.TemporaryDirectory() as temporary:  # a browser that fails leaves the old document as it was
                printed = Path(temporary) / out.name
                print_pdf(html, printed, program)
                write_atomically(out, printed.read_bytes())
    except OSError as error:
        raise ReportError(f"{out} cannot be written ({error.strerror}). Choose another --out.") from error
    return out


def find_browser(name: str | None = None) -> str:
    """Path of the browser of this name, or of the first one on PATH that prints; ReportError where there is none."""
    found = next((path for path in map(shutil.which, [name] if name else BROWSERS) if path), None)
    if found is None:
        what = f"{name!r} is no program" if name else "no browser that prints is on PATH"
        raise ReportError(
            f"{what}. Install Chromium (Debian: apt-get install chromium) or name one with --browser, or let --out end "
            "in .html and print that from your own browser."
        )
    return found


def print_pdf(html: str, out: Path, browser: str) -> None:
    """Print a document into a PDF; the browser has a profile of its own and asks no host for anything.

    Raises:
        ReportError: the browser failed or wrote nothing.
    """
    with tempfile.TemporaryDirectory() as folder:
        page = Path(folder) / "report.html"
        page.write_text(html, encoding="utf-8")
        command = [
            browser, "--headless", "--disable-gpu", "--no-first-run", "--disable-background-networking",
            "--disable-component-update", "--disable-sync", "--disable-quic", "--no-pdf-header-footer",
            f"--user-data-dir={folder}/profile", f"--print-to-pdf={out.resolve()}", page.as_uri(),
        ]  # fmt: skip
        if hasattr(os, "geteuid") and os.geteuid() == 0:
            command.insert(1, "--no-sandbox")  # Chromium's sandbox refuses to work for root
        try:
            done = subprocess.run(command, capture_output=True, text=True, errors="replace", timeout=_LONGEST_S)
        except (OSError, subprocess.TimeoutExpired) as error:
            raise ReportError(f"{browser} did not print ({error}). Name another with --browser.") from error
    if done.returncode or not out.is_file():
        last = (done.stderr.strip().splitlines() or ["it said nothing"])[-1]
        raise ReportError(
            f"{browser} wrote no {out} (exit {done.returncode}: {last}). Choose another --out, or another --browser."
        )
