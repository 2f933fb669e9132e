"""Toy networks with many kinds of blocks, and shallower versions of them written by hand."""

from collections.abc import Callable, Collection

import torch
from torch import Tensor, fx, nn
from torch.nn import functional

from nestify.model.graph.block_map import BlockMap, map_blocks
from nestify.model.graph.channel_map import ChannelMap, map_channels
from nestify.model.spec import state_tensors

SIZE = (3, 8, 8)
CPU = torch.device("cpu")


class Branches(nn.Module):
    """A block of one of `KINDS` on (B, 4, 8, 8), which is the identity when skipped."""

    def __init__(self, kind: str, tied: nn.Module) -> None:
        super().__init__()
        self.kind, self.skipped = kind, False
        self.conv = tied if kind == "tied" else nn.Conv2d(4, 4, 3, padding=1)
        self.conv2 = nn.Conv2d(4, 4, 1)
        self.gamma = nn.Parameter(torch.rand(4, 1, 1) + 0.5)

    def forward(self, x: Tensor, image: Tensor) -> Tensor | tuple[Tensor, int]:
        if self.skipped:
            return (x, 3) if self.kind == "tuple" else x
        return KINDS[self.kind](self, x, self.conv(x), image)


def _relu(block: Branches, x: Tensor, y: Tensor, image: Tensor) -> Tensor:
    y += x
    return torch.relu_(y)


def _two(block: Branches, x: Tensor, y: Tensor, image: Tensor) -> Tensor:
    x = x + y
    return x + block.conv2(x).sigmoid()


def _layout(block: Branches, x: Tensor, y: Tensor, image: Tensor) -> Tensor:
    x = x.flatten(2).transpose(1, 2)
    x = x + y.flatten(2).transpose(1, 2)
    return x.transpose(1, 2).reshape(y.shape)


def _slice_write(block: Branches, x: Tensor, y: Tensor, image: Tensor) -> Tensor:
    y = y * 2
    y[:, :1] = block.gamma[0] * x[:, 1:2]
    return x + block.conv2(y)


KINDS: dict[str, Callable[[Branches, Tensor, Tensor, Tensor], Tensor | tuple[Tensor, int]]] = {
    "relu_": _relu,
    "silu_": lambda block, x, y, image: functional.silu(y + x, inplace=True),
    "gamma": lambda block, x, y, image: x + block.gamma * y,
    "two": _two,
    "parallel": lambda block, x, y, image: x + y + block.conv2(x),
    "layout": _layout,
    "alpha": lambda block, x, y, image: torch.add(x, y, alpha=0.3),
    "tuple": lambda block, x, y, image: (x + y, 3),
    "extra": lambda block, x, y, image: x + y * image.mean((1, 2, 3), keepdim=True),
    "scaled trunk": lambda block, x, y, image: block.gamma * x + y,
    "dropout": lambda block, x, y, image: functional.dropout(x, 0.5, block.training) + y,
    "slice write": _slice_write,
    "tied": lambda block, x, y, image: x + y,
}


class Net(nn.Module):
    """A stem, blocks of the given kinds, and a classifier. Blocks of kind `tied` share a convolution."""

    def __init__(self, kinds: Collection[str]) -> None:
        super().__init__()
        self.stem = nn.Conv2d(3, 4, 3, padding=1)
        tied = nn.Conv2d(4, 4, 1)
        self.blocks = nn.ModuleList(Branches(kind, tied) for kind in kinds)
        self.head = nn.Linear(4, 5)

    def skip(self, names: Collection[str]) -> None:
        """Skip exactly the blocks with these names."""
        for place, block in enumerate(self.blocks):
            block.skipped = f"blocks.{place}" in names  # type: ignore[assignment]

    def forward(self, images: Tensor) -> Tensor:
        x = torch.relu(self.stem(images))
        for block in self.blocks:
            x = block(x, images)
            x = x[0] if isinstance(x, tuple) else x
        logits: Tensor = self.head(x.mean((2, 3)))
        return logits


def map_model(model: nn.Module) -> tuple[ChannelMap, BlockMap]:
    """Return the channels and blocks of a toy network."""
    channels = map_channels(model.eval(), SIZE)
    return channels, map_blocks(channels)


def level_without(
    names: Collection[str], channels: ChannelMap, layers: BlockMap, model: nn.Module
) -> fx.GraphModule:
    """Return the network of full width without some blocks, with the model's tensors."""
    level = channels.skeleton({}, training=False, device=CPU, replacements=layers.replacements(names))
    tensors = state_tensors(model)
    level.load_state_dict({name: tensors[name].detach() for name in level.state_dict()}, assign=True)
    return level
