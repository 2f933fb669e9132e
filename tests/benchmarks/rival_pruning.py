"""Rivals that make a network smaller: torch's global L1 pruning, and Torch-Pruning's magnitude importance."""

from collections.abc import Callable, Mapping
from copy import deepcopy

import torch
from torch import nn
from torch.nn.utils import prune

import nestify
from nestify.schedule.costs import count_macs
from nestify.schedule.nest import masked_names
from nestify.schedule.weights import kept_weights
from tests.benchmarks.rival_methods import Contest, Make

BeforeStep = Callable[[int, int], None]


def leave_dense(contest: Contest, network: nn.Module, level: int) -> BeforeStep:
    """Prune nothing."""
    return lambda step, total: None


def prune_once(contest: Contest, network: nn.Module, level: int) -> BeforeStep:
    """Prune by torch's global L1 pruning before the first step."""
    return _global_l1(contest, network, level, ramp=0.0)


def prune_gradually(contest: Contest, network: nn.Module, level: int) -> BeforeStep:
    """Prune by torch's global L1 pruning in 20 rounds over the first half; sparsity rises cubically."""
    return _global_l1(contest, network, level, ramp=0.5)


def _global_l1(contest: Contest, network: nn.Module, level: int, ramp: float, rounds: int = 20) -> BeforeStep:
    names = masked_names(contest.inputs.pretrained.spec, contest.recipe.schedule.skip)
    weights = [
        (network.get_submodule(module), weight) for module, _, weight in (n.rpartition(".") for n in names)
    ]
    for module, weight in weights:  # torch's pruning refuses channels-last weights
        parameter = getattr(module, weight)
        parameter.data = parameter.data.contiguous()
    size = sum(getattr(module, weight).numel() for module, weight in weights)
    sparsity = contest.plan.levels[level - 1].level.sparsity
    pruned = 0

    def before_step(step: int, total: int) -> None:
        nonlocal pruned
        ramp_steps = round(ramp * total)
        interval = max(1, -(-ramp_steps // rounds))
        if step > ramp_steps or (step < ramp_steps and step % interval):
            return
        rest = 1 - step / ramp_steps if ramp_steps else 0.0
        more = size - kept_weights(size, sparsity * (1 - rest**3)) - pruned
        if more > 0:
            prune.global_unstructured(weights, pruning_method=prune.L1Unstructured, amount=more)
            pruned += more

    return before_step


def prune_channels(contest: Contest, network: nn.Module, level: int) -> BeforeStep:
    """Prune channels by Torch-Pruning's magnitude importance, to the MACs of nestify's level.

    Raises:
        NestifyError: if Torch-Pruning is not installed.
    """
    try:
        import torch_pruning
    except ImportError as error:
        raise nestify.NestifyError("Torch-Pruning is not installed; pip install torch-pruning") from error
    spec, wanted = contest.inputs.pretrained.spec, contest.plan.levels[level - 1].cost.dense_macs
    example = torch.zeros(1, *spec.input_size, device=contest.device)

    def pruned(ratio: float, model: nn.Module) -> nn.Module:
        torch_pruning.pruner.BasePruner(
            model,
            example,
            importance=torch_pruning.importance.GroupMagnitudeImportance(),
            global_pruning=False,
            pruning_ratio=ratio,
            ignored_layers=[model.get_submodule(name) for name in spec.classifier],
        ).step()
        return model

    low, high, tried = 0.0, 1.0, {}
    for _ in range(10):
        ratio = (low + high) / 2
        model = pruned(ratio, deepcopy(network).eval())
        macs = count_macs(model, spec.input_size).total
        tried[ratio] = abs(macs - wanted)
        low, high = (ratio, high) if macs > wanted else (low, ratio)
    pruned(min(tried, key=tried.__getitem__), network.eval())
    return lambda step, total: None


RIVALS: Mapping[str, Mapping[str, Make]] = {
    "weight": {"once": prune_once, "gradual": prune_gradually},
    "channel": {"torch-pruning": prune_channels},
    "layer": {},
}
"""By kind of schedule: the rivals of smaller levels. The rival of the full level is `dense`."""
