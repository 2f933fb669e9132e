"""Rules of operators that move, cut, join or copy indices, and of elementwise operators."""

from typing import Any

import numpy as np

from nestify.model.graph.labels import ChannelLabels, NodeBlock, make_labels
from nestify.model.graph.operators import Call, Coupling, Result, rule

ELEMENTWISE = (
    "add sub rsub mul div pow neg exp log sqrt rsqrt abs reciprocal sin cos erf tanh sigmoid sign floor relu "
    "relu6 gelu silu hardswish hardsigmoid hardtanh leaky_relu elu selu celu mish softplus logsigmoid "
    "hardshrink softshrink clamp clamp_min clamp_max minimum maximum where masked_fill addcmul addcdiv lerp "
    "dropout feature_dropout alpha_dropout bitwise_not logical_not logical_and logical_or eq ne lt le gt ge "
    "isfinite square floor_divide remainder copy nan_to_num fmod"
)
IDENTITY = (
    "contiguous clone detach to type_as alias lift_fresh_copy lift_fresh lift float half double _to_copy "
    "zeros_like ones_like full_like empty_like rand_like randn_like bernoulli positive"
)

RESHAPES = "reshape view flatten unflatten squeeze unsqueeze _unsafe_view view_as reshape_as ravel"


@rule(*ELEMENTWISE.split())
def _elementwise(coupling: Coupling, call: Call) -> Result:
    return coupling.broadcast(call.tensors(), call.shape)


@rule(*IDENTITY.split())
def _identity(coupling: Coupling, call: Call) -> Result:
    return ChannelLabels(call.shape, call.tensors()[0].blocks)


@rule("arange", "meshgrid", "one_hot", "scalar_tensor", "tril", "triu", "linspace", "eye", "tril_indices")
def _positions(coupling: Coupling, call: Call) -> Result:
    for labels in call.tensors():
        coupling.freeze(labels)
    full = tuple(ChannelLabels(shape) for shape in call.shapes)
    return full if call.name == "meshgrid" else full[0]


@rule("zeros", "ones", "full", "empty", "new_zeros", "new_ones", "new_full", "new_empty")
def _constant(coupling: Coupling, call: Call) -> Result:
    return coupling.fresh(call.shape)


@rule("_assert_tensor_metadata", "_assert_scalar", "sym_constrain_range_for_size", "_assert_async")
def _assertion(coupling: Coupling, call: Call) -> Result:
    return None


@rule(*RESHAPES.split())
def _reshape(coupling: Coupling, call: Call) -> Result:
    return coupling.reshape(call["self" if "self" in call.arguments else "input"], call.shape)


@rule("permute", "transpose", "t", "swapaxes", "numpy_T", "mT")
def _permute(coupling: Coupling, call: Call) -> Result:
    x: ChannelLabels = call["self"]
    order = list(range(x.ndim))
    if call.name == "permute":
        order = [dim % x.ndim for dim in call["dims"]]
    else:
        i, j = (call["dim0"], call["dim1"]) if "dim0" in call.arguments else (-2, -1)
        order[i], order[j] = order[j], order[i]
    return x.move_dims(call.shape, order.index)


@rule("expand", "expand_as", "broadcast_to")
def _expand(coupling: Coupling, call: Call) -> Result:
    """Give the copies of a single index new nodes, which are tied to whatever they are combined with."""
    x: ChannelLabels = call["self"]
    shift = len(call.shape) - x.ndim
    old = (1,) * shift + x.shape
    copied = {d: coupling.sets.fresh(n) for d, n in enumerate(call.shape) if n > 1 and old[d] == 1}
    carried = x.move_dims(call.shape, lambda dim: dim + shift)
    return ChannelLabels(call.shape, carried.blocks + make_labels(call.shape, copied).blocks)


@rule("repeat", "tile")
def _repeat(coupling: Coupling, call: Call) -> Result:
    x: ChannelLabels = call["self"]
    times = list(call["repeats" if "repeats" in call.arguments else "dims"])
    times = [1] * (len(call.shape) - len(times)) + times
    shift = len(call.shape) - x.ndim
    x = coupling.tie_along(x, [d for d in range(x.ndim) if times[d + shift] > 1])
    blocks = list(x.move_dims(call.shape, lambda dim: dim + shift).blocks)
    for dim, count in enumerate(times):
        extent = x.shape[dim - shift] if dim >= shift else 1
        if count == 1:
            continue
        if extent == 1:
            blocks.append(NodeBlock((dim,), coupling.sets.fresh(count)))
        for k, block in enumerate(blocks):
            if block.dims == (dim,) and extent > 1:
                blocks[k] = NodeBlock((dim,), np.tile(block.nodes, count))
    return ChannelLabels(call.shape, tuple(blocks))


@rule("repeat_interleave")
def _repeat_interleave(coupling: Coupling, call: Call) -> Result:
    x: ChannelLabels = call["self"]
    if call.get("dim") is None or isinstance(call["repeats"], ChannelLabels):
        coupling.freeze(x)
        return ChannelLabels(call.shape)
    return repeat_each(coupling, x, call["dim"] % x.ndim, call["repeats"])


def repeat_each(coupling: Coupling, x: ChannelLabels, dim: int, times: int) -> ChannelLabels:
    """Repeat every index of a dimension `times` times in a row."""
    shape = tuple(n * times if d == dim else n for d, n in enumerate(x.shape))
    if x.shape[dim] == 1:
        return ChannelLabels(
            shape, (*x.blocks, NodeBlock((dim,), coupling.sets.fresh(times))) if times > 1 else x.blocks
        )
    blocks = (
        NodeBlock(b.dims, b.nodes.repeat(times, b.dims.index(dim))) if dim in b.dims else b for b in x.blocks
    )
    return ChannelLabels(shape, tuple(blocks))


def cut(coupling: Coupling, x: ChannelLabels, dim: int, start: int, stop: int) -> ChannelLabels:
    """Cut a dimension to its indices from start to stop - 1."""
    shape = tuple(stop - start if d == dim else n for d, n in enumerate(x.shape))
    blocks = []
    for block in x.blocks:
        if dim in block.dims:
            assert block.dims == (dim,)
            block = NodeBlock(block.dims, block.nodes[start:stop])
            if stop - start <= 1:
                coupling.sets.freeze(block.nodes)
                continue
        blocks.append(block)
    return ChannelLabels(shape, tuple(blocks))


@rule("slice", "narrow")
def _slice(coupling: Coupling, call: Call) -> Result:
    dim = call.get("dim", 0) % len(call.shape)
    x = coupling.tie_along(coupling.simplify(call["self"]), [dim])
    if not x.is_live(dim):
        return ChannelLabels(call.shape, x.blocks)
    start = call.get("start", 0)
    start = max(start + x.shape[dim], 0) if start < 0 else min(start, x.shape[dim])
    if call.get("step", 1) != 1:
        return ChannelLabels(call.shape, coupling.freeze(x, [dim]).blocks)
    return cut(coupling, x, dim, start, start + call.shape[dim])


@rule("split", "split_with_sizes", "chunk", "tensor_split")
def _split(coupling: Coupling, call: Call) -> Result:
    dim = call.get("dim", 0) % len(call.shape)
    x = coupling.tie_along(coupling.simplify(call["self"]), [dim])
    ends = np.cumsum([shape[dim] for shape in call.shapes]).tolist()
    starts = [0, *ends[:-1]]
    return tuple(cut(coupling, x, dim, start, stop) for start, stop in zip(starts, ends, strict=True))


@rule("glu")
def _glu(coupling: Coupling, call: Call) -> Result:
    dim = call.get("dim", -1) % len(call.shape)
    x, half = coupling.tie_along(coupling.simplify(call["self"]), [dim]), call.shape[dim]
    return coupling.broadcast(
        [cut(coupling, x, dim, 0, half), cut(coupling, x, dim, half, 2 * half)], call.shape
    )


@rule("unbind", "select")
def _select(coupling: Coupling, call: Call) -> Result:
    x: ChannelLabels = coupling.simplify(call["self"])
    dim = call.get("dim", 0) % x.ndim
    x = coupling.freeze(coupling.simplify(coupling.tie_along(x, [dim])), [dim])
    out = x.move_dims(call.shape, lambda d: None if d == dim else d - (d > dim))
    return out if call.name == "select" else (out,) * len(call.shapes)


@rule("cat", "concat", "concatenate")
def _cat(coupling: Coupling, call: Call) -> Result:
    dim = call.get("dim", 0) % len(call.shape)
    parts = [coupling.tie_along(coupling.simplify(part), [dim]) for part in call["tensors"]]
    joined = np.concatenate([part.nodes_of(dim) for part in parts])
    others = []
    for part in parts:
        blocks = tuple(block for block in part.blocks if dim not in block.dims)
        others.append(ChannelLabels(tuple(1 if d == dim else n for d, n in enumerate(part.shape)), blocks))
    rest = coupling.broadcast(others, tuple(1 if d == dim else n for d, n in enumerate(call.shape)))
    return ChannelLabels(call.shape, rest.blocks + make_labels(call.shape, {dim: joined}).blocks)


@rule("stack")
def _stack(coupling: Coupling, call: Call) -> Result:
    dim = call.get("dim", 0) % len(call.shape)
    tied = coupling.broadcast(call["tensors"], call["tensors"][0].shape)
    return tied.move_dims(call.shape, lambda d: d + (d >= dim))


@rule("pad", "constant_pad_nd")
def _pad(coupling: Coupling, call: Call) -> Result:
    """Label padding zeros as new channels; any other padding keeps the dimension in full."""
    x: ChannelLabels = coupling.simplify(call["self"])
    pads: list[Any] = list(call["pad"])
    for k in range(len(pads) // 2):
        dim, (low, high) = x.ndim - 1 - k, pads[2 * k : 2 * k + 2]
        if (low, high) == (0, 0) or not x.is_live(dim):
            continue
        x = coupling.tie_along(x, [dim])
        if call.get("mode", "constant") != "constant" or low < 0 or high < 0:
            x = coupling.freeze(x, [dim])
            continue
        nodes = np.concatenate([coupling.sets.fresh(low), x.nodes_of(dim), coupling.sets.fresh(high)])
        shape = tuple(len(nodes) if d == dim else n for d, n in enumerate(x.shape))
        x = ChannelLabels(shape, (*(b for b in x.blocks if dim not in b.dims), NodeBlock((dim,), nodes)))
    return ChannelLabels(call.shape, x.blocks)


@rule("roll", "flip", "cumsum")
def _roll(coupling: Coupling, call: Call) -> Result:
    """Keep dimensions in full if the result depends on the order of their indices."""
    x: ChannelLabels = call["self"]
    dims = [call["dim"]] if "dim" in call.arguments else call.get("dims", range(x.ndim))
    return ChannelLabels(call.shape, coupling.freeze(coupling.tie_along(x, dims), dims).blocks)


@rule("unfold")
def _unfold(coupling: Coupling, call: Call) -> Result:
    x: ChannelLabels = call["self"]
    dim = call["dimension"] % x.ndim
    return ChannelLabels(call.shape, coupling.freeze(coupling.tie_along(x, [dim]), [dim]).blocks)


@rule("index")
def _index(coupling: Coupling, call: Call) -> Result:
    """Keep dimensions that are indexed by tensors in full."""
    x: ChannelLabels = call["self"]
    places = [dim for dim, index in enumerate(call["indices"]) if index is not None]
    for index in call["indices"]:
        if index is not None:
            coupling.freeze(index)
    x = coupling.freeze(coupling.tie_along(x, places), places)
    grown = len(call.shape) - (x.ndim - len(places))
    adjacent = places == list(range(places[0], places[-1] + 1))
    first = places[0] if adjacent else 0
    rest = [dim for dim in range(x.ndim) if dim not in places]
    new = [k + (grown if k >= first else 0) for k in range(len(rest))]
    return x.move_dims(call.shape, lambda d: new[rest.index(d)] if d in rest else None)


@rule("embedding", "index_select")
def _lookup(coupling: Coupling, call: Call) -> Result:
    table: ChannelLabels = call["weight"] if "weight" in call.arguments else call["self"]
    dim = 0 if "weight" in call.arguments else call["dim"] % table.ndim
    indices: ChannelLabels = call["indices"] if "indices" in call.arguments else call["index"]
    coupling.freeze(indices)
    table = coupling.freeze(coupling.tie_along(table, [dim]), [dim])
    grown = indices.ndim - 1
    return table.move_dims(call.shape, lambda d: None if d == dim else d + (grown if d > dim else 0))
