"""Facts and targets to export models with that are in no nested file."""

from pathlib import Path
from typing import Any

from torch import nn

from nestify.export_formats.facts import ExportFacts
from nestify.export_formats.target import Format, Target
from nestify.model_spec import describe_model

NAMES = [f"class {number}: Käfer, \"quoted\" 'x'" for number in range(10)]


def facts_of(model: nn.Module, side: int | None = None, **changes: Any) -> ExportFacts:
    """What a nested file would say of a timm model with ten classes, for images of `side` pixels."""
    spec = describe_model(model, input_size=(3, side, side) if side else None)
    names = ("input_size", "mean", "std", "interpolation", "crop_pct", "crop_mode")
    preprocessing = {name: _as_json(spec.preprocessing[name]) for name in names}
    facts: dict[str, Any] = {
        "architecture": spec.architecture,
        "kwargs": spec.kwargs,
        "num_classes": spec.num_classes,
        "class_names": NAMES,
        "preprocessing": preprocessing,
        "level": 2,
        "level_name": "laptop",
        "sparsity": 0.5,
        "metrics": {"top1": 81.25, "parameters": 10},
    }
    return ExportFacts(**(facts | changes))


def target_in(folder: Path, format: str) -> Target:
    """A file `model` with the suffix of the format."""
    return Target(folder / f"model{Format(format).suffix}", Format(format))


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
