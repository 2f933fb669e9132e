"""Several processes of one run: what they share, what each has for itself, and how all of them end."""

import os
import signal
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

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
    "train.eval_before": False,
    "schedule.fit": False,
    "augment.hflip": 0,
    "levels": "0.8,0",
}
DEEPER: Mapping[str, object] = {  # the digits' own network has a single block that can be skipped
    "data.path": "embedded/digits",
    "model.input_size": 32,
    "model.pretrained": False,
    "model.kwargs.layers": [2, 2, 2, 2],
    "train.lr": 1e-3,  # random weights amplify rounding
}
OUTPUT, CHECKPOINT = Path("run.nested.safetensors"), Path("run.resume.safetensors")


class Cut(Exception):
    """Interrupts a run before a step."""


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def run(_: int, options: Mapping[str, object], observer: Observer | None = None, **more: Any) -> None:
    source = "test_resnet" if "data.path" in options else "digits"
    api.compress(source, {**SMALL, **options}, observer=observer or Observer(), **more)


def together(size: int, options: Mapping[str, object]) -> None:
    """Run in several processes, all of which must succeed."""
    assert Processes(size, run, options).join() == [None] * size


def weights(path: Path) -> dict[str, torch.Tensor]:
    state = open_nested_file(path).state()
    own = {f"{level} {name}": t for level, each in enumerate(state.private) for name, t in each.items()}
    return {name: tensor for name, tensor in (state.shared | own).items() if tensor.is_floating_point()}


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({}, id="weight", marks=pytest.mark.long),
        pytest.param({"schedule.kind": "channel", "levels": "0.5,1", "data.max_train": 32}, id="channel"),
        pytest.param(
            {**DEEPER, "schedule.kind": "layer", "levels": "0.5,1"}, id="layer", marks=pytest.mark.long
        ),
    ],
)
def test_synced_batch_norm_trains_like_one_process_with_the_combined_batches(
    options: dict[str, object],
) -> None:
    synced = {**options, "train.sync_batch_norm": True, "train.batch_size": 8}
    together(2, {**synced, "output": "two.safetensors"})
    together(1, {**options, "output": "one.safetensors"})
    one, two = weights(Path("one.safetensors")), weights(Path("two.safetensors"))
    assert one.keys() == two.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(two[name], tensor, rtol=1e-5, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")
    together(2, {**synced, "train.sync_batch_norm": False, "output": "two.safetensors"})
    different = weights(Path("two.safetensors"))
    assert any(not torch.allclose(different[name], tensor, atol=1e-3) for name, tensor in one.items())


def test_levels_without_training_are_those_of_one_process() -> None:
    """Each process refits them on all images."""
    options = {"train.epochs": 0, "schedule.kind": "channel", "levels": "0.5,1"}
    options |= {"schedule.fit": True, "schedule.fit_images": 16}
    for size in (1, 2):
        together(size, {**options, "output": f"{size}.safetensors"})
    one, two = (weights(Path(f"{size}.safetensors")) for size in (1, 2))
    assert one.keys() == two.keys()
    assert all(torch.equal(tensor, two[name]) for name, tensor in one.items())


RANDOM = {"augment.mixup": 0.3, "model.kwargs.drop_rate": 0.3, "train.teacher": "none", "train.batch_size": 8}


def cut_apart(rank: int, steps: int, options: Mapping[str, object]) -> None:
    """Interrupt a run after some steps, in a folder of its own."""
    enter(rank)
    original, done = Stepper.step, 0

    def counted(self: Stepper, *given: Any) -> None:
        nonlocal done
        if done == steps:
            raise Cut
        original(self, *given)
        done += 1

    Stepper.step = counted  # type: ignore[method-assign]
    with pytest.raises(Cut):
        run(rank, options)


def enter(rank: int) -> None:
    """Work in the folder of a node."""
    folder = Path(f"node{rank}")
    folder.mkdir(exist_ok=True)
    os.chdir(folder)


class Stages(Observer):
    def __init__(self) -> None:
        self.texts: list[str] = []

    def stage(self, text: str) -> None:
        self.texts.append(text)


def resume_apart(rank: int, options: Mapping[str, object]) -> list[str]:
    enter(rank)
    observer = Stages()
    run(rank, options, observer, resume=True)
    return observer.texts


def test_processes_without_a_common_folder_resume_from_the_checkpoint_of_rank_0() -> None:
    """With random numbers of their own, which continue where they were."""
    together(2, RANDOM)
    assert Processes(2, cut_apart, 5, RANDOM).join() == [None, None]
    assert Path("node0", CHECKPOINT).exists()
    assert not Path("node1", CHECKPOINT).exists()
    stages, _ = Processes(2, resume_apart, RANDOM).join()
    assert "resuming at step 5 of 6 of the training" in stages
    assert Path("node0", OUTPUT).read_bytes() == OUTPUT.read_bytes()


def note_draws(rank: int) -> list[float]:
    """Return a random number that dropout would have drawn in each step."""
    drawn: list[float] = []
    original = Stepper._accumulate

    def noting(self: Stepper, *batch: torch.Tensor, **given: Any) -> None:
        drawn.append(float(torch.rand(())))
        original(self, *batch, **given)

    Stepper._accumulate = noting  # type: ignore[method-assign,assignment]
    run(rank, RANDOM)
    return drawn


def test_each_process_draws_its_own_random_numbers() -> None:
    first, second = Processes(2, note_draws).join()
    assert len({*first, *second}) == 12


def die_in_evaluation(rank: int) -> None:
    if rank == 1:
        Passes.evaluate_levels = lambda *_: os.kill(os.getpid(), signal.SIGKILL)  # type: ignore
    run(rank, {"train.epochs": 0.5})


def test_a_process_that_dies_during_an_evaluation_is_no_bug() -> None:
    error, killed = Processes(2, die_in_evaluation).join()
    assert killed is None
    assert isinstance(error, ProcessError)
    assert "another process of this run has ended" in str(error)


def die_at_once(rank: int) -> None:
    if rank == 1:
        os._exit(1)
    run(rank, {"train.timeout_minutes": 0.05})


def test_a_process_that_does_not_start_is_named_after_the_time_limit() -> None:
    error, _ = Processes(2, die_at_once).join()
    assert isinstance(error, ProcessError)
    assert "train.timeout_minutes" in str(error)


def fail_to_save(rank: int, failure: Exception) -> None:
    def fail(*_: object) -> None:
        raise failure

    if rank == 0:
        resume.write_checkpoint = fail
    run(rank, {})


@pytest.mark.parametrize(
    "failure", [pytest.param(MemoryError("no memory"), marks=pytest.mark.long), DivergedError("level 1")]
)
def test_a_checkpoint_that_rank_0_cannot_save_ends_all(failure: Exception) -> None:
    first, second = Processes(2, fail_to_save, failure).join()
    assert isinstance(first, type(failure))
    assert isinstance(second, NestifyError)
    assert str(failure) in str(second)


def run_with_other_images(rank: int) -> None:
    run(rank, {"data.max_val": 20 + rank})


def test_nodes_with_different_images_are_refused() -> None:
    errors = Processes(2, run_with_other_images).join()
    assert all(isinstance(error, ProcessError) for error in errors)
    assert "data.max_val is 21 on rank 1 and 20 on rank 0" in str(errors[0])


def make_images(folder: Path, per_class: int, bad: int) -> None:
    """Write images of ten classes, the first ones of each split damaged."""
    generator = torch.Generator().manual_seed(0)
    for split in ("train", "validation"):
        for index in range(10 * per_class):
            path = folder / split / f"c{index % 10}" / f"{index:03}.png"
            path.parent.mkdir(parents=True, exist_ok=True)
            pixels = torch.randint(256, (32, 32, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(path)
            if index < bad:
                path.write_bytes(b"damaged")


class Skipped(Observer):
    def __init__(self) -> None:
        self.images: dict[str, set[str]] = {}
        self.counts: list[int] = []

    def evaluated(self, moment: str, epoch: int, results: Any) -> None:
        self.counts.append(results[0].images)

    def skipped(self, split: str, images: dict[str, str]) -> None:
        self.images[split] = {Path(name).name for name in images}


def run_skipping(rank: int, options: Mapping[str, object]) -> tuple[dict[str, set[str]], list[int]]:
    observer = Skipped()
    run(rank, options, observer)
    return observer.images, observer.counts


def test_images_that_one_process_cannot_read_are_skipped() -> None:
    """Batches of a single image, so that processes have steps without any."""
    make_images(Path("photos"), per_class=2, bad=7)
    options = {
        **DEEPER,
        "data.path": "photos",
        "data.max_train": 20,
        "data.max_val": 20,
        "data.on_bad_image": "skip",
        "train.batch_size": 2,
        "train.epochs": 2,
    }
    (skipped, counts), _ = Processes(2, run_skipping, options).join()
    names = {f"{index:03}.png" for index in range(7)}
    assert skipped == {"training": names, "validation": names}
    assert counts == [13] * len(counts)


@pytest.mark.parametrize(
    "options",
    [
        pytest.param({"train.accumulate": 2, "train.batch_size": 4, "data.max_train": 32}, id="weight"),
        pytest.param(
            {"schedule.kind": "channel", "levels": "0.5,0.75,1", "train.sandwich": 2},
            id="channel",
            marks=pytest.mark.long,
        ),
    ],
)
def test_an_exchange_in_pieces_changes_nothing(options: dict[str, object]) -> None:
    together(2, {**options, "output": "whole.safetensors"})
    together(2, {**options, "output": "pieces.safetensors", "train.overlap": True})
    whole, pieces = weights(Path("whole.safetensors")), weights(Path("pieces.safetensors"))
    assert all(torch.equal(pieces[name], tensor) for name, tensor in whole.items())


@pytest.mark.long
def test_16_bit_exchange_is_close() -> None:
    together(2, {"output": "a.safetensors"})
    together(2, {"output": "b.safetensors", "train.exchange": "bfloat16"})
    full, half = weights(Path("a.safetensors")), weights(Path("b.safetensors"))
    assert any(not torch.equal(half[name], tensor) for name, tensor in full.items())
    for name, tensor in full.items():
        torch.testing.assert_close(
            half[name], tensor, rtol=0.05, atol=0.01, msg=lambda m, n=name: f"{n}: {m}"
        )
