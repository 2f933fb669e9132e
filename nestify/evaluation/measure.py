"""The evaluation of networks by the metric of a run or of a file."""

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import partial
from math import isfinite
from typing import Any

from torch import Tensor

from nestify.errors import DivergedError
from nestify.evaluation.accuracy import NO_PARENTS, Accuracy, evaluate
from nestify.evaluation.agreement import Agreement, Similarity, evaluate_agreement
from nestify.evaluation.precision import Precision, evaluate_precision
from nestify.model.nested_model import NestedModel
from nestify.recipe.metric import AGREEMENT, MAP, TOP1, Metric

Score = Accuracy | Precision | Agreement | Similarity
"""Result of an evaluation of one network."""


def measure(
    models: Mapping[int, Callable[[Tensor], Any]],
    batches: Iterable[tuple[Tensor, Tensor]],
    metric: Metric,
    *,
    reference: Callable[[Tensor], Any] | None = None,
    parents: Mapping[int, Tensor] = NO_PARENTS,
    autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
    total: Callable[[Tensor], Tensor] = lambda tensor: tensor,
    gather: Callable[[list[Tensor]], Sequence[list[Tensor]]] = lambda tensors: [tensors],
) -> Sequence[Score]:
    """Evaluate networks, by level number, in one pass over the images.

    Args:
        models: networks from images (B, C, H, W) to logits, embeddings or feature maps.
        batches: pairs of images and targets: class indices (B,), or for the mean average precision (B,
            labels); of a comparison they are not used.
        metric: what is measured.
        reference: the network that the others are compared with; only a comparison needs it.
        parents: by level, int64 (classes,): the level's class of each of the data's classes; levels that
            predict the data's own classes are left out.
        autocast: returns the context of a forward pass, for reduced precision.
        total: returns the sum of a tensor over the processes that each evaluate a share of the images.
        gather: returns the tensors of all of these processes.
    """
    if metric is TOP1:
        return evaluate(models, batches, autocast, parents, total)
    if metric is MAP:
        return evaluate_precision(models, batches, autocast, gather)
    assert reference is not None
    of_classes = metric is AGREEMENT
    return evaluate_agreement(models, reference, batches, autocast, total, of_classes=of_classes)


def measure_levels(
    nested: NestedModel,
    batches: Iterable[tuple[Tensor, Tensor]],
    levels: Sequence[int],
    metric: Metric,
    **options: Any,
) -> Sequence[Score]:
    """Evaluate levels of a nested model in one pass over the images.

    Args:
        nested: the model; its training mode is restored afterwards.
        batches, metric, options: as for `measure`.
        levels: numbers of the levels, from 1.
    """
    was_training = nested.training
    nested.eval()
    try:
        return measure({level: partial(nested, level=level) for level in levels}, batches, metric, **options)
    finally:
        nested.train(was_training)


def check_finite(results: Sequence[Score], option: str | None) -> None:
    """Refuse networks that diverged in their last training step, which only an evaluation detects.

    Args:
        results: results of levels, or of the dense model as level 0.
        option: key of the learning rate, for the message; None if nothing was trained.

    Raises:
        DivergedError: when a loss or a similarity is not finite.
    """
    for result in results:
        if isinstance(result, Agreement | Similarity):
            name, value = "cosine similarity", result.cosine
        else:
            name, value = "loss", result.loss
        if not isfinite(value):
            whose = f"level {result.level}" if result.level else "the dense model"
            remedy = f"a smaller {option} may help" if option else "give another checkpoint, or train it"
            raise DivergedError(f"the {name} of {whose} on the validation images is {value}; {remedy}")
