"""`scan`: what each layer, group of channels and block costs if a level leaves it out, without training.

Each candidate is measured alone. A sparse layer keeps its largest weights, and these are fitted by least
squares to the layer's own outputs on some training images. Where channels or blocks are left out, the layers
that miss them are fitted, and batch norm is measured again. Other images then show how often the prediction
is still that of the original network.
"""

import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from nestify.compression.inputs import Inputs, open_inputs
from nestify.compression.suggestion import Suggestion, suggest
from nestify.data.loaders import eval_loader
from nestify.errors import DataError, UnsupportedModelError
from nestify.machine import pick_workers
from nestify.model.batch_norm import recalibrate
from nestify.model.level_sizes import LevelSizes
from nestify.model.nested_model import NestedModel
from nestify.recipe.recipe import Recipe, load_recipe
from nestify.schedule.blocks import Removable, find_removable
from nestify.schedule.channels import units_at
from nestify.schedule.costs import MacCount, count_macs, level_cost
from nestify.schedule.layer_calls import LayerCall, layer_calls
from nestify.schedule.nest import masked_names, order_channels
from nestify.schedule.refit import fit_alone, refit
from nestify.shown import Shown
from nestify.training.observer import Observer

Kind = Literal["weight", "channel", "layer"]

USUAL_IMAGES = 64
"""Training images that candidates are fitted on; as many others measure them."""

USUAL_SPARSITIES = (0.5, 0.75, 0.9)
USUAL_WIDTHS = (0.5, 0.75)


@dataclass(frozen=True)
class Measured:
    """How a network's predictions compare with those of the original one.

    Attributes:
        agreement: share of the images with the same prediction, in percent.
        divergence: KL divergence of the predictions from the original ones, in nats, averaged over images.
        top1: accuracy in percent; None if the images have no labels that fit.
    """

    agreement: float
    divergence: float
    top1: float | None


@dataclass(frozen=True)
class Change(Measured):
    """What it costs to leave out a part of the network, and what it saves.

    Attributes:
        kind: weight (a layer is sparse), channel (a group of channels is narrower) or layer (a block is
            skipped).
        name: name of the weight, of the group's first weight, or of the block.
        amount: the sparsity or the width; 0 for a block.
        macs: multiply-accumulates that it saves per image: those of dense kernels, but in theory for a sparse
            layer.
        parameters: parameters that it saves.
        fitted: whether weights could be fitted.
    """

    kind: Kind
    name: str
    amount: float
    macs: int
    parameters: int
    fitted: bool


@dataclass(frozen=True, repr=False)
class Scan(Shown):
    """Result of `scan`.

    Attributes:
        model: name of the model.
        images: number of images that candidates were measured on, and fitted on.
        top1: accuracy of the original network on them, in percent; None if they have no labels that fit.
        macs: multiply-accumulates per image of the original network.
        parameters: its number of parameters.
        changes: the measured candidates: layers, groups of channels, blocks, each in the order of execution.
        notes: sentences about what could not be measured.
        suggestion: levels for a budget; None if none was given.
    """

    model: str
    images: int
    top1: float | None
    macs: int
    parameters: int
    changes: Sequence[Change]
    notes: Sequence[str]
    suggestion: Suggestion | None = None


def scan(
    recipe: Recipe | str | os.PathLike[str],
    overrides: Mapping[str, object] | None = None,
    *,
    kinds: Sequence[Kind] = ("weight", "channel", "layer"),
    images: int = USUAL_IMAGES,
    sparsities: Sequence[float] = USUAL_SPARSITIES,
    widths: Sequence[float] = USUAL_WIDTHS,
    budget: str | None = None,
    observer: Observer | None = None,
    progress: Callable[[int, int], object] = lambda done, total: None,
) -> Scan:
    """Measure what each layer, group of channels and block costs, without training and without writing.

    Args:
        recipe: a recipe, or what `load_recipe` takes. Its levels are not used.
        overrides: options that replace the recipe's, if `recipe` is not a `Recipe`.
        kinds: what to measure.
        images: number of training images to fit on; as many others measure.
        sparsities: sparsities of each layer, in (0, 1).
        widths: shares of each group's channels, in (0, 1).
        budget: a budget of the core level, such as `macs=0.5`, for which levels are suggested.
        observer: notified of stages and warnings.
        progress: called with the numbers of measured and of all candidates.

    Raises:
        NestifyError: if the recipe, the checkpoint or the images are not right.
    """
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    observer = observer or Observer()
    inputs = open_inputs(recipe, observer, 1)
    work = _Work(inputs, images, recipe)
    counted = count_macs(work.network, inputs.pretrained.spec.input_size)
    notes: list[str] = []
    removable = None
    if {"channel", "layer"} & set(kinds):
        observer.stage("finding what can be left out")
        try:
            removable = find_removable(work.network, inputs.pretrained.spec)
        except UnsupportedModelError as error:
            notes.append(f"channels and blocks were not measured: {error}")
    observer.stage(f"measuring on {images} images")
    candidates = work.candidates(kinds, sparsities, widths, removable, counted)
    changes = []
    for number, measure in enumerate(candidates, start=1):
        progress(number - 1, len(candidates))
        changes += measure()
    progress(len(candidates), len(candidates))
    order = {"weight": 0, "channel": 1, "layer": 2}
    changes.sort(key=lambda change: order[change.kind])
    return Scan(
        model=recipe.model.name,
        images=len(work.measured_on),
        top1=work.measure(work.network).top1,
        macs=counted.total,
        parameters=sum(parameter.numel() for parameter in work.network.parameters()),
        changes=changes,
        notes=notes,
        suggestion=None if budget is None else suggest(inputs, budget, changes, work.measure, observer),
    )
