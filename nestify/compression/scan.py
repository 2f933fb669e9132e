"""`scan`: what each layer, group of channels and block costs if a level leaves it out, without training.

Each candidate is measured alone. A sparse layer keeps its largest weights, and these are fitted by least
squares to the layer's own outputs on some training images. Where channels or blocks are left out, the layers
that miss them are fitted, and batch norm is measured again. Other images then show how often the prediction
is still that of the original network.
"""

import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import islice
from typing import get_args

import torch
from torch import Tensor

from nestify.compression.candidates import (
    Change,
    Measured,
    Probe,
    narrower_networks,
    shallower_networks,
    sparse_layers,
    whole_network,
)
from nestify.compression.inputs import Inputs, open_inputs
from nestify.compression.suggestion import Suggestion, check_budget, suggest, try_schedules
from nestify.data.loaders import Loader, eval_loader
from nestify.errors import DataError, RecipeError, UnsupportedModelError
from nestify.recipe.level_options import Part
from nestify.recipe.metric import AGREEMENT, TOP1
from nestify.recipe.recipe import Recipe, load_recipe
from nestify.schedule.blocks import Removable, find_removable
from nestify.schedule.costs import count_macs
from nestify.schedule.nest import masked_names, order_channels
from nestify.shown import Shown
from nestify.training.observer import Observer

USUAL_IMAGES = 64
"""Training images that candidates are fitted on; as many others measure them."""

USUAL_SPARSITIES = (0.5, 0.75, 0.9)
USUAL_WIDTHS = (0.75, 0.5)
KINDS: tuple[Part, ...] = get_args(Part)


@dataclass(frozen=True, repr=False)
class Scan(Shown):
    """Result of `scan`.

    Attributes:
        model: name of the model.
        images: number of images that candidates were measured on; as many others were fitted on.
        original: the original network's own accuracy on them.
        macs: multiply-accumulates per image of the original network.
        parameters: its number of parameters.
        changes: what was measured: layers, groups of channels and blocks, each in the order of execution.
        notes: sentences about what could not be measured.
        suggestion: levels for a budget; None if no budget was given.
    """

    model: str
    images: int
    original: Measured
    macs: int
    parameters: int
    changes: Sequence[Change]
    notes: Sequence[str]
    suggestion: Suggestion | None = None


def scan(
    recipe: Recipe | str | os.PathLike[str],
    overrides: Mapping[str, object] | None = None,
    *,
    kinds: Sequence[Part] = KINDS,
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
        kinds: what to measure: weight (sparse layers), channel (narrower groups), layer (skipped blocks).
        images: number of training images to fit on; as many others measure.
        sparsities: sparsities of each layer, in (0, 1).
        widths: shares of each group's channels, in (0, 1).
        budget: a budget of the core level, such as `macs=0.5`; the schedules are then tried for it, and the
            recipe of the best one is suggested.
        observer: notified of stages and warnings.
        progress: called with the numbers of measured and of all candidates.

    Raises:
        NestifyError: if the recipe, the checkpoint or the images are not right.
    """
    _check_shares("--sparsities", sparsities)
    _check_shares("--widths", widths)
    if budget is not None:
        check_budget(budget)
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe, overrides)
    observer = observer or Observer()
    inputs = open_inputs(recipe, observer, 1)
    if inputs.metric not in (TOP1, AGREEMENT):
        raise RecipeError(
            f"scan compares predicted classes, and {recipe.model.name} predicts no single class; leave out "
            "data.labels, or num_classes and features_only in model.kwargs"
        )
    if inputs.pretrained.new_head:
        raise RecipeError(
            f"the classifier of {recipe.model.name} is new, so its predictions say nothing; scan a model "
            "that was trained on these classes: compress --set finetune.save=FILE writes one"
        )
    network, spec = inputs.pretrained.model, inputs.pretrained.spec
    notes: list[str] = []
    removable = _find_removable(inputs, kinds, observer, notes)
    probe = _probe(inputs, images, removable)
    count = count_macs(network, spec.input_size)
    shuffled = partial(_shuffled, inputs)
    tried = []
    if budget is not None:  # first, so that nothing was measured in vain if it cannot be met
        tried = try_schedules(inputs, network, budget, probe.measure, shuffled, observer)
    observer.stage(f"measuring on {images} images")
    names = masked_names(spec, recipe.schedule.skip) if "weight" in kinds else ()
    smaller = []
    if removable is not None and "channel" in kinds:
        smaller += narrower_networks(removable, widths, recipe.schedule.divisor)
    if removable is not None and "layer" in kinds:
        smaller += shallower_networks(removable)
    total = len(names) * len(sparsities) + len(smaller)
    changes: list[Change] = []
    for change in sparse_layers(probe, names, sparsities, count) if names else ():
        changes.append(change)
        progress(len(changes), total)
    for candidate in smaller:
        changes.append(candidate.measure(probe, spec, count))
        progress(len(changes), total)
    suggestion = None
    if budget is not None:
        suggestion = suggest(inputs, network, budget, tried, changes, probe.measure, shuffled, observer)
    return Scan(
        model=recipe.model.name,
        images=images,
        original=probe.measure(network),
        macs=count.total,
        parameters=sum(parameter.numel() for parameter in network.parameters()),
        changes=changes,
        notes=notes,
        suggestion=suggestion,
    )


def _check_shares(option: str, shares: Sequence[float]) -> None:
    for share in shares:
        if not 0 < share < 1:
            raise RecipeError(f"{option} has {share:g}; give numbers between 0 and 1")


def _find_removable(
    inputs: Inputs, kinds: Sequence[Part], observer: Observer, notes: list[str]
) -> Removable | None:
    """Find channels and blocks, and sort the channels by importance; a note says if that is not possible."""
    network, spec = inputs.pretrained.model, inputs.pretrained.spec
    observer.stage("finding what can be left out")
    try:
        removable = find_removable(network, spec)
    except UnsupportedModelError as error:
        if {"channel", "layer"} & set(kinds):
            notes.append(f"Channels and blocks were not measured: {error}.")
        return None
    order_channels(network, removable)
    if "channel" in kinds and not removable.channels.groups:
        notes.append(f"{spec.architecture} has no channels that can be left out.")
    if "layer" in kinds and not removable.layers.blocks:
        notes.append(f"{spec.architecture} has no residual blocks that can be skipped.")
    return removable


def _shuffled(inputs: Inputs, batch_size: int | None = None) -> Loader:
    """Return the training images in a random order that the recipe's seed determines."""
    return eval_loader(
        inputs.train_images,
        inputs.pretrained.spec.preprocessing,
        batch_size=batch_size or inputs.batch_size,
        shuffle_seed=inputs.recipe.seed,
    )


def _probe(inputs: Inputs, images: int, removable: Removable | None) -> Probe:
    """Read the images to fit and to measure on."""
    batches: list[tuple[Tensor, Tensor]] = list(islice(_shuffled(inputs, images), 2))
    if len(batches) < 2 or len(batches[1][1]) < images:
        raise DataError(
            f"{inputs.train_images.source} has fewer than {2 * images} training images; use a smaller "
            "--images"
        )
    (fitting, _), (measuring, target) = batches
    network = inputs.pretrained.model.eval()
    with torch.no_grad():
        labels = None if inputs.metric.is_comparison else target
        graph = None if removable is None else whole_network(network, removable)
        return Probe(network, fitting, measuring, labels, graph)
