"""The rules agree with the operators, run on tensors with 1 for a kept element and 0 for a dropped one."""

from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from nestify.model.graph.analysis import RULE_FILES
from nestify.model.graph.labels import ChannelLabels, Shape
from nestify.model.graph.operators import RULES, Call, Coupling, operator_name
from tests.model.graph.masks import Mask, mask_of, new_labels, some_kept

assert RULE_FILES  # importing them fills the table of rules

aten = torch.ops.aten
IMAGES = (2, 8, 4, 4)
INDEX = torch.tensor([3, 0, 0])

LAYOUTS: list[tuple[Any, Shape, tuple[Any, ...]]] = [
    (aten.permute.default, IMAGES, ([0, 3, 1, 2],)),
    (aten.permute.default, (6, 4), ([-1, 0],)),
    (aten.transpose.int, IMAGES, (1, -1)),
    (aten.t.default, (6, 4), ()),
    (aten.view.default, IMAGES, ([2, 2, 4, 16],)),
    (aten.view.default, (6, 4), ([2, 3, 4],)),
    (aten.reshape.default, IMAGES, ([2, 32, 4],)),
    (aten.reshape.default, (6, 4), ([3, 8],)),
    (aten.flatten.using_ints, IMAGES, (1,)),
    (aten.unflatten.int, IMAGES, (1, [4, 2])),
    (aten.unsqueeze.default, IMAGES, (1,)),
    (aten.squeeze.dim, (1, 6, 4), (0,)),
    (aten.slice.Tensor, IMAGES, (1, 2, 5)),
    (aten.slice.Tensor, (6, 4), (-1, -3, 9223372036854775807)),
    (aten.slice.Tensor, IMAGES, (1, 0, 6, 2)),
    (aten.slice.Tensor, IMAGES, (1, 2, 3)),
    (aten.narrow.default, IMAGES, (1, 1, 3)),
    (aten.select.int, IMAGES, (1, 2)),
    (aten.unbind.int, IMAGES, (1,)),
    (aten.split.Tensor, IMAGES, (3, 1)),
    (aten.split_with_sizes.default, IMAGES, ([1, 5, 2], 1)),
    (aten.chunk.default, IMAGES, (2, 1)),
    (aten.flip.default, IMAGES, ([1],)),
    (aten.roll.default, IMAGES, ([1], [1])),
    (aten.cumsum.default, IMAGES, (1,)),
    (aten.repeat.default, IMAGES, ([1, 3, 1, 1],)),
    (aten.repeat.default, (1, 6, 4), ([2, 3, 1],)),
    (aten.repeat_interleave.self_int, IMAGES, (2, 1)),
    (aten.repeat_interleave.self_int, (1, 6, 4), (2, 0)),
    (aten.expand.default, (8, 4, 4), ([5, 2, 8, 4, 4],)),
    (aten.expand.default, (1, 6, 4), ([3, -1, -1],)),
    (aten.amax.default, IMAGES, ([1],)),
    (aten.amax.default, IMAGES, ([0, 1], True)),
    (aten.clone.default, IMAGES, ()),
    (aten.index.Tensor, IMAGES, ([None, INDEX],)),
    (aten.index.Tensor, IMAGES, ([None, INDEX, None, INDEX],)),
    (aten.index_select.default, IMAGES, (1, INDEX)),
    (aten.unfold.default, (6, 4), (0, 2, 1)),
    (aten.pixel_shuffle.default, IMAGES, (2,)),
    (aten.pixel_unshuffle.default, IMAGES, (2,)),
    (aten.im2col.default, IMAGES, ([2, 2], [1, 1], [0, 0], [1, 1])),
    (aten.max_pool2d.default, IMAGES, ([2, 2],)),
    (aten.avg_pool2d.default, IMAGES, ([2, 2],)),
    (aten.upsample_nearest2d.default, IMAGES, ([8, 8],)),
]


def apply_rule(
    coupling: Coupling, target: Any, arguments: tuple[Any, ...], results: Any
) -> list[ChannelLabels]:
    """Return the labels of an operator's results; tensors among the arguments have no channels."""
    names = [argument.name for argument in target._schema.arguments]
    given = dict(zip(names, map(_as_labels, arguments), strict=False))
    shapes = tuple(tuple(result.shape) for result in _as_list(results))
    name = operator_name(target)
    return _as_list(RULES[name](coupling, Call(name, given, shapes, (True,) * len(shapes))))


def _as_labels(argument: Any) -> Any:
    if isinstance(argument, list):
        return [_as_labels(item) for item in argument]
    return ChannelLabels(tuple(argument.shape)) if isinstance(argument, Tensor) else argument


def _as_list(value: Any) -> list[Any]:
    return list(value) if isinstance(value, list | tuple) else [value]


def as_tensor(mask: Mask) -> Tensor:
    return torch.from_numpy(mask).double()


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("target", "shape", "arguments"), LAYOUTS, ids=lambda value: str(value)[:40])
def test_elements_move_as_the_operator_moves_them(
    target: Any, shape: Shape, arguments: tuple[Any, ...], joint: bool
) -> None:
    coupling = Coupling()
    labels = new_labels(coupling, shape, set(range(len(shape))), joint)
    own = len(coupling.sets)
    found = apply_rule(coupling, target, (labels, *arguments), target(torch.ones(shape), *arguments))
    for seed in range(6):
        kept = some_kept(coupling, seed)
        kept[own:] = True  # nodes of copies of one index, which may be dropped as well
        mask = mask_of(coupling, labels, kept)
        expected = _as_list(target(as_tensor(mask), *arguments))
        for part, value in zip(found, expected if mask.any() else found[:0], strict=mask.any()):
            assert np.array_equal(mask_of(coupling, part, kept), value.numpy() > 0)


@pytest.mark.parametrize(
    ("target", "pads"),
    [
        (aten.constant_pad_nd.default, [0, 0, 1, 2]),
        (aten.constant_pad_nd.default, [2, 1, 0, 0, 3, 0]),
        (aten.pad.default, [0, 0, 0, 0, 1, 2]),
    ],
)
def test_padding_adds_new_channels(target: Any, pads: list[int]) -> None:
    coupling = Coupling()
    labels = new_labels(coupling, IMAGES, {0, 1, 2, 3}, joint=False)
    own = len(coupling.sets)
    (found,) = apply_rule(coupling, target, (labels, pads), target(torch.ones(IMAGES), pads))
    for seed in range(4):
        kept = some_kept(coupling, seed)
        kept[own:] = False
        expected = target(as_tensor(mask_of(coupling, labels, kept)), pads)
        assert np.array_equal(mask_of(coupling, found, kept), expected.numpy() > 0)
    assert len(coupling.sets) == own + sum(pads)


PRODUCTS: list[tuple[Any, Shape, Shape, tuple[int, int]]] = [
    (aten.matmul.default, (6, 4), (4, 5), (1, 0)),
    (aten.matmul.default, (2, 3, 6, 4), (2, 3, 4, 5), (3, 2)),
    (aten.matmul.default, (2, 3, 6, 4), (3, 4, 5), (3, 1)),
    (aten.matmul.default, (2, 1, 6, 4), (1, 3, 4, 5), (3, 2)),
    (aten.bmm.default, (3, 6, 4), (3, 4, 5), (2, 1)),
    (aten.linear.default, (2, 6, 4), (5, 4), (2, 1)),
    (aten.linear.default, (6, 4), (5, 4), (1, 1)),
]
"""Operator, the shapes of its two operands, and the dimension of each that is summed over."""


@pytest.mark.parametrize("joint", [False, True])
@pytest.mark.parametrize(("target", "left", "right", "summed"), PRODUCTS, ids=lambda value: str(value)[:30])
def test_products(target: Any, left: Shape, right: Shape, summed: tuple[int, int], joint: bool) -> None:
    """Both operands keep the same summed indices, and the product keeps their other indices."""
    coupling = Coupling()
    operands = [new_labels(coupling, shape, set(range(len(shape))), joint) for shape in (left, right)]
    result = target(torch.ones(left), torch.ones(right))
    (found,) = apply_rule(coupling, target, tuple(operands), result)
    for seed in range(6):
        kept = some_kept(coupling, seed)
        masks = [mask_of(coupling, operand, kept) for operand in operands]
        if all(mask.any() for mask in masks):
            sides = [
                np.moveaxis(m, d, 0).reshape(m.shape[d], -1).any(1)
                for m, d in zip(masks, summed, strict=True)
            ]
            assert np.array_equal(*sides)
            expected = target(*map(as_tensor, masks)).numpy() > 0
            assert np.array_equal(mask_of(coupling, found, kept), expected)


EINSUMS = ["nd,dm->nm", "bhnd,bhmd->bhnm", "bhnm,bhmd->bnhd", "bchw,oc->bohw", "ij,j->i", "bi,bj->bij"]


@pytest.mark.parametrize("equation", EINSUMS)
def test_einsum(equation: str) -> None:
    coupling = Coupling()
    extents = dict(zip("bhnmdcwoij", (2, 3, 4, 5, 6, 3, 2, 4, 3, 5), strict=True))
    inputs = equation.partition("->")[0].split(",")
    operands = [
        new_labels(coupling, tuple(extents[x] for x in letters), set(range(len(letters))), joint=False)
        for letters in inputs
    ]
    result = torch.einsum(equation, *(torch.ones(operand.shape) for operand in operands))
    (found,) = apply_rule(coupling, aten.einsum.default, (equation, operands), result)
    for seed in range(6):
        kept = some_kept(coupling, seed)
        masks = [as_tensor(mask_of(coupling, operand, kept)) for operand in operands]
        if all(bool(mask.any()) for mask in masks):
            expected = torch.einsum(equation, *masks).numpy() > 0
            assert np.array_equal(mask_of(coupling, found, kept), expected)


@pytest.mark.parametrize("dim", [0, 1, -1])
def test_cat_and_stack(dim: int) -> None:
    coupling = Coupling()
    shapes = [(4, 3, 2), (4, 3, 2)]
    for target in (aten.cat.default, aten.stack.default):
        parts = [new_labels(coupling, shape, {0, 1, 2}, joint=False) for shape in shapes]
        (found,) = apply_rule(coupling, target, (parts, dim), target([torch.ones(s) for s in shapes], dim))
        for seed in range(6):
            kept = some_kept(coupling, seed)
            masks = [as_tensor(mask_of(coupling, part, kept)) for part in parts]
            if all(bool(mask.any()) for mask in masks):
                assert np.array_equal(mask_of(coupling, found, kept), target(masks, dim).numpy() > 0)


@pytest.mark.parametrize("target", [aten.im2col.default, aten.pixel_shuffle.default, aten.conv2d.default])
def test_images_without_a_batch_dimension_are_refused(target: Any) -> None:
    coupling = Coupling()
    labels, weight = (new_labels(coupling, s, {0}, joint=False) for s in ((4, 6, 6), (2, 4, 1, 1)))
    arguments = {"self": labels, "input": labels, "weight": weight}
    with pytest.raises(ValueError, match="3 dimensions and not 4"):
        RULES[operator_name(target)](coupling, Call(operator_name(target), arguments, ((2, 6, 6),), (True,)))
