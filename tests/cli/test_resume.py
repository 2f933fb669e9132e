"""Interrupted runs, which the same command resumes."""

import os
import signal
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from nestify.training.stepper import Stepper
from tests.cli.driver import finish, fork, interrupt, nestify

FEW = (
    *("--max-train", "64", "--max-val", "20", "--batch-size", "16", "--epochs", "2", "--levels", "0.9,0"),
    *("--set", "train.recalibrate_batches=1", "--set", "schedule.fit=false"),
    *("--set", "train.eval_before=false"),
)
COMMAND = ("compress", "digits", *FEW, "--workers", "0")
OUTPUT = Path("digits.nested.safetensors")
KEPT = Path("digits.resume.safetensors")


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    """The nested file of a run that nothing interrupts."""
    path = tmp_path_factory.mktemp("whole") / OUTPUT
    assert nestify(*COMMAND, "-o", path).code == 0
    return path.read_bytes()


def stop_in_step_6(number: int) -> None:
    """Let this process send a signal to itself and all of its workers in the second epoch."""
    original, begun = Stepper.step, 0

    def step(self: Stepper, *given: Any) -> None:
        nonlocal begun
        begun += 1
        if begun == 6:
            os.killpg(0, number)
        original(self, *given)

    Stepper.step = step  # type: ignore[method-assign]


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_run_resumes_to_the_same_bytes(number: int, code: int, whole: bytes) -> None:
    stop = partial(stop_in_step_6, int(number))
    done = finish(fork(*COMMAND, "--workers", "2", start_new_session=True, before=stop))
    assert done.code == code
    assert KEPT.exists()
    assert not OUTPUT.exists()
    again = nestify(*COMMAND, "--resume")
    assert again.code == 0
    kept = 6 if number == signal.SIGTERM else 4  # the last step, or the end of the last epoch
    assert f"resuming at step {kept} of 8 of the training" in again.err
    assert OUTPUT.read_bytes() == whole
    assert not KEPT.exists()


def test_refusals(tmp_path: Path) -> None:
    nothing = nestify(*COMMAND, "--resume")
    assert (nothing.code, nothing.out) == (2, "")
    assert nothing.message.startswith("--resume: there is no checkpoint digits.resume.safetensors; leave out")
    assert interrupt(6, *COMMAND).code == 130
    other = nestify(*COMMAND, "--lr", "0.5")
    assert other.code == 2
    assert other.message.startswith(
        "digits.resume.safetensors belongs to a different run: train.lr is 0.5 now and was 0.01 when the run "
        "began; "
    )
    assert "--restart" in other.message
    KEPT.write_bytes(KEPT.read_bytes()[:1000])
    damaged = nestify(*COMMAND)
    assert damaged.code == 3
    assert "; use --restart" in damaged.message
    again = nestify(*COMMAND, "--restart")
    assert again.code == 0
    assert "resuming" not in again.err
    assert {path.name for path in tmp_path.iterdir()} == {OUTPUT.name, "digits.metrics.jsonl"}


def test_a_checkpoint_is_not_written_over_the_pretrained_weights(tmp_path: Path) -> None:
    weights = tmp_path / "mine.resume.safetensors"
    weights.write_bytes(b"weights")
    done = nestify("compress", "digits", "--checkpoint", weights, "-o", "mine.nested.safetensors")
    assert done.code == 3
    assert "mine.resume.safetensors is the checkpoint of this run; choose another path" in done.message
    assert weights.read_bytes() == b"weights"
