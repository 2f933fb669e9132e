"""The exchange of gradients, compared with their weighted mean, at once and in pieces."""

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn

from nestify.training.distributed import World
from nestify.training.exchange import GradientExchange, read_requests
from nestify.training.stepper import Stepper
from tests.simulated.steps import SCHEDULES, make_batch, make_stepper

IMAGES = (5, 3)
"""Images of the two processes."""


class Done:
    """Stands in for the work of a collective operation that has ended."""

    def wait(self) -> bool:
        return True


class Wire:
    """Stands in for the all-reduce of two processes, which run one after the other."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.sent: list[Tensor] = []
        self._received = 0
        self._monkeypatch = monkeypatch

    def send(self) -> None:
        """Let all-reduce note what the first process sends."""
        self._monkeypatch.setattr(distributed, "all_reduce", self._note)

    def receive(self) -> None:
        """Let all-reduce add it to what the second process sends."""
        self._monkeypatch.setattr(distributed, "all_reduce", self._add)

    def _note(self, flat: Tensor, async_op: bool) -> Done:
        self.sent.append(flat.clone())
        return Done()

    def _add(self, flat: Tensor, async_op: bool) -> Done:
        flat.add_(self.sent[self._received])
        self._received += 1
        return Done()


@pytest.fixture
def wire(monkeypatch: pytest.MonkeyPatch) -> Wire:
    return Wire(monkeypatch)


@pytest.mark.parametrize("stop", [False, True])
def test_every_process_is_weighed_by_its_images(stop: bool, wire: Wire) -> None:
    ours, theirs = (nn.Sequential(nn.Linear(3, 2), nn.BatchNorm1d(2), nn.Linear(2, 1)) for _ in range(2))
    expected = {}
    for name, parameter in ours.named_parameters():
        other = theirs.get_parameter(name)
        if not name.startswith("2."):  # a parameter that no level has reached has no gradient
            parameter.grad, other.grad = torch.randn_like(parameter), torch.randn_like(other)
            expected[name] = (5 * parameter.grad + 3 * other.grad) / 8
    for name in ("1.running_mean", "1.running_var"):
        ours.get_buffer(name).normal_()
        theirs.get_buffer(name).normal_()
        expected[name] = (5 * ours.get_buffer(name) + 3 * theirs.get_buffer(name)) / 8
    requests = None
    for rank, model, images, turn in ((1, theirs, 3, wire.send), (0, ours, 5, wire.receive)):
        turn()
        exchange = GradientExchange(World(rank, 2), model, dict)
        exchange.start([1], images)
        requests = exchange.finish(stop=stop and rank == 1, save=rank == 0)
    assert requests is not None
    assert read_requests(requests) == (stop, True)
    for name, mean in expected.items():
        found = ours.get_buffer(name) if "running" in name else ours.get_parameter(name).grad
        assert found is not None
        torch.testing.assert_close(found, mean)
    assert ours.get_parameter("2.weight").grad is None


def test_a_single_process_exchanges_nothing() -> None:
    model = nn.Linear(1, 1)
    exchange = GradientExchange(World(), model, dict)
    exchange.start([2, 1], 4)
    exchange.level_done(2)
    assert exchange.finish(stop=True) is None


def gradients_of(training: Stepper, number: int, images: int, done: Callable[[int], None] | None) -> None:
    training.nested.zero_grad()
    training.task.backward(*make_batch("cpu", number, images), level_done=done)


def choose(training: Stepper) -> list[int]:
    """Choose the weights of the levels, and return the levels of a step."""
    if training._ramp is not None:
        training._choose_weights(training._ramp, training._ramp.steps)
    return [level for level, _ in training.task.draw_levels()]


def found_gradients(training: Stepper) -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in training.nested.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("exchange", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("options", [{}, {"sandwich": 2}, {"grad_checkpointing": True}])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_pieces_are_the_weighted_mean(
    schedule: str, options: dict[str, Any], exchange: torch.dtype, wire: Wire
) -> None:
    """Of the gradients of the two processes, each computed alone."""
    training = make_stepper(schedule, "cpu", architecture="test_vit", **options)
    levels = choose(training)
    alone = []
    for number, images in enumerate(IMAGES):
        gradients_of(training, number, images, None)
        alone.append(found_gradients(training))
    entry = training._gradients.entry_levels
    pieces: list[int] = []
    for rank, turn in ((1, wire.send), (0, wire.receive)):
        turn()
        world = World(rank, 2, exchange=exchange, overlap=True)
        exchanging = GradientExchange(world, training.nested, entry)
        for _ in range(2):  # the second step uses the indices and the buffer of the first
            exchanging.start(levels, IMAGES[rank])
            gradients_of(training, rank, IMAGES[rank], exchanging.level_done)
            pieces.append(len(exchanging._sent))
            exchanging.finish()
    found = found_gradients(training)
    assert found.keys() == alone[0].keys()
    for name, gradient in found.items():
        mean = (IMAGES[0] * alone[0][name] + IMAGES[1] * alone[1][name]) / sum(IMAGES)
        rounding = 1e-6 if exchange == torch.float32 else 2**-7  # bfloat16 has 8 bits of precision
        largest = max(float(each[name].abs().max()) for each in alone)
        assert (gradient - mean).abs().max() <= rounding * largest, name
    flat = torch.cat([tensor.flatten() for tensor in entry().values()])
    bounds = [99, *sorted(levels, reverse=True)[1:]]
    sizes = [int(((flat > low) & (flat <= high)).sum()) for high, low in pairwise(bounds)]
    assert pieces == [sum(size > 0 for size in sizes)] * 4
    assert [len(sent) for sent in wire.sent][: pieces[0]] == [size for size in sizes if size]


def test_a_process_without_images_has_no_part(wire: Wire) -> None:
    training = make_stepper("weight", "cpu")
    levels = choose(training)
    gradients_of(training, 0, IMAGES[0], None)
    expected = found_gradients(training)
    for rank, images, turn in ((1, 0, wire.send), (0, IMAGES[0], wire.receive)):
        turn()
        exchange = GradientExchange(
            World(rank, 2, overlap=True), training.nested, training._gradients.entry_levels
        )
        exchange.start(levels, images)
        gradients_of(training, rank, images or 2, exchange.level_done)
        if not images:
            for parameter in training.nested.parameters():
                if parameter.grad is not None:
                    parameter.grad.fill_(float("nan"))
        if rank == 0:
            exchange.finish()
        else:
            with pytest.MonkeyPatch.context() as other:  # its own sum would be 0
                other.setattr(Tensor, "__float__", lambda _: 0.0)
                exchange.finish()
            assert all(not p.grad.any() for p in training.nested.parameters() if p.grad is not None)
    for name, gradient in found_gradients(training).items():
        torch.testing.assert_close(gradient, expected[name])
