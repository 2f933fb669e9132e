"""Making in-place operators functional keeps the logits, and leaves only writes that are necessary."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, fx, nn
from torch.nn import functional

from nestify.model.graph.memory import is_write
from nestify.model.graph.trace import Traced, trace
from nestify.model.spec import state_tensors

INPUT = (3, 4, 4)


class Model(nn.Module):
    """Two layers with a function between them, on (B, 8)."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(3, 8)
        self.last = nn.Linear(8, 4)
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.between(self.first(images.mean((2, 3)))))
        return logits


@torch.no_grad()
def run(traced: Traced, model: nn.Module, images: Tensor) -> Tensor:
    """Return the logits of the graph."""
    tensors = state_tensors(model) | dict(traced.constants)
    inputs = traced.graph.find_nodes(op="placeholder")
    values = [images if node is traced.images else tensors[traced.names[node]].clone() for node in inputs]
    (logits,) = fx.Interpreter(nn.Module(), graph=traced.graph).run(*values, enable_io_processing=False)
    assert isinstance(logits, Tensor)
    return logits


def writes_left(between: Callable[[Tensor], Tensor]) -> list[str]:
    """Return the names of the operators that still write in place, and check the logits."""
    torch.manual_seed(0)
    model = Model(between).double().eval()
    traced = trace(deepcopy(model), INPUT)
    images = torch.randn(3, *INPUT, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(run(traced, model, images), model(images), rtol=0, atol=0)
    writes = [node for node in traced.graph.nodes if is_write(node)]
    ends = {*writes, traced.images, traced.graph.output_node()}
    assert all(node.users for node in traced.graph.nodes if node not in ends)
    return [str(node.target) for node in writes]


def twice(y: Tensor) -> Tensor:
    y = y * 2
    y.relu_()
    y.mul_(3).add_(1)
    return y


def through_a_view(y: Tensor) -> Tensor:
    y = y * 2
    y.view(-1, 2, 4).relu_()
    return y


def before_a_view(y: Tensor) -> Tensor:
    y = y * 2
    y.relu_()
    return y + y.view(-1, 2, 4).flip(1).flatten(1)


def of_a_result_of_dropout(y: Tensor) -> Tensor:
    view = y.view(-1, 2, 4)
    z = functional.dropout(y, 0.5, training=False)
    return z.relu_() + view.flip(1).flatten(1)


def of_a_result_of_type_as(y: Tensor) -> Tensor:
    view = y.view(-1, 2, 4)
    z = y.type_as(view)
    return z.relu_() + view.flip(1).flatten(1)


def of_a_part(y: Tensor) -> Tensor:
    y = y * 2
    part = y[:, :3]
    return torch.cat([part.relu_(), y], 1)[:, 2:10]


def to_a_slice(y: Tensor) -> Tensor:
    y = y * 2
    y[:, :3] = y[:, 4:7]
    return y


def in_a_region(y: Tensor) -> Tensor:
    y = y * 2
    with torch.no_grad():
        y.relu_()
    return y.sin()


def of_a_chunk(y: Tensor) -> Tensor:
    y = y * 2
    with torch.no_grad():  # torch does not allow it elsewhere
        y.chunk(2, 1)[0].relu_()
    return y.sin()


def never_read(y: Tensor) -> Tensor:
    (y * 2).relu_()
    return y


def after_the_last_read(y: Tensor) -> Tensor:
    z = y * 2
    y = z.sin()
    z.relu_()
    return y


def before_an_assertion(y: Tensor) -> Tensor:
    z = y.view(-1, 2, 4)
    y.relu_()
    return y + z.to(z.dtype).size(1)  # torch asserts the type of z


def of_another_type(y: Tensor) -> Tensor:
    z = y.float()
    z.add_(y)
    return z.double()


def to_a_comparison(y: Tensor) -> Tensor:
    z = y * 2
    z.gt_(0)
    return z


@pytest.mark.parametrize(
    ("between", "left"),
    [
        (lambda y: y.relu_(), []),
        (lambda y: functional.silu(y + 1, inplace=True), []),
        (twice, []),
        (before_a_view, []),
        (never_read, []),
        (after_the_last_read, []),
        (before_an_assertion, []),
        (in_a_region, []),
        (of_a_chunk, ["aten.relu_.default"]),
        (through_a_view, ["aten.relu_.default"]),
        (of_a_result_of_dropout, ["aten.relu_.default"]),
        (of_a_result_of_type_as, ["aten.relu_.default"]),
        (of_a_part, ["aten.relu_.default"]),
        (to_a_slice, ["aten.copy_.default"]),
        (of_another_type, ["aten.add_.Tensor"]),
        (to_a_comparison, ["aten.gt_.Scalar"]),
    ],
)
def test_remaining_writes(between: Callable[[Tensor], Tensor], left: list[str]) -> None:
    assert writes_left(between) == left


class Counting(Model):
    """Writes into the images and into a buffer."""

    def __init__(self) -> None:
        super().__init__(lambda y: y)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, images: Tensor) -> Tensor:
        self.get_buffer("calls").add_(1)
        logits: Tensor = super().forward(images.mul_(2)) * self.get_buffer("calls")
        return logits


def test_images_and_buffers_stay_as_they_are() -> None:
    model = Counting().eval()
    traced = trace(model, INPUT)
    assert not any(is_write(node) for node in traced.graph.nodes)
    assert float(model.get_buffer("calls")) == 0
    images = torch.randn(2, *INPUT)
    before = images.clone()
    logits = [run(traced, model, images) for _ in range(2)]
    assert torch.equal(images, before)
    with torch.no_grad():
        expected = model(images)
    torch.testing.assert_close(logits, [expected, expected])


Step = Callable[[list[Tensor], int, int], None]
"""Changes a list of (B, 8) tensors, or appends to it."""


def write_to_slice(tensors: list[Tensor], i: int, j: int) -> None:
    tensors[i][:, :3] = tensors[j][:, 4:7]


STEPS: list[Step] = [
    lambda tensors, i, j: tensors.append(tensors[i] * 1.5),
    lambda tensors, i, j: tensors.append(tensors[i].view(-1, 2, 4).flatten(1)),
    lambda tensors, i, j: tensors.append(functional.dropout(tensors[i], 0.5, training=False)),
    lambda tensors, i, j: tensors.append(torch.cat([tensors[i][:, :3].sin_(), tensors[j][:, 3:]], 1)),
    lambda tensors, i, j: tensors.__setitem__(j, tensors[i].cos_()),
    lambda tensors, i, j: tensors.append(tensors[i].add_(tensors[j])),
    lambda tensors, i, j: tensors.append(tensors[i].mul_(0.5)),
    write_to_slice,
]


@settings(max_examples=20, deadline=None)
@given(program=st.lists(st.tuples(st.sampled_from(STEPS), st.integers(0, 9), st.integers(0, 9)), max_size=8))
def test_any_program_has_the_logits_of_the_model(program: list[tuple[Step, int, int]]) -> None:
    def between(y: Tensor) -> Tensor:
        tensors = [y * 2]
        for step, i, j in program:
            step(tensors, i % len(tensors), j % len(tensors))
        return torch.stack([(k + 1) * tensor for k, tensor in enumerate(tensors)]).sum(0)

    writes_left(between)
