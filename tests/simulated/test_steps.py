"""Training steps on the simulated device: the results of the CPU, few launches, and no waits."""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import pytest
import timm
import torch
from timm.optim import create_optimizer_v2
from torch import Tensor

from nestify.recipe.augment_options import AugmentOptions
from nestify.training.stepper import Stepper
from nestify.training.task import NestedTask
from tests.simulated import reset_work, work
from tests.simulated.steps import SCHEDULES, SIDE, Batch, all_tensors, make_batch, make_stepper, run_steps

OPTIONS: Mapping[str, Mapping[str, Any]] = {
    "mixed precision": {"amp": True, "amp_dtype": "bfloat16"},
    "teacher": {"teacher": "both", "schedule": "combined"},
    "checkpointing": {"grad_checkpointing": True, "architecture": "test_vit"},
    "transformer": {"architecture": "test_vit", "schedule": "combined"},
    "mixup": {"augment": AugmentOptions(mixup=0.2, cutmix=0.5)},
    "unlabelled": {"teacher": "original", "labelled": False},
    "loss of weighted classes": {"loss": "bce", "class_counts": range(1, 11)},
    "sandwich": {"sandwich": 2},
    "averaged, clipped": {"ema_decay": 0.9, "clip_grad": 1.0, "opt": "adamw"},
}
CASES = {schedule: {"schedule": schedule} for schedule in SCHEDULES} | {
    name: {"schedule": "weight", **options} for name, options in OPTIONS.items()
}


LONG = ("teacher", "checkpointing", "transformer", "unlabelled", "sandwich", "layer", "combined")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=pytest.mark.long if name in LONG else ()) for name in CASES]
)
def test_steps_give_the_tensors_of_the_cpu_and_wait_for_nothing(name: str, gpu: torch.device) -> None:
    accumulate = 2 if name == "mixup" else 1
    expected = run_steps(make_stepper(device="cpu", **CASES[name]), 3, accumulate)
    training = make_stepper(device=gpu, **CASES[name])
    run_steps(training, 2, accumulate)  # both choose the weights again
    batches = [make_batch(gpu, 2 * accumulate + k) for k in range(accumulate)]
    reset_work()
    training.step(batches)
    assert work().waits == {}
    assert different(expected, all_tensors(training)) == []


def different(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Return the names of tensors that are not equal bit by bit; a NaN equals nothing."""
    assert expected.keys() == found.keys()
    return [name for name, tensor in expected.items() if not torch.equal(tensor, found[name])]


@pytest.mark.parametrize(
    ("architecture", "schedule", "ceiling"),
    [
        ("test_resnet", "weight", 1.15),
        ("test_resnet", "channel", 1.2),
        pytest.param("test_vit", "weight", 1.15, marks=pytest.mark.long),
    ],
)
def test_a_step_launches_little_more_than_the_plain_steps_of_its_levels(
    architecture: str, schedule: str, ceiling: float, gpu: torch.device
) -> None:
    nested, plain = make_stepper(schedule, gpu, architecture=architecture), plain_step(architecture, gpu)
    batch = make_batch(gpu)
    counts = []
    for step in (lambda: nested.step([batch]), lambda: plain(batch)):
        for _ in range(3):  # the first two choose weights, and make the optimizer's state
            reset_work()
            step()
        counts.append(work().launches.total())
    assert counts[0] <= ceiling * 3 * counts[1], counts


def plain_step(architecture: str, device: torch.device) -> Callable[[Batch], None]:
    """Return a step of a timm model as timm's own loop would do it."""
    size = {"img_size": SIDE} if architecture == "test_vit" else {}
    model = timm.create_model(architecture, num_classes=10, **size).to(device)
    optimizer = create_optimizer_v2(model, opt="sgd", lr=0.05, weight_decay=1e-4, momentum=0.9)
    criterion = timm.loss.LabelSmoothingCrossEntropy(0.1)

    def step(batch: Batch) -> None:
        optimizer.zero_grad()
        criterion(model(batch[0]), batch[1]).backward()
        optimizer.step()

    return step


def test_a_training_that_is_cut_continues_with_the_same_random_numbers(gpu: torch.device) -> None:
    def make() -> Stepper:
        return make_stepper("weight", gpu, architecture="test_vit", drop_rate=0.3)

    whole = make()
    expected = run_steps(whole, 4)
    cut = make()
    run_steps(cut, 2)
    state = cut.state()
    torch.simulated.manual_seed(7)  # type: ignore[attr-defined]  # another process has other states
    rest = make()
    rest.restore(state)
    assert different(expected, run_steps(rest, 2)) == []


@pytest.mark.long
@pytest.mark.filterwarnings("ignore")  # warnings of torch while it traces
def test_compiled_levels_give_the_tensors_of_the_cpu(
    gpu: torch.device, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Traced and run by torch; its usual compiler knows real devices alone."""
    expected = run_steps(make_stepper("weight", "cpu"), 3)
    monkeypatch.setattr(torch, "compile", partial(torch.compile, backend="eager"))
    assert different(expected, run_steps(make_stepper("weight", gpu, compiled=True), 3)) == []


def broken_backward(break_it: Callable[[NestedTask, Tensor, Tensor], None]) -> Callable[..., Any]:
    """Return `NestedTask.backward` with a fault that runs before it."""
    original = NestedTask.backward

    def backward(self: NestedTask, images: Tensor, target: Tensor, *rest: Any, **more: Any) -> Sequence[Any]:
        break_it(self, images, target)
        return original(self, images, target, *rest, **more)

    return backward


FAULTS: Mapping[str, Callable[[NestedTask, Tensor, Tensor], Any]] = {
    "a tensor on the CPU": lambda task, images, target: images.mul_(torch.ones(SIDE)),
    "a tensor on another GPU": lambda task, images, target: images.mul_(images.to("simulated:1")),
    "a generator of the CPU": lambda task, images, target: torch.randn(
        3, device=images.device, generator=torch.Generator()
    ),
    "a number that is read": lambda task, images, target: images.mean().item(),
    "a number that is copied": lambda task, images, target: torch.tensor(1.0, device=images.device),
    "a mask that selects": lambda task, images, target: images[images > 0],
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_noticed(fault: str, gpu: torch.device, monkeypatch: pytest.MonkeyPatch) -> None:
    training = make_stepper("weight", gpu)
    batch = make_batch(gpu)
    monkeypatch.setattr(NestedTask, "backward", broken_backward(FAULTS[fault]))
    run = pytest.raises(RuntimeError) if "on" in fault.split() or "generator" in fault else None
    reset_work()
    if run is not None:
        with run:
            training.step([batch])
    else:
        run_steps(training, 2)
        reset_work()
        training.step([batch])
        assert work().waits
