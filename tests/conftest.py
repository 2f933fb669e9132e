"""What all tests share: small real timm models, and quiet imports."""

import warnings
from collections.abc import Callable

import pytest

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecations while it is imported by others
    import timm
    import torch
    from torch import nn

torch.set_num_threads(1)  # threads that wait for each other are many times slower beside another busy process


@pytest.fixture(autouse=True)
def _same_start() -> None:
    torch.manual_seed(0)


@pytest.fixture
def make_model() -> Callable[..., nn.Module]:
    """Makes a timm model with random weights and batch-norm statistics that are not the default ones."""

    def make(name: str, **kwargs: object) -> nn.Module:
        model: nn.Module = timm.create_model(name, **{"num_classes": 10, **kwargs})
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                assert isinstance(module.running_mean, torch.Tensor)
                assert isinstance(module.running_var, torch.Tensor)
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 2)
        return model

    return make
