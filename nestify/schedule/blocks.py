"""Which blocks a level keeps: blocks are ranked once, and every level keeps the first of them.

So a level keeps all blocks of a shallower one, whatever the ranking says.
"""

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from itertools import islice
from math import ceil

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from nestify.model.graph.block_map import BlockMap, map_blocks
from nestify.model.graph.blocks import Block, Stage
from nestify.model.graph.channel_map import ChannelMap, map_channels
from nestify.model.spec import ModelSpec, state_tensors

Ranking = tuple[Block, ...]
"""All blocks, the one to keep longest first."""
Loss = Callable[[Sequence[Block]], float]
"""The loss on calibration images of the network that skips these blocks."""


def kept_blocks(ranking: Ranking, depth: float) -> frozenset[Block]:
    """The first ceil(depth * n) of n blocks.

    Args:
        depth: share of the blocks, above 0 and at most 1.
    """
    assert 0 < depth <= 1
    return frozenset(ranking[: ceil(depth * len(ranking) - 1e-9)])  # 0.28 * 25 is above 7


def rank_evenly(stages: Sequence[Stage]) -> Ranking:
    """Every level keeps about the same share of each stage, spread over it; one block of each goes last."""
    order = [
        (rank / len(stage.blocks), number, stage.blocks[place])
        for number, stage in enumerate(stages)
        for rank, place in enumerate(_spread(len(stage.blocks)))
    ]
    return tuple(block for _, _, block in sorted(order, key=lambda entry: entry[:2]))


def _spread(n: int) -> list[int]:
    """0 .. n - 1, each as far as can be from those before it and from both ends.

    Of equals the one that is farther from those before it, then the lower.
    """
    order: list[int] = []

    def distances(place: int) -> tuple[int, int]:
        before = min((abs(place - other) for other in order), default=n)
        return min(before, place + 1, n - place), before

    while len(order) < n:
        order.append(max((place for place in range(n) if place not in order), key=distances))
    return order


def rank_by_loss(blocks: Sequence[Block], loss: Loss, *, again: bool = False) -> Ranking:
    """Keep longest what the loss needs most.

    Args:
        again: measure the blocks that are left again whenever one is skipped, as one whose neighbour is gone
            can become important: n (n + 1) / 2 - 1 losses. Otherwise each is skipped alone: n losses.
    """
    if not again:
        losses = {block: loss([block]) for block in blocks}
        return tuple(sorted(blocks, key=lambda block: losses[block], reverse=True))
    left, gone = list(blocks), list[Block]()
    while len(left) > 1:
        least = min(left, key=lambda block: loss([*gone, block]))
        left.remove(least)
        gone.append(least)
    return (*left, *reversed(gone))


BATCHES = 4
"""How many batches of images tell what a block is worth."""


@dataclass(frozen=True)
class Removable:
    """What smaller levels of a network are made from.

    Attributes:
        channels: its coupled channels.
        layers: its blocks that can be skipped. `ranking`: the same blocks, the one to keep longest first.
    """

    channels: ChannelMap
    layers: BlockMap
    ranking: Ranking


def find_removable(
    network: nn.Module,
    spec: ModelSpec,
    calibration: Iterable[Tensor] | None = None,
    known: Removable | None = None,
) -> Removable:
    """Find the channels and blocks of a network that can be left out.

    Args:
        network: on any device.
        calibration: images (B, C, H, W) that tell what each block is worth; without any, blocks
            are kept evenly over the stages.
        known: what was found for a network of the same architecture, so that it is not searched again.

    Raises:
        UnsupportedModelError: if torch cannot trace the network, or the channels cannot be followed.
    """
    channels = map_channels(network, spec.input_size) if known is None else known.channels
    layers = map_blocks(channels) if known is None else known.layers
    if calibration is None:
        return Removable(channels, layers, rank_evenly(layers.stages))
    loss = loss_of_skipping(network, channels, layers, calibration)
    return Removable(channels, layers, rank_by_loss(layers.blocks, loss))


@torch.no_grad()
def loss_of_skipping(
    network: nn.Module, channels: ChannelMap, layers: BlockMap, batches: Iterable[Tensor]
) -> Loss:
    """How far the logits move when blocks are skipped: mean divergence from the whole network's answers.

    KL(softmax(whole) || softmax(without)) in nats. The network's own answers stand for labels, so that it can
    be measured before a classifier has learnt its classes.

    Args:
        network: on any device. `channels`, `layers`: its own.
        batches: images (B, C, H, W), the first few of which are used.
    """
    network = network.eval()
    device = next(network.parameters()).device
    tensors = state_tensors(network)
    images = [batch.to(device) for batch in islice(batches, BATCHES)]
    answers = [network(batch).log_softmax(-1) for batch in images]
    axes = channels.axes([None for _ in channels.groups])

    @torch.no_grad()
    def loss(skipped: Sequence[Block]) -> float:
        replacements = layers.replacements([block.name for block in skipped])
        skeleton = channels.skeleton(axes, replacements=replacements, training=False, device=device)
        own = {name: tensors[name] for name in skeleton.state_dict()}
        divergence = [
            functional.kl_div(
                functional_call(skeleton, own, (batch,)).log_softmax(-1),
                answer,
                reduction="sum",
                log_target=True,
            )
            for batch, answer in zip(images, answers, strict=True)
        ]
        return float(torch.stack(divergence).sum()) / sum(len(batch) for batch in images)

    return loss
