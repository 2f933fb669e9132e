"""Training steps on the simulated device: results of the CPU, few launches, and no waits."""

from collections.abc import Mapping

import pytest
import torch

from nestify.recipe.augment_options import AugmentOptions
from tests.simulated import reset_work, work
from tests.simulated.steps import SCHEDULES, all_tensors, make_batch, make_stepper, run_steps

OPTIONS: Mapping[str, Mapping[str, object]] = {
    "mixed precision": {"amp": True, "amp_dtype": "bfloat16"},
    "teacher": {"teacher": "both"},
    "checkpointing": {"grad_checkpointing": True, "architecture": "test_vit"},
    "transformer": {"architecture": "test_vit"},
    "mixup": {"augment": AugmentOptions(mixup=0.2, cutmix=0.5)},
    "averaged, clipped": {"ema_decay": 0.9, "clip_grad": 1.0, "opt": "adamw"},
}
CASES = {schedule: (schedule, {}) for schedule in SCHEDULES} | {
    name: ("combined" if name in ("teacher", "transformer") else "weight", options)
    for name, options in OPTIONS.items()
}


@pytest.mark.parametrize("name", CASES)
def test_steps_give_the_tensors_of_the_cpu(name: str, gpu: torch.device) -> None:
    schedule, options = CASES[name]
    accumulate = 2 if name == "mixup" else 1
    expected, found = (
        run_steps(make_stepper(schedule, device, **options), 3, accumulate)  # type: ignore[arg-type]
        for device in ("cpu", gpu)
    )
    assert expected.keys() == found.keys()
    assert [key for key, tensor in expected.items() if not torch.equal(tensor, found[key])] == []


@pytest.mark.parametrize("name", CASES)
def test_a_step_waits_for_nothing_and_launches_little_more_than_plain_steps(
    name: str, gpu: torch.device
) -> None:
    schedule, options = CASES[name]
    training = make_stepper(schedule, gpu, **options)  # type: ignore[arg-type]
    run_steps(training, 2)
    batch = make_batch(gpu)
    reset_work()
    training.step([batch])
    print(name, work().launches.total(), work())
    assert work().waits == {}
