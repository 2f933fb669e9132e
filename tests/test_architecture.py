"""The house's rules that a program can check: imports point downwards, start-up is light, files are small."""

import ast
import re
import subprocess
import sys
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nestify"

ROOMS = (
    "__main__",
    "__init__",
    "cli",
    "compression",
    "training",
    "hub",
    "report",
    "schedule",
    "evaluation",
    "data",
    "demo",
    "engine",
    "exports",
    "file",
    "model",
    "recipe",
    "machine",
    "accelerator",
    "launcher",
    "files",
    "terminal",
    "signals",
    "shown",
    "errors",
    "version",
    "text",
    "addresses",
)
"""Folders and modules at the top of the package; a module imports from its own room and from later ones."""

FILES = sorted(PACKAGE.rglob("*.py"))


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def module(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {module(path): path for path in FILES}


def imports(path: Path) -> set[str]:
    """Modules of the package that a file imports when it runs; those for type checkers alone do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.unparse(guard.test)
        for node in ast.walk(guard)
    }
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing_only:
            for alias in node.names:
                name = f"{node.module}.{alias.name}"
                found.add(name if name in MODULES else node.module)
    return {name for name in found if name in MODULES}


def test_every_room_is_known_and_on_the_map() -> None:
    assert {room(path) for path in FILES} == set(ROOMS)
    text = (PACKAGE / "README.md").read_text()
    folders = [name for name in ROOMS if (PACKAGE / name).is_dir()]
    assert re.findall(r"^\| `(\w+)/` \|", text, re.MULTILINE) == folders
    for name in re.findall(r"`([\w/]+\.py)`", text):
        assert (PACKAGE / name).exists() or list(PACKAGE.rglob(name)), name


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    here = ROOMS.index(room(path))
    above = {name for name in imports(path) if ROOMS.index(room(MODULES[name])) < here}
    assert not above, f"{path.name} imports from above: {above}"


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Inside rooms too. `nestify` itself offers the names of many modules, lazily."""
    graph = {name: imports(path) - {"nestify", name} for name, path in MODULES.items() if name != "nestify"}
    try:
        TopologicalSorter(graph).prepare()
    except CycleError as error:
        pytest.fail(f"circle: {' -> '.join(error.args[1])}")


@pytest.mark.parametrize("path", FILES, ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_hold_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize(
    "module",
    [
        "nestify",
        "nestify.cli",
        "nestify.recipe.recipe",
        "nestify.file.summary",
        "nestify.evaluation.pick",
        "nestify.report.html.page",
        "nestify.compression.batch.batch",
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_one_module_names_the_kind_of_gpu() -> None:
    """So that a simulated device can take its place."""
    code = {path.name: path.read_text() for path in FILES}
    assert [name for name, text in code.items() if re.search(r"(?<!_)\bcuda\b", text)] == ["accelerator.py"]


def test_package_reads_nothing_outside_itself() -> None:
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".toml", ".md"):
            assert "shared/" not in path.read_text(), path
