"""The tensors that a level owns, and recalibrated statistics compared with NumPy."""

from collections.abc import Callable

import torch
from torch import nn

from nestify.model.batch_norm import own_names, recalibrate

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


def test_too_few_batches_are_repeated() -> None:
    model = nn.Sequential(nn.BatchNorm2d(3))
    images = [torch.randn(8, 3, 4, 4)]
    recalibrate(model, images, 4)
    norm = model[0]
    assert isinstance(norm, nn.BatchNorm2d)
    assert norm.running_mean is not None
    torch.testing.assert_close(norm.running_mean, images[0].mean((0, 2, 3)), rtol=1e-4, atol=1e-5)
