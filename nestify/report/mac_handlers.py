"""What an operator costs in multiply-accumulates (MACs), and which parameter it multiplies with.

One convention for all operators, where fvcore's own handlers mix several:

- MACs are counted for convolutions, linear layers, matrix products (matmul, einsum), attention and recurrent
  layers. Biases are free, and so are the scaling and the softmax inside attention.
- The operators in `NO_MACS` have none: they work element by element, normalise, pool, interpolate, reduce, or
  move data. (fvcore counts some of these: norms, average pooling, upsampling.)
- Any other operator is unknown, and is reported by its name.

Counts are those of dense kernels: a zero that pads the image, is masked in attention, or is a pruned weight
costs as much as any other number.

fvcore calls a handler with the inputs and outputs of one node of the model's jit trace, and adds up the
`Counter` that it returns. The keys of our counters are `Read`s, so the sums come out per parameter.
"""

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from math import prod
from typing import NamedTuple

import torch
from torch.utils.flop_counter import FlopCounterMode

Value = torch._C.Value
Handler = Callable[[list[Value], list[Value]], "Counter[Read]"]
Reader = Callable[[Value], "Read"]


class Read(NamedTuple):
    """What one factor of a product is.

    Attributes:
        parameter: state-dict name of the parameter it is read from; "" if it is computed from the image, or
            is a constant.
        exact: whether it holds the parameter's own values (reshaped, sliced or cast at most), so that a
            pruned weight is a zero factor. False for weight-standardised convolutions, for example.
    """

    parameter: str
    exact: bool


NO_PARAMETER = Read("", exact=False)


def _operators(names: str) -> frozenset[str]:
    return frozenset(f"aten::{name}" for name in names.split())


# The result holds values of the first input, in another arrangement or precision.
_REARRANGING = _operators(
    "chunk clone contiguous detach expand expand_as flatten mT moveaxis movedim narrow numpy_T permute "
    "reshape reshape_as select slice split split_with_sizes squeeze swapaxes swapdims t tensor_split to "
    "transpose type_as unbind unflatten unsqueeze view view_as"
)
_ELEMENT_BY_ELEMENT = _operators(
    "abs add addcdiv addcmul bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min cos "
    "div dropout elu eq erf exp expm1 feature_dropout floor floor_divide fmod ge gelu glu gt hardsigmoid "
    "hardswish hardtanh isfinite isinf isnan le leaky_relu lerp log log1p log_sigmoid logical_and "
    "logical_not logical_or lt masked_fill maximum minimum mish mul nan_to_num ne neg pow prelu "
    "reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin softplus softsign sqrt "
    "square sub tan tanh threshold true_divide where"
)
_NORMS = _operators(
    "batch_norm group_norm instance_norm layer_norm linalg_vector_norm local_response_norm log_softmax "
    "norm rms_norm softmax"
)
_POOLING_AND_INTERPOLATION = _operators(
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d avg_pool1d "
    "avg_pool2d grid_sampler max_pool1d max_pool2d max_pool2d_with_indices upsample_bicubic2d "
    "upsample_bilinear2d upsample_linear1d upsample_nearest1d upsample_nearest2d "
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d"
)
_REDUCTIONS = _operators(
    "all amax amin any argmax argmin argsort cumprod cumsum logsumexp max mean min prod sort std std_mean "
    "sum topk var var_mean"
)
_DATA_MOVEMENT = _operators(
    "Int ScalarImplicit alias arange broadcast_to cat channel_shuffle col2im constant_pad_nd copy "
    "diagonal empty empty_like eye fill flip full full_like gather im2col index index_add index_copy "
    "index_put index_select linspace meshgrid new_empty new_full new_ones new_zeros nonzero one_hot ones "
    "ones_like pad pixel_shuffle pixel_unshuffle repeat repeat_interleave roll rot90 scatter scatter_add "
    "size slice_scatter stack take_along_dim tile tril triu unfold zero zeros zeros_like"
)
_FREE = (
    _ELEMENT_BY_ELEMENT | _NORMS | _POOLING_AND_INTERPOLATION | _REDUCTIONS | _DATA_MOVEMENT | _REARRANGING
)
NO_MACS = _FREE | {f"{operator}_" for operator in _FREE}  # relu_ is relu, in place


def mac_handlers(graph_inputs: Sequence[str]) -> dict[str, Handler]:
    """fvcore handlers by operator name.

    Args:
        graph_inputs: for every input of the traced graph the name of the parameter that it is, "" if none.
    """

    def count(kind: str, inputs: list[Value], outputs: list[Value]) -> Counter[Read]:
        return _FORMULAS[kind](inputs, outputs, partial(_read, graph_inputs))

    return {kind: partial(count, kind) for kind in _FORMULAS}


def _read(graph_inputs: Sequence[str], factor: Value) -> Read:
    """Follow a factor of a product back through the trace, to the parameter that it is made from.

    Stops at the product that computed it, if there is one: what a product returns is no weight.
    """
    exact = True
    while (kind := factor.node().kind()) != "prim::Param":
        tensors = [
            value for value in factor.node().inputs() if value.type().kind() in ("TensorType", "ListType")
        ]
        if kind in _FORMULAS or not tensors:
            return NO_PARAMETER
        exact &= kind in _REARRANGING or kind == "prim::ListUnpack"  # of the list that chunk returns
        factor = tensors[0]
    assert factor.node().outputsSize() == len(graph_inputs), (
        "torch.jit passes a model's tensors in another order"
    )
    name = graph_inputs[factor.offset()]
    return Read(name, exact) if name else NO_PARAMETER


def _shape(value: Value) -> list[int]:
    sizes: list[int] = value.type().sizes()  # type: ignore[attr-defined]
    return sizes


def _convolution(inputs: list[Value], outputs: list[Value], read: Reader) -> Counter[Read]:
    """Every output (every input, if transposed) meets the weights of one channel: weight (a, b, *kernel)."""
    image, weight = inputs[:2]
    transposed = len(inputs) > 7 and inputs[6].toIValue()  # _convolution_mode, with 7 inputs, cannot be
    positions = _shape(image if transposed else outputs[0])
    return Counter({read(weight): prod(positions) * prod(_shape(weight)[1:])})


def _linear(inputs: list[Value], outputs: list[Value], read: Reader) -> Counter[Read]:
    """x (..., in), weight (out, in)."""
    return Counter({read(inputs[1]): prod(_shape(outputs[0])) * _shape(inputs[0])[-1]})


def _product(first: int, inputs: list[Value], outputs: list[Value], read: Reader) -> Counter[Read]:
    """Matrix product of inputs[first] (..., k) and the next one: k MACs for every element of the result."""
    left, right = inputs[first : first + 2]
    return Counter({_exact_read([right, left], read): prod(_shape(outputs[0])) * _shape(left)[-1]})


def _einsum(inputs: list[Value], outputs: list[Value], read: Reader) -> Counter[Read]:
    """torch's own count: contractions are priced as the matrix products that torch makes of them."""
    factors = list(inputs[1].node().inputs())
    with FlopCounterMode(display=False) as flops:
        torch.einsum(
            inputs[0].toIValue(), *(torch.empty(_shape(factor), device="meta") for factor in factors)
        )
    return Counter({_exact_read(factors[::-1], read): flops.get_total_flops() // 2})


def _exact_read(factors: list[Value], read: Reader) -> Read:
    """The first factor that is a parameter as it stands.

    Nothing marks one factor of a matrix product as the weight, so one that merely was computed from a
    parameter, as the activations of learned queries are, is not taken for it.
    """
    return next((found for found in map(read, factors) if found.exact), NO_PARAMETER)


def _attention(inputs: list[Value], outputs: list[Value], read: Reader) -> Counter[Read]:
    """Query (..., heads, l, e), key (..., s, e), value (..., s, v): l * s * (e + v) for every head.

    Queries may share heads of keys and values (grouped queries); each still makes its own products.
    """
    query, key = inputs[:2]
    *batch_heads_l, v = _shape(outputs[0])
    return Counter({NO_PARAMETER: prod(batch_heads_l) * _shape(key)[-2] * (_shape(query)[-1] + v)})


def _recurrent(inputs: list[Value], outputs: list[Value], read: Reader) -> Counter[Read]:
    """LSTM, GRU or RNN, any layers and directions: each weight once for every step of every sequence."""
    steps = prod(_shape(inputs[0])[:-1])
    weights = [value for value in inputs[2].node().inputs() if len(_shape(value)) == 2]  # the others: biases
    macs: Counter[Read] = Counter()
    for weight in weights:
        macs[read(weight)] += steps * prod(_shape(weight))
    return macs


_FORMULAS: Mapping[str, Callable[[list[Value], list[Value], Reader], Counter[Read]]] = {
    "aten::_convolution": _convolution,
    "aten::_convolution_mode": _convolution,
    "aten::linear": _linear,
    "aten::matmul": partial(_product, 0),
    "aten::mm": partial(_product, 0),
    "aten::bmm": partial(_product, 0),
    "aten::mv": partial(_product, 0),
    "aten::dot": partial(_product, 0),
    "aten::addmm": partial(_product, 1),
    "aten::addmv": partial(_product, 1),
    "aten::baddbmm": partial(_product, 1),
    "aten::einsum": _einsum,
    "aten::scaled_dot_product_attention": _attention,
    "aten::lstm": _recurrent,
    "aten::gru": _recurrent,
    "aten::rnn_tanh": _recurrent,
    "aten::rnn_relu": _recurrent,
}
