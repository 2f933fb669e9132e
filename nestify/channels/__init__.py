"""Coupled channels: which ones a model must keep or drop together, found in its graph of operators."""

from nestify.channels.axes import Axes, Indices, permute_channels, sliced
from nestify.channels.channel_map import ChannelMap, find_channels
from nestify.channels.groups import Group, Member

__all__ = [
    "Axes",
    "ChannelMap",
    "Group",
    "Indices",
    "Member",
    "find_channels",
    "permute_channels",
    "sliced",
]
