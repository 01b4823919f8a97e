"""The command line: chat with a model, record its memory, run the notebooks, look at the machine.

Heavy packages are imported inside the commands, so that ``glmlab --help`` answers at once.
"""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from glmlab.errors import GlmlabError

if TYPE_CHECKING:
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

Model = Annotated[str, typer.Option(help="embedded, a checkpoint folder, or a hub id such as zai-org/chatglm3-6b")]
Precision = Annotated[str, typer.Option(help="fp32, bf16, fp16, int8, int4, or auto: the largest that fits")]
Device = Annotated[str, typer.Option(help="auto, cpu, cuda, cuda:1, …")]
Weights = Annotated[str, typer.Option(help="checkpoint, or random: same memory, nothing to download")]


@app.command()
def chat(
    model: Model = "embedded",
    precision: Precision = "auto",
    device: Device = "auto",
    weights: Weights = "checkpoint",
    record: Annotated[Path | None, typer.Option(help="record memory after every turn into this .csv")] = None,
    max_new_tokens: Annotated[
        int | None, typer.Option(help="longest answer; default: what the context has left")
    ] = None,
) -> None:
    """Chat with a model; 'clear' forgets the conversation, 'stop' ends it."""
    from contextlib import nullcontext

    from glmlab.generation.chat import ChatSession
    from glmlab.memory.recording import Recorder

    loaded = _load(model, precision, device, weights)
    session = ChatSession(loaded, max_new_tokens=max_new_tokens)
    with Recorder(session, record) if record else nullcontext(session) as talk:
        while (text := _ask()) not in (None, "stop"):
            if text == "clear":
                talk.clear()
                typer.echo("(the conversation is forgotten)")
            elif text:
                _stream(talk, text, session.context_limit)


def _ask() -> str | None:
    """One line from the user; None at the end of the input."""
    try:
        return input("you: ").strip()
    except EOFError:
        return None


def _stream(talk: "ChatSession | Recorder", text: str, context_limit: int) -> None:
    """Print an answer as it comes, and why it ended where that is not its own end."""
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
def record(
    out: Annotated[Path, typer.Argument(help="the .csv to write; provenance lands beside it as .json")],
    model: Model = "embedded",
    precision: Precision = "auto",
    device: Device = "auto",
    weights: Weights = "checkpoint",
    conversation: Annotated[str, typer.Option(help="a conversation of data/conversations, or a .json file")] = "long",
    every_token: Annotated[bool, typer.Option("--every-token", help="one row a token instead of one a turn")] = False,
    resume: Annotated[bool, typer.Option("--resume", help="continue a recording that was cut off")] = False,
) -> None:
    """Chat through a fixed conversation and read memory after every turn."""
    from glmlab.memory.recording import load_conversation
    from glmlab.memory.recording import record as run

    turns = load_conversation(conversation)
    loaded = _load(model, precision, device, weights)
    curve = run(loaded, turns, out, every_token=every_token, resume=resume)
    typer.echo(f"{out}: {len(curve.table)} rows, up to {curve.table['context_tokens'].max():.0f} tokens")


@app.command()
def notebooks(
    names: Annotated[
        list[str] | None, typer.Argument(help="beginnings of file names, such as 04; default: all")
    ] = None,
    folder: Annotated[Path, typer.Option(help="where the notebooks are")] = Path("notebooks"),
    out: Annotated[Path, typer.Option(help="where the executed copies go")] = Path("build/notebooks"),
    parameter: Annotated[
        list[str] | None, typer.Option("--parameter", "-p", help="name=value for the parameter cell; repeatable")
    ] = None,
    in_place: Annotated[bool, typer.Option("--in-place", help="write the outputs back into the notebooks")] = False,
) -> None:
    """Run notebooks top to bottom; figures land in figures/."""
    from glmlab.notebooks import execute_notebook, find_notebooks, parse_parameters

    parameters = parse_parameters(parameter or [])
    for source in find_notebooks(folder, names or []):
        typer.echo(f"{source.name} … ", nl=False)
        executed = execute_notebook(source, source if in_place else out / source.name, parameters)
        typer.echo(f"{executed.seconds:.0f} s, {executed.copy}")


@app.command()
def doctor() -> None:
    """Say what will and will not work on this machine."""
    from glmlab.doctor import examine

    for finding in examine():
        typer.echo(str(finding))


def _load(model: str, precision: str, device: str, weights: str) -> "LoadedModel":
    from glmlab.models.loading import load_model

    loaded = load_model(model, precision=precision, device=device, weights=weights)  # type: ignore[arg-type]
    typer.echo(repr(loaded.report))
    return loaded


def main() -> None:
    """Run the command line; an error that the user can mend is one line and exit code 2."""
    for stream in (sys.stdout, sys.stderr):  # a Windows console is not UTF-8 unless told
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(encoding="utf-8", errors="replace")
    try:
        app(standalone_mode=True)
    except GlmlabError as error:
        typer.echo(f"glmlab: {error}", err=True)
        raise SystemExit(2) from error
