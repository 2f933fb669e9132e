"""The commands that compress suggests at its end, and warnings about very few images."""

import shlex
from pathlib import Path

import pytest

from nestify.cli.compress import next_steps
from tests.cli.driver import QUICK, UNTRAINED, nestify


def test_the_suggested_commands_run(tmp_path: Path) -> None:
    done = nestify("compress", "digits", *QUICK, "-o", "it's new.nested.safetensors")
    assert done.code == 0
    suggested = [shlex.split(line) for line in done.err.split("Next:\n")[1].splitlines()]
    assert [words[:2] for words in suggested] == [
        ["nestify", "bench"],
        ["nestify", "slice"],
        ["nestify", "export"],
    ]
    assert all(words[2] == "it's new.nested.safetensors" for words in suggested)
    for _, command, *words in suggested:
        quick = ("--rounds", "2") if command == "bench" else ()
        assert nestify(command, *words, *quick).code == 0
    assert {"it's new.level1.safetensors", "it's new.level1.onnx"} <= {
        path.name for path in tmp_path.iterdir()
    }


@pytest.mark.parametrize(
    "words", [["--quiet"], pytest.param(["--json"], marks=pytest.mark.long), ["--dry-run"]]
)
def test_programs_get_no_suggestions(words: list[str]) -> None:
    done = nestify("compress", "digits", *QUICK, *words)
    assert done.code == 0
    assert "Next:" not in done.out + done.err


def test_a_file_whose_name_looks_like_an_option() -> None:
    assert "nestify bench ./-a.safetensors" in next_steps(Path("-a.safetensors"), "level1")


def test_classes_with_one_training_image(images: Path) -> None:
    for name in ("3", "7"):
        for file in sorted((images / "train" / name).iterdir())[1:]:
            file.unlink()
    done = nestify("compress", "digits", *UNTRAINED, "--data", images)
    assert done.code == 0
    warning = next(line for line in done.err.splitlines() if line.startswith("warning: "))
    assert "2 of 10 classes" in warning
    assert "(3, 7)" in warning


def test_classes_with_more_images_are_not_named(images: Path) -> None:
    for file in sorted((images / "train" / "9").iterdir())[2:]:
        file.unlink()
    done = nestify("compress", "digits", *UNTRAINED, "--data", images)
    assert done.code == 0
    assert "of 10 classes" not in done.err
