"""Images for `nest` are those that the model reads; in several processes they are those of rank 0."""

import os
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import distributed

import nestify
from nestify.compression.batches import SamePictures, pictures_of
from nestify.errors import RecipeError
from nestify.training.distributed import current_world
from tests.training.processes import Processes

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("batches", "words"),
    [
        ([torch.zeros(2, 3, 8, 8, dtype=torch.uint8)], "is of uint8, so it is not preprocessed"),
        ([torch.zeros(2, 1, 8, 8)], r"has the shape \(2, 1, 8, 8\), and the model reads 3 channels"),
        (torch.zeros(2, 3, 8, 8), r"has the shape \(3, 8, 8\)"),
        ([{"image": torch.zeros(2, 3, 8, 8)}], "is of the type dict"),
        ([np.zeros((2, 3, 8, 8))], "is of the type ndarray"),
        ([[]], "is of the type list"),
        ([("a.png", 1)], "is of the type tuple of str"),
    ],
)
def test_other_batches_are_refused(batches: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=rf"images: a batch.*{words}.*such as a DataLoader"):
        list(pictures_of(batches, 3, CPU))


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64, torch.float32])
@pytest.mark.parametrize("wrap", [lambda x: x, lambda x: (x, 1), lambda x: [x, "label", None]])
def test_images_become_float32(dtype: torch.dtype, wrap: Any) -> None:
    images = torch.arange(24.0).view(2, 3, 2, 2)
    (found,) = pictures_of([wrap(images.to(dtype))], 3, CPU)
    assert found.dtype == torch.float32
    assert torch.equal(found, images)


def test_one_process_has_its_own_images() -> None:
    batches = [torch.full((1, 3, 2, 2), float(value)) for value in range(2)]
    pictures = SamePictures(batches, 3, current_world(), CPU)
    for _ in range(2):
        assert [float(images.mean()) for images in pictures] == [0, 1]


def in_process_group(rank: int, work: Any) -> Any:
    os.environ.setdefault("RANK", str(rank))
    os.environ.setdefault("WORLD_SIZE", "2")
    distributed.init_process_group("gloo")
    try:
        return work(rank)
    finally:
        distributed.destroy_process_group()


def read_shared(rank: int) -> list[list[float]]:
    own = [torch.full((size, 1, 1, 1), 10.0 * rank + size) for size in range(1, 4 - rank)]
    pictures = SamePictures(own, 1, current_world(), CPU)
    part = [next(iter(pictures)).flatten().tolist()]  # it is as well to stop early, and to read again
    return part + [images.flatten().tolist() for images in pictures]


def fail_on_rank_0(rank: int) -> str:
    batches = [torch.zeros(2, 1, 8, 8) if rank == 0 else torch.zeros(2, 3, 8, 8)]
    with pytest.raises(RecipeError) as caught:
        list(SamePictures(batches, 3, current_world(), CPU))
    return str(caught.value)


def nest_with_a_ramp(rank: int) -> list[float]:
    torch.manual_seed(0)
    model = timm.create_model("test_resnet", num_classes=10, zero_init_last=False)
    torch.manual_seed(1 + rank)
    nested = nestify.nest(
        model,
        levels=["macs=0.4", "macs=0.7", 1],
        images=[torch.randn(8, 3, 32, 32)],
        input_size=(3, 32, 32),
        ramp_steps=2,
    )
    for step in range(3):
        nested.update(step)
    state: list[float] = nested.state_dict()["_extra_state"].tolist()
    return state


@pytest.mark.parametrize("work", [read_shared, fail_on_rank_0, nest_with_a_ramp])
def test_all_processes_have_the_images_of_rank_0(work: Any) -> None:
    first, second = Processes(2, in_process_group, work).join()
    assert not isinstance(first, BaseException), first
    assert first == second
    if work is read_shared:
        assert first == [[1.0], [1.0], [2.0, 2.0], [3.0, 3.0, 3.0]]
