"""Size limit: every prefix without its header is at most 1.10 times the values plus the entropy."""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
import torch

from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState
from tests.file.builders import description

SIZE_LIMIT = 1.10


def entropy_bytes(levels: np.ndarray) -> float:
    """Return the Shannon entropy of all entry levels, based on their own frequencies, in bytes."""
    counts = np.unique(levels, return_counts=True)[1]
    share = counts / levels.size
    return float(-(counts * np.log2(share)).sum() / 8)


def write_magnitude_nested(
    path: Path, sparsities: Sequence[float], dtype: torch.dtype
) -> tuple[NestedFile, np.ndarray]:
    """Write a file with one tensor of 200k weights, nested by magnitude; return it and its entry levels."""
    weights = torch.randn(500, 400, generator=torch.Generator().manual_seed(0))
    ranks = (
        weights.abs().flatten().argsort(descending=True).argsort().reshape(weights.shape) / weights.numel()
    )
    bounds = torch.tensor([1 - sparsity for sparsity in sparsities])
    entry = (torch.bucketize(ranks, bounds, right=True) + 1).to(torch.uint8)
    state = NestedState({"w": weights}, EntryLevels(len(sparsities), {"w": entry}), [{} for _ in sparsities])
    write_nested_file(path, state, description(len(sparsities)), dtype)
    return open_nested_file(path), entry.numpy()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    "sparsities",
    [[sparsity] for sparsity in (0, 0.05, 0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.75, 0.8, 0.9, 0.95)]
    + [[0.95, 0.8, 0], [0.95, 0.8, 0.5], [0.9, 0.5], [0.95, 0.9, 0.8, 0.7, 0.5, 0.3, 0.1, 0]],
    ids=str,
)
def test_prefixes_are_within_the_limit(tmp_path: Path, sparsities: list[float], dtype: torch.dtype) -> None:
    file, entry = write_magnitude_nested(tmp_path / "model", sparsities, dtype)
    for level in range(1, file.n_levels + 1):
        bound = np.count_nonzero(entry <= level) * dtype.itemsize
        bound += entropy_bytes(np.minimum(entry, level + 1))
        assert file.layout.ends[level - 1] <= SIZE_LIMIT * bound
    assert file.prefix_bytes(file.n_levels) == (tmp_path / "model").stat().st_size


def test_entropy_of_a_fair_coin() -> None:
    assert entropy_bytes(np.array([1, 2] * 400)) == pytest.approx(100)
    assert entropy_bytes(np.ones(800)) == 0
