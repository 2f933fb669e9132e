"""Levels without training: their weights are selected, refitted, and their batch norm measured."""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestify.model.batch_norm import Statistics, recalibrate, relate_statistics, running_statistics
from nestify.model.nested_model import NestedModel
from nestify.recipe.levels import Level
from nestify.recipe.recipe import Recipe
from nestify.schedule.nest import choose_weights
from nestify.schedule.refit import Refitted, refit
from nestify.training.observer import Observer

MOST_PIXELS = 2**23
"""Pixels of all images that weights are refitted on, as they run through two networks at once."""


@dataclass(frozen=True)
class Untrained:
    """Makes the levels of a nested model as good as they can be without training.

    Args:
        recipe: the recipe of the run.
        batches: returns batches of training images (B, C, H, W), on the model's device.
        observer: notified of each stage.
    """

    recipe: Recipe
    batches: Callable[[], Iterable[Tensor]]
    observer: Observer

    def select(self, nested: NestedModel, levels: Sequence[Level]) -> list[int]:
        """Choose the weights of all levels and refit them.

        Args:
            nested: a nested model whose shared weights are those of the original network.
            levels: its levels, core first, with their budgets solved.

        Returns:
            Numbers of the levels that no longer compute what the original network does.
        """
        schedule = self.recipe.schedule
        choose_weights(nested, levels, schedule.score)
        numbers = range(1, nested.n_levels + 1)
        reduced = [level for level in numbers if nested.is_reduced(level)]
        if not schedule.fit or not reduced:
            return reduced
        self._refit(nested)
        return list(numbers)

    def _refit(self, nested: NestedModel) -> None:
        _, height, width = nested.spec.input_size
        count = min(self.recipe.schedule.fit_images, max(2, MOST_PIXELS // (height * width)))
        images = take_images(self.batches(), count)
        self.observer.stage(f"refitting the weights of each level on {len(images)} images")
        done = refit(nested, images)
        if done.left:
            self.observer.stage(describe_left(done))

    def recalibrate(self, nested: NestedModel, levels: Sequence[int], original: nn.Module) -> None:
        """Measure the batch norm of levels, in relation to that of the original network.

        Args:
            nested: the nested model.
            levels: numbers of the levels that `select` returned; the others keep their statistics.
            original: a copy of its network from before `select`, which is changed.
        """
        if not levels:
            return
        self.observer.stage("recalibrating batch norm")
        before = {name: tensor.clone() for name, tensor in running_statistics(original).items()}
        n_batches = self.recipe.train.recalibrate_batches
        recalibrate(original, self.batches(), n_batches)
        measured = running_statistics(original)
        for level in levels:
            plain = nested.at_level(level)
            recalibrate(plain, self.batches(), n_batches)

            def cut(tensors: Statistics, level: int = level) -> Statistics:
                return {
                    name: nested.cut(level, name, tensor)
                    for name, tensor in tensors.items()
                    if name in nested.own_tensors(level)
                }

            relate_statistics(plain, cut(measured), cut(before))
            nested.load_own(level, plain)


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
