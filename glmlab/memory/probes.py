"""What memory is in use now: gpustat, torch.cuda and the process itself, three sources in one Reading.

    gpustat      used_mib, process_mib, others_mib   what the driver counts: reserved + CUDA context + other programs
    torch.cuda   allocated_mib, reserved_mib, peaks  what this process's PyTorch allocator counts
    process      rss_mib                             host memory of this process; without a GPU nothing else is known

gpustat's query sleeps 100 ms, so :meth:`MemoryProbe.read` is for once a turn; ``read(fast=True)`` asks the driver's
library (NVML) directly in about 0.02 ms and is for every token. Both count the same.

NVML ignores CUDA_VISIBLE_DEVICES and numbers GPUs in another order than CUDA, so GPUs are matched by UUID. On a MIG
slice NVML gives the slice's own figures; gpustat only knows whole GPUs.

Under Windows (WDDM), and in containers that do not see the host's process ids, the driver withholds the figures of
single processes. They are then None: missing, not 0.
"""

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from glmlab.core.errors import GlmlabError
from glmlab.core.units import mib

if TYPE_CHECKING:
    import torch

READING_COLUMNS = (
    "gpu", "used_mib", "process_mib", "others_mib", "reserved_mib", "allocated_mib", "peak_allocated_mib",
    "peak_reserved_mib", "rss_mib",
)  # fmt: skip
"""Columns of a recording that a reading fills."""

_ADVICE = (
    "Check it with nvidia-smi; a driver that was updated or reset needs a restart of the machine or the container."
)


class ProbeError(GlmlabError):
    """The driver cannot be asked, or no longer answers; the message says which GPU and what to do."""


@dataclass(frozen=True)
class Reading:
    """Memory at one moment, of one GPU or, if ``gpu`` is None, of a process without one. What is unknown is None."""

    source: str  # of used_mib: "gpustat", "nvml", or "process" (no GPU)
    rss_mib: float  # resident host memory of this process
    gpu: int | None = None  # index as nvidia-smi and gpustat count
    name: str | None = None
    total_mib: float | None = None
    used_mib: float | None = None
    process_mib: float | None = None  # this process's part of used_mib
    others_mib: float | None = None  # sum over the other processes; None unless the driver gives every one's figure
    allocated_mib: float | None = None
    reserved_mib: float | None = None
    peak_allocated_mib: float | None = None  # since the previous reading; in the first one, since the process started
    peak_reserved_mib: float | None = None

    def row(self) -> dict[str, float | int | None]:
        """The figures under the names of a recording's columns."""
        return {column: getattr(self, column) for column in READING_COLUMNS}


@dataclass(frozen=True)
class _Gpu:
    """One CUDA device of torch and what NVML calls it."""

    ordinal: int  # torch's number
    handle: Any  # NVML's, of a MIG slice or of a whole GPU
    index: int  # NVML's number of the whole GPU
    uuid: str
    name: str

    @property
    def is_mig(self) -> bool:
        return self.uuid.startswith("MIG-")


class MemoryProbe:
    """Reads the memory of the GPUs that a model lies on, or of the process if it lies on none.

    Args:
        devices: one torch device or several ("cpu", "cuda:0", ``torch.device("cuda", 1)``); each CUDA device gives one
            Reading.

    Raises:
        ProbeError: a CUDA device without a driver library, or one that the driver does not know.

    Example:
        >>> readings = MemoryProbe("cpu").read()
        >>> [(reading.source, reading.used_mib, reading.rss_mib > 1) for reading in readings]
        [('process', None, True)]
    """

    def __init__(self, devices: "str | torch.device | Sequence[str | torch.device]" = "cpu") -> None:
        several = [devices] if isinstance(devices, str) or not isinstance(devices, Sequence) else devices
        ordinals = sorted({_ordinal(str(device)) for device in several if str(device).startswith("cuda")})
        self.driver: str | None = None  # its version; None without a GPU
        self._gpus: list[_Gpu] = []
        if ordinals:
            with _driver_errors("before the first reading") as nvml:
                nvml.nvmlInit()
                self.driver = nvml.nvmlSystemGetDriverVersion()
                self._gpus = [_find_gpu(nvml, ordinal) for ordinal in ordinals]

    @classmethod
    def for_model(cls, model: Any) -> "MemoryProbe":
        """Probe of every device that a model's parameters and buffers lie on."""
        return cls(sorted({str(tensor.device) for tensor in (*model.parameters(), *model.buffers())}))

    @property
    def gpus(self) -> list[dict[str, Any]]:
        """Index, name and total_mib of each GPU, for a recording's provenance."""
        with _driver_errors("before the first reading"):
            return [
                {"index": gpu.index, "name": gpu.name, "total_mib": _ask_nvml(gpu)["total_mib"]} for gpu in self._gpus
            ]

    def clocks(self) -> list[dict[str, Any]]:
        """Index, name, sm_clock_mhz and temperature_c of each GPU now; None if the driver does not tell.

        Raises:
            ProbeError: the driver went away.
        """
        with _driver_errors("while reading clocks") as nvml:
            asked = {
                "sm_clock_mhz": (nvml.nvmlDeviceGetClockInfo, nvml.NVML_CLOCK_SM),
                "temperature_c": (nvml.nvmlDeviceGetTemperature, nvml.NVML_TEMPERATURE_GPU),
            }
            return [
                {"index": gpu.index, "name": gpu.name}
                | {name: _if_told(nvml, ask, gpu.handle, what) for name, (ask, what) in asked.items()}
                for gpu in self._gpus
            ]

    def read(self, *, fast: bool = False) -> list[Reading]:
        """Read all three sources; takes 100 ms per GPU, or with ``fast`` (NVML instead of gpustat) less than 1 ms.

        Raises:
            ProbeError: the driver went away.
        """
        import psutil

        rss_mib = mib(psutil.Process().memory_info().rss)
        if not self._gpus:
            return [Reading("process", rss_mib)]
        with _driver_errors("while reading"):
            by_gpustat = {} if fast else _ask_gpustat([gpu for gpu in self._gpus if not gpu.is_mig])
            return [
                Reading(
                    "gpustat" if gpu.uuid in by_gpustat else "nvml",
                    rss_mib,
                    gpu=gpu.index,
                    name=gpu.name,
                    **(by_gpustat.get(gpu.uuid) or _ask_nvml(gpu)),
                    **_ask_torch(gpu.ordinal),
                )
                for gpu in self._gpus
            ]


# ------------------------------------------------------------------------------------------ three sources

Figures = dict[str, float | None]


def _ask_gpustat(gpus: Sequence[_Gpu]) -> dict[str, Figures]:
    """Figures by UUID, in whole MiB; gpustat leaves out processes that the operating system does not show it."""
    import gpustat

    if not gpus:
        return {}
    figures = {}
    for stat in gpustat.GPUStatCollection.new_query(id=[gpu.index for gpu in gpus]):
        if not stat.available or stat.entry["memory.used"] is None:
            raise ProbeError(f"GPU {stat.index} no longer answers ({stat.name}). {_ADVICE}")
        figures[stat.uuid] = {
            "total_mib": float(stat.memory_total),
            "used_mib": float(stat.memory_used),
            **_by_process({process["pid"]: process["gpu_memory_usage"] for process in stat.processes or []}),
        }
    return figures


def _ask_nvml(gpu: _Gpu) -> Figures:
    nvml = _nvml()
    memory = nvml.nvmlDeviceGetMemoryInfo(gpu.handle)
    by_pid: dict[int, float | None] = {}
    for running in (nvml.nvmlDeviceGetComputeRunningProcesses, nvml.nvmlDeviceGetGraphicsRunningProcesses):
        try:
            listed = running(gpu.handle)
        except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission):
            continue
        for process in listed:
            by_pid.setdefault(process.pid, mib(process.usedGpuMemory) if process.usedGpuMemory else None)
    return {"total_mib": mib(memory.total), "used_mib": mib(memory.used), **_by_process(by_pid)}


def _by_process(by_pid: dict[int, float | None]) -> Figures:
    """Own figure and the sum of the others'; None if the driver does not list or does not tell them.

    If this process uses the GPU but is not listed, process ids are not the host's, and a listed figure may be its own.
    """
    others = [figure for pid, figure in by_pid.items() if pid != os.getpid()]
    told = [float(figure) for figure in others if figure is not None]
    own = by_pid.get(os.getpid())
    return {
        "process_mib": None if own is None else float(own),
        "others_mib": float(sum(told)) if os.getpid() in by_pid and len(told) == len(others) else None,
    }


def _ask_torch(ordinal: int) -> Figures:
    import torch

    figures: Figures = {
        "allocated_mib": mib(torch.cuda.memory_allocated(ordinal)),
        "reserved_mib": mib(torch.cuda.memory_reserved(ordinal)),
        "peak_allocated_mib": mib(torch.cuda.max_memory_allocated(ordinal)),
        "peak_reserved_mib": mib(torch.cuda.max_memory_reserved(ordinal)),
    }
    torch.cuda.reset_peak_memory_stats(ordinal)
    return figures


def _nvml() -> Any:
    """Return pynvml as gpustat patches it, so that "used" means the same in both (without the driver's own reserve)."""
    from gpustat.nvml import pynvml

    return pynvml


def _if_told(nvml: Any, ask: Any, *arguments: Any) -> int | None:
    """What a function of NVML answers; None if this GPU or this driver does not know it."""
    try:
        return int(ask(*arguments))
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_NoPermission, nvml.NVMLError_FunctionNotFound):
        return None


@contextmanager
def _driver_errors(when: str) -> Iterator[Any]:
    """Lend NVML, and turn its errors into one that says what to do."""
    nvml = _nvml()
    try:
        yield nvml
    except nvml.NVMLError_LibraryNotFound as error:
        raise ProbeError(
            "the model lies on a GPU, but the NVIDIA driver's library (libnvidia-ml.so.1, nvml.dll) is not there, so "
            "the GPU's memory cannot be read. Install the driver; in a container, run it with --gpus all "
            "(NVIDIA_DRIVER_CAPABILITIES must include 'utility'); under WSL put /usr/lib/wsl/lib on LD_LIBRARY_PATH."
        ) from error
    except nvml.NVMLError as error:
        raise ProbeError(f"the NVIDIA driver does not answer {when} ({error}). {_ADVICE}") from error


# ------------------------------------------------------------------------------------------ which GPU is it


def _ordinal(device: str) -> int:
    """Torch's number of a CUDA device; plain "cuda" is the current one."""
    import torch

    parsed = torch.device(device)
    return torch.cuda.current_device() if parsed.index is None else parsed.index


def _find_gpu(nvml: Any, ordinal: int) -> _Gpu:
    """Find the GPU or MIG slice that torch calls ``cuda:ordinal``."""
    import torch

    def gpu(handle: Any, whole: Any) -> _Gpu:
        index, uuid = nvml.nvmlDeviceGetIndex(whole), nvml.nvmlDeviceGetUUID(handle)
        return _Gpu(ordinal, handle, index, uuid, nvml.nvmlDeviceGetName(handle))

    visible = [entry.strip() for entry in os.environ.get("CUDA_VISIBLE_DEVICES", "").split(",")]
    if ordinal < len(visible) and visible[ordinal].startswith("MIG-"):
        handle = nvml.nvmlDeviceGetHandleByUUID(visible[ordinal])
        return gpu(handle, nvml.nvmlDeviceGetDeviceHandleFromMigDeviceHandle(handle))

    wanted = str(torch.cuda.get_device_properties(ordinal).uuid)  # without NVML's prefix
    listed = []
    for whole in _answering_gpus(nvml):
        slices = _mig_slices(nvml, whole)
        listed.append(nvml.nvmlDeviceGetUUID(whole))
        if listed[-1] == f"GPU-{wanted}":  # what CUDA also says of a slice
            if len(slices) > 1:
                names = ", ".join(map(nvml.nvmlDeviceGetUUID, slices))
                raise ProbeError(
                    f"cuda:{ordinal} is one of {len(slices)} MIG slices of a GPU, and CUDA does not say which. Name it "
                    f"before starting: CUDA_VISIBLE_DEVICES=<one of {names}>."
                )
            return gpu(slices[0] if slices else whole, whole)
        for handle in slices:
            if nvml.nvmlDeviceGetUUID(handle) == f"MIG-{wanted}":
                return gpu(handle, whole)
    raise ProbeError(
        f"the driver lists no GPU with the UUID of cuda:{ordinal} ({wanted}); it lists: {', '.join(listed) or 'none'}. "
        "CUDA and the driver's library disagree, as they do after an update: restart the machine or the container."
    )


def _answering_gpus(nvml: Any) -> Iterator[Any]:
    """Handles of all GPUs but those that are lost, which must not hide the others."""
    for index in range(nvml.nvmlDeviceGetCount()):
        try:
            yield nvml.nvmlDeviceGetHandleByIndex(index)
        except nvml.NVMLError_GpuIsLost:
            continue


def _mig_slices(nvml: Any, whole: Any) -> list[Any]:
    """Handles of the MIG slices of a GPU; none if MIG is off or unknown to the driver."""
    try:
        if nvml.nvmlDeviceGetMigMode(whole)[0] != nvml.NVML_DEVICE_MIG_ENABLE:
            return []
        n_places = nvml.nvmlDeviceGetMaxMigDeviceCount(whole)
    except (nvml.NVMLError_NotSupported, nvml.NVMLError_FunctionNotFound):
        return []
    slices = []
    for place in range(n_places):
        try:
            slices.append(nvml.nvmlDeviceGetMigDeviceHandleByIndex(whole, place))
        except nvml.NVMLError_NotFound:  # an empty place
            continue
    return slices
