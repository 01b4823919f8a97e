"""The command line: chat with a model, record its memory, run the notebooks, look at the machine.

Heavy packages are imported inside the commands, so that ``glmlab --help`` answers at once.
"""

import os
import sys
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any
from urllib.parse import urlsplit

import typer
from typer import Argument, Option

from glmlab.core.errors import GlmlabError

if TYPE_CHECKING:
    from glmlab.core.curve import Curve
    from glmlab.forecast.forecast import Forecast
    from glmlab.generation.chat import ChatSession
    from glmlab.memory.recording import Recorder
    from glmlab.models.loading import LoadedModel

app = typer.Typer(
    help="Take a chat model apart and show where its GPU memory goes.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

Model = Annotated[str, Option(help="embedded, a checkpoint folder, or a hub id such as zai-org/chatglm3-6b")]
Precision = Annotated[str, Option(help="fp32, bf16, fp16, int8, int4, or auto: the largest that fits")]
Device = Annotated[str, Option(help="auto, cpu, cuda, cuda:1, …")]
Weights = Annotated[str, Option(help="checkpoint, or random: same memory, nothing to download")]


@app.command()
def chat(
    model: Model = "embedded",
    precision: Precision = "auto",
    device: Device = "auto",
    weights: Weights = "checkpoint",
    record: Annotated[Path | None, Option(help="record the memory after every turn in this .csv")] = None,
    max_new_tokens: Annotated[int | None, Option(help="most tokens of an answer; default: all that fit")] = None,
) -> None:
    """Chat with a model; type 'clear' to start over, 'stop' to end."""
    from contextlib import nullcontext

    from glmlab.generation.chat import ChatSession
    from glmlab.memory.recording import Recorder

    loaded = _load(model, precision, device, weights)
    session = ChatSession(loaded, max_new_tokens=max_new_tokens)
    with Recorder(session, record) if record else nullcontext(session) as talk:
        while (text := _ask()) not in (None, "stop"):
            if text == "clear":
                talk.clear()
                typer.echo("(conversation cleared)")
            elif text:
                _stream(talk, text, session.context_limit)


def _ask() -> str | None:
    """One line from the user; None at the end of the input."""
    try:
        return input("you: ").strip()
    except EOFError:
        typer.echo()  # the shell's next prompt begins a line of its own
        return None


def _stream(talk: "ChatSession | Recorder", text: str, context_limit: int) -> None:
    """Print an answer as it is generated, and why it ended unless by its stop token."""
    try:
        for turn in talk.say(text):
            typer.echo(turn.new_text, nl=False)
    except GlmlabError as error:
        typer.echo(f"({error})")
        return
    except KeyboardInterrupt:
        typer.echo(" (interrupted)")
        return
    typer.echo("")
    if turn.metadata:
        typer.echo(f"(calls the tool {turn.metadata})")
    if turn.stop_reason != "stop token":
        typer.echo(f"(ended by: {turn.stop_reason}, context {turn.context_tokens} of {context_limit} tokens)")


@app.command()
def fetch(
    model: Annotated[str, Argument(help="the hub's name of a model, such as zai-org/chatglm3-6b")],
    hub: Annotated[str, Option("--from", help="huggingface, or modelscope (where it is ZhipuAI/…)")] = "huggingface",
    to: Annotated[Path | None, Option(help="a folder of its own; default: the hub's cache")] = None,
    with_source: Annotated[bool, Option("--with-source", help="the Python files, too: never executed")] = False,
) -> None:
    """Download a model, or complete a half-download, and check every file."""
    from glmlab.models.checkpoints import fetch as run

    report = run(model, hub=hub, to=to, with_source=with_source)
    typer.echo(str(report))
    typer.echo(f"use it with: --model {model if hub == 'huggingface' and to is None else report.folder}")


@app.command()
def record(
    out: Annotated[Path, Argument(help="the .csv to write; the .json beside it holds the provenance")],
    model: Model = "embedded",
    precision: Precision = "auto",
    device: Device = "auto",
    weights: Weights = "checkpoint",
    conversation: Annotated[str, Option(help="long, short, or a conversation file (.json)")] = "long",
    every_token: Annotated[bool, Option("--every-token", help="a row for every token instead of every turn")] = False,
    resume: Annotated[bool, Option("--resume", help="continue an interrupted recording")] = False,
) -> None:
    """Chat through a fixed conversation and record the memory after every turn."""
    from glmlab.memory.conversations import load_conversation
    from glmlab.memory.recording import record as run

    turns = load_conversation(conversation)
    loaded = _load(model, precision, device, weights)
    curve = run(loaded, turns, out, every_token=every_token, resume=resume)
    typer.echo(f"{out}: {len(curve.table)} rows, up to {curve.table['context_tokens'].max():.0f} tokens")


@app.command()
def forecast(
    model: Annotated[str | None, Argument(help="hub id, folder or config.json")] = None,
    trace: Annotated[str | None, Option(help="forecast a recorded trace of data/traces instead of a model")] = None,
    precision: Annotated[str | None, Option(help="fp32, bf16, fp16 (default), int8, int4, or the trace's own")] = None,
    attention: Annotated[str | None, Option(help="sdpa or eager; default: sdpa, or the trace's own")] = None,
    cache: Annotated[str | None, Option(help="dynamic or static; default: dynamic, or the trace's own")] = None,
    batch: Annotated[int | None, Option(help="sequences at a time; default: 1")] = None,
    tokens: Annotated[int | None, Option(help="context length to reach in one turn")] = None,
    turns: Annotated[str | None, Option(help="prompt:generated tokens of every turn, such as 30:500,30:500")] = None,
    card: Annotated[str, Option(help="a GPU of data/gpus.csv, such as 'RTX 4060': its memory ends the run")] = "",
    csv: Annotated[Path | None, Option(help="write one row a step, with a column per component")] = None,
    figure: Annotated[
        Path | None,
        Option(help="draw it by component (.pdf, .svg or .png); where --csv has the same name, the table wins"),
    ] = None,
    explain: Annotated[bool, Option("--explain", help="list every rise and plateau with its reason")] = False,
    as_json: Annotated[bool, Option("--json", help="print last step, rises, plateaus, longest context, …")] = False,
) -> None:
    """Say without a GPU what gpustat would show at every context length, by component."""
    from glmlab.forecast.forecast import Forecast
    from glmlab.forecast.workload import ForecastError

    if (model is None) == (trace is None):
        raise ForecastError(
            "give either a model or --trace NAME, such as: glmlab forecast chatglm3-6b --precision int4"
        )
    fields = {"precision": precision, "attention": attention, "cache": cache, "batch": batch}
    computed = Forecast.of(
        model,
        trace=trace or "",
        turns=turns,
        tokens=tokens,
        card=card,
        **{name: value for name, value in fields.items() if value is not None},
    )
    written = _save_one_figure(computed.curve, figure) if figure else []
    if csv:  # after the figure, whose table it replaces where both have one name
        written += computed.curve_with_band().save(csv)
    if as_json:
        _print_json(_forecast_as_dict(computed))
    else:
        typer.echo(computed.summary())
        if explain:
            typer.echo(computed.explain())
        if card:
            typer.echo(f"longest context: {computed.largest_context()}")
    if written:
        typer.echo("wrote " + ", ".join(map(str, dict.fromkeys(written))), err=as_json)


def _forecast_as_dict(forecast: "Forecast") -> dict[str, Any]:
    """The last step, rises, plateaus, the card's longest context and provenance."""
    from dataclasses import asdict

    last = {str(name): value for name, value in forecast.curve_with_band().table.iloc[-1].items()}
    old_names = {  # as memory was called before PyTorch's word, "inactive"
        "slack_small_mib": last["inactive_small_mib"],
        "slack_large_mib": last["inactive_large_mib"],
        "idle_small_mib": last["inactive_small_after_mib"],
        "idle_large_mib": last["inactive_large_after_mib"],
    }
    return {
        **last,
        **old_names,
        "rises": [asdict(rise) for rise in forecast.rises],
        "plateaus": [asdict(plateau) for plateau in forecast.plateaus],
        "longest_context": asdict(forecast.largest_context()) if forecast.workload.card else None,
        "provenance": forecast.curve.provenance,
    }


def _save_one_figure(curve: "Curve", path: Path) -> list[Path]:
    from glmlab.figures import component_chart, save_figure

    chart, formats = component_chart(curve), [path.suffix.removeprefix(".")]
    return save_figure(chart, path.with_suffix(""), provenance=curve.provenance, formats=formats)


def _print_json(document: object) -> None:
    import json

    typer.echo(json.dumps(document, indent=2, ensure_ascii=False, default=str))


@app.command()
def replay(
    snapshot: Annotated[Path, Argument(help="a file of torch.cuda.memory._dump_snapshot, recorded with history")],
    as_json: Annotated[bool, Option("--json", help="print the counts as JSON")] = False,
) -> None:
    """Replay a real GPU's memory snapshot, and compare every choice of the allocator with PyTorch's."""
    from glmlab.snapshots.reader import read_snapshot
    from glmlab.snapshots.replay import replay_snapshot

    report = replay_snapshot(read_snapshot(snapshot))
    if as_json:
        _print_json(report.as_dict())
    else:
        typer.echo(str(report))


@app.command()
def compare(
    recordings: Annotated[list[Path] | None, Argument(help=".csv files of recordings")] = None,
    log: Annotated[Path | None, Option(help="a log of lines 'characters, MiB', as the chapter's script wrote")] = None,
) -> None:
    """Compare recordings with their forecasts, and say how far these are off."""
    from glmlab.evidence.accuracy import error_table
    from glmlab.forecast.comparison import compare as run

    compared = run(recordings or [], log=log)
    for comparison in compared:
        typer.echo(str(comparison))
    if recordings:
        typer.echo(error_table(compared[: len(recordings)]).to_string(index=False))


@app.command()
def evidence(
    names: Annotated[list[str] | None, Argument(help="parts of runs' names, such as int4; default: all")] = None,
    show: Annotated[bool, Option("--list", help="show the runs and do none")] = False,
    minutes: Annotated[float, Option(help="no run starts later than this; the rest is left for another call")] = 20.0,
    data: Annotated[Path, Option(help="the folder that keeps recordings/ and snapshots/")] = Path("data"),
) -> None:
    """Record on this machine's GPU what forecasts are compared with; finished runs are skipped."""
    from glmlab.evidence.plan import EvidenceError, choose

    runs = choose(names or [])
    if show:
        typer.echo("\n".join(map(str, runs)))
        return

    from glmlab.evidence.runner import gather, gpu_of_this_machine

    counts: dict[str, int] = {}
    for outcome in gather(runs, data, Path("build/evidence"), gpu_of_this_machine(), budget_s=60 * minutes):
        typer.echo(str(outcome))
        counts[outcome.status] = counts.get(outcome.status, 0) + 1
    typer.echo(", ".join(f"{n} {status}" for status, n in counts.items()))
    if counts.get("left"):
        typer.echo("The time is up; the same command goes on with what is left.")
    if counts.get("failed"):
        raise EvidenceError(f"{counts['failed']} runs failed; their own words stand above.")


@app.command()
def notebooks(
    names: Annotated[list[str] | None, Argument(help="beginnings of file names, such as 04; default: all")] = None,
    folder: Annotated[Path, Option(help="where the notebooks are")] = Path("notebooks"),
    out: Annotated[Path, Option(help="where the executed copies go")] = Path("build/notebooks"),
    parameter: Annotated[list[str] | None, Option("--parameter", "-p", help="name=value; repeatable")] = None,
    in_place: Annotated[bool, Option("--in-place", help="write the outputs back into the notebooks")] = False,
    jobs: Annotated[int, Option("--jobs", "-j", min=1, help="notebooks at a time; measured times need 1")] = 1,
) -> None:
    """Run notebooks top to bottom; figures land in figures/."""
    from glmlab.suite.notebooks import execute_notebooks, find_notebooks, parse_parameters

    sources = find_notebooks(folder, names or [])
    for executed in execute_notebooks(sources, None if in_place else out, parse_parameters(parameter or []), jobs):
        typer.echo(str(executed))


@app.command()
def figures(
    names: Annotated[
        list[str] | None,
        Argument(
            metavar="[FOLDER] [NAME]...",
            help="a folder of saved figures (default: figures/, else the suite's own), names of figures (default: all)",
        ),
    ] = None,
    out: Annotated[Path | None, Option(help="the folder they go into; default: where they come from")] = None,
    formats: Annotated[str, Option("--format", help="pdf, svg, png, with commas between")] = "pdf,svg,png",
    style: Annotated[str, Option(help="paper, slide or web")] = "paper",
    width: Annotated[str | None, Option(help="width of every figure, such as 86mm; default: its own")] = None,
    lang: Annotated[str, Option(help="en or zh (traditional Chinese)")] = "en",
) -> None:
    """Draw saved figures again, in another language, width or style: from their data alone, without a model."""
    from glmlab.figures.saving import find_figures, redraw
    from glmlab.figures.style import FigureSettings, parse_width

    folder, wanted, default_out = find_figures(names or [])
    settings = FigureSettings(style, None if width is None else parse_width(width), lang)
    chosen_formats = [name.strip() for name in formats.split(",")]
    for line in redraw(folder, out or default_out, wanted, formats=chosen_formats, settings=settings):
        typer.echo(line)
    typer.echo(f"drawn from {folder}, saved in {out or default_out}")


@app.command()
def report(
    out: Annotated[Path, Option(help="the document to write: .html or .pdf")] = Path("report.html"),
    folder: Annotated[Path, Option(help="where the executed notebooks are")] = Path("notebooks"),
    browser: Annotated[str | None, Option(help="browser that prints the PDF; default: Chromium on PATH")] = None,
) -> None:
    """Bind the notebooks and their figures into one document, which needs no other file and no network."""
    from glmlab.core.units import format_bytes
    from glmlab.suite.report import write_report

    written = write_report(out, folder=folder, browser=browser)
    typer.echo(f"{written}: {format_bytes(written.stat().st_size)}")


@app.command()
def bench(
    out: Annotated[Path, Option(help="where the values go, as JSON")] = Path("build/bench.json"),
    repetitions: Annotated[int, Option(help="rounds; more are steadier")] = 20,
    notebooks: Annotated[Path, Option(help="the notebooks whose run time is taken")] = Path("notebooks"),
) -> None:
    """Print what the suite's own code costs: ratios of two ways, seconds, the replay in nanoseconds an event."""
    from glmlab.suite.bench import format_rows, replay_table, run_benchmarks

    typer.echo(format_rows(run_benchmarks(repetitions, out, notebooks=notebooks)))
    for attention in ("sdpa", "eager"):
        typer.echo(f"\n{replay_table(attention)}")


@app.command()
def doctor(
    model: Annotated[str | None, Option(help="say whether this model fits here: hub id, folder, config.json")] = None,
    precision: Precision = "auto",
    tokens: Annotated[int, Option(help="context length to reach")] = 2048,
    device: Device = "auto",
) -> None:
    """Say what will and will not work on this machine, or whether a model fits."""
    from glmlab.suite.doctor import examine, examine_model

    for finding in examine() if model is None else examine_model(model, precision, tokens, device):
        typer.echo(str(finding))


def _load(model: str, precision: str, device: str, weights: str) -> "LoadedModel":
    from glmlab.models.loading import load_model

    loaded = load_model(model, precision=precision, device=device, weights=weights)  # type: ignore[arg-type]
    typer.echo(repr(loaded.report))
    return loaded


def _check_endpoint() -> None:
    """Refuse an HF_ENDPOINT with which huggingface_hub, and so transformers, cannot even be imported."""
    endpoint = os.environ.get("HF_ENDPOINT", "")
    try:
        _ = urlsplit(endpoint).port
    except ValueError as error:
        raise GlmlabError(
            f"HF_ENDPOINT is {endpoint!r}, which is no address ({error}). Set one such as https://huggingface.co, or "
            "unset it."
        ) from error


def main() -> None:
    """Run the command line; an error that the user can mend is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a Windows console is not UTF-8 unless told
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    warnings.formatwarning = _format_warning
    try:
        _check_endpoint()
        app(standalone_mode=True)
    except GlmlabError as error:
        typer.echo(f"glmlab: {error}", err=True)
        raise SystemExit(2) from error


def _format_warning(
    message: Warning | str, category: type[Warning], filename: str, lineno: int, line: str | None = None
) -> str:
    """A warning for the user is one line; others say where they come from."""
    if category is UserWarning:
        return f"glmlab: {message}\n"
    return f"{filename}:{lineno}: {category.__name__}: {message}\n"
