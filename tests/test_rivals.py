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
    found = paired_difference([first], [second], [labels])
    assert found.points == pytest.approx(-4)
    # McNemar: the variance of the sum is b + c - (b - c)^2 / n
    assert found.error == pytest.approx(100 * np.sqrt((16 - 16 / 100) / 99 / 100))


def test_seeds_are_averaged_by_image() -> None:
    labels = np.zeros(4, dtype=np.int64)
    right, wrong = labels, labels + 1
    found = paired_difference([right, wrong], [wrong, right], [labels, labels])
    assert (found.points, found.error) == (0, 0)


@pytest.mark.parametrize("lengths", [(40, 40), (30, 50)])
def test_each_seed_has_the_labels_of_its_own_images(lengths: tuple[int, int]) -> None:
    """The error is that of all images together, which are independent."""
    rng = np.random.default_rng(0)
    labels = [rng.integers(0, 3, length) for length in lengths]
    one, two = ([np.where(rng.random(len(true)) < share, true, 9) for true in labels] for share in (0.7, 0.5))
    found = paired_difference(one, two, labels)
    each = [(a == true).astype(float) - (b == true) for a, b, true in zip(one, two, labels, strict=True)]
    together = np.concatenate(each)
    assert found.points == pytest.approx(100 * together.mean())
    assert found.error == pytest.approx(100 * together.std(ddof=1) / np.sqrt(len(together)), rel=0.2)


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
        assert len(found["seed3/labels"]) == 359
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


def test_a_variant_keeps_its_options(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    def open_with(*variants: str) -> int:
        words = [word for variant in variants for word in ("--variant", *variant.split())]
        return run(monkeypatch, tmp_path, "--levels", "0.8,0", "--set", "augment.mixup=0.2", *words)

    assert open_with("soft train.distill=0.5") == 2  # for the mixup, but the folder knows the variant
    (tmp_path / "seed3-soft.npz").touch()
    capsys.readouterr()
    open_with("soft train.distill=0.9")
    assert "--variant soft was {'train.distill': 0.5}, now {'train.distill': 0.9}" in capsys.readouterr().err
    for variants in ((), ("hard train.distill=0",), ("hard train.distill=0", "soft train.distill=0.5")):
        open_with(*variants)
        assert "another comparison" not in capsys.readouterr().err
    open_with("hard train.distill=1")
    assert "--variant hard was" in capsys.readouterr().err


@pytest.mark.parametrize(
    "setting",
    [
        "augment.mixup=0.2",
        "train.loss=bce",
        "train.class_weights=balanced",
        "train.bn=recalibrate",
        "train.accumulate=2",
    ],
)
def test_options_that_the_rivals_cannot_train_with_are_refused(
    setting: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run(monkeypatch, tmp_path, *TINY, "--set", setting) == 2
    assert setting.partition("=")[0] in capsys.readouterr().err
