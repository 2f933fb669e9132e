"""Residual additions are found among sums that are similar to them."""

import pytest
import torch
from torch import Tensor, nn

from nestify.model.graph.blocks import Residuals
from nestify.model.graph.trace import trace
from tests.model.graph.block_builders import SIZE, level_without, map_model


class Sums(nn.Module):
    """One or two sums of images and their convolutions."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind = kind
        self.f, self.g = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        y, m, sine = self.f(x), x.mean((2, 3), keepdim=True), x.sin()
        sums = {
            "read elsewhere": lambda: torch.cat([x + y, y]),
            "two branches": lambda: y + self.g(x),
            "trunk scaled by alpha": lambda: torch.add(y, x, alpha=2),
            "broadcast": lambda: x + y.mean((2, 3), keepdim=True),
            "of something else": lambda: self.g(y) + torch.zeros_like(y),
            "branch turned": lambda: x + y.transpose(2, 3)[:, :, :4],
            "of another type": lambda: x + y.double(),
            "trunk changed": lambda: self.f(x.sin()) + x.cos(),
            "of itself": lambda: y + y,
            "a number": lambda: y + 1,
            "sum read twice": lambda: (x + y) ** 2,
            "trunk scaled by a number": lambda: 0.5 * x + y,
            "trunk moved and back": lambda: x.transpose(1, 2).transpose(1, 2) + y,
            "both in turn": lambda: (x + y) + self.g(x),
            "trunk divided": lambda: x / 2 + y,
            "one over the trunk": lambda: 2 / x + y,
            "trunk cut": lambda: x[:, :2] + y[:, :2],
            "of their number alone": lambda: x + self.f.bias[:, None, None].expand(x.shape[0], 3, 8, 8),
            "one of another shape": lambda: m * torch.ones(8, 8) + self.g(m).expand(-1, -1, 8, 8),
            "a constant over the trunk": lambda: self.g.bias[:, None, None] / x + y,
            "in place": lambda: torch.cat([sine.view(-1, 3, 64), sine.add_(self.f(sine)).flatten(2)]),
            "of constants": lambda: (
                x * (self.g.bias + self.g.weight[:, :, 0, 0] @ self.g.bias)[:, None, None]
            ),
            "trunk dropped from": lambda: nn.functional.dropout(x, 0.5, training=True) + y,
            "trunk scaled by the images": lambda: x * x.mean() + y,
            "trunk scaled by a parameter": lambda: x * self.g.bias[:, None, None] + y,
        }
        return sums[self.kind]()


@pytest.mark.parametrize(
    ("kind", "additions"),
    [
        ("read elsewhere", 0),
        ("two branches", 0),
        ("trunk scaled by alpha", 0),
        ("broadcast", 0),
        ("of something else", 0),
        ("of another type", 0),
        ("trunk changed", 0),
        ("of itself", 0),
        ("a number", 0),
        ("one over the trunk", 0),
        ("trunk cut", 0),
        ("of their number alone", 0),
        ("one of another shape", 0),
        ("a constant over the trunk", 0),
        ("in place", 0),
        ("of constants", 0),
        ("trunk dropped from", 0),
        ("trunk scaled by the images", 0),
        ("trunk scaled by a parameter", 1),
        ("sum read twice", 1),
        ("trunk scaled by a number", 1),
        ("trunk divided", 1),
        ("trunk moved and back", 1),
        ("both in turn", 2),
    ],
)
def test_residual_additions(kind: str, additions: int) -> None:
    assert len(Residuals(trace(Sums(kind).eval(), SIZE)).trunks) == additions


class Parallel(nn.Module):
    """The sum of two residual sums, either of which could be the trunk."""

    def __init__(self) -> None:
        super().__init__()
        self.f, self.g = nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        return (x + self.f(x)) + (x + self.g(x))


def test_a_sum_with_two_possible_trunks_is_not_residual() -> None:
    model = Parallel()
    channels, layers = map_model(model)
    assert [block.name for block in layers.blocks] == ["#1", "#2"]
    images = torch.randn(2, *SIZE)
    torch.testing.assert_close(level_without(["#1", "#2"], channels, layers, model)(images), 2 * images)


class Module(nn.Module):
    """A module with a residual sum, and one of several outputs."""

    def __init__(self, kind: str) -> None:
        super().__init__()
        self.kind, self.conv = kind, nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, Tensor]:
        x = x.relu() if self.kind == "activation first" else x
        y = x + self.conv(x)
        ends = {
            "activation": y.relu,
            "activation first": lambda: y,
            "constant output": lambda: (y, self.conv.bias.exp()[:, None, None]),
            "turned": lambda: y.transpose(2, 3),
            "two outputs": lambda: (y, self.conv(y).sin()),
            "activation twice": lambda: y.relu().sigmoid(),
            "scaled by the images": lambda: y * x.mean(),
            "bits": lambda: y.view(torch.int32),
        }
        return ends[self.kind]()


class Holder(nn.Module):
    def __init__(self, part: nn.Module) -> None:
        super().__init__()
        self.part, self.head = part, nn.Linear(3, 4)

    def forward(self, images: Tensor) -> Tensor:
        x = self.part(images)
        x = x[0] * x[1] if isinstance(x, tuple) else x.float()
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("activation", "part"),
        ("constant output", "part"),
        ("activation first", "part#1"),
        ("bits", "part#1"),
        ("turned", "part#1"),
        ("two outputs", "part#1"),
        ("activation twice", "part#1"),
        ("scaled by the images", "part#1"),
    ],
)
def test_the_branch_is_the_block_if_the_module_is_not_the_identity_without_it(kind: str, name: str) -> None:
    _, layers = map_model(Holder(Module(kind)))
    assert [block.name for block in layers.blocks] == [name]


class Gives(nn.Module):
    """Returns the input and the output of a residual addition."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        x = x + self.conv(x)
        return x, x + self.conv(x)


class Inside(nn.Module):
    """A branch that contains a block, in a module that downsamples."""

    def __init__(self) -> None:
        super().__init__()
        self.down, self.block = nn.Conv2d(3, 3, 2, stride=2), Module("activation")

    def forward(self, x: Tensor) -> Tensor:
        x = self.down(x)
        return x + self.block(x).sin()


@pytest.mark.parametrize(("part", "names"), [(Gives, ["part#1", "part#2"]), (Inside, ["part#1"])])
def test_branches_of_modules_that_are_not_blocks(part: type[nn.Module], names: list[str]) -> None:
    _, layers = map_model(Holder(part()))
    assert [block.name for block in layers.blocks] == names
