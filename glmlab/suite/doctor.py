"""What works on this machine and what does not: versions, GPU, driver, fonts, memory; and whether a model fits."""

import importlib.metadata
import platform
from dataclasses import dataclass
from pathlib import Path

from glmlab.core.units import format_bytes

PACKAGES = ("torch", "transformers", "bitsandbytes", "gpustat", "matplotlib", "pandas", "jupyterlab", "ipykernel")


@dataclass(frozen=True)
class Finding:
    """One thing that was checked: what was found, whether it works, and what to do where it does not."""

    what: str
    found: str
    good: bool = True
    follows: str = ""

    def __str__(self) -> str:
        line = f"{'ok ' if self.good else '-- '} {self.what:<14} {self.found}"
        return f"{line}\n    {'':<14} {self.follows}" if self.follows else line


def examine() -> list[Finding]:
    """Check this machine; nothing is changed and nothing is downloaded.

    Example:
        >>> [finding.what for finding in examine()][:2]
        ['system', 'Python']
    """
    return [
        Finding("system", f"{platform.system()} {platform.release()}, {platform.machine()}"),
        Finding("Python", platform.python_version()),
        *_packages(),
        _memory(),
        *_gpus(),
        _fonts(),
    ]


def environment() -> dict[str, str]:
    """The facts by which two machines are compared: system, GPU, memory, versions.

    Example:
        >>> list(environment())
        ['system', 'GPU', 'host memory', 'Python', 'transformers', 'PyTorch', 'CUDA']
    """
    import gpustat
    import psutil
    import torch
    from gpustat.nvml import pynvml

    try:
        gpus = ", ".join(f"{gpu.name}, {gpu.memory_total:,} MiB" for gpu in gpustat.new_query())
    except pynvml.NVMLError:
        gpus = ""
    return {
        "system": f"{platform.system()} {platform.machine()}",
        "GPU": gpus or "none",
        "host memory": format_bytes(psutil.virtual_memory().total),
        "Python": platform.python_version(),
        "transformers": importlib.metadata.version("transformers"),
        "PyTorch": torch.__version__,
        "CUDA": torch.version.cuda or "none",
    }


def examine_model(model: str, precision: str, tokens: int, device: str = "auto") -> list[Finding]:
    """Whether a model is on this machine, and whether it fits; at most its config is fetched.

    Raises:
        GlmlabError: as ``will_it_fit``.

    Example:
        >>> [finding.good for finding in examine_model("embedded", "fp32", tokens=100, device="cpu")]
        [True, True, True]
    """
    from glmlab.forecast.fit import will_it_fit

    fit = will_it_fit(model, precision=precision, tokens=tokens, device=device)
    if fit.fits:
        verdict = f"It fits, with {format_bytes(fit.free_bytes - fit.asked.total_bytes)} to spare."
    else:
        verdict = f"It does not fit: {format_bytes(fit.asked.total_bytes - fit.free_bytes)} short. "
        verdict += f"{fit.fitting}; it fits." if fit.fitting else "No precision fits: take a smaller model or context."
    return [
        _checkpoint(model),
        Finding("free memory", f"{fit.device}: {format_bytes(fit.free_bytes)} of {format_bytes(fit.total_bytes)}"),
        Finding(f"{fit.tokens:,} tokens", str(fit.asked), fit.fits, f"{verdict} {fit.assumed}".strip()),
    ]


def _checkpoint(model: str) -> Finding:
    """Whether the files are here, without asking a hub."""
    from glmlab.models.checkpoints import find_checkpoint, is_hub_id
    from glmlab.models.hub import CheckpointError, fetch_command, find_cached

    if is_hub_id(model) and not Path(model).is_dir():
        if find_cached(model) is None:
            found = "not on this machine, or only in part"
            return Finding("checkpoint", found, False, f"Fetch it: {fetch_command(model)}")
    else:
        try:
            find_checkpoint(model)
        except CheckpointError as error:
            return Finding("checkpoint", "none that can be loaded", False, str(error))
    return Finding("checkpoint", "on this machine")


def _packages() -> list[Finding]:
    findings = []
    for package in PACKAGES:
        try:
            findings.append(Finding(package, importlib.metadata.version(package)))
        except importlib.metadata.PackageNotFoundError:
            findings.append(Finding(package, "not installed", False, f"Install it: pip install {package}"))
    return findings


def _memory() -> Finding:
    import psutil

    memory = psutil.virtual_memory()
    return Finding("host memory", f"{format_bytes(memory.available)} free of {format_bytes(memory.total)}")


def _gpus() -> list[Finding]:
    """What the driver sees (gpustat), and what PyTorch can use."""
    import gpustat
    import torch
    from gpustat.nvml import pynvml

    try:
        stats = gpustat.new_query()
    except pynvml.NVMLError as error:
        works = "Works here: forecasts, and the embedded model on the CPU. Does not: measuring GPU memory."
        return [Finding("GPU driver", f"none ({error})", False, works)]
    gpus = [
        Finding(f"GPU {gpu.index}", f"{gpu.name}, {gpu.memory_used} of {gpu.memory_total} MiB used") for gpu in stats
    ]
    if torch.cuda.is_available():
        cuda = Finding("CUDA", f"PyTorch was built for CUDA {torch.version.cuda}")
    else:
        mend = "Install a CUDA build of PyTorch: then models run on the GPU and its memory can be measured."
        cuda = Finding("CUDA", f"PyTorch {torch.__version__} cannot use the GPU", False, mend)
    return [Finding("GPU driver", str(stats.driver_version)), *gpus, cuda]


def _fonts() -> Finding:
    """The bundled font in which figures draw Chinese: whether matplotlib finds and reads it."""
    from matplotlib import font_manager, ft2font

    from glmlab.figures.style import CJK_FAMILY

    try:
        path = font_manager.findfont(CJK_FAMILY, fallback_to_default=False)
        characters = len(ft2font.FT2Font(path).get_charmap())
    except (ValueError, OSError, RuntimeError) as error:
        mend = "Figures cannot draw Chinese. Install glmlab from a full checkout."
        return Finding("CJK font", f"none ({error})", False, mend)
    return Finding("CJK font", f"{CJK_FAMILY} (bundled), {characters:,} characters; emoji are drawn as U+1F44B")
