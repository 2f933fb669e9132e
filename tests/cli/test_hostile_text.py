"""Text that would control a terminal, or pass for a line of ours, is escaped wherever it is shown."""

import json
import logging
import shutil
import sys
import warnings
from pathlib import Path

import pytest

from nestify.cli import app
from nestify.cli.output import take_verbosity
from nestify.report.sheet import Column, Sheet
from nestify.report.text import render, render_markdown
from nestify.training.display import Display
from tests.cli.driver import at_terminal, nestify
from tests.file.damage import damage

HOSTILE = "\x1b[31mR\u202e\x9b2J\u200b\ud800\nnestify: done"
SHOWN = r"\x1b[31mR\u202e\x9b2J\u200b\ud800\x0anestify: done"


@pytest.fixture
def copy(digits_file: Path, tmp_path: Path) -> Path:
    return Path(shutil.copy(digits_file, tmp_path / "copy.safetensors"))


def is_clean(text: str) -> bool:
    return all(letter.isprintable() or letter == "\n" for letter in text) and "\nnestify: done" not in text


@pytest.mark.parametrize("markdown", [False, True])
def test_tables_titles_and_notes(markdown: bool) -> None:
    sheet = Sheet([Column(HOSTILE, [HOSTILE, "x" * 10**6], is_text=True)], HOSTILE)
    text = (
        render_markdown(HOSTILE, [sheet], [HOSTILE])
        if markdown
        else render(HOSTILE, [sheet], [HOSTILE], None)
    )
    assert is_clean(text)
    assert text.count("done") == 5
    assert len(text) < 6000


def test_markup_and_emoji_codes_are_shown_as_they_are() -> None:
    name = "[red]a[/red] [link=http://x]b :dog:"
    text = render(name, [Sheet([Column(name, [name], is_text=True)], name)], [name], None)
    assert text.count(name) == 5


def test_markdown_of_a_name_is_escaped() -> None:
    name = r"![a](http://x) <img src=x> `b` c|d e\|f"
    text = render_markdown("t", [Sheet([Column("name", [name], is_text=True)])], [name])
    assert text.count(r"![a]\(http://x) \<img src=x> \`b\` c\|d e\\\|f") == 2


def test_kwargs_of_a_nested_file(copy: Path) -> None:
    damage(
        copy,
        lambda parts: parts.manifest["model"]["kwargs"].update(global_pool=HOSTILE.replace("\ud800", "")),
    )
    for words in (
        ["verify", copy],
        ["eval", copy, "--data", "embedded/digits"],
        ["--traceback", "verify", copy],
    ):
        done = nestify(*words)
        assert done.code == 3
        assert is_clean(done.out + done.err)
    damage(copy, lambda parts: parts.manifest["model"]["kwargs"].update(global_pool="x" * 10**6))
    done = nestify("verify", copy)
    assert done.code == 3
    assert len(done.out) < 10_000


def test_names_of_a_nested_file_in_every_report(copy: Path) -> None:
    name = "[red]a|b:dog:<b>\u3164"
    damage(copy, lambda parts: parts.manifest["levels"][0].update(name=name))
    for words in ([], ["--format", "markdown"], ["--format", "html"], ["--layers"], ["--json"]):
        done = nestify("report", copy, *words)
        assert done.code == 0
        assert "\u3164" not in done.out
        assert "<b>" not in done.out or "html" not in words
    assert json.loads(done.out)["levels"][0]["name"] == name
    assert any("[red]a|b:dog:<b>" in line for line in at_terminal(200, "report", copy))


def test_paths_and_values_of_the_command_line(tmp_path: Path) -> None:
    for words in (
        ["report", tmp_path / f"{HOSTILE}.safetensors"],
        ["report", f"https://{HOSTILE}"],
        ["compress", tmp_path / f"{HOSTILE}.toml"],
        ["compress", "digits", "--data", HOSTILE],
        ["compress", "digits", "--set", f"train.{HOSTILE}=1"],
        ["compress", "digits", "--set", f"train.opt={HOSTILE}"],
        ["compress", HOSTILE],
        ["compress", f"--{HOSTILE}"],
        [HOSTILE],
        ["guide", HOSTILE],
    ):
        done = nestify(*words)
        assert done.code in (2, 3), done.err
        assert is_clean(done.err), done.err


def test_names_of_images(images: Path) -> None:
    (images / "train" / "0" / "\x1b[31m\u202ebad.png").write_bytes(b"no image")
    (images / "train" / "0" / "two\nlines.png").write_bytes(b"no image")
    words = ("compress", "digits", "--data", images, "--epochs", "0", "--batch-size", "8")
    for setting in ("schedule.fit=false", "train.eval_before=false", "train.recalibrate_batches=2"):
        words += ("--set", setting)
    for policy in ("refuse", "skip"):
        done = nestify(*words, "--on-bad-image", policy, "--restart")
        assert done.code == (0 if policy == "skip" else 3), done.err
        assert is_clean(done.out + done.err)
        assert r"\x1b[31m\u202ebad.png" in done.err


def test_the_same_warning_is_repeated_once(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        for text in ("of the plan and the run", "another", "of the plan and the run"):
            display.warned(text)
        capsys.readouterr()
        display.repeat_warnings()
    assert capsys.readouterr().err.splitlines() == ["warning: of the plan and the run", "warning: another"]


def test_progress_warnings_and_logs(capsys: pytest.CaptureFixture[str]) -> None:
    with Display() as display:
        display.stage(HOSTILE)
        display.warned(HOSTILE)
        display.skipped("training", {HOSTILE: HOSTILE})
        display.repeat_warnings()
    with app.printable_warnings(), warnings.catch_warnings():
        warnings.simplefilter("always")
        warnings.warn(HOSTILE, stacklevel=1)
    take_verbosity([])
    assert logging.lastResort is not None
    logging.lastResort.emit(logging.LogRecord("timm", 30, "", 1, HOSTILE, (), None))
    shown = capsys.readouterr().err
    assert shown.count(SHOWN) == 6
    assert is_clean(shown)


def test_unexpected_exceptions(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    for error in (ValueError(HOSTILE), MemoryError(HOSTILE), ValueError("x" * 10**6)):

        def fail(error: Exception = error) -> None:
            raise error

        monkeypatch.setattr(sys, "argv", ["nestify"])
        monkeypatch.setattr(app, "take_verbosity", lambda words: words)
        monkeypatch.setattr(app, "get_command", lambda made: _Failing(fail))
        assert app.run([]) in (3, 70)
        shown = capsys.readouterr().err
        assert is_clean(shown.replace("\nplease report", ""))
        assert len(shown) < 2500


class _Failing:
    """A command that fails."""

    def __init__(self, fail: object) -> None:
        self.make_context = fail
