"""The benchmark of rivals: its statistics, and a tiny run in which all methods train alike."""

import sys
from pathlib import Path

import numpy as np
import pytest

from tests.benchmarks import rivals
from tests.benchmarks.paired import MethodRun, best_rows, paired_difference


def test_paired_difference_is_that_of_discordant_images() -> None:
    labels = np.zeros(100, dtype=np.int64)
    first, second = labels.copy(), labels.copy()
    first[:10] = 1  # 10 images that only the second gets right
    second[10:16] = 1  # 6 that only the first does
    found = paired_difference([first], [second], labels)
    assert found.points == pytest.approx(-4)
    # McNemar: the variance of the sum is b + c - (b - c)^2 / n
    assert found.error == pytest.approx(100 * np.sqrt((16 - 16 / 100) / 99 / 100))


def test_seeds_are_averaged_by_image() -> None:
    labels = np.zeros(4, dtype=np.int64)
    right, wrong = labels, labels + 1
    found = paired_difference([right, wrong], [wrong, right], labels)
    assert (found.points, found.error) == (0, 0)


def test_a_level_is_compared_with_its_best_rival() -> None:
    labels = np.zeros(4, dtype=np.int64)
    guesses = {"nested": [0, 0, 0, 1], "worse": [0, 1, 1, 1], "better": [0, 0, 1, 1]}
    runs = {name: {1: MethodRun(labels, {1: np.array(classes)}, {})} for name, classes in guesses.items()}
    [row] = best_rows(runs, ["core"], ("worse", "better", "absent"))
    # one image of four differs: variance 1/4 * 3/4 * 4/3, over four images
    assert row == ["core", "75.00", "better, 50.00", "+25.00 ± 25.00"]


def run(monkeypatch: pytest.MonkeyPatch, output: Path, *options: str) -> int:
    given = ["--model", "digits", "--max-train", "128", "--seeds", "3", "--output", str(output), *options]
    monkeypatch.setattr(sys, "argv", ["rivals.py", *given])
    return rivals.main()


TINY = ("--epochs", "1", "--levels", "0.8,0", "--methods", "nested,alone,once,gradual,dense")


@pytest.mark.long
def test_all_methods_train_alike_and_are_not_run_twice(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, *TINY) == 0
    captured = capsys.readouterr()
    assert "| checksum |" in captured.out
    assert "| NO |" not in captured.out
    with np.load(tmp_path / "predictions.npz") as found:
        assert len(found["labels"]) == 359
        # Plain fine-tuning is what nestify does when only the full level has a weight.
        assert (found["seed3/dense/level2"] == found["seed3/alone/level2"]).all()
    once = MethodRun.read(tmp_path / "seed3-once-level1.npz")
    nested = MethodRun.read(tmp_path / "seed3-nested.npz")
    assert once.facts["nonzero"]["1"] == nested.facts["nonzero"]["1"]
    assert run(monkeypatch, tmp_path, *TINY) == 0
    assert "..." not in capsys.readouterr().err


def test_a_folder_with_other_results_is_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "settings.json").write_text('{"lr": 0.5}')
    (tmp_path / "seed1-nested.npz").touch()
    assert run(monkeypatch, tmp_path, *TINY) == 2
    assert "give another --output" in capsys.readouterr().err


def test_options_that_the_rivals_cannot_train_with_are_refused(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, *TINY, "--set", "augment.mixup=0.2") == 2
    assert "augment.mixup" in capsys.readouterr().err
