"""Distillation losses of outputs that are not logits, such as embeddings: cosine and MSE."""

from torch import Tensor
from torch.nn import functional


def embedding_loss(output: Tensor, target: Tensor) -> Tensor:
    """Return the distance of embeddings from those of a teacher: 1 - cosine + MSE, averaged over the batch.

    The cosine compares directions. The MSE compares lengths too, and is divided by the mean square of the
    teacher's embeddings, so that the loss does not depend on their unit.

    Args:
        output: embeddings of the student, (B, features), or feature maps, (B, C, H, W), which are compared
            per image.
        target: those of the teacher, of the same shape; no gradient flows into them.

    Returns:
        The loss, 0-d, float32; 0 if both are equal.
    """
    assert output.shape == target.shape, (output.shape, target.shape)
    output, target = output.float().flatten(1), target.detach().float().flatten(1)
    cosine = functional.cosine_similarity(output, target, dim=1).mean()
    scale = target.square().mean().clamp_min(1e-12)
    return 1 - cosine + functional.mse_loss(output, target) / scale
