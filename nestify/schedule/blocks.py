"""The blocks that each level keeps: all blocks are ranked once, and every level keeps the first of them.

So a level keeps all blocks of a shallower level, whatever the ranking is.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from nestify.model.feature_maps import Outputs, as_list
from nestify.model.graph.block_map import BlockMap, map_blocks
from nestify.model.graph.blocks import Block, Stage
from nestify.model.graph.channel_map import ChannelMap, map_channels
from nestify.model.spec import ModelSpec, state_tensors

Ranking = tuple[Block, ...]
"""All blocks, most important first."""
Loss = Callable[[Sequence[Block]], float]
"""A function from skipped blocks to the loss of the remaining network on calibration images."""


def kept_blocks(ranking: Ranking, depth: float) -> frozenset[Block]:
    """Return the first ceil(depth * n) of n blocks.

    Args:
        ranking: all n blocks, most important first.
        depth: share of the blocks, in (0, 1].
    """
    assert 0 < depth <= 1
    return frozenset(ranking[: ceil(depth * len(ranking) - 1e-9)])  # floating point has 0.28 * 25 > 7


def rank_evenly(stages: Sequence[Stage]) -> Ranking:
    """Rank blocks so that every level keeps about the same share of each stage, spread evenly over it.

    The ranking begins with one block of each stage.
    """
    order = [
        (rank / len(stage.blocks), number, stage.blocks[position])
        for number, stage in enumerate(stages)
        for rank, position in enumerate(_spread(len(stage.blocks)))
    ]
    return tuple(block for _, _, block in sorted(order, key=lambda entry: entry[:2]))


def _spread(n: int) -> list[int]:
    """Order 0 .. n - 1 so that each is as far as possible from its predecessors and from both ends.

    Ties go to the one farther from its predecessors, then to the lower one.
    """
    order: list[int] = []

    def distances(position: int) -> tuple[int, int]:
        nearest = min((abs(position - earlier) for earlier in order), default=n)
        return min(nearest, position + 1, n - position), nearest

    while len(order) < n:
        order.append(max((position for position in range(n) if position not in order), key=distances))
    return order


def rank_by_loss(blocks: Sequence[Block], loss: Loss) -> Ranking:
    """Rank blocks by the loss without them, highest first; each block is skipped alone.

    Args:
        blocks: n blocks, for n losses.
        loss: the loss of the network that skips the given blocks.
    """
    losses = {block: loss([block]) for block in blocks}
    return tuple(sorted(blocks, key=lambda block: losses[block], reverse=True))


CALIBRATION_BATCHES = 4
"""Number of batches of images on which the blocks are measured."""


@dataclass(frozen=True)
class Removable:
    """The channels and blocks of a network that smaller levels can leave out.

    Attributes:
        channels: the coupled channels.
        layers: the blocks that can be skipped.
        ranking: the same blocks, most important first.
    """

    channels: ChannelMap
    layers: BlockMap
    ranking: Ranking


def find_removable(
    network: nn.Module,
    spec: ModelSpec,
    calibration: Iterable[Tensor] | None = None,
    known: Removable | None = None,
    *,
    keep_outputs: bool = False,
) -> Removable:
    """Find the channels and blocks of a network that can be left out.

    Args:
        network: a timm model, on any device.
        spec: its description.
        calibration: batches of images (B, C, H, W) on which the importance of each block is measured; None:
            blocks are ranked evenly over the stages.
        known: the result for a network of the same architecture, whose channels and blocks are used again;
            None: they are searched.
        keep_outputs: whether the channels of a backbone's outputs are kept in full, as a classifier's are.

    Raises:
        UnsupportedModelError: if torch cannot trace the network, or its channels cannot be followed.
    """
    keeps = keep_outputs or spec.output == "logits"
    channels = map_channels(network, spec.input_size, keep_outputs=keeps) if known is None else known.channels
    layers = map_blocks(channels) if known is None else known.layers
    if calibration is None:
        return Removable(channels, layers, rank_evenly(layers.stages))
    loss = divergence_when_skipping(network, channels, layers, calibration, logits=spec.output == "logits")
    return Removable(channels, layers, rank_by_loss(layers.blocks, loss))


@torch.no_grad()
def divergence_when_skipping(
    network: nn.Module,
    channels: ChannelMap,
    layers: BlockMap,
    batches: Iterable[Tensor],
    *,
    logits: bool = True,
) -> Loss:
    """Return a function that measures how much the outputs change when blocks are skipped.

    For a classifier the function returns KL(softmax(full) || softmax(without the blocks)) in nats, averaged
    over images. The full network's predictions are used instead of labels, so blocks can be measured before
    the classifier has learnt its classes. For a backbone it returns the squared error of each feature map,
    divided by the map's mean square, averaged over the maps and the images.

    Args:
        network: a timm model, on any device.
        channels: its coupled channels.
        layers: its blocks that can be skipped.
        batches: images (B, C, H, W), of which the first `CALIBRATION_BATCHES` are used.
        logits: whether the network is a classifier.
    """
    network = network.eval()
    device = next(network.parameters()).device
    tensors = state_tensors(network)
    images = [batch.to(device) for batch in islice(batches, CALIBRATION_BATCHES)]
    divergence = _divergence if logits else _relative_error
    outputs = [network(batch) for batch in images]
    axes = channels.axes([None for _ in channels.groups])

    @torch.no_grad()
    def loss(skipped: Sequence[Block]) -> float:
        replacements = layers.replacements([block.name for block in skipped])
        skeleton = channels.skeleton(axes, replacements=replacements, training=False, device=device)
        own = {name: tensors[name] for name in skeleton.state_dict()}
        found = [
            divergence(functional_call(skeleton, own, (batch,)), expected)
            for batch, expected in zip(images, outputs, strict=True)
        ]
        return float(torch.stack(found).sum()) / sum(len(batch) for batch in images)

    return loss


def _divergence(logits: Tensor, expected: Tensor) -> Tensor:
    prediction, target = logits.log_softmax(-1), expected.log_softmax(-1)
    return functional.kl_div(prediction, target, reduction="sum", log_target=True)


def _relative_error(found: Outputs, expected: Outputs) -> Tensor:
    """Return the relative squared error of the outputs of a batch, averaged over the maps, times B."""
    pairs = list(zip(as_list(found), as_list(expected), strict=True))
    errors = [functional.mse_loss(ours, theirs) / theirs.square().mean() for ours, theirs in pairs]
    return torch.stack(errors).mean() * len(pairs[0][0])
