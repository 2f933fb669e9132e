"""A `MaskedWeight` behaves like weight times mask, but keeps no copy of that product."""

import gc
import weakref
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.nn import functional

from nestify.model import masking
from nestify.model.masking import MaskedWeight, masked_weight

USES: dict[str, tuple[tuple[int, ...], tuple[int, ...], Callable[[Tensor, Tensor], Tensor]]] = {
    "linear": ((6, 5), (3, 5), functional.linear),
    "matmul of a transpose": ((6, 5), (3, 5), lambda x, w: x @ w.t()),
    "convolution": ((6, 4, 3, 3), (2, 4, 8, 8), functional.conv2d),
    "standardised weight": (
        (6, 4, 3, 3),
        (2, 4, 8, 8),
        lambda x, w: functional.conv2d(x, (w - w.mean((1, 2, 3), keepdim=True)) / w.std()),
    ),
    "convolution of a graph": (
        (6, 4, 3, 3),
        (2, 4, 8, 8),
        torch.ops.aten.conv2d.default,
    ),
    "a gradient that two weights share": ((3, 5), (3, 5), lambda x, w: x * 2 + w),
    "two uses": ((5, 5), (3, 5), lambda x, w: functional.linear(functional.linear(x, w), w)),
}


@pytest.mark.parametrize("use", USES)
def test_value_and_gradients_equal_those_of_the_product(use: str) -> None:
    shape, input_shape, operate = USES[use]
    weight = torch.randn(shape, requires_grad=True)
    images = torch.randn(input_shape, requires_grad=True)
    entry = torch.randint(1, 4, shape, dtype=torch.uint8)
    plain = weight.detach().clone().requires_grad_()
    expected = operate(images, torch.where(entry <= 2, plain, torch.tensor(0.0)))
    expected_images, expected_weight = torch.autograd.grad(expected.square().sum(), (images, plain))

    result = operate(images, MaskedWeight(weight, entry, 2))
    assert type(result) is Tensor
    torch.testing.assert_close(result, expected)
    ours_images, ours_weight = torch.autograd.grad(result.square().sum(), (images, weight))
    torch.testing.assert_close(ours_images, expected_images, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(ours_weight, expected_weight, rtol=1e-4, atol=1e-4)
    assert torch.all(ours_weight[entry > 2] == 0)


def test_gradient_of_the_mask_passes_gradcheck() -> None:
    weight = torch.randn(4, 3, dtype=torch.float64, requires_grad=True)
    entry = torch.randint(1, 4, (4, 3), dtype=torch.uint8)
    assert torch.autograd.gradcheck(lambda w: masked_weight(w, entry, 2).square(), (weight,))


@pytest.mark.parametrize("layout", [torch.contiguous_format, torch.channels_last])
def test_gradients_of_large_weights_are_masked_piece_by_piece(
    layout: torch.memory_format, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(masking, "_PIECE", 100)
    weight = torch.randn(7, 4, 3, 3).to(memory_format=layout).requires_grad_()
    entry = torch.randint(1, 4, weight.shape, dtype=torch.uint8)
    images = torch.randn(2, 4, 8, 8).to(memory_format=layout)
    plain = weight.detach().clone().requires_grad_()
    functional.conv2d(images, plain * (entry <= 2)).square().sum().backward()
    functional.conv2d(images, MaskedWeight(weight, entry, 2)).square().sum().backward()
    assert weight.grad is not None
    assert plain.grad is not None
    torch.testing.assert_close(weight.grad, plain.grad)


def test_shape_and_type_are_those_of_the_weight() -> None:
    masked = MaskedWeight(torch.randn(4, 3, dtype=torch.float16), torch.ones(4, 3, dtype=torch.uint8), 1)
    assert (masked.shape, masked.dtype, masked.ndim) == ((4, 3), torch.float16, 2)


def test_products_are_freed_before_the_backward() -> None:
    """The product is computed in the forward pass and again in the backward pass, and freed in between."""
    products: list[weakref.ref[Any]] = []

    class Watched(MaskedWeight):
        def product(self, in_place: bool = False) -> Tensor:
            product = super().product(in_place)
            products.append(weakref.ref(product.untyped_storage()))
            return product

    weight = torch.randn(64, 64, requires_grad=True)
    images = torch.randn(2, 64, requires_grad=True)
    result = functional.linear(images, Watched(weight, torch.ones(64, 64, dtype=torch.uint8), 1))
    assert len(products) == 1
    gc.collect()
    assert products[0]() is None
    result.sum().backward()
    assert len(products) == 2
    assert weight.grad is not None
    torch.testing.assert_close(weight.grad, images.detach().sum(0).expand(64, 64))
