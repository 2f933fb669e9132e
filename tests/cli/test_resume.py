"""Interrupted runs, which the same command resumes."""

import os
import signal
from pathlib import Path

import pytest

from tests.cli.driver import Outcome, finish, nestify, spawn

FEW = ("--max-train", "96", "--max-val", "20", "--batch-size", "16", "--epochs", "3")
COMMAND = ("compress", "digits", *FEW, "--set", "train.recalibrate_batches=1", "--workers", "2")
OUTPUT = Path("digits.nested.safetensors")
KEPT = Path("digits.resume.safetensors")


@pytest.mark.parametrize(("number", "code"), [(signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)])
def test_an_interrupted_run_resumes_to_the_same_bytes(number: int, code: int) -> None:
    assert nestify(*COMMAND).code == 0
    whole = OUTPUT.read_bytes()
    OUTPUT.unlink()
    assert ended_after_an_epoch(number).code == code
    assert KEPT.exists()
    assert not OUTPUT.exists()
    again = nestify(*COMMAND, "--resume")
    assert again.code == 0
    assert "resuming at step " in again.err
    assert OUTPUT.read_bytes() == whole
    assert not KEPT.exists()


def ended_after_an_epoch(number: int) -> Outcome:
    """Run the command and send a signal to it and all of its workers in its second epoch."""
    process = spawn(*COMMAND, start_new_session=True)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("validation top-1 (after epoch 1)"):
            break
    os.killpg(process.pid, number)
    return finish(process)


def test_refusals(tmp_path: Path) -> None:
    nothing = nestify(*COMMAND, "--resume")
    assert (nothing.code, nothing.out) == (2, "")
    assert nothing.message.startswith("--resume: there is no checkpoint digits.resume.safetensors; leave out")
    ended_after_an_epoch(signal.SIGTERM)
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
