"""Count the multiply-accumulates (MACs) of operators, from the shapes of their tensors alone.

One table serves both counters: the one over the jit trace (`schedule.mac_handlers`) and the one over the
graph of ATen operators (`node_macs`). So their sums agree, and neither depends on the kernel that a version
of torch or a device chooses.

- MACs are counted for convolutions, linear layers, matrix products (matmul, einsum), attention and recurrent
  layers. Biases are free, and so are the scaling and the softmax inside attention.
- The operators in `NO_MACS` have none: they work element by element, normalise, pool, interpolate, reduce, or
  move data. (fvcore counts some of these: norms, average pooling, upsampling.)
- Any other operator is unknown, and is reported by its name.

Counts are those of dense kernels: zeros from padding, masked attention and pruned weights cost as much as any
other number.
"""

import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from math import prod
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from nestify.model.graph.operators import example_shape, operator_name
from nestify.model.graph.trace import Traced


@dataclass(frozen=True)
class Product:
    """One product that an operator computes.

    Attributes:
        macs: number of multiply-accumulates.
        factors: the arguments that may be a weight, the most likely first; empty if both are activations.
        has_weight: True if the first factor is the weight by its position; False if a factor is a weight only
            if it is a parameter itself.
    """

    macs: int
    factors: Sequence[Any] = ()
    has_weight: bool = False


Formula = Callable[[Sequence[Any], Any], list[Product]]
"""Returns the products of a call from its arguments, in the order of the operator's schema, and first result.

A formula reads only the `shape` of a tensor.
"""


def _names(names: str) -> frozenset[str]:
    return frozenset(names.split())


REARRANGING = _names(
    "_to_copy alias chunk clone contiguous detach expand expand_as flatten lift_fresh_copy mT moveaxis "
    "movedim narrow numpy_T permute reshape reshape_as select slice split split_with_sizes squeeze "
    "swapaxes swapdims t tensor_split to transpose type_as unbind unflatten unsafe_split unsqueeze view "
    "view_as"
)
"""Operators whose result has the values of the first input, in another arrangement or precision."""
_ELEMENT_BY_ELEMENT = _names(
    "abs add addcdiv addcmul bitwise_and bitwise_not bitwise_or ceil celu clamp clamp_max clamp_min cos "
    "div dropout elu eq erf exp expm1 feature_dropout floor floor_divide fmod ge gelu glu gt hardsigmoid "
    "hardswish hardtanh imag isfinite isinf isnan le leaky_relu lerp log log1p log_sigmoid logical_and "
    "logical_not logical_or lt masked_fill maximum minimum mish mul nan_to_num native_dropout ne neg pow "
    "prelu real reciprocal relu relu6 remainder round rsqrt rsub selu sigmoid sign silu sin softplus "
    "softsign sqrt square sub tan tanh threshold true_divide view_as_complex view_as_real where"
)
_NORMS = _names(
    "_native_batch_norm_legit_no_training _softmax batch_norm group_norm instance_norm layer_norm "
    "linalg_vector_norm local_response_norm log_softmax native_group_norm native_layer_norm norm rms_norm "
    "softmax"
)
_POOLING_AND_INTERPOLATION = _names(
    "_upsample_bicubic2d_aa _upsample_bilinear2d_aa _upsample_nearest_exact2d adaptive_avg_pool1d "
    "adaptive_avg_pool2d adaptive_max_pool1d adaptive_max_pool2d avg_pool1d avg_pool2d grid_sampler "
    "max_pool1d max_pool2d max_pool2d_with_indices upsample_bicubic2d upsample_bilinear2d "
    "upsample_linear1d upsample_nearest1d upsample_nearest2d"
)
_REDUCTIONS = _names(
    "all amax amin any argmax argmin argsort cumprod cumsum logsumexp max mean min prod sort std std_mean "
    "sum topk var var_mean"
)
_DATA_MOVEMENT = _names(
    "Int ScalarImplicit arange broadcast_to cat channel_shuffle col2im constant_pad_nd copy diagonal "
    "empty empty_like eye fill flip full full_like gather getitem im2col index index_add index_copy "
    "index_put index_select linspace meshgrid new_empty new_full new_ones new_zeros nonzero one_hot ones "
    "ones_like pad pixel_shuffle pixel_unshuffle repeat repeat_interleave roll rot90 scalar_tensor "
    "scatter scatter_add size slice_scatter stack sym_size take_along_dim tile tril triu unfold zero "
    "zeros zeros_like"
)
NO_MACS = (
    _ELEMENT_BY_ELEMENT | _NORMS | _POOLING_AND_INTERPOLATION | _REDUCTIONS | _DATA_MOVEMENT | REARRANGING
)
"""Operators without MACs."""


def _convolution(transposed_index: int | None, inputs: Sequence[Any], output: Any) -> list[Product]:
    """Count the weights of one channel for every output (input if transposed): weight (a, b, *kernel)."""
    image, weight = inputs[:2]
    transposed = transposed_index is not None and (transposed_index < 0 or inputs[transposed_index])
    positions = (image if transposed else output).shape
    return [Product(prod(positions) * prod(weight.shape[1:]), (weight,), has_weight=True)]


def _linear(inputs: Sequence[Any], output: Any) -> list[Product]:
    """Count `in` MACs for every element of the result: x (..., in), weight (out, in)."""
    return [Product(prod(output.shape) * inputs[0].shape[-1], (inputs[1],), has_weight=True)]


def _product(first: int, inputs: Sequence[Any], output: Any) -> list[Product]:
    """Count k MACs for every element of the matrix product of inputs[first] (..., k) and the next input."""
    left, right = inputs[first : first + 2]
    return [Product(prod(output.shape) * left.shape[-1], (right, left))]


def _einsum(inputs: Sequence[Any], output: Any) -> list[Product]:
    """Use torch's count, which is that of the matrix products into which torch converts contractions."""
    equation, factors = inputs[:2]
    with FlopCounterMode(display=False) as flops:
        torch.einsum(equation, *(torch.empty(tuple(factor.shape), device="meta") for factor in factors))
    return [Product(flops.get_total_flops() // 2, factors[::-1])]


def _attention(inputs: Sequence[Any], output: Any) -> list[Product]:
    """Count l * s * (e + v) for every head: query (..., heads, l, e), key (..., s, e), value (..., s, v).

    Queries may share heads of keys and values (grouped queries); each query still has its own products.
    """
    query, key = inputs[:2]
    *batch_heads_l, v = output.shape
    return [Product(prod(batch_heads_l) * key.shape[-2] * (query.shape[-1] + v))]


def _recurrent(inputs: Sequence[Any], output: Any) -> list[Product]:
    """Count each weight of an LSTM, GRU or RNN once per step of every sequence; any layers and directions."""
    steps = prod(inputs[0].shape[:-1])
    weights = [weight for weight in inputs[2] if len(weight.shape) == 2]  # the rest are biases
    return [Product(steps * prod(weight.shape), (weight,), has_weight=True) for weight in weights]


FORMULAS: Mapping[str, Formula] = {
    "_convolution": partial(_convolution, 6),
    "_convolution_mode": partial(_convolution, None),
    "convolution": partial(_convolution, 6),
    **{f"conv{n}d": partial(_convolution, None) for n in (1, 2, 3)},
    **{f"conv_transpose{n}d": partial(_convolution, -1) for n in (1, 2, 3)},
    "linear": _linear,
    **dict.fromkeys(("matmul", "mm", "bmm", "mv", "dot"), partial(_product, 0)),
    **dict.fromkeys(("addmm", "addmv", "baddbmm"), partial(_product, 1)),
    "einsum": _einsum,
    "scaled_dot_product_attention": _attention,
    **dict.fromkeys(("lstm", "gru", "rnn_tanh", "rnn_relu"), _recurrent),
}
"""Maps the name of each operator with MACs to its formula."""

_ATTENTION_KERNEL = re.compile("_scaled_dot_product_.*attention.*(?<!_backward)")
"""Matches the device-specific kernels that torch may use instead of `scaled_dot_product_attention`."""


def find_formula(operator: str) -> Formula | None:
    """Return the formula of an operator, named without `aten::`; None if it has no MACs or is unknown."""
    if _ATTENTION_KERNEL.fullmatch(operator):
        return _attention
    return FORMULAS.get(operator)


@dataclass(frozen=True)
class NodeMacs:
    """MACs of the operators of a graph.

    Attributes:
        macs: maps each node with MACs to the MACs of one image.
        unknown: nodes of unknown operators, which are not in `macs`.
    """

    macs: Mapping[fx.Node, int]
    unknown: frozenset[fx.Node]

    @property
    def uncounted(self) -> Mapping[str, int]:
        """Number of calls of each unknown operator, by a name such as `aten::fft_fft2`."""
        return Counter(f"aten::{operator_name(node.target)}" for node in self.unknown)


def node_macs(traced: Traced) -> NodeMacs:
    """Count the MACs of one image at each node of a graph."""
    counter = _Counter(traced.graph)
    with FakeTensorMode(allow_non_fake_inputs=True):
        inputs = [_make_input(traced, node) for node in traced.graph.find_nodes(op="placeholder")]
        counter.run(*inputs, enable_io_processing=False)
    return NodeMacs(counter.macs, frozenset(counter.unknown))


def _make_input(traced: Traced, node: fx.Node) -> Tensor:
    tensor: Tensor = node.meta["val"]
    shape = (1, *tensor.shape[1:]) if node is traced.images else example_shape(tensor)
    return torch.empty(shape, dtype=tensor.dtype, device=tensor.device)


class _Counter(fx.Interpreter):
    def __init__(self, graph: fx.Graph) -> None:
        super().__init__(nn.Module(), graph=graph)
        self.macs: dict[fx.Node, int] = {}
        self.unknown: set[fx.Node] = set()

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        if n.op != "call_function":
            return result
        operator = operator_name(n.target)
        formula = find_formula(operator)
        if formula is not None:
            arguments, _ = self.fetch_args_kwargs_from_env(n)
            output = result if isinstance(result, Tensor) else result[0]
            self.macs[n] = sum(product.macs for product in formula(arguments, output))
        elif isinstance(n.target, torch._ops.OpOverload) and operator not in NO_MACS:
            self.unknown.add(n)
        return result
