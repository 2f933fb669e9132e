"""A narrower or shallower level as a model that timm's own constructor builds."""

from collections.abc import Mapping
from dataclasses import dataclass
from math import prod
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestify.exports.draft import quiet
from nestify.exports.rebuild.arguments import Arguments, constructor_arguments, without_weights
from nestify.exports.rebuild.names import Shapes, Wanted, shapes_of
from nestify.exports.rebuild.search import Search
from nestify.model.spec import build_model, state_tensors

TOLERANCE = 1e-3
"""Of the logits with random weights, relative to what other images change in them; float32."""


@dataclass(frozen=True)
class Rebuilt:
    """A level as timm builds it.

    Attributes:
        model: has the level's tensors; in eval mode, on the CPU.
        kwargs: `timm.create_model(architecture, **kwargs)` builds it.
    """

    model: nn.Module
    kwargs: Arguments


def rebuild(
    network: nn.Module, architecture: str, kwargs: Mapping[str, Any], input_size: tuple[int, int, int]
) -> Rebuilt | str:
    """Look for arguments with which timm builds a level, and build it.

    Arguments are tried one by one, and kept where they bring the shapes of the network nearer to those of the
    level. It is taken for the level when all shapes are the same, and the logits for random weights as well.

    Args:
        network: the level, in eval mode on the CPU; its tensors have the names of the full model.
        architecture, kwargs: of the full model.
        input_size: (channels, height, width) of its images, in pixels.

    Returns:
        the model, or why there is none.

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
        except Exception:  # whatever a constructor raises says that it takes no such arguments
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
    """What a level computes when its weights are others: images (2, C, H, W) to logits (2, num_classes)."""

    tensors: Mapping[str, Tensor]
    images: Tensor
    logits: Tensor


@torch.no_grad()
def _probe(network: nn.Module, input_size: tuple[int, int, int]) -> _Probe:
    tensors = _random_weights(state_tensors(network))
    images = torch.randn(2, *input_size, generator=torch.Generator().manual_seed(0))
    return _Probe(tensors, images, functional_call(network, tensors, (images,)))


@torch.no_grad()
def _difference(model: nn.Module, names: Mapping[str, str], level: Shapes, probe: _Probe) -> str | None:
    """What sets a model apart from a level; None where nothing does. The model is filled and in eval mode."""
    for name, _ in model.named_parameters():
        if name not in names:
            return f"it has {name!r} besides"
    found = {names[name]: shape for name, shape in shapes_of(model).items() if name in names}
    if found == level:
        _fill(model, names, probe.tensors)
        try:
            with quiet():
                logits = model(probe.images)
        except RuntimeError:  # a count of heads that does not fit, for example
            logits = probe.logits[:0]
        if logits.shape == probe.logits.shape:
            spread = (probe.logits[0] - probe.logits[1]).abs().max()
            if (logits - probe.logits).abs().max() < TOLERANCE * spread:
                return None
    return "its network of the same shapes computes something else"


@torch.no_grad()
def _fill(model: nn.Module, names: Mapping[str, str], tensors: Mapping[str, Tensor]) -> None:
    """Copy a level's tensors. Buffers that it lacks, such as counts of batches, stay as they are."""
    own = state_tensors(model)
    for name, its in names.items():
        own[name].copy_(tensors[its])
    model.train().eval()  # some keep what they computed of the weights before


def _random_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Other tensors of the same shapes, with which no part of a network is too weak to be seen."""
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
