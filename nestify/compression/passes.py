"""Passes of a run over images without training: evaluation, recalibration and samples."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from nestify.compression.inputs import Inputs
from nestify.data.dataset import Images
from nestify.data.loaders import Loader, Pictures, eval_loader
from nestify.evaluation.measure import Score, measure, measure_levels
from nestify.model.batch_norm import recalibrate_level
from nestify.model.nested_model import NestedModel
from nestify.training.distributed import SINGLE, World
from nestify.training.precision import Precision

MOST_COMBINED = 512
"""Largest batch that one process takes of the images of several, to bound its memory."""


@dataclass(frozen=True)
class Passes:
    """Passes of one run over its images, with the model's evaluation preprocessing.

    Args:
        inputs: the images and the model.
        workers: number of processes that load images.
        device: where batches are put.
        precision: the precision of forward passes.
        world: the processes of the run, which share the validation images.
        reference: the original model, which levels learned without labels are compared with; None with
            labels.

    Attributes:
        loaders: the loaders in use, whose worker processes last for the whole run.
    """

    inputs: Inputs
    workers: int
    device: torch.device
    precision: Precision
    world: World
    reference: nn.Module | None = None
    loaders: dict[tuple[object, ...], Loader] = field(default_factory=dict)

    def images(
        self, images: Images, seed: int | None = None, world: World = SINGLE, count: int = 1
    ) -> Loader:
        """Return the batches of some images.

        Args:
            images: the images.
            seed: shuffles them; None for the stored order.
            world: the processes that share them.
            count: number of the recipe's batches that make one batch here.
        """
        size = self.inputs.batch_size
        size = max(size, min(MOST_COMBINED, count * size))
        key = id(images), seed, world, size
        if key not in self.loaders:
            self.loaders[key] = eval_loader(
                images,
                self.inputs.pretrained.spec.preprocessing,
                batch_size=size,
                workers=self.workers,
                device=self.device,
                shuffle_seed=seed,
                rank=world.rank,
                world_size=world.size,
            )
        return self.loaders[key]

    def validation(self) -> Loader:
        """Return this process's share of the validation images."""
        return self.images(self.inputs.val_images, world=self.world)

    def shuffled(self, *, combined: bool) -> Loader:
        """Return the training images in random order; if combined, in the batches of all processes."""
        count = self.world.size if combined else 1
        return self.images(self.inputs.train_images, self.inputs.recipe.seed, count=count)

    def sample(self, *, combined: bool) -> Pictures:
        """Return the images of `shuffled` without their labels."""
        return Pictures(self.shuffled(combined=combined))

    def to_recalibrate(self) -> Loader:
        """Return the training images in the batches over which batch norm is measured."""
        return self.shuffled(combined=self.inputs.recipe.train.sync_batch_norm)

    def recalibrate(self, nested: NestedModel, level: int) -> None:
        """Measure the batch-norm statistics of a level on training images."""
        most = self.inputs.recipe.train.recalibrate_batches
        recalibrate_level(nested, level, Pictures(self.to_recalibrate()), most)

    def evaluate_dense(self, network: nn.Module) -> Score:
        """Evaluate the dense model, as level 0, on the validation images."""
        models = {0: network.eval()}
        [result] = self._checked(measure(models, self.validation(), self.inputs.metric, **self._shared()))
        return result

    def evaluate_levels(
        self,
        nested: NestedModel,
        levels: Sequence[int],
        batches: Iterable[tuple[Tensor, Tensor]] | None = None,
    ) -> Sequence[Score]:
        """Evaluate levels of a nested model on the validation images.

        Args:
            nested: the model.
            levels: numbers of the levels.
            batches: this process's share of the validation images; None for a pass that nothing interrupts.
        """
        batches = self.validation() if batches is None else batches
        options = {"parents": self.inputs.labels.parents, "reference": self.reference, **self._shared()}
        return self._checked(measure_levels(nested, batches, levels, self.inputs.metric, **options))

    def _shared(self) -> dict[str, Any]:
        """Return how passes compute, and how processes join what they found."""
        world = self.world
        return {
            "autocast": self.precision.autocast,
            "total": world.all_reduce,
            "gather": world.all_gather,
        }

    def _checked(self, results: Sequence[Score]) -> Sequence[Score]:
        """Check that several processes together evaluated images, and all images of a stream.

        Raises:
            DataError: if there are none, or if images are missing, and the recipe does not skip bad ones.
        """
        images = self.inputs.val_images
        if not results:
            raise images.unreadable()
        if self.world.size > 1 and images.source.is_stream:
            images.check_delivered(results[0].images)
        return results
