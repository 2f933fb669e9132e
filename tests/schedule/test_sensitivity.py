"""Sensitivities equal closed forms of the Fisher information, and rank weights whatever their scale."""

from collections.abc import Iterator
from copy import deepcopy

import numpy as np
import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nestify.errors import DivergedError
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec, describe_model
from nestify.model.weight_facts import WeightFacts
from nestify.recipe.level_options import Score
from nestify.recipe.levels import Level, Pattern, parse_pattern
from nestify.recipe.recipe import checked_recipe
from nestify.schedule.nest import choose_weights, measure_if_needed
from nestify.schedule.sensitivity import (
    MOST_PIXELS,
    Meaning,
    _smoothed,
    checked_sensitivity,
    measure_sensitivity,
    weigh,
)
from nestify.schedule.weights import select_entry_levels

IMAGE = torch.tensor([0.5, -1.0, 2.0, 0.0])
"""An image of 1 x 2 x 2 pixels; nothing that multiplies with its last pixel matters."""


def linear(seed: int = 1) -> nn.Sequential:
    """Return a network of one linear layer with three outputs."""
    layer = nn.Linear(4, 3, bias=False)
    layer.weight.data.copy_(torch.tensor(np.random.default_rng(seed).normal(size=(3, 4))))
    return nn.Sequential(nn.Flatten(), layer)


def copies(count: int, size: int = 64) -> Iterator[Tensor]:
    """Yield `count` copies of the image, in batches."""
    for start in range(0, count, size):
        yield IMAGE.view(1, 1, 2, 2).expand(min(size, count - start), 1, 2, 2)


def seen_images(network: nn.Module) -> list[int]:
    """Return a list that grows by the number of images of each forward pass from now on."""
    counts: list[int] = []
    network.register_forward_pre_hook(lambda _, images: counts.append(len(images[0])))
    return counts


def expected(network: nn.Sequential, meaning: Meaning) -> np.ndarray:
    """Return the Fisher information of the layer's weights in closed form."""
    layer = network[1]
    assert isinstance(layer, nn.Linear)
    x = IMAGE.numpy()
    outputs = layer.weight.detach().numpy() @ x
    if meaning == "class":
        shares = np.exp(outputs) / np.exp(outputs).sum()
        variance = shares * (1 - shares)
    elif meaning == "labels":
        shares = 1 / (1 + np.exp(-outputs))
        variance = shares * (1 - shares)
    else:
        variance = np.full(3, 1 / np.mean(outputs**2))
    return np.outer(variance, x**2)


@pytest.mark.parametrize("meaning", ["class", "labels", "features"])
def test_a_linear_layer_has_the_information_of_the_closed_form(meaning: Meaning) -> None:
    network = linear()
    count = 16_000  # 4,000 passes: a standard error of about 2 %
    found = measure_sensitivity(network, ["1.weight"], copies(count), meaning, count)["1.weight"]
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), expected(network, meaning), rtol=0.15)
    assert not found[:, 3].any()


def test_several_feature_maps_add_up() -> None:
    class Twice(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.body = linear()

        def forward(self, images: Tensor) -> list[Tensor]:
            return [self.body(images), 10 * self.body(images)]

    found = measure_sensitivity(Twice(), ["body.1.weight"], copies(8000), "features", 8000)["body.1.weight"]
    # The second map is a multiple of the first, so that it tells as much; the draws are independent.
    np.testing.assert_allclose(found.numpy(), 2 * expected(linear(), "features"), rtol=0.2)


def test_nothing_changes_and_the_result_repeats() -> None:
    network = nn.Sequential(
        nn.Conv2d(1, 2, 1), nn.BatchNorm2d(2), nn.Dropout(0.5), nn.Flatten(), nn.Linear(8, 3)
    )
    network[4].weight.requires_grad_(False)
    network[2].eval()
    before, modes = deepcopy(network.state_dict()), [module.training for module in network.modules()]
    torch.manual_seed(5)
    following = torch.rand(3)
    torch.manual_seed(5)
    images = [torch.arange(12.0).view(3, 1, 2, 2), torch.ones(20, 1, 2, 2)]
    runs = [measure_sensitivity(network, ["0.weight", "4.weight"], images, "class") for _ in range(2)]
    assert torch.equal(torch.rand(3), following)
    assert [module.training for module in network.modules()] == modes
    assert [p.requires_grad for p in network.parameters()] == [True] * 4 + [False, True]
    assert all(p.grad is None for p in network.parameters())
    for name, tensor in network.state_dict().items():
        assert torch.equal(tensor, before[name])
    for name, sensitivity in runs[0].items():
        assert torch.equal(sensitivity, runs[1][name])
        assert bool((sensitivity > 0).any())


def test_what_a_model_keeps_in_eval_mode_is_dropped() -> None:
    """LeViT keeps a tensor that it computes from weights, which cannot be copied if it has gradients."""
    network = timm.create_model("levit_128s", num_classes=2).eval()
    images = torch.rand(1, 3, 224, 224)
    for _ in range(2):
        with torch.no_grad():
            logits = network(images)
        measure_sensitivity(network, ["head.linear.weight"], [images], "class")
        copy = deepcopy(network)
        assert not copy.training
        torch.testing.assert_close(copy(images), logits)


def test_a_recurrent_layer_is_measured_in_training_mode() -> None:
    """cuDNN has no backward pass of an LSTM in eval mode."""

    class Last(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.layer, self.modes = nn.LSTM(4, 3, batch_first=True), list[bool]()

        def forward(self, images: Tensor) -> Tensor:
            self.modes.append(self.layer.training)
            return self.layer(images.flatten(2))[0][:, -1]

    network = Last().eval()
    measured = measure_sensitivity(network, ["layer.weight_ih_l0"], list(copies(8)), "class")
    assert network.modes
    assert all(network.modes)
    assert not network.layer.training
    assert bool(measured["layer.weight_ih_l0"].any())


@pytest.mark.parametrize(("images", "seen"), [(1, 1), (8, 8), (13, 13), (500, 30)])
def test_as_many_images_are_used_as_there_should_be(images: int, seen: int) -> None:
    network = linear()
    counts = seen_images(network)
    measure_sensitivity(network, ["1.weight"], copies(30, 20), "class", images)
    assert sum(counts) == seen


def test_the_size_of_the_batches_does_not_matter() -> None:
    torch.manual_seed(0)
    network, images = linear(), torch.randn(40, 1, 2, 2)
    whole = measure_sensitivity(network, ["1.weight"], [images], "class")["1.weight"]
    for size in (1, 3, 8, 13):
        found = measure_sensitivity(network, ["1.weight"], images.split(size), "class")["1.weight"]
        assert torch.equal(found, whole)


def test_fewer_images_are_used_if_they_are_large() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1, stride=512), nn.Flatten())
    counts = seen_images(network)
    measure_sensitivity(network, ["0.weight"], [torch.ones(30, 1, 512, 512)], "class")
    assert sum(counts) == MOST_PIXELS // 512**2 == 16


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("meaning", ["class", "labels", "features"])
def test_values_that_are_not_finite_are_refused(value: float, meaning: Meaning) -> None:
    network, images = linear(), IMAGE.repeat(8, 1).view(8, 1, 2, 2)
    images[5, 0, 0, 0] = value
    found = measure_sensitivity(network, ["1.weight"], [images], meaning)
    with pytest.raises(
        DivergedError, match=r"the effect of 1\.weight .* check the checkpoint and the images"
    ):
        checked_sensitivity(found, pytest.fail)


def test_weights_without_any_effect_get_the_mean_of_the_others() -> None:
    problems: list[str] = []
    measured = {"a": torch.tensor([[1.0, 0.0]]), "b": torch.zeros(3, 2), "c": torch.tensor([2.0, 5.0])}
    found = checked_sensitivity(measured, problems.append)
    assert torch.equal(found["a"], measured["a"])
    assert torch.equal(found["c"], measured["c"])
    assert torch.equal(found["b"], torch.full((3, 2), 2.0))
    assert len(problems) == 1
    assert problems[0].startswith("b of 3 weight tensors do not change the outputs")
    nothing = checked_sensitivity({name: torch.zeros(2, 2) for name in "abc"}, problems.append)
    assert problems[1].startswith("a and 2 more of 3 ")
    assert all(bool((each == 1).all()) for each in nothing.values())


def test_images_of_several_sizes_are_measured() -> None:
    network = nn.Sequential(nn.Conv2d(1, 2, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    counts = seen_images(network)
    batches = [torch.randn(2, 1, 4, 4), torch.randn(3, 1, 6, 6), torch.randn(6, 1, 4, 4)]
    measure_sensitivity(network, ["0.weight"], batches, "class")
    assert counts == [2, 3, 4, 2]


def test_the_default_type_of_torch_does_not_matter() -> None:
    network, images = linear(), [torch.randn(16, 1, 2, 2)]
    usual = measure_sensitivity(network, ["1.weight"], images, "class")["1.weight"]
    torch.set_default_dtype(torch.float64)
    try:
        assert torch.equal(measure_sensitivity(network, ["1.weight"], images, "class")["1.weight"], usual)
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("model", ["test_vit", "test_resnet", "test_efficientnet"])
def test_the_only_output_is_measured_as_a_label(model: str) -> None:
    network = timm.create_model(model, num_classes=1)
    spec = describe_model(network)
    recipe = checked_recipe({"model": {"name": model}, "data": {"path": "x"}}, "", {"levels": "0.9,0"})
    images = [torch.randn(8, *spec.input_size)]
    found = measure_if_needed(network.eval(), spec, recipe, images, lambda _: None)
    expected = measure_sensitivity(network, list(found), images, "labels")
    assert all(torch.equal(found[name], each) for name, each in expected.items() if bool(each.any()))
    assert sum(bool(each.any()) for each in expected.values()) > len(expected) / 3


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999))
def test_no_layer_becomes_empty_if_its_weights_have_no_effect_or_are_zero(seed: int) -> None:
    rng = np.random.default_rng(seed)
    weights = {f"layer{i}": torch.tensor(rng.normal(size=(8, 6)), dtype=torch.float32) for i in range(4)}
    weights["layer1"].zero_()
    measured = {name: each.square() * torch.tensor(rng.gamma(0.5)) for name, each in weights.items()}
    measured["layer2"].zero_()
    levels = [Level("a", 0.9), Level("b", 0.5), Level("c", 0.0)]
    entry = select_entry_levels(
        weigh(weights, checked_sensitivity(measured, lambda _: None)), levels, "fisher"
    )
    assert all(bool((entry[name] == 1).any()) for name in weights)


def test_a_weight_that_does_nothing_has_none() -> None:
    network = linear()
    network.register_parameter("unused", nn.Parameter(torch.ones(2, 2)))
    found = measure_sensitivity(network, ["1.weight", "unused"], copies(64), "class")
    assert not found["unused"].any()


def nested_of(network: nn.Sequential, names: tuple[str, ...]) -> NestedModel:
    spec = ModelSpec("two", {}, 3, {"input_size": (1, 2, 2)}, (), (), names, frozenset(), {})
    return NestedModel(network, spec, ["a", "b", "c"])


LEVELS = [Level("a", 0.75), Level("b", 0.4), Level("c", 0.0)]


def chosen(network: nn.Sequential, names: tuple[str, ...], score: Score, images: Tensor) -> dict[str, Tensor]:
    nested = nested_of(network, names)
    nested.facts = WeightFacts(sensitivity=measure_sensitivity(network, names, [images], "class"))
    choose_weights(nested, LEVELS, score)
    return {name: entry.clone() for name, entry in nested.entry.items()}


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.integers(-3, 6))
def test_the_scale_of_a_layer_does_not_matter(seed: int, power: int) -> None:
    """With ReLU, one layer times c and the next over c is the same function, but has other magnitudes."""
    torch.manual_seed(seed)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 10, bias=False), nn.ReLU(), nn.Linear(10, 3, bias=False)
    )
    names, images = ("1.weight", "3.weight"), torch.randn(16, 1, 2, 2)
    scaled = deepcopy(network)
    scale = 2.0**power  # exact in floating point
    with torch.no_grad():
        scaled.get_parameter("1.weight").mul_(scale)
        scaled.get_parameter("3.weight").div_(scale)
    here, there = (chosen(each, names, "fisher", images) for each in (network, scaled))
    for name in names:
        assert torch.equal(here[name], there[name])
    if power == 6:
        here, there = (chosen(each, names, "magnitude", images) for each in (network, scaled))
        assert not all(torch.equal(here[name], there[name]) for name in names)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999))
def test_weights_are_ranked_as_by_numpy(seed: int) -> None:
    rng = np.random.default_rng(seed)
    network = nn.Sequential(
        nn.Flatten(), nn.Linear(4, 10, bias=False), nn.ReLU(), nn.Linear(10, 3, bias=False)
    )
    names, values, scores = ("1.weight", "3.weight"), {}, []
    for name, shape in zip(names, [(10, 4), (3, 10)], strict=True):
        values[name] = rng.normal(size=shape), rng.gamma(0.5, size=shape)
        network.get_parameter(name).data.copy_(torch.tensor(values[name][0]))
        saliency = (values[name][0] ** 2 * values[name][1]).ravel()
        not_smaller = np.array([saliency[saliency >= each].sum() for each in saliency])
        score = saliency / np.sqrt(not_smaller)
        score[saliency.argmax()] = np.inf  # no layer becomes empty
        scores.append(score)
    nested = nested_of(network, names)
    sensitivity = {name: torch.tensor(each[1], dtype=torch.float32) for name, each in values.items()}
    nested.facts = WeightFacts(sensitivity=sensitivity)
    choose_weights(nested, LEVELS, "fisher")
    rank = np.empty(70, dtype=int)
    rank[np.argsort(-np.concatenate(scores))] = np.arange(70)
    wanted = np.where(rank < round(70 * 0.25), 1, np.where(rank < round(70 * 0.6), 2, 3))
    found = torch.cat([nested.entry[name].flatten() for name in names]).numpy()
    np.testing.assert_array_equal(found, wanted)


@pytest.mark.parametrize("shape", [(3, 4), (4, 3, 3, 3), (6, 1, 3, 3), (1, 2)])
def test_smoothing_averages_with_the_product_of_the_means(shape: tuple[int, ...]) -> None:
    given = np.random.default_rng(1).gamma(0.5, size=shape)
    rows = given.reshape(shape[0], -1)
    product = np.outer(rows.mean(1), rows.mean(0)) / rows.mean()
    found = _smoothed(torch.tensor(given, dtype=torch.float32))
    np.testing.assert_allclose(found.numpy(), (given + product.reshape(shape)) / 2, rtol=1e-5)
    assert found.mean() == pytest.approx(given.mean(), rel=1e-5)
    assert not _smoothed(torch.zeros(shape)).any()


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from([Pattern(), parse_pattern("2x1")]))
def test_no_layer_becomes_empty(seed: int, pattern: Pattern) -> None:
    rng = np.random.default_rng(seed)
    weights = {
        f"layer{i}": torch.tensor(10.0**-i * rng.normal(size=(8, 6)), dtype=torch.float32) for i in range(4)
    }
    levels = [Level("a", 1 - 8 / 192, pattern), Level("b", 0.5, pattern), Level("c", 0.0)]
    entry = select_entry_levels(weights, levels, "fisher")
    assert all(bool((entry[name] == 1).any()) for name in weights)


@settings(deadline=None, max_examples=25)
@given(
    st.integers(0, 999),
    st.sampled_from([Pattern(), parse_pattern("2x1")]),
    st.sampled_from(["fisher", "lamp"]),
)
def test_no_layer_becomes_empty_where_its_best_weights_belong_to_higher_levels(
    seed: int, pattern: Pattern, score: Score
) -> None:
    """As where the core level is narrower, and sparse."""
    rng = np.random.default_rng(seed)
    weights, available = {}, {}
    for i in range(4):
        values = rng.normal(size=(8, 6)) * 10.0**-i
        values[:, 3:] *= 1000
        weights[f"layer{i}"] = torch.tensor(values, dtype=torch.float32)
        available[f"layer{i}"] = torch.tensor([[1, 1, 1, 2, 2, 2]] * 8, dtype=torch.uint8)
    levels = [Level("a", 1 - 8 / 96, pattern), Level("b", 0.9, pattern), Level("c", 0.0)]
    entry = select_entry_levels(weights, levels, score, available)
    assert all(bool((entry[name] == 1).any()) for name in weights)


def test_weighed_weights_have_the_saliency_as_their_square() -> None:
    weights, sensitivity = {"w": torch.tensor([[3.0, -2.0]])}, {"w": torch.tensor([[4.0, 0.25]])}
    assert torch.equal(weigh(weights, sensitivity)["w"], torch.tensor([[6.0, -1.0]]))
