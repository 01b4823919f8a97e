"""`make lab`, and what the suite shows as HTML: who may reach it, which Python runs, and that a text stays a text."""

import json
import re
import urllib.error
import urllib.request

import lab_driver
import nbformat
import psutil
import pytest

pytestmark = pytest.mark.browser

HOSTILE = '<img src=x onerror="document.body.dataset.hostile=1"><script>document.body.dataset.hostile=1</script>'

EVERY_VIEW = (
    f"hostile = {HOSTILE!r}",
    """from dataclasses import replace

from glmlab import decode_steps, load_model
from glmlab.figures import decode_strip
from glmlab.generation.decoding import Keep
from glmlab.prompts.encoding import dissect
from glmlab.generation.step_tables import steps_table
from glmlab.generation.stepper import Stepper

loaded = load_model("embedded", precision="fp32", device="cpu")
steps = list(decode_steps(loaded, "Hello", max_new_tokens=2, keep=Keep(logits=True)))""",
    "dissect(loaded.tokenizer, [{'role': 'user', 'content': hostile}])",
    "replace(loaded, report=replace(loaded.report, name=hostile, architecture=hostile))",
    """class Tokenizer:
    def convert_ids_to_tokens(self, token_id):
        return hostile

    def decode(self, token_ids):
        return hostile


Stepper(Tokenizer(), steps)""",
    "decode_strip(steps_table(Tokenizer(), steps))",
    "steps_table(Tokenizer(), steps)",
    """from glmlab.suite.contents import Entry, Thumbnail

display(Entry(hostile, hostile, hostile, 1, None))""",
)


def _status(url):
    try:
        with urllib.request.urlopen(url, timeout=30) as answer:
            return answer.status, json.loads(answer.read())
    except urllib.error.HTTPError as error:
        return error.code, None


class TestMakeLab:
    def test_asks_for_a_token(self, lab):
        assert len(lab.token) > 30
        assert _status(f"{lab.url}/api/contents")[0] == 403
        assert _status(f"{lab.url}/api/contents?token=guess")[0] == 403
        assert _status(f"{lab.url}/api/contents?token={lab.token}")[0] == 200

    def test_listens_on_this_machine_only(self, lab):
        ports = psutil.Process(lab.pid).net_connections(kind="inet")
        assert {entry.laddr.ip for entry in ports if entry.status == psutil.CONN_LISTEN} == {"127.0.0.1"}

    def test_python_is_the_environments_own_whatever_a_user_has_installed(self, lab):
        _, specs = _status(f"{lab.url}/api/kernelspecs?token={lab.token}")
        assert specs["default"] == "python3"
        assert specs["kernelspecs"]["python3"]["spec"]["display_name"] != "other"

    def test_opens_the_table_of_contents(self, lab, browser):
        with browser.new_page() as page:
            page.goto(f"{lab.url}/?token={lab.token}")
            page.locator(".lm-TabBar-tab.lm-mod-current", has_text="index.ipynb").wait_for()
            # where another test has the lab open, this page gets a workspace of its own
            page.wait_for_url(re.compile(re.escape(lab.url) + r"/lab(/workspaces/[\w-]+)?/tree/index\.ipynb"))

    def test_looks_for_no_news_and_no_updates(self, lab):
        assert _status(f"{lab.url}/lab/api/update?token={lab.token}")[1]["notification"] is None
        assert _status(f"{lab.url}/lab/api/news?token={lab.token}")[1]["news"] == []


def test_a_hostile_text_stays_a_text_in_every_view(lab, lab_page):
    cells = [nbformat.v4.new_code_cell(source) for source in EVERY_VIEW]
    kernel = {"kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"}}
    notebook = nbformat.v4.new_notebook(cells=cells, metadata=kernel)
    nbformat.write(notebook, lab.folder / "notebooks" / "hostile.ipynb")
    with lab_driver.open_notebook(lab_page, lab, "hostile.ipynb") as notebook:
        notebook.run_all()
        assert notebook.page.evaluate(lab_driver.STATE)["errors"] == []
        notebook.page.get_by_role("button", name="next").click()
        notebook.page.get_by_text("step 1 (decode)").wait_for()
        shown = notebook.page.locator(".jp-OutputArea").all_inner_texts()
        # report, stepper, table of steps and contents; a prompt's table shows it in pieces, a picture in its alt text
        assert sum("<img src=x" in text for text in shown) == 4
        assert notebook.page.locator(".jp-OutputArea img[src='x'], .jp-OutputArea script").count() == 0
        assert notebook.page.evaluate("() => document.body.dataset.hostile") is None
