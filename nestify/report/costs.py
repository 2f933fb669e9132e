"""What a model costs to run: multiply-accumulates (MACs) per image, and the weights they belong to."""

import copy
import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn

from nestify.errors import UnsupportedModelError
from nestify.file.manifest import LayerEntry
from nestify.report.mac_handlers import FREE_OPERATORS, mac_handlers

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
