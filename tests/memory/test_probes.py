"""Probes against the real gpustat and pynvml over a stand-in driver library; torch.cuda is faked, psutil is real."""

import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest
from fake_gpu import GPU_UUIDS, MIG_UUIDS, FakeCuda, FakeDriver
from torch import nn

from glmlab.core.units import mib
from glmlab.memory.probes import MemoryProbe, ProbeError, Reading

OTHER = os.getppid()  # a process that is not this one, and that gpustat can look up

Machine = Callable[..., MemoryProbe]


@pytest.fixture
def machine(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """Probe of a machine whose driver and CUDA list these GPUs."""

    def with_gpus(
        *lines: str, cuda: tuple[str, ...] = GPU_UUIDS[:1], devices: str | list[str] = "cuda:0"
    ) -> MemoryProbe:
        driver.says(*lines)
        FakeCuda(cuda).install(monkeypatch)
        return MemoryProbe(devices)

    return with_gpus


def both_ways(probe: MemoryProbe) -> list[list[Reading]]:
    return [probe.read(), probe.read(fast=True)]


# --------------------------------------------------------------------------------------------- without a GPU


def test_without_a_gpu_only_the_process_is_read() -> None:
    (reading,) = MemoryProbe.for_model(nn.Linear(2, 2)).read()

    assert reading.source == "process"
    assert reading.rss_mib == pytest.approx(mib(psutil.Process().memory_info().rss), rel=0.2)
    assert {value for name, value in reading.row().items() if name != "rss_mib"} == {None}


def test_rss_follows_the_memory_that_is_touched() -> None:
    probe = MemoryProbe()
    before = probe.read(fast=True)[0].rss_mib
    ballast = bytearray(b"x") * (64 * 2**20)

    assert probe.read(fast=True)[0].rss_mib - before > 32
    assert len(ballast) == 64 * 2**20


def test_gpu_without_a_driver_library_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    from gpustat.nvml import pynvml

    def no_library() -> None:
        raise pynvml.NVMLError(pynvml.NVML_ERROR_LIBRARY_NOT_FOUND)

    monkeypatch.setattr(pynvml, "_LoadNvmlLibrary", no_library)
    FakeCuda(GPU_UUIDS[:1]).install(monkeypatch)

    with pytest.raises(ProbeError, match=r"NVIDIA driver's library .* not there.*Install the driver; in a container"):
        MemoryProbe("cuda:0")


# ------------------------------------------------------------------------------------------------- which GPU


def test_gpus_are_found_by_uuid_where_cuda_counts_in_another_order(machine: Machine) -> None:
    lines = ("gpu 24000 1000", "gpu 80000 2000", "gpu 24000 3000")
    one = machine(*lines, cuda=(GPU_UUIDS[1], GPU_UUIDS[0]), devices="cuda")  # CUDA counts the fastest first
    for readings in both_ways(one):
        assert [(r.gpu, r.used_mib, r.total_mib) for r in readings] == [(1, 2000.0, 80000.0)]

    two = machine(*lines, cuda=(GPU_UUIDS[2], GPU_UUIDS[0]), devices=["cuda:0", "cuda:1", "cuda:1", "cpu"])
    for readings in both_ways(two):
        assert [(r.gpu, r.used_mib) for r in readings] == [(2, 3000.0), (0, 1000.0)]


WITH_A_STAND_IN_FOR_TORCH = f"""
import sys
from types import SimpleNamespace as Fake
figures = ("memory_allocated", "memory_reserved", "max_memory_allocated", "max_memory_reserved")
cuda = Fake(**dict.fromkeys((*figures, "reset_peak_memory_stats"), lambda ordinal: 0))
cuda.get_device_properties = lambda ordinal: Fake(uuid="{GPU_UUIDS[1]}")
sys.modules["torch"] = Fake(cuda=cuda, device=lambda name: Fake(index=0))
from glmlab.memory.probes import MemoryProbe
probe = MemoryProbe("cuda:0")
readings = probe.read() + probe.read(fast=True)
print([(r.source, r.gpu, r.used_mib, r.process_mib) for r in readings], probe.driver)
"""


def test_hidden_gpu_end_to_end_with_the_library_found_by_the_loader(library: Path, tmp_path: Path) -> None:
    """CUDA shows the second GPU as its first; NVML ignores CUDA_VISIBLE_DEVICES."""
    state = tmp_path / "state"
    state.write_text("gpu 24000 1000 self=111\ngpu 80000 2000 self=222\n", encoding="utf-8")
    environment = {"LD_LIBRARY_PATH": str(library.parent), "FAKE_NVML_STATE": str(state), "CUDA_VISIBLE_DEVICES": "1"}
    done = subprocess.run(
        [sys.executable, "-c", WITH_A_STAND_IN_FOR_TORCH],
        env={**os.environ, **environment}, capture_output=True, text=True, check=True,
    )  # fmt: skip

    assert done.stdout.strip() == "[('gpustat', 1, 2000.0, 222.0), ('nvml', 1, 2000.0, 222.0)] 999.00.fake"


def test_lost_neighbour_does_not_hide_the_gpu(machine: Machine) -> None:
    for readings in both_ways(machine("gpu 24000 1000", "lost", "gpu 80000 2000", cuda=(GPU_UUIDS[1],))):
        assert [(r.gpu, r.used_mib) for r in readings] == [(1, 2000.0)]


def test_gpu_that_the_driver_does_not_list_is_refused(machine: Machine) -> None:
    with pytest.raises(ProbeError, match=rf"no GPU with the UUID of cuda:0 \({GPU_UUIDS[3]}\); it lists: GPU-.*0\."):
        machine("gpu 24000 1000", cuda=(GPU_UUIDS[3],))


# ----------------------------------------------------------------------------------------------------- MIG


def test_mig_slice_named_in_cuda_visible_devices_is_read(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.says("gpu 80000 30000", "mig 10000 900", f"mig 20000 1900 self=1800 {OTHER}=50")
    FakeCuda(GPU_UUIDS[:1]).install(monkeypatch)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", f"MIG-{MIG_UUIDS[1]}")

    for readings in both_ways(MemoryProbe("cuda:0")):
        assert [(r.source, r.gpu, r.name, r.total_mib, r.used_mib, r.process_mib, r.others_mib) for r in readings] == [
            ("nvml", 0, "Fake GPU MIG 1g.10gb", 20000.0, 1900.0, 1800.0, 50.0)
        ]


@pytest.mark.parametrize(
    ("cuda", "slices"),
    [
        (MIG_UUIDS[0], ("mig 10000 900", "mig 20000 1900")),  # CUDA gives the slice's UUID
        (GPU_UUIDS[0], ("mig 10000 900",)),  # or the GPU's, which has no other slice
    ],
)
def test_mig_slice_is_found_by_uuid(machine: Machine, cuda: str, slices: tuple[str, ...]) -> None:
    for readings in both_ways(machine("gpu 80000 30000", *slices, cuda=(cuda,))):
        assert [(r.gpu, r.used_mib) for r in readings] == [(0, 900.0)]


def test_one_of_two_slices_needs_its_name(machine: Machine) -> None:
    names = f"one of MIG-{MIG_UUIDS[0]}, MIG-{MIG_UUIDS[1]}"
    with pytest.raises(ProbeError, match=rf"one of 2 MIG slices.*CUDA_VISIBLE_DEVICES=<{names}>"):
        machine("gpu 80000 30000", "mig 10000 900", "mig 20000 1900")


# -------------------------------------------------------------------------------------- figures of processes


@pytest.mark.parametrize(
    ("processes", "process_mib", "others_mib"),
    [
        (f"self=700 {OTHER}=200", 700.0, 200.0),
        ("self=700", 700.0, 0.0),  # the driver lists every process, and there is no other
        ("", None, None),  # a container that does not see the host's process ids
        (f"{OTHER}=200", None, None),
        (f"self=withheld {OTHER}=withheld", None, None),  # Windows (WDDM)
        (f"self=700 {OTHER}=withheld", 700.0, None),
    ],
)
def test_figures_that_the_driver_withholds_are_missing(
    machine: Machine, processes: str, process_mib: float | None, others_mib: float | None
) -> None:
    for readings in both_ways(machine(f"gpu 24000 1000 {processes}")):
        assert [(r.used_mib, r.process_mib, r.others_mib) for r in readings] == [(1000.0, process_mib, others_mib)]


# ----------------------------------------------------------------------------------------------- torch.cuda


def test_peaks_are_those_since_the_last_reading(driver: FakeDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    driver.says("gpu 24000 1000")
    cuda = FakeCuda(GPU_UUIDS[:1]).install(monkeypatch)
    probe = MemoryProbe("cuda:0")
    cuda.allocate(50)
    cuda.allocate(-30)

    assert probe.gpus == [{"index": 0, "name": "Fake GPU", "total_mib": 24000.0}]  # leaves the peaks alone
    first, second = probe.read()[0], probe.read(fast=True)[0]

    assert (first.allocated_mib, first.reserved_mib) == (120.0, 240.0)
    assert (first.peak_allocated_mib, first.peak_reserved_mib) == (150.0, 300.0)
    assert second.peak_allocated_mib == 120.0


# -------------------------------------------------------------------------------------- the driver goes away


@pytest.mark.parametrize("fast", [False, True])
def test_driver_or_gpu_lost_in_mid_run(machine: Machine, driver: FakeDriver, fast: bool) -> None:
    probe = machine("gpu 24000 1000")
    assert probe.read(fast=fast)[0].used_mib == 1000.0

    driver.says("gpu 24000 1000", "lost")
    with pytest.raises(ProbeError, match="lost"):
        probe.read(fast=fast)

    driver.goes_away()
    with pytest.raises(ProbeError, match=r"driver does not answer while reading \(.*\)\. Check it with nvidia-smi"):
        probe.read(fast=fast)
