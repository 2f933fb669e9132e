"""Gradient checkpointing gives the same gradients with less memory."""

from collections.abc import Callable
from copy import deepcopy

import pytest
import torch
from torch import nn

from nestify.errors import UnsupportedModelError
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.levels import Level
from nestify.schedule.weights import select_entry_levels
from nestify.training.task import NestedTask, Teacher
from tests.model.test_level_sizes import narrow_model

MakeModel = Callable[..., nn.Module]


def masked(model: nn.Module) -> NestedModel:
    nested = NestedModel(model, describe_model(model), ["a", "b", "c"])
    levels = [Level("a", 0.9), Level("b", 0.5), Level("c", 0.0)]
    weights = {name: nested.shared_tensor(name) for name in nested.entry}
    nested.set_entry_levels(select_entry_levels(weights, levels))
    return nested


def gradients(nested: NestedModel, recompute: bool, **options: object) -> dict[str, torch.Tensor]:
    """Return the gradients of one step of a copy, with the teacher `both`."""
    nested = deepcopy(nested).train()
    task = NestedTask(
        nested,
        nn.CrossEntropyLoss(),
        weights=range(1, nested.n_levels + 1),
        distill=[0.5] * nested.n_levels,
        teacher=Teacher("both", deepcopy(nested.network).eval(), mean=(0.5,) * 3, std=(0.5,) * 3),
        recompute=recompute,
        **options,  # type: ignore[arg-type]
    )
    generator = torch.Generator().manual_seed(0)
    images = torch.randn(6, *nested.spec.input_size, generator=generator)
    task.backward(images, torch.arange(6))
    assert not getattr(nested.network, "grad_checkpointing", False)
    return {name: p.grad for name, p in nested.named_parameters() if p.grad is not None}


@pytest.mark.parametrize(
    "architecture", ["test_vit", "test_resnet", pytest.param("test_convnext", marks=pytest.mark.long)]
)
def test_gradients_are_the_same_as_without_checkpointing(architecture: str, make_model: MakeModel) -> None:
    size = {"img_size": 32} if architecture == "test_vit" else {}
    nested = masked(make_model(architecture, **size))
    expected = gradients(nested, recompute=False)
    found = gradients(nested, recompute=True)
    assert found.keys() == expected.keys()
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_reduced_precision_applies_to_the_forward_pass_only(make_model: MakeModel) -> None:
    nested = masked(make_model("test_vit", img_size=32))

    def bfloat16() -> torch.autocast:
        return torch.autocast("cpu", torch.bfloat16)

    expected = gradients(nested, recompute=False, autocast=bfloat16)
    found = gradients(nested, recompute=True, autocast=bfloat16)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-2, atol=1e-4, msg=name)


def test_gradients_of_narrower_levels() -> None:
    nested = narrow_model("test_resnet", (0.5, 1.0))
    expected = gradients(nested, recompute=False)
    found = gradients(nested, recompute=True)
    for name, gradient in expected.items():
        torch.testing.assert_close(found[name], gradient, rtol=1e-4, atol=1e-6, msg=name)


def test_fewer_activations_are_stored(make_model: MakeModel) -> None:
    def stored_bytes(recompute: bool) -> int:
        """Return the bytes that autograd stores for the full level."""
        nested = masked(make_model("test_vit", img_size=32)).train()
        task = NestedTask(
            nested,
            nn.CrossEntropyLoss(),
            weights=[0, 0, 1],
            distill=[0] * 3,
            teacher=Teacher("none"),
            recompute=recompute,
        )
        own = {tensor.untyped_storage().data_ptr() for tensor in nested.state_dict().values()}
        seen: dict[int, int] = {}

        def record(tensor: torch.Tensor) -> torch.Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in own:
                seen[storage.data_ptr()] = storage.nbytes()
            return tensor

        images = torch.randn(16, *nested.spec.input_size)
        hooks = torch.autograd.graph.saved_tensors_hooks(record, lambda tensor: tensor)
        with hooks, task._recomputing():
            task.for_each_level(images, torch.arange(16) % 10, lambda *_: None)
        return sum(seen.values())

    assert stored_bytes(True) < stored_bytes(False) / 2


def test_a_model_without_gradient_checkpointing_is_refused(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    nested = masked(make_model("test_vit", img_size=32))

    def refuse(enable: bool) -> None:
        if enable:
            raise AssertionError("gradient checkpointing not supported")

    monkeypatch.setattr(nested.network, "set_grad_checkpointing", refuse)
    with pytest.raises(UnsupportedModelError, match=r"for test_vit \(gradient .*\); leave it out"):
        gradients(nested, recompute=True)
