"""Match the tensors of a network with those of a level, and compare their sizes."""

from collections import defaultdict
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import nn

from nestify.model.spec import state_tensors

Shapes = Mapping[str, tuple[int, ...]]
Sizes = dict[tuple[str, int], int]
"""The extent of a tensor along a dimension; or, with `COUNT`, how many modules a sequence has."""
COUNT = -1


def shapes_of(network: nn.Module) -> Shapes:
    """Return the shapes by state-dict name, each tied tensor once."""
    return {name: tuple(tensor.shape) for name, tensor in state_tensors(network).items()}


@dataclass(frozen=True)
class Wanted:
    """The sizes that a network built by timm must have to be the level.

    Attributes:
        full: shapes of the model with all its channels and blocks.
        level: shapes of the level, under the names of the full model, without tensors that its logits do
            not depend on.
    """

    full: Shapes
    level: Shapes

    @property
    def sizes(self) -> Sizes:
        """Return the sizes that a network must have to be the level."""
        full, left = _sequences(self.full), _sequences(self.level)
        shorter = {p: places for p, places in left.items() if len(places) < len(full.get(p, []))}
        return _extents(self.level) | {(prefix, COUNT): len(places) for prefix, places in shorter.items()}

    def sizes_of(self, found: Shapes) -> Sizes:
        """Return the sizes of a network, under the names of the level."""
        names = self.names(found)
        counts = {(prefix, COUNT): len(places) for prefix, places in _sequences(found).items()}
        return _extents({names[name]: shape for name, shape in found.items() if name in names}) | counts

    def names(self, found: Iterable[str]) -> dict[str, str]:
        """Map names of a network's tensors to the level's names, as far as the level has them.

        A sequence that lacks modules is renumbered: the remaining modules of 0, 1, 2, 3 are 0, 1.
        """
        found = list(found)
        own, left = _sequences(found), _sequences(self.level)
        names = {}
        for name in found:
            here, there = "", ""
            for part in name.split("."):
                places, kept = own.get(here, []), left.get(there, [])
                here = _join(here, part)
                if part.isdecimal() and len(places) == len(kept):
                    part = str(kept[places.index(int(part))])
                there = _join(there, part)
            if there in self.level:
                names[name] = there
        return names


def _sequences(names: Iterable[str]) -> dict[str, list[int]]:
    """Return the numbers of the modules in every sequence, ascending, by the name of the sequence."""
    found: dict[str, set[int]] = defaultdict(set)
    for name in names:
        prefix = ""
        for part in name.split("."):
            if part.isdecimal():
                found[prefix].add(int(part))
            prefix = _join(prefix, part)
    return {prefix: sorted(places) for prefix, places in found.items()}


def _join(prefix: str, part: str) -> str:
    return f"{prefix}.{part}" if prefix else part


def _extents(shapes: Shapes) -> Sizes:
    return {(name, dim): extent for name, shape in shapes.items() for dim, extent in enumerate(shape)}
