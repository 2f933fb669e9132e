"""Which levels a step of the user's own loop trains, where there are more than a step trains."""

from collections.abc import Callable
from copy import deepcopy

import torch
from torch.nn import functional

from nestify.compression.trainable import TrainableNestedModel
from tests.compression.test_own_loop import batch, gradients, loop

LEVELS = "0.9,0.8,0.6,0.3,0"
"""Five levels, of which a step trains four."""


def drawn(
    nested: TrainableNestedModel, steps: int, say: Callable[[int], object] | None = None
) -> list[list[int]]:
    found = []
    for step in range(steps):
        if say is not None:
            say(step)
        found.append([result.level for result in nested.backward(*batch(2))])
    return found


def test_every_level_is_trained_if_update_is_never_called() -> None:
    levels = drawn(loop(LEVELS), 12)
    assert all(each[0] == 5 and each[-1] == 1 and len(each) == 4 for each in levels)
    assert {level for each in levels for level in each} == {1, 2, 3, 4, 5}


def test_every_level_is_trained_by_a_task_of_timm() -> None:
    nested = loop(LEVELS)
    task, seen = nested.task(), set()
    for _ in range(12):
        nested.zero_grad()
        task(*batch(2))["loss"].backward()
        seen |= {
            level
            for level in range(1, 6)
            if any(t.grad is not None for t in nested.own_tensors(level).values())
        }
    assert seen == {1, 2, 3, 4, 5}


def test_the_steps_that_update_tells_are_drawn_as_if_they_were_counted() -> None:
    counted, told = loop(LEVELS), loop(LEVELS)
    assert drawn(counted, 6) == drawn(told, 6, told.update)
    told.update(2)  # a step that is told again is the same step: its images may come in several parts
    assert drawn(told, 2)[0] == drawn(told, 1)[0]


def test_a_loop_that_resumes_draws_what_it_would_have_drawn() -> None:
    whole, first, second = loop(LEVELS), loop(LEVELS), loop(LEVELS)
    expected = drawn(whole, 9)
    assert drawn(first, 4) == expected[:4]
    second.load_state_dict(first.state_dict())
    assert drawn(second, 5) == expected[4:]


def test_a_copy_of_a_model_with_a_task_has_the_gradients_of_the_model() -> None:
    nested = loop()
    nested.task()
    copy = deepcopy(nested)
    for each in (nested, copy):
        each.task(functional.cross_entropy)(*batch())["loss"].backward()
    assert gradients(copy).keys() == gradients(nested).keys()
    for name, gradient in gradients(copy).items():
        torch.testing.assert_close(gradient, gradients(nested)[name])


def test_blocks_and_weights_are_ranked_on_the_same_images() -> None:
    """With one batch or with more than either reads, from a list or from an iterator."""
    level = [{"depth": 0.5, "sparsity": 0.5}, {"depth": 1.0}]
    batches = [batch(64)[0].roll(k, 0) for k in range(6)]
    for images, given in ((batches[:1], batches[:1]), (batches, iter(batches))):
        options = {"level": level, "schedule.rank": "loss"}
        nested = loop(None, "combined", images=given, options=options)
        expected = loop("0.5,0", images=images).facts.sensitivity
        assert nested.facts.sensitivity.keys() == expected.keys()
        for name, each in expected.items():
            assert torch.equal(nested.facts.sensitivity[name], each)
