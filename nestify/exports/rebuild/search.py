"""Search for the arguments that give a network with a level's sizes."""

import math
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

from nestify.exports.rebuild.arguments import Arguments, Slot, replaced, slots, value_at
from nestify.exports.rebuild.names import COUNT, Shapes, Sizes, Wanted

Build = Callable[[Arguments], Shapes | None]
"""Shapes of the network that timm builds of these arguments; None where it builds none."""

GUESSES = 3
"""Values that are tried for a number in one round; first those that most tensors speak for."""
TINY = 1e-9


class Search:
    """Searches for the arguments that give a network with a level's sizes, one number after the other.

    The effect of a number is measured by doubling it in the full model. Numbers that change no size, such as
    the number of heads, are tried in proportion to those that do.

    Args:
        arguments: the arguments of the full model.

    Attributes:
        arguments: the arguments that are nearest to the level so far.
        sizes: sizes of the network that they give, under the names of the level.
    """

    arguments: Arguments
    sizes: Sizes

    def __init__(self, arguments: Arguments, wanted: Wanted, build: Build) -> None:
        self._start, self._wanted, self._build = arguments, wanted, build
        self._full, self._goal = wanted.sizes_of(wanted.full), wanted.sizes
        self._doubled: dict[Slot, Sizes] = {}
        for slot in slots(arguments):
            sizes = self._sizes(replaced(arguments, slot, 2 * value_at(arguments, slot)))
            if sizes is not None:
                self._doubled[slot] = {k: n for k, n in sizes.items() if self._full.get(k, n) != n}
        shaping = {slot[0] for slot, changed in self._doubled.items() if changed}
        self._inert = {slot[0]: None for slot in self._doubled if slot[0] not in shaping}
        self.arguments, self.sizes = arguments, self._full

    def run(self) -> str | None:
        """Run the search.

        Returns:
            None, or a description of what differs from the level.
        """
        for name, dim in self._off(self._full):
            if not any((name, dim) in changed for changed in self._doubled.values()):
                return f"the {'length' if dim == COUNT else 'size'} of {name!r} is no argument"
        order = sorted(self._doubled, key=lambda slot: -len(self._doubled[slot]))  # fewer rounds
        better = True
        while better:
            better = sum(self._improve(slot) for slot in order) > 0
        for name, dim in self._off(self.sizes):
            due = f"{self._goal[name, dim]} modules" if dim == COUNT else f"shape {self._shape(name)}"
            return f"no arguments give {name!r} {due}"
        return None

    def variants(self) -> Iterator[Arguments]:
        """Yield the arguments found, as they are and with other values of those that change no size."""
        yield self.arguments
        for key, value in self.arguments.items():
            if value != self._start[key] and key not in self._inert:
                yield from self._in_proportion(self.arguments, key)

    def _improve(self, slot: Slot) -> bool:
        """Change a number if that brings the network nearer to the level."""
        off = self._off(self.sizes)
        for value in self._guesses(slot, off):
            trial = replaced(self.arguments, slot, value)
            for arguments in (trial, *self._in_proportion(trial, slot[0])):
                sizes = self._sizes(arguments)
                if sizes is None:  # for example, if the number of heads does not divide a width
                    continue
                if len(self._off(sizes)) < len(off):
                    self.arguments, self.sizes = arguments, sizes
                    return True
                break
        return False

    def _guesses(self, slot: Slot, off: list[tuple[str, int]]) -> list[float]:
        """Guess values of a number with which sizes would be the level's."""
        changed, full = self._doubled[slot], value_at(self._start, slot)
        if changed.keys().isdisjoint(off):
            return []
        now = value_at(self.arguments, slot)
        votes: Counter[float] = Counter()
        for key, twice in changed.items():
            size, goal, once = self.sizes.get(key), self._goal.get(key), self._full.get(key)
            if size and goal and once and twice:
                votes[_rounded(_guess(now, full, size, goal, once, twice), isinstance(full, int))] += 1
        return [value for value, _ in votes.most_common() if value >= 0 and value != now][:GUESSES]

    def _in_proportion(self, arguments: Arguments, key: str) -> Iterator[Arguments]:
        """Yield arguments in which one that changes no size follows one that does; finally all that can."""
        following: Arguments = {}
        for inert in self._inert:
            value = _follow(self._start[inert], self._start[key], arguments[key])
            if value not in (None, self._start[inert]):
                following[inert] = value
                yield arguments | {inert: value}
        if len(following) > 1:
            yield arguments | following

    def _off(self, sizes: Sizes) -> list[tuple[str, int]]:
        return [key for key, size in self._goal.items() if sizes.get(key) != size]

    def _sizes(self, arguments: Arguments) -> Sizes | None:
        shapes = self._build(arguments)
        return None if shapes is None else self._wanted.sizes_of(shapes)

    def _shape(self, name: str) -> str:
        return "x".join(map(str, self._wanted.level[name]))


def _guess(now: float, full: float, size: int, goal: int, once: int, twice: int) -> float:
    """Guess the value of a number with which a size would reach the goal.

    Args:
        now: the number's value, with which the size is `size`.
        full: its value in the full model, with which the size is `once`; `twice` when it is doubled.
    """
    power = math.log2(twice / once)
    if power and power == int(power):  # as for a factor or a divisor
        return now * math.pow(goal / size, 1 / power)
    return now + (goal - size) * full / (twice - once)


def _rounded(guess: float, whole: bool) -> float:
    """Round to a whole number; a little upwards if it is not one, because sizes are rounded down."""
    if abs(guess - round(guess)) < TINY:
        return round(guess) if whole else float(round(guess))
    return math.ceil(guess / TINY) * TINY


def _follow(value: Any, before: Any, now: Any) -> Any:
    """Change an argument in proportion to another that went from `before` to `now`, if possible."""
    if isinstance(value, list):
        sides = [side if isinstance(side, list) else [side] * len(value) for side in (before, now)]
        if any(len(side) != len(value) for side in sides):
            return None
        items = [_follow(*each) for each in zip(value, *sides, strict=True)]
        return None if None in items else items
    if not all(isinstance(number, int | float) and number for number in (value, before, now)):
        return None
    scaled = value * now / before
    return int(scaled) if scaled == int(scaled) else None
