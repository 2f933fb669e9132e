"""Rules of operators that contract, normalise, reduce or pool."""

from collections.abc import Sequence

import numpy as np

from nestify.model.graph.labels import ChannelLabels, Shape, make_labels
from nestify.model.graph.operators import Call, Coupling, Result, rule
from nestify.model.graph.rules_shape import repeat_each
from nestify.model.graph.union_find import Nodes

FEW_GROUPS = 8
"""If there are fewer groups than this, each of at least as many channels, all lose the same channels.

Otherwise complete groups are dropped.
"""

SPATIAL = (
    "avg_pool1d avg_pool2d avg_pool3d max_pool1d max_pool2d max_pool3d max_pool2d_with_indices lp_pool2d "
    "adaptive_avg_pool1d adaptive_avg_pool2d adaptive_max_pool2d upsample_linear1d upsample_bilinear2d "
    "upsample_nearest2d upsample_bicubic2d _upsample_bicubic2d_aa _upsample_bilinear2d_aa"
)


def contract(
    coupling: Coupling, operands: Sequence[tuple[ChannelLabels, str]], out: str, shape: Shape
) -> ChannelLabels:
    """Apply an Einstein sum to labels.

    A letter of the output that several operands have is a batch dimension, such as heads. Dimensions that
    share a block with it are tied, so that the complete head is kept or dropped. A letter that is summed over
    ties the operands' channels.

    Args:
        operands: labels of each tensor, and a letter per dimension.
        out: the letters of the result.
        shape: the shape of the result.
    """
    counts = {
        letter: sum(letter in letters for _, letters in operands) for _, ls in operands for letter in ls
    }
    batch = {letter for letter in out if counts.get(letter, 0) > 1}
    tied: list[ChannelLabels] = []
    for labels, letters in operands:
        labels = coupling.simplify(labels)
        heads = {letters.index(letter) for letter in batch if letter in letters}
        inside = [d for b in labels.blocks if not heads.isdisjoint(b.dims) for d in b.dims if d not in heads]
        labels = coupling.tie_along(labels, inside)
        tied.append(coupling.tie_along(labels, [d for d, letter in enumerate(letters) if letter not in out]))
    for letter in counts:
        if letter not in out:
            found = [
                labels.nodes_of(letters.index(letter))
                for labels, letters in zip(tied, (letters for _, letters in operands), strict=True)
                if letter in letters and labels.shape[letters.index(letter)] > 1
            ]
            for nodes in found[1:]:
                coupling.sets.union(found[0], nodes)
    moved = []
    for labels, (_, letters) in zip(tied, operands, strict=True):
        extents = tuple(labels.shape[letters.index(x)] if x in letters else 1 for x in out)
        summed = [d for d, letter in enumerate(letters) if letter not in out]
        kept = ChannelLabels(labels.shape, tuple(b for b in labels.blocks if set(summed).isdisjoint(b.dims)))
        to = {d: out.index(letter) for d, letter in enumerate(letters) if letter in out}
        moved.append(kept.move_dims(extents, to.get))
    return coupling.broadcast(moved, shape)


def _matmul_letters(x: ChannelLabels, y: ChannelLabels) -> tuple[str, str, str]:
    names = "abcdefgh"
    rank = max(x.ndim, y.ndim) - 2
    batch = names[:rank]
    return batch[rank - x.ndim + 2 :] + "nk", batch[rank - y.ndim + 2 :] + "km", batch + "nm"


def matmul(coupling: Coupling, x: ChannelLabels, y: ChannelLabels, shape: Shape) -> ChannelLabels:
    """Apply a product of stacks of matrices to labels; a batch dimension of extent 1 is broadcast."""
    left, right, out = _matmul_letters(x, y)
    left, x = _without_ones(coupling, x, left)
    right, y = _without_ones(coupling, y, right)
    return contract(coupling, [(x, left), (y, right)], out, shape)


def _without_ones(coupling: Coupling, x: ChannelLabels, letters: str) -> tuple[str, ChannelLabels]:
    kept = [d for d in range(x.ndim) if x.shape[d] > 1 or d >= x.ndim - 2]
    return "".join(letters[d] for d in kept), coupling.reshape(x, tuple(x.shape[d] for d in kept))


@rule("matmul", "bmm", "mm")
def _matmul(coupling: Coupling, call: Call) -> Result:
    x, y = call["self"], call["other"] if "other" in call.arguments else call["mat2"]
    if x.ndim < 2 or y.ndim < 2:
        coupling.freeze(x)
        coupling.freeze(y)
        return ChannelLabels(call.shape)
    return matmul(coupling, x, y, call.shape)


@rule("einsum")
def _einsum(coupling: Coupling, call: Call) -> Result:
    inputs, out = call["equation"].replace(" ", "").split("->")
    if "." in inputs:
        for labels in call["tensors"]:
            coupling.freeze(labels)
        return ChannelLabels(call.shape)
    return contract(coupling, list(zip(call["tensors"], inputs.split(","), strict=True)), out, call.shape)


@rule("linear")
def _linear(coupling: Coupling, call: Call) -> Result:
    x: ChannelLabels = call["input"]
    rest = "abcdefg"[: x.ndim - 1]
    coupling.channels += [block.nodes for block in call["weight"].blocks]
    out = contract(coupling, [(x, rest + "i"), (call["weight"], "oi")], rest + "o", call.shape)
    return out if call.get("bias") is None else coupling.broadcast([out, call["bias"]], call.shape)


@rule("scaled_dot_product_attention")
def _attention(coupling: Coupling, call: Call) -> Result:
    q, k, v = call["query"], call["key"], call["value"]
    if call.get("enable_gqa", False) and q.shape[-3] != k.shape[-3]:
        k, v = (repeat_each(coupling, x, x.ndim - 3, q.shape[-3] // x.shape[-3]) for x in (k, v))
    transposed = k.move_dims(
        (*k.shape[:-2], k.shape[-1], k.shape[-2]),
        lambda d: {k.ndim - 1: k.ndim - 2, k.ndim - 2: k.ndim - 1}.get(d, d),
    )
    weights = matmul(coupling, q, transposed, (*call.shape[:-1], k.shape[-2]))
    if call.get("attn_mask") is not None:
        weights = coupling.broadcast([weights, call["attn_mask"]], weights.shape)
    return matmul(coupling, weights, v, call.shape)


def _check_batched(x: ChannelLabels, ndim: int) -> ChannelLabels:
    """Return an input, if it has a batch dimension, so that channels are dimension 1.

    Raises:
        ValueError: if it has none, which torch allows.
    """
    if x.ndim != ndim:
        raise ValueError(f"{x.ndim} dimensions and not {ndim}")
    return x


@rule("conv1d", "conv2d", "conv3d")
def _convolution(coupling: Coupling, call: Call) -> Result:
    w: ChannelLabels = coupling.simplify(call["weight"])
    x = coupling.tie_along(coupling.simplify(_check_batched(call["input"], w.ndim)), [1])
    pointwise = [d for d in range(2, x.ndim) if w.shape[d] == 1 and call.shape[d] == x.shape[d]]
    x = coupling.tie_along(x, pointwise)
    x = coupling.freeze(x, [d for d in range(2, x.ndim) if d not in pointwise])
    w = coupling.freeze(coupling.tie_along(w, range(1, w.ndim)), range(2, w.ndim))
    out, groups = w.nodes_of(0), call.get("groups", 1)
    coupling.channels += [w.nodes_of(0), w.nodes_of(1)]
    _tie_groups(coupling, x.nodes_of(1).reshape(groups, -1), w.nodes_of(1), out.reshape(groups, -1))
    carried = {d: x.nodes_of(d) for d in [0, *pointwise]}
    result = make_labels(call.shape, carried | {1: out})
    if call.get("bias") is None:
        return result
    bias: ChannelLabels = call["bias"]
    return coupling.broadcast(
        [result, coupling.reshape(bias, (*bias.shape, *[1] * (x.ndim - 2)))], call.shape
    )


def _tie_groups(coupling: Coupling, x: Nodes, w: Nodes, out: Nodes) -> None:
    """Tie a convolution's input (groups, i), output (groups, o), and the weight's second dimension (i,)."""
    groups, each = x.shape
    roots = coupling.sets.roots(x)
    if groups == 1 or bool((roots == roots[:1]).all()) or (groups < FEW_GROUPS <= each):
        if each > 1 or groups == 1:
            coupling.sets.union(x, w)
        else:
            coupling.sets.union(x[:1], x)
        coupling.sets.union(out[:1], out)
        return
    coupling.sets.union(x[:, :1], x)
    coupling.sets.union(x[:, :1], out)
    coupling.sets.freeze(w)


@rule("conv_transpose2d", "conv_transpose1d")
def _transposed_convolution(coupling: Coupling, call: Call) -> Result:
    w: ChannelLabels = call["weight"]
    x = coupling.tie_along(coupling.simplify(_check_batched(call["input"], w.ndim)), [1])
    x, w = coupling.freeze(x, range(2, x.ndim)), coupling.freeze(w, range(2, w.ndim))
    groups = call.get("groups", 1)
    coupling.channels += [w.nodes_of(0), w.nodes_of(1)]
    coupling.sets.union(x.nodes_of(1), w.nodes_of(0))
    out = w.nodes_of(1)
    if groups > 1:
        each = x.nodes_of(1).reshape(groups, -1)
        coupling.sets.union(each[:, :1], each)
        coupling.sets.freeze(out)
        out = each[:, 0].repeat(w.shape[1])
    if call.get("bias") is not None:
        coupling.sets.union(out, call["bias"].nodes_of(0))
    return make_labels(call.shape, {0: x.nodes_of(0), 1: out})


@rule("batch_norm", "instance_norm")
def _batch_norm(coupling: Coupling, call: Call) -> Result:
    x: ChannelLabels = coupling.tie_along(coupling.simplify(call["input"]), [1])
    for name in ("weight", "bias", "running_mean", "running_var"):
        vector = call.get(name)
        if vector is not None:
            x = coupling.broadcast(
                [x, coupling.reshape(vector, (*vector.shape, *[1] * (x.ndim - 2)))], x.shape
            )
    if call.get("training", call.get("use_input_stats", False)):  # a standardised weight
        x = coupling.tie_along(x, range(2, x.ndim))
        coupling.mix(x, [0, *range(2, x.ndim)], call.name)
    return x


@rule("layer_norm", "rms_norm")
def _layer_norm(coupling: Coupling, call: Call) -> Result:
    x: ChannelLabels = coupling.simplify(call["input"])
    dims = range(x.ndim - len(call["normalized_shape"]), x.ndim)
    x = coupling.tie_along(x, dims)
    coupling.mix(x, dims, call.name)
    vectors = [call[name] for name in ("weight", "bias") if call.get(name) is not None]
    return coupling.broadcast([x, *vectors], call.shape)


@rule("group_norm")
def _group_norm(coupling: Coupling, call: Call) -> Result:
    x: ChannelLabels = coupling.tie_along(coupling.simplify(call["input"]), [1])
    grouped = x.nodes_of(1).reshape(call["num_groups"], -1)
    groups, each = grouped.shape
    if groups < FEW_GROUPS <= each:  # drop the same channels of every group
        coupling.sets.union(grouped[:1], grouped)
        coupling.mix(x, [1], call.name)
    else:  # drop complete groups
        coupling.sets.union(grouped[:, :1], grouped)
    for name in ("weight", "bias"):
        if call.get(name) is not None:
            coupling.sets.union(x.nodes_of(1), call[name].nodes_of(0))
    return x


@rule("softmax", "log_softmax", "_softmax")
def _softmax(coupling: Coupling, call: Call) -> Result:
    x = coupling.tie_along(coupling.simplify(call["self"]), [call["dim"]])
    coupling.mix(x, [call["dim"] % x.ndim], call.name)
    return x


@rule("mean", "sum", "amax", "amin", "var", "std", "linalg_vector_norm", "norm", "logsumexp", "any", "all")
def _reduction(coupling: Coupling, call: Call) -> Result:
    x: ChannelLabels = coupling.simplify(call["self"])
    given = call.get("dim")
    dims = [given] if isinstance(given, int) else list(given or range(x.ndim))
    dims = sorted(dim % x.ndim for dim in dims)
    x = coupling.tie_along(x, dims)
    if call.name not in ("sum", "linalg_vector_norm"):  # zeros add nothing to these
        coupling.mix(x, dims, call.name)
    if not call.get("keepdim", False):
        return x.move_dims(call.shape, lambda d: None if d in dims else d - sum(dim < d for dim in dims))
    return x.move_dims(call.shape, lambda d: None if d in dims else d)


@rule("max", "min")
def _max(coupling: Coupling, call: Call) -> Result:
    """Reduce a dimension to its maximum; keep it in full if the index of the maximum is used."""
    if "dim" not in call.arguments:
        coupling.freeze(call["self"])
        return ChannelLabels(call.shape)
    if call.used[1]:
        coupling.freeze(coupling.tie_along(call["self"], [call["dim"]]), [call["dim"]])
    values = _reduction(coupling, call)
    assert isinstance(values, ChannelLabels)
    return values, values


@rule(*SPATIAL.split())
def _spatial(coupling: Coupling, call: Call) -> Result:
    """Keep all pixels in pooling and interpolation; other dimensions keep their labels."""
    x: ChannelLabels = call.tensors()[0]
    spatial = 1 if "1d" in call.name else 3 if "3d" in call.name else 2
    dims = range(x.ndim - spatial, x.ndim)
    x = coupling.freeze(coupling.tie_along(x, dims), dims)
    out = tuple(ChannelLabels(shape, x.blocks) for shape in call.shapes)
    return out if len(out) > 1 else out[0]


@rule("im2col")
def _im2col(coupling: Coupling, call: Call) -> Result:
    x = coupling.freeze(coupling.tie_along(_check_batched(call["self"], 4), [1]), [2, 3])
    taps = call["kernel_size"][0] * call["kernel_size"][1]
    return make_labels(call.shape, {0: x.nodes_of(0), 1: x.nodes_of(1).repeat(taps)})


@rule("pixel_unshuffle")
def _pixel_unshuffle(coupling: Coupling, call: Call) -> Result:
    x = coupling.freeze(coupling.tie_along(_check_batched(call["self"], 4), [1]), [2, 3])
    return make_labels(call.shape, {0: x.nodes_of(0), 1: x.nodes_of(1).repeat(call["downscale_factor"] ** 2)})


@rule("col2im", "pixel_shuffle")
def _columns_to_pixels(coupling: Coupling, call: Call) -> Result:
    """Tie channels that become pixels of one channel."""
    x = _check_batched(call["self"], 3 if call.name == "col2im" else 4)
    x = coupling.freeze(coupling.tie_along(x, [1]), range(2, x.ndim))
    columns = x.nodes_of(1).reshape(call.shape[1], -1)
    coupling.sets.union(columns[:, :1], columns)
    return make_labels(call.shape, {0: x.nodes_of(0), 1: columns[:, 0]})


@rule("lstm")
def _lstm(coupling: Coupling, call: Call) -> Result:
    """Tie the channels of every layer and direction of an LSTM.

    Each has input weights (4 h, i), recurrent weights (4 h, h), and two biases (4 h,).
    """
    x: ChannelLabels = coupling.tie_along(coupling.simplify(call["input"]), [2])
    x = coupling.freeze(x, [0, 1])
    below, params = x.nodes_of(2), list(call["params"])
    directions, biases = 1 + bool(call["bidirectional"]), bool(call["has_biases"])
    states: list[Nodes] = []
    while params:
        outputs = []
        for _ in range(directions):
            inner, recurrent, *vectors = params[: 2 + 2 * biases]
            del params[: 2 + 2 * biases]
            hidden = recurrent.nodes_of(1)
            coupling.channels += [hidden, inner.nodes_of(1)]
            coupling.sets.union(below, inner.nodes_of(1))
            for gates in (inner, recurrent, *vectors):
                coupling.sets.union(hidden[None], gates.nodes_of(0).reshape(4, -1))
            outputs.append(hidden)
        states += outputs
        below = np.concatenate(outputs)
    for nodes in states:  # one tensor holds the states of all directions
        coupling.sets.union(states[0], nodes)
    for state in call["hx"]:
        coupling.sets.union(state.nodes_of(2), states[0])
    features = len(call.shapes[1]) - 1  # versions of torch differ in the dimensions before
    last = make_labels(call.shapes[1], {features: states[0]})
    return make_labels(call.shapes[0], {2: below}), last, last
