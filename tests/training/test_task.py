"""The joint loss, compared with its equation computed with one plain model per level."""

from collections.abc import Callable

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import nn
from torch.nn import functional

from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.levels import Level
from nestify.recipe.metric import AGREEMENT
from nestify.schedule.weights import select_entry_levels
from nestify.training.task import NestedTask, Teacher, TeacherKind

MakeModel = Callable[..., nn.Module]
WEIGHTS = [2.0, 1.0, 1.0]
DISTILL = [0.25, 1.0, 0.5]


@pytest.fixture
def nested(make_model: MakeModel) -> NestedModel:
    model = make_model("test_vit", img_size=32)  # no batch norm: eval and training mode agree
    names = ["a", "b", "c"]
    nested = NestedModel(model, describe_model(model), names)
    levels = [Level("a", 0.9), Level("b", 0.5), Level("c", 0.0)]
    nested.set_entry_levels(
        select_entry_levels({name: nested.shared_tensor(name) for name in nested.entry}, levels)
    )
    return nested


@pytest.fixture
def batch() -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 9, 3])


def make_task(
    nested: NestedModel, kind: TeacherKind, frozen: nn.Module | None, **options: object
) -> NestedTask:
    teacher = Teacher(kind, frozen, mean=(0.5,) * 3, std=(0.5,) * 3, temperature=2.0)
    return NestedTask(
        nested,
        nn.CrossEntropyLoss(),
        weights=WEIGHTS,
        distill=DISTILL,
        teacher=teacher,
        **options,  # type: ignore[arg-type]
    )


@pytest.mark.parametrize("kind", ["none", "original", "self", "both", "other"])
def test_loss_is_the_weighted_sum_over_levels(
    kind: TeacherKind, nested: NestedModel, batch: tuple[torch.Tensor, torch.Tensor], make_model: MakeModel
) -> None:
    frozen = make_model("test_vit", img_size=32) if kind in ("original", "both", "other") else None
    images, target = batch
    loss = make_task(nested, kind, frozen)(images, target)["loss"]

    logits = [nested.at_level(k)(images) for k in (1, 2, 3)]
    teacher = None if frozen is None else (frozen.eval()(images) / 2).softmax(-1)
    own = (logits[2] / 2).softmax(-1)
    lower = {"none": None, "original": teacher, "other": teacher, "self": own}.get(
        kind, None if teacher is None else (teacher + own) / 2
    )
    shares = {"none": [0.0] * 3, "self": [*DISTILL[:2], 0.0]}.get(kind, DISTILL)
    expected = torch.tensor(0.0)
    for k, weight in enumerate(WEIGHTS):
        soft = teacher if k == 2 else lower  # the full level cannot learn from itself
        value = (1 - shares[k]) * functional.cross_entropy(logits[k], target)
        if shares[k]:
            assert soft is not None
            divergence = (soft * (soft.log() - (logits[k] / 2).log_softmax(-1))).sum(-1).mean() * 4
            value = value + shares[k] * divergence
        expected = expected + weight / 4 * value
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("kind", ["original", "self", "both", "other"])
def test_without_labels_the_targets_do_not_matter(
    kind: TeacherKind, nested: NestedModel, batch: tuple[torch.Tensor, torch.Tensor], make_model: MakeModel
) -> None:
    frozen = make_model("test_vit", img_size=32)
    images, target = batch
    task = NestedTask(
        nested,
        nn.CrossEntropyLoss(),
        weights=WEIGHTS,
        distill=[1.0] * 3,
        teacher=Teacher(kind, frozen, mean=(0.5,) * 3, std=(0.5,) * 3, temperature=2.0),
        metric=AGREEMENT,
    )
    loss = task(images, target)["loss"]
    torch.testing.assert_close(loss, task(images, (target + 1) % 10)["loss"], rtol=0, atol=0)

    logits = [nested.at_level(k)(images) for k in (1, 2, 3)]
    original, own = (frozen.eval()(images) / 2).softmax(-1), (logits[2] / 2).softmax(-1)
    lower = {"self": own, "both": (original + own) / 2}.get(kind, original)
    expected = torch.tensor(0.0)
    for k, weight in enumerate(WEIGHTS):
        soft = original if k == 2 else lower  # the full level always learns from the original
        divergence = (soft * (soft.log() - (logits[k] / 2).log_softmax(-1))).sum(-1).mean() * 4
        expected = expected + weight / 4 * divergence
    torch.testing.assert_close(loss, expected, rtol=1e-4, atol=1e-5)
    assert task.predicted is not None
    assert task.predicted.tolist() == original.argmax(-1).tolist()


@pytest.mark.parametrize("soft", [False, True])
def test_targets_of_a_level_with_coarser_classes_are_sums_over_classes(
    soft: bool, batch: tuple[torch.Tensor, torch.Tensor], make_model: MakeModel
) -> None:
    model = make_model("test_vit", img_size=32)
    nested = NestedModel(model, describe_model(model), ["a", "b"], classes=[3, 10])
    nn.init.normal_(nested.own_tensors(1)["head.weight"])
    parents = torch.tensor([0, 1, 1, 2, 0, 2, 2, 0, 1, 2])
    frozen = make_model("test_vit", img_size=32)
    images, target = batch
    if soft:
        target = torch.rand(4, 10).softmax(-1)
    task = NestedTask(
        nested,
        nn.CrossEntropyLoss(),
        weights=[1.0, 3.0],
        distill=[0.25, 0.0],
        teacher=Teacher("other", frozen, mean=(0.5,) * 3, std=(0.5,) * 3),
        parents={1: parents},
    )
    member = functional.one_hot(parents).float()  # (classes, coarse)
    core, full = nested.at_level(1)(images), nested.at_level(2)(images)
    soft_target = frozen.eval()(images).softmax(-1) @ member
    coarse_target = target @ member if soft else parents[target]
    divergence = (soft_target * (soft_target.log() - core.log_softmax(-1))).sum(-1).mean()
    first = 0.75 * functional.cross_entropy(core, coarse_target) + 0.25 * divergence
    expected = 0.25 * first + 0.75 * functional.cross_entropy(full, target)
    torch.testing.assert_close(task(images, target)["loss"], expected, rtol=1e-4, atol=1e-5)


def test_backward_per_level_gives_the_gradient_of_the_sum(
    nested: NestedModel, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    task = make_task(nested, "self", None)
    task(*batch)["loss"].backward()
    expected = {name: p.grad.clone() for name, p in nested.named_parameters() if p.grad is not None}
    nested.zero_grad()
    results = task.backward(*batch)
    assert [result.level for result in results] == [3, 2, 1]
    assert expected
    for name, parameter in nested.named_parameters():
        if name in expected:
            assert parameter.grad is not None
            torch.testing.assert_close(parameter.grad, expected[name], rtol=1e-4, atol=1e-6)


def test_own_tensors_of_a_level_get_the_gradient_of_its_unweighted_loss(make_model: MakeModel) -> None:
    model = make_model("test_resnet").eval()  # so that batch-norm statistics do not change
    nested = NestedModel(model, describe_model(model), ["a", "b"], classes=[10, 10]).eval()
    task = NestedTask(
        nested, nn.CrossEntropyLoss(), weights=[1.0, 3.0], distill=[0.0, 0.0], teacher=Teacher("none")
    )
    batches = [(torch.randn(4, 3, 32, 32), torch.tensor([0, 3, 9, 3])) for _ in range(2)]
    for batch in batches:  # gradients are accumulated
        task.backward(*batch)
    for level in (1, 2):
        plain = nested.at_level(level)
        sum(functional.cross_entropy(plain(images), target) for images, target in batches).backward()  # type: ignore[union-attr]
        own = nested.own_tensors(level)
        trained = [name for name, tensor in own.items() if isinstance(tensor, nn.Parameter)]
        assert set(nested.heads) < set(trained)
        for name in trained:
            torch.testing.assert_close(own[name].grad, plain.get_parameter(name).grad, rtol=1e-3, atol=1e-5)
    first, second = (nested.at_level(level) for level in (1, 2))
    for weight, plain in ((0.25, first), (0.75, second)):
        total = sum(functional.cross_entropy(plain(images), target) for images, target in batches)
        (weight * total).backward()  # type: ignore[union-attr]
    shared = first.conv1[0].weight.grad + second.conv1[0].weight.grad
    torch.testing.assert_close(nested.shared_tensor("conv1.0.weight").grad, shared, rtol=1e-3, atol=1e-5)


def test_teacher_sees_images_in_its_own_normalisation(make_model: MakeModel) -> None:
    frozen = make_model("test_vit", img_size=32).eval()
    frozen.pretrained_cfg = {"mean": (0.1, 0.2, 0.3), "std": (0.5, 0.25, 0.5)}  # type: ignore[assignment]
    teacher = Teacher("other", frozen, mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    pixels = torch.rand(2, 3, 32, 32)
    soft_target = teacher.predict((pixels - 0.5) / 0.5)
    mean, std = torch.tensor([0.1, 0.2, 0.3]), torch.tensor([0.5, 0.25, 0.5])
    expected = frozen((pixels - mean.view(3, 1, 1)) / std.view(3, 1, 1)).softmax(-1)
    assert soft_target is not None
    torch.testing.assert_close(soft_target, expected, rtol=1e-4, atol=1e-6)


def test_teacher_stays_frozen_and_in_eval_mode(nested: NestedModel, make_model: MakeModel) -> None:
    task = make_task(nested, "original", make_model("test_resnet"))
    task.train()
    assert not task.teacher.training
    assert task.teacher.frozen is not None
    assert not any(module.training for module in task.teacher.modules())
    assert not any(parameter.requires_grad for parameter in task.teacher.parameters())


def test_sandwich_always_trains_core_and_full_and_keeps_the_expected_weight(make_model: MakeModel) -> None:
    model = make_model("test_vit", img_size=32)
    nested = NestedModel(model, describe_model(model), list("abcdef"))
    task = NestedTask(
        nested,
        nn.CrossEntropyLoss(),
        weights=[1.0] * 6,
        distill=[0.0] * 6,
        teacher=Teacher("none"),
        sandwich=4,
    )
    totals = dict.fromkeys(range(1, 7), 0.0)
    draws = 4000
    for task.step in range(draws):
        drawn = task.draw_levels()
        assert drawn == task.draw_levels()  # every process of a run draws the same
        levels = [level for level, _ in drawn]
        assert len(set(levels)) == len(levels) == 4
        assert levels[0] == 6
        assert levels[-1] == 1
        assert levels == sorted(levels, reverse=True)
        for level, weight in drawn:
            totals[level] += weight / draws
    for level in totals:
        assert totals[level] == pytest.approx(1 / 6, rel=0.1)


@given(data=st.data())
@settings(max_examples=30, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_step_draws_among_the_levels_that_are_trained(make_model: MakeModel, data: st.DataObject) -> None:
    """Frozen levels, and those without weight in the loss, take no place: some are trained at every step."""
    model = make_model("test_vit", img_size=32)
    weights = data.draw(st.lists(st.sampled_from([0.0, 1.0, 2.0]), min_size=1, max_size=6).filter(any))
    sandwich = data.draw(st.integers(2, 6))
    nested = NestedModel(model, describe_model(model), [f"level{k}" for k in range(len(weights))])
    task = NestedTask(
        nested,
        nn.CrossEntropyLoss(),
        weights=weights,
        distill=[0.0] * len(weights),
        teacher=Teacher("none"),
        sandwich=sandwich,
    )
    trained = [level for level, weight in enumerate(weights, start=1) if weight]
    seen = set[int]()
    for task.step in range(60):
        levels = [level for level, _ in task.draw_levels()]
        assert levels == sorted(set(levels), reverse=True)
        assert len(levels) == min(sandwich, len(trained))
        assert {trained[0], trained[-1]} <= set(levels) <= set(trained)
        seen |= set(levels)
    assert seen == (set(trained) if sandwich > 2 else {trained[0], trained[-1]})


@pytest.mark.parametrize("trained", [1, 2, 3])
def test_a_level_of_weight_0_is_not_trained(
    trained: int, nested: NestedModel, batch: tuple[torch.Tensor, torch.Tensor]
) -> None:
    images, target = batch
    task = NestedTask(
        nested,
        nn.CrossEntropyLoss(),
        weights=[float(k == trained) for k in (1, 2, 3)],
        distill=[0.0] * 3,
        teacher=Teacher("none"),
    )
    results = task.backward(images, target)
    assert [result.level for result in results] == [trained]
    alone = nested.at_level(trained)
    functional.cross_entropy(alone(images), target).backward()
    mask = nested.entry_levels["blocks.0.mlp.fc1.weight"] <= trained
    expected = alone.get_parameter("blocks.0.mlp.fc1.weight").grad
    assert expected is not None
    torch.testing.assert_close(nested.network.get_parameter("blocks.0.mlp.fc1.weight").grad, expected * mask)
