"""Files of traces: written and read back equal; damaged, edited and oversized ones are refused."""

import json
import zipfile
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from glmlab.core.units import MIB
from glmlab.tracing.trace import MOST_BYTES, TraceError, TurnTokens, load_recorded, read_trace

TRACE = "chatglm3-6b-original-int4"


def test_a_trace_survives_its_file(tmp_path: Path) -> None:
    trace = load_recorded(TRACE)
    again = read_trace(trace.save(tmp_path / "trace.npz"))
    assert again.facts == trace.facts
    assert again.labels == trace.labels
    assert np.array_equal(again.program.events, trace.program.events)
    assert again.program.carried == trace.program.carried
    with np.load(tmp_path / "trace.npz", allow_pickle=False) as archive:
        assert all(archive[name].dtype != object for name in archive.files)
    assert [path.name for path in tmp_path.iterdir()] == ["trace.npz"]


def test_damaged_traces_are_refused(tmp_path: Path) -> None:
    path = load_recorded(TRACE).save(tmp_path / "trace.npz")
    whole = path.read_bytes()
    path.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(TraceError, match="not a readable allocation trace"):
        read_trace(path)
    path.write_text("no trace")
    with pytest.raises(TraceError, match="not a readable allocation trace"):
        read_trace(path)
    np.savez(path, document=np.array('{"format": 99}'))
    with pytest.raises(TraceError, match="format 99"):
        read_trace(path)
    with pytest.raises(TraceError, match="is not there"):
        read_trace(tmp_path / "missing.npz")


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        ({"document": "[" * 100_000}, "not a readable allocation trace"),
        ({"document": "{}"}, "not a readable allocation trace"),
        ({"facts": {"context_limit": "x"}}, "the fact context_limit is 'x'"),
        ({"carried": {"steady": [0.5]}}, "not a readable allocation trace"),
        ({"label_of_event": np.array(5)}, "needs as many labels"),
        ({"section_names": ["loading"]}, "no section 'load', which this conversation needs"),
    ],
)
def test_hand_edited_traces_are_refused(tmp_path: Path, edit: dict[str, Any], message: str) -> None:
    path = load_recorded(TRACE).save(tmp_path / "trace.npz")
    with np.load(path) as archive:
        arrays = dict(archive)
    document = json.loads(str(arrays["document"]))
    for name, value in edit.items():
        if name == "facts":
            document["facts"] |= value
        elif name == "section_names":
            document[name] = [*value, *document[name][1:]]
        elif name in document:
            document[name] = value
        else:
            arrays[name] = np.array(value)
    if "document" not in edit:
        arrays["document"] = np.array(json.dumps(document))
    np.savez(path, **arrays)
    with pytest.raises(TraceError, match=message):
        read_trace(path).schedule([TurnTokens(8, 3)])


def test_a_trace_that_unpacks_to_gigabytes_is_refused_before_it_is_read(tmp_path: Path) -> None:
    path = load_recorded(TRACE).save(tmp_path / "bomb.npz")
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive, archive.open("events2.npy", "w") as member:
        for _ in range(MOST_BYTES // MIB):
            member.write(bytes(MIB))
    assert path.stat().st_size < MIB
    with pytest.raises(TraceError, match=r"its arrays say that they have 64\.\d+ MiB, which no trace has"):
        read_trace(path)
