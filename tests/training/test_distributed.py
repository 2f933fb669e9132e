"""Several processes train the same model as one process with their combined batches."""

import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors.torch import save_file

import nestify as package
from nestify.data.loaders import Loader
from nestify.errors import DataError, ProcessError
from nestify.file.reader import open_nested_file
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.training.distributed import World
from nestify.training.resume import Checkpoints
from nestify.training.stepper import Stepper
from tests.cli.driver import Outcome, environment, finish, nestify
from tests.cli.forked import Forked
from tests.training.processes import Processes, srun_environment

DIGITS = Path(package.__file__).parent / "recipes" / "digits"
VIT = (
    *("compress", "test_vit", "--checkpoint", "vit.safetensors", "--data", "digits.data"),
    *("--set", "model.kwargs={img_size=32}", "--input-size", "32", "--epochs", "1", "--max-train", "64"),
    *("--max-val", "41", "--levels", "0.8,0.5,0.3,0.1,0", "--set", "train.sandwich=3", "--lr", "0.1"),
    *("--set", "augment.hflip=0", "--device", "cpu", "--set", "train.clip_grad=1.0"),
    *("--set", "schedule.fit=false", "--set", "train.eval_before=false"),
)


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Work in a folder with a transformer, which has no batch norm, and with digits as a folder of tars."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(1)
    model = timm.create_model("test_vit", num_classes=10, img_size=32)
    save_file(model.state_dict(), "vit.safetensors")
    Path("digits.data").mkdir()
    for split in ("train", "validation"):
        Path(f"digits.data/{split}.tar").symlink_to(DIGITS / f"{split}.tar")


PATHS = ("one", "two", "three")


def start(*words: str) -> "subprocess.Popen[str]":
    """Start two processes by torchrun."""
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    return subprocess.Popen(
        [*command, "-m", "nestify", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        env=environment,
        start_new_session=True,
    )


def command(_: int, words: tuple[str, ...]) -> Outcome:
    return nestify(*words)


def run(processes: int, *words: str) -> None:
    """Run nestify, which must succeed."""
    done = Processes(processes, command, words).join() if processes > 1 else [nestify(*words)]
    assert [each.code for each in done] == [0] * processes, done[0].err


def weights(path: str) -> dict[str, torch.Tensor]:
    state = open_nested_file(path).state()
    return {**state.shared, **{f"entry {name}": entry for name, entry in state.entry.tensors.items()}}


def test_two_processes_train_like_one_with_the_combined_batches() -> None:
    run(1, *VIT, "--batch-size", "16", "-o", "one")
    run(2, *VIT, "--batch-size", "8", "-o", "two")
    run(1, *VIT, "--batch-size", "4", "--set", "train.accumulate=4", "-o", "three")
    expected = weights("one")
    for path in ("two", "three"):
        found = weights(path)
        assert found.keys() == expected.keys()
        for name, tensor in expected.items():
            if name.startswith("entry "):  # weights with nearly equal scores may change places
                assert (found[name] != tensor).float().mean() < 1e-3, (path, name)
            else:
                torch.testing.assert_close(found[name], tensor, rtol=0, atol=1e-5)
    one, two, three = ([level.metrics for level in open_nested_file(path).manifest.levels] for path in PATHS)
    assert [metrics.images for metrics in two] == [41] * 5  # each image is evaluated once
    assert [metrics.top1 for metrics in one] == [metrics.top1 for metrics in two]
    assert [metrics.top1 for metrics in one] == [metrics.top1 for metrics in three]


@pytest.mark.long  # test_processes.py has the same of a run that is resumed
def test_the_same_run_of_two_processes_gives_the_same_bytes() -> None:
    words = ("compress", "digits", "--epochs", "1", "--max-train", "64", "--max-val", "20", "--device", "cpu")
    for folder in ("a", "b"):
        Path(folder).mkdir()
        run(2, *words, "--batch-size", "16", "-o", f"{folder}/x", "--set", "train.eval_before=false")
    assert Path("a/x").read_bytes() == Path("b/x").read_bytes()


def test_a_single_process_exchanges_nothing() -> None:
    single, tensor = World(), torch.ones(2)
    assert single.is_main
    assert single.all_reduce(tensor) is tensor
    assert single.broadcast_object("a") == "a"
    assert single.all_gather("a") == ["a"]


def test_processes_that_hold_different_entry_levels_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    model = timm.create_model("test_resnet")
    nested = NestedModel(model, describe_model(model), ["a", "b"])
    monkeypatch.setattr(World, "broadcast", lambda *_: None)
    monkeypatch.setattr(World, "all_gather", lambda _, value: [value, "other"])
    with pytest.raises(ProcessError, match="hold different entry levels"):
        World(0, 2).sync_entry_levels(nested)
    monkeypatch.setattr(World, "all_gather", lambda _, value: [value, value])
    World(0, 2).sync_entry_levels(nested)


@pytest.mark.long  # by torchrun; test_processes.py has the same of srun
def test_a_process_that_dies_ends_the_run() -> None:
    endless = ("--epochs", "1000", "--batch-size", "8", "-o", "a")
    process = start(*VIT, *endless)
    assert process.stderr is not None
    for line in process.stderr:
        if line.startswith("train epoch 1 "):
            break
    children = subprocess.run(["pgrep", "-P", str(process.pid)], capture_output=True, text=True, check=True)
    os.kill(int(children.stdout.split()[-1]), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    assert not Path("a").exists()


def fail_in_the_first_step(rank: int, words: tuple[str, ...]) -> Outcome:
    def fail(*_: object) -> None:
        raise DataError("an image cannot be read")

    Stepper.step = fail  # type: ignore[method-assign]
    return command(rank, words)


def test_a_signal_stops_all_processes_after_the_same_step() -> None:
    endless = ("--epochs", "60", "--batch-size", "8", "-o", "a")
    variables = {**environment(), **srun_environment(2)}
    first, second = (
        Forked([*VIT, *endless], {**variables, "SLURM_PROCID": rank, "SLURM_LOCALID": rank}) for rank in "01"
    )
    assert first.stderr is not None
    for line in first.stderr:
        if line.startswith("train epoch 1 "):
            break
    time.sleep(0.2)
    first.send_signal(signal.SIGTERM)
    for process in (first, second):
        assert finish(process, timeout=120).code == 143
    assert Path("a.resume.safetensors").exists()
    assert not Path("a").exists()
    resumed, _ = Processes(2, fail_in_the_first_step, (*VIT, *endless)).join()
    assert re.search(r"resuming at step \d+ of 240 of the training", resumed.err), resumed.err
    assert resumed.code == 3


def signal_in_an_evaluation() -> None:
    """Let this process receive a signal in the evaluation after its first epoch."""
    original = Checkpoints.interruptible

    def signalled(self: Checkpoints, batches: Loader) -> Iterator[Any]:
        os.kill(os.getpid(), signal.SIGTERM)
        yield from original(self, batches)

    Checkpoints.interruptible = signalled  # type: ignore[method-assign]


def signal_after_the_last_step() -> None:
    """Let this process receive a signal when no step is left in which the processes could agree."""
    original = Stepper.finish

    def signalled(self: Stepper) -> NestedModel:
        os.kill(os.getpid(), signal.SIGTERM)
        return original(self)

    Stepper.finish = signalled  # type: ignore[method-assign]


@pytest.mark.parametrize(
    ("before", "epochs"), [(signal_in_an_evaluation, "60"), (signal_after_the_last_step, "1")]
)
def test_a_signal_to_one_process_between_steps_stops_all(before: Callable[[], None], epochs: str) -> None:
    variables = {**environment(), **srun_environment(2)}
    processes = [
        Forked(
            [*VIT, "--epochs", epochs, "--batch-size", "8", "-o", "a"],
            {**variables, "SLURM_PROCID": str(rank), "SLURM_LOCALID": str(rank)},
            before=before if rank else None,
        )
        for rank in (0, 1)
    ]
    assert [finish(process, timeout=120).code for process in processes] == [143, 143]
    assert Path("a.resume.safetensors").exists()
    assert not Path("a").exists()


@pytest.mark.parametrize(
    ("words", "problem"),
    [
        (("--max-val", "1"), "1 validation images are too few with 2 processes"),
    ],
)
def test_refusals(words: tuple[str, ...], problem: str) -> None:
    for done in Processes(2, command, (*VIT, *words)).join():
        assert done.code != 0
        assert problem in done.err
