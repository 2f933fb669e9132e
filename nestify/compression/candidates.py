"""The candidates of `scan`: networks that lack one part each, fitted and compared with the original one."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from nestify.compression.shared_prefix import SharedPrefix, can_share
from nestify.model.batch_norm import recalibrate, relate_statistics, running_statistics
from nestify.model.level_sizes import LevelSizes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec, state_tensors
from nestify.recipe.level_options import Part
from nestify.recipe.levels import Level
from nestify.schedule.blocks import Removable
from nestify.schedule.channels import channel_counts
from nestify.schedule.costs import MacCount, level_cost
from nestify.schedule.layer_calls import layer_calls
from nestify.schedule.refit import fit_alone, refit

Cut = Callable[[str, Tensor], Tensor]


@dataclass(frozen=True)
class Measured:
    """How a network's predictions compare with those of the original one.

    Attributes:
        agreement: share of the images with the same prediction, in percent.
        divergence: KL divergence of the predictions from the original ones, in nats, averaged over images.
        top1: accuracy in percent; None without labels.
    """

    agreement: float
    divergence: float
    top1: float | None


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

    kind: Part
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
        target: (B,) classes of the latter; None without labels.
        graph: the same network, made by torch.export: passes of networks that are made by it too begin where
            they differ from it. None: they begin at the start.

    Attributes:
        plain: the network that sparse layers are measured in: `graph` if it is given.
        statistics: its running statistics.
    """

    def __init__(
        self,
        network: nn.Module,
        fitting: Tensor,
        measuring: Tensor,
        target: Tensor | None,
        graph: fx.GraphModule | None = None,
    ) -> None:
        self.network, self.fitting = network, fitting
        self._images, self._target = measuring, target
        self._passes: tuple[SharedPrefix, SharedPrefix] | None = None
        self.plain: nn.Module = network
        if graph is not None and can_share(graph):
            self.plain = graph
            self._passes = (
                SharedPrefix(graph, fitting, batch_statistics=True),
                SharedPrefix(graph, measuring, batch_statistics=False),
            )
        self.statistics = running_statistics(self.plain)
        measured = deepcopy(self.plain)
        recalibrate(measured, [fitting], 1)
        self._measured_statistics = running_statistics(measured)
        with torch.no_grad():
            self._expected = network(measuring).float()

    def recalibrate(self, network: nn.Module, cut: Cut = lambda name, tensor: tensor) -> None:
        """Measure a network's batch norm, less what the same measurement does to the original network.

        Args:
            network: a network that lacks a part, changed in place.
            cut: returns the network's part of a tensor of the original one.
        """
        if not self.statistics:
            return
        if self._passes is not None and isinstance(network, fx.GraphModule):
            names = self._passes[0].measure_norms(network)  # those before have the original's
        else:
            recalibrate(network, [self.fitting], 1)
            names = list(running_statistics(network))
        parts = [
            {name: cut(name, statistics[name]) for name in names}
            for statistics in (self._measured_statistics, self.statistics)
        ]
        relate_statistics(network, *parts)

    @torch.no_grad()
    def measure(self, network: nn.Module) -> Measured:
        """Compare a network, in eval mode, with the original one."""
        if self._passes is not None and isinstance(network, fx.GraphModule):
            logits = self._passes[1].run(network).float()
        else:
            logits = network(self._images).float()
        divergence = functional.kl_div(
            logits.log_softmax(-1), self._expected.log_softmax(-1), reduction="batchmean", log_target=True
        )
        predicted = logits.argmax(-1)
        return Measured(
            agreement=_percent(predicted == self._expected.argmax(-1)),
            divergence=float(divergence),
            top1=None if self._target is None else _percent(predicted == self._target),
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
    copied = deepcopy(probe.plain)  # because the original is in the middle of a pass
    state = state_tensors(copied)
    if not set(names) <= state.keys():  # a graph lacks the weights that no prediction depends on
        copied = deepcopy(probe.network)
        state = state_tensors(copied)

    def measure(name: str, weight: Tensor, mask: Tensor, sparsity: float) -> Change:
        before = {name: state[name].clone(), **{key: state[key].clone() for key in probe.statistics}}
        with torch.no_grad():
            state[name].copy_(weight)
            probe.recalibrate(copied)
            change = _sparse_change(name, mask, sparsity, probe.measure(copied), count)
            for key, tensor in before.items():
                state[key].copy_(tensor)
        return change

    due = dict.fromkeys(names)
    with closing(layer_calls(probe.network, probe.fitting, batch_statistics=False)) as calls:
        for call in calls:
            if call.name not in due:
                continue
            del due[call.name]
            masks = _masks(call.weight, sparsities)
            for sparsity, mask, weight in zip(sparsities, masks, fit_alone(call, masks), strict=True):
                yield measure(call.name, weight, mask, sparsity)
    for name in due:
        for sparsity, mask in zip(sparsities, _masks(state[name], sparsities), strict=True):
            yield measure(name, state[name] * mask, mask, sparsity)


def _masks(weight: Tensor, sparsities: Sequence[float]) -> list[Tensor]:
    """Return where the largest weights are, for each sparsity."""
    order = weight.detach().abs().flatten().argsort()
    masks = []
    for sparsity in sparsities:
        mask = torch.ones(weight.numel(), dtype=torch.bool, device=weight.device)
        mask[order[: round(sparsity * weight.numel())]] = False
        masks.append(mask.view(weight.shape))
    return masks


def _sparse_change(name: str, mask: Tensor, sparsity: float, measured: Measured, count: MacCount) -> Change:
    removed = int((~mask).sum())
    skippable = name not in count.not_skippable
    macs = round(count.by_weight.get(name, 0) * removed / mask.numel()) if skippable else 0
    return Change("weight", name, sparsity, macs, removed, measured)


@dataclass(frozen=True)
class Smaller:
    """A network that has fewer channels of one group, or skips one block.

    Attributes:
        kind: channel or layer.
        name: name of the group's first weight, or of the block.
        amount: the width; 0 for a block.
        sizes: its channels and blocks, as those of one level.
        readers: names of the weights that read the missing channels, which are fitted.
    """

    kind: Part
    name: str
    amount: float
    sizes: LevelSizes
    readers: frozenset[str] = frozenset()

    def measure(self, probe: Probe, spec: ModelSpec, count: MacCount) -> Change:
        """Fit the network, and compare it with the original one.

        Args:
            probe: the images, and the original network.
            spec: its description.
            count: its MACs.
        """
        nested = NestedModel(deepcopy(probe.network), spec, ["smaller"], masked=(), level_sizes=self.sizes)
        cost = level_cost(nested, 1, count)
        if self.readers:
            refit(nested, probe.fitting, original=probe.network, only=self.readers)
        plain = nested.at_level(1)
        probe.recalibrate(plain, lambda name, tensor: nested.cut(1, name, tensor))
        all_parameters = sum(parameter.numel() for parameter in probe.network.parameters())
        return Change(
            self.kind,
            self.name,
            self.amount,
            count.total - cost.dense_macs,
            all_parameters - cost.parameters,
            probe.measure(plain),
        )


def narrower_networks(removable: Removable, widths: Sequence[float], divisor: int) -> list[Smaller]:
    """Return the networks that have fewer channels of one group.

    Args:
        removable: channels of the network that can be left out, sorted by importance.
        widths: shares of each group's channels.
        divisor: the number that channel counts are multiples of.
    """
    groups = removable.channels.groups
    full = tuple(group.units for group in groups)
    found = []
    counts = {
        width: channel_counts(groups, [Level("narrower", 0.0, width=width)], divisor)[0] for width in widths
    }
    for index, group in enumerate(groups):
        readers = frozenset(member.name for member in group.members if member.dim == 1)
        for width in sorted(widths, reverse=True):
            if counts[width][index] < full[index]:
                narrower = (*full[:index], counts[width][index], *full[index + 1 :])
                sizes = LevelSizes(removable.channels, removable.layers, (narrower,), (frozenset(),))
                found.append(Smaller("channel", group.members[0].name, width, sizes, readers))
    return found


def shallower_networks(removable: Removable) -> list[Smaller]:
    """Return the networks that skip one block."""
    full = tuple(group.units for group in removable.channels.groups)
    return [
        Smaller(
            "layer",
            block.name,
            0.0,
            LevelSizes(removable.channels, removable.layers, (full,), (frozenset({block.name}),)),
        )
        for block in removable.layers.blocks
    ]


def whole_network(network: nn.Module, removable: Removable) -> fx.GraphModule:
    """Return the network that lacks nothing, as torch.export makes it, with copies of the weights."""
    full = tuple(group.units for group in removable.channels.groups)
    sizes = LevelSizes(removable.channels, removable.layers, (full,), (frozenset(),))
    return sizes.make_network(1, state_tensors(network))
