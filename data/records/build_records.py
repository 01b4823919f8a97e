"""Converts other people's GPU records into Curves: one CSV and one JSON each, sizes in MiB, provenance beside them.

    python data/records/build_records.py FOLDER_WITH_THE_RAW_RECORDS

The raw files are not part of this repository; ``SOURCES`` says where each was published. Only figures are carried over.
Two bases of units occur in them, MB (10**6 bytes) and GiB with two decimals; each entry names its own.
"""

import argparse
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pandas as pd

from glmlab.core.curve import Curve
from glmlab.core.units import GIB, MIB

HERE = Path(__file__).resolve().parent


@dataclass(frozen=True)
class Source:
    """One published file and how to read it.

    Attributes:
        path: of the raw file, below the folder of raw records.
        published: repository, commit and path where it was published, and its licence.
        about: model, precision, GPU, versions, and what was read and how.
        forecast: arguments of ``Forecast.of`` that describe the run.
        columns: raw column -> (column of the Curve, bytes of its unit); the unit is None for counts.
        label: of the Curve.
    """

    path: str
    label: str
    published: dict[str, str]
    about: dict[str, Any]
    forecast: dict[str, Any]
    columns: dict[str, tuple[str, int | None]]
    keep: dict[str, str] = field(default_factory=dict)  # rows whose column has this value


ATTENTION_SINKS = {"repository": "tomaarsen/attention_sinks", "commit": "d79f4d8", "licence": "Apache-2.0"}
TEXTWIZ = {"repository": "Cyrilvallez/TextWiz", "commit": "6dd2497", "licence": "Apache-2.0"}
QWEN = {"repository": "QwenLM/Qwen2.5", "licence": "Apache-2.0"}
OPTIMUM = {"repository": "huggingface/optimum-benchmark", "commit": "abbe8b67", "licence": "Apache-2.0"}
CHAPTER = {
    "repository": "TingsongYu/PyTorch-Tutorial-2nd",
    "commit": "not recorded",
    "path": "code/chapter-10/gpu_usage",
    "licence": "CC BY-NC: only the rows where the memory changes are carried over, as facts",
}


def every_token(name: str, model: str, label: str) -> Source:
    """Allocated memory after every token, one token a step from an empty cache."""
    return Source(
        path=f"every-token/{name}.csv",
        label=label,
        published={**ATTENTION_SINKS, "path": f"benchmark/outputs_{name}/transformers.csv"},
        about={
            "model": model,
            "precision": "fp16",
            "gpu": "not named",
            "versions": {"transformers": "about 4.34"},
            "read": "torch.cuda.memory_allocated() after every token; the loss is computed beside it",
        },
        forecast={"model": model, "precision": "fp16", "prompt": 1},
        columns={"context_tokens": ("context_tokens", None), "allocated_bytes": ("allocated_mib", 1)},
    )


def peaks(file: str, model: str, precision: str, attention: str) -> Source:
    """Peaks of one prefill and one decode step above what was allocated before, and the bytes of the cache."""
    return Source(
        path=f"prefill-and-decode-peaks/new/{file}.csv",
        label=f"{model}, {precision}, prefill and decode peaks",
        published={**TEXTWIZ, "path": f"textwiz/data/memory_estimator/{file}"},
        about={
            "model": model,
            "precision": precision,
            "gpu": "A100 40GB",
            "versions": {
                "torch": "2.4.0+cu121",
                "transformers": "4.45.0.dev0",
                "flash-attn": "2.6.3 where the model has it",
            },
            "read": "torch.cuda.max_memory_allocated() less what was allocated before the call",
        },
        forecast={"model": model, "precision": precision, "attention": attention},
        columns={
            "prompt_tokens": ("context_tokens", None),
            "prefill_peak_bytes": ("prefill_peak_mib", 1),
            "cache_bytes": ("cache_mib", 1),
            "decode_peak_bytes": ("decode_peak_mib", 1),
        },
    )


def generate_2048(
    file: str, model: str, commit: str, column: str, unit: int, gpu: str, versions: dict[str, str]
) -> Source:
    """Highest allocated memory while 2,048 tokens are generated behind a prompt."""
    return Source(
        path=f"generate-2048/{file}.csv",
        label=f"{model}, bf16, 2,048 tokens behind a prompt",
        published={**QWEN, "commit": commit, "path": "docs, speed benchmark"},
        about={
            "model": model,
            "precision": "bf16",
            "gpu": gpu,
            "versions": versions,
            "read": "torch.cuda.max_memory_allocated() after generating 2,048 tokens behind the prompt, batch 1",
        },
        forecast={"model": model, "precision": "bf16", "generated": 2048},
        columns={"prompt_tokens": ("context_tokens", None), column: ("peak_allocated_mib", unit)},
    )


def batches(experiment: str, attention: str) -> Source:
    """Allocated, reserved and used memory of a forward pass and of generate() at batch 1 to 64."""
    measured = [f"{call}_{kind}" for call in ("forward", "generate") for kind in ("allocated", "reserved", "used")]
    return Source(
        path="batches/llama-2-7b.csv",
        label=f"Llama-2-7b, fp16, batch 1 to 64, {attention}",
        published={**OPTIMUM, "path": "a blob of its history"},
        about={
            "model": "llama-2-7b",
            "precision": "fp16",
            "gpu": "A100 80GB",
            "versions": {"torch": "2.1.1+cu118", "transformers": "4.35.2"},
            "read": "forward (256 tokens) and generate (256 + 512 tokens): highest allocated, reserved, used",
            "weights": "random",
        },
        forecast={"model": "llama-2-7b", "precision": "fp16", "attention": attention, "prompt": 256, "generated": 512},
        columns={"batch": ("batch", None), **{f"{name}_mb": (f"{name}_mib", 10**6) for name in measured}},
        keep={"experiment": experiment},
    )


A100_80, H20 = "A100 80GB", "H20"
SOURCES = {
    "llama-2-7b-every-token": every_token("llama_2_7b", "llama-2-7b", "Llama-2-7b, fp16, every token"),
    "gpt-j-6b-every-token": every_token("gptj_6b", "gpt-j-6b", "GPT-J-6B, fp16, every token"),
    "mistral-7b-every-token": every_token("mistral_7b", "mistral-7b-v0.1", "Mistral-7B, fp16, every token"),
    "llama-2-7b-peaks": peaks("llama2-7B-float16", "llama-2-7b", "fp16", "sdpa"),
    "mistral-7b-peaks": peaks("mistral-7B-bfloat16", "mistral-7b-v0.1", "bf16", "sdpa"),
    "gpt-j-6b-peaks": peaks("gpt-j-6B-float32", "gpt-j-6b", "fp32", "eager"),
    "gpt-neox-20b-peaks": peaks("gpt-neoX-20B-float16", "gpt-neox-20b", "fp16", "sdpa"),
    "gpt2-medium-peaks": peaks("gpt2-medium-float32", "gpt2-medium", "fp32", "sdpa"),
    "opt-1.3b-peaks": peaks("opt-1.3B-float16", "opt-1.3b", "fp16", "sdpa"),
    "qwen3-0.6b-generate": generate_2048(
        "Qwen3-0.6B", "qwen3-0.6b", "77fb0c1", "allocated_mib", MIB, H20, {"torch": "2.6.0", "transformers": "4.51.3"}
    ),
    "qwen3-8b-generate": generate_2048(
        "Qwen3-8B", "qwen3-8b", "77fb0c1", "allocated_mib", MIB, H20, {"torch": "2.6.0", "transformers": "4.51.3"}
    ),
    "qwen2.5-0.5b-generate": generate_2048(
        "Qwen2.5-0.5B-Instruct", "qwen2.5-0.5b", "a912d23", "allocated_gb", GIB, A100_80,
        {"torch": "2.3.1", "transformers": "4.46.0"},
    ),
    "llama-2-7b-batches-eager": batches("fp16", "eager"),
}  # fmt: skip


def convert(source: Source, raw_folder: Path) -> Curve:
    """One record as a Curve; the step is the number of the row."""
    raw = pd.read_csv(raw_folder / source.path, skipinitialspace=True)
    for column, value in source.keep.items():
        raw = raw[raw[column] == value]
    table = pd.DataFrame({"step": range(1, len(raw) + 1), "turn": 1})
    for column, (name, unit) in source.columns.items():
        table[name] = raw[column].to_numpy() if unit is None else raw[column].to_numpy() * (unit / MIB)
    if "context_tokens" not in table:
        table.insert(2, "context_tokens", source.forecast["prompt"] + source.forecast["generated"])
    provenance = {"source": source.published, **source.about, "forecast": source.forecast}
    return Curve(table, provenance, kind="reported", label=source.label)


CHAPTER_TURNS = ((8, 418), (26, 259), (30, 497), (30, 491), (30, 501), (30, 501), (30, 501), (30, 525))
"""Prompt and generated tokens of every turn. The generated counts follow from the log's rows: one row per streamed
token, none for the first, and 13 tokens of turn 1 are missing after row 52. Prompt lengths are fitted, not logged."""

UNLOGGED_AFTER_ROW, UNLOGGED_TOKENS = 52, 13


def chapter_steps() -> pd.DataFrame:
    """Turn and context length of every row of the chapter's log, in order."""
    rows, cached = [], 0
    for turn, (prompt, generated) in enumerate(CHAPTER_TURNS, start=1):
        contexts = [cached + prompt + i for i in range(1, generated)]
        if turn == 1:
            del contexts[UNLOGGED_AFTER_ROW : UNLOGGED_AFTER_ROW + UNLOGGED_TOKENS]
        rows += [(turn, context) for context in contexts]
        cached += prompt + generated - 1
    return pd.DataFrame(rows, columns=["turn", "context_tokens"])


def convert_chapter(raw_folder: Path) -> Curve:
    """The chapter's own log: the rows where the memory changes, which are all there is to know, and the last row."""
    log = pd.read_csv(raw_folder / "chapter" / "chatglm3-int4-rtx4060.csv", skipinitialspace=True)
    log = pd.concat([pd.Series(range(1, len(log) + 1), name="step"), chapter_steps(), log], axis=1, join="inner")
    changes = log["used_mib"].ne(log["used_mib"].shift())
    changes.iloc[-1] = True
    table = log[changes].rename(columns={"characters": "context_characters"})
    provenance = {
        "source": CHAPTER,
        "model": "ChatGLM3-6B, original code, .quantize(4)",
        "precision": "int4",
        "gpu": "RTX 4060 Laptop, Windows",
        "versions": {"torch": "2.2", "transformers": "4.38"},
        "read": "gpustat --json after every streamed token: characters of the conversation, MiB used",
        "rows": "3,672, one a streamed token; kept are those where the memory changes, and the last",
        "fitted": "context_tokens: prompt lengths and the place of 13 unlogged tokens were chosen for the best fit",
        "forecast": {"trace": "chatglm3-6b-original-int4", "turns": ",".join(f"{p}:{a}" for p, a in CHAPTER_TURNS)},
    }
    return Curve(table, provenance, kind="reported", label="ChatGLM3-6B, int4, the chapter's log")


def main() -> None:
    """Convert every record."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("raw", type=Path, help="the folder of raw records")
    raw_folder = parser.parse_args().raw
    for name, source in SOURCES.items():
        convert(source, raw_folder).save(HERE / f"{name}.csv")
    convert_chapter(raw_folder).save(HERE / "chatglm3-6b-int4-chapter.csv")


if __name__ == "__main__":
    main()
