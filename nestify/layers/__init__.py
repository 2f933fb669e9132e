"""Blocks that a level can skip: found in the graph of operators of a model, and ranked."""

from nestify.layers.blocks import Block, Stage
from nestify.layers.layer_map import LayerMap, find_layers
from nestify.layers.ranking import Ranking, kept_blocks, rank_by_loss, rank_evenly

__all__ = [
    "Block",
    "LayerMap",
    "Ranking",
    "Stage",
    "find_layers",
    "kept_blocks",
    "rank_by_loss",
    "rank_evenly",
]
