"""What README, CONTRIBUTING and the data's READMEs say is there, is there."""

import re
import shlex
from pathlib import Path

import click
import pytest
import typer
from typer.testing import CliRunner

from glmlab.cli import app

ROOT = Path(__file__).resolve().parent.parent
TEXTS = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "CHANGELOG.md", *sorted(ROOT.glob("data/**/README.md"))]
TARGETS = set(re.findall(r"^([a-z-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))


def _commands() -> list[str]:
    """Lines of the README's shell blocks that call make or glmlab."""
    blocks = re.findall(r"```(?:bash|powershell)\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = [line.split("#")[0].strip() for block in blocks for line in block.splitlines()]
    return [re.sub(r"^\.venv\\Scripts\\", "", line) for line in lines if line]


@pytest.mark.parametrize("text", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_lead_somewhere(text):
    for label, target in re.findall(r"\[([^\]]*)\]\(([^)]+)\)", text.read_text()):
        assert target.startswith("https://") or (text.parent / target).exists(), f"[{label}]({target})"


def test_images_have_words_for_those_who_do_not_see_them():
    for words in re.findall(r"!\[([^\]]*)\]", (ROOT / "README.md").read_text()):
        assert len(words) > 40


@pytest.mark.parametrize("command", [line for line in _commands() if line.startswith(("make ", "glmlab "))])
def test_commands_parse(command):
    """Every target and option of the README's commands exists, with a value of the right kind."""
    program, name, *arguments = shlex.split(command)
    if program == "make":
        assert name in TARGETS
        return
    group = typer.main.get_command(app)
    context = click.Context(group)
    assert group.get_command(context, name).make_context(name, arguments).params


def test_every_notebook_is_in_the_readme_with_its_question():
    table = (ROOT / "README.md").read_text().split("<!-- notebooks -->")[1].split("<!-- /notebooks -->")[0]
    for path in sorted((ROOT / "notebooks").glob("*.ipynb")):
        title = re.search(r'"# ([^"\\]+\?)', path.read_text())[1]
        assert f"| [{path.stem}](notebooks/{path.name}) | {title} |" in table


def test_what_the_readme_imports_is_there():
    blocks = re.findall(r"```python\n(.*?)```", (ROOT / "README.md").read_text(), re.DOTALL)
    lines = re.findall(r"^from glmlab.*", "".join(blocks), re.MULTILINE)
    assert len(lines) > 2
    exec("\n".join(lines), {})


def test_the_chat_of_the_readme_is_what_the_command_says():
    transcript = re.search(r"```text\n(you: .*?)```", (ROOT / "README.md").read_text(), re.DOTALL)[1]
    asked = "".join(re.findall(r"^you: (.*\n)", transcript, re.MULTILINE))
    chat = CliRunner().invoke(app, ["chat"], input=asked)
    assert chat.exit_code == 0
    for answer in re.findall(r"^(?!you: )(.+)$", transcript, re.MULTILINE):
        assert f"you: {answer}\n" in chat.output
