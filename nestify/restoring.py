"""A nested model from what a nested file stores."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from nestify.model.batch_norm import private_names
from nestify.model.entry_levels import EntryLevels, NestedState
from nestify.model.graph.block_map import find_layers
from nestify.model.graph.channel_map import find_channels
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec, fill_model, state_tensors
from nestify.model.structure import Structure, structure_of


@torch.no_grad()
def restored(
    network: nn.Module,
    spec: ModelSpec,
    state: NestedState,
    level_names: Sequence[str],
    classes: Sequence[int] | None = None,
) -> NestedModel:
    """Fill a freshly built timm model with what a nested file stores; in eval mode.

    Args:
        network: taken over; its classes are those of the highest level.
        classes: how many classes each level tells, where every level has a classifier of its own.
        state: its tensors are taken over or copied; those that are the network's own stay.

    Raises:
        ValueError: if the tensors do not fit the architecture.
        UnsupportedModelError: if the levels that they describe make no network.
    """
    full = state.shared | state.private[-1]
    structure = None
    entry = state.entry
    if state.axes or any(state.skipped):
        structure = _structure(network, spec, state)
        if not structure.is_whole(entry.n_levels):  # no level computes with `network` itself
            full = state_tensors(network) | state.shared
        entry = _masks(structure, spec, state)
    given = full | {name: full[kept] for name, kept in state.aliases.items()}
    fill_model(network, given, spec.architecture)
    affine = set(private_names(network, "private")) - set(private_names(network, "recalibrate"))
    nested = NestedModel(
        network,
        spec,
        level_names,
        entry=entry,
        bn="private" if not affine or affine & state.private[-1].keys() else "recalibrate",
        structure=structure,
        classes=classes,
    )
    for level, tensors in enumerate(state.private[: len(nested.private)], start=1):
        own = nested.private_tensors(level)
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise ValueError(f"the private tensors of level {level} do not fit {spec.architecture}")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return nested.eval()


def _structure(network: nn.Module, spec: ModelSpec, state: NestedState) -> Structure:
    channels = find_channels(network, spec.input_size)
    names = {n for n in channels.names if n in state.shared and state.shared[n].is_floating_point()}
    skipped = state.skipped or [[] for _ in range(state.entry.n_levels)]
    return structure_of(channels, find_layers(channels), state.axes, names, skipped)


def _masks(structure: Structure, spec: ModelSpec, state: NestedState) -> EntryLevels:
    """Entry levels of the weights that are masked beyond what channels and blocks say.

    Raises:
        ValueError: if a level uses weights of a block that it skips.
    """
    entry = state.entry
    available = structure.entry_levels(state.shared)
    masked: dict[str, Tensor] = {}
    for name in entry:
        at_least = available.get(name)
        if at_least is None:
            at_least = torch.ones_like(entry[name])
        if bool((entry[name] < at_least).any()):
            raise ValueError(f"a level has weights of {name!r}, which only blocks read that it skips")
        if name in spec.maskable and not torch.equal(entry[name], at_least):
            masked[name] = entry[name]
    return EntryLevels(entry.n_levels, masked)
