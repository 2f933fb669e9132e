"""The blocks of a model that a level can skip, and the tensors that it then does not need."""

from collections.abc import Collection, Mapping
from types import MappingProxyType
from typing import Any

from nestify.errors import UnsupportedModelError
from nestify.model.graph.blocks import Block, Stage, find_blocks, find_stages
from nestify.model.graph.channel_map import ChannelMap
from nestify.model.graph.macs import node_macs
from nestify.model.graph.skipping import prune_graph


def map_blocks(channels: ChannelMap) -> "BlockMap":
    """Find the blocks of a model that a level can skip; there may be none.

    Args:
        channels: the model's channels, with its graph.
    """
    return BlockMap(channels)


class BlockMap:
    """The blocks of one model, any of which can be skipped in any combination. Immutable.

    Holds no tensor of the model's state dict.

    Attributes:
        blocks: the blocks in order of execution.
        stages: the same blocks, grouped by kind and shape.
        uncounted: maps each operator that the MACs of blocks leave out to the number of its calls.
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

    def __copy__(self) -> "BlockMap":
        return self

    def __deepcopy__(self, memo: Any) -> "BlockMap":
        return self

    def replacements(self, skipped: Collection[str]) -> Mapping[str, str]:
        """Return the replacements with which `ChannelMap.skeleton` skips blocks.

        Args:
            skipped: names of blocks, which may come from an untrusted file.

        Returns:
            Name of a block's output node -> name of the earlier node that is read in its place.

        Raises:
            UnsupportedModelError: if a name is not that of a block.
        """
        for name in skipped:
            if name not in self._ends:
                raise UnsupportedModelError(
                    f"{name!r} is not a block of this model that a level can skip; "
                    "use a file that was made for this model"
                )
        return MappingProxyType(dict(self._ends[name] for name in skipped))

    def unused_names(self, skipped: Collection[str]) -> frozenset[str]:
        """Return the names in `ChannelMap.names` that the network without these blocks does not read.

        A tensor that several blocks share is included if all of them are skipped.

        Args:
            skipped: names of blocks, which may come from an untrusted file.

        Raises:
            UnsupportedModelError: if a name is not that of a block, or if an operator writes in place into
                the input or output of one of the blocks.
        """
        traced = self._channels.traced
        needed = prune_graph(traced.graph, self.replacements(skipped)).needed
        read = {name for node, name in traced.names.items() if node in needed}
        return frozenset(self._channels.names) - read
