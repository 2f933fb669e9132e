"""The documents: commands parse, recipes and gates are valid, Python names exist, links resolve."""

import ast
import re
import shlex
import tomllib
from collections.abc import Iterator
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest
import typer
import yaml

import nestify
from nestify.cli.app import app
from nestify.cli.guide import ORDER
from nestify.compression.batch.jobs import make_jobs, parse_shard
from nestify.recipe.gates import load_gates
from nestify.recipe.recipe import Recipe, load_recipe, option_help
from nestify.recipe.sources import parse_setting

ROOT = Path(__file__).parents[1]
MAP = ROOT / "nestify" / "README.md"
GUIDE = sorted((ROOT / "nestify" / "guide").glob("*.md"))
FIGURES = sorted((ROOT / "tests" / "benchmarks").glob("*.md"))
TEXTS = [ROOT / "README.md", *FIGURES, MAP, *GUIDE]
BLOCKS = [
    (kind, block)
    for path in TEXTS
    for kind, block in re.findall(r"^```(\w+)\n(.*?)^```", path.read_text(), re.DOTALL | re.MULTILINE)
]


def blocks(kind: str) -> list[str]:
    return [block for name, block in BLOCKS if name == kind]


def prose(path: Path) -> str:
    """Return the text of a page without its fenced blocks."""
    return re.sub(r"^```.*?^```", "", path.read_text(), flags=re.DOTALL | re.MULTILINE)


def root() -> Any:
    """Return the command line as typer builds it, a group of the click that typer uses."""
    return typer.main.get_command(app)


def commands() -> list[list[str]]:
    """Return every `nestify ...` of the shell examples and the workflows, as words."""
    lines = [line for block in blocks("bash") for line in block.replace("\\\n", " ").splitlines()]
    for workflow in map(yaml.safe_load, blocks("yaml")):
        lines += [step["run"] for job in workflow["jobs"].values() for step in job["steps"] if "run" in step]
    found = []
    for line in lines:
        words = shlex.split(line.replace("$(", "").replace(")", ""), comments=True)
        for start, word in enumerate(words):
            is_command = start == 0 or words[start - 1] in ("&&", "-m")
            if word.removeprefix("level=") == "nestify" and is_command:
                ends = [i for i, each in enumerate(words[start:], start) if each in ("&&", ">", ">>", "|")]
                found.append(words[start + 1 : ends[0] if ends else None])
    return [list(words) for words in dict.fromkeys(map(tuple, found))]


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_commands_parse(words: list[str]) -> None:
    group = root()
    if words[0].startswith("-"):
        names = {name for option in group.params for name in option.opts}
        assert words[0] in names
        return
    command, *rest = group.commands[words[0]], *words[1:]
    if isinstance(command, typer.core.TyperGroup):
        command = command.commands[rest.pop(0)]
    with command.make_context(words[0], rest) as context:  # raises if the words do not parse
        for setting in context.params.get("settings") or []:
            key, _ = parse_setting(setting)
            assert option_help(re.sub(r"^level\[\d+\]", "level", re.sub(r"^(model\.kwargs)\..*", r"\1", key)))


def test_every_command_is_shown() -> None:
    assert set(root().commands) <= {words[0] for words in commands()}
    for name, command in root().commands.items():
        for inner in getattr(command, "commands", {}):
            assert [name, inner] in [words[:2] for words in commands()]


@pytest.mark.parametrize("text", blocks("toml"))
def test_recipes_and_gates_are_valid(text: str, tmp_path: Path) -> None:
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
    given = {f"{section}.{key}" for section in ("model", "data") for key in table.get(section, {})}
    missing = {key: value for key, value in needed.items() if key not in given}
    load_recipe(str(path), missing)


@pytest.mark.parametrize("text", blocks("python"))
def test_python_examples_use_existing_names(text: str) -> None:
    for node in ast.walk(ast.parse(text)):  # imports come first
        for alias in node.names if isinstance(node, ast.Import) else ():
            if alias.name.startswith("nestify"):
                import_module(alias.name)
        if isinstance(node, ast.Attribute) and (
            found := re.match(r"nestify(\.engine)?\.\w+$", ast.unparse(node))
        ):
            assert hasattr(nestify.engine if found[1] else nestify, node.attr)


def all_commands() -> Iterator[Any]:
    """Yield every command, and those of groups such as `nestify recipe`."""
    for command in root().commands.values():
        yield command
        yield from getattr(command, "commands", {}).values()


def options() -> Iterator[str]:
    """Yield every option that the prose names in backticks: `--level`, `--set train.accumulate=4`."""
    for path in TEXTS:
        yield from re.findall(r"`(?:nestify )?(?:\w+ )?(--[a-z][\w-]*)", prose(path))


def test_options_in_the_prose_exist() -> None:
    group = root()
    params = [*group.params, *(option for command in all_commands() for option in command.params)]
    names = {name for option in params for name in (*option.opts, *option.secondary_opts)}
    slurms = {"--gpus-per-task", "--ntasks", "--requeue", "--signal"}
    elsewhere = {
        "--durations",
        "--folder",
        "--per-tensor",
        "--sweep",
        "--with",
        *slurms,
    }  # of pytest, of programs in tests/benchmarks, SLURM's
    typers_own = {"--help", "--install-completion"}
    assert set(options()) - elsewhere - typers_own <= names


def keys(path: Path) -> set[str]:
    """Return every recipe key that a page names in backticks: `train.epochs`, `--set train.accumulate=4`."""
    sections = "|".join(Recipe.model_fields)
    found = re.findall(rf"`(?:--set )?((?:{sections})\.[a-z_0-9]+)(?:=[^`]*)?`", prose(path))
    return {key for key in found if not key.endswith((".tar", ".toml"))}  # these are files


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_recipe_keys_in_the_prose_exist(path: Path) -> None:
    for key in keys(path):
        assert option_help(key), key


def anchors(path: Path) -> set[str]:
    """Return the anchors of a page's headings, as hosting sites make them."""
    titles = re.findall(r"^#+ (.+)$", prose(path), re.MULTILINE)
    return {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title in titles}


@pytest.mark.parametrize("path", TEXTS, ids=lambda path: str(path.relative_to(ROOT)))
def test_links_resolve(path: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", prose(path)):
        if target.startswith("https://"):
            continue
        name, _, anchor = target.partition("#")
        place = (path.parent / name).resolve() if name else path
        assert place.exists(), target
        assert not anchor or anchor in anchors(place), target


@pytest.mark.parametrize("path", [MAP, *GUIDE], ids=lambda path: path.stem)
def test_long_pages_begin_with_their_contents(path: Path) -> None:
    headings = re.findall(r"^## (.+)$", prose(path), re.MULTILINE)
    if len(headings) > 4:
        assert re.findall(r"^- \[(.+)\]\(#", prose(path).partition("\n## ")[0], re.MULTILINE) == headings


def test_the_readme_is_short_and_leads_to_every_page() -> None:
    text = (ROOT / "README.md").read_text()
    assert len(text.splitlines()) <= 200
    assert {f"nestify/guide/{topic}.md" for topic in ORDER} <= set(re.findall(r"\]\(([^)#]+)", text))
