"""Slices: the first levels of a nested file as a nested file, and levels added to a slice. Without torch.

A level is a byte prefix, so a slice is a new header and the first bytes of the data, copied and
hashed piece by piece. The manifest of a slice follows from the header of its source alone.
"""

import hashlib
import os
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import BinaryIO

from nestify.errors import BadFileError, RecipeError
from nestify.file.axes import cut_axes
from nestify.file.checks import check_manifest
from nestify.file.layout import Layout, encode_header
from nestify.file.manifest import Manifest
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.source import LocalFile, pieces
from nestify.file.untrusted import GET_ANOTHER, Refusal
from nestify.files import atomic_file, check_apart
from nestify.shown import Shown
from nestify.terminal import Progress, shown_progress


@dataclass(frozen=True, repr=False)
class Sliced(Shown):
    """What `slice_file` or `upgrade_slice` did.

    Attributes:
        source: the source, without the secrets of an address.
        path: path of the slice.
        levels: names of its levels, core first.
        bytes_written: size of the slice; 0 if it already had all levels.
        bytes_read: bytes read from the source; bytes read again after a failure count once.
    """

    source: str
    path: Path
    levels: tuple[str, ...]
    bytes_written: int
    bytes_read: int


def slice_file(
    source: str | os.PathLike[str],
    level: int | str,
    output: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Sliced:
    """Write levels 1 to `level` of a nested file as a nested file.

    Only the header and those levels are read, a piece at a time; the source may be truncated after them.
    Their bytes are copied unchanged, and checked by their hashes.

    Args:
        source: a path, or an address `https://`, `http://`, `hf://owner/repo/file`.
        level: number or name of the level.
        output: path of the slice; an older file there is replaced when the slice is complete.
        progress: called after each piece with the bytes that were read, and their total; None shows a bar at
            a terminal and in a notebook.

    Raises:
        BadFileError: if the source is damaged, or cannot be read.
        RecipeError: if there is no such level.
        OutputError: if the slice cannot be written there.
    """
    with atomic_file(output) as file:  # before the source is read, which can take long
        whole = open_nested_file(source, truncated=True)
        keep = whole.level_index(str(level))
        whole.check_whole(keep)
        if isinstance(whole.source, LocalFile):
            check_apart(output, {"the file to be sliced": whole.source.name})
        header = sliced_header(whole, keep)
        file.write(header)
        data_bytes = whole.layout.ends[keep - 1]
        with shown_progress(progress, "bytes") as advance:
            counter = _ProgressCounter(advance, data_bytes)
            _copy(whole, range(1, keep + 1), file, GET_ANOTHER, counter)
    return Sliced(
        source=whole.name,
        path=Path(output),
        levels=_names(whole, keep),
        bytes_written=len(header) + data_bytes,
        bytes_read=whole.header_bytes + data_bytes,
    )


def upgrade_slice(
    source: str | os.PathLike[str],
    level: int | str,
    path: str | os.PathLike[str],
    *,
    progress: Progress | None = None,
) -> Sliced:
    """Add to a slice the levels that it lacks, up to `level`.

    Only the header and the missing levels are read from the source. The levels of the slice are checked and
    kept; the slice at `path` is replaced when the new one is complete, and unchanged if it has the level.

    Args:
        source: the file that the slice came from, as for `slice_file`.
        level: number or name of the level.
        path: path of the slice.
        progress: as for `slice_file`.

    Raises:
        BadFileError: if source or slice is damaged, or the slice came from another file.
        RecipeError: if there is no such level, or the slice has more.
        OutputError: if the slice cannot be written.
    """
    own = open_nested_file(path)
    whole = open_nested_file(source, truncated=True)
    have, want = own.n_levels, whole.level_index(str(level))
    if want < have:
        raise RecipeError(f"{own.name} has {have} levels, more than {want}; slice to a new file instead")
    if sliced_header(whole, have) != encode_header(own.layout, own.manifest):
        raise BadFileError(
            f"{own.name}: was not made from {whole.name}; slice that to a new file, or name the "
            "file that this slice came from"
        )
    if want == have:
        return Sliced(whole.name, Path(path), _names(own, have), 0, whole.header_bytes)
    whole.check_whole(want)
    header = sliced_header(whole, want)
    missing = whole.layout.ends[want - 1] - whole.layout.ends[have - 1]
    with atomic_file(path) as file:
        file.write(header)
        _copy(own, range(1, have + 1), file, "slice anew", None)
        with shown_progress(progress, "bytes") as advance:
            counter = _ProgressCounter(advance, missing)
            _copy(whole, range(have + 1, want + 1), file, GET_ANOTHER, counter)
    return Sliced(
        source=whole.name,
        path=Path(path),
        levels=_names(whole, want),
        bytes_written=len(header) + whole.layout.ends[want - 1],
        bytes_read=whole.header_bytes + missing,
    )


def sliced_header(whole: NestedFile, keep: int) -> bytes:
    """Return the header of a slice: manifest and layout of the first `keep` levels."""
    parameters = [
        entry.model_copy(
            update={
                "coding": entry.coding[:keep],
                "entering": entry.entering[:keep],
                "axes": cut_axes(entry.axes, keep),
            }
        )
        for entry in whole.manifest.parameters
    ]
    cut = {"levels": whole.manifest.levels[:keep], "parameters": parameters}
    manifest: Manifest = whole.manifest.model_copy(update=cut)
    layout = Layout(whole.layout.chunks[:keep], whole.layout.ends[:keep])
    header = encode_header(layout, manifest)
    try:
        check_manifest(manifest, len(header) + layout.ends[-1])
    except Refusal as error:  # a core level so sparse that it expands beyond the limit
        raise BadFileError(f"{whole.name}: cut to level {keep}, {error.problem}; keep more levels") from None
    return header


def _copy(
    file: NestedFile, levels: range, output: BinaryIO, remedy: str, counter: "_ProgressCounter | None"
) -> None:
    """Copy the chunks of adjacent levels, which are one range, and check the hash of each."""
    begin, end = (0, *file.layout.ends)[levels[0] - 1], file.layout.ends[levels[-1] - 1]
    data = _Parts(pieces(file.source, file.header_bytes + begin, end - begin))
    for level in levels:
        digest = hashlib.sha256()
        for part in data.take(file.layout.chunk_bytes[level - 1]):
            digest.update(part)
            output.write(part)
            if counter is not None:
                counter.add(len(part))
        entry = file.manifest.levels[level - 1]
        if digest.hexdigest() != entry.sha256:
            raise BadFileError(
                f"{file.name}: the bytes of level {level} ({entry.name}) do not match their SHA-256; {remedy}"
            )


class _Parts:
    """Pieces of a range, split at the ends of levels."""

    def __init__(self, blocks: Iterator[bytearray]) -> None:
        self._blocks = blocks
        self._rest = memoryview(b"")

    def take(self, count: int) -> Iterator[memoryview]:
        """Return the next `count` bytes."""
        while count:
            if not self._rest:
                self._rest = memoryview(next(self._blocks))
            part, self._rest = self._rest[:count], self._rest[count:]
            count -= len(part)
            yield part


class _ProgressCounter:
    """Counts the bytes read, and reports them."""

    def __init__(self, progress: Progress, total: int) -> None:
        self._progress = progress
        self._total = total
        self._done = 0

    def add(self, count: int) -> None:
        self._done += count
        self._progress(self._done, self._total)


def _names(file: NestedFile, count: int) -> tuple[str, ...]:
    return tuple(entry.name for entry in file.manifest.levels[:count])
