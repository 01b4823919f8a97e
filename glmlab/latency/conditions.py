"""Under what conditions a time was measured: device, clocks, driver, versions, date."""

import importlib.metadata
import platform
from typing import Any

import torch

from glmlab.memory.probes import MemoryProbe, ProbeError
from glmlab.memory.provenance import operating_system, today
from glmlab.models.loading import LoadedModel


def conditions(loaded: LoadedModel) -> dict[str, Any]:
    """What a measured time depends on beside the code; the provenance of every table of this package.

    Returns:
        model, precision, dtype, attention, compiled, device, threads (CPU), gpus (clocks as found, in MHz and °C),
        driver, versions, os, date. What the machine does not tell is None or missing.

    Example:
        >>> from glmlab import load_model
        >>> found = conditions(load_model("embedded", precision="fp32", device="cpu"))
        >>> found["dtype"], found["gpus"], found["driver"]
        ('fp32', [], None)
    """
    report = loaded.report
    probe = MemoryProbe.for_model(loaded.model)
    found: dict[str, Any] = {
        "model": report.name,
        "precision": report.precision,
        "dtype": report.dtype,
        "attention": report.attention,
        "compiled": loaded.compiled is not None,
        "device": report.device,
        "gpus": clocks(probe),
        "driver": probe.driver,
        "os": operating_system(),
        "versions": {
            "python": platform.python_version(),
            "glmlab": importlib.metadata.version("glmlab"),
            **report.versions,
        },
        "date": today(),
    }
    if not probe.gpus:
        found["threads"] = torch.get_num_threads()
        found["cpu"] = torch.backends.cpu.get_cpu_capability()
    return found


def clocks(probe: MemoryProbe) -> list[dict[str, Any]] | str:
    """SM clock and temperature of each GPU at this moment; the reason where the driver does not answer any more."""
    try:
        return probe.clocks()
    except ProbeError as error:
        return f"not read: {error}"
