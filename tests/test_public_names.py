"""The public names of the package: listed once, without torch, and each imported when it is first used."""

import subprocess
import sys

import pytest

import nestify

NAMES = {
    *(
        "bench",
        "check_gates",
        "compare",
        "compress",
        "evaluate",
        "export",
        "extend",
        "load",
        "load_gates",
        "load_recipe",
    ),
    *("open_report", "pick", "plan", "read_report", "run_batch", "slice_file", "upgrade_slice", "verify"),
    *("nest", "push", "scan", "write_card", "write_demo"),
    *("Scan", "TrainableNestedModel"),
    *(
        "BatchResult",
        "Bench",
        "Card",
        "Demo",
        "Evaluation",
        "Exported",
        "Limit",
        "NestedModel",
        "Observer",
        "Pick",
        "Pushed",
        "Recipe",
    ),
    *("NestifyError", "NestifyWarning", "Result", "Sliced", "Verification", "__version__"),
}


def test_all_names_are_listed() -> None:
    assert set(nestify.__all__) == NAMES
    assert len(nestify.__all__) == len(NAMES)
    assert len(dir(nestify)) == len(set(dir(nestify)))
    assert {name for name in dir(nestify) if not name.startswith("__")} == NAMES - {"__version__"}


def test_names_are_listed_without_torch() -> None:
    code = (
        "import sys, nestify; names = dir(nestify); nestify.load_recipe; "
        "sys.exit('load' not in names or 'torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


@pytest.mark.parametrize("name", sorted(NAMES - {"__version__"}))
def test_a_name_is_what_its_module_defines(name: str) -> None:
    assert getattr(nestify, name).__name__ == name


def test_there_is_no_other_name() -> None:
    with pytest.raises(AttributeError, match="nothing"):
        nestify.nothing  # type: ignore[attr-defined]  # noqa: B018
