"""Run notebooks from a clean kernel, with parameters, and say which cell failed."""

import ast
import os
import re
from base64 import b64decode
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError

from glmlab.core.errors import GlmlabError
from glmlab.figures.style import picture_bundle

PARAMETERS_TAG = "parameters"
INJECTED_TAG = "injected-parameters"


class NotebookError(GlmlabError):
    """A notebook cannot be found or run; names notebook, cell and cause."""


@dataclass(frozen=True)
class Executed:
    """A notebook that ran to its end."""

    source: Path
    copy: Path
    seconds: float


def parse_parameters(assignments: Iterable[str]) -> dict[str, Any]:
    """Read ``name=value`` pairs; a value is a Python literal, else the text itself.

    Raises:
        NotebookError: a pair without ``=``, or a name that is no identifier.

    Example:
        >>> parse_parameters(["precision=int4", "seed=3", "every_token=True"])
        {'precision': 'int4', 'seed': 3, 'every_token': True}
    """
    parameters: dict[str, Any] = {}
    for assignment in assignments:
        name, equals, value = assignment.partition("=")
        if not equals or not name.isidentifier():
            raise NotebookError(f"parameter {assignment!r} is not name=value. Write, for example, precision=int4.")
        try:
            parameters[name] = ast.literal_eval(value)
        except (ValueError, SyntaxError, TypeError, RecursionError, MemoryError):
            parameters[name] = value
    return parameters


def find_notebooks(folder: Path, names: Sequence[str]) -> list[Path]:
    """Return the notebooks of a folder, all or those named by the beginning of their file name ("04").

    Raises:
        NotebookError: no such folder, no notebooks in it, or a name that fits none or several.
    """
    notebooks = sorted(folder.glob("*.ipynb"))
    if not notebooks:
        raise NotebookError(f"{folder} holds no notebooks. Run this in the suite's checkout, or give --folder.")
    chosen = []
    for name in names:
        fitting = [path for path in notebooks if path.name.startswith(Path(name).name)]
        if len(fitting) != 1:
            raise NotebookError(
                f"{name!r} names {'no' if not fitting else 'more than one'} notebook of {folder}: "
                f"{', '.join(path.stem for path in fitting or notebooks)}."
            )
        chosen += fitting
    return chosen or notebooks


def read_notebook(path: Path) -> Any:
    """Read a notebook that has every part that the format asks for.

    Raises:
        NotebookError: the file is not one, or holds something else where the format has a part of it.
    """
    try:
        notebook = nbformat.read(path, as_version=4)  # logs what is invalid, and goes on
        nbformat.validate(notebook)
        nbformat.writes(notebook, version=nbformat.NO_CONVERT).encode("utf-8")  # half a surrogate pair is no text
        for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
            for kind in _PICTURES & output.get("metadata", {}).keys():
                _check_picture(kind, output.metadata[kind])
        return notebook
    except Exception as error:  # nbformat reads before it validates: a foreign file fails in many ways
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise NotebookError(f"{path.name} is not a notebook ({cause}). Take it from the suite's checkout.") from error


_PICTURES = {"image/png", "image/jpeg"}


def _check_picture(kind: str, about: Any) -> None:
    """Refuse what describes a picture in another way than the suite does; the format says nothing of it."""
    if not isinstance(about, dict) or not isinstance(about.get("alt", ""), str):
        raise ValueError(f"the metadata of a picture ({kind}) are {about!r:.60}, not an object with a text alt")


def execute_notebook(source: Path, copy: Path, parameters: Mapping[str, Any], timeout_s: int = 3600) -> Executed:
    """Run a notebook in its own folder from a fresh kernel and write the executed copy, also when a cell fails.

    Args:
        source: the notebook.
        copy: where the executed notebook goes; may be the source itself, which then changes only on success.
        parameters: values that replace those of the cell tagged ``parameters``.
        timeout_s: longest time for one cell.

    Raises:
        NotebookError: a parameter that the notebook does not have, no cell tagged ``parameters``, or a cell that
            failed, with notebook, cell number, first line and the error.
    """
    notebook = read_notebook(source)
    _inject(notebook, source, parameters)
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        resources={"metadata": {"path": str(source.parent)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    )
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotebookError(f"{copy.parent} cannot be made a folder ({error.strerror}). Give another --out.") from error
    if copy.is_dir():
        raise NotebookError(f"{copy} is a folder, so the executed notebook cannot go there. Give another --out.")
    started = os.times().elapsed
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        normalize(notebook)
        failed = copy if copy != source else copy.with_suffix(".failed.ipynb")
        nbformat.write(notebook, failed)
        raise NotebookError(
            f"{_where(notebook, source)} failed: {_cause(error)}. Its outputs are in {failed}."
        ) from error
    normalize(notebook)
    nbformat.write(notebook, copy)
    return Executed(source, copy, os.times().elapsed - started)


def _inject(notebook: Any, source: Path, parameters: Mapping[str, Any]) -> None:
    """Put a cell with the given values behind the cell tagged ``parameters``."""
    if not parameters:
        return
    tagged = [i for i, cell in enumerate(notebook.cells) if PARAMETERS_TAG in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise NotebookError(f"{source.name} has {len(tagged)} cells tagged {PARAMETERS_TAG!r}; it needs one.")
    try:
        tree = ast.parse(notebook.cells[tagged[0]].source)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise NotebookError(
            f"{source.name}: the cell tagged {PARAMETERS_TAG!r} is not plain Python ({error}). Let it hold only lines "
            "such as: precision = 'auto'."
        ) from error
    names = {
        target.id
        for statement in ast.walk(tree)
        if isinstance(statement, ast.Assign)
        for target in statement.targets
        if isinstance(target, ast.Name)
    }
    if unknown := sorted(set(parameters) - names):
        raise NotebookError(f"{source.name} has no parameter {unknown[0]!r}; it has {', '.join(sorted(names))}.")
    lines = [f"{name} = {value!r}" for name, value in parameters.items()]
    cell = nbformat.v4.new_code_cell("\n".join(["# from the command line", *lines]), metadata={"tags": [INJECTED_TAG]})
    notebook.cells.insert(tagged[0] + 1, cell)


def normalize(notebook: Any) -> None:
    """Leave out what differs between two equal runs: the kernel's patch version, cell ids, addresses, live widgets.

    Outputs keep one form of each picture, for the size of the file: the copy of a PNG in HTML goes
    (``describe_pictures`` brings it back), and the drawing that JupyterLab adds to a mermaid diagram.

    Example:
        >>> output = nbformat.v4.new_output("execute_result", {"text/plain": "<Styler at 0x7f02ab>"})
        >>> notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("table.style", outputs=[output])])
        >>> normalize(notebook)
        >>> notebook.cells[0].outputs[0].data
        {'text/plain': '<Styler>'}
    """
    notebook.metadata = nbformat.from_dict(
        {
            "kernelspec": {"display_name": "Python 3", "language": "python", "name": "python3"},
            "language_info": {"name": "python"},
        }
    )
    for number, cell in enumerate(notebook.cells):
        cell["id"] = f"cell-{number:02d}"
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = _joined([output for output in cell.outputs if not _is_dead_widget(output)])
            for output in cell.outputs:
                _normalize_output(output, cell["id"])


def describe_pictures(notebook: Any) -> None:
    """Give every PNG of a notebook in HTML too, with its alt text; nbconvert would export it without.

    Example:
        >>> metadata = {"image/png": {"alt": "A line.", "width": 604, "height": 441}}
        >>> output = nbformat.v4.new_output("display_data", {"image/png": "Li4u"}, metadata=metadata)
        >>> notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell("line", outputs=[output])])
        >>> describe_pictures(notebook)
        >>> 'alt="A line."' in notebook.cells[0].outputs[0].data["text/html"]
        True
    """
    for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
        if "image/png" in output.get("data", {}):
            png, known = b64decode(output.data["image/png"]), output.metadata["image/png"]
            data, _ = picture_bundle(png, known["alt"], known["width"], known["height"])
            output.data["text/html"] = data["text/html"]


def _is_dead_widget(output: Any) -> bool:
    """Whether an output is a live widget (a slider, a progress bar), which shows nothing without its kernel."""
    return "application/vnd.jupyter.widget-view+json" in output.get("data", {})


def _joined(outputs: Sequence[Any]) -> list[Any]:
    """Outputs with each printed text in one piece; how many pieces arrive depends on the moment."""
    joined: list[Any] = []
    for output in outputs:
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _normalize_output(output: Any, cell_id: str) -> None:
    data = output.get("data", {})
    if "image/png" in data:
        data.pop("text/html", None)
    if "text/vnd.mermaid" in data:
        data.pop("image/svg+xml", None)
    if "text/plain" in data:
        data["text/plain"] = re.sub(r" at 0x[0-9a-f]+>", ">", data["text/plain"])
    if "text/html" in data:  # pandas draws five hex digits for the tables of every Styler without a name
        data["text/html"] = re.sub(r"\bT_[0-9a-f]{5}(?=[_\" ])", f"T_{cell_id}", data["text/html"])


def _where(notebook: Any, source: Path) -> str:
    for number, cell in enumerate(notebook.cells, start=1):
        if cell.cell_type == "code" and any(output.output_type == "error" for output in cell.outputs):
            return f"{source.name}, cell {number} ({cell.source.splitlines()[0]!r}),"
    running = [n for n, cell in enumerate(notebook.cells, start=1) if cell.cell_type == "code" and cell.execution_count]
    return f"{source.name}, cell {running[-1] if running else 1},"


def _cause(error: Exception) -> str:
    if isinstance(error, CellExecutionError):
        return f"{error.ename}: {error.evalue}".rstrip(": .")  # a bare assert has no message
    return str(error).splitlines()[0].rstrip(".") or type(error).__name__
