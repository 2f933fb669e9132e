"""How close is the size of nested files to their information content?

Prints, for random weights in the shapes of a timm model nested by global magnitude, the data bytes of every
level's prefix divided by a lower bound for any coding of single weights: the bytes of the values, shared and
private, plus the Shannon entropy of the entry levels. The limit is 1.10; the header is shown separately. For
comparison, it prints the size of a level's dense checkpoint in the same type, and the total size of separate
dense checkpoints of this level and all lower levels.

    python tests/benchmarks/file_size.py [MODEL ...]        (default: resnet18 resnet50)
"""

import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import timm
import torch
from rich.console import Console
from rich.table import Table

from nestify.file.manifest import Description, LevelDescription, Metrics, ModelEntry, Preprocessing
from nestify.file.reader import open_nested_file
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState

SIZE_LIMIT = 1.10
MIB = 2**20
SPARSITIES: list[list[float]] = [
    [0.95, 0.8, 0.0],
    [0.95, 0.9, 0.8, 0.6, 0.3, 0.0],
    [0.75, 0.5],
]


def nested_by_magnitude(architecture: str, sparsities: Sequence[float]) -> NestedState:
    """Return random weights in the model's shapes, with maskable matrices and private batch norm."""
    torch.manual_seed(0)
    model = timm.create_model(architecture)
    weights, shared = {}, {}
    batch_norm = {}
    for name, tensor in model.state_dict().items():
        module = model.get_submodule(name.rpartition(".")[0])
        if isinstance(module, torch.nn.modules.batchnorm._BatchNorm):
            batch_norm[name] = tensor
        else:
            shared[name] = tensor
            if tensor.dim() >= 2:
                weights[name] = tensor.abs().flatten().numpy()
    ranked = np.sort(np.concatenate(list(weights.values())))
    thresholds = np.array([ranked[int(s * (ranked.size - 1))] if s else 0.0 for s in sparsities])
    entry = {
        name: torch.from_numpy(
            (1 + (magnitudes[:, None] < thresholds).sum(axis=1)).astype(np.uint8).reshape(shared[name].shape)
        )
        for name, magnitudes in weights.items()
    }
    return NestedState(shared, EntryLevels(len(sparsities), entry), [batch_norm] * len(sparsities))


def describe(architecture: str, sparsities: Sequence[float]) -> Description:
    """Return a description with made-up facts."""
    metrics = Metrics(parameters=0, nonzero_parameters=0, dense_macs=None, effective_macs=None)
    preprocessing = Preprocessing(
        input_size=(3, 224, 224),
        mean=[0.5] * 3,
        std=[0.5] * 3,
        interpolation="bicubic",
        crop_pct=0.95,
        crop_mode="center",
    )
    return Description(
        model=ModelEntry(
            architecture=architecture,
            kwargs={},
            num_classes=1000,
            preprocessing=preprocessing,
            class_names=None,
        ),
        schedule="weight",
        original={},
        recipe={},
        seed=0,
        versions={},
        source_sha256=None,
        levels=[
            LevelDescription(
                name=f"level{level}",
                sparsity=sparsity,
                achieved_sparsity=sparsity,
                pattern="unstructured",
                fingerprint=[],
                metrics=metrics,
                layers=[],
            )
            for level, sparsity in enumerate(sparsities, start=1)
        ],
    )


def entropy_bytes(entry: np.ndarray) -> float:
    """Return the Shannon entropy of a tensor's entry levels, based on their own frequencies, in bytes."""
    counts = np.bincount(entry.reshape(-1))
    counts = counts[counts > 0]
    return float(-(counts * np.log2(counts / entry.size)).sum() / 8)


def bound_bytes(state: NestedState, level: int, dtype: torch.dtype) -> float:
    """Return the bytes of the values and the entropy of the entry levels that a level needs."""
    private = sum(t.numel() * t.element_size() for own in state.private[:level] for t in own.values())
    total = float(private)
    for name, tensor in state.shared.items():
        if name in state.entry:
            entry = state.entry[name].numpy()
            total += np.count_nonzero(entry <= level) * dtype.itemsize
            total += entropy_bytes(np.minimum(entry, level + 1))
        else:
            total += tensor.numel() * dtype.itemsize
    return total


def dense_bytes(state: NestedState, dtype: torch.dtype) -> int:
    """Return the size of a level's dense checkpoint without header; private tensors keep their own type."""
    private = sum(tensor.numel() * tensor.element_size() for tensor in state.private[0].values())
    return private + sum(tensor.numel() * dtype.itemsize for tensor in state.shared.values())


def measure(
    table: Table, folder: Path, architecture: str, sparsities: Sequence[float], dtype: torch.dtype
) -> float:
    """Write one file and add one row per level; return the largest ratio."""
    path = folder / "model"
    state = nested_by_magnitude(architecture, sparsities)
    write_nested_file(path, state, describe(architecture, sparsities), dtype)
    file = open_nested_file(path)
    worst = 0.0
    dense = dense_bytes(state, dtype)
    for level in range(1, file.n_levels + 1):
        bound = bound_bytes(state, level, dtype)
        ratio = file.layout.ends[level - 1] / bound
        worst = max(worst, ratio)
        table.add_row(
            {1: architecture, 2: str(dtype).removeprefix("torch.")}.get(level, ""),
            f"{sparsities[level - 1]:.2f}",
            f"{file.prefix_bytes(level) / MIB:.2f}",
            f"{dense / MIB:.2f}",
            f"{level * dense / MIB:.2f}",
            f"{bound / MIB:.2f}",
            f"{ratio:.4f}",
            f"{file.header_bytes / 1024:.0f}" if level == 1 else "",
            end_section=level == file.n_levels,
        )
    return worst


def main(architectures: Sequence[str]) -> int:
    """Print the table; return 1 if a ratio is above the limit."""
    table = Table(title="Nested file size: data bytes of each level's prefix over the bound")
    table.add_column("model", no_wrap=True)
    for heading in (
        "sparsity",
        "prefix MiB",
        "dense MiB",
        "separate MiB",
        "bound MiB",
        "ratio",
        "header KiB",
        "write s",
        "read s",
    ):
        table.add_column(heading, justify="right", min_width=max(map(len, heading.split())))
    with tempfile.TemporaryDirectory() as folder:
        worst = max(
            measure(table, Path(folder), architecture, sparsities, dtype)
            for architecture in architectures
            for dtype in (torch.float32, torch.float16)
            for sparsities in SPARSITIES
        )
    console = Console(width=110)
    console.print(table)
    console.print(f"largest ratio {worst:.4f}, limit {SIZE_LIMIT:.2f}")
    return int(worst > SIZE_LIMIT)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:] or ["resnet18", "resnet50"]))
