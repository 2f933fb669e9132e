"""Tracing leaves the model as it is, and refuses an unsupported model in one sentence."""

from collections.abc import Callable

import numpy as np
import pytest
import timm
import torch
from torch import Tensor, nn

from nestify.errors import UnsupportedModelError
from nestify.model.graph import analysis
from nestify.model.graph.channel_map import map_channels
from nestify.model.graph.labels import ChannelLabels
from nestify.model.graph.operators import RULES
from nestify.model.graph.sizes import CHANGES
from nestify.model.graph.trace import trace
from tests.model.graph.builders import narrow


class Model(nn.Module):
    """Two layers with a function between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first = nn.Linear(6, 16)
        self.last = nn.Linear(16, 4)
        self.between = between

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.last(self.between(self.first(images.mean((2, 3)).repeat(1, 2))))
        return logits


INPUT = (3, 4, 4)


def test_the_model_stays_as_it_is() -> None:
    model = timm.create_model("test_resnet", num_classes=10, drop_rate=0.1).train()
    model.get_submodule("layer1").eval()
    before = {name: (tensor, tensor.clone()) for name, tensor in model.state_dict(keep_vars=True).items()}
    modes = [module.training for module in model.modules()]
    trace(model, (3, 64, 64))
    assert [module.training for module in model.modules()] == modes
    after = model.state_dict(keep_vars=True)
    assert list(after) == list(before)
    for name, (tensor, values) in before.items():
        assert after[name] is tensor
        assert torch.equal(tensor, values)
        assert tensor.grad is None


class Cache(nn.Module):
    """Caches a value computed from its weight until train() is called, as LeViT does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)
        self.cache: dict[str, Tensor] = {}

    def forward(self, images: Tensor) -> Tensor:
        if "weight" not in self.cache:
            self.cache["weight"] = self.layer.weight * 2
        return nn.functional.linear(images.mean((2, 3)), self.cache["weight"])

    def train(self, mode: bool = True) -> "Cache":
        if mode:
            self.cache = {}
        super().train(mode)
        return self


@torch.no_grad()
@pytest.mark.parametrize("filled", [False, True])
def test_a_cache_of_the_model_is_not_used_and_not_filled(filled: bool) -> None:
    model = Cache().eval()
    if filled:
        model(torch.zeros(1, *INPUT))
    assert trace(model, INPUT).parameters == {"layer.weight"}
    assert bool(model.cache) == filled


def test_regions_without_autocast_or_gradients_are_part_of_the_graph() -> None:
    def between(y: Tensor) -> Tensor:
        with torch.autocast("cpu", enabled=False):
            y = y.float().relu()
        with torch.no_grad():
            gain = y.mean(0, keepdim=True)
        return y * gain

    channels = map_channels(Model(between), INPUT)
    assert [group.units for group in channels.groups] == [16]
    assert not channels.unknown


class Several(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 4)

    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        logits = self.layer(images.mean((2, 3)))
        return logits, 2 * logits


def find_and_narrow(model: nn.Module) -> None:
    channels = map_channels(model, INPUT)
    narrow(channels, [np.arange(5) for _ in channels.groups])


def refusal_of(model: nn.Module) -> str:
    with pytest.raises(UnsupportedModelError) as caught:
        find_and_narrow(model)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_several_outputs_are_refused() -> None:
    message = refusal_of(Several())
    assert message.startswith("Several returns 2 tensors")
    assert "set_distilled_training(False)" in message


def test_a_model_that_branches_on_values_is_refused() -> None:
    def between(y: Tensor) -> Tensor:
        return y if bool((y > 0).any()) else -y

    message = refusal_of(Model(between))
    assert message.startswith("torch cannot trace Model for images of (3, 4, 4) and any batch size (")
    assert message.endswith("; --schedule weight works for every model")


def test_a_model_of_one_batch_size_is_refused() -> None:
    assert "any batch size" in refusal_of(Model(lambda y: y.reshape(11, 16)))


class Unbatched(nn.Module):
    """One convolution of one image that has no batch dimension."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv1d(3, 4, 1)

    def forward(self, images: Tensor) -> Tensor:
        logits: Tensor = self.conv(images.mean((0, 3))).mean(1)[None]
        return logits


def test_a_call_that_its_rule_does_not_support_is_refused() -> None:
    message = refusal_of(Unbatched())
    assert message.startswith("conv1d in conv is called in a way that its rule does not support")
    assert message.endswith("; --schedule weight works for every model")


def test_a_result_that_contradicts_the_labels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(RULES, "relu", lambda coupling, call: ChannelLabels((16, 11)))
    message = refusal_of(Model(torch.relu))
    assert message.startswith("relu in the model returns shapes [(11, 16)], but its rule expects [(16, 11)]")


def halves(y: Tensor) -> Tensor:
    return torch.cat([y[:, :8] + y[:, 8:], torch.ones(8).expand(y.shape[0], 8)], 1)


def test_a_shape_that_contradicts_the_labels_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CHANGES, "slice")
    message = refusal_of(Model(halves))
    assert message.startswith("slice in the model returns shape (11, 8) and not (11, 5) in a smaller level")


def test_a_graph_that_does_not_run_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delitem(CHANGES, "expand")
    message = refusal_of(Model(halves))
    assert message.startswith("expand in the model does not run in a smaller level (")


def test_channels_that_do_not_form_a_box_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rules leave a block over two dimensions, which is normally tied at the end of the analysis."""
    monkeypatch.setattr(analysis, "_make_boxes", lambda found: None)
    message = refusal_of(Model(lambda y: y.reshape(-1, 4, 4).transpose(1, 2).flatten(1)))
    assert message.startswith("reshape in the model keeps channels that do not form a rectangular tensor")
