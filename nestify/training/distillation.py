"""What a level learns from: the labels, and the soft answers of a teacher."""

from typing import Literal

import torch
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn
from torch.nn import functional

TeacherKind = Literal["none", "original", "self", "both", "other"]


class Teacher(nn.Module):
    """Soft targets of a batch, for the levels that are distilled.

    Args:
        kind: `original` or `other`: a frozen network; `self`: the full level of the network that is being
            trained; `both`: the mean of the two answers; `none`.
        frozen: the frozen network, for all kinds but `self` and `none`.
        mean, std: normalisation of the student's images, so that a teacher with another one sees what it
            was trained on.
        temperature: softmax temperature T of both sides.
    """

    mean: Tensor
    std: Tensor

    def __init__(
        self,
        kind: TeacherKind,
        frozen: nn.Module | None = None,
        *,
        mean: tuple[float, ...] = (0.0,),
        std: tuple[float, ...] = (1.0,),
        temperature: float = 1.0,
    ) -> None:
        super().__init__()
        assert (frozen is None) == (kind in ("self", "none"))
        self.kind = kind
        self.temperature = temperature
        self.frozen = None if frozen is None else DistillationTeacher(frozen).requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)

    def train(self, mode: bool = True) -> "Teacher":
        """A teacher never leaves eval mode."""
        return super().train(False)

    @property
    def learns_from_full(self) -> bool:
        """Whether the full level's answer is part of the soft targets."""
        return self.kind in ("self", "both")

    @torch.no_grad()
    def answer(self, images: Tensor) -> Tensor | None:
        """Probabilities of the frozen network at temperature T, (B, classes); None where there is none."""
        if self.frozen is None:
            return None
        logits = self.frozen(self.frozen.normalize_input(images, self.mean, self.std))
        return self.soften(logits)

    def soften(self, logits: Tensor) -> Tensor:
        """Probabilities at temperature T, in float32, without gradient."""
        return (logits.detach().float() / self.temperature).softmax(-1)

    def loss(self, logits: Tensor, answer: Tensor) -> Tensor:
        """KL(answer || student) * T^2 (Hinton et al., "Distilling the Knowledge", 2015, section 2)."""
        student = (logits.float() / self.temperature).log_softmax(-1)
        return functional.kl_div(student, answer, reduction="batchmean") * self.temperature**2
