"""Progress and warnings of `compress` and `plan` in Python: what is shown and where; nothing is lost."""

import inspect
import re
import sys
import warnings
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import pytest
import torch
from rich.console import Console
from safetensors.torch import load_file

import nestify
from nestify.errors import NestifyWarning, RecipeError
from nestify.terminal import Caller, can_show_bars
from nestify.training.display import Display, PythonWarnings, usual_observer
from tests.cli.driver import CHECKPOINT, at_terminal
from tests.cli.driver import nestify as command

GUIDE = (Path(nestify.__file__).parent / "guide" / "python.md").read_text()
NOTICE = "using the weights under net"
"""What nestify says about the checkpoint of these tests."""


@pytest.fixture(autouse=True)
def _elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    for name in ("FORCE_COLOR", "TTY_COMPATIBLE"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture
def overrides(tmp_path: Path) -> dict[str, Any]:
    """Overrides of a run without training, with a checkpoint that is read with a notice."""
    torch.save({"net": load_file(CHECKPOINT)}, tmp_path / "net.pth")
    return {
        "model.checkpoint": tmp_path / "net.pth",
        "train.epochs": 0,
        "train.eval_before": False,
        "train.recalibrate_batches": 1,
        "schedule.fit": False,
        "data.max_train": 64,
        "data.max_val": 20,
    }


class Recorder(nestify.Observer):
    """Records stages and warnings."""

    def __init__(self) -> None:
        self.stages: list[str] = []
        self.warnings: list[str] = []

    def stage(self, text: str) -> None:
        """Record a stage."""
        self.stages.append(text)

    def warned(self, text: str) -> None:
        """Record a warning."""
        self.warnings.append(text)


def line() -> int:
    """Return the number of the caller's line."""
    return sys._getframe(1).f_lineno


def test_warnings_are_issued_at_the_line_of_the_caller(
    overrides: dict[str, Any], capsys: pytest.CaptureFixture[str]
) -> None:
    for call in (nestify.compress, nestify.plan):
        called = line() + 2
        with pytest.warns(NestifyWarning, match=NOTICE) as caught:
            call("digits", overrides)
        assert [(warning.filename, warning.lineno) for warning in caught] == [(__file__, called)]
    assert capsys.readouterr() == ("", "")


def test_the_same_warning_is_issued_every_time() -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("default")
        for _ in range(2):
            Caller(__file__, 1).warn("again")
    assert len(caught) == 2


def test_unreadable_images_are_warned_about() -> None:
    with pytest.warns(NestifyWarning, match=r"training.*1 unreadable.*a\.png"):
        PythonWarnings(Caller(__file__, 1)).skipped("training", {"a.png": "truncated"})
    PythonWarnings(Caller(__file__, 1)).skipped("training", {})


def test_an_observer_takes_the_place_of_warnings(overrides: dict[str, Any]) -> None:
    compressing, planning = Recorder(), Recorder()
    nestify.compress("digits", overrides, observer=compressing)
    nestify.plan("digits", overrides, observer=planning)
    for recorder in (compressing, planning):
        assert len(recorder.warnings) == 1
        assert NOTICE in recorder.warnings[0]
    assert "evaluating the levels" in compressing.stages
    nestify.plan("digits", overrides, observer=nestify.Observer())


def test_a_dry_run_prints_notices(overrides: dict[str, Any]) -> None:
    words = [f"{key}={value}" for key, value in overrides.items()]
    settings = [word for text in words for word in ("--set", text.replace("False", "false"))]
    done = command("compress", "digits", "--dry-run", *settings)
    assert done.code == 0, done.err
    assert [NOTICE in text for text in done.err.splitlines()] == [True]
    assert NOTICE in command("-q", "compress", "digits", "--dry-run", *settings).err


END = "compress has ended"


@pytest.mark.long
def test_a_terminal_shows_what_the_command_shows(overrides: dict[str, Any]) -> None:
    values = {key: str(value) if isinstance(value, Path) else value for key, value in overrides.items()}
    code = "import nestify; " + f"; print('{END}'); ".join(
        f"nestify.{name}('digits', {values!r})" for name in ("compress", "plan")
    )
    lines = at_terminal(200, program=("-c", code))
    end = next(number for number, text in enumerate(lines) if END in text)
    shown, planned = lines[:end], lines[end + 1 :]
    assert any(text.startswith("validation top-1 (after)") for text in shown)
    assert sum(text.startswith("warning: ") and NOTICE in text for text in shown) == 2  # repeated at the end
    assert [text for text in planned if text.strip()] == [text for text in shown if NOTICE in text][:1]


class ZMQInteractiveShell:
    """What rich recognizes a notebook by: a shell of this name."""


def test_a_notebook_shows_progress(monkeypatch: pytest.MonkeyPatch) -> None:
    assert isinstance(usual_observer(), PythonWarnings)
    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    assert isinstance(usual_observer(), Display)
    for package, moves in (("json", True), ("no_such_package", False)):  # in place of ipywidgets
        monkeypatch.setattr("nestify.terminal.find_spec", lambda _, name=package: find_spec(name))
        assert can_show_bars(Console(stderr=True)) == moves


def test_a_notebook_without_widgets_prints_lines(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr("builtins.get_ipython", ZMQInteractiveShell, raising=False)
    monkeypatch.setattr("nestify.terminal.find_spec", lambda name: None)
    with Display() as display:
        display.stage("opening images")
        display.warned("slow")
    assert capsys.readouterr().err.splitlines() == ["opening images", "warning: slow"]


def test_overrides_of_a_complete_recipe_are_refused() -> None:
    recipe = nestify.load_recipe("digits")
    with pytest.raises(RecipeError, match=r"train\.epochs.*complete Recipe"):
        nestify.plan(recipe, {"train.epochs": 1})


def test_paths_are_accepted(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text('extends = "digits"\n')
    assert nestify.load_recipe(tmp_path / "mine.toml").model.name == nestify.load_recipe("digits").model.name
    with pytest.raises(RecipeError, match=r"none\.toml: there is no such file"):
        nestify.compress(Path("none.toml"))


def test_the_example_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    [example] = [block for block in GUIDE.split("```") if "(nestify.Observer):" in block]
    few = '"data.max_train": 256'  # and as quick as it can be
    assert few in example
    quick = '"data.max_train": 64, "data.max_val": 20, "train.recalibrate_batches": 1, "schedule.fit": False'
    exec(example.removeprefix("python").replace(few, quick), {})
    lines = capsys.readouterr().out.splitlines()
    moments = [text.rpartition(" [")[0] for text in lines if text.endswith("]")]
    assert moments == ["original 0", "before 0", "epoch 1", "after 2"]
    assert any("level1" in text.split() for text in lines)
    assert lines[-1].endswith(" warnings")


def test_the_guide_lists_every_event() -> None:
    listed = re.findall(r"^\| `(\w+)\(([\w, ]*)\)` \|", GUIDE, re.MULTILINE)
    methods = {
        name: ", ".join(list(inspect.signature(method).parameters)[1:])
        for name, method in vars(nestify.Observer).items()
        if inspect.isfunction(method) and name not in ("log_offsets", "tracker_runs")
    }
    assert dict(listed) == methods
