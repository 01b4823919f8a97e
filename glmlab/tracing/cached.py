"""Traces are cached by the content of what they depend on: their settings, config included, and the code.

A trace that is cached is read without loading torch.
"""

import ast
import functools
import hashlib
import json
import warnings
from dataclasses import asdict
from pathlib import Path

from glmlab.core.resources import cache_folder
from glmlab.tracing.trace import AllocationTrace, TraceError, TraceSettings, read_trace, versions


def trace(settings: TraceSettings, *, refresh: bool = False) -> AllocationTrace:
    """Trace every allocation and free of loading, prefills and decode steps, for any turns.

    Args:
        settings: those of a forecast: ``forecast.workload.trace_settings()``.
        refresh: trace again, whatever the cache holds.

    Raises:
        CheckpointError: no model can be built from the config.
        TraceError: the model cannot run; a size is not affine in the context length, the order of events changes, or
            something stays alive that nobody is known to hold; a static cache or a sliding window is too short.

    Example:
        >>> from glmlab.models.checkpoints import find_config, read_config_json
        >>> config = read_config_json(find_config("chatglm3-6b"))
        >>> trace(TraceSettings(config, "ChatGLM3-6B")).facts.kv_bytes_per_token
        28672
    """
    path = cache_folder() / f"trace-{_digest(settings)}.npz"
    if not refresh and path.is_file():
        try:
            return read_trace(path)
        except TraceError as error:
            warnings.warn(f"the cached trace is damaged and made again: {error}", stacklevel=2)
    from glmlab.tracing.tracer import record_trace  # loads torch, which a cached trace does not need

    made = record_trace(settings)
    try:
        made.save(path)
    except OSError as error:
        warnings.warn(f"the trace could not be cached ({error}); set GLMLAB_CACHE to a folder of yours", stacklevel=2)
    return made


def _digest(settings: TraceSettings) -> str:
    """Name of a trace: a digest of its settings, of the code that makes it, and of the packages' versions."""
    digest = hashlib.sha256(json.dumps(asdict(settings), sort_keys=True).encode())
    for file in _code():
        digest.update(file.read_bytes())
    digest.update(json.dumps(versions()).encode())
    return digest.hexdigest()[:24]


@functools.cache
def _code() -> tuple[Path, ...]:
    """Files of this folder and of the package that they import, directly or through others."""
    root = Path(__file__).parent.parent.parent
    found: set[Path] = set()
    to_read = list(Path(__file__).parent.glob("*.py"))
    while to_read:
        file = to_read.pop()
        if file in found:
            continue
        found.add(file)
        for node in ast.walk(ast.parse(file.read_bytes())):
            names = []
            if isinstance(node, ast.Import):
                names = [alias.name for alias in node.names]
            elif isinstance(node, ast.ImportFrom):
                names = [str(node.module), *(f"{node.module}.{alias.name}" for alias in node.names)]
            paths = [root.joinpath(*name.split(".")).with_suffix(".py") for name in names if name.startswith("glmlab.")]
            to_read += [path for path in paths if path.is_file()]
    return tuple(sorted(found))
