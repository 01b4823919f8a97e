"""Notebook 01, with a checkpoint folder that brings its own source: it is drawn, and never run."""

from pathlib import Path

import nbformat
import pandas as pd

from glmlab.core.resources import data_path
from glmlab.suite.notebooks import execute_notebook, find_notebooks

FOLDER = Path(__file__).resolve().parents[2] / "notebooks"


def _source(marker: Path) -> str:
    """Classes of the published names, in a file that leaves a mark when it is run."""
    published = pd.read_json(data_path("structure", "chatglm3-6b.json"), typ="series")["classes"]
    own = [entry for entry in published if entry["module"] == "modeling_chatglm"]
    lines = ["from pathlib import Path", f"Path({str(marker)!r}).touch()", "from torch import nn"]
    for entry in own:
        lines.append(f"class {entry['name']}({', '.join(entry['bases'])}):")
        lines += [f"    def {name}(self): ..." for name in entry["members"]]
    return "\n".join(lines)


def test_it_reads_the_source_beside_a_checkpoint_and_leaves_its_figures(checkpoint, tmp_path):
    (checkpoint / "modeling_chatglm.py").write_text(_source(tmp_path / "marker"))
    (source,) = find_notebooks(FOLDER, ["01"])
    executed = tmp_path / "executed.ipynb"
    execute_notebook(source, executed, {"model": str(checkpoint), "output": str(tmp_path / "figures")})
    assert not (tmp_path / "marker").exists()
    stems = {path.stem for path in (tmp_path / "figures").iterdir()}
    assert stems == {"class_hierarchy", "original_hierarchy", "module_tree"}
    texts = [output.get("text", "") for cell in nbformat.read(executed, 4).cells for output in cell.get("outputs", [])]
    assert any(text.startswith("read from checkpoint: ClassGraph of ") for text in texts)
