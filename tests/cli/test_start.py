"""Commands that must start fast and print nothing extra: help, version, reports."""

import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

import pytest

import nestify as package
from tests.cli.driver import QUICK, environment, finish, fork, nestify, spawn

RUN_AND_LIST = """
import json, sys
from nestify.cli.app import run
for words in json.loads(sys.argv[1]):
    code = run(words)
    loaded = [name for name in ("torch", "timm", "torchvision", "PIL") if name in sys.modules]
    print("loaded:", loaded, "code:", code, file=sys.stderr)
"""


def loaded_after(*commands: Sequence[str]) -> list[str]:
    """Run commands one after another in one process; return what is imported after each, and its code."""
    command = [sys.executable, "-c", RUN_AND_LIST, json.dumps(commands)]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    return [line for line in done.stderr.splitlines() if line.startswith("loaded: ")]


def loaded_by(*words: str) -> str:
    [found] = loaded_after(words)
    return found


def test_help_and_recipes_import_no_torch() -> None:
    commands = (
        ["--help"],
        ["batch", "--help"],
        ["compress", "--help"],
        ["bench", "--help"],
        ["eval", "-h"],
        ["export", "--help"],
        ["guide", "--help"],
        ["pick", "--help"],
        ["report", "--help"],
        ["recipe", "show", "digits", "--resolved"],
        ["recipe", "check", "digits"],
        ["recipe", "schema"],
        ["slice", "--help"],
        ["verify", "--help"],
        ["doctor", "--help"],
    )
    assert dict(zip(map(tuple, commands), loaded_after(*commands), strict=True)) == {
        tuple(words): "loaded: [] code: 0" for words in commands
    }


def test_report_imports_no_torch(digits_file: Path) -> None:
    reports = [["report", str(digits_file), format] for format in ("--layers", "--json")]
    assert loaded_after(*reports) == ["loaded: [] code: 0"] * 2


def test_a_wrong_recipe_is_reported_without_torch() -> None:
    assert loaded_by("compress", "digits", "--epochs", "-1") == "loaded: [] code: 2"


def test_help_names_every_command() -> None:
    text = nestify("--help").out
    for command in ("compress", "eval", "report", "--version", "--traceback"):
        assert command in text


def test_help_shows_brackets_and_placeholders(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = nestify("compress", "--help").out
    assert "one side, or [height, width]" in text
    assert "<model>.nested.safetensors" in text
    assert "(default 0.95,0.8,0)" in text
    assert "(default [])" not in text


def test_version() -> None:
    for flag in ("--version", "-V"):
        assert nestify(flag).out == f"nestify {package.__version__}\n"


def test_without_a_command_it_shows_its_help() -> None:
    done = nestify()
    assert done.code == 2
    assert "compress" in done.out + done.err


def test_as_a_module() -> None:
    assert finish(spawn("--version")).out == f"nestify {package.__version__}\n"
    help_text = finish(spawn("report", "--help"))
    assert help_text.code == 0
    assert "Usage: nestify report" in help_text.out


def test_a_clean_run_prints_only_its_progress(digits_file: Path) -> None:
    """Warnings are errors in this process, so the other process would print them in addition."""
    words = ["compress", "digits", *QUICK, "--levels", "0.5,0"]
    own = nestify(*words, "-o", "a.safetensors")
    other = finish(spawn(*words, "-o", "a.safetensors"))
    assert (own.code, other.code) == (0, 0)
    assert other.err == own.err
    assert other.out == own.out
    assert finish(fork("eval", digits_file, "--data", "embedded/digits", "--max-images", "10")).err == ""
    assert finish(spawn("report", digits_file)).err == ""


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("comp", "compress"),
        ("compress dig", "digits\ndigits-pretrain"),
        ("report --comp", "--compare"),
        ("recipe sch", "schema"),
        ("recipe show digits-", "digits-pretrain"),
    ],
)
def test_shells_complete(words: str, expected: str) -> None:
    request = {
        "_NESTIFY_COMPLETE": "complete_bash",
        "COMP_WORDS": f"nestify {words}",
        "COMP_CWORD": str(len(words.split())),
    }
    done = finish(spawn(env=environment(**request)))
    assert (done.code, done.out.strip()) == (0, expected)


def test_the_completion_script_is_printed() -> None:
    request = {"_NESTIFY_COMPLETE": "source_bash"}
    assert "_NESTIFY_COMPLETE=complete_bash" in finish(spawn(env=environment(**request))).out
