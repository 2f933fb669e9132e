"""fvcore handlers that count multiply-accumulates (MACs) per parameter.

What counts as a MAC, and how many an operator does, is defined in `nestify.model.graph.macs`. fvcore's own
handlers mix several conventions.

fvcore calls a handler with the inputs and outputs of one node of the model's jit trace, and adds up the
`Counter`s that handlers return. The keys of our counters are `Read`s, so fvcore sums per parameter.
"""

from collections import Counter
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, NamedTuple

import torch

from nestify.model.graph.macs import FORMULAS, NO_MACS, REARRANGING, Formula, Product

Value = torch._C.Value
Handler = Callable[[list[Value], list[Value]], "Counter[Read]"]


class Read(NamedTuple):
    """The origin of one factor of a product.

    Attributes:
        parameter: state-dict name of the parameter that the factor is made from; "" if it is computed from
            the image, or is a constant.
        exact: whether the factor has the parameter's own values (reshaped, sliced or cast at most), so that
            a pruned weight is a zero factor. False for weight-standardised convolutions, for example.
    """

    parameter: str
    exact: bool


NO_PARAMETER = Read("", exact=False)

FREE_OPERATORS = frozenset(f"aten::{name}{end}" for name in NO_MACS for end in ("", "_"))
"""The operators of a jit trace that have no MACs; `relu_` is the in-place `relu`."""


class _Tensor:
    """A tensor of the trace, with the `shape` that formulas read."""

    def __init__(self, value: Value) -> None:
        self.value = value

    @property
    def shape(self) -> list[int]:
        sizes: list[int] = self.value.type().sizes()  # type: ignore[attr-defined]
        return sizes


def mac_handlers(graph_inputs: Sequence[str]) -> dict[str, Handler]:
    """Return the fvcore handlers by operator name.

    Args:
        graph_inputs: for every input of the traced graph, the name of the parameter that it is; "" if it is
            none.
    """
    return {f"aten::{name}": partial(_count, formula, graph_inputs) for name, formula in FORMULAS.items()}


def _count(
    formula: Formula, graph_inputs: Sequence[str], inputs: list[Value], outputs: list[Value]
) -> Counter[Read]:
    macs: Counter[Read] = Counter()
    for product in formula([_argument(value) for value in inputs], _Tensor(outputs[0])):
        macs[_weight(product, graph_inputs)] += product.macs
    return macs


def _argument(value: Value) -> Any:
    kind = value.type().kind()
    if kind == "TensorType":
        return _Tensor(value)
    if kind == "ListType" and value.node().kind() == "prim::ListConstruct":
        return [_argument(item) for item in value.node().inputs()]
    return value.toIValue()


def _weight(product: Product, graph_inputs: Sequence[str]) -> Read:
    """Return the parameter that a product multiplies with.

    Nothing marks one factor of a matrix product as the weight. A factor that was only computed from a
    parameter, such as the activations of learned queries, does not count as one.
    """
    reads = [_read(graph_inputs, factor.value) for factor in product.factors]
    if product.has_weight:
        return reads[0]
    return next((read for read in reads if read.exact), NO_PARAMETER)


def _read(graph_inputs: Sequence[str], factor: Value) -> Read:
    """Follow a factor of a product back through the trace to the parameter that it is made from.

    There is no such parameter if the factor was computed by another product: a product's result is not a
    weight.
    """
    exact = True
    while (kind := factor.node().kind()) != "prim::Param":
        tensors = [
            value for value in factor.node().inputs() if value.type().kind() in ("TensorType", "ListType")
        ]
        operator = kind.removeprefix("aten::")
        if operator in FORMULAS or not tensors:
            return NO_PARAMETER
        exact &= operator in REARRANGING or kind == "prim::ListUnpack"  # unpacks the list that chunk returns
        factor = tensors[0]
    assert factor.node().outputsSize() == len(graph_inputs), (
        "torch.jit passes a model's tensors in another order"
    )
    name = graph_inputs[factor.offset()]
    return Read(name, exact) if name else NO_PARAMETER
