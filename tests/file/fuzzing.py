"""What a reader may do with a file that nobody vouches for, checked for one file at a time.

It may refuse it, with a NestifyError whose message is one line. It may read it, if then no byte of the data
was changed behind the hashes, the same layout gives the same tensors, and those tensors, written again, give
the same data. It may do nothing else: no other exception, no warning, no long wait, no more memory than the
file's own size and what the gate allows account for.
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
    scrambled,
    small_state,
)
from tests.file.mutations import forges, mutate

SECONDS = 20.0
"""What a small file may take at most, on a busy machine too; reading one takes milliseconds."""

MAX_MESSAGE = 1000
"""Characters of a message, the path aside, for files whose names are short."""

FIXED_BYTES = 2**18
FILE_FACTOR = 2
HEADER_FACTOR = 40
"""Opening may take `FIXED_BYTES`, twice the file, and for the objects of Python that JSON turns into, this
many bytes per byte of header."""

DENSE_FACTOR = 10
"""Reading may besides take this many times the dense tensors that the manifest declares and the gate allowed:
the tensors, their entry levels, and for a while two positions of 8 bytes for each of some of the weights,
which may have 2 bytes."""


class Hang(BaseException):
    """Reading took too long. No Exception, so that no reader can take it for one of its own."""


@dataclass(frozen=True)
class Base:
    """An intact file: its bytes, and what it reads as."""

    content: bytes
    manifest: Manifest
    state: NestedState


@dataclass(frozen=True)
class Verdict:
    """What a reader did with one file.

    Attributes:
        message: of the refusal, the path left out; None where the file was read.
        opening_bytes: peak of what was allocated until the file was open or refused.
        reading_bytes: likewise until its state was read; 0 where it was refused on opening.
        file_bytes, header_bytes, dense_bytes: sizes that the peaks are measured by; `dense_bytes` is 0
            where the file was refused on opening.
    """

    message: str | None
    opening_bytes: int
    reading_bytes: int
    file_bytes: int
    header_bytes: int
    dense_bytes: int

    @property
    def opening_ratio(self) -> float:
        """Bytes allocated on opening, beyond the fixed ones, per byte of file."""
        return max(0, self.opening_bytes - FIXED_BYTES) / max(1, self.file_bytes)

    @property
    def reading_ratio(self) -> float:
        """Bytes allocated on reading, beyond the fixed ones, per byte of file and declared dense tensors."""
        return max(0, self.reading_bytes - FIXED_BYTES) / max(1, self.file_bytes + self.dense_bytes)


class TorchMemory(TorchDispatchMode):
    """Counts the bytes of CPU tensors that live at once; tracemalloc sees NumPy's arrays, but not torch's."""

    @classmethod
    def _should_skip_dynamo(cls) -> bool:
        return False  # or torch imports its compiler, for seconds

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
            if place in given or not size:  # a view of memory that is not torch's
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
    """Those among an operator's arguments or results, lists of them included."""
    for value in values:
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, list | tuple):
            yield from _tensors(value)


@contextmanager
def alarm(seconds: float) -> Iterator[None]:
    """Raise Hang where the block takes longer; in the main thread only."""

    def ring(_signal: int, _frame: FrameType | None) -> None:
        raise Hang(f"still reading after {seconds} s")

    before = signal.signal(signal.SIGALRM, ring)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def measured(call: Callable[[], Any]) -> tuple[Any, int]:
    """What a call returns, or the NestifyError that it raises, and the peak of what it allocated."""
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
    """Read a spoilt file and check that what the reader does is allowed.

    Raises:
        AssertionError, or whatever else than a NestifyError the reader raised.
    """
    content = path.read_bytes()
    header_bytes = min(len(content), 8 + int.from_bytes(content[:8], "little"))
    file, opening = measured(lambda: open_nested_file(path))
    assert opening <= FIXED_BYTES + FILE_FACTOR * len(content) + HEADER_FACTOR * header_bytes, opening
    if isinstance(file, NestifyError):
        return Verdict(_checked(path, file), opening, 0, len(content), header_bytes, 0)
    dense = _dense_bytes(file.manifest)
    state, reading = measured(file.state)
    assert reading <= FIXED_BYTES + FILE_FACTOR * len(content) + DENSE_FACTOR * dense, reading
    message = _checked(path, state) if isinstance(state, NestifyError) else None
    if message is None:
        _check_survivor(file, state, base, donor, kind, content)
    return Verdict(message, opening, reading, len(content), header_bytes, dense)


def _checked(path: Path, error: NestifyError) -> str:
    name, message = str(error).split(": ", maxsplit=1)
    assert name == str(path)
    assert message.isprintable(), message
    assert "; " in message, "names a remedy"
    assert len(message) <= MAX_MESSAGE, len(message)
    assert error.exit_code == 3
    return message


def _dense_bytes(manifest: Manifest) -> int:
    return sum(bounded_bytes(entry.shape, entry.dtype) for entry in manifest.parameters)


def _check_survivor(
    file: NestedFile, state: NestedState, base: Base, donor: Base, kind: str, content: bytes
) -> None:
    data = content[file.header_bytes :]
    if not forges(kind):
        intact = [one for one in (base, donor) if data == one.content[-len(data) :]]
        assert intact, "data was changed and nobody noticed"
        for one in intact:
            if layout_of(file.manifest) == layout_of(one.manifest):
                assert_same_state(state, one.state)
    _check_canonical(file, state, data)


def layout_of(manifest: Manifest) -> object:
    """All of a manifest that decides how data turns into tensors."""
    return manifest.parameters, [level.private for level in manifest.levels]


def _check_canonical(file: NestedFile, state: NestedState, data: bytes) -> None:
    """The tensors that were read, written again, take the same bytes, padding aside."""
    floating = {e.dtype for e in file.manifest.parameters if TORCH_DTYPES[e.dtype].is_floating_point}
    if len(floating) > 1 or "F64" in floating:
        return  # readable, but nothing that a writer makes
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
    """What the writer was told when it wrote a file."""
    levels = [
        LevelDescription(**{name: getattr(level, name) for name in LevelDescription.model_fields})
        for level in manifest.levels
    ]
    facts = {name: getattr(manifest, name) for name in Description.model_fields if name != "levels"}
    return Description(**facts, levels=levels)


# Files to spoil


def odd_state() -> NestedState:
    """All four codings, every other type, no dimensions and none elements, blocks at two edges."""
    blocks = entry_levels((3, 2), [0.3, 0.6, 0.9], salt=2)
    entry = {
        "dense.weight": entry_levels((40, 9), [0.02, 0.02, 1.0], salt=1),  # elias-fano, none, all
        "scalar": torch.tensor(2, dtype=torch.uint8),
        "nothing": torch.empty(0, 3, dtype=torch.uint8),
        "edges": blocks.repeat_interleave(4, dim=0).repeat_interleave(3, dim=1)[:10, :5].contiguous(),
    }
    shared = {name: scrambled(tensor.shape, salt=7) - 0.5 for name, tensor in entry.items()}
    shared |= {"flag": torch.tensor([True, False, True]), "bytes": torch.arange(5, dtype=torch.uint8)}
    shared |= {"empty": torch.empty(2, 0), "short": torch.arange(3, dtype=torch.int16)}
    private: list[dict[str, Tensor]] = [{"head": scrambled((3, 2), salt=level).double()} for level in (1, 2)]
    return NestedState(shared, EntryLevels(3, entry), [*private, {}], units={"edges": (4, 3)})


def base_files(folder: Path, golden: Path) -> list[Base]:
    """Intact files of 1, 2, 3 and 6 levels in all types, with and without axes, and the golden one."""
    states = [(small_state(1), torch.float32), (small_state(2), torch.bfloat16)]
    states += [(small_state(3), torch.float32), (small_state(6), torch.float16)]
    states += [(odd_state(), torch.float32), (odd_state(), torch.float16)]
    states += [
        (axes_state(1), torch.float16),
        (axes_state(3), torch.bfloat16),
        (axes_state(6), torch.float32),
    ]
    bases = [_base(golden)]
    for state, dtype in states:
        path, n_levels = folder / "base", state.entry.n_levels
        described = axes_description(n_levels) if state.axes else description(n_levels)
        write_nested_file(path, state, described, dtype)
        bases.append(_base(path))
    return bases


def _base(path: Path) -> Base:
    file = open_nested_file(path)
    with TorchMemory():  # the first use imports much, which should not be counted later
        state = file.state()
    return Base(path.read_bytes(), file.manifest, state)


def spoilt_files(
    bases: list[Base], folder: Path, seed: int, numbers: range
) -> Iterator[tuple[str, Path, Base, Base]]:
    """One spoilt file at a time, each at the same path: its kind, the path, the intact file, the donor.

    File `number` follows from `seed` and its number alone, so that any one can be made again.
    """
    for number in numbers:
        rng = random.Random(f"{seed}/{number}")
        base, donor = rng.sample(bases, 2)
        kind, content = mutate(base.content, donor.content, rng)
        path = folder / "spoilt"
        path.write_bytes(content)
        yield kind, path, base, donor
