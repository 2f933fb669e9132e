"""Small timm models in float64, with random tensors instead of zeros and ones, and their channels."""

from collections.abc import Sequence
from copy import deepcopy
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pytest
import timm
import torch
from numpy.typing import NDArray
from torch import Tensor, fx, nn
from torch.func import functional_call

from nestify.model.graph.axes import Axes, Indices, take_indices
from nestify.model.graph.channel_map import ChannelMap, map_channels
from nestify.model.spec import state_tensors

Kept = Sequence[NDArray[np.int64]]

MODELS: dict[str, tuple[int, dict[str, Any]]] = {
    "test_resnet": (64, {}),
    "test_vit": (96, {}),
    "test_efficientnet": (64, {}),
    "test_convnext": (64, {}),
    "mobilenetv3_small_050": (64, {}),
    "swin_tiny_patch4_window7_224": (
        56,
        {"img_size": 56, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4)},
    ),
    "botnet26t_256": (64, {"img_size": 64}),
    "resnext50_32x4d": (64, {"layers": (1, 1, 1, 1)}),
    "densenet121": (64, {"growth_rate": 8, "block_config": (2, 2)}),
    "ghostnet_050": (64, {}),
}
"""Name -> image side in pixels, arguments that make the model small."""

SLOW = ("ghostnet_050", "botnet26t_256", "mobilenetv3_small_050", "resnext50_32x4d")
"""Those whose tests are `long`."""

NAMES = [pytest.param(name, marks=pytest.mark.long if name in SLOW else ()) for name in MODELS]
"""The names as parameters of tests."""


@dataclass(frozen=True)
class Example:
    """A model in evaluation mode with example logits, in float64.

    Attributes:
        model: the model.
        channels: its channels.
        images: three images.
        logits: (3, 10) their logits.
        spread: largest difference between the logits of the first two images, to which errors are relative.
    """

    model: nn.Module
    channels: ChannelMap
    images: Tensor
    logits: Tensor
    spread: float

    def error(self, logits: Tensor) -> float:
        """Return the largest difference to the model's logits, relative to `spread`."""
        return difference(logits, self.logits) / self.spread

    @property
    def unmixed(self) -> list[int]:
        """Numbers of the groups in which dropping a unit is the same as zeroing it."""
        return [k for k, group in enumerate(self.channels.groups) if not group.mixed]


@cache
def example(name: str) -> Example:
    """Make one of `MODELS`, which is shared by all tests, so they must not change it."""
    side, kwargs = MODELS[name]
    model = random_model(name, **kwargs)
    generator = torch.Generator().manual_seed(1)
    images = torch.randn(3, 3, side, side, generator=generator, dtype=torch.float64)
    with torch.no_grad():
        logits = model(images)
    spread = difference(logits[:1], logits[1:2])
    assert spread > 1e-3 * float(logits.abs().max()), "the images make no difference"
    return Example(model, map_channels(model, (3, side, side)), images, logits, spread)


def random_model(name: str, **kwargs: Any) -> nn.Module:
    """Make a timm model with ten classes and random tensors, in float64 and in evaluation mode."""
    model: nn.Module = timm.create_model(name, num_classes=10, **kwargs)
    return randomise(model.double().eval())


@torch.no_grad()
def randomise(model: nn.Module) -> nn.Module:
    """Randomise parameters and statistics so that each element matters and signals keep their size."""
    generator = torch.Generator().manual_seed(0)

    def normal(tensor: Tensor) -> Tensor:
        return torch.randn(tensor.shape, generator=generator, dtype=torch.float64)

    for parameter in model.parameters():
        if not parameter.is_floating_point():
            continue
        if parameter.ndim < 2:
            parameter.copy_(0.7 + 0.2 * normal(parameter))
        elif parameter.shape[0] == 1:  # positions and tokens
            parameter.copy_(0.5 * normal(parameter))
        else:
            parameter.copy_(normal(parameter) * (2 / parameter[0].numel()) ** 0.5)
    for key, buffer in model.named_buffers():
        if key.endswith("running_mean"):
            buffer.copy_(0.1 * normal(buffer))
        elif key.endswith("running_var"):
            buffer.copy_(0.5 + normal(buffer).square())
    return model


def random_units(channels: ChannelMap, seed: int, among: Sequence[int] | None = None) -> Kept:
    """Choose any number of units of the groups in `among` (all by default), and all units of the rest."""
    rng = np.random.default_rng(seed)
    every = range(len(channels.groups)) if among is None else among
    return [
        np.sort(rng.permutation(group.units)[: rng.integers(1, group.units + 1)])
        if k in every
        else np.arange(group.units)
        for k, group in enumerate(channels.groups)
    ]


def half(channels: ChannelMap) -> Kept:
    """Return the first half of every group's units."""
    return [np.arange(group.units // 2) for group in channels.groups]


def cut(channels: ChannelMap, model: nn.Module, axes: Axes) -> dict[str, Tensor]:
    """Return a level's tensors; differentiable."""
    tensors = state_tensors(model)
    return {name: take_indices(tensors[name], axes.get(name, {})) for name in channels.names}


def run_level(channels: ChannelMap, model: nn.Module, kept: Kept, images: Tensor) -> Tensor:
    """Return the logits of the level that keeps some units."""
    axes = channels.axes(kept)
    skeleton = channels.skeleton(axes, training=False, device=images.device)
    logits: Tensor = functional_call(skeleton, cut(channels, model, axes), (images,))
    return logits


@torch.no_grad()
def zero_units(channels: ChannelMap, model: nn.Module, kept: Kept) -> nn.Module:
    """Return a copy of the timm model whose dropped units are 0 in every tensor."""
    model = deepcopy(model)
    tensors = state_tensors(model)
    for group, units in zip(channels.groups, kept, strict=True):
        gone = np.setdiff1d(np.arange(group.units), units)
        for member in group.members:
            if member.name in tensors:
                tensors[member.name].index_fill_(member.dim, torch.tensor(member.indices[gone].ravel()), 0)
    return model


def load_tensors(skeleton: fx.GraphModule, tensors: dict[str, Tensor]) -> fx.GraphModule:
    """Fill a level's network with copies of tensors, and return it."""
    skeleton.load_state_dict({name: tensor.detach().clone() for name, tensor in tensors.items()}, assign=True)
    return skeleton


def difference(first: Tensor, second: Tensor) -> float:
    """Return the largest difference between two tensors of one shape."""
    assert first.shape == second.shape
    return float((first.detach() - second.detach()).abs().max())


def narrow(channels: ChannelMap, kept: Sequence[Indices | None]) -> fx.GraphModule:
    """Return the network without weights that keeps some units of each group, for evaluation on the CPU."""
    return channels.skeleton(channels.axes(kept), training=False, device=torch.device("cpu"))
