"""The candidates of `scan`: networks that lack one part each, fitted and compared with the original one."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from nestify.model.batch_norm import recalibrate
from nestify.model.level_sizes import LevelSizes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec
from nestify.recipe.levels import Level
from nestify.schedule.blocks import Removable
from nestify.schedule.channels import channel_counts
from nestify.schedule.costs import MacCount, level_cost
from nestify.schedule.layer_calls import layer_calls
from nestify.schedule.refit import fit_alone, refit

Kind = Literal["weight", "channel", "layer"]


@dataclass(frozen=True)
class Measured:
    """How a network's predictions compare with those of the original one.

    Attributes:
        agreement: share of the images with the same prediction, in percent.
        divergence: KL divergence of the predictions from the original ones, in nats, averaged over images.
        top1: accuracy in percent.
    """

    agreement: float
    divergence: float
    top1: float


@dataclass(frozen=True)
class Change:
    """What it costs to leave out a part of the network, and what that saves.

    Attributes:
        kind: weight (a layer is sparse), channel (a group of channels is narrower) or layer (a block is
            skipped).
        name: name of the weight, of the group's first weight, or of the block.
        amount: the sparsity or the width; 0 for a block.
        macs: multiply-accumulates that it saves per image: those of dense kernels, but in theory for a sparse
            layer.
        parameters: parameters that it saves.
        measured: how the predictions change.
    """

    kind: Kind
    name: str
    amount: float
    macs: int
    parameters: int
    measured: Measured


class Probe:
    """Images that show how a network's predictions change.

    Args:
        network: the original network, in eval mode.
        fitting: images (B, C, H, W) that candidates are fitted on.
        measuring: other images, that candidates are measured on.
        target: (B,) classes of the latter.
    """

    def __init__(self, network: nn.Module, fitting: Tensor, measuring: Tensor, target: Tensor) -> None:
        self.network, self.fitting = network, fitting
        self._images, self._target = measuring, target
        with torch.no_grad():
            self._expected = network(measuring).float()

    @torch.no_grad()
    def measure(self, network: nn.Module, tensors: Mapping[str, Tensor] | None = None) -> Measured:
        """Compare a network with the original one.

        Args:
            network: the network, in eval mode.
            tensors: tensors that take the place of its own, by state-dict name.
        """
        logits = functional_call(network, dict(tensors or {}), (self._images,)).float()
        divergence = functional.kl_div(
            logits.log_softmax(-1), self._expected.log_softmax(-1), reduction="batchmean", log_target=True
        )
        predicted = logits.argmax(-1)
        return Measured(
            agreement=_percent(predicted == self._expected.argmax(-1)),
            divergence=float(divergence),
            top1=_percent(predicted == self._target),
        )


def _percent(right: Tensor) -> float:
    return 100 * float(right.float().mean())


def sparse_layers(
    probe: Probe, names: Sequence[str], sparsities: Sequence[float], count: MacCount
) -> Iterator[Change]:
    """Measure each layer with its largest weights alone, fitted to the layer's own outputs.

    Args:
        probe: the images.
        names: state-dict names of the weights, of which layers that cannot be fitted are measured unfitted.
        sparsities: sparsities of each layer.
        count: MACs of the network.
    """
    copied = deepcopy(probe.network)  # because the original is in the middle of a pass
    due = dict.fromkeys(names)
    with closing(layer_calls(probe.network, probe.fitting, batch_statistics=False)) as calls:
        for call in calls:
            if call.name not in due:
                continue
            del due[call.name]
            for sparsity, mask in _masks(call.weight, sparsities):
                weight = fit_alone(call, mask)
                yield _sparse_change(call.name, weight, mask, sparsity, probe.measure(copied, {call.name: weight}), count)
    state = copied.state_dict()
    for name in due:
        for sparsity, mask in _masks(state[name], sparsities):
            measured = probe.measure(copied, {name: state[name] * mask})
            yield _sparse_change(name, state[name], mask, sparsity, measured, count)


def _masks(weight: Tensor, sparsities: Sequence[float]) -> Iterator[tuple[float, Tensor]]:
    order = weight.detach().abs().flatten().argsort()
    for sparsity in sparsities:
        mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[order[: round(sparsity * weight.numel())]] = False
        yield sparsity, mask.view(weight.shape)


def _sparse_change(
    name: str, weight: Tensor, mask: Tensor, sparsity: float, measured: Measured, count: MacCount
) -> Change:
    removed = int((~mask).sum())
    skippable = name not in count.not_skippable
    macs = round(count.by_weight.get(name, 0) * removed / weight.numel()) if skippable else 0
    return Change("weight", name, sparsity, macs, removed, measured)


def smaller_networks(
    probe: Probe,
    spec: ModelSpec,
    removable: Removable,
    widths: Sequence[float],
    divisor: int,
    count: MacCount,
    kinds: Sequence[Kind],
) -> list[tuple[Kind, str, float, LevelSizes]]:
    """Return the networks that have fewer channels of one group, or skip one block.

    Args:
        probe: the images.
        spec: description of the model.
        removable: channels and blocks of the network that can be left out; its channels are sorted by
            importance.
        widths: shares of each group's channels.
        divisor: the number that channel counts are multiples of.
        count: MACs of the network.
        kinds: what to leave out.
    """
    groups, full = removable.channels.groups, tuple(group.units for group in removable.channels.groups)
    found: list[tuple[Kind, str, float, LevelSizes]] = []
    for width in sorted(widths, reverse=True) if "channel" in kinds else ():
        [counts] = channel_counts(groups, [Level("narrow", 0.0, width=width)], divisor)
        for index, group in enumerate(groups):
            if counts[index] < full[index]:
                narrow = (*full[:index], counts[index], *full[index + 1 :])
                sizes = LevelSizes(removable.channels, removable.layers, (narrow,), (frozenset(),))
                found.append(("channel", group.members[0].name, width, sizes))
    for block in removable.layers.blocks if "layer" in kinds else ():
        skip = (frozenset({block.name}),)
        found.append(("layer", block.name, 0.0, LevelSizes(removable.channels, removable.layers, (full,), skip)))
    return found


def smaller_network(
    probe: Probe, spec: ModelSpec, kind: Kind, name: str, amount: float, sizes: LevelSizes, count: MacCount
) -> Change:
    """Fit and measure a network that lacks channels of one group, or a block."""
    nested = NestedModel(deepcopy(probe.network), spec, ["candidate"], masked=(), level_sizes=sizes)
    cost = level_cost(nested, 1, count)
    refit(nested, probe.fitting)
    plain = nested.at_level(1)
    recalibrate(plain, [probe.fitting], 1)
    parameters = sum(parameter.numel() for parameter in probe.network.parameters())
    return Change(
        kind, name, amount, count.total - cost.dense_macs, parameters - cost.parameters, probe.measure(plain)
    )
