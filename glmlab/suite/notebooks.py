"""Run notebooks from a clean kernel, with parameters, and say which cell failed.

papermill runs notebooks, too; but it only warns of an unknown parameter and adds cells and metadata of its own.
"""

import ast
import os
import re
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError, CellTimeoutError, DeadKernelError
from nbclient.output_widget import OutputWidget

from glmlab.core.errors import GlmlabError

_PICTURES = {"image/png", "image/jpeg"}


class NotebookError(GlmlabError):
    """A notebook cannot be found, read or run; the message names notebook, cell and cause."""


@dataclass(frozen=True)
class Executed:
    """A notebook that ran to its end."""

    source: Path
    copy: Path
    seconds: float

    def __str__(self) -> str:
        return f"{self.source.name}: {self.seconds:.0f} s, {self.copy}"


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
    """Read a notebook and check it against its format.

    Raises:
        NotebookError: the file is not a notebook, or a picture's metadata are not those that the suite writes.
    """
    try:
        notebook = nbformat.read(path, as_version=4)  # logs what is invalid, and goes on
        nbformat.validate(notebook)
        nbformat.writes(notebook, version=nbformat.NO_CONVERT).encode("utf-8")  # half a surrogate pair is no text
        for output in (output for cell in notebook.cells for output in cell.get("outputs", [])):
            for kind in _PICTURES & output.get("metadata", {}).keys():
                about = output.metadata[kind]
                if not isinstance(about, dict) or not isinstance(about.get("alt", ""), str):
                    raise ValueError(
                        f"the metadata of a picture ({kind}) are {about!r:.60}, not an object with a text alt"
                    )
        return notebook
    except Exception as error:  # nbformat reads before it validates: a foreign file fails in many ways
        cause = next(iter(str(error).splitlines()), type(error).__name__)
        raise NotebookError(f"{path.name} is not a notebook ({cause}). Take it from the suite's checkout.") from error


def execute_notebooks(
    sources: Sequence[Path], out: Path | None, parameters: Mapping[str, Any], jobs: int = 1
) -> Iterator[Executed]:
    """Run notebooks, several at a time, and yield them in order.

    Args:
        sources: the notebooks.
        out: folder of the executed copies; None writes the outputs back into the notebooks.
        parameters: as for :func:`execute_notebook`.
        jobs: how many run at a time. Times that a notebook measures are those of a shared machine where it is not 1.

    Raises:
        NotebookError: as :func:`execute_notebook`; notebooks that run at that moment come to their end.
    """
    run = partial(execute_notebook, parameters=parameters)
    copies = [source if out is None else out / source.name for source in sources]
    if jobs == 1:
        yield from map(run, sources, copies)
    else:
        with ProcessPoolExecutor(jobs, initializer=_share_cores, initargs=(jobs,)) as pool:
            yield from pool.map(run, sources, copies)


def _share_cores(jobs: int) -> None:
    """Give each kernel its share of the cores: threads of several kernels that wait for each other waste them."""
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, (os.cpu_count() or 1) // jobs)))


class _OutputWidget(OutputWidget):  # type: ignore[misc]
    """An output widget whose outputs stay here: the kernel does not need them.

    nbclient 0.11 sends them over the socket on which it awaits the kernel's answer, and may then miss the answer.
    """

    def sync_state(self) -> None:
        pass


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
    if parameters:
        _inject(notebook, source, parameters)
    try:
        copy.parent.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise NotebookError(f"{copy.parent} cannot be made a folder ({error.strerror}). Give another --out.") from error
    if copy.is_dir():
        raise NotebookError(f"{copy} is a folder, so the executed notebook cannot go there. Give another --out.")
    client = NotebookClient(
        notebook,
        timeout=timeout_s,
        kernel_name="python3",
        resources={"metadata": {"path": str(source.parent)}},
        record_timing=False,
        extra_arguments=["--log-level=ERROR"],
    )
    client.widget_registry = {"@jupyter-widgets/output": {"OutputModel": _OutputWidget}}
    started, failure = time.monotonic(), None
    try:
        client.execute()
    except (CellExecutionError, CellTimeoutError, DeadKernelError) as error:
        failure = error
    normalize(notebook)
    written = copy.with_suffix(".failed.ipynb") if failure and copy == source else copy
    nbformat.write(notebook, written)
    if failure:
        raise NotebookError(
            f"{_where(notebook, source)} failed: {_cause(failure)}. Its outputs are in {written}."
        ) from failure
    return Executed(source, copy, time.monotonic() - started)


def _inject(notebook: Any, source: Path, parameters: Mapping[str, Any]) -> None:
    """Put a cell with the given values behind the cell tagged ``parameters``."""
    tagged = [i for i, cell in enumerate(notebook.cells) if "parameters" in cell.metadata.get("tags", [])]
    if len(tagged) != 1:
        raise NotebookError(f"{source.name} has {len(tagged)} cells tagged 'parameters'; it needs one.")
    try:
        tree = ast.parse(notebook.cells[tagged[0]].source)
    except (ValueError, SyntaxError, RecursionError, MemoryError) as error:
        raise NotebookError(
            f"{source.name}: the cell tagged 'parameters' is not plain Python ({error}). Let it hold only lines "
            "such as: precision = 'auto'."
        ) from error
    names = {node.id for node in ast.walk(tree) if isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store)}
    if unknown := sorted(set(parameters) - names):
        raise NotebookError(f"{source.name} has no parameter {unknown[0]!r}; it has {', '.join(sorted(names))}.")
    lines = ["# from the command line", *(f"{name} = {value!r}" for name, value in parameters.items())]
    cell = nbformat.v4.new_code_cell("\n".join(lines), metadata={"tags": ["injected-parameters"]})
    notebook.cells.insert(tagged[0] + 1, cell)


def normalize(notebook: Any) -> None:
    """Leave out what differs between two equal runs: the kernel's patch version, cell ids, addresses, live widgets.

    Each picture stays in one form, for the size of the file: the copy of a PNG in HTML goes, and the drawing that
    JupyterLab adds to a mermaid diagram.

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
            cell.outputs = _joined(cell.outputs)
            for output in cell.outputs:
                _normalize_output(output.get("data", {}), cell["id"])


def _joined(outputs: Sequence[Any]) -> list[Any]:
    """Outputs without live widgets, each printed text in one piece: how many pieces arrive depends on the moment."""
    joined: list[Any] = []
    for output in outputs:
        if "application/vnd.jupyter.widget-view+json" in output.get("data", {}):
            continue
        if joined and output.output_type == joined[-1].output_type == "stream" and output.name == joined[-1].name:
            joined[-1].text += output.text
        else:
            joined.append(output)
    return joined


def _normalize_output(data: dict[str, Any], cell_id: str) -> None:
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
