"""What the layer schedule knows of a model: the blocks that a level can skip, and what is left then."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from nestify.errors import UnsupportedModelError
from nestify.model.graph.blocks import Block, Stage, find_blocks, find_stages
from nestify.model.graph.channel_map import ChannelMap
from nestify.model.graph.macs import node_macs
from nestify.model.graph.skipping import remains_of


def find_layers(channels: ChannelMap) -> "LayerMap":
    """Find the blocks of a model that a level can skip; there may be none."""
    return LayerMap(channels)


class LayerMap:
    """The blocks of one model, of which any can be skipped together. Does not change.

    Holds no tensor of the model's state dict.

    Attributes:
        blocks: in order of execution.
        stages: the same blocks, those of one kind and shape together.
        uncounted: operators that the MACs of blocks leave out, with the number of their calls.
    """

    blocks: tuple[Block, ...]
    stages: tuple[Stage, ...]
    uncounted: Mapping[str, int]

    def __init__(self, channels: ChannelMap) -> None:
        counted = node_macs(channels.traced)
        spans = find_blocks(channels.traced, counted)
        self.uncounted = counted.uncounted
        self.blocks = tuple(spans)
        self.stages = find_stages(self.blocks)
        self._channels = channels
        self._ends = {block.name: (output.name, source.name) for block, (output, source) in spans.items()}

    def __copy__(self) -> "LayerMap":
        return self

    def __deepcopy__(self, memo: Any) -> "LayerMap":
        return self

    def substitutes(self, skipped: Collection[str]) -> Mapping[str, str]:
        """What `ChannelMap.skeleton` needs to leave blocks out.

        Args:
            skipped: names of blocks, which may come from an untrusted file.

        Returns:
            name of the node that a block gives -> name of the node that stands for it.

        Raises:
            UnsupportedModelError: for a name that is no block's.
        """
        for name in skipped:
            if name not in self._ends:
                raise UnsupportedModelError(
                    f"{name!r} is no block of this model that a level can skip; "
                    "use a file that was made for this model"
                )
        return MappingProxyType(dict(self._ends[name] for name in skipped))

    def missing(self, skipped: Collection[str]) -> frozenset[str]:
        """State-dict names of `ChannelMap.names` that the network without these blocks does not read.

        Tensors that several blocks share are among them where all of those are skipped.

        Raises:
            UnsupportedModelError: for a name that is no block's, or if an operator writes in place into what
                one of the blocks reads or gives.
        """
        traced = self._channels.traced
        needed = remains_of(traced.graph, self.substitutes(skipped)).needed
        read = {name for node, name in traced.names.items() if node in needed}
        return frozenset(self._channels.names) - read
