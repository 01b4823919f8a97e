"""What a recording says about where it comes from: model, settings, machine, versions."""

import importlib.metadata
import os
import platform
import re
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from glmlab.core.resources import source_date
from glmlab.generation.chat import ChatSession
from glmlab.memory.conversations import Conversation
from glmlab.memory.probes import MemoryProbe
from glmlab.models.checkpoints import EMBEDDED
from glmlab.models.loading import LoadReport


def chat_provenance(
    session: ChatSession, probe: MemoryProbe, conversation: Conversation | None, every_token: bool
) -> dict[str, Any]:
    """Model, settings, machine and versions of a recorded chat, as JSON can hold them; no path of this machine."""
    report = session.loaded.report
    sampling = session.generation_config or session.loaded.model.generation_config
    settings = ("do_sample", "temperature", "top_k", "top_p") if sampling.do_sample else ("do_sample",)
    return {
        "status": "running",
        **run_provenance(report, probe),
        "sampling": {name: getattr(sampling, name) for name in settings},
        "cache": "static" if session.static_tokens or session.loaded.compiled else "dynamic",
        "static_tokens": session.static_tokens or 0,
        "answers": "exactly max_new_tokens of each turn, since random weights do not end an answer"
        if report.weights == "random"
        else "to the stop token, at most max_new_tokens of each turn",
        "rows": "one a token" if every_token else "one a turn",
        "conversation": None
        if conversation is None
        else {
            "name": conversation.name,
            "language": conversation.language,
            "turns": len(conversation.turns),
            "sha256": conversation.sha256,
        },
        "resumptions": [],
    }


def run_provenance(report: LoadReport, probe: MemoryProbe) -> dict[str, Any]:
    """What any measured run says about itself; plain types, no path of this machine.

    Raises:
        ProbeError: the driver does not answer.

    Example:
        >>> from glmlab import load_model
        >>> report = load_model("embedded", precision="fp32", device="cpu").report
        >>> run_provenance(report, MemoryProbe("cpu"))["load_path"]
        'checkpoint -> ChatGLM3ForCausalLM on CPU'
    """
    provenance: dict[str, Any] = {
        "date": today(),
        "model": _public_name(report.name),
        "load_path": _load_path(report),
        "weights": report.weights,
        "precision": report.precision,
        "dtype": report.dtype,
        "attention": report.attention,
        "compiled": report.compilation is not None and report.compilation.failure is None,
        "device": report.device,
        "parameters": report.parameters,
        "weight_bytes": report.bytes_by_component,
        "load_s": round(report.seconds, 6),
        "tokenizer": report.tokenizer,
        "gpus": probe.gpus,
        "driver": probe.driver,
        "versions": {
            "python": platform.python_version(),
            **{name: importlib.metadata.version(name) for name in ("glmlab", "gpustat")},
            **report.versions,
        },
        "os": " ".join([platform.system(), *re.findall(r"^[\d.]+", platform.release()), platform.machine()]),
    }  # of a kernel's name only the number, since the rest may name its owner
    if probe.driver is not None:
        import torch

        provenance["cuda"] = torch.version.cuda
        provenance["compute_capability"] = ".".join(map(str, torch.cuda.get_device_capability()))
        provenance["allocator_settings"] = os.environ.get("PYTORCH_CUDA_ALLOC_CONF", "")
    return provenance


def today() -> str:
    """Now in UTC, or the moment that SOURCE_DATE_EPOCH names, so that a rebuilt file is the same file."""
    return (source_date() or datetime.now(UTC)).isoformat(timespec="seconds")


def _public_name(name: str) -> str:
    """Name of a model without the folders of this machine.

    Example:
        >>> _public_name("zai-org/chatglm3-6b"), _public_name("/checkpoints/chatglm3-6b")
        ('zai-org/chatglm3-6b', 'chatglm3-6b')
    """
    path = Path(name).expanduser()
    return path.resolve().name if name != EMBEDDED and (path.is_absolute() or path.exists()) else name


def _load_path(report: LoadReport) -> str:
    source = "random weights from the config" if report.weights == "random" else "checkpoint"
    quantised = ", linear layers quantised by bitsandbytes" if report.precision in ("int8", "int4") else ""
    device = "GPU" if report.device.startswith("cuda") else "CPU"
    return f"{source} -> {report.architecture} on {device}{quantised}"
