"""What `nest`, `load_state_dict` and `save` refuse in a sentence, before a training is spoiled by it."""

import io
import pickle
import warnings
from copy import deepcopy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch
from torch import nn

import nestify
from nestify.compression.trainable import TrainableNestedModel
from nestify.errors import DivergedError, NestifyWarning, RecipeError

SHAPE = (3, 32, 32)


def small_model(classes: int = 3) -> nn.Module:
    model: nn.Module = timm.create_model("test_resnet", num_classes=classes)
    return model


def trained() -> nn.Module:
    """Return a model all of whose weights change its outputs."""
    model: nn.Module = timm.create_model("test_resnet", num_classes=3, zero_init_last=False)
    return model


def nest(model: nn.Module | None = None, levels: Any = "0.5,0", **options: Any) -> TrainableNestedModel:
    model = small_model() if model is None else model
    return nestify.nest(model, levels, **{"input_size": SHAPE, **options})


def test_a_teacher_shares_no_weight_with_the_model() -> None:
    """Its weights are frozen, so that the levels would not learn."""
    model = small_model()
    with pytest.raises(RecipeError, match=r"teacher shares weights .* copy\.deepcopy\(model\)"):
        nest(model, teacher=model)
    assert all(parameter.requires_grad for parameter in model.parameters())
    nest(model, teacher=deepcopy(model))


def test_a_teacher_predicts_the_classes_of_the_model() -> None:
    with pytest.raises(RecipeError, match="teacher predicts 5 classes, and the model 3"):
        nest(teacher=small_model(5))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_levels_are_trained_in_float32(dtype: torch.dtype) -> None:
    with pytest.raises(RecipeError, match=r"is b?float\d+, .* give model\.float\(\)"):
        nest(small_model().to(dtype))


def test_a_compiled_model_is_refused_with_the_remedy() -> None:
    with pytest.raises(RecipeError, match=r"torch\.compile; give .*_orig_mod"):
        nest(torch.compile(small_model()))  # type: ignore[arg-type]  # torch's own annotation


@pytest.mark.parametrize("schedule", ["weight", "channel"])
def test_tensors_that_cannot_be_trained(schedule: str) -> None:
    levels = "0.5,0" if schedule == "weight" else "0.5,1"
    model = small_model()
    with torch.inference_mode(), pytest.raises(RecipeError, match=r"torch\.inference_mode .* outside"):
        nest(model, levels, schedule=schedule)
    with torch.inference_mode():
        made_inside = small_model()
    with pytest.raises(RecipeError, match=r"torch\.inference_mode .* outside"):
        nest(made_inside, levels, schedule=schedule)
    nest(model, levels, schedule=schedule)


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_backward_pass_without_gradients(mode: type) -> None:
    nested = nest()
    batch = torch.randn(2, *SHAPE), torch.zeros(2, dtype=torch.long)
    with mode(), pytest.raises(RecipeError, match=r"torch\.no_grad and torch\.inference_mode .* outside"):
        nested.backward(*batch)
    nested.backward(*batch)


@pytest.mark.parametrize("schedule", ["channel", "layer"])
def test_pickled_traces_name_what_can_be_stored(schedule: str) -> None:
    model = timm.create_model("test_vit", num_classes=3, img_size=32)
    nested = nest(model, "0.5,1", schedule=schedule)
    for store in (pickle.dumps, lambda model: torch.save(model, io.BytesIO())):
        with pytest.raises(RecipeError, match=r"state_dict\(\).*nestify\.load"):
            store(nested)
    deepcopy(nested)


def test_a_copy_solves_its_budgets_for_its_own_weights() -> None:
    nested = nest(levels="macs=0.5,0", score="magnitude", ramp_steps=2)
    copy = deepcopy(nested)
    with torch.no_grad():  # so that other layers keep their weights, with other MACs
        for number, parameter in enumerate(copy.network.parameters()):
            parameter.mul_(1 + number)
    alone = nest(deepcopy(copy.network), "macs=0.5,0", score="magnitude", ramp_steps=2)
    for each in (nested, copy, alone):
        with warnings.catch_warnings():  # of layers that lose all weights
            warnings.simplefilter("ignore", NestifyWarning)
            each.update(2)
    assert copy.sparsity(1) == alone.sparsity(1) != nested.sparsity(1)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"ramp_steps": 0.5}, "ramp_steps = 0.5 is not a whole number"),
        ({"ramp_steps": "10"}, "ramp_steps = '10' is not a whole number"),
        ({"ramp_steps": True}, "ramp_steps = True is not a whole number"),
        ({"input_size": 32}, "input_size = 32 is not"),
        ({"input_size": (32, 32)}, r"input_size = \(32, 32\) is not"),
    ],
)
def test_arguments_of_other_types(options: dict[str, Any], words: str) -> None:
    with pytest.raises(RecipeError, match=words):
        nest(**options)


@pytest.mark.parametrize("given", [{}, {"images": []}, {"images": iter(())}])
def test_weights_are_ranked_by_their_effect_only_on_images(given: dict[str, Any]) -> None:
    with pytest.raises(RecipeError, match=r"fisher.* is measured on images.*give images"):
        nest(score="fisher", **given)


def test_weights_are_ranked_by_their_effect_if_there_are_images() -> None:
    images = [torch.randn(8, *SHAPE)]

    def entry(**given: Any) -> list[torch.Tensor]:
        torch.manual_seed(0)
        return list(nest(trained(), **given).entry_levels.tensors.values())

    def same(some: list[torch.Tensor], others: list[torch.Tensor]) -> bool:
        return all(torch.equal(one, other) for one, other in zip(some, others, strict=True))

    assert same(entry(), entry(score="lamp"))
    assert same(entry(images=images), entry(score="fisher", images=images))
    assert not same(entry(images=images), entry())


@pytest.mark.parametrize("levels", [np.array([0.5, 0.0]), torch.tensor([0.5, 0.0]), (x for x in (0.5, 0))])
def test_levels_may_be_any_sequence_of_numbers(levels: Any) -> None:
    assert nest(levels=levels).sparsity(1) == pytest.approx(0.5, abs=1e-4)


def test_the_state_of_other_levels_is_refused() -> None:
    with pytest.raises(RecipeError, match=r"not that of 3 levels .* by lamp; call nest"):
        nest(levels="0.9,0.5,0").load_state_dict(nest().state_dict())


def test_the_state_of_another_score_is_refused_within_the_ramp() -> None:
    measured = nest(trained(), images=[torch.randn(8, *SHAPE)], ramp_steps=9)
    by_size = nest(ramp_steps=9)
    for one, other in ((measured, by_size), (by_size, measured)):
        with pytest.raises(RecipeError, match=r"ranked by (lamp|fisher); call nest with the arguments"):
            one.load_state_dict(other.state_dict())


def test_levels_that_lack_a_layer_are_a_warning() -> None:
    with pytest.warns(NestifyWarning, match=r"level 1 \(level1\) has no weight left in .* and \d+ more"):
        nest(levels=[0.9999, 0.0], score="magnitude")
    nested = nest(levels=[0.9999, 0.0], score="magnitude", ramp_steps=2)
    with pytest.warns(NestifyWarning, match=r"level 1 \(level1\) has no weight left in"):
        nested.update(2)


def test_weights_without_effect_are_a_warning() -> None:
    with pytest.warns(NestifyWarning, match="weight tensors do not change the outputs, because a norm"):
        nest(images=[torch.randn(8, *SHAPE)])  # the last norm of each block starts at zero


def test_images_with_values_that_are_not_finite() -> None:
    images = torch.randn(8, *SHAPE)
    images[2, 1, 3, 5] = torch.nan
    with pytest.raises(DivergedError, match=r"weights or images have values that are not finite"):
        nest(images=[images])


@pytest.mark.parametrize(
    ("names", "words"),
    [
        ("abc", "'abc' is not a list of texts"),
        ([1, 2, 3], r"\[1, 2, 3\] is not a list of texts"),
        (["a", "b", "a"], "'a' twice"),
        (["a", "b"], "2 class names"),
    ],
)
def test_names_tell_the_classes_apart(names: Any, words: str, tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match=words):
        nest().save(tmp_path / "a.safetensors", names)
    assert list(tmp_path.iterdir()) == []


def test_a_diverged_model_is_not_saved(tmp_path: Path) -> None:
    nested = nest()
    with torch.no_grad():
        nested.network.get_parameter("fc.weight")[0, 0] = float("nan")
    with pytest.raises(DivergedError, match=r"level 1 \(level1\) returns values that are not finite"):
        nested.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
