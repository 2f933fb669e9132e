"""Refitted levels: a layer alone equals NumPy's least squares, and models keep what they must keep."""

from collections.abc import Callable, Generator
from copy import deepcopy
from itertools import pairwise

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from nestify.model.batch_norm import recalibrate
from nestify.model.entry_levels import EntryLevels
from nestify.model.graph.block_map import map_blocks
from nestify.model.graph.channel_map import map_channels
from nestify.model.level_sizes import LevelSizes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec, describe_model
from nestify.recipe.levels import Level
from nestify.schedule.channels import channel_counts
from nestify.schedule.layer_calls import LayerCall
from nestify.schedule.refit import PROTECT, _LevelFit, refit
from nestify.schedule.weights import select_entry_levels

MakeModel = Callable[..., nn.Module]


def one_layer(groups: int, seed: int = 1) -> NestedModel:
    """Return three sparse levels of a single convolution, whose input is a 6 x 5 image."""
    rng = np.random.default_rng(seed)
    network = nn.Sequential(nn.Conv2d(3, 6, 3, groups=groups, bias=False), nn.Flatten())
    data = {"input_size": (3, 6, 5)}
    spec = ModelSpec("one", {}, 72, data, (), (), ("0.weight",), frozenset(), {})
    entry = torch.tensor(rng.integers(1, 5, size=(6, 3 // groups, 3, 3)), dtype=torch.uint8)
    return NestedModel(network, spec, ["a", "b", "c"], entry=EntryLevels(3, {"0.weight": entry}))


def columns(images: Tensor) -> np.ndarray:
    """Return the patches (positions, 27) of a convolution of 3 x 3, by slicing."""
    x = images.numpy()
    patches = [
        x[b, :, i : i + 3, j : j + 3].ravel() for b in range(len(x)) for i in range(4) for j in range(3)
    ]
    return np.stack(patches).astype(np.float64)


@pytest.mark.parametrize("groups", [1, 3])
@pytest.mark.parametrize("protect", [0.0, 10.0])
def test_one_layer_is_numpys_least_squares(
    protect: float, groups: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Level by level: the own weights around the lower ones, the full level's error stacked below."""
    monkeypatch.setattr("nestify.schedule.refit.RIDGE", 0.0)
    monkeypatch.setattr("nestify.schedule.refit.ITERATIONS", 200)
    nested, images = one_layer(groups), torch.randn(30, 3, 6, 5)
    entry = nested.entry["0.weight"].numpy().reshape(6, -1)
    original = nested.shared_tensor("0.weight").detach().numpy().reshape(6, -1).astype(np.float64)
    patches = columns(images).reshape(-1, groups, 27 // groups)
    expected = original.copy()
    for level in (1, 2, 3):
        for row in range(6):
            x = patches[:, row * groups // 6]
            weigh = np.sqrt(protect) if level < 3 else 0.0
            lower, free = entry[row] < level, (entry[row] >= level) & (entry[row] <= 3)
            if not weigh:
                free = entry[row] == level
            above = free & (entry[row] > level)
            rows = np.concatenate([np.where(above, 0, x)[:, free], weigh * x[:, free]])
            rest = x @ original[row] - x[:, lower] @ expected[row, lower]
            found = np.linalg.lstsq(rows, np.concatenate([rest, weigh * rest]), rcond=None)[0]
            solution = expected[row].copy()
            solution[free] = found
            expected[row] = np.where(entry[row] == level, solution, expected[row])
    done = refit(nested, images, protect)
    assert done.fitted == ["0.weight"]
    assert done.left == []
    weight = nested.shared_tensor("0.weight").detach().numpy().reshape(6, -1)
    np.testing.assert_allclose(weight, expected, atol=2e-3)


def sparse(network: nn.Module, sparsities: tuple[float, ...]) -> NestedModel:
    levels = [Level(f"l{k}", value) for k, value in enumerate(sparsities)]
    nested = NestedModel(network, describe_model(network, (3, 64, 64)), [level.name for level in levels])
    weights = {name: nested.shared_tensor(name) for name in nested.entry}
    nested.set_entry_levels(select_entry_levels(weights, levels))
    return nested.eval()


def narrow(network: nn.Module, widths: tuple[float, ...]) -> NestedModel:
    channels = map_channels(network.eval(), (3, 64, 64))
    levels = [Level(f"l{k}", 0.0, width=value) for k, value in enumerate(widths)]
    counts = tuple(channel_counts(channels.groups, levels, 8))
    sizes = LevelSizes(channels, map_blocks(channels), counts, (frozenset(),) * len(counts))
    spec = describe_model(network, (3, 64, 64))
    names = [level.name for level in levels]
    return NestedModel(network, spec, names, masked=(), level_sizes=sizes).eval()


def used_by_core(nested: NestedModel) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in nested.projection(1).items()}


SPARSITIES, WIDTHS = ((0.9, 0.5, 0.0), (0.9, 0.2, 0.0)), ((0.25, 0.5, 1.0), (0.25, 0.75, 1.0))


@pytest.mark.parametrize(
    ("name", "make", "sizes"),
    [
        ("test_resnet", sparse, SPARSITIES),
        pytest.param("test_efficientnet", narrow, WIDTHS, marks=pytest.mark.long),
        pytest.param("test_vit", narrow, WIDTHS, marks=pytest.mark.long),
        pytest.param("test_resnet", narrow, WIDTHS, marks=pytest.mark.long),
        pytest.param("test_efficientnet", sparse, SPARSITIES, marks=pytest.mark.long),
        pytest.param("test_vit", sparse, SPARSITIES, marks=pytest.mark.long),
    ],
)
def test_lower_levels_do_not_depend_on_the_levels_above(
    make_model: MakeModel,
    name: str,
    make: Callable[[nn.Module, tuple[float, ...]], NestedModel],
    sizes: tuple[tuple[float, ...], ...],
) -> None:
    """Two files with the same core and full level have the same core, whatever lies between."""
    images = torch.randn(8, 3, 64, 64)
    cores, entries = [], []
    options = {"img_size": 64} if name == "test_vit" else {}
    for values in sizes:
        torch.manual_seed(0)
        nested = make(make_model(name, **options), values)
        before = {key: tensor.clone() for key, tensor in nested.entry.items()}
        original = used_by_core(nested)
        done = refit(nested, images)
        assert done.left == []
        assert all(torch.equal(before[key], tensor) for key, tensor in nested.entry.items())
        cores.append(used_by_core(nested))
        entries.append(done.fitted)
        changed = [key for key, tensor in original.items() if not torch.equal(tensor, cores[-1][key])]
        assert set(changed) <= set(done.fitted)
        assert len(changed) > 0.5 * len(done.fitted)
    assert cores[0].keys() == cores[1].keys()
    for key, tensor in cores[0].items():
        torch.testing.assert_close(tensor, cores[1][key], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    ("name", "make", "sizes"),
    [
        ("test_resnet", sparse, (0.7, 0.0)),
        ("test_efficientnet", narrow, (0.5, 1.0)),
        pytest.param("test_resnet", narrow, (0.5, 1.0), marks=pytest.mark.long),
        pytest.param("test_efficientnet", sparse, (0.7, 0.0), marks=pytest.mark.long),
    ],
)
def test_a_level_comes_nearer_to_the_original(
    make_model: MakeModel,
    name: str,
    make: Callable[[nn.Module, tuple[float, ...]], NestedModel],
    sizes: tuple[float, ...],
) -> None:
    """Without protection, the core level's logits of the images; depthwise layers and gates included."""
    network = make_model(name).eval()
    with torch.no_grad():
        for key, parameter in network.named_parameters():  # timm begins with residual branches of 0
            if key.endswith("bn2.weight") or key.endswith("bn3.weight"):
                parameter.fill_(1)
    recalibrate(network, [torch.randn(64, 3, 64, 64)], 1)
    nested = make(network, sizes)
    images = torch.randn(64, 3, 64, 64)

    def logits(level: int) -> Tensor:
        plain = nested.at_level(level)
        if level == 1:
            recalibrate(plain, [images], 1)
        out: Tensor = plain(images)
        return out

    with torch.no_grad():
        wanted = logits(2)
        before = (logits(1) - wanted).norm()
        refit(nested, images, protect=0.0)
        after = (logits(1) - wanted).norm()
    assert after < 0.5 * before


def test_models_without_smaller_levels_stay(make_model: MakeModel) -> None:
    nested = sparse(make_model("test_resnet"), (0.0,))
    before = {name: tensor.clone() for name, tensor in nested.shared_tensors().items()}
    refit(nested, torch.randn(4, 3, 64, 64))
    for name, tensor in nested.shared_tensors().items():
        torch.testing.assert_close(tensor, before[name], rtol=1e-3, atol=1e-4)


@settings(deadline=None, max_examples=25)
@given(st.integers(0, 999), st.sampled_from([1, 3]), st.sampled_from([0.0, 10.0]))
def test_each_level_changes_its_own_weights_only(seed: int, groups: int, protect: float) -> None:
    """So the lower levels keep what they compute; weights that no level uses stay as well."""
    torch.manual_seed(seed)
    nested = one_layer(groups, seed)
    weight, entry = nested.shared_tensor("0.weight"), nested.entry["0.weight"].clone()
    fit_level, states = _LevelFit.run, [weight.detach().clone()]

    def run(self: _LevelFit, images: Tensor) -> Generator[tuple[str, Tensor], None, None]:
        if self.level > 1:
            states.append(weight.detach().clone())
        return fit_level(self, images)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(_LevelFit, "run", run)
        refit(nested, torch.randn(10, 3, 6, 5), protect)
    states.append(weight.detach().clone())
    assert len(states) == 4
    for level, (before, after) in enumerate(pairwise(states), start=1):
        assert torch.equal(before[entry != level], after[entry != level])
    assert not torch.equal(states[0], states[1])


@pytest.mark.parametrize(
    ("make", "sizes"),
    [
        # of the same levels, the core is compared above
        pytest.param(sparse, (0.9, 0.5, 0.0), marks=pytest.mark.long),
        (narrow, (0.25, 0.5, 1.0)),
    ],
)
def test_lower_levels_compute_the_same_after_later_fits(
    make_model: MakeModel,
    make: Callable[[nn.Module, tuple[float, ...]], NestedModel],
    sizes: tuple[float, ...],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    torch.manual_seed(0)
    nested, images = make(make_model("test_resnet"), sizes), torch.randn(8, 3, 64, 64)
    fit_level, logits = _LevelFit.run, {}

    def run(self: _LevelFit, batch: Tensor) -> Generator[tuple[str, Tensor], None, None]:
        if self.level > 1:
            logits[self.level - 1] = nested.at_level(self.level - 1)(images)
        return fit_level(self, batch)

    monkeypatch.setattr(_LevelFit, "run", run)
    refit(nested, images)
    assert list(logits) == [1, 2]
    for level, before in logits.items():
        torch.testing.assert_close(nested.at_level(level)(images), before, rtol=1e-5, atol=1e-5)


def test_layers_that_all_levels_share_stay(make_model: MakeModel) -> None:
    """No level above could make up for a change, so that it would cost the full level."""
    nested = sparse(make_model("test_resnet"), (0.9, 0.0))
    shared = nested.entry["fc.weight"]
    shared.fill_(1)
    before = nested.shared_tensor("fc.weight").detach().clone()
    done = refit(nested, torch.randn(8, 3, 64, 64))
    assert torch.equal(nested.shared_tensor("fc.weight"), before)
    assert "fc.weight" not in [*done.fitted, *done.left]


def test_protection_keeps_the_full_level_near_the_original(make_model: MakeModel) -> None:
    """Its logits of other images than the fitted ones move less."""
    images, others = torch.randn(16, 3, 64, 64), torch.randn(16, 3, 64, 64)
    torch.manual_seed(0)
    network = make_model("test_resnet").eval()
    distances = []
    for protect in (0.0, PROTECT):
        nested = narrow(deepcopy(network), (0.25, 1.0))
        with torch.no_grad():
            wanted = nested.at_level(2)(others)
            refit(nested, images, protect)
            distances.append(float((nested.at_level(2)(others) - wanted).norm()))
    assert 0 < distances[1] < 0.8 * distances[0]


def test_columns_are_made_of_a_few_images_at_a_time(
    make_model: MakeModel, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The memory of the columns is bounded, and the weights do not depend on the bound."""
    weights, images = [], torch.randn(6, 3, 6, 5)  # at most 64 positions: all are used
    sizes: list[int] = []
    make_columns = LayerCall.columns

    def columns(self: LayerCall, positions: int, seed: int) -> Tensor:
        sizes.append(make_columns(self, positions, seed).numel())
        return make_columns(self, positions, seed)

    monkeypatch.setattr(LayerCall, "columns", columns)
    for most in (2**30, 64 * 27 * 3):
        monkeypatch.setattr("nestify.schedule.refit.MOST_NUMBERS", most)
        sizes.clear()
        nested = one_layer(1)
        weight = nested.shared_tensor("0.weight")
        with torch.no_grad():
            weight.copy_(torch.linspace(-1, 1, weight.numel()).view(weight.shape))
        refit(nested, images)
        assert max(sizes) <= most
        weights.append(weight.detach().clone())
    assert len(sizes) > 6
    torch.testing.assert_close(weights[0], weights[1], rtol=1e-3, atol=1e-4)
