"""The joint loss of all levels, as a timm training task."""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial
from typing import Any, Literal

import torch
from timm.task import TrainingTask
from timm.task.distillation import DistillationTeacher
from torch import Tensor, nn
from torch.utils._pytree import tree_map

from nestify.data.hierarchy import coarse_target
from nestify.evaluation.accuracy import NO_PARENTS
from nestify.model.feature_maps import each_tensor
from nestify.model.nested_model import NestedModel
from nestify.recipe.metric import AGREEMENT, TOP1, Metric
from nestify.training.forward import CompiledLevels, forward_and_use, recompute_activations
from nestify.training.gradients import FlatEntryCache, LevelTensors, unweighted_gradients
from nestify.training.output_loss import CLASSES, OutputLoss

TeacherKind = Literal["none", "original", "self", "both", "other"]

Criterion = Callable[[Any, Any], Tensor]
"""A function of a level's outputs and the target, which returns the loss."""


class Teacher(nn.Module):
    """The teacher that provides soft targets for the levels that are trained by distillation.

    Args:
        kind: `original` or `other`: a frozen network; `self`: the highest level that is being trained, which
            is the full level unless the levels are trained in stages; `both`: the mean of the two
            predictions; `none`: no teacher.
        frozen: the frozen network; None for the kind `none`. For `self` it teaches the highest level, which
            learns from labels if it is None.
        mean, std: normalisation of the student's images, by channel; images are normalised again for a
            teacher that was trained with a different normalisation.
        temperature: softmax temperature T of teacher and student.
        compare: what its outputs are, and how a student's are compared with them.
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
        compare: OutputLoss = CLASSES,
    ) -> None:
        super().__init__()
        self._compare = compare
        assert kind == "self" or (frozen is None) == (kind == "none")
        self.kind = kind
        self.temperature = temperature
        self.frozen = None if frozen is None else DistillationTeacher(frozen).requires_grad_(False)
        self.register_buffer("mean", torch.tensor(mean).view(1, -1, 1, 1), persistent=False)
        self.register_buffer("std", torch.tensor(std).view(1, -1, 1, 1), persistent=False)
        self._normalizes = self.frozen is not None and not (
            torch.equal(self.mean, self.frozen.mean_kd) and torch.equal(self.std, self.frozen.std_kd)
        )

    def train(self, mode: bool = True) -> "Teacher":
        """Stay in eval mode, whatever `mode` is."""
        return super().train(False)

    @property
    def uses_full_level(self) -> bool:
        """Whether the prediction of the highest trained level is part of the soft targets."""
        return self.kind in ("self", "both")

    @torch.no_grad()
    def predict(self, images: Tensor) -> Any:
        """Return the soft target of the frozen network, or None without one.

        Args:
            images: (B, C, H, W), normalised for the student.
        """
        if self.frozen is None:
            return None
        if self._normalizes:  # timm's normalize_input compares on the device, and waits for it
            images = (images * self.std + self.mean - self.frozen.mean_kd) / self.frozen.std_kd
        return self.soften(self.frozen(images))

    def soften(self, outputs: Any) -> Any:
        """Return the soft target for what a network returned: probabilities at temperature T, or features."""
        return self._compare.soften(outputs, self.temperature)

    def loss(self, outputs: Any, soft_target: Any) -> Tensor:
        """Return the distillation loss of a student's outputs, averaged over the batch; see `output_loss`."""
        return self._compare.loss(outputs, soft_target, self.temperature)


@dataclass(frozen=True)
class LevelResult:
    """The result of one level for one batch.

    Attributes:
        level: the level, counted from 1.
        loss: the level's loss, not weighted; 0-d, detached.
        logits: (B, classes), detached; for a backbone its embedding or its feature maps.
        weight: weight of the level's loss in the sum.
    """

    level: int
    loss: Tensor
    logits: Any
    weight: float


class NestedTask(TrainingTask):  # type: ignore[misc]  # timm is not typed
    """The joint loss of all levels: L = sum_k a_k * [(1 - b_k) * task loss + b_k * distillation loss].

    Args:
        nested: the model to train.
        criterion: task loss of logits (B, classes) and targets; or one for each level, core first.
        weights: a_k by level, core first; they are scaled to sum 1. A level with weight 0 is not trained.
        distill: b_k by level, core first, in [0, 1]; set to 0 for the highest trained level if it is the
            only teacher, and learns from labels.
        teacher: provides the soft targets.
        sandwich: number of levels that a step trains: the lowest and the highest trained one, and levels
            between them, drawn uniformly (Yu and Huang, "Universally Slimmable Networks", ICCV 2019,
            section 3.2), whose weights are raised so that the expected loss stays the same. None trains all
            levels.
        autocast: makes the context of a forward pass, for reduced precision.
        device: the device that trains; None is the CPU.
        parents: by level, int64 (classes,): the level's class for each class of the data; levels that predict
            the classes of the data are left out. Targets and soft targets are summed over each coarse class.
        seed: together with `step` it determines which levels are drawn, the same ones in every process.
        compiled: whether to run the levels through torch.compile.
        recompute: whether to use gradient checkpointing.
        metric: what the levels are judged by. If they are compared with the original, targets are not used:
            every b_k must be 1, and a frozen network must teach.

    Attributes:
        step: number of the training step.
        seed: as given.
        highest: the highest level that is trained.
        compiled: the compiled levels; None if the levels are not compiled.
        metric: as given.
        predicted: classes that the frozen network predicts for the images of the last batch, (B,); None with
            labels, and of a backbone.
    """

    def __init__(
        self,
        nested: NestedModel,
        criterion: Criterion | Sequence[Criterion],
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
        metric: Metric = TOP1,
    ) -> None:
        super().__init__(device=device, verbose=False)
        n = nested.n_levels
        assert len(weights) == len(distill) == n
        assert not metric.is_comparison or (teacher.frozen is not None and set(distill) == {1.0})
        self.metric = metric
        self.predicted: Tensor | None = None
        self.trainable_module = nested
        self.criterion = criterion
        self.teacher = teacher
        self.autocast = autocast
        self.parents = {level: classes.to(device) for level, classes in parents.items()}
        self.n_levels = n
        self.level_weights = [weight / sum(weights) for weight in weights]
        self.distill = [0.0 if teacher.kind == "none" else share for share in distill]
        self.highest = max(level for level, weight in enumerate(weights, start=1) if weight)
        if teacher.kind == "self" and teacher.frozen is None:
            self.distill[self.highest - 1] = 0.0
        self.sandwich = n if sandwich is None else min(max(2, sandwich), n)
        self.step = 0
        self.compiled = CompiledLevels() if compiled else None
        self.seed = seed
        self._recompute = recompute
        # Not for compiled levels, because their programs take the level's tensors as inputs.
        self._holds_tensors = recompute and not compiled
        self._flat = FlatEntryCache()
        with self._recomputing():
            pass  # raise now rather than at the first step if timm does not support it

    def draw_levels(self) -> list[tuple[int, float]]:
        """Draw the levels of the current step; return them with their weights, full level first."""
        weights = {level: weight for level, weight in enumerate(self.level_weights, start=1) if weight}
        middle = list(weights)[1:-1]
        drawn = self.sandwich - 2
        if drawn < len(middle):
            draw = torch.Generator().manual_seed((self.seed * 1_000_003 + self.step) % 2**63)
            order = torch.randperm(len(middle), generator=draw).tolist()
            for i in order[:drawn]:
                weights[middle[i]] *= len(middle) / drawn
            for i in order[drawn:]:
                del weights[middle[i]]
        return sorted(weights.items(), reverse=True)

    def for_each_level(
        self,
        images: Tensor,
        target: Tensor,
        use: Callable[[Tensor, LevelResult, LevelTensors | None], None],
        *,
        separate: bool = False,
    ) -> None:
        """Run the levels of the current step in turn, and pass each loss and result to a function.

        Args:
            images: (B, C, H, W).
            target: (B,) class indices, or (B, classes) soft targets.
            use: receives the weighted loss, the result and the tensors of a level, and may run the backward
                pass.
            separate: whether the levels compute with `LevelTensors`, so that `use` must add their gradients.
        """
        with self.autocast():
            soft_target = self.teacher.predict(images) if any(self.distill) else None
        if self.metric is AGREEMENT:
            assert isinstance(soft_target, Tensor)
            self.predicted = soft_target.argmax(-1)

        nested = self.trainable_module

        def use_logits(level: int, weight: float, held: LevelTensors | None, logits: Any) -> None:
            nonlocal soft_target
            logits = each_tensor(logits, Tensor.float)
            level_soft_target = None if soft_target is None else self.to_level_classes(level, soft_target)
            loss = self._level_loss(level, logits, self.to_level_classes(level, target), level_soft_target)
            detached = each_tensor(logits, Tensor.detach)
            use(weight * loss, LevelResult(level, loss.detach(), detached, weight), held)
            if level == self.highest and self.teacher.uses_full_level:
                own = self.teacher.soften(logits)
                if soft_target is None or self.teacher.kind == "self":
                    soft_target = own
                else:
                    soft_target = tree_map(lambda one, other: (one + other) / 2, soft_target, own)

        for level, weight in self.draw_levels():
            held = LevelTensors(nested, level, images.device, self._flat) if separate else None
            lazy = not self._holds_tensors and self.compiled is None
            view = nested.view(level, images.device, lazy) if held is None else held.view
            if self._holds_tensors:
                forward_and_use(*view, images, partial(use_logits, level, weight, held), self.autocast)
                continue
            with self.autocast():
                if self.compiled is None:
                    logits = nested.run(*view, images)
                else:
                    logits = self.compiled.run(level, *view, images)
            use_logits(level, weight, held, logits)

    def to_level_classes(self, level: int, target: Tensor) -> Tensor:
        """Convert a target or soft target, (B,) or (B, classes), to the classes of a level."""
        classes = self.trainable_module.classes[level - 1]
        return coarse_target(target, self.parents.get(level), classes)

    def _level_loss(self, level: int, logits: Any, target: Tensor, soft_target: Any) -> Tensor:
        share = self.distill[level - 1]
        criterion = self.criterion if callable(self.criterion) else self.criterion[level - 1]
        if share == 0 or soft_target is None:
            return criterion(logits, target)
        distilled = self.teacher.loss(logits, soft_target)
        return distilled if share == 1 else (1 - share) * criterion(logits, target) + share * distilled

    def backward(
        self,
        images: Tensor,
        target: Tensor,
        scale: Callable[[Tensor], Tensor] = lambda loss: loss,
        run: Callable[[Tensor], object] = Tensor.backward,
        level_done: Callable[[int], None] | None = None,
    ) -> list[LevelResult]:
        """Run forward and backward of every level in turn, so that only one level's graph is in memory.

        Shared weights get the gradient of the weighted sum. A level's own tensors get the gradient of the
        level's unweighted loss, so they learn as fast as if the level were trained alone.

        Args:
            images: (B, C, H, W).
            target: (B,) class indices, or (B, classes) soft targets.
            scale: applied to a loss before its backward pass, for gradient scaling.
            run: runs a backward pass from the scaled loss, 0-d.
            level_done: called with a level as soon as its gradients have been added.

        Returns:
            The results of the levels that ran, full level first.
        """
        results = []

        def run_backward(loss: Tensor, result: LevelResult, held: LevelTensors | None) -> None:
            own = self.trainable_module.own_tensors(result.level).values()
            adding = nullcontext() if held is None else held.adding_gradients()
            with unweighted_gradients([t for t in own if t.requires_grad], result.weight), adding:
                run(scale(loss))
            results.append(result)
            if level_done is not None:
                level_done(result.level)

        with self._recomputing():
            self.for_each_level(images, target, run_backward, separate=images.device.type != "cpu")
        return results

    def _recomputing(self) -> AbstractContextManager[None]:
        return recompute_activations(self.trainable_module) if self._recompute else nullcontext()

    def forward(self, input: Tensor, target: Tensor) -> dict[str, Tensor]:
        """Return the weighted loss of all levels in one graph, as timm's training loops expect.

        Args:
            input: images (B, C, H, W).
            target: (B,) class indices, or (B, classes) soft targets.

        Returns:
            `loss`, 0-d, and `output`, the logits of the full level.
        """
        assert not self._holds_tensors, "a level must hold its tensors until its backward pass has ended"
        losses: list[Tensor] = []
        results: list[LevelResult] = []

        def collect(loss: Tensor, result: LevelResult, held: LevelTensors | None) -> None:
            losses.append(loss)
            results.append(result)

        self.for_each_level(input, target, collect)
        return {"loss": torch.stack(losses).sum(), "output": results[0].logits}
