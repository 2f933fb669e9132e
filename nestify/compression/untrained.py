"""Levels without training: their weights are selected, refitted, and their batch norm measured."""

from collections.abc import Callable, Iterable, Sequence
from copy import deepcopy
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn

from nestify.data.loaders import Loader, Pictures
from nestify.evaluation.accuracy import evaluate
from nestify.model.batch_norm import Statistics, recalibrate, relate_statistics, running_statistics
from nestify.model.nested_model import NestedModel
from nestify.recipe.levels import Level
from nestify.recipe.recipe import Recipe
from nestify.schedule.nest import choose_weights
from nestify.schedule.refit import Refitted, refit
from nestify.training.observer import Observer

MOST_PIXELS = 2**23
"""Pixels of all images that weights are refitted on, as they run through two networks at once."""

MOST_POINTS_LOST = 0.5
"""Top-1 points that the original network may lose by measured statistics before they are related to its own."""

IMAGES_TO_COMPARE = 2000
"""Training images on which that is measured, rounded up to whole batches."""


@dataclass(frozen=True)
class Untrained:
    """Makes the levels of a nested model as good as they can be without training.

    Args:
        recipe: the recipe of the run.
        batches: returns the training images, shuffled, on the model's device.
        observer: notified of each stage.
        frozen: number of levels, from the core on, that come from a nested file and stay as they are. The
            higher levels are then chosen around them, but not refitted.
    """

    recipe: Recipe
    batches: Callable[[], Loader]
    observer: Observer
    frozen: int = 0

    def select(self, nested: NestedModel, levels: Sequence[Level]) -> list[int]:
        """Choose the weights of all levels and refit them.

        Args:
            nested: a nested model whose shared weights are those of the original network.
            levels: its levels, core first, with their budgets solved.

        Returns:
            Numbers of the levels that no longer compute what the original network does.
        """
        schedule = self.recipe.schedule
        choose_weights(nested, levels, schedule.score, self.frozen)
        numbers = range(self.frozen + 1, nested.n_levels + 1)
        reduced = [level for level in numbers if nested.is_reduced(level)]
        if self.frozen or not schedule.fit or not reduced:
            return reduced
        self._refit(nested)
        return list(numbers)

    def _refit(self, nested: NestedModel) -> None:
        _, height, width = nested.spec.input_size
        count = min(self.recipe.schedule.fit_images, max(2, MOST_PIXELS // (height * width)))
        images = take_images(Pictures(self.batches()), count)
        self.observer.stage(f"refitting the weights of each level on {len(images)} images")
        done = refit(nested, images)
        if done.left:
            self.observer.stage(describe_left(done))

    def recalibrate(self, nested: NestedModel, levels: Sequence[int], original: nn.Module) -> None:
        """Measure the batch norm of levels.

        A reduced level gets the measured statistics. Where the original network itself would lose accuracy
        with measured ones, and for a full level whose weights were refitted, they are related to its own.

        Args:
            nested: the nested model.
            levels: numbers of the levels that `select` returned; the others keep their statistics.
            original: a copy of its network from before `select`, in eval mode.
        """
        if not levels or not running_statistics(original):
            return
        self.observer.stage("recalibrating batch norm")
        n_batches = self.recipe.train.recalibrate_batches
        measured = deepcopy(original)
        recalibrate(measured, Pictures(self.batches()), n_batches)
        loss = self._points_lost(original, measured)
        related = loss > MOST_POINTS_LOST
        self.observer.stage(
            f"the original network loses {max(loss, 0):.2f} points with the batch norm of training images"
            + ("; the levels' is related to its own instead" if related else "")
        )
        for level in levels:
            plain = nested.at_level(level)
            recalibrate(plain, Pictures(self.batches()), n_batches)
            if related or not nested.is_reduced(level):
                parts = (_part(nested, level, running_statistics(each)) for each in (measured, original))
                relate_statistics(plain, *parts)
            nested.load_own(level, plain)

    def _points_lost(self, original: nn.Module, measured: nn.Module) -> float:
        """Return the top-1 points that the original network loses on training images with new statistics."""
        count = -(-IMAGES_TO_COMPARE // self.recipe.train.batch_size)
        results = evaluate({0: original, 1: measured}, islice(self.batches(), count))
        return results[0].top1 - results[1].top1


def _part(nested: NestedModel, level: int, tensors: Statistics) -> Statistics:
    """Return a level's part of the full network's statistics."""
    own = nested.own_tensors(level)
    return {name: nested.cut(level, name, tensor) for name, tensor in tensors.items() if name in own}


def take_images(batches: Iterable[Tensor], count: int) -> Tensor:
    """Return the first `count` images of some batches, or all if there are fewer: (count, C, H, W)."""
    found: list[Tensor] = []
    for batch in batches:
        found.append(batch[: count - sum(map(len, found))])
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)


def describe_left(done: Refitted) -> str:
    """Return a sentence that names the weights that could not be refitted."""
    names = ", ".join(done.left[:5]) + (", ..." if len(done.left) > 5 else "")
    return f"{len(done.left)} of {len(done.left) + len(done.fitted)} weights were not refitted: {names}"
