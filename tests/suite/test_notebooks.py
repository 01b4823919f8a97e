"""The notebooks keep the suite's rules, and the runner says which cell failed."""

import ast
import copy
import json
import os
import re
from pathlib import Path

import nbformat
import pytest

from glmlab.suite.notebooks import (
    NotebookError,
    execute_notebook,
    execute_notebooks,
    find_notebooks,
    normalize,
    parse_parameters,
    read_notebook,
)

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"
LESSONS = sorted(FOLDER.glob("[0-9]*.ipynb"))  # all but the table of contents
VARIES = "varies"  # tag of a cell whose output has numbers of one run or machine: times, host memory
MACHINE = "machine"  # tag of a cell that describes the machine it ran on: nothing in its output need be the same


@pytest.fixture(params=LESSONS, ids=lambda path: path.stem)
def notebook(request):
    return nbformat.read(request.param, as_version=4)


@pytest.fixture
def committed(notebook_path):
    return nbformat.read(notebook_path, as_version=4)


def _code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


class TestRules:
    def test_the_title_is_a_question_and_the_answer_follows(self, notebook):
        title, answer = notebook.cells[:2]
        assert re.match(r"# .+\?", title.source.splitlines()[0])
        assert answer.source.startswith("**Answer in one sentence:**")
        assert re.search(r"\*Reading time:\* (\d+) minutes", answer.source)
        assert int(re.search(r"\*Reading time:\* (\d+)", answer.source)[1]) <= 15

    def test_one_cell_of_plain_parameters(self, notebook):
        (parameters,) = [cell for cell in _code(notebook) if "parameters" in cell.metadata.get("tags", [])]
        for statement in ast.parse(parameters.source).body:
            assert isinstance(statement, ast.Assign)
            ast.literal_eval(statement.value)

    def test_code_cells_are_short_and_each_has_words_before_it(self, notebook):
        lengths = [len(cell.source.splitlines()) for cell in _code(notebook)]
        assert max(lengths) <= 15
        for before, cell in zip(notebook.cells, notebook.cells[1:], strict=False):
            folded = {"check", "solution"} & set(cell.metadata.get("tags", []))
            assert cell.cell_type == "markdown" or before.cell_type == "markdown" or folded

    def test_it_closes_with_what_you_learned_limits_and_three_exercises(self, notebook):
        closing = [cell for cell in notebook.cells if cell.cell_type == "markdown"][-1].source
        assert "## What you learned" in closing
        assert "**Limits.**" in closing
        assert re.findall(r"^\d\. ", closing, re.MULTILINE) == ["1. ", "2. ", "3. "]

    def test_checks_and_solutions_are_folded(self, notebook):
        for cell in _code(notebook):
            folded = bool({"check", "solution"} & set(cell.metadata.get("tags", [])))
            assert cell.metadata.get("jupyter", {}).get("source_hidden", False) == folded

    def test_never_prints_that_all_is_well(self, notebook):
        for cell in _code(notebook):
            assert not re.search(r"print\(.*(match|equal|ok)\b.*(True|==)", cell.source)

    def test_tables_escape_what_they_show(self, notebook):
        """A Styler writes its cells as HTML unless told; a token may be anything."""
        for cell in _code(notebook):
            assert cell.source.count(".style") == cell.source.count('escape="html"')


class TestOutputs:
    def test_they_are_those_of_a_clean_run(self, committed, notebook_path):
        cells = _code(committed)
        assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
        for output in (output for cell in cells for output in cell.outputs):
            assert output.output_type != "error"
            assert output.get("name") != "stderr"
            assert not re.search(r"(^|[\s\"'(])/(home|root|tmp|work|Users)/", str(output)), "the path of a machine"
            assert not re.search(r"\b\w*Warning\b", str(output)), "a warning"
        assert notebook_path.stat().st_size < 2**20

    def test_every_picture_has_words(self, committed):
        for output in (output for cell in _code(committed) for output in cell.outputs):
            if "image/png" in output.get("data", {}):
                assert len(output.metadata["image/png"]["alt"]) > 40

    def test_they_are_as_the_runner_writes_them(self, committed):
        written = copy.deepcopy(committed)
        normalize(written)
        assert written == committed

    def test_a_fresh_run_gives_the_same(self, committed, fresh_run):
        """Texts of every output, and the pictures' alt texts; what may differ is said by the cell."""
        for old, new in zip(committed.cells, fresh_run.content.cells, strict=True):
            if old.cell_type == "code":
                expected, found = _texts(old), _texts(new)
                if MACHINE in old.metadata.get("tags", []):
                    expected, found = [kind for kind, _ in expected], [kind for kind, _ in found]
                elif VARIES in old.metadata.get("tags", []):
                    expected, found = _without_numbers(expected), _without_numbers(found)
                assert found == expected, old.source

    def test_figures_are_saved_with_their_data(self, committed, fresh_run):
        source = "\n".join(cell.source for cell in _code(committed))
        for stem in re.findall(r'Path\(output\) / "(\w+)"', source):
            for end in ("pdf", "svg", "png", "csv", "json"):
                assert (fresh_run.figures / f"{stem}.{end}").stat().st_size > 0


def test_still_pictures_stand_for_the_stepper_and_for_the_slider():
    """What GitHub, nbviewer and an export to HTML show: the committed outputs, and no live widget."""
    *_, steps = _alts_before("02", "Stepper(")
    *_, pools = _alts_before("05", "interact(")
    assert steps.startswith("60 decode steps.")
    assert re.match(r"Map of the allocator's pools\. At 2,040 tokens.* At 2,060 tokens", pools)


def _alts_before(number, source):
    """Alt texts of the pictures before the cell that makes a widget."""
    (path,) = find_notebooks(FOLDER, [number])
    cells = _code(nbformat.read(path, as_version=4))
    (place,) = [i for i, cell in enumerate(cells) if source in cell.source]
    outputs = (output for cell in cells[:place] for output in cell.outputs)
    return [output.metadata["image/png"]["alt"] for output in outputs if "image/png" in output.get("data", {})]


def _texts(cell):
    """(kind, text) of every output of a cell; of a picture that it is there, and its alt text."""
    texts = []
    for output in cell.outputs:
        if output.output_type == "stream":
            texts.append((output.name, output.text))
        elif output.output_type == "error":
            texts.append(("error", f"{output.ename}: {output.evalue}"))
        else:
            alts = {mime: output.metadata[mime]["alt"] for mime in output.data if mime.startswith("image/")}
            texts += sorted({**output.data, **alts}.items())
    return texts


def _without_numbers(texts):
    return [(kind, re.sub(r"\s+", " ", re.sub(r"[+-]?\d[\d.,]*", "#", text))) for kind, text in texts]


def _notebook(folder, *sources, tagged=None, name="made_up"):
    cells = [nbformat.v4.new_code_cell(source) for source in sources]
    if tagged is not None:
        cells[tagged].metadata["tags"] = ["parameters"]
    path = folder / f"{name}.ipynb"
    nbformat.write(nbformat.v4.new_notebook(cells=cells), path)
    return path


class TestRunner:
    def test_two_at_a_time_with_parameters_one_output_a_printed_text_and_half_the_cores(self, tmp_path, monkeypatch):
        monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
        cores = max(1, os.cpu_count() // 2)
        slowly = "import os, time\nfor text in (a, b, os.environ['OMP_NUM_THREADS']):\n    print(text, flush=True)"
        slowly += "\n    time.sleep(0.3)"
        sources = [_notebook(tmp_path, "a = 1\nb = 'x'", slowly, tagged=0, name=name) for name in ("one", "two")]
        executed = list(execute_notebooks(sources, tmp_path / "out", {"a": 5}, jobs=2))
        assert [run.source for run in executed] == sources
        for run in executed:
            assert [output.text for output in nbformat.read(run.copy, 4).cells[-1].outputs] == [f"5\nx\n{cores}\n"]
            assert len(nbformat.read(run.source, 4).cells) == 2

    def test_a_failing_cell_is_named_and_the_copy_is_there(self, tmp_path):
        source = _notebook(tmp_path, "a = 1", "print('before')\nraise ValueError('too small')", "print('after')")
        copy = tmp_path / "copy.ipynb"
        with pytest.raises(
            NotebookError, match=r"made_up.ipynb, cell 2 \(\"print\('before'\)\"\), failed: ValueError: t"
        ):
            execute_notebook(source, copy, {})
        outputs = nbformat.read(copy, 4).cells[1].outputs
        assert [output.output_type for output in outputs] == ["stream", "error"]

    def test_in_place_keeps_the_source_when_a_cell_fails(self, tmp_path):
        source = _notebook(tmp_path, "1 / 0")
        before = source.read_bytes()
        with pytest.raises(NotebookError, match="division by zero. Its outputs are in .*made_up.failed.ipynb"):
            list(execute_notebooks([source], None, {}))
        assert source.read_bytes() == before

    def test_nothing_is_sent_to_the_kernel_while_its_answer_is_awaited(self, tmp_path):
        """What an output widget shows is not sent back: nbclient could sleep through the answer of the cell then."""
        shows = "from ipywidgets import Output\nout = Output()\nwith out:\n    print('inside')"
        source = _notebook(tmp_path, shows, "print(len(out.outputs))")
        execute_notebook(source, tmp_path / "copy.ipynb", {})
        shown, counted = nbformat.read(tmp_path / "copy.ipynb", 4).cells
        assert (shown.outputs, counted.outputs[0].text) == ([], "0\n")

    def test_a_dead_kernel_is_said(self, tmp_path):
        source = _notebook(tmp_path, "import os", "os._exit(1)")
        with pytest.raises(NotebookError, match="made_up.ipynb, cell .* failed: Kernel died"):
            execute_notebook(source, tmp_path / "copy.ipynb", {})

    @pytest.mark.parametrize(
        ("source", "tagged", "message"),
        [
            ("a = 1", 0, "has no parameter 'c'; it has a"),
            ("a = 1", None, "has 0 cells tagged 'parameters'"),
            ("%matplotlib inline\na = 1", 0, "the cell tagged 'parameters' is not plain Python"),
        ],
    )
    def test_a_parameter_without_its_place_is_refused(self, tmp_path, source, tagged, message):
        with pytest.raises(NotebookError, match=message):
            execute_notebook(_notebook(tmp_path, source, tagged=tagged), tmp_path / "copy.ipynb", {"c": 5})

    def test_a_place_that_cannot_be_written_is_said_before_running(self, tmp_path):
        source = _notebook(tmp_path, "a = 1")
        with pytest.raises(NotebookError, match="cannot be made a folder"):
            execute_notebook(source, source / "copy.ipynb", {})
        with pytest.raises(NotebookError, match="is a folder, so the executed notebook cannot go there"):
            execute_notebook(source, tmp_path, {})


def test_parameter_values_are_literals_never_code():
    assert parse_parameters(["a=__import__('os').getcwd()"]) == {"a": "__import__('os').getcwd()"}
    assert parse_parameters(["a={[]: 1}"]) == {"a": "{[]: 1}"}


@pytest.mark.parametrize("content", ["{", "null", "[]", "[" * 100_000, '{"nbformat": 99, "cells": []}'])
def test_what_is_no_notebook_is_refused(tmp_path, content):
    path = tmp_path / "broken.ipynb"
    path.write_text(content)
    with pytest.raises(NotebookError, match="broken.ipynb is not a notebook"):
        read_notebook(path)


def test_an_ambiguous_name_is_refused(tmp_path):
    for name in ("04_a", "04_b"):
        nbformat.write(nbformat.v4.new_notebook(), tmp_path / f"{name}.ipynb")
    with pytest.raises(NotebookError, match="'04' names more than one notebook .*04_a, 04_b"):
        find_notebooks(tmp_path, ["04"])


@pytest.mark.parametrize(
    ("there", "instead", "cause"),
    [
        ('"outputs"', '"no_outputs"', "no_outputs"),
        ('"execution_count": 1', '"execution_count": "<b>"', "is not of type 'integer', 'null'"),
        ('"source": "a"', '"source": 5', "5 is not valid"),
        ('"source": "a"', '"source": "\\ud800"', "surrogates not allowed"),
        ('{"alt": "b"}', '"b"', "are 'b', not an object with a text alt"),
        ('{"alt": "b"}', '{"alt": 5}', "not an object with a text alt"),
    ],
)
def test_a_notebook_of_another_form_is_refused(tmp_path, there, instead, cause):
    output = nbformat.v4.new_output("display_data", {"image/png": "Li4u"}, metadata={"image/png": {"alt": "b"}})
    cell = nbformat.v4.new_code_cell("a", execution_count=1, outputs=[output])
    text = json.dumps(nbformat.v4.new_notebook(cells=[cell]))
    assert there in text
    path = tmp_path / "01_odd.ipynb"
    path.write_text(text.replace(there, instead))
    with pytest.raises(NotebookError, match=f"01_odd.ipynb is not a notebook .*({cause}).* Take it from the suite's"):
        read_notebook(path)
