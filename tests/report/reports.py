"""Made-up reports for tests of tables, charts and pages."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from nestify.file.history import History, LevelScore, TrainingEpoch, ValidationEpoch
from nestify.file.manifest import LayerEntry
from nestify.file.summary import ChunkBytes, ClassSet, LevelReport, Report
from tests.report import report_builders

HOSTILE = "</td><script>alert(1)</script><img src=http://x.test/ onerror='x'>\"]]>-->\u202eevil\x00\x1b[31m\n"
"""Hostile text for fields that may hold any text: markup, ends of attributes, bidi and control characters."""
PRINTABLE = "</td></title><script>alert(1)</script><a href='http://x.test/' b=\"]]>--> &amp; {{ 7 * 7 }}"
"""Hostile text that the reader accepts in names of levels and layers."""


def level(k: int, n: int, names: Sequence[str] = ("conv.weight",), **changes: Any) -> LevelReport:
    """Build level k of n: sparse and evaluated, each layer with k / n of its weights."""
    facts: dict[str, Any] = {
        "level": k,
        "name": f"level{k}",
        "sparsity": 1 - k / n,
        "dense_macs": 10**6 * n,
        "effective_macs": 10**6 * k,
        "prefix_bytes": 2**10 + 2**20 * k,
        "top1": 50.0 + 40 * k / n,
        "top1_before": 10.0 + 40 * k / n,
        "classes": 4,
        "chunk": ChunkBytes(values=2**20 - 300, positions=200, private=60, padding=40),
        "layers": [
            LayerEntry(name=name, weights=100 * n, kept=100 * k, dense_macs=None, effective_macs=None)
            for name in names
        ],
        "tensors": dict.fromkeys(names, 100 * k) | {"bn.bias": 60},
    }
    return replace(report_builders.LEVEL, **(facts | changes))


def report(*levels: LevelReport, **changes: Any) -> Report:
    """Build a report of the given levels, or of two levels if none are given."""
    levels = levels or (level(1, 2), level(2, 2))
    facts: dict[str, Any] = {
        "path": "folder/net.nested.safetensors",
        "num_classes": 4,
        "file_bytes": levels[-1].prefix_bytes,
        "header_bytes": 2**10,
        "original": {"top1": 91.25},
        "levels": list(levels),
        "versions": {"nestify": "0.1.0"},
        "recipe": {"seed": 7, "train": {"lr": 0.5, "opt": "sgd"}, "level": [{"width": 1.0}, {"width": None}]},
        "seed": 7,
        "source_sha256": "ab" * 32,
    }
    return replace(report_builders.report(), **(facts | changes))


def with_classes() -> Report:
    """Build a report whose level 1 predicts two coarser classes, with temperatures and consensus weights."""
    first = level(1, 2, classes=2, class_set="kind", temperature=1.5, consensus=[1.0])
    return report(
        first,
        level(2, 2, temperature=0.5, consensus=[0.25, 0.75]),
        class_names=["maple", "trout", "oak", "carp"],
        hierarchy=[ClassSet("kind", ["tree", "fish"], [0, 1, 0, 1])],
    )


def hostile() -> Report:
    """Build a report in which every text is hostile."""
    names = [f"{PRINTABLE}{index}" for index in range(3)]
    texts: dict[str, Any] = {"class_set": PRINTABLE, "pattern": "2:4", "classes": 2}
    levels = [level(k, 2, names, name=f"{PRINTABLE}{k}", consensus=[0.5] * k, **texts) for k in (1, 2)]
    return report(
        *levels,
        path=f"folder/{HOSTILE}",
        architecture=HOSTILE,
        schedule=HOSTILE,
        uncounted={PRINTABLE: 3},
        versions={PRINTABLE: PRINTABLE},
        class_names=[f"{HOSTILE}{index}" for index in range(4)],
        hierarchy=[ClassSet(PRINTABLE, [HOSTILE, f"{HOSTILE}2"], [0, 1, 0, 1])],
        recipe={HOSTILE: HOSTILE, "a": [{HOSTILE: [HOSTILE]}]},
        source_sha256=HOSTILE,
    )


def large(n: int = 12, layers: int = 400) -> Report:
    """Build a report of many levels with the same dense MACs, and many layers with long names."""
    names = [
        f"stages.{index // 9}.blocks.{index}.attention.projection_{index}.weight" for index in range(layers)
    ]
    first = replace(level(1, n, names), top1=None, top1_before=None)
    return report(first, *(level(k, n, names, name=f"a-long-level-name-{k}") for k in range(2, n + 1)))


def history(n: int, epochs: int = 3) -> History:
    """Build the history of a run of n levels; level k has the loss k / epoch and the top-1 50 + k + epoch."""
    numbers = range(1, n + 1)
    return History(
        training=[
            TrainingEpoch(
                event="train",
                epoch=epoch,
                losses=[k / epoch for k in numbers],
                top1=[50.0 + k + epoch for k in numbers],
            )
            for epoch in range(1, epochs + 1)
        ],
        validation=[
            ValidationEpoch(
                event="evaluation",
                moment="before" if epoch == 0 else "after" if epoch == epochs else "epoch",
                epoch=epoch,
                levels=[LevelScore(level=k, top1=40.0 + k + epoch, loss=2.0 + k, images=9) for k in numbers],
            )
            for epoch in range(epochs + 1)
        ],
    )
