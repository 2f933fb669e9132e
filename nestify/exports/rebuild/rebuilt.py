"""A narrower or shallower level as a model that timm's own constructor builds."""

from collections.abc import Mapping
from dataclasses import dataclass
from itertools import zip_longest
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestify.exports.draft import quiet
from nestify.exports.rebuild.arguments import Arguments, constructor_arguments, without_weights
from nestify.exports.rebuild.names import Shapes, Wanted, shapes_of
from nestify.exports.rebuild.search import Search
from nestify.model.feature_maps import as_list
from nestify.model.spec import build_model, state_tensors

TOLERANCE = 1e-3
"""Largest difference of logits with random weights, relative to their change between images; float32."""


@dataclass(frozen=True)
class Rebuilt:
    """A level as a model that timm builds.

    Attributes:
        model: the model with the level's tensors, in eval mode on the CPU.
        kwargs: arguments for `timm.create_model(architecture, **kwargs)`.
    """

    model: nn.Module
    kwargs: Arguments


def rebuild(
    network: nn.Module, architecture: str, kwargs: Mapping[str, Any], input_size: tuple[int, int, int]
) -> Rebuilt | str:
    """Search for arguments with which timm builds a level, and build it.

    Arguments are tried one by one, and kept if they bring the shapes of the network nearer to those of the
    level. It is accepted if all shapes are the same, and so are the logits for random weights.

    Args:
        network: the level, in eval mode on the CPU; its tensors have the names of the full model.
        architecture: name of the timm model.
        kwargs: arguments of the full model.
        input_size: (channels, height, width) of its images, in pixels.

    Returns:
        The model, or the reason why there is none.

    Raises:
        UnsupportedModelError: if timm cannot build the full model.
    """
    full = shapes_of(without_weights(architecture, kwargs))
    start = constructor_arguments(architecture, kwargs)
    wanted = Wanted(full, shapes_of(network))

    def needed(arguments: Arguments) -> Arguments:
        return {**kwargs, **{key: value for key, value in arguments.items() if value != start[key]}}

    def build(arguments: Arguments) -> Shapes | None:
        try:
            return shapes_of(without_weights(architecture, needed(arguments)))
        except Exception:  # any exception of a constructor means that it does not accept such arguments
            return None

    search = Search(start, wanted, build)
    if obstacle := search.run():
        return obstacle
    probe = _probe(network, input_size)
    reason = ""
    for arguments in search.variants():
        if build(arguments) is None:
            continue
        with quiet():
            model = build_model(architecture, needed(arguments))
        names = wanted.names(state_tensors(model))
        difference = _difference(model, names, wanted.level, probe)
        if difference is None:
            _fill(model, names, state_tensors(network))
            return Rebuilt(model, needed(arguments))
        reason = reason or difference
    return reason


@dataclass(frozen=True)
class _Probe:
    """Images (2, C, H, W), and what a level returns for them with random weights, such as its logits."""

    tensors: Mapping[str, Tensor]
    images: Tensor
    outputs: list[Tensor]


@torch.no_grad()
def _probe(network: nn.Module, input_size: tuple[int, int, int]) -> _Probe:
    tensors = _random_weights(state_tensors(network))
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    return _Probe(tensors, images, as_list(functional_call(network, tensors, (images,))))


@torch.no_grad()
def _difference(model: nn.Module, names: Mapping[str, str], level: Shapes, probe: _Probe) -> str | None:
    """Describe how a model differs from a level, or return None; fills the model, in eval mode."""
    for name, _ in model.named_parameters():
        if name not in names:
            return f"it has {name!r} besides"
    found = {names[name]: shape for name, shape in shapes_of(model).items() if name in names}
    if found == level:
        _fill(model, names, probe.tensors)
        try:
            with quiet():
                outputs = as_list(model(probe.images))
        except RuntimeError:  # for example, a number of heads that does not divide the width
            outputs = []
        pairs = list(zip_longest(outputs, probe.outputs))
        if all(ours is not None and theirs is not None and _is_same(ours, theirs) for ours, theirs in pairs):
            return None
    return "its network of the same shapes computes something else"


def _is_same(found: Tensor, expected: Tensor) -> bool:
    if found.shape != expected.shape:
        return False
    spread = (expected[0] - expected[1]).abs().max()
    return bool((found - expected).abs().max() < TOLERANCE * spread)


@torch.no_grad()
def _fill(model: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Copy a level's tensors; buffers that it lacks, such as batch counts, are left unchanged."""
    own = state_tensors(model)
    for name, its in names.items():
        own[name].copy_(tensors[its])
    model.train().eval()  # some models cache what they computed from the weights


def _random_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Return random tensors of the same shapes, scaled so that every layer affects the logits."""
    generator = torch.Generator().manual_seed(0)
    found = {}
    for name, tensor in tensors.items():
        if name.endswith("running_mean"):
            found[name] = torch.zeros_like(tensor)
        elif name.endswith("running_var"):
            found[name] = torch.ones_like(tensor)
        elif not isinstance(tensor, nn.Parameter):
            found[name] = tensor
        elif tensor.ndim < 2:
            found[name] = torch.rand(tensor.shape, generator=generator) + 0.5
        else:
            found[name] = torch.randn(tensor.shape, generator=generator) / prod(tensor.shape[1:]) ** 0.5
    return found
