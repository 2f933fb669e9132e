"""The joint loss of all levels, as a timm training task."""

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Literal

import torch
from timm.task import TrainingTask
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn
from torch.nn import functional

from nestify.data.hierarchy import coarse_target
from nestify.evaluation.accuracy import NO_PARENTS
from nestify.model.nested_model import NestedModel
from nestify.training.forward import CompiledLevels, recomputing, while_held

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


@dataclass(frozen=True)
class LevelResult:
    """What one level did in one step.

    Attributes:
        loss: 0-d, detached, unweighted. `logits`: (B, classes), detached.
        weight: of its loss in the sum.
    """

    level: int
    loss: Tensor
    logits: Tensor
    weight: float


class NestedTask(TrainingTask):  # type: ignore[misc]  # timm is not typed
    """L = sum_k a_k * [(1 - b_k) * task loss + b_k * distillation loss], over the levels k.

    Args:
        nested: the model to train.
        criterion: task loss of logits (B, classes) and targets.
        weights: a_k by level, core first; they are scaled to sum 1. A level of weight 0 is not trained.
        distill: b_k by level, core first, in [0, 1]; 0 for the full level where it teaches itself alone.
        teacher: where soft targets come from.
        sandwich: how many levels a step trains; None trains all. Always core and full, the others are
            drawn evenly (Yu and Huang, "Universally Slimmable Networks", ICCV 2019, section 3.2), and
            their weights are raised so that the expected loss stays the same.
        autocast: makes the context of a forward pass, for reduced precision.
        parents: by level, int64 (classes,): the level's class of each class, where it tells others. Its
            targets, the teacher's answers among them, are summed up to its classes.
        seed: with the step it fixes which levels are drawn, in every process of a run.
        compiled: run the levels through torch.compile.
        recompute: blocks keep no activations for their backward, which computes them again.

    Attributes:
        step: number of the training step, for that.
        levels: the levels as they run.
    """

    def __init__(
        self,
        nested: NestedModel,
        criterion: nn.Module,
        *,
        weights: Sequence[float],
        distill: Sequence[float],
        teacher: Teacher,
        sandwich: int | None = None,
        autocast: Callable[[], AbstractContextManager[object]] = nullcontext,
        device: torch.device | None = None,
        parents: Mapping[int, Tensor] = NO_PARENTS,
        seed: int = 0,
        compiled: bool = False,
        recompute: bool = False,
    ) -> None:
        super().__init__(device=device, verbose=False)
        n = nested.n_levels
        assert len(weights) == len(distill) == n
        self.trainable_module = nested
        self.criterion = criterion
        self.teacher = teacher
        self.autocast = autocast
        self.parents = {level: classes.to(device) for level, classes in parents.items()}
        self.n_levels = n
        self.level_weights = [weight / sum(weights) for weight in weights]
        self.distill = [0.0 if teacher.kind == "none" else share for share in distill]
        if teacher.kind == "self":
            self.distill[-1] = 0.0
        self.sandwich = n if sandwich is None else min(max(2, sandwich), n)
        self.step = 0
        self.levels: Callable[..., Tensor] = CompiledLevels(nested) if compiled else nested
        self._seed = seed
        self._recompute = recompute
        self._held = recompute and not compiled  # a compiled level's program has its tensors as inputs
        with self._recomputing():
            pass  # where timm does not offer it, this raises now and not at the first step

    def drawn_levels(self) -> list[tuple[int, float]]:
        """Levels of one step with their weights, from full to core."""
        weights = self.level_weights
        middle = list(range(2, self.n_levels))
        drawn = self.sandwich - 2
        if drawn < len(middle):
            draw = torch.Generator().manual_seed((self._seed * 1_000_003 + self.step) % 2**63)
            order = torch.randperm(len(middle), generator=draw)[:drawn].tolist()
            raised = len(middle) / drawn if drawn else 0.0
            chosen = {middle[i]: weights[middle[i] - 1] * raised for i in order}
        else:
            chosen = {level: weights[level - 1] for level in middle}
        chosen |= {1: weights[0], self.n_levels: weights[-1]}
        return sorted(((level, weight) for level, weight in chosen.items() if weight), reverse=True)

    def each_level(self, images: Tensor, target: Tensor, use: Callable[[Tensor, LevelResult], None]) -> None:
        """Give weighted loss and result of each level in turn to a function, which may run the backward.

        Args:
            images: (B, C, H, W).
            target: (B,) class indices, or (B, classes) soft targets.
        """
        with self.autocast():
            answer = self.teacher.answer(images) if any(self.distill) else None

        def judge(level: int, weight: float, logits: Tensor) -> None:
            nonlocal answer
            logits = logits.float()
            taught = None if answer is None else self.coarse(level, answer)
            loss = self._level_loss(level, logits, self.coarse(level, target), taught)
            use(weight * loss, LevelResult(level, loss.detach(), logits.detach(), weight))
            if level == self.n_levels and self.teacher.learns_from_full:
                own = self.teacher.soften(logits)
                answer = own if answer is None else (answer + own) / 2

        for level, weight in self.drawn_levels():
            if self._held:
                use_logits = partial(judge, level, weight)
                while_held(self.trainable_module, images, level, use_logits, self.autocast)
                continue
            with self.autocast():
                logits = self.levels(images, level=level)
            judge(level, weight, logits)

    def coarse(self, level: int, target: Tensor) -> Tensor:
        """A target or a teacher's answer, (B,) or (B, classes), in the classes of a level."""
        classes = self.trainable_module.classes[level - 1]
        return coarse_target(target, self.parents.get(level), classes)

    def _level_loss(self, level: int, logits: Tensor, target: Tensor, answer: Tensor | None) -> Tensor:
        share = self.distill[level - 1]
        if share == 0 or answer is None:
            loss: Tensor = self.criterion(logits, target)
            return loss
        taught = self.teacher.loss(logits, answer)
        return taught if share == 1 else (1 - share) * self.criterion(logits, target) + share * taught

    def backward(
        self, images: Tensor, target: Tensor, scale: Callable[[Tensor], Tensor] = lambda loss: loss
    ) -> list[LevelResult]:
        """Forward and backward of every level in turn; the memory of one level's graph, not of n.

        Shared weights get the gradient of the weighted sum. What a level owns gets that of the level's own
        loss, whatever its weight, and so learns as fast as it would alone.

        Args:
            images: (B, C, H, W).
            target: (B,) class indices, or (B, classes) soft targets.
            scale: applied to a loss before its backward, for gradient scaling.
        """
        results = []

        def descend(loss: Tensor, result: LevelResult) -> None:
            with self._unweighted(result):
                scale(loss).backward()
            results.append(result)

        with self._recomputing():
            self.each_level(images, target, descend)
        return results

    def _recomputing(self) -> AbstractContextManager[None]:
        return recomputing(self.trainable_module) if self._recompute else nullcontext()

    @contextmanager
    def _unweighted(self, result: LevelResult) -> Iterator[None]:
        """Divide the gradients that a backward adds to what a level owns by the level's weight."""
        own = [t for t in self.trainable_module.own_tensors(result.level).values() if t.requires_grad]
        before = [parameter.grad for parameter in own]
        for parameter in own:
            parameter.grad = None
        yield
        for parameter, gradient in zip(own, before, strict=True):
            if parameter.grad is None:
                parameter.grad = gradient
            else:
                parameter.grad.div_(result.weight)
                if gradient is not None:
                    parameter.grad.add_(gradient)

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """The whole weighted loss in one graph, as timm's own loops expect; `output` is the full level's."""
        assert not self._held, "a level must keep its tensors until its backward has ended"
        losses: list[Tensor] = []
        results: list[LevelResult] = []

        def collect(loss: Tensor, result: LevelResult) -> None:
            losses.append(loss)
            results.append(result)

        self.each_level(input, target, collect)
        return {"loss": torch.stack(losses).sum(), "output": results[0].logits}
