"""Outputs that cannot be written, and failed runs, which must leave older files unchanged."""

import ctypes
import os
import signal
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import load_file, save_file

from nestify.compression import write as api
from nestify.errors import BadFileError
from nestify.file.reader import open_nested_file
from nestify.model.nested_model import NestedModel
from nestify.training.stepper import Stepper
from tests.cli.conftest import Refused
from tests.cli.driver import CHECKPOINT, DIGITS, QUICK, TWO_STEPS, events, finish, fork, nestify, spawn

START = ("compress", "digits", *QUICK, "-o")


def test_no_place_for_the_output(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("no folder")
    (tmp_path / "folder").mkdir()
    remedy = "; choose a folder that exists and can be written to"
    for output, expected in (
        ("nowhere/a.safetensors", f"cannot be written (No such file or directory){remedy}"),
        ("file/a.safetensors", f"cannot be written (Not a directory){remedy}"),
        ("folder", "is a folder; give the path of a file in it"),
        ("/dev/null", "is not a regular file; choose another path"),
        ("/proc/a.safetensors", f"cannot be written (No such file or directory){remedy}"),
    ):
        assert refused(3, *START, output) == f"output = {output} {expected} (flag: --output)"
    words = ("compress", "digits", *QUICK, "--finetune-epochs", "1", "--set")
    assert refused(3, *words, "finetune.save=nowhere/a.safetensors").startswith(
        "finetune.save = nowhere/a.safetensors cannot be written"
    )


def test_a_read_only_folder(refused: Refused, tmp_path: Path) -> None:
    if os.geteuid() == 0:
        pytest.skip("root may write everywhere")
    (tmp_path / "fixed").mkdir(mode=0o555)
    assert "cannot be written (Permission denied)" in refused(3, *START, "fixed/a.safetensors")


def test_the_checkpoint_is_not_overwritten(refused: Refused, tmp_path: Path) -> None:
    (tmp_path / "own.safetensors").write_bytes(CHECKPOINT.read_bytes())
    (tmp_path / "link.safetensors").symlink_to("own.safetensors")
    words = ("--checkpoint", "own.safetensors")
    for output in ("own.safetensors", "./own.safetensors", "link.safetensors"):
        assert "is the checkpoint of this run; choose another path" in refused(3, *START, output, *words)


def test_report_without_a_place(refused: Refused, digits_file: Path, tmp_path: Path) -> None:
    assert "cannot be written (No such file" in refused(3, "report", digits_file, "-o", "nowhere/report.txt")
    assert "is not a regular file" in refused(3, "report", digits_file, "-o", tmp_path)


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A file system of 256 KiB, mounted in the test's folder."""
    disk = tmp_path / "disk"
    disk.mkdir()
    libc = ctypes.CDLL(None, use_errno=True)
    if libc.mount(b"none", os.fsencode(disk), b"tmpfs", 0, b"size=256k"):
        pytest.skip(f"cannot mount a small file system: {os.strerror(ctypes.get_errno())}")
    yield disk
    libc.umount(os.fsencode(disk))


def test_a_full_disk(small_disk: Path, digits_file: Path) -> None:
    output = small_disk / "a.safetensors"
    output.write_text("an older file")
    done = nestify(*START, output)
    assert done.code == 3
    reason = "cannot be written (No space left on device); make room, what was there before is unchanged"
    assert done.message == f"{output}: {reason}"
    assert output.read_text() == "an older file"
    assert {path.name for path in small_disk.iterdir()} == {"a.safetensors", "a.metrics.jsonl"}

    (small_disk / "fill").write_bytes(
        b"x" * (os.statvfs(small_disk).f_bavail * os.statvfs(small_disk).f_bsize)
    )
    done = nestify("report", digits_file, "--json", "-o", small_disk / "report.json")
    assert done.code == 3
    assert "No space left on device" in done.message
    assert not (small_disk / "report.json").exists()


def fill(disk: Path) -> Path:
    """Use all the free space of a small disk; removing the returned file frees it again."""
    free = os.statvfs(disk)
    (disk / "fill").write_bytes(b"x" * (free.f_bavail * free.f_bsize))
    return disk / "fill"


def test_a_disk_that_is_full_while_checkpoints_are_written(
    small_disk: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Logs and checkpoints are on the full disk, the nested file is not."""
    output = small_disk / "a.safetensors"
    output.symlink_to(tmp_path / "elsewhere.safetensors")
    filled = fill(small_disk)
    original_step, steps = Stepper.step, 0

    def step_and_free(self: Stepper, *arguments: Any) -> None:
        nonlocal steps
        steps += 1
        original_step(self, *arguments)
        if steps == 3:  # in the second epoch
            filled.unlink()

    monkeypatch.setattr(Stepper, "step", step_and_free)
    two_per_epoch = (*TWO_STEPS, "--max-train", "64", "--epochs", "3")
    done = nestify("compress", "digits", *two_per_epoch, "--log", "csv", "-o", output)
    assert done.code == 0, done.err
    assert "the checkpoint was not saved, and will be tried again" in done.err
    assert "make room" in done.err
    assert f"{small_disk}/a.metrics.jsonl cannot be written" in done.err
    assert [line["epoch"] for line in events(small_disk / "a.metrics.jsonl", "train")] == [1, 2, 3]
    assert len(events(small_disk / "a.metrics.jsonl", "evaluation")) == 4
    assert len((small_disk / "a.csv").read_text().splitlines()) == 1 + 3
    assert {path.name for path in small_disk.iterdir()} == {"a.safetensors", "a.metrics.jsonl", "a.csv"}
    assert open_nested_file(tmp_path / "elsewhere.safetensors").n_levels == 3


@pytest.mark.parametrize("form", ["timm", pytest.param("onnx", marks=pytest.mark.long), "pt2"])
def test_an_export_to_a_full_disk(small_disk: Path, digits_file: Path, form: str) -> None:
    if form == "onnx":
        pytest.importorskip("onnxscript")
    fill(small_disk)
    ending = "safetensors" if form == "timm" else form
    words = ("export", digits_file, "--level", "1", "--format", form, "-o", small_disk / f"a.{ending}")
    done = finish(fork(*words))  # torch would end the process
    assert done.code == 3, done.err
    assert "make room" in done.message
    assert {path.name for path in small_disk.iterdir()} == {"fill"}


@pytest.fixture
def no_waiting() -> Iterator[None]:
    """End a test that waits for ever, as opening a pipe would."""

    def end(*_: object) -> None:
        raise TimeoutError("nestify waits")

    before = signal.signal(signal.SIGALRM, end)
    signal.alarm(60)
    yield
    signal.alarm(0)
    signal.signal(signal.SIGALRM, before)


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    "ending", [".metrics.jsonl", ".csv", ".finetune.csv", ".resume.safetensors", ".lock"]
)
def test_pipes_in_the_place_of_a_runs_files(tmp_path: Path, refused: Refused, ending: str) -> None:
    os.mkfifo(tmp_path / f"digits{ending}")
    message = refused(3, "compress", "digits", *QUICK, "--log", "csv")
    assert f"digits{ending}" in message
    assert "not a regular file" in message


@pytest.mark.usefixtures("no_waiting")
@pytest.mark.parametrize(
    ("code", "words"),
    [
        (2, ("compress", "pipe.toml")),
        (2, ("compress", "pipe.json")),
        (2, ("batch", "pipe.toml", "--out", "jobs")),
        (2, ("report", "digits.nested.safetensors", "--check", "pipe.toml")),
        (3, ("report", "digits.nested.safetensors", "--compare", "pipe.json")),
        (3, ("compress", "digits", *QUICK, "--hierarchy", "pipe.csv")),
        (3, ("compress", "digits", *QUICK, "--checkpoint", "pipe.safetensors")),
        (3, ("compress", "digits", *QUICK, "--data", "pipe.tar")),
        (3, ("eval", "pipe.safetensors", "--data", "embedded/digits")),
    ],
)
def test_pipes_in_the_place_of_an_input(
    tmp_path: Path, digits_file: Path, code: int, words: Sequence[str]
) -> None:
    (tmp_path / "digits.nested.safetensors").write_bytes(digits_file.read_bytes())
    pipe = next(word for word in words if word.startswith("pipe."))
    os.mkfifo(tmp_path / pipe)
    done = nestify(*words)
    assert done.code == code, done.err
    assert pipe in done.message


@pytest.mark.usefixtures("no_waiting")
def test_a_job_whose_log_is_a_pipe(tmp_path: Path) -> None:
    (tmp_path / "jobs" / "digits").mkdir(parents=True)
    os.mkfifo(tmp_path / "jobs" / "digits" / "log.txt")
    for dry_run in ([], ["--dry-run"]):
        done = nestify("batch", "digits", "--out", "jobs", *dry_run)
        assert done.code == 3, done.err
        assert "log.txt" in done.message


def test_two_runs_with_one_output(tmp_path: Path) -> None:
    """The second run is refused until the first one has ended, also if it was killed."""
    words = ("compress", "digits", *TWO_STEPS, "--epochs", "500", "-o")
    first = fork(*words, "a.nested.safetensors")
    try:
        assert first.stderr is not None
        for line in first.stderr:
            if line.startswith("train epoch 1"):
                break
        log = (tmp_path / "a.metrics.jsonl").read_bytes()
        # all of them have the same log
        for other in ("a.nested.safetensors", "a.safetensors", f"{tmp_path}/./a.nested.safetensors"):
            done = nestify("compress", "digits", *QUICK, "--restart", "-o", other)
            assert done.code == 2, done.err
            assert Path(other).name in done.message
            assert "-o" in done.message
        assert (tmp_path / "a.metrics.jsonl").read_bytes().startswith(log)
        assert nestify("compress", "digits", *QUICK, "-o", "b.nested.safetensors").code == 0
    finally:
        first.kill()
        first.communicate()
    done = nestify("compress", "digits", *QUICK, "--restart", "-o", "a.nested.safetensors")
    assert done.code == 0, done.err
    assert not list(tmp_path.glob("*.lock"))


def test_a_loss_that_is_not_finite(refused: Refused) -> None:
    words = ("compress", "digits", *TWO_STEPS, "--epochs", "1", "--lr", "1e9")
    message = refused(4, *words)
    assert message.startswith("the loss of level ")
    assert message.endswith("a smaller learning rate or train.clip_grad may help")
    assert [event["moment"] for event in events(Path("digits.metrics.jsonl"), "evaluation")] == ["original"]


def test_a_last_step_that_diverges(refused: Refused) -> None:
    """The losses of both steps are finite, but the weights after them are not."""
    message = refused(4, "compress", "digits", *TWO_STEPS, "--epochs", "0.1", "--lr", "1e30")
    assert "on the validation images is " in message
    assert "; a smaller train.lr may help, with --restart" in message
    finetuned = ("--restart", "--epochs", "0", "--finetune-epochs", "1", "--batch-size", "200")
    message = refused(4, "compress", "digits", *TWO_STEPS, *finetuned, "--set", "finetune.lr=1e30")
    assert message.startswith("the loss of the dense model on the validation images is ")
    assert "; a smaller finetune.lr may help, with --restart" in message


def test_a_checkpoint_that_predicts_nothing(refused: Refused) -> None:
    """No learning rate is named if nothing was trained."""
    weights = load_file(CHECKPOINT)
    weights["layer1.0.bn1.running_var"].fill_(-1)
    save_file(weights, "broken.safetensors")
    message = refused(4, *START, "digits.nested.safetensors", "--checkpoint", "broken.safetensors")
    assert message.startswith("the effect of conv1.0.weight on the model's outputs is not a number")
    assert message.endswith("check the checkpoint and the images")
    message = refused(
        4, *START, "digits.nested.safetensors", "--checkpoint", "broken.safetensors", "--score", "lamp"
    )
    assert message.startswith("the loss of the dense model on the validation images is nan; give another ")


def test_a_file_that_does_not_load_again_is_not_kept(
    refused: Refused, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: Path) -> NestedModel:
        assert path.stat().st_size > 1_000_000
        raise BadFileError(f"{path}: does not please")

    monkeypatch.setattr(api, "load", refuse)
    message = refused(3, *START, "digits.nested.safetensors")
    assert message.startswith("digits.nested.safetensors: the written file cannot be loaded again")


def test_an_interrupted_write_leaves_nothing(refused: Refused, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupt(path: Path) -> NestedModel:
        raise KeyboardInterrupt

    monkeypatch.setattr(api, "load", interrupt)
    assert refused(130, *START, "digits.nested.safetensors") == "interrupted; no output was written"


def test_fine_tuned_weights_are_a_plain_checkpoint(tmp_path: Path) -> None:
    words = ("--finetune-epochs", "1", "--set", "finetune.save=dense.safetensors")
    assert nestify(*START, "a.safetensors", *words).code == 0
    assert load_file("dense.safetensors").keys() == load_file(CHECKPOINT).keys()


# Standard output and standard error without a reader


def test_a_reader_that_closes_the_pipe(digits_file: Path) -> None:
    for words, code in (
        (("report", digits_file, "--layers", "--json"), 0),
        (("compress", "--help"), 0),
        (("eval", digits_file, "--data", DIGITS, "--max-images", "300", "--min-top1", "100"), 1),
    ):
        reader, writer = os.pipe()
        process = (fork if "eval" in words else spawn)(*words, stdout=writer)
        os.close(writer)
        os.close(reader)
        done = finish(process)
        assert done.code == code, done.err
        assert "Error" not in done.err
        assert "Exception" not in done.err


def test_a_full_standard_output(digits_file: Path) -> None:
    with open("/dev/full", "w") as full:
        done = finish(spawn("report", digits_file, stdout=full))
    assert done.code == 3
    assert done.message == (
        "standard output: cannot be written (No space left on device); redirect it elsewhere"
    )


def test_a_closed_standard_output(digits_file: Path) -> None:
    done = finish(spawn("report", digits_file, stdout=None, preexec_fn=lambda: os.close(1)))
    assert (done.code, done.message) == (
        3,
        "standard output is closed; redirect it to a file or a pipe",
    )


def test_a_closed_standard_error_does_not_stop_the_work(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    process = fork("compress", "digits", *QUICK, stderr=writer)
    os.close(writer)
    os.close(reader)
    assert finish(process).code == 0
    assert nestify("report", "digits.nested.safetensors").code == 0
