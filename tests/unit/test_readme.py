"""What the README shows can be typed: commands and options exist, files are where it says, Python parses."""

import ast
import re
import shlex
from pathlib import Path

import pytest
import typer
from typer.core import TyperGroup
from typer.main import get_command

from serving.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text()
SHOWN = README + (ROOT / "BENCHMARKS.md").read_text()
COMMANDS = sorted(set(re.findall(r"(?:^|/)(rushes [a-z][^\n#|]*)", SHOWN, re.MULTILINE)))


def test_there_are_commands_to_check():
    assert len(COMMANDS) >= 3


@pytest.mark.parametrize("line", COMMANDS)
def test_commands_and_their_options_exist(line):
    _, name, *words = shlex.split(line)
    group = get_command(app)
    command = group.get_command(typer.Context(group), name)
    assert command is not None, name
    if isinstance(command, TyperGroup):  # the next word is the command
        command = command.get_command(typer.Context(command), words[0])
        assert command is not None, line
    known = {option for parameter in command.params for option in parameter.opts}
    assert {word for word in words if word.startswith("-") and word != "-"} <= known | {"--help"}


def test_linked_and_named_files_exist():
    linked = re.findall(r"\]\(([^)#:]+)\)", README)
    named = re.findall(r"`((?:models|serving|export|k8s)/[\w./]+)`", README)
    assert linked
    assert [path for path in linked + named if not (ROOT / path).exists()] == []


def test_python_in_the_readme_parses():
    for code in re.findall(r"<<'PY'\n(.*?)\nPY", README, re.DOTALL):
        ast.parse(code)
