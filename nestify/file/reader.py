"""Opening a nested file: header and manifest are read at once, tensors on demand.

A file is untrusted: everything that can be checked without its data is checked on opening, the rest before
the data is used. Opening imports no torch, so that a report takes no time.
"""

import os
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from nestify.errors import BadFileError, RecipeError
from nestify.file.checks import check_layout, check_manifest, parse_manifest
from nestify.file.header import read_header
from nestify.file.layout import Layout
from nestify.file.manifest import Manifest
from nestify.file.remote import open_source
from nestify.file.source import ByteSource
from nestify.file.untrusted import GET_ANOTHER, MAX_QUOTED, Refusal
from nestify.model.outputs import RETURNED
from nestify.shown import Shown

if TYPE_CHECKING:
    from collections.abc import Mapping

    from torch import Tensor

    from nestify.model.entry_levels import NestedState


@dataclass(frozen=True, repr=False)
class NestedFile(Shown):
    """A nested file whose header and manifest have been checked.

    Attributes:
        name: path, or address without its secrets.
        manifest: everything that the file says about itself.
        layout: position of every tensor.
        header_bytes: number of bytes before the data: header length and header.
        source: the bytes of the file.
    """

    name: str
    manifest: Manifest
    layout: Layout
    header_bytes: int
    source: ByteSource

    @property
    def path(self) -> Path:
        """The path of a local file."""
        return Path(self.name)

    @property
    def n_levels(self) -> int:
        return len(self.manifest.levels)

    def check_classifies(self, what: str, remedy: str = "") -> None:
        """Refuse a file whose levels predict no classes.

        Args:
            what: what the caller is about to do, such as `nestify eval`, for the message.
            remedy: what else the message suggests, before the last remedy.

        Raises:
            RecipeError: if they return an embedding or feature maps.
        """
        if self.manifest.model.output != "logits":
            returned = RETURNED[self.manifest.model.output]
            raise RecipeError(
                f"{self.name}: its levels return {returned} and predict no classes, which {what} needs; "
                f"{remedy}run them in a loop of your own, with nestify.load"
            )

    def prefix_bytes(self, level: int) -> int:
        """Return the number of leading bytes of the file that a level needs; header included.

        Raises:
            RecipeError: if there is no such level.
        """
        self._check_level(level)
        return self.header_bytes + self.layout.ends[level - 1]

    def level_index(self, level: str) -> int:
        """Return the number (1 for the core level) of a level given by name, by number or as `level2`.

        Raises:
            RecipeError: if there is no such level; the message lists all levels.
        """
        names = [entry.name for entry in self.manifest.levels]
        numbers = [str(number) for number in range(1, self.n_levels + 1)]
        for spellings in (names, numbers, [f"level{number}" for number in numbers]):
            if level in spellings:
                return spellings.index(level) + 1
        raise self._no_level(level)

    def state(
        self, level: int | None = None, verify: bool = True, into: "Mapping[str, Tensor] | None" = None
    ) -> "NestedState":
        """Read the tensors of levels 1 to `level`, and no byte of the levels above.

        Args:
            level: the highest level to read; None for all. The state has `level` levels: weights that enter
                above count as unused (entry level `level + 1`, value 0).
            verify: whether to check each level's SHA-256; everything else is always checked.
            into: tensors on the CPU to fill, by name, if they have the shape of what is read.

        Returns:
            Dense tensors on the CPU: those of `into`, or else new ones in the types that the file stores.

        Raises:
            RecipeError: if there is no such level.
            BadFileError: if the data is damaged: a hash, a number of entry bits, a non-finite value.
        """
        from nestify.file.decoder import read_state

        self._check_level(highest := self.n_levels if level is None else level)
        return read_state(self, highest, verify, into or {})

    def level_tensors(
        self, level: int, verify: bool = True, into: "Mapping[str, Tensor] | None" = None
    ) -> "dict[str, Tensor]":
        """Read the plain network of one level: a state dict, 0 where the level uses no weight.

        Arguments and errors are those of `state`. If `into` has all tensors, the additional memory is little
        more than one byte per weight of the largest of them.

        Returns:
            Dense tensors by state-dict name, tied tensors under each of their names.
        """
        from nestify.file.decoder import read_level

        self._check_level(level)
        return read_level(self, level, verify, into or {})

    def check_whole(self, level: int) -> None:
        """Check that levels 1 to `level` are complete.

        Raises:
            BadFileError: if they are not; the message names the levels that are complete.
        """
        data_bytes = self.source.size - self.header_bytes
        if data_bytes >= self.layout.ends[level - 1]:
            return
        problem = f"is truncated, with {data_bytes} of {self.layout.ends[-1]} data bytes"
        whole = whole_levels(self.layout, data_bytes)
        if whole:
            raise BadFileError(
                f"{self.name}: {problem}; levels {_listing(self.manifest, whole)} are complete in it; get an "
                f"intact copy, or keep them with `nestify slice` and --level {whole}"
            )
        raise BadFileError(f"{self.name}: {problem}; no level is complete in it; {GET_ANOTHER}")

    def _check_level(self, level: int) -> None:
        if not 1 <= level <= self.n_levels:
            raise self._no_level(str(level))

    def _no_level(self, level: str) -> RecipeError:
        return RecipeError(f"{self.name} has no level {level!r}; give one of {_listing(self.manifest)}")


def open_nested_file(path: str | os.PathLike[str], *, truncated: bool = False) -> NestedFile:
    """Open a nested file and check all that can be checked without reading its data.

    Args:
        path: local path, or an address `https://`, `http://`, `hf://owner/repo/file`, of which only the bytes
            that are needed are fetched.
        truncated: whether to accept a file that lacks the last levels; the caller then calls `check_whole`.

    Raises:
        BadFileError: if there is no such file, or it is not a nested file of this format, damaged or
            truncated; the sentence names the file, the tensor and the remedy.
    """
    source = open_source(path)
    try:
        header = read_header(source)
        manifest = parse_manifest(header.manifest)
        check_manifest(manifest, header.data_start + header.data_bytes)
        layout = check_layout(manifest, header)
        if (rest := source.size - header.data_start - layout.ends[-1]) > 0:
            raise Refusal(f"has {rest} bytes after its last tensor")
    except Refusal as error:
        raise BadFileError(f"{source.name}: {error}") from None
    file = NestedFile(source.name, manifest, layout, header.data_start, source)
    if not truncated:
        file.check_whole(file.n_levels)
    return file


def whole_levels(layout: Layout, data_bytes: int) -> int:
    """Return how many levels, from the core on, are complete in the first `data_bytes` bytes of the data."""
    return sum(end <= data_bytes for end in layout.ends)


def _listing(manifest: Manifest, count: int | None = None) -> str:
    names = [entry.name for entry in manifest.levels[:count]]
    return ", ".join(f"{number} ({name[:MAX_QUOTED]})" for number, name in enumerate(names, start=1))
