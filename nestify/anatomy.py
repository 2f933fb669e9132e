"""What smaller levels of a network are made from: its channels, and its blocks in order of their worth."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import islice

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn import functional

from nestify.layers.ranking import Loss, Ranking, rank_by_loss, rank_evenly
from nestify.model.graph.block_map import LayerMap, find_layers
from nestify.model.graph.blocks import Block
from nestify.model.graph.channel_map import ChannelMap, find_channels
from nestify.model.spec import ModelSpec, state_tensors

BATCHES = 4
"""How many batches of images tell what a block is worth."""


@dataclass(frozen=True)
class Anatomy:
    """What smaller levels of a network are made from.

    Attributes:
        channels: its coupled channels.
        layers: its blocks that can be skipped. `ranking`: the same blocks, the one to keep longest first.
    """

    channels: ChannelMap
    layers: LayerMap
    ranking: Ranking


def find_anatomy(
    network: nn.Module,
    spec: ModelSpec,
    calibration: Iterable[Tensor] | None = None,
    known: Anatomy | None = None,
) -> Anatomy:
    """Find the channels and blocks of a network that can be left out.

    Args:
        network: on any device.
        calibration: images (B, C, H, W) that tell what each block is worth; without any, blocks
            are kept evenly over the stages.
        known: anatomy of a network of the same architecture, so that it is not looked for again.

    Raises:
        UnsupportedModelError: if torch cannot trace the network, or the channels cannot be followed.
    """
    channels = find_channels(network, spec.input_size) if known is None else known.channels
    layers = find_layers(channels) if known is None else known.layers
    if calibration is None:
        return Anatomy(channels, layers, rank_evenly(layers.stages))
    loss = loss_of_skipping(network, channels, layers, calibration)
    return Anatomy(channels, layers, rank_by_loss(layers.blocks, loss))


@torch.no_grad()
def loss_of_skipping(
    network: nn.Module, channels: ChannelMap, layers: LayerMap, batches: Iterable[Tensor]
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
        substitutes = layers.substitutes([block.name for block in skipped])
        skeleton = channels.skeleton(axes, substitutes=substitutes, training=False, device=device)
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
