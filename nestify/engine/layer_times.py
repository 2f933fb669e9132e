"""The time that each layer of a model takes on this machine, dense and packed, to predict that of a level."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod

import numpy as np

from nestify.engine.pack import HIGHEST_DENSITY

THREADS = 1
"""Number of threads that the layers, and the levels with budgets of latency, are measured with."""


Shape = tuple[int, ...]


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer for one image.

    Attributes:
        dense: seconds in ONNX Runtime's own operator.
        fixed: seconds of the packed layer at density 0; None if the engine never packs it.
        slope: seconds that the packed layer takes longer at density 1.
        after: seconds of the operators that run between it and the next layer of the dense model.
    """

    dense: float
    fixed: float | None = None
    slope: float = 0.0
    after: float = 0.0

    def is_packed(self, density: float) -> bool:
        """Return whether the engine packs the layer at a density in [0, 1]."""
        return self.fixed is not None and density <= HIGHEST_DENSITY

    def seconds(self, density: float) -> float:
        """Return the predicted time at a density in [0, 1]."""
        if self.fixed is None or not self.is_packed(density):
            return self.dense
        return self.fixed + self.slope * density


@dataclass(frozen=True)
class NetworkTimes:
    """The times of one network's layers for one image, on one thread of this machine.

    Attributes:
        layers: weight name -> time of its layer.
        rest: seconds of everything else in the dense network, including what runs after each layer.
        packed_rest: the same in a network all of whose layers are packed, where fewer layouts are converted.
        shapes: weight name -> shape of the weight.
    """

    layers: Mapping[str, LayerTime]
    rest: float
    packed_rest: float
    shapes: Mapping[str, Shape]

    @property
    def before(self) -> float:
        """Seconds of what runs after no layer."""
        return self.rest - sum(layer.after for layer in self.layers.values())

    def seconds(self, name: str, density: float) -> float:
        """Return the time of a layer and of what runs after it.

        Args:
            name: name of its weight.
            density: share of the weight's elements that are not zero, in [0, 1].
        """
        layer = self.layers[name]
        seconds = layer.seconds(density) + layer.after
        if layer.is_packed(density):
            dense = sum(layer.dense for layer in self.layers.values())
            seconds += (self.packed_rest - self.rest) * layer.dense / dense
        return seconds


@dataclass(frozen=True)
class LayerTimes:
    """The times of a model's layers at several widths.

    Attributes:
        networks: times of the narrowest network first, and of the full one last.
        block: number of channels that the runtime's convolutions compute at once; a part of a block takes as
            long as a whole one.
    """

    networks: Sequence[NetworkTimes]
    block: int

    def share(
        self, densities: Mapping[str, float], shapes: Mapping[str, Shape | None] | None = None
    ) -> float:
        """Return the predicted time of a level divided by that of the dense model.

        The time of a layer is interpolated between the measured widths by the size of its weight, for a
        convolution in whole blocks of channels.

        Args:
            densities: weight name -> share of the level's elements that are not zero, in [0, 1]; others are
                dense.
            shapes: weight name -> shape that the weight has in the level; None if the level skips the layer.
                Weights that are not named are complete.
        """
        full = self.networks[-1]
        level = dense = full.before
        for name in full.layers:
            dense += full.seconds(name, 1.0)
            shape = (shapes or {}).get(name, full.shapes[name])
            if shape is not None:
                level += self._seconds(name, densities.get(name, 1.0), shape)
        return level / dense

    def _seconds(self, name: str, density: float, shape: Shape) -> float:
        measured = [self._size(network.shapes[name]) for network in self.networks]
        seconds = [network.seconds(name, density) for network in self.networks]
        return float(np.interp(self._size(shape), measured, seconds))

    def _size(self, shape: Shape) -> int:
        """Return the number of elements of a weight; that of a convolution is filled up to whole blocks."""
        if len(shape) <= 2:  # linear, (outputs, inputs): measured to be proportional to them
            return prod(shape)
        return prod(-(-extent // self.block) * self.block for extent in shape[:2]) * prod(shape[2:])
