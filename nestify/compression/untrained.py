"""Levels without training: their weights are selected, refitted, and their batch norm measured."""

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestify.compression.inputs import round_to_stored
from nestify.data.loaders import Loader, Pictures
from nestify.evaluation.accuracy import NO_PARENTS
from nestify.evaluation.measure import measure
from nestify.model.batch_norm import Statistics, recalibrate, relate_statistics, running_statistics
from nestify.model.nested_model import NestedModel
from nestify.model.spec import state_tensors
from nestify.recipe.levels import Level
from nestify.recipe.metric import TOP1, Metric
from nestify.recipe.recipe import Recipe
from nestify.schedule.nest import choose_weights
from nestify.schedule.refit import PROTECT, refit
from nestify.training.observer import Observer

MOST_PIXELS = 2**23
"""Pixels of all images that weights are refitted on, as they run through two networks at once."""

MOST_POINTS_BY_FIT = 1.0
"""Top-1 points that any level may lose on training images when weights are refitted.

On 2,000 images, two networks that differ in one prediction of twenty have a standard error of half a point;
and a full level loses more on images that it was trained on than on others.
"""

PROTECTIONS = (PROTECT, 3 * PROTECT, 10 * PROTECT)
"""Weights of the full level's error, tried in this order until no level loses more than that."""

MOST_POINTS_BY_STATISTICS = 0.5
"""Top-1 points that the original network may lose by measured batch norm before it is related to its own."""

IMAGES_TO_COMPARE = 2000
"""Training images on which points are measured, rounded up to whole batches."""


@dataclass(frozen=True)
class Untrained:
    """Makes the levels of a nested model as good as they can be without training.

    Args:
        recipe: the recipe of the run.
        metric: what the levels are judged by.
        batches: returns the training images, shuffled, on the model's device.
        observer: notified of each stage.
        parents: for each level that predicts coarser classes, the coarse class of each class.
        frozen: number of levels, from the core on, that come from a nested file and stay as they are. The
            higher levels are then chosen around them, but not refitted.
    """

    recipe: Recipe
    metric: Metric
    batches: Callable[[], Loader]
    observer: Observer
    parents: Mapping[int, Tensor]
    frozen: int = 0

    def make(self, nested: NestedModel, levels: Sequence[Level]) -> None:
        """Choose, refit and round the weights of all levels, and measure the batch norm of smaller ones.

        Args:
            nested: a nested model whose shared weights are those of the original network.
            levels: its levels, core first, with their budgets solved.
        """
        choose_weights(nested, levels, self.recipe.schedule.score, self.frozen)
        numbers = range(self.frozen + 1, nested.n_levels + 1)
        reduced = [level for level in numbers if nested.is_reduced(level)]
        if not reduced:
            return
        original = deepcopy(nested.network).eval()
        measured: Statistics = {}
        if not self.frozen:  # else the weights are partly those of the frozen levels: nothing to compare with
            measured = self._measured_statistics(original)
            if self.recipe.schedule.fit:
                self._refit(nested, original, measured)
        round_to_stored(nested, self.recipe)
        if running_statistics(original):
            self._recalibrate(nested, reduced, original, measured)

    @torch.no_grad()
    def _measured_statistics(self, network: nn.Module) -> Statistics:
        """Return the batch norm of a network, measured on training images; the network keeps its own."""
        before = {name: tensor.clone() for name, tensor in network.named_buffers()}
        recalibrate(network, Pictures(self.batches()), self.recipe.train.recalibrate_batches)
        measured = {name: tensor.clone() for name, tensor in running_statistics(network).items()}
        for name, tensor in network.named_buffers():
            tensor.copy_(before[name])
        return measured

    def _refit(self, nested: NestedModel, original: nn.Module, measured: Statistics) -> None:
        """Refit the weights, with as much protection as the levels need; else keep the original ones.

        A full level's batch norm then follows its new weights, related to that of the original network.
        """
        images = self._images_to_fit(nested)
        unfitted = self._accuracies(nested, original, measured)
        before = state_tensors(original)
        worst, lost = nested.n_levels, 0.0
        purpose = ", for levels without training; schedule.fit = false leaves it out"
        for number, protect in enumerate(PROTECTIONS, start=1):
            again = f" again, with more protection of higher levels ({number} of {len(PROTECTIONS)})"
            self.observer.stage(
                f"refitting the weights of each level on {len(images)} images{again if number > 1 else ''}"
                + (purpose if self.recipe.train.epochs else "")
            )
            done = refit(nested, images, protect, original)
            if done.left:
                self.observer.stage(
                    f"{_some(done.left)} {'was' if len(done.left) == 1 else 'were'} not refitted"
                )
            if not done.fitted:
                return
            refitted = self._accuracies(nested, original, measured)
            worst = max(unfitted, key=lambda level: unfitted[level] - refitted[level])
            lost = unfitted[worst] - refitted[worst]
            if lost <= MOST_POINTS_BY_FIT:
                return
            with torch.no_grad():
                for name, tensor in nested.shared_tensors().items():
                    tensor.copy_(before[name])
        for level in range(1, nested.n_levels + 1):
            if not nested.is_reduced(level):  # the batch norm of reduced levels is measured later
                nested.load_own(level, before)
        tell = self.observer.stage if self.recipe.train.epochs else self.observer.warned
        tell(
            f"the weights of levels without training were not refitted, because level {worst} would lose "
            f"{lost:.2f} points; train the levels (train.epochs), or give schedule.fit_images more images"
        )

    def _accuracies(self, nested: NestedModel, original: nn.Module, measured: Statistics) -> dict[int, float]:
        """Measure the batch norm of each level, and return its score on training images; see `_score`.

        The batch norm of a full level is measured only if its weights were changed, and else the original's.
        """
        found = {}
        for level in range(1, nested.n_levels + 1):
            if nested.is_reduced(level) or not _same_tensors(nested.at_level(level), original):
                self._measure(nested, level, original, measured)
            else:
                nested.load_own(level, state_tensors(original))
            found[level] = self._score(nested.at_level(level), original, self.parents.get(level))
        return found

    def _images_to_fit(self, nested: NestedModel) -> Tensor:
        _, height, width = nested.spec.input_size
        count = min(self.recipe.schedule.fit_images, max(2, MOST_PIXELS // (height * width)))
        return take_images(Pictures(self.batches()), count)

    def _recalibrate(
        self, nested: NestedModel, levels: Sequence[int], original: nn.Module, measured: Statistics
    ) -> None:
        """Measure the batch norm of reduced levels.

        The levels get the measured statistics. Where the original network itself would lose accuracy with
        measured ones, theirs are related to its own.
        """
        self.observer.stage("recalibrating batch norm")
        related = False
        if not self.frozen:
            lost = self._lost_by_statistics(original, measured)
            related = lost > MOST_POINTS_BY_STATISTICS
            points = "points" if self.metric is TOP1 else f"points of {self.metric.title}"
            self.observer.stage(
                f"the original model loses {max(lost, 0):.2f} {points} with batch norm of the training images"
                + ("; the levels' is related to its own instead" if related else "")
            )
        for level in levels:
            self._measure(nested, level, original, measured if related else None)

    def _lost_by_statistics(self, original: nn.Module, measured: Statistics) -> float:
        """Return how many points of accuracy, or of agreement, the original network loses by statistics."""
        changed = deepcopy(original)
        for name, tensor in running_statistics(changed).items():
            tensor.copy_(measured[name])
        return self._score(original, original) - self._score(changed, original)

    def _measure(
        self, nested: NestedModel, level: int, original: nn.Module, measured: Statistics | None
    ) -> None:
        """Measure the batch norm of one level.

        Args:
            nested: the nested model.
            level: 1-based.
            original: the original network.
            measured: its batch norm, measured on the same images, to relate the statistics to the original
                ones; None leaves them as they are measured.
        """
        plain = nested.at_level(level)
        recalibrate(plain, Pictures(self.batches()), self.recipe.train.recalibrate_batches)
        if measured is not None:
            parts = (_part(nested, level, each) for each in (measured, running_statistics(original)))
            relate_statistics(plain, *parts)
        nested.load_own(level, state_tensors(plain))

    def _score(self, network: nn.Module, original: nn.Module, parents: Tensor | None = None) -> float:
        """Return the score of a network on training images, in percent.

        Args:
            network: the network.
            original: the original network.
            parents: the coarse class of each class, if the network predicts coarser ones.
        """
        batches = _first(self.batches(), IMAGES_TO_COMPARE)
        coarse = NO_PARENTS if parents is None else {0: parents}
        [found] = measure({0: network}, batches, self.metric, reference=original, parents=coarse)
        return found.score


def _same_tensors(one: nn.Module, other: nn.Module) -> bool:
    """Whether two networks of one architecture have the same parameters."""
    pairs = zip(one.parameters(), other.parameters(), strict=False)
    return all(a.shape == b.shape and torch.equal(a, b) for a, b in pairs)


def _part(nested: NestedModel, level: int, tensors: Statistics) -> Statistics:
    """Return a level's part of the full network's statistics."""
    own = nested.own_tensors(level)
    return {name: nested.cut(level, name, tensor) for name, tensor in tensors.items() if name in own}


def _some(names: Sequence[str]) -> str:
    return ", ".join(names[:5]) + (f" and {len(names) - 5} more" if len(names) > 5 else "")


def _first(batches: Iterable[tuple[Tensor, Tensor]], count: int) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the first batches that together have a number of images, or all if there are fewer."""
    for images, labels in batches:
        yield images, labels
        count -= len(labels)
        if count <= 0:
            return


def take_images(batches: Iterable[Tensor], count: int) -> Tensor:
    """Return the first `count` images of some batches, or all if there are fewer: (count, C, H, W)."""
    found: list[Tensor] = []
    for batch in batches:
        found.append(batch[: count - sum(map(len, found))])
        if sum(map(len, found)) >= count:
            break
    return torch.cat(found)
