"""What a model costs to run: multiply-accumulates (MACs) per image, and the weights they belong to."""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import nn

from nestify.errors import UnsupportedModelError
from nestify.file.manifest import LayerEntry
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec
from nestify.recipe.levels import Level
from nestify.schedule.mac_handlers import FREE_OPERATORS, mac_handlers

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # fvcore scripts a loss as it is imported, which torch warns about
    from fvcore.nn import FlopCountAnalysis


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates of one image through one model, as dense kernels execute them.

    What counts as a MAC is defined in `nestify.model.graph.macs`.

    Attributes:
        total: of the whole model.
        by_weight: for every parameter, by its state-dict name, the MACs that multiply with it: 0 for those
            that nothing multiplies with (biases, norms). A shared parameter stands under its first name. The
            sum falls short of `total` by the products of two activations, as in attention.
        not_skippable: parameters that the model transforms before it multiplies with them, as weight
            standardisation does. Their zeros become other numbers, so they save bytes, not MACs.
        uncounted: operators of which it is not known whether they do MACs, with how often they ran. The
            count is whole when it is empty.
    """

    total: int
    by_weight: Mapping[str, int]
    not_skippable: frozenset[str]
    uncounted: Mapping[str, int]


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> MacCount:
    """Count the MACs of one image through a model in evaluation mode.

    Runs a copy of the model once, on the model's device, so the model stays as it is.

    Args:
        input_size: (channels, height, width) of the image.

    Raises:
        UnsupportedModelError: if the model cannot be copied or traced, or does not run at this size.
    """
    first = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *input_size, device=first.device, dtype=first.dtype)
    try:
        with torch.no_grad(), torch.random.fork_rng([first.device] if first.is_cuda else []):
            analysis = _analysis(copy.deepcopy(model).eval(), image)
            reads = analysis.by_operator()
    except Exception as error:  # the model's own code may raise anything
        reason = str(error).partition("\n")[0]
        raise UnsupportedModelError(
            f"the MACs of {type(model).__name__} cannot be counted on an image of {input_size}; check its "
            f"size, and that torch.jit.trace accepts the model: {type(error).__name__}: {reason}"
        ) from error
    by_weight = {name: 0 for name, _ in model.named_parameters()}
    for read, macs in reads.items():
        if read.parameter:
            by_weight[read.parameter] += macs
    return MacCount(
        total=sum(reads.values()),
        by_weight=by_weight,
        not_skippable=frozenset(read.parameter for read in reads if read.parameter and not read.exact),
        uncounted=dict(analysis.unsupported_ops()),
    )


def effective_macs(count: MacCount, densities: Mapping[str, float]) -> int:
    """MACs per image of a kernel that skips every masked-out weight at no cost.

    Whatever no density is given for counts as dense, and so do weights that are not skippable.

    Args:
        densities: by parameter name the share of its weights that are kept, in [0, 1].

    Raises:
        KeyError: for a name that is no parameter of the counted model.
    """
    return count.total - sum(
        count.by_weight[name] - _effective(count, name, density) for name, density in densities.items()
    )


def layer_entries(count: MacCount, kept: Mapping[str, tuple[int, int, int]]) -> list[LayerEntry]:
    """Rows of the per-layer table, in the order of `kept`.

    Args:
        kept: by the name of a maskable parameter: how many weights are kept, how many the level has, masked
            ones included, and how many the full level has.

    Raises:
        KeyError: for a name that is no parameter of the counted model, of which it has weights.
    """
    return [
        LayerEntry(
            name=name,
            weights=weights,
            kept=used,
            dense_macs=count.by_weight[name] if has else 0,
            effective_macs=_effective(count, name, used / has) if has else 0,
        )
        for name, (used, has, weights) in kept.items()
    ]


def _effective(count: MacCount, name: str, density: float) -> int:
    macs = count.by_weight[name]
    return macs if name in count.not_skippable else round(macs * density)


def _analysis(model: nn.Module, image: torch.Tensor) -> FlopCountAnalysis:
    """fvcore's analysis of one image (1, channels, height, width), with our convention and no messages."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = dict.fromkeys(map(id, model.state_dict(keep_vars=True).values()))  # each tensor once, in order
    graph_inputs = ["", *(names.get(tensor, "") for tensor in state)]  # as torch.jit passes them, image first
    analysis = FlopCountAnalysis(model, image)
    analysis.clear_op_handles()  # fvcore's own follow another convention
    analysis.set_op_handle(**dict.fromkeys(FREE_OPERATORS), **mac_handlers(graph_inputs))
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


@dataclass(frozen=True)
class LevelCost:
    """What one level of a nested model costs; see `nested_file.manifest.Metrics` for the numbers.

    Attributes:
        parameters: of the plain model. `nonzero_parameters`: those that are not masked out.
        sparsity: share of its maskable weights that are zeros.
        layers: one row per maskable weight.
        uncounted: operators that the MACs leave out, with how often they run.
    """

    parameters: int
    nonzero_parameters: int
    dense_macs: int
    effective_macs: int
    sparsity: float
    layers: Sequence[LayerEntry]
    uncounted: Mapping[str, int]


@dataclass(frozen=True)
class PlannedLevel:
    """One level as it will be.

    Attributes:
        level: what was asked for. `cost`: what its pattern can reach on this model.
        prefix_bytes: bytes of the nested file that the level needs, header included.
        classes: how many it tells. `class_set`: their name in the hierarchy; empty for the model's own.
    """

    level: Level
    cost: LevelCost
    prefix_bytes: int
    classes: int
    class_set: str


@dataclass(frozen=True)
class Plan:
    """A run in numbers.

    Attributes:
        spec: the model. `maskable`: number of weights that the schedule masks.
        channel_groups, blocks: groups of coupled channels where levels are narrower, and blocks that can be
            skipped where they are shallower; 0 elsewhere.
        without_rule: operators for which there is no rule, so that every level has their channels whole.
        warnings: sentences about levels that would be empty.
        dense_layers: maskable weights that the pattern cannot take, so that they stay whole.
        train_images, val_images: number of images, at most where some cannot be read.
        finetune_steps, steps: training steps before nesting, and of the nested training.
        uncounted: operators that the MAC counts leave out.
        seconds: rough time of the steps on this machine, image loading aside; None if not estimated.
        memory_bytes: rough peak of a training step beyond the libraries; None if not estimated.
    """

    spec: ModelSpec
    levels: Sequence[PlannedLevel]
    maskable: int
    dense_layers: Sequence[str]
    train_images: int
    val_images: int
    finetune_steps: int
    steps: int
    uncounted: Mapping[str, int]
    channel_groups: int = 0
    blocks: int = 0
    without_rule: Sequence[str] = ()
    warnings: Sequence[str] = ()
    seconds: float | None = None
    memory_bytes: int | None = None


def level_costs(nested: NestedModel, count: MacCount) -> list[LevelCost]:
    """The costs of all levels, core first; see `level_cost`."""
    return [level_cost(nested, k, count) for k in range(1, nested.n_levels + 1)]


def level_cost(nested: NestedModel, level: int, count: MacCount) -> LevelCost:
    """The cost of a level as it is now.

    Args:
        count: MACs of the full network; those of a level that is smaller, or tells other classes, are
            counted.
    """
    if nested.is_smaller(level) or nested.classes[level - 1] != nested.spec.num_classes:
        return _own_cost(nested, level)
    parameters = sum(parameter.numel() for parameter in nested.network.parameters())
    return _cost(nested, level, count, parameters, nested.spec.maskable)


def _own_cost(nested: NestedModel, level: int) -> LevelCost:
    plain = nested.at_level(level)
    own = dict(plain.named_parameters())
    parameters = sum(parameter.numel() for parameter in own.values())
    return _cost(nested, level, count_macs(plain, nested.spec.input_size), parameters, own)


def _cost(
    nested: NestedModel, level: int, count: MacCount, parameters: int, own: Collection[str]
) -> LevelCost:
    """The cost of a level of so many parameters.

    Args:
        count: the level's own MACs. `own`: names of the weights that it has.
    """
    entry = nested.entry_levels
    has = {name: nested.elements(level, name) if name in own else 0 for name in nested.spec.maskable}
    kept = {name: entry.count_kept(level, name) if name in entry.tensors and n else n for name, n in has.items()}
    densities = {name: kept[name] / n for name, n in has.items() if n}
    rows = {
        name: (kept[name], n, nested.shared_tensor(name).numel())
        for name, n in has.items()
        if name in entry.tensors or (nested.level_sizes is not None and name not in nested.heads)
    }
    return LevelCost(
        parameters=parameters,
        nonzero_parameters=parameters - sum(has[name] - kept[name] for name in has),
        dense_macs=count.total,
        effective_macs=effective_macs(count, densities),
        sparsity=nested.sparsity(level),
        layers=layer_entries(count, rows),
        uncounted=count.uncounted,
    )
