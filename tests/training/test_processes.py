"""Several processes of one run: what they share, what each has for itself, and how all of them end."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch

from nestify.compression import compress as api
from nestify.compression.passes import Passes
from nestify.errors import DivergedError, NestifyError, ProcessError
from nestify.file.reader import open_nested_file
from nestify.training import resume
from nestify.training.observer import Observer
from nestify.training.stepper import Stepper
from tests.training.processes import Processes

SMALL: Mapping[str, object] = {
    "output": "run.nested.safetensors",
    "device": "cpu",
    "data.max_train": 64,
    "data.max_val": 21,
    "train.batch_size": 16,
    "train.epochs": 1.5,
    "train.recalibrate_batches": 2,
    "augment.hflip": 0,
    "levels": "0.8,0",
}
OUTPUT, CHECKPOINT = Path("run.nested.safetensors"), Path("run.resume.safetensors")


class Cut(Exception):
    """Interrupts a run before a step."""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch, "set_num_threads", torch.set_num_threads)


def run(options: Mapping[str, object], observer: Observer | None = None, **more: Any) -> None:
    api.compress("digits", {**SMALL, **options}, observer=observer or Observer(), **more)


def together(size: int, options: Mapping[str, object], **more: Any) -> None:
    """Run in several processes, all of which must succeed."""
    assert Processes(size, lambda _: run(options, **more)).join() == [None] * size


def weights(path: Path) -> dict[str, torch.Tensor]:
    state = open_nested_file(path).state()
    own = {f"{level} {name}": t for level, each in enumerate(state.private) for name, t in each.items()}
    return {name: tensor for name, tensor in (state.shared | own).items() if tensor.is_floating_point()}


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"schedule.kind": "channel", "levels": "0.5,1"},
        {"schedule.kind": "layer", "levels": "0.01,1"},
    ],
    ids=["weight", "channel", "layer"],
)
def test_synced_batch_norm_trains_like_one_process_with_the_combined_batches(
    options: dict[str, object],
) -> None:
    synced = {**options, "train.sync_batch_norm": True, "train.batch_size": 8}
    together(2, {**synced, "output": "two.safetensors"})
    run({**options, "output": "one.safetensors"})
    one, two = weights(Path("one.safetensors")), weights(Path("two.safetensors"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    together(2, {**synced, "train.sync_batch_norm": False, "output": "two.safetensors"})
    different = weights(Path("two.safetensors"))
    assert any(not torch.allclose(different[name], tensor, atol=1e-3) for name, tensor in one.items())


RANDOM = {"augment.mixup": 0.3, "model.kwargs.drop_rate": 0.3, "train.teacher": "none", "train.batch_size": 8}


def interrupt(rank: int, steps: int, options: Mapping[str, object]) -> None:
    original, done = Stepper.step, 0

    def counted(self: Stepper, *given: Any) -> None:
        nonlocal done
        if done == steps:
            raise Cut
        original(self, *given)
        done += 1

    Stepper.step = counted  # type: ignore[method-assign]
    with pytest.raises(Cut):
        run(options)


def test_processes_without_a_common_folder_resume_from_the_checkpoint_of_rank_0() -> None:
    """With random numbers of their own, which continue where they were."""

    def apart(rank: int) -> None:
        folder = Path(f"node{rank}")
        folder.mkdir(exist_ok=True)
        os.chdir(folder)

    def cut(rank: int) -> None:
        apart(rank)
        interrupt(rank, 5, RANDOM)

    def go_on(rank: int) -> list[str]:
        apart(rank)
        stages: list[str] = []
        observer = Observer()
        observer.stage = stages.append  # type: ignore[method-assign]
        run(RANDOM, observer, resume=True)
        return stages

    together(2, RANDOM)
    assert Processes(2, cut).join() == [None, None]
    assert Path("node0", CHECKPOINT).exists()
    assert not Path("node1", CHECKPOINT).exists()
    stages, _ = Processes(2, go_on).join()
    assert "resuming at step 5 of 6 of the training" in stages
    assert Path("node0", OUTPUT).read_bytes() == OUTPUT.read_bytes()


def test_each_process_draws_its_own_random_numbers() -> None:
    def draws(rank: int) -> list[float]:
        drawn: list[float] = []
        original = Stepper._accumulate

        def noting(self: Stepper, *batch: torch.Tensor, share: float) -> None:
            drawn.append(float(torch.rand(())))
            original(self, *batch, share=share)

        Stepper._accumulate = noting  # type: ignore[method-assign,assignment]
        run(RANDOM)
        return drawn

    first, second = Processes(2, draws).join()
    assert len({*first, *second}) == 12


def test_a_process_that_dies_during_an_evaluation_is_no_bug() -> None:
    def go(rank: int) -> None:
        if rank == 1:
            Passes.evaluate_levels = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
        run({"train.epochs": 0.5})

    error, killed = Processes(2, go).join()
    assert killed is None
    assert isinstance(error, ProcessError)
    assert "another process of this run has ended" in str(error)


def test_a_process_that_does_not_start_is_named_after_the_time_limit() -> None:
    def go(rank: int) -> None:
        if rank == 1:
            os._exit(1)
        run({"train.timeout_minutes": 0.05})

    error, _ = Processes(2, go).join()
    assert isinstance(error, ProcessError)
    assert "train.timeout_minutes" in str(error)


@pytest.mark.parametrize("failure", [MemoryError("no memory"), DivergedError("level 1")])
def test_a_checkpoint_that_rank_0_cannot_save_ends_all(failure: Exception) -> None:
    def go(rank: int) -> None:
        def fail(*_: object) -> None:
            raise failure

        if rank == 0:
            resume.write_checkpoint = fail
        run({})

    first, second = Processes(2, go).join()
    assert isinstance(first, type(failure))
    assert isinstance(second, NestifyError)
    assert str(failure) in str(second)


def test_nodes_with_different_images_are_refused() -> None:
    def go(rank: int) -> None:
        run({"data.max_val": 20 + rank})

    errors = Processes(2, go).join()
    assert all(isinstance(error, ProcessError) for error in errors)
    assert "data.max_val is 21 on rank 1 and 20 on rank 0" in str(errors[0])


def test_16_bit_exchange_is_close() -> None:
    together(2, {"output": "a.safetensors"})
    together(2, {"output": "b.safetensors", "train.exchange": "bfloat16"})
    full, half = weights(Path("a.safetensors")), weights(Path("b.safetensors"))
    assert any(not torch.equal(half[name], tensor) for name, tensor in full.items())
    for name, tensor in full.items():
        torch.testing.assert_close(
            half[name], tensor, rtol=0.05, atol=0.01, msg=lambda m, n=name: f"{n}: {m}"
        )
