"""Checks of what a reader does with an untrusted file, one file at a time.

A reader may refuse the file with a NestifyError whose message is one line. It may read the file if no byte of
the data differs from its hash, the same layout gives the same tensors, and writing these tensors again gives
the same data. Nothing else is allowed: no other exception, no warning, no hang, and no more memory than
follows from the size of the file and from the dense tensors that the manifest checks allow.
"""

import random
import signal
import tracemalloc
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from types import FrameType
from typing import Any
from weakref import finalize

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from nestify.errors import NestifyError
from nestify.file.header import bounded_bytes
from nestify.file.manifest import Description, LevelDescription, Manifest
from nestify.file.reader import NestedFile, open_nested_file
from nestify.file.tensors import TORCH_DTYPES
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState
from tests.file.builders import (
    assert_same_state,
    axes_description,
    axes_state,
    description,
    entry_levels,
    pseudo_random,
    small_state,
)
from tests.file.mutations import is_forgery, mutate

SECONDS = 20.0
"""Longest time to read a small file, even on a busy machine; it normally takes milliseconds."""

MAX_MESSAGE = 1000
"""Largest number of characters of a message without its path, if the names in the file are short."""

FIXED_BYTES = 2**18
FILE_FACTOR = 2
HEADER_FACTOR = 40
"""Opening may allocate `FIXED_BYTES`, plus `FILE_FACTOR` bytes per byte of the file, plus `HEADER_FACTOR`
bytes per byte of the header for the Python objects that JSON is parsed to."""

DENSE_FACTOR = 10
"""Reading may allocate `FIXED_BYTES`, plus `FILE_FACTOR` bytes per byte of the file, plus `DENSE_FACTOR`
bytes per byte of the dense tensors in the checked manifest: for the tensors, their entry levels, and
temporarily two positions of 8 bytes for some of the weights, which may have only 2 bytes each."""


class Hang(BaseException):
    """Reading took too long. It is not an Exception, so that no reader can catch it by accident."""


@dataclass(frozen=True)
class Base:
    """An intact file.

    Attributes:
        content: bytes of the file.
        manifest: its manifest.
        state: its tensors.
    """

    content: bytes
    manifest: Manifest
    state: NestedState


@dataclass(frozen=True)
class Verdict:
    """Result of reading one file.

    Attributes:
        message: message of the refusal without the path; None if the file was read.
        opening_bytes: peak of the allocated bytes while the file was opened.
        reading_bytes: peak of the allocated bytes while its state was read; 0 if it was refused on opening.
        file_bytes: size of the file.
        header_bytes: size of the header.
        dense_bytes: size of the dense tensors in the manifest; 0 if the file was refused on opening.
    """

    message: str | None
    opening_bytes: int
    reading_bytes: int
    file_bytes: int
    header_bytes: int
    dense_bytes: int

    @property
    def opening_ratio(self) -> float:
        """Bytes allocated on opening, in excess of `FIXED_BYTES`, per byte of the file."""
        return max(0, self.opening_bytes - FIXED_BYTES) / max(1, self.file_bytes)

    @property
    def reading_ratio(self) -> float:
        """Bytes allocated on reading, in excess of `FIXED_BYTES`, per byte of file and dense tensors."""
        return max(0, self.reading_bytes - FIXED_BYTES) / max(1, self.file_bytes + self.dense_bytes)


class TorchMemory(TorchDispatchMode):
    """Counter of the bytes of live CPU tensors; tracemalloc counts NumPy's memory, but not torch's."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # otherwise torch imports its compiler, which takes seconds

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, list[int]] = {}
        self.held = self.peak = 0

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Mapping[str, Any] | None = None
    ) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {tensor.untyped_storage().data_ptr() for tensor in _tensors(args)}
        for tensor in _tensors((result,)):
            self._register(tensor, given)
        return result

    def _register(self, tensor: Tensor, given: set[int]) -> None:
        storage = tensor.untyped_storage()
        place, size = storage.data_ptr(), storage.nbytes()
        if place not in self.live:
            if place in given or not size:  # a view of memory that torch did not allocate
                return
            self.live[place] = [0, size]
            self.held += size
            self.peak = max(self.peak, self.held)
        self.live[place][0] += 1
        finalize(tensor, self._release, place)

    def _release(self, place: int) -> None:
        views = self.live[place]
        views[0] -= 1
        if not views[0]:
            self.held -= self.live.pop(place)[1]


def _tensors(values: Iterable[Any]) -> Iterator[Tensor]:
    """Yield the tensors among an operator's arguments or results, including those in lists."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise Hang if the block takes longer; works in the main thread only."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise Hang(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measure_memory(call: Callable[[], Any]) -> tuple[Any, int]:
    """Return a call's result, or the NestifyError that it raises, and the peak of the bytes it allocates."""
    tracemalloc.start()
    try:
        with alarm(SECONDS), TorchMemory() as memory:
            try:
                result = call()
            except NestifyError as error:
                result = error
        return result, tracemalloc.get_traced_memory()[1] + memory.peak
    finally:
        tracemalloc.stop()


def judge(path: Path, base: Base, donor: Base, kind: str) -> Verdict:
    """Read a corrupted file and check that the reader's behaviour is allowed.

    Args:
        path: path of the corrupted file.
        base: the intact file.
        donor: the intact file of which parts may have been copied.
        kind: kind of damage.

    Raises:
        AssertionError: if it is not allowed. Any exception of the reader that is not a NestifyError is passed
            on.
    """
    content = path.read_bytes()
    header_bytes = min(len(content), 8 + int.from_bytes(content[:8], "little"))
    file, opening = measure_memory(lambda: open_nested_file(path))
    assert opening <= FIXED_BYTES + FILE_FACTOR * len(content) + HEADER_FACTOR * header_bytes, opening
    if isinstance(file, NestifyError):
        return Verdict(_check_message(path, file), opening, 0, len(content), header_bytes, 0)
    dense = _dense_bytes(file.manifest)
    state, reading = measure_memory(file.state)
    assert reading <= FIXED_BYTES + FILE_FACTOR * len(content) + DENSE_FACTOR * dense, reading
    message = _check_message(path, state) if isinstance(state, NestifyError) else None
    if message is None:
        _check_accepted(file, state, base, donor, kind, content)
    return Verdict(message, opening, reading, len(content), header_bytes, dense)


def _check_message(path: Path, error: NestifyError) -> str:
    """Check the message of a refusal; return it without the path."""
    name, message = str(error).split(": ", maxsplit=1)
    assert name == str(path)
    assert message.isprintable(), message
    assert "; " in message, "names a remedy"
    assert len(message) <= MAX_MESSAGE, len(message)
    assert error.exit_code == 3
    return message


def _dense_bytes(manifest: Manifest) -> int:
    return sum(bounded_bytes(entry.shape, entry.dtype) for entry in manifest.parameters)


def _check_accepted(
    file: NestedFile, state: NestedState, base: Base, donor: Base, kind: str, content: bytes
) -> None:
    """Check a file that the reader accepted."""
    data = content[file.header_bytes :]
    if not is_forgery(kind):
        intact = [source for source in (base, donor) if data == source.content[-len(data) :]]
        assert intact, "data was changed and the reader did not notice"
        for source in intact:
            if data_layout(file.manifest) == data_layout(source.manifest):
                assert_same_state(state, source.state)
    _check_canonical(file, state, data)


def data_layout(manifest: Manifest) -> object:
    """Return the parts of a manifest that determine how the data is decoded to tensors."""
    return manifest.parameters, [level.private for level in manifest.levels]


def _check_canonical(file: NestedFile, state: NestedState, data: bytes) -> None:
    """Check that writing the tensors again gives the same bytes, except for padding."""
    floating = {e.dtype for e in file.manifest.parameters if TORCH_DTYPES[e.dtype].is_floating_point}
    if len(floating) > 1 or "F64" in floating:
        return  # readable, but the writer never produces such a file
    again = file.path.with_name("again")
    dtype = TORCH_DTYPES[floating.pop()] if floating else torch.float32
    write_nested_file(again, state, description_of(file.manifest), dtype)
    written = again.read_bytes()
    rewritten = open_nested_file(again)
    assert rewritten.layout == file.layout
    for slot in file.layout.slots:
        if "/pad/" not in slot.spec.name:
            begin = rewritten.header_bytes + slot.begin
            assert data[slot.begin : slot.end] == written[begin : begin + slot.spec.nbytes], slot.spec.name


def description_of(manifest: Manifest) -> Description:
    """Return the description from which a file was written."""
    levels = [
        LevelDescription(**{name: getattr(level, name) for name in LevelDescription.model_fields})
        for level in manifest.levels
    ]
    facts = {name: getattr(manifest, name) for name in Description.model_fields if name != "levels"}
    return Description(**facts, levels=levels)


# Files to corrupt


def mixed_state() -> NestedState:
    """Return a state with all four codings, more types, 0 dimensions, 0 elements and incomplete blocks."""
    blocks = entry_levels((3, 2), [0.3, 0.6, 0.9], salt=2)
    entry = {
        "dense.weight": entry_levels((40, 9), [0.02, 0.02, 1.0], salt=1),  # elias-fano, none, all
        "scalar": torch.tensor(2, dtype=torch.uint8),
        "nothing": torch.empty(0, 3, dtype=torch.uint8),
        "edges": blocks.repeat_interleave(4, dim=0).repeat_interleave(3, dim=1)[:10, :5].contiguous(),
    }
    shared = {name: pseudo_random(tensor.shape, salt=7) - 0.5 for name, tensor in entry.items()}
    shared |= {"flag": torch.tensor([True, False, True]), "bytes": torch.arange(5, dtype=torch.uint8)}
    shared |= {"empty": torch.empty(2, 0), "short": torch.arange(3, dtype=torch.int16)}
    private: list[dict[str, Tensor]] = [
        {"head": pseudo_random((3, 2), salt=level).double()} for level in (1, 2)
    ]
    return NestedState(shared, EntryLevels(3, entry), [*private, {}], units={"edges": (4, 3)})


def base_files(folder: Path, golden: Path) -> list[Base]:
    """Return intact files of 1, 2, 3 and 6 levels in all types, with and without axes, and a golden file."""
    states = [(small_state(1), torch.float32), (small_state(2), torch.bfloat16)]
    states += [(small_state(3), torch.float32), (small_state(6), torch.float16)]
    states += [(mixed_state(), torch.float32), (mixed_state(), torch.float16)]
    states += [
        (axes_state(1), torch.float16),
        (axes_state(3), torch.bfloat16),
        (axes_state(6), torch.float32),
    ]
    bases = [_read_base(golden)]
    for state, dtype in states:
        path, n_levels = folder / "base", state.entry.n_levels
        described = axes_description(n_levels) if state.axes else description(n_levels)
        write_nested_file(path, state, described, dtype)
        bases.append(_read_base(path))
    return bases


def _read_base(path: Path) -> Base:
    file = open_nested_file(path)
    with TorchMemory():  # its first use imports modules, which must not be counted later
        state = file.state()
    return Base(path.read_bytes(), file.manifest, state)


def corrupted_files(
    bases: list[Base], folder: Path, seed: int, numbers: range
) -> Iterator[tuple[str, Path, Base, Base]]:
    """Write corrupted files, one at a time, each at the same path.

    A file follows from `seed` and its number alone, so that any file can be reproduced.

    Yields:
        The kind of damage, the path, the intact file, the donor.
    """
    for number in numbers:
        rng = random.Random(f"{seed}/{number}")
        base, donor = rng.sample(bases, 2)
        kind, content = mutate(base.content, donor.content, rng)
        path = folder / "corrupted"
        path.write_bytes(content)
        yield kind, path, base, donor
