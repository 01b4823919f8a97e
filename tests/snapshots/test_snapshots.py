"""Snapshots: real ones replay with every address equal; made-up ones cover settings, streams and cut histories."""

import gzip
import io
import os
import pickle
import random
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from recorded_device import RecordedDevice

from glmlab.allocator.config import DEFAULT_POOL, AllocatorSettings
from glmlab.core.units import MIB
from glmlab.snapshots import unpickle as snapshot_loading
from glmlab.snapshots.replay import ReplayReport, SnapshotError, read_snapshot, replay_snapshot
from glmlab.snapshots.stripping import MOST_FILE_BYTES, save_stripped, strip, strip_file
from glmlab.snapshots.unpickle import to_json_gz

FIRST_PRIVATE = (0, 7)


def replay(tmp_path: Path, snapshot: Any) -> ReplayReport:
    path = tmp_path / "snapshot.pickle"
    path.write_bytes(pickle.dumps(snapshot))
    return replay_snapshot(read_snapshot(path))


def mixed_sizes(choose: random.Random) -> int:
    return choose.choice([choose.randint(1, 5000), choose.randint(1, 2 * MIB), choose.randint(MIB, 30 * MIB)])


def small_sizes(choose: random.Random) -> int:
    return choose.randint(1, MIB)


@pytest.mark.parametrize(
    ("name", "allocations", "segments"), [("a.pickle", 1935, 7), ("b.pickle", 2703, 461), ("c.pickle", 1280, 0)]
)
def test_every_address_of_a_real_gpu_is_the_allocators_choice(
    shared_data: Path, name: str, allocations: int, segments: int
) -> None:
    report = replay_snapshot(read_snapshot(shared_data / "gpu-snapshots" / name))
    found = report.as_dict()
    assert (found["allocations"], found["equal_addresses"]) == (allocations, allocations)
    assert (found["segments"], found["equal_segments"]) == (segments, segments)
    assert found["first_difference"] is None
    assert report.is_equal
    assert report.devices[0].equal_final_state


MADE_UP = [
    AllocatorSettings(),
    AllocatorSettings(max_split_size_mb=24),
    AllocatorSettings(roundup_power2_divisions=4),
    AllocatorSettings(expandable_segments=True),
    AllocatorSettings(expandable_segments=True, large_segment_size_mb=32),
]


@pytest.mark.parametrize("chosen", MADE_UP, ids=range(len(MADE_UP)))
@pytest.mark.parametrize("capacity_mib", [None, 400])
def test_a_whole_history_replays_equal_under_every_setting(
    tmp_path: Path, chosen: AllocatorSettings, capacity_mib: int | None
) -> None:
    device = RecordedDevice(chosen, capacity_mib and capacity_mib * MIB)
    device.run(3, 700, mixed_sizes, streams=2)
    report = replay(tmp_path, device.snapshot())
    assert report.is_equal
    assert report.devices[0].equal_final_state
    assert report.devices[0].notes == []
    assert report.as_dict()["segments"] > 10


@pytest.mark.parametrize("seed", range(4))
@pytest.mark.parametrize("chosen", [MADE_UP[0], MADE_UP[3]], ids=["default", "expandable"])
def test_a_history_that_lost_its_beginning_replays_equal(tmp_path: Path, chosen: AllocatorSettings, seed: int) -> None:
    device = RecordedDevice(chosen, seed=seed)
    device.run(seed, 700, mixed_sizes)
    for part in (0.2, 0.5, 0.9):
        report = replay(tmp_path, device.snapshot(cut=int(part * len(device.history))))
        assert report.is_equal
        assert report.devices[0].equal_final_state


def test_the_tail_of_an_old_block_shows_where_the_next_one_is_carved(tmp_path: Path) -> None:
    device = RecordedDevice(seed=0)
    first, second, third = device.malloc(6 * MIB), device.malloc(7 * MIB), device.malloc(7 * MIB)
    device.free(first)
    device.free(second)
    device.free(third)
    whole = device.malloc(19 * MIB + 512 * 1024)  # keeps a tail of half a MiB
    device.free(whole)
    old = device.malloc(5 * MIB)
    middle = device.malloc(7 * MIB)
    device.free(old)
    old = device.malloc(4 * MIB + 300 * 1024)  # takes all 5 MiB
    device.free(middle)
    cut = len(device.history)
    device.malloc(2 * MIB)  # carved at the true end of the old block
    device.free(old)
    report = replay(tmp_path, device.snapshot(cut))
    assert (report.devices[0].equal_addresses, report.devices[0].allocations) == (1, 1)
    assert report.devices[0].equal_final_state


def test_a_tail_that_nothing_shows_is_found_where_pytorch_passes_over_the_idle_block_behind(tmp_path: Path) -> None:
    device = RecordedDevice(MADE_UP[0], seed=12)
    device.run(12, 600, mixed_sizes)
    report = replay(tmp_path, device.snapshot(cut=int(0.4 * len(device.history))))
    assert report.is_equal
    assert report.devices[0].equal_final_state
    assert "only PyTorch's later choices show" in report.devices[0].notes[0]


@pytest.mark.parametrize(
    "chosen", [AllocatorSettings(max_split_size_mb=128), AllocatorSettings(roundup_power2_divisions=8)]
)
def test_settings_that_an_old_snapshot_does_not_tell_are_found(tmp_path: Path, chosen: AllocatorSettings) -> None:
    device = RecordedDevice(chosen)
    device.run(5, 400, lambda choose: choose.choice([mixed_sizes(choose), choose.randint(1, 300 * MIB)]))
    report = replay(tmp_path, device.snapshot(with_settings=False))
    assert report.is_equal
    assert f"these explain every choice: {chosen}" in report.devices[0].notes[-1]


def test_a_difference_is_found_counted_once_and_explained(tmp_path: Path) -> None:
    device = RecordedDevice()
    first = device.malloc(1024)
    device.malloc(512)
    device.free(first)
    elsewhere = device.place(first.address + 512, 512)  # not the front of the idle block, as PyTorch would have it
    assert elsewhere is not None
    device.requested[elsewhere.address] = 300
    device.record("alloc", elsewhere.address, 300, 0)
    device.malloc(400)
    device.malloc(5000)
    report = replay(tmp_path, device.snapshot())
    found = report.as_dict()
    assert (found["allocations"], found["equal_addresses"]) == (5, 4)
    assert (found["segments"], found["equal_segments"]) == (1, 1)
    assert f"event 5: PyTorch puts 300 B of stream 0 at {elsewhere.address:#x}" in str(found["first_difference"])
    assert report.devices[0].equal_final_state
    assert not report.is_equal
    assert "first difference" in str(report)


def test_a_segment_of_another_size_is_a_difference(tmp_path: Path) -> None:
    device = RecordedDevice(AllocatorSettings(large_segment_size_mb=40))
    device.malloc(3 * MIB)
    snapshot = device.snapshot()
    snapshot["allocator_settings"]["PYTORCH_CUDA_ALLOC_CONF"] = ""
    found = replay(tmp_path, snapshot).as_dict()
    assert (found["segments"], found["equal_segments"], found["equal_addresses"]) == (1, 0, 1)
    assert f"PyTorch takes a segment of {40 * MIB} B, the replay asks for {20 * MIB} B" in str(
        found["first_difference"]
    )


def test_private_pools_keep_their_blocks_to_themselves(tmp_path: Path) -> None:
    device = RecordedDevice()
    device.run(1, 60, small_sizes)
    device.current_pool = FIRST_PRIVATE
    device.run(2, 60, small_sizes)
    device.current_pool = DEFAULT_POOL
    device.run(3, 60, small_sizes)
    report = replay(tmp_path, device.snapshot())
    assert report.is_equal


def test_several_devices_are_replayed_each_for_itself(tmp_path: Path) -> None:
    first, second = RecordedDevice(), RecordedDevice(seed=2)
    first.run(1, 100, mixed_sizes)
    second.run(2, 150, mixed_sizes)
    snapshot, other = first.snapshot(), second.snapshot()
    for segment in other["segments"]:
        segment["device"] = 2
    snapshot["segments"] += other["segments"]
    snapshot["device_traces"] += [[], *other["device_traces"]]
    report = replay(tmp_path, snapshot)
    assert [device.device for device in report.devices] == [0, 2]
    assert report.is_equal
    assert report.as_dict()["allocations"] == sum(device.allocations for device in report.devices)


def test_old_snapshots_without_settings_addresses_and_pool_ids_are_read(tmp_path: Path) -> None:
    device = RecordedDevice(MADE_UP[3])
    device.run(4, 200, mixed_sizes)
    snapshot = device.snapshot(with_settings=False)
    for segment in snapshot["segments"]:
        del segment["segment_pool_id"]
        for block in segment["blocks"]:
            del block["address"]
    report = replay(tmp_path, snapshot)
    assert report.is_equal
    assert "tells no allocator settings" in report.devices[0].notes[0]


def test_skipped_kinds_of_events_are_told_in_notes(tmp_path: Path) -> None:
    device = RecordedDevice()
    device.run(4, 200, mixed_sizes)
    snapshot = device.snapshot()
    trace = [entry for entry in snapshot["device_traces"][0] if entry["action"] != "free_completed"]
    snapshot["device_traces"][0] = [*trace, {"action": "brand_new", "addr": 0, "size": 0, "stream": 0}]
    report = replay(tmp_path, snapshot)
    assert report.is_equal
    assert "no completed frees" in " ".join(report.devices[0].notes)
    assert "'brand_new'" in " ".join(report.devices[0].notes)


@pytest.mark.parametrize("seed", range(6))
def test_a_history_with_gaps_gives_a_report_not_a_crash(tmp_path: Path, seed: int) -> None:
    device = RecordedDevice(MADE_UP[seed % len(MADE_UP)])
    device.run(seed, 400, mixed_sizes, streams=2)
    snapshot = device.snapshot()
    choose = random.Random(seed)
    snapshot["device_traces"][0] = [entry for entry in device.history if choose.random() > 0.1]
    snapshot["segments"] = [segment for segment in snapshot["segments"] if choose.random() > 0.1]
    report = replay(tmp_path, snapshot)
    assert any("gaps" in note or "not comparable" in note for note in report.devices[0].notes)
    assert 0 < report.devices[0].equal_addresses <= report.devices[0].allocations


# -- stripped snapshots ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["a.pickle", "b.pickle", "c.pickle"])
def test_a_stripped_real_snapshot_replays_to_the_same_report_and_holds_no_path(
    shared_data: Path, tmp_path: Path, name: str
) -> None:
    source = shared_data / "gpu-snapshots" / name
    assert re.search(rb"/(home|oscar|scratch)/", source.read_bytes())

    file = strip_file(source, tmp_path / "stripped.json.gz", {"gpu": "unknown"})

    assert file.stat().st_size < MOST_FILE_BYTES / 10
    text = gzip.decompress(file.read_bytes()).decode()
    assert not re.search(r"[/\\~]|\.py|@", text)
    snapshot = read_snapshot(file)
    assert replay_snapshot(snapshot).as_dict() == replay_snapshot(read_snapshot(source)).as_dict()
    assert snapshot.provenance == {"gpu": "unknown"}
    operations = {event.operation for event in snapshot.devices[0].events if event.action == "alloc"}
    assert len(operations) > 5
    assert any("empty" in operation or "mul_Tensor" in operation for operation in operations)


@pytest.mark.parametrize("chosen", MADE_UP, ids=range(len(MADE_UP)))
def test_a_stripped_history_replays_equal_under_every_setting(tmp_path: Path, chosen: AllocatorSettings) -> None:
    device = RecordedDevice(chosen, 400 * MIB)
    device.run(3, 700, mixed_sizes, streams=2)
    file = save_stripped(strip(device.snapshot(), {}), tmp_path / "stripped.json.gz")
    again = save_stripped(strip(device.snapshot(), {}), tmp_path / "again.json.gz")
    report = replay_snapshot(read_snapshot(file))
    assert report.as_dict() == replay(tmp_path, device.snapshot()).as_dict()
    assert report.is_equal
    assert file.read_bytes() == again.read_bytes()


def test_notes_that_could_be_a_path_are_left_out(tmp_path: Path) -> None:
    device = RecordedDevice()
    for note in ("3|model.layers.0.mlp", "/home/somebody", "C:\\Users\\x", "a@b", "x" * 300):
        device.note = note
        device.malloc(600)
    snapshot = read_snapshot(save_stripped(strip(device.snapshot(), {}), tmp_path / "notes.json.gz"))
    notes = [event.note for event in snapshot.devices[0].events if event.action == "alloc"]
    assert notes == ["3|model.layers.0.mlp", "", "", "", ""]


@pytest.mark.parametrize(
    ("change", "says"),
    [
        (lambda s: s["segments"][0].update(segment_type="/home/somebody"), "no plain word"),
        (lambda s: s["device_traces"][0][0].update(action="a/b"), "no plain word"),
        (lambda s: s["device_traces"][0].append(7), "no snapshot of torch.cuda.memory"),
        (lambda s: s.pop("segments"), "no snapshot of torch.cuda.memory"),
    ],
)
def test_what_is_no_snapshot_is_not_stripped(change: Callable[[dict[str, Any]], Any], says: str) -> None:
    snapshot = whole_snapshot()
    change(snapshot)
    with pytest.raises(SnapshotError, match=says):
        strip(snapshot, {})


def test_a_stripped_snapshot_too_large_to_be_kept_is_refused(tmp_path: Path) -> None:
    device = RecordedDevice()
    choose = random.Random(0)
    for _ in range(4000):
        device.malloc(choose.randint(1, MIB))
    document = strip(device.snapshot(), {"noise": [choose.random() for _ in range(300_000)]})
    with pytest.raises(SnapshotError, match="more than 1.91 MiB. Record fewer steps"):
        save_stripped(document, tmp_path / "large.json.gz")
    assert list(tmp_path.iterdir()) == []


# -- files that are no snapshots ---------------------------------------------------------------------------------------


MARKER = Path(tempfile.gettempdir()) / "a-snapshot-ran-code"


class RunsCode:
    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {MARKER}",)


class PersistentPickler(pickle.Pickler):
    def persistent_id(self, obj: Any) -> Any:
        return "outside" if obj == "mark" else None


def persistent() -> bytes:
    buffer = io.BytesIO()
    PersistentPickler(buffer).dump({"segments": ["mark"]})
    return buffer.getvalue()


def whole_snapshot() -> dict[str, Any]:
    device = RecordedDevice()
    device.run(1, 50, mixed_sizes)
    return device.snapshot()


def with_memo_index(index: int) -> bytes:
    """A list that is memoised at a place far away: CPython's table grows to it."""
    return b"\x80\x02]r" + index.to_bytes(4, "little") + b"."


def changed(change: Callable[[dict[str, Any]], Any]) -> bytes:
    snapshot = whole_snapshot()
    change(snapshot)
    return pickle.dumps(snapshot)


def stripped(change: Callable[[dict[str, Any]], Any]) -> bytes:
    document = strip(whole_snapshot(), {})
    change(document)
    return to_json_gz(document)


@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b"", "truncated"),
        (b"no pickle at all", "not a pickle"),
        (pickle.dumps(whole_snapshot())[:-200], "truncated"),
        (with_memo_index(2**31 - 1), "place 2,147,483,647 of its memo after 2 steps"),
        (b"(dp1000000000\n.", "place 1,000,000,000 of its memo after 2 steps"),
        (b"\x80\x04\x95" + (2**62).to_bytes(8, "little") + b"}.", "truncated: the pickle says that 4,611,686,018"),
        (b"\x80\x05\x96" + (2**40).to_bytes(8, "little") + b"x.", "bytearray8.*may be truncated"),
        (gzip.compress(b"no json"), "gzip, but no JSON"),
        (gzip.compress(b"{}")[:-4], "truncated: the compressed data end too early"),
        (stripped(lambda d: d.update(format="glmlab stripped snapshot 99")), "this version reads 'glmlab stripped"),
        (stripped(lambda d: d.update(device_traces=[[]])), "not a list of columns"),
        (stripped(lambda d: d["device_traces"][0]["size"].pop()), "columns of its events do not fit together"),
        (stripped(lambda d: d["device_traces"][0]["labels"].clear()), "columns of its events do not fit together"),
        (stripped(lambda d: d["device_traces"][0].pop("addr")), "columns of its events do not fit together"),
        (stripped(lambda d: d.update(provenance=[1])), "'provenance' is not a dict"),
        (pickle.dumps({"segments": RunsCode()}), r"wants to load (posix|nt)\.system"),
        (persistent(), "refers to an object outside"),
        (pickle.dumps([{"address": 1}]), "without history"),
        (pickle.dumps({"model": 1}), "no 'segments'"),
        (pickle.dumps(7), "not a snapshot"),
        (changed(lambda s: s.update(device_traces=[[]])), "no history"),
        (changed(lambda s: s.pop("device_traces")), "no history"),
        (changed(lambda s: s.update(device_traces=7)), "'device_traces' is not a list"),
        (changed(lambda s: s["segments"][0].pop("address")), "segment 0 has no number 'address'"),
        (changed(lambda s: s["segments"][0].update(total_size=1)), "add up to"),
        (changed(lambda s: s["device_traces"][0][3].pop("action")), "event 3 of device 0 has no 'action'"),
        (changed(lambda s: s["device_traces"][0][3].update(size="x")), "event 3 of device 0 has no number 'size'"),
        (changed(lambda s: s["device_traces"][0][3].update(pool_id="x")), "not a pair of numbers"),
        (changed(lambda s: s["allocator_settings"].update(max_split_size=MIB)), "must be over 20"),
        (changed(lambda s: s.update(allocator_settings=[])), "'allocator_settings' is not a dict"),
    ],
    ids=lambda value: value if isinstance(value, str) else "",
)
def test_a_file_that_is_no_snapshot_is_refused_by_name(tmp_path: Path, content: bytes, says: str) -> None:
    path = tmp_path / "file.pickle"
    path.write_bytes(content)
    with pytest.raises(SnapshotError, match=says) as caught:
        replay_snapshot(read_snapshot(path))
    assert str(path) in str(caught.value)
    assert not MARKER.exists()


def test_a_file_that_unpacks_to_more_than_any_snapshot_is_refused_before_it_is_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_stripped(strip(whole_snapshot(), {}), tmp_path / "snapshot.json.gz")
    n_bytes = len(gzip.decompress(path.read_bytes()))
    monkeypatch.setattr(snapshot_loading, "MOST_UNPACKED_BYTES", n_bytes)
    read_snapshot(path)
    monkeypatch.setattr(snapshot_loading, "MOST_UNPACKED_BYTES", n_bytes - 1)
    with pytest.raises(SnapshotError, match=r"unpacks to more than .* KiB, which no stripped snapshot does"):
        read_snapshot(path)


def test_a_missing_file_and_a_folder_are_refused(tmp_path: Path) -> None:
    for path in (tmp_path / "missing.pickle", tmp_path):
        with pytest.raises(SnapshotError, match="not there"):
            read_snapshot(path)
    with pytest.raises(SnapshotError, match="cannot be read: File name too long"):
        read_snapshot(tmp_path / ("a" * 5000))
