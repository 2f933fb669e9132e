"""The cost of running a model: multiply-accumulates (MACs) per image, in total and per weight."""

import copy
import warnings
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import nn

from nestify.accelerator import fork_random_states
from nestify.errors import UnsupportedModelError
from nestify.file.manifest import LayerEntry
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec
from nestify.recipe.levels import Level
from nestify.schedule.mac_handlers import FREE_OPERATORS, mac_handlers
from nestify.shown import Shown

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # importing fvcore scripts a loss, which torch warns about
    from fvcore.nn import FlopCountAnalysis


@dataclass(frozen=True)
class MacCount:
    """Multiply-accumulates (MACs) per image of one model, as dense kernels execute them.

    What counts as a MAC is defined in `nestify.model.graph.macs`.

    Attributes:
        total: MACs of the complete model.
        by_weight: state-dict name of every parameter -> the MACs that multiply with it; 0 if there are none
            (biases, norms). A shared parameter is listed under its first name. The sum is smaller than
            `total` by the products of two activations, as in attention.
        not_skippable: names of the parameters that the model transforms before it multiplies with them, as
            in weight standardisation. Their zeros become other numbers, so they save bytes but no MACs.
        uncounted: operators that the counter does not know -> how often they ran. The count is complete if
            it is empty.
    """

    total: int
    by_weight: Mapping[str, int]
    not_skippable: frozenset[str]
    uncounted: Mapping[str, int]


def count_macs(model: nn.Module, input_size: tuple[int, int, int]) -> MacCount:
    """Count the MACs of one image through a model in evaluation mode.

    Runs a copy of the model once, on the model's device; the model itself does not change.

    Args:
        model: any model that torch.jit.trace accepts.
        input_size: (channels, height, width) of the image in pixels.

    Raises:
        UnsupportedModelError: if the model cannot be copied or traced, or does not run at this size.
    """
    first = next(model.parameters(), torch.empty(0))
    image = torch.zeros(1, *input_size, device=first.device, dtype=first.dtype)
    try:
        with torch.no_grad(), fork_random_states(first.device):
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
    """Return the MACs per image of a kernel that skips every masked-out weight at no cost.

    Parameters without a density, and those that are not skippable, count as dense.

    Args:
        count: MACs of the dense model.
        densities: parameter name -> share of its weights that are kept, in [0, 1].

    Raises:
        KeyError: if the counted model has no parameter of a name.
    """
    return count.total - sum(
        count.by_weight[name] - _effective(count, name, density) for name, density in densities.items()
    )


def layer_entries(count: MacCount, kept: Mapping[str, tuple[int, int, int]]) -> list[LayerEntry]:
    """Return the rows of the per-layer table, in the order of `kept`.

    Args:
        count: MACs of the level's plain model.
        kept: name of a maskable parameter -> number of weights that are kept, that the level has (masked
            ones included), and that the full level has.

    Raises:
        KeyError: if the level has weights of a name, but the counted model has no such parameter.
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
    """Make fvcore's analysis of an image (1, channels, height, width), with our handlers and no messages."""
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    state = dict.fromkeys(map(id, model.state_dict(keep_vars=True).values()))  # each tensor once, in order
    graph_inputs = ["", *(names.get(tensor, "") for tensor in state)]  # as torch.jit passes them, image first
    analysis = FlopCountAnalysis(model, image)
    analysis.clear_op_handles()  # fvcore's own handlers follow another convention
    analysis.set_op_handle(**dict.fromkeys(FREE_OPERATORS), **mac_handlers(graph_inputs))
    return analysis.unsupported_ops_warnings(False).uncalled_modules_warnings(False).tracer_warnings("none")


@dataclass(frozen=True)
class LevelCost:
    """The costs of one level of a nested model.

    Attributes:
        parameters: number of elements of the plain model's parameters.
        nonzero_parameters: number of these that are not masked out.
        dense_macs: MACs per image that dense kernels execute.
        effective_macs: MACs per image of a kernel that skips every masked-out weight at no cost.
        sparsity: share of the level's maskable weights that are zero.
        layers: rows of the per-layer table, one per maskable weight.
        uncounted: operators that the MACs leave out -> how often they run.
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
    """One level as a run will make it.

    Attributes:
        level: the requested level, with its budget solved.
        cost: the costs that it can reach on this model with its pattern.
        prefix_bytes: bytes of the nested file that the level needs, header included.
        classes: number of classes that it predicts.
        class_set: their name in the hierarchy; empty for the data's own classes.
        latency: predicted time on the sparse engine, divided by the full level's; None if no level has a
            budget of latency.
    """

    level: Level
    cost: LevelCost
    prefix_bytes: int
    classes: int
    class_set: str
    latency: float | None = None


@dataclass(frozen=True, repr=False)
class Plan(Shown):
    """The numbers of a run before it starts.

    Attributes:
        spec: description of the model.
        levels: the levels, core first.
        maskable: number of weights that the schedule masks.
        dense_layers: names of the masked weights that the pattern does not divide, so that they stay dense.
        train_images: number of training images, fewer if some cannot be read.
        val_images: number of validation images, fewer if some cannot be read.
        finetune_steps: training steps before nesting.
        steps: training steps of the nested training.
        search_steps: steps of the short trainings before a training whose learning rate is "auto", by its
            section, `finetune` or `train`; 0 if the training has too few steps for a search.
        rates: learning rates by section, `finetune` or `train`, where no search takes place.
        ramp: share of these steps during which sparsity increases.
        uncounted: operators that the MAC counts leave out -> how often they run.
        channel_groups: number of groups of coupled channels; 0 if no level is narrower.
        blocks: number of blocks that can be skipped; 0 if no level is shallower.
        without_rule: operators without a rule, so that every level has all of their channels.
        warnings: messages about levels that would be empty.
        seconds: rough time of all steps on this machine, without image loading; None if not estimated.
        memory_bytes: rough peak memory of a training step, without the libraries; None if not estimated.
        computing: the GPU, and the options of speed that are on; empty for other devices.
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
    search_steps: Mapping[str, int] = field(default_factory=dict)
    rates: Mapping[str, float] = field(default_factory=dict)
    ramp: float = 0.0
    channel_groups: int = 0
    blocks: int = 0
    without_rule: Sequence[str] = ()
    warnings: Sequence[str] = ()
    seconds: float | None = None
    memory_bytes: int | None = None
    computing: Sequence[str] = ()


def level_costs(nested: NestedModel, count: MacCount) -> list[LevelCost]:
    """Return the costs of all levels, core first; see `level_cost`."""
    return [level_cost(nested, k, count) for k in range(1, nested.n_levels + 1)]


def level_cost(nested: NestedModel, level: int, count: MacCount) -> LevelCost:
    """Return the current cost of a level.

    Args:
        nested: the nested model.
        level: 1-based.
        count: MACs of the full network; the MACs of a level that is smaller, or predicts another number of
            classes, are counted here.
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
    """Return the cost of a level whose MACs and parameters are known.

    Args:
        nested: the nested model.
        level: 1-based.
        count: the level's own MACs.
        parameters: number of elements of the level's parameters.
        own: names of the weights that the level has.
    """
    entry = nested.entry_levels
    has = {name: nested.elements(level, name) if name in own else 0 for name in nested.spec.maskable}
    kept = {
        name: entry.count_kept(level, name) if name in entry.tensors and n else n for name, n in has.items()
    }
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
