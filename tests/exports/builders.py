"""Models, levels, facts and targets that are in no nested file."""

from collections.abc import Collection, Sequence
from copy import deepcopy
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import timm
import torch
from torch import nn

from nestify.exports.target import ExportFacts, ExportFormat, Target
from nestify.model.graph.axes import take_indices
from nestify.model.graph.block_map import map_blocks
from nestify.model.graph.channel_map import ChannelMap, map_channels
from nestify.model.spec import describe_model, state_tensors

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
    """A file or folder `model` with the suffix of the format."""
    chosen = ExportFormat(format)
    return Target(folder / f"model{chosen.suffix}", chosen, folder=chosen.is_folder)


def installed_formats() -> list[ExportFormat]:
    """The formats whose packages are installed here."""
    packages = {"openvino": "openvino", "coreml": "coremltools", "executorch": "executorch"}
    return [format for format in ExportFormat if format not in packages or find_spec(packages[format])]


def alive(name: str, **kwargs: Any) -> nn.Module:
    """A timm model in eval mode in which no tensor is constant."""
    model: nn.Module = timm.create_model(name, **{"num_classes": 10, **kwargs}).eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def half(model: nn.Module, side: int, skipped: Collection[str] = ()) -> nn.Module:
    """The level that has the first half of every group's units, and lacks some blocks."""
    channels = map_channels(model, (3, side, side))
    return _level(model, channels, [max(1, group.units // 2) for group in channels.groups], skipped)


def shallow(model: nn.Module, side: int, skipped: Collection[str]) -> nn.Module:
    """The level that has all channels, and lacks some blocks."""
    channels = map_channels(model, (3, side, side))
    return _level(model, channels, [group.units for group in channels.groups], skipped)


def _level(
    model: nn.Module, channels: ChannelMap, counts: Sequence[int], skipped: Collection[str]
) -> nn.Module:
    axes, tensors = channels.axes([np.arange(count) for count in counts]), state_tensors(model)
    replacements = map_blocks(channels).replacements(skipped) if skipped else {}
    level = channels.skeleton(axes, training=False, device=torch.device("cpu"), replacements=replacements)
    own = {
        name: take_indices(tensors[name], axes.get(name, {})).detach().clone() for name in level.state_dict()
    }
    level.load_state_dict(own, assign=True)
    return level.eval()


def without(model: nn.Module, *blocks: str) -> nn.Module:
    """The model without some modules of its sequences; the others keep their names."""
    shorter = deepcopy(model)
    for name in blocks:
        sequence, _, place = name.rpartition(".")
        del shorter.get_submodule(sequence)._modules[place]
    return shorter


def _as_json(value: Any) -> Any:
    return list(value) if isinstance(value, tuple) else value
