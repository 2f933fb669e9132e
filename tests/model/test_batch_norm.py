"""The tensors that a level owns, and recalibrated statistics compared with NumPy."""

from collections.abc import Callable

import numpy as np
import pytest
import torch
from torch import nn

from nestify.errors import DataError
from nestify.model.batch_norm import (
    join_single_images,
    norms_over_images,
    own_names,
    recalibrate,
    relate_statistics,
)

MakeModel = Callable[..., nn.Module]


def test_only_batch_norm_is_private(make_model: MakeModel) -> None:
    model = make_model("test_resnet")
    norms = [name for name, module in model.named_modules() if isinstance(module, nn.BatchNorm2d)]
    parts = ("weight", "bias", "running_mean", "running_var", "num_batches_tracked")
    assert set(own_names(model, "private")) == {f"{norm}.{part}" for norm in norms for part in parts}
    assert set(own_names(model, "recalibrate")) == {f"{norm}.{part}" for norm in norms for part in parts[2:]}


def test_a_transformer_has_no_private_tensors(make_model: MakeModel) -> None:
    assert own_names(make_model("test_vit"), "private") == []


def test_statistics_are_those_of_all_images() -> None:
    model = nn.Sequential(nn.Dropout(0.9), nn.BatchNorm2d(3))
    images = torch.randn(5, 8, 3, 4, 4) * 3 + 2
    assert recalibrate(model, list(images), 5) == 1
    norm = model[1]
    assert isinstance(norm, nn.BatchNorm2d)
    pixels = images.transpose(1, 2).transpose(0, 1).reshape(3, -1).numpy()
    assert norm.running_mean is not None
    assert norm.running_var is not None
    torch.testing.assert_close(norm.running_mean, torch.tensor(pixels.mean(1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(norm.running_var, torch.tensor(pixels.var(1)), rtol=1e-3, atol=1e-3)
    assert not any(module.training for module in model.modules())


def test_fewer_batches_than_the_maximum_are_enough() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    images = [torch.randn(8, 3, 4, 4)]
    recalibrate(model, images, 4)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, images[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    ("sizes", "joined"),
    [
        ([8, 8, 8, 8, 1], [8, 8, 8, 9]),
        ([8, 1, 8], [8, 9]),
        ([1, 1, 1, 1], [2, 2]),
        ([1, 1, 1], [3]),
        ([1, 8], [9]),
        ([1], [1]),
        ([2, 3], [2, 3]),
        ([], []),
    ],
)
def test_no_batch_of_one_image_is_left(sizes: list[int], joined: list[int]) -> None:
    images = torch.arange(sum(sizes)).view(-1, 1)
    found = list(join_single_images(images.split(sizes)))
    assert [len(batch) for batch in found] == joined
    if found:
        assert torch.equal(torch.cat(found), images)


class Pooled(nn.Module):
    """A network with a batch norm behind its global pooling, as levit has."""

    def __init__(self) -> None:
        super().__init__()
        self.wide, self.pooled = nn.BatchNorm2d(3), nn.BatchNorm1d(3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits: torch.Tensor = self.pooled(self.wide(x).mean((2, 3)))
        return logits


def test_norms_over_images_are_named() -> None:
    assert norms_over_images(Pooled(), torch.randn(1, 3, 4, 4)) == ["pooled"]
    assert norms_over_images(nn.Sequential(nn.BatchNorm2d(3)), torch.randn(1, 3, 1, 1)) == ["0"]
    assert norms_over_images(nn.Linear(3, 3), torch.randn(1, 3)) == []


@pytest.mark.parametrize("last", [1, 2, 5])
def test_a_last_small_batch_counts_by_its_images(last: int) -> None:
    images = torch.randn(16 + last, 3, 4, 4) * 3 + 2
    images[16:] += 50  # so that the small batch matters
    model = nn.BatchNorm2d(3).eval()
    recalibrate(model, images.split(8), 100)
    pixels = images.transpose(0, 1).reshape(3, -1).numpy()
    assert model.running_mean is not None
    assert model.running_var is not None
    torch.testing.assert_close(model.running_mean, torch.tensor(pixels.mean(1)), rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(model.running_var, torch.tensor(pixels.var(1)), rtol=1e-3, atol=1e-3)


@pytest.mark.parametrize("count", [2, 3, 9, 17])
@pytest.mark.parametrize("size", [1, 2, 8])
def test_statistics_behind_the_pooling_need_no_full_batch(count: int, size: int) -> None:
    model = Pooled()
    recalibrate(model, torch.randn(count, 3, 4, 4).split(size), 100)
    assert model.pooled.running_var is not None
    assert torch.isfinite(model.pooled.running_var).all()


def test_one_image_is_too_few() -> None:
    with pytest.raises(DataError, match="two readable training images"):
        recalibrate(Pooled(), [torch.randn(1, 3, 4, 4)], 100)


def test_related_statistics_undo_what_the_measurement_does_to_the_original() -> None:
    """The level moves by as many standard deviations as the original network; a constant channel stays."""
    rng = np.random.default_rng(0)
    mean, variance, mean0, variance0, level_mean, level_variance = rng.uniform(0.5, 2, (6, 4))

    def statistics(means: np.ndarray, variances: np.ndarray) -> dict[str, torch.Tensor]:
        return {"0.running_mean": torch.tensor(means), "0.running_var": torch.tensor(variances)}

    model = nn.Sequential(nn.BatchNorm2d(4)).double()
    model.load_state_dict(statistics(level_mean, level_variance), strict=False)
    relate_statistics(model, statistics(mean, variance), statistics(mean0, variance0))
    moved = (mean0 - mean) * np.sqrt(level_variance / variance)
    norm = model[0]
    np.testing.assert_allclose(norm.running_mean, level_mean + moved, rtol=1e-4)
    np.testing.assert_allclose(norm.running_var, level_variance * variance0 / variance, rtol=1e-4)

    model.load_state_dict(statistics(mean, variance), strict=False)
    relate_statistics(model, statistics(mean, variance), statistics(mean0, variance0))
    np.testing.assert_allclose(norm.running_mean, mean0, rtol=1e-4)
    np.testing.assert_allclose(norm.running_var, variance0, rtol=1e-4)

    model.load_state_dict(statistics(level_mean, np.zeros(4)), strict=False)
    relate_statistics(model, statistics(mean, variance), statistics(mean0, variance0))
    np.testing.assert_allclose(norm.running_mean, level_mean, atol=0.02)
