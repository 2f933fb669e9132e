"""How a level's outputs are compared with those of a teacher: classes, labels, embeddings, feature maps."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional

from nestify.model.feature_maps import as_list, each_tensor
from nestify.recipe.metric import AGREEMENT, MAP, TOP1, Metric


@dataclass(frozen=True)
class OutputLoss:
    """A distillation loss.

    Attributes:
        soften: returns the target for outputs of a teacher and a temperature, in float32, without gradient.
        loss: returns the loss, 0-d, of the outputs of a student, a target and a temperature.
    """

    soften: Callable[[Any, float], Any]
    loss: Callable[[Any, Any, float], Tensor]


def output_loss(metric: Metric) -> OutputLoss:
    """Return how levels that are judged by a metric learn from a teacher."""
    if metric in (TOP1, AGREEMENT):
        return CLASSES
    return LABELS if metric is MAP else FEATURES


def _soften_classes(logits: Tensor, temperature: float) -> Tensor:
    return (logits.detach().float() / temperature).softmax(-1)


def class_divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return KL(target || student) * T^2, averaged over the batch.

    See Hinton et al., "Distilling the Knowledge", 2015, section 2.

    Args:
        logits: logits of the student, (B, classes).
        target: probabilities of the teacher at temperature T, (B, classes).
        temperature: T.
    """
    student = (logits.float() / temperature).log_softmax(-1)
    return functional.kl_div(student, target, reduction="batchmean") * temperature**2


def _soften_labels(logits: Tensor, temperature: float) -> Tensor:
    return (logits.detach().float() / temperature).sigmoid()


def label_divergence(logits: Tensor, target: Tensor, temperature: float) -> Tensor:
    """Return KL(target || student) * T^2 of each label by itself, averaged over batch and labels.

    Args:
        logits: logits of the student, (B, labels).
        target: probabilities of the teacher at temperature T, (B, labels).
        temperature: T.
    """
    crossed = functional.binary_cross_entropy_with_logits(logits.float() / temperature, target)
    entropy = -(torch.xlogy(target, target) + torch.xlogy(1 - target, 1 - target)).mean()
    return (crossed - entropy) * temperature**2


def _soften_features(outputs: Any, temperature: float) -> Any:
    return each_tensor(outputs, lambda tensor: tensor.detach().float())


def feature_distance(outputs: Any, target: Any, temperature: float = 1.0) -> Tensor:
    """Return the distance of features from those of a teacher: 1 - cosine + MSE, averaged over the batch.

    The cosine compares directions. The MSE compares lengths too, and is divided by the mean square of the
    teacher's features of the same image, so that the loss does not depend on their unit, nor on the other
    images of the batch; but by no less than a tenth of the mean square of the batch, which limits the part of
    an image that has hardly any features. Of several feature maps it is the mean.

    Args:
        outputs: features of the student: an embedding (B, features), or feature maps (B, C, H, W), each
            compared as one vector per image.
        target: those of the teacher, of the same shapes; no gradient flows into them.
        temperature: not used.

    Returns:
        The loss, 0-d, float32; 0 if both are equal.
    """
    losses = []
    for one, other in zip(as_list(outputs), as_list(target), strict=True):
        assert one.shape == other.shape, (one.shape, other.shape)
        one, other = one.float().flatten(1), other.detach().float().flatten(1)
        cosine = functional.cosine_similarity(one, other, dim=1).mean()
        squares = other.square().mean(1)
        scale = torch.maximum(squares, 0.1 * squares.mean()).clamp_min(1e-12)
        losses.append(1 - cosine + ((one - other).square().mean(1) / scale).mean())
    return torch.stack(losses).mean()


CLASSES = OutputLoss(_soften_classes, class_divergence)
LABELS = OutputLoss(_soften_labels, label_divergence)
FEATURES = OutputLoss(_soften_features, feature_distance)
