"""Whether the tensors of a checkpoint fit a model, and which of them do not."""

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

Weights = Mapping[str, Tensor]


def without_modules(weights: Weights, modules: tuple[str, ...]) -> dict[str, Tensor]:
    """Return the weights that belong to none of the given modules."""
    prefixes = tuple(f"{module}." for module in modules)
    return {key: tensor for key, tensor in weights.items() if not key.startswith(prefixes)}


def inside_wrapper(weights: Weights, layers: Sequence[str]) -> tuple[dict[str, Tensor], str] | None:
    """Return the weights of a model that is a part of another module, and the prefix of their names.

    Args:
        weights: the tensors of the checkpoint, such as `model.conv1.weight` and `criterion.weight`.
        layers: names of layers that the model has at the top, such as its first one.

    Returns:
        The weights without their prefix; None if the model is no part, or not of one module only.
    """
    for layer in layers:
        key = f"{layer}.weight"
        found = {name.removesuffix(key) for name in weights if name.endswith(f".{key}")}
        # Blocks inside the model may have layers of the same name.
        prefixes = [each for each in found if not each.startswith(tuple(found - {each}))]
        if key not in weights and len(prefixes) == 1:
            [prefix] = prefixes
            inner = {name.removeprefix(prefix): t for name, t in weights.items() if name.startswith(prefix)}
            return inner, prefix
    return None


def difference_from(expected: Weights, weights: Weights, new: tuple[str, ...], unknown: bool = True) -> str:
    """Describe which tensors do not fit an architecture; empty if all fit.

    Args:
        expected: the state dict of the model.
        weights: the tensors that it is to load.
        new: modules that load nothing, so that their tensors may be missing or different.
        unknown: whether keys that the model does not have count.
    """
    expected, weights = without_modules(expected, new), without_modules(weights, new)
    # Old files lack the counters of batch norm; torch accepts that, and nothing depends on them.
    missing = [k for k in expected if k not in weights and not k.endswith(".num_batches_tracked")]
    extra = [key for key in weights if key not in expected] if unknown else []
    both = [(key, weights[key], tensor) for key, tensor in expected.items() if key in weights]
    shapes = [f"{k} is {tuple(a.shape)}, not {tuple(b.shape)}" for k, a, b in both if a.shape != b.shape]
    types = [f"{k} is {_type(a)}, not {_type(b)}" for k, a, b in both if not _converts(a, b.dtype)]
    marked = [key for key in extra if _PARAMETRISED.search(key)]
    parts = [
        _summarise("keys are missing", missing),
        _summarise("keys are unknown", extra),
        _summarise("shapes differ", shapes),
        _summarise("types differ", types),
    ]
    if marked:
        parts.append(
            f"{marked[0]} is left over from a parametrised or pruned layer: before saving, call "
            "torch.nn.utils.parametrize.remove_parametrizations, remove_weight_norm, remove_spectral_norm or "
            "prune.remove"
        )
    return "; ".join(part for part in parts if part)


_PARAMETRISED = re.compile(r"(^|\.)parametrizations\.|_(orig|mask|[guv])$")
"""Keys that torch's pruning, weight norm, spectral norm and other parametrisations store."""


def _type(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _converts(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Return whether a tensor keeps its meaning in a type: weights are floats, counters and indices whole."""
    if dtype.is_floating_point or dtype.is_complex:
        return tensor.is_floating_point() or tensor.dtype == dtype
    return torch.equal(tensor.to(dtype).to(tensor.dtype), tensor)


def _summarise(problem: str, items: list[str]) -> str:
    """Return the number of items, the problem and the first items in one phrase; empty for no items."""
    if not items:
        return ""
    more = ", ..." if len(items) > 3 else ""
    return f"{len(items)} {problem} ({', '.join(items[:3])}{more})"
