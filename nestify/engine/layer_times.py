"""The time that each layer of a model takes on this machine, dense and packed, to predict that of a level."""

from collections.abc import Mapping
from dataclasses import dataclass

from nestify.engine.pack import HIGHEST_DENSITY

THREADS = 1
"""Number of threads that the layers, and the levels with budgets of latency, are measured with."""


@dataclass(frozen=True)
class LayerTime:
    """The time of one layer for one image.

    Attributes:
        dense: seconds in ONNX Runtime's own operator.
        fixed: seconds of the packed layer at density 0; None if the engine never packs it.
        slope: seconds that the packed layer takes longer at density 1.
    """

    dense: float
    fixed: float | None = None
    slope: float = 0.0

    def is_packed(self, density: float) -> bool:
        """Return whether the engine packs the layer at a density in [0, 1]."""
        return self.fixed is not None and density <= HIGHEST_DENSITY

    def seconds(self, density: float) -> float:
        """Return the predicted time at a density in [0, 1]."""
        if self.fixed is None or not self.is_packed(density):
            return self.dense
        return self.fixed + self.slope * density


@dataclass(frozen=True)
class LayerTimes:
    """The times of a model's layers for one image, on one thread of this machine.

    Attributes:
        layers: weight name -> time of its layer.
        rest: seconds of everything else in the dense model.
        packed_rest: the same in a model all of whose layers are packed, where fewer layouts are converted.
    """

    layers: Mapping[str, LayerTime]
    rest: float
    packed_rest: float

    def share(self, densities: Mapping[str, float]) -> float:
        """Return the predicted time of a level divided by that of the dense model.

        Args:
            densities: weight name -> share of its weights that are not zero, in [0, 1]; others are dense.
        """
        at = {name: densities.get(name, 1.0) for name in self.layers}
        dense = sum(layer.dense for layer in self.layers.values())
        packed = sum(layer.dense for name, layer in self.layers.items() if layer.is_packed(at[name]))
        rest = self.rest + (self.packed_rest - self.rest) * packed / dense
        return (rest + sum(layer.seconds(at[name]) for name, layer in self.layers.items())) / (
            self.rest + dense
        )
