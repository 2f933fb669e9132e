"""Small nested states and descriptions to write files from."""

from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import reduce
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from nestify.file.manifest import (
    Description,
    LayerEntry,
    LevelDescription,
    Metrics,
    ModelEntry,
    Preprocessing,
)
from nestify.model.entry_levels import EntryLevels, NestedState


def description(n_levels: int, **changes: Any) -> Description:
    """Return a description of `n_levels` levels, with some of its fields replaced."""
    levels = [
        LevelDescription(
            name=f"size-{level}",
            sparsity=1 - level / n_levels,
            achieved_sparsity=1 - level / n_levels,
            pattern="unstructured",
            fingerprint=[0.5, -1.25],
            metrics=Metrics(parameters=10, nonzero_parameters=5, dense_macs=20, effective_macs=None),
            layers=[LayerEntry(name="conv.weight", weights=10, kept=5, dense_macs=20, effective_macs=None)],
        )
        for level in range(1, n_levels + 1)
    ]
    preprocessing = Preprocessing(
        input_size=(3, 32, 32),
        mean=[0.5, 0.5, 0.5],
        std=[0.25, 0.25, 0.25],
        interpolation="bicubic",
        crop_pct=0.875,
        crop_mode="center",
    )
    model = ModelEntry(
        architecture="resnet18.a1_in1k",
        kwargs={"drop_rate": 0.0, "sizes": [1, 2]},
        num_classes=2,
        preprocessing=preprocessing,
        class_names=["Käfer", "cat"],
    )
    facts: dict[str, Any] = {
        "model": model,
        "schedule": "weight",
        "levels": levels,
        "original": {"top1": 81.25},
        "recipe": {"levels": [0.5, 0.0]},
        "seed": 3,
        "versions": {"nestify": "0.1.0"},
        "source_sha256": None,
    }
    return Description(**(facts | changes))


def pseudo_random(shape: Sequence[int], salt: int) -> Tensor:
    """Return pseudo-random numbers in [0, 1) that are the same under every version of every library."""
    index = torch.arange(prod(shape), dtype=torch.int64) + 1000 * salt
    mixed = (index * index * 40503 + index * 2654435761) % 2**32
    return ((mixed >> 8) % 2**16 / 2**16).reshape(tuple(shape))


def entry_levels(shape: Sequence[int], densities: Sequence[float], salt: int) -> Tensor:
    """Return pseudo-random entry levels; densities[k - 1] is the share of weights that level k uses."""
    return (torch.bucketize(pseudo_random(shape, salt), torch.tensor(densities), right=True) + 1).to(
        torch.uint8
    )


def small_state(n_levels: int = 3) -> NestedState:
    """Return a small state with all kinds of tensors.

    It has a conv in 2x1 blocks, a linear whose entry positions are coded as `elias-fano` and `bits`, shared
    and private tensors, and a tied name.
    """
    densities = [0.1 + 0.7 * k / n_levels for k in range(n_levels)]
    blocks = entry_levels((3, 3, 3, 3), densities, salt=1)
    entry = {
        "conv.weight": blocks.repeat_interleave(2, dim=0)[:5].contiguous(),
        "fc.weight": entry_levels((20, 33), densities, salt=3),
    }
    shared = {
        "conv.weight": pseudo_random((5, 3, 3, 3), salt=3) - 0.5,
        "fc.weight": pseudo_random((20, 33), salt=4) - 0.5,
        "fc.bias": pseudo_random((3,), salt=5) - 0.5,
        "index": torch.arange(5),
    }
    private = [
        {
            "bn.running_mean": pseudo_random((5,), salt=5 + level),
            "bn.num_batches_tracked": torch.tensor(level),
        }
        for level in range(1, n_levels + 1)
    ]
    return NestedState(
        shared=shared,
        entry=EntryLevels(n_levels, entry),
        private=private,
        aliases={"tied.weight": "fc.weight"},
        units={"conv.weight": (2, 1)},
    )


def box(shape: Sequence[int], axes: Mapping[int, Tensor]) -> Tensor:
    """Return the lowest level that uses all indices of each element: NumPy's outer maximum of the axes."""
    ones = [np.ones(extent, np.uint8) for extent in shape]
    levels = [axes[dim].numpy() if dim in axes else ones[dim] for dim in range(len(shape))]
    return torch.from_numpy(np.array(reduce(np.maximum.outer, levels, np.uint8(1)), np.uint8))


def axes_state(n_levels: int = 3) -> NestedState:
    """Return a state of narrower and shallower levels, with and without sparsity.

    The attention heads alternate between the levels, and no level uses some of the indices. Level 1 skips the
    module `block`. Private tensors are as wide as their level.
    """

    def rising(extent: int) -> Tensor:
        return torch.tensor([1 + index * n_levels // extent for index in range(extent)], dtype=torch.uint8)

    def alternating(extent: int) -> Tensor:
        return torch.tensor([1 + index // 2 % (n_levels + 1) for index in range(extent)], dtype=torch.uint8)

    later = min(2, n_levels)
    shapes = {"stem.weight": (9, 3, 3, 3), "stem.bias": (9,), "qkv.weight": (24, 9), "table": (4, 1, 24)}
    shapes |= {"block.weight": (45, 9), "block.gamma": (), "head.weight": (5, 9)}
    axes = {
        "stem.weight": {0: rising(9)},
        "stem.bias": {0: rising(9)},
        "qkv.weight": {0: alternating(24), 1: rising(9)},
        "table": {2: alternating(24)},
        "block.weight": {0: torch.full((45,), later, dtype=torch.uint8), 1: rising(9)},
        "head.weight": {1: rising(9)},
    }
    entry = {name: box(shape, axes.get(name, {})) for name, shape in shapes.items()}
    entry["block.gamma"] = torch.tensor(later, dtype=torch.uint8)
    for name, first in (("qkv.weight", 0.5), ("block.weight", 0.05)):
        densities = [first + 0.4 * k / n_levels for k in range(n_levels)]
        entry[name] = torch.maximum(entry[name], entry_levels(shapes[name], densities, salt=8))
    shared = {name: pseudo_random(shape, salt=20) - 0.5 for name, shape in shapes.items()}
    widths = [int((rising(9) <= level).sum()) for level in range(1, n_levels + 1)]
    return NestedState(
        shared=shared | {"head.bias": pseudo_random((5,), salt=21)},
        entry=EntryLevels(n_levels, entry),
        private=[{"bn.running_var": pseudo_random((width,), salt=width)} for width in widths],
        aliases={"tied.weight": "head.weight"},
        axes=axes,
    )


def axes_description(n_levels: int) -> Description:
    """Return a description of levels that differ in width, in depth and in sparsity."""
    plain = description(n_levels, schedule="combined")
    changes = [
        {
            "width": level / n_levels,
            "depth": 1.0 if level > 1 else 0.5,
            "skipped": [] if level > 1 else ["block"],
        }
        for level in range(1, n_levels + 1)
    ]
    levels = [level.model_copy(update=more) for level, more in zip(plain.levels, changes, strict=True)]
    return plain.model_copy(update={"levels": levels})


def at_level(state: NestedState, level: int) -> NestedState:
    """Return the state that a file must give for levels 1 to `level`, computed from the full state."""
    entry = {name: torch.clamp(state.entry[name], max=level + 1) for name in state.entry}
    shared = {
        name: tensor.where(entry[name] <= level, torch.zeros((), dtype=tensor.dtype))
        if name in entry
        else tensor
        for name, tensor in state.shared.items()
    }
    axes = {name: _clamped(axes, level + 1) for name, axes in state.axes.items()}
    return replace(
        state,
        shared=shared,
        entry=EntryLevels(level, entry),
        private=state.private[:level],
        axes={name: levels for name, levels in axes.items() if levels},
    )


def _clamped(axes: Mapping[int, Tensor], highest: int) -> dict[int, Tensor]:
    """Clamp levels to the highest one; drop dimensions whose indices all belong to level 1."""
    return {dim: torch.clamp(axes[dim], max=highest) for dim in sorted(axes) if (axes[dim] > 1).any()}


def assert_same_tensors(found: Mapping[str, Tensor], expected: Mapping[str, Tensor]) -> None:
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype, name
        assert found[name].shape == tensor.shape, name
        assert torch.equal(found[name], tensor), name


def assert_same_state(found: NestedState, expected: NestedState) -> None:
    assert_same_tensors(found.shared, expected.shared)
    assert found.entry.n_levels == expected.entry.n_levels
    assert_same_tensors(found.entry.tensors, expected.entry.tensors)
    assert len(found.private) == len(expected.private)
    for private, expected_private in zip(found.private, expected.private, strict=True):
        assert_same_tensors(private, expected_private)
    assert found.aliases == expected.aliases
    assert found.units == {name: unit for name, unit in expected.units.items() if unit != (1, 1)}
    assert list(found.axes) == [name for name in expected.shared if name in expected.axes]
    for name, axes in expected.axes.items():
        assert list(found.axes[name]) == list(axes)
        for dim, levels in axes.items():
            assert torch.equal(found.axes[name][dim], levels), (name, dim)
