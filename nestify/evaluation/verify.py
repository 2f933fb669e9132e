"""Verification of a nested file: every level is rebuilt from its own prefix."""

import os
from dataclasses import dataclass

import torch

from nestify.errors import BadFileError
from nestify.file.loading import UnbuildableError, check_fingerprint, load_level
from nestify.file.manifest import LevelEntry
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.untrusted import GET_ANOTHER, quoted
from nestify.model.entry_levels import EntryLevels, NestedState, entry_mask
from nestify.shown import Shown


@dataclass(frozen=True)
class LevelCheck:
    """Result for one level, rebuilt from the header and its prefix.

    Attributes:
        level: number of the level, 1 for the core level.
        name: name of the level.
        prefix_bytes: bytes of its prefix, header included.
        weights: number of maskable weights that it uses; None if its bytes could not be read.
        off: largest difference of its logits from the stored ones, relative to the largest; None if it was
            not rebuilt.
        problem: a sentence about what is wrong; None if nothing is.
    """

    level: int
    name: str
    prefix_bytes: int
    weights: int | None
    off: float | None
    problem: str | None


@dataclass(frozen=True, repr=False)
class Verification(Shown):
    """Results for a file, level by level, core first."""

    name: str
    levels: tuple[LevelCheck, ...]

    @property
    def passed(self) -> bool:
        return all(level.problem is None for level in self.levels)


def verify(path: str | os.PathLike[str]) -> Verification:
    """Check hashes, numbers of weights, nestedness and logits of every level.

    Args:
        path: a nested file, or its address.

    Returns:
        The results; a level with a problem is reported there, and the others are still checked.

    Raises:
        BadFileError: if the file's header or manifest is not right, or its model cannot be built.
    """
    file = open_nested_file(path, truncated=True)
    checks: list[LevelCheck] = []
    below: NestedState | None = None
    unbuildable: UnbuildableError | None = None
    for level, entry in enumerate(file.manifest.levels, start=1):
        weights = off = problem = None
        try:
            file.check_whole(level)
            state = file.state(level)
            weights = state.entry.count_kept(level)
            _check_counts(file, entry, state.entry)
            _check_nested(file, entry, below, state)
            if unbuildable:  # an attempt can take seconds
                raise unbuildable
            off = check_fingerprint(file, load_level(file, level, check=False), level)
            below = state
        except BadFileError as error:
            problem = str(error).removeprefix(f"{file.name}: ")
            unbuildable = error if isinstance(error, UnbuildableError) else unbuildable
        checks.append(LevelCheck(level, entry.name, file.prefix_bytes(level), weights, off, problem))
    return Verification(file.name, tuple(checks))


def _check_counts(file: NestedFile, entry: LevelEntry, found: EntryLevels) -> None:
    """Check that a level uses as many weights of each layer as the manifest says."""
    for layer in entry.layers:
        kept = found.count_kept(found.n_levels, layer.name) if layer.name in found.tensors else layer.weights
        if kept != layer.kept:
            raise BadFileError(
                f"{file.name}: level {entry.name} uses {kept} weights of {quoted(layer.name)} where its "
                f"manifest says {layer.kept}; {GET_ANOTHER}"
            )


def _check_nested(file: NestedFile, entry: LevelEntry, below: NestedState | None, state: NestedState) -> None:
    """Check that every weight of the level below is in this one, with the same value."""
    for name, values in below.shared.items() if below else ():
        assert below is not None
        shared = state.shared[name]
        if name in below.entry.tensors:
            level = below.entry.n_levels
            used = entry_mask(state.entry[name], level)
            same = torch.equal(used, entry_mask(below.entry[name], level))
            same = same and torch.equal(values[used], shared[used])
        else:
            same = torch.equal(values, shared)
        if not same:
            raise BadFileError(
                f"{file.name}: level {entry.name} does not contain {quoted(name)} of the level below; "
                f"{GET_ANOTHER}"
            )
