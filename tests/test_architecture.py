"""The house's rules that a program can check: imports point downwards, start-up is light, files are small."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "nestify"

# From the lowest floor to the highest; a module imports from its own floor or from below.
FLOORS = [
    {"errors", "budgets", "levels", "processor"},
    {
        "nesting",
        "recipe_flags",
        "recipe_sections",
        "recipe_schedule",
        "recipe_problems",
        "recipe_levels",
        "recipe_source",
        "recipe_gates",
        "recipe",
        "recipe_flat",
    },
    {"nested_file", "model_spec", "masking", "named_tensors"},
    {"ties", "measurements"},
    {"images", "pretrained", "private", "channels", "hierarchy", "heads"},
    {"layers"},
    {"structure", "schedules", "anatomy"},
    {"nested_model", "report", "fingerprint"},
    {"nest", "restoring", "planning", "evaluation", "export_formats", "loading"},
    {"training", "verification", "exporting"},
    {"inputs", "describe", "batching"},
    {"evaluating", "benching"},
    {"solving", "compressed", "picking"},
    {"compression"},
    {"api", "doctor"},
    {"cli"},
    {"__init__", "__main__"},
]


def room(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def imports(path: Path) -> set[str]:
    """Rooms that a file imports from when it runs; those for type checkers alone do not count."""
    tree = ast.parse(path.read_text())
    typing_only = {
        id(node)
        for guard in ast.walk(tree)
        if isinstance(guard, ast.If) and "TYPE_CHECKING" in ast.unparse(guard.test)
        for node in ast.walk(guard)
    }
    names = [
        node.module
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom) and node.module and id(node) not in typing_only
    ]
    return {name.split(".")[1] for name in names if name.startswith("nestify.")}


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_imports_point_downwards(path: Path) -> None:
    floor_of = {name: number for number, floor in enumerate(FLOORS) for name in floor}
    above = {name for name in imports(path) if floor_of[name] > floor_of[room(path)]}
    assert not above, f"{path.name} imports from above: {above}"


@pytest.mark.parametrize("path", sorted(PACKAGE.rglob("*.py")), ids=lambda p: str(p.relative_to(PACKAGE)))
def test_files_hold_one_idea(path: Path) -> None:
    assert len(path.read_text().splitlines()) <= 350


@pytest.mark.parametrize(
    "module",
    [
        "nestify",
        "nestify.cli",
        "nestify.recipe",
        "nestify.report.document",
        "nestify.picking",
        "nestify.report.html.page",
        "nestify.batching.batch",
    ],
)
def test_light_modules_do_not_import_torch(module: str) -> None:
    code = f"import sys, {module}; sys.exit('torch' in sys.modules or 'timm' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_package_reads_nothing_outside_itself() -> None:
    for path in PACKAGE.rglob("*"):
        if path.suffix in (".py", ".toml", ".md"):
            assert "shared/" not in path.read_text(), path
