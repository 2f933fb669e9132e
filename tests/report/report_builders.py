"""Builders of small reports."""

from dataclasses import replace
from typing import Any

from nestify.file.manifest import LayerEntry
from nestify.file.summary import LevelReport, Report

LEVEL = LevelReport(
    level=1,
    name="core",
    sparsity=0.0,
    width=1.0,
    depth=1.0,
    skipped=[],
    pattern="unstructured",
    parameters=1000,
    nonzero_parameters=1000,
    dense_macs=5_000_000,
    effective_macs=5_000_000,
    prefix_bytes=4_000_000,
    top1=70.0,
    top5=90.0,
    loss=1.0,
    images=100,
    top1_before=None,
    classes=10,
    class_set="",
    layers=[],
)


def layer(name: str, kept: int, weights: int = 100) -> LayerEntry:
    return LayerEntry(name=name, weights=weights, kept=kept, dense_macs=1, effective_macs=1)


def report(*levels: dict[str, Any], path: str = "a.nested.safetensors") -> Report:
    """Build a report of levels that are copies of `LEVEL` with the given changes."""
    made = [
        replace(LEVEL, **{"level": number, "name": f"level{number}", **changes})
        for number, changes in enumerate(levels, start=1)
    ]
    return Report(
        path=path,
        architecture="resnet18",
        num_classes=10,
        input_size=(3, 32, 32),
        schedule="weight",
        file_bytes=4_000_000,
        header_bytes=1000,
        original={},
        uncounted={},
        levels=made,
        versions={},
    )
