"""`eval --consensus` and `--cascade`, and the values that `compress --consensus` fits for them."""

from pathlib import Path

import pytest

from nestify.file.reader import open_nested_file
from tests.cli.driver import UNTRAINED, nestify


@pytest.fixture(scope="module")
def fitted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested file with temperatures and a learned consensus; tests must not change it."""
    path = tmp_path_factory.mktemp("fitted") / "a.nested.safetensors"
    done = nestify("compress", "digits", *UNTRAINED, "--calibrate", "0.3", "-o", path)
    assert done.code == 0, done.err
    return path


def test_what_was_fitted_is_in_the_file(fitted: Path) -> None:
    levels = open_nested_file(fitted).manifest.levels
    assert all(level.temperature is not None and 0.05 <= level.temperature <= 20 for level in levels)
    assert [len(level.consensus) for level in levels] == [1, 2, 3]
    assert nestify("verify", fitted).code == 0


def test_consensus_flag_holds_out_a_twentieth_of_the_training_images() -> None:
    done = nestify("compress", "digits", "--consensus", "--dry-run", "--json")
    assert done.code == 0, done.err
    plain = nestify("compress", "digits", "--dry-run", "--json").document["train_images"]
    assert done.document["train_images"] == pytest.approx(0.95 * plain, abs=5)
    assert done.document["val_images"] == 359


def test_held_out_images_are_not_trained_on(fitted: Path) -> None:
    plain = nestify("compress", "digits", "--epochs", "0", "--dry-run", "--json").document["train_images"]
    held = nestify("compress", "digits", "--epochs", "0", "--calibrate", "0.5", "--dry-run", "--json")
    assert held.document["train_images"] == pytest.approx(plain / 2, abs=5)


@pytest.mark.parametrize("kind", ["mean", "learned"])
def test_consensus(kind: str, fitted: Path, digits_folder: Path) -> None:
    document = nestify("eval", fitted, "--data", digits_folder, "--consensus", kind, "--json").document
    macs = [level.metrics.effective_macs for level in open_nested_file(fitted).manifest.levels]
    assert [row["level"] for row in document["consensus"]] == [2, 3]
    assert document["consensus"][1]["effective_macs"] == sum(filter(None, macs))
    assert [len(row["weights"]) for row in document["consensus"]] == ([0, 0] if kind == "mean" else [2, 3])
    assert len(document["levels"]) == 3
    shown = nestify("eval", fitted, "--data", digits_folder, "--consensus", kind).out
    assert "consensus of levels" in shown
    assert ("weights" in shown) == (kind == "learned")


def test_cascade(fitted: Path, digits_folder: Path) -> None:
    words = ("eval", fitted, "--data", digits_folder, "--json", "--cascade")
    document = nestify(*words, "0").document
    assert document["cascade"][0]["shares"] == [1, 0, 0]
    assert document["cascade"][0]["top1"] == document["levels"][0]["top1"]
    assert document["calibrated"]
    full = open_nested_file(fitted).manifest.levels[-1].metrics.effective_macs
    assert full is not None
    half = nestify(*words, "macs=0.5").document["cascade"][0]
    assert half["effective_macs"] <= 0.5 * full
    curve = nestify(*words, "sweep").document["cascade"]
    costs = [row["effective_macs"] for row in curve]
    assert costs == sorted(costs)
    assert curve[0]["shares"] == [1, 0, 0]
    two = nestify(*words, "sweep", "--level", "2").document
    assert [len(row["shares"]) for row in two["cascade"]] == [2] * len(curve)
    assert len(two["levels"]) == 2


def test_without_temperatures_a_note_says_that_confidence_is_not_a_probability(
    digits_file: Path, digits_folder: Path
) -> None:
    done = nestify("eval", digits_file, "--data", digits_folder, "--cascade", "0.9")
    assert done.code == 0
    assert "holds no temperatures" in " ".join(done.out.split())
    assert not nestify("eval", digits_file, "--data", digits_folder, "--cascade", "1", "--json").document[
        "calibrated"
    ]


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--cascade", "1.5"), "--cascade 1.5 is not a threshold in [0, 1] (0.8), macs=0.5, or sweep"),
        (("--cascade", "nan"), "--cascade nan is not a threshold"),
        (("--cascade", "params=0.5"), "--cascade params=0.5 is not a threshold"),
        (("--cascade", "macs=1"), "--cascade macs=1 is below the core level's own"),
        (("--consensus", "learned"), "the file has no weights for it"),
        (("--consensus", "mean", "--level", "1"), "need two levels or more"),
    ],
)
def test_refusals(words: tuple[str, ...], problem: str, digits_file: Path, digits_folder: Path) -> None:
    done = nestify("eval", digits_file, "--data", digits_folder, *words)
    assert done.code == 2
    assert problem in done.message


def test_too_large_a_share_is_refused() -> None:
    done = nestify("compress", "digits", *UNTRAINED, "--calibrate", "1.5")
    assert done.code == 2
    assert "data.calibrate = 1.5" in done.message
