"""The README's examples: commands and options that exist, recipes and gates that are right, real Python."""

import ast
import re
import shlex
import tomllib
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import nestify
from nestify.cli.app import app
from nestify.compress.batch.jobs import make_jobs, parse_shard
from nestify.recipe.gates import load_gates
from nestify.recipe.recipe import load_recipe

ROOT = Path(__file__).parents[1]
TEXTS = [ROOT / "README.md", ROOT / "tests" / "benchmarks" / "README.md"]
BLOCKS = [
    (kind, block)
    for path in TEXTS
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
]


def blocks(kind: str) -> list[str]:
    return [block for name, block in BLOCKS if name == kind]


def root() -> Any:
    """The command line as typer builds it: a group, of whichever click it brings."""
    return typer.main.get_command(app)


def commands() -> list[list[str]]:
    """Every `nestify ...` of the shell examples and of the workflow, as words."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    for workflow in map(yaml.safe_load, blocks("yaml")):
        lines += [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    found = []
    for line in lines:
        words = shlex.split(line.replace("$(", "").replace(")", ""), comments=True)
        for start, word in enumerate(words):
            if word.removeprefix("level=") == "nestify":
                ends = [i for i, each in enumerate(words[start:], start) if each in ("&&", ">>", "|")]
                found.append(words[start + 1 : ends[0] if ends else None])
    return found


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_and_their_options_exist(words: list[str]) -> None:
    group = root()
    if words[0].startswith("-"):
        names = {name for option in group.params for name in option.opts}
        assert words[0] in names
        return
    command = group.commands[words[0]]
    names = {name for option in command.params for name in (*option.opts, *option.secondary_opts)}
    assert {word.partition("=")[0] for word in words[1:] if word.startswith("-")} <= names


def test_every_command_is_shown() -> None:
    assert set(root().commands) <= {words[0] for words in commands()} | {"doctor"}


@pytest.mark.parametrize("text", blocks("toml"))
def test_recipes_and_gates_are_right(text: str, tmp_path: Path) -> None:
    table = tomllib.loads(text)
    path = tmp_path / "example.toml"
    path.write_text(text)
    if set(table) == {"gates"}:
        assert load_gates(str(path)).given()
        return
    if "matrix" in table:
        assert len(make_jobs([str(path)], tmp_path, parse_shard("1/1"))) == 4
        return
    needed = {"model.name": "resnet18", "data.path": "photos"}
    missing = {key: value for key, value in needed.items() if key.split(".")[0] not in table}
    load_recipe(str(path), missing)


@pytest.mark.parametrize("text", blocks("python"))
def test_python_names_what_there_is(text: str) -> None:
    for node in ast.walk(ast.parse(text)):
        if (
            isinstance(node, ast.Attribute)
            and isinstance(node.value, ast.Name)
            and node.value.id == "nestify"
        ):
            assert hasattr(nestify, node.attr)
