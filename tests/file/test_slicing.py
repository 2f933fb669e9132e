"""Slices have the same bytes, but fewer of them; a refused slice leaves existing files unchanged."""

import os
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from nestify.errors import BadFileError, NestifyError, OutputError, RecipeError
from nestify.file import checks, reader, source
from nestify.file.reader import open_nested_file
from nestify.file.slicing import slice_file, upgrade_slice
from nestify.file.source import LocalFile
from nestify.file.writer import write_nested_file
from tests.file.builders import (
    assert_same_state,
    assert_same_tensors,
    at_level,
    description,
    pseudo_random,
    small_state,
)
from tests.file.loopback import serve

GOLDEN = Path(__file__).parent / "golden" / "float16.safetensors"


class CountingFile(LocalFile):
    """A local file that records the ranges that were read."""

    ranges: list[tuple[int, int]]

    def read(self, offset: int, length: int) -> bytearray:
        self.ranges.append((offset, offset + length))
        return super().read(offset, length)


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[tuple[int, int]]]:
    """Ranges that were read from each file, by its name, in pieces of 100 bytes."""
    ranges: dict[str, list[tuple[int, int]]] = {}

    def count(path: str | os.PathLike[str]) -> CountingFile:
        file = CountingFile(path)
        file.ranges = ranges.setdefault(os.fspath(path), [])
        return file

    monkeypatch.setattr(reader, "open_source", count)
    monkeypatch.setattr(source, "PIECE_BYTES", 100)
    return ranges


def is_prefix(ranges: list[tuple[int, int]], end: int) -> bool:
    """Return whether the ranges cover the bytes from the first to `end`, in order and each once."""
    return ranges[0][0] == 0 and ranges[-1][1] == end and all(a[1] == b[0] for a, b in pairwise(ranges))


def refusal(kind: type[NestifyError], action: Callable[..., object], *arguments: object) -> str:
    """Return the message of an action that is refused; check that it leaves every file unchanged."""
    folder = Path(str(arguments[-1])).parent
    before = {path: path.read_bytes() for path in folder.iterdir() if path.is_file()}
    with pytest.raises(kind) as caught:
        action(*arguments)
    assert {path: path.read_bytes() for path in folder.iterdir() if path.is_file()} == before
    message = str(caught.value)
    assert "\n" not in message
    assert "; " in message
    return message


# Content of slices


@given(data=st.data(), n_levels=st.integers(1, 6), dtype=st.sampled_from([torch.float32, torch.bfloat16]))
@settings(max_examples=40, deadline=None)
def test_slices_of_any_file(data: st.DataObject, n_levels: int, dtype: torch.dtype) -> None:
    """A slice has its levels; a slice of a slice and an upgraded slice have the same bytes."""
    low = data.draw(st.integers(1, n_levels))
    high = data.draw(st.integers(low, n_levels))
    with tempfile.TemporaryDirectory() as folder:
        full, first, second, third = (Path(folder) / name for name in ("full", "first", "second", "third"))
        write_nested_file(full, small_state(n_levels), description(n_levels), dtype)
        slice_file(full, low, first)
        assert_same_state(open_nested_file(first).state(), open_nested_file(full).state(low))
        slice_file(full, high, second)
        slice_file(second, low, third)
        assert third.read_bytes() == first.read_bytes()
        upgrade_slice(full, high, first)
        assert first.read_bytes() == second.read_bytes()
        upgrade_slice(second, high, third)
        assert third.read_bytes() == second.read_bytes()


@pytest.mark.parametrize("level", [1, 2, 3])
def test_a_slice(level: int, small_file: Path, tmp_path: Path) -> None:
    full = open_nested_file(small_file)
    done = slice_file(small_file, level, tmp_path / "slice")
    own = open_nested_file(tmp_path / "slice")
    assert_same_state(own.state(), at_level(small_state(), level))
    assert own.manifest.levels == full.manifest.levels[:level]
    kept = {"model", "schedule", "original", "recipe", "seed", "versions", "source_sha256"}
    assert own.manifest.model_dump(include=kept) == full.manifest.model_dump(include=kept)
    tensors = load_file(small_file)
    names = [name for name in tensors if int(name.removeprefix("level").split("/")[0]) <= level]
    assert_same_tensors(load_file(tmp_path / "slice"), {name: tensors[name] for name in names})
    data = (tmp_path / "slice").read_bytes()[own.header_bytes :]
    assert data == small_file.read_bytes()[full.header_bytes :][: len(data)]
    assert done.path == tmp_path / "slice"
    assert done.source == str(small_file)
    assert done.levels == ("size-1", "size-2", "size-3")[:level]
    assert done.bytes_written == (tmp_path / "slice").stat().st_size
    assert done.bytes_read == full.prefix_bytes(level)


@pytest.mark.parametrize("path", ["small", "golden"])
def test_all_levels_are_the_file_itself(path: str, small_file: Path, tmp_path: Path) -> None:
    full = small_file if path == "small" else GOLDEN
    slice_file(full, 3, tmp_path / "slice")
    assert (tmp_path / "slice").read_bytes() == full.read_bytes()


@pytest.mark.parametrize("level", [2, "2", "size-2", "level2"])
def test_levels_by_number_and_name(level: int | str, small_file: Path, tmp_path: Path) -> None:
    assert slice_file(small_file, level, tmp_path / "slice").levels == ("size-1", "size-2")


# Bytes that are read


@pytest.mark.parametrize("level", [1, 2, 3])
def test_only_header_and_prefix_are_read(
    level: int, small_file: Path, tmp_path: Path, counted: dict[str, list[tuple[int, int]]]
) -> None:
    prefix_bytes = open_nested_file(small_file).prefix_bytes(level)
    ranges = counted[str(small_file)]
    ranges.clear()
    done = slice_file(small_file, level, tmp_path / "slice")
    assert is_prefix(ranges, prefix_bytes)
    assert done.bytes_read == prefix_bytes


@pytest.mark.parametrize(("low", "high"), [(1, 2), (1, 3), (2, 3)])
def test_only_header_and_missing_levels_are_read(
    low: int, high: int, small_file: Path, tmp_path: Path, counted: dict[str, list[tuple[int, int]]]
) -> None:
    slice_file(small_file, low, tmp_path / "slice")
    full = open_nested_file(small_file)
    counted[str(small_file)].clear()
    done = upgrade_slice(small_file, high, tmp_path / "slice")
    ranges = counted[str(small_file)]
    missing = [place for place in ranges if place[0] >= full.header_bytes]
    assert (missing[0][0], missing[-1][1]) == (full.prefix_bytes(low), full.prefix_bytes(high))
    assert done.bytes_read == sum(end - begin for begin, end in ranges)
    assert done.bytes_written == full.prefix_bytes(high) - full.header_bytes + len(
        header_of(tmp_path / "slice")
    )


def header_of(path: Path) -> bytes:
    content = path.read_bytes()
    return content[: 8 + int.from_bytes(content[:8], "little")]


def test_over_the_network(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PIECE_BYTES", 1000)
    full = open_nested_file(small_file)
    slice_file(small_file, 1, tmp_path / "local1")
    slice_file(small_file, 3, tmp_path / "local3")
    with serve(small_file.read_bytes()) as server:
        done = slice_file(server.url, 1, tmp_path / "slice")
        assert is_prefix(server.ranges, full.prefix_bytes(1))
        assert done.bytes_read == full.prefix_bytes(1) == server.sent
        assert (tmp_path / "slice").read_bytes() == (tmp_path / "local1").read_bytes()
        server.sent = 0
        done = upgrade_slice(server.url, 3, tmp_path / "slice")
        assert done.source == server.url
        assert done.bytes_read == server.sent
        assert done.bytes_read == full.header_bytes + full.prefix_bytes(3) - full.prefix_bytes(1)
        assert (tmp_path / "slice").read_bytes() == (tmp_path / "local3").read_bytes()


def test_a_dropped_connection_does_no_harm(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(source, "PIECE_BYTES", 500)
    monkeypatch.setattr("time.sleep", lambda _: None)
    with serve(small_file.read_bytes()) as server:
        server.behaviour = lambda visit: visit.number % 3 == 0 and visit.cut(100)
        slice_file(server.url, 3, tmp_path / "slice")
        again = len(server.ranges) - len(set(server.ranges))
        assert again == len(server.ranges) // 3
    assert (tmp_path / "slice").read_bytes() == small_file.read_bytes()


def test_the_output_is_opened_before_the_server_is_contacted(small_file: Path, tmp_path: Path) -> None:
    with serve(small_file.read_bytes()) as server:
        with pytest.raises(OutputError, match="choose a folder that exists"):
            slice_file(server.url, 1, tmp_path / "nowhere" / "slice")
        assert server.visits == []


def test_memory_is_that_of_pieces_not_of_levels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    state = small_state()
    state.shared["fc.bias"] = pseudo_random((10**6,), salt=1)
    write_nested_file(tmp_path / "large", state, description(3))
    monkeypatch.setattr(source, "PIECE_BYTES", 2**16)
    tracemalloc.start()
    slice_file(tmp_path / "large", 1, tmp_path / "slice")
    upgrade_slice(tmp_path / "large", 2, tmp_path / "slice")
    _, peak = tracemalloc.get_traced_memory()
    tracemalloc.stop()
    assert (tmp_path / "slice").stat().st_size > 4 * 10**6
    assert peak < 10**6


def test_progress(small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(source, "PIECE_BYTES", 500)
    full = open_nested_file(small_file)
    seen: list[tuple[int, int]] = []
    slice_file(small_file, 1, tmp_path / "slice", progress=lambda *both: seen.append(both))
    total = full.layout.ends[0]
    assert [done for done, _ in seen] == [*range(500, total, 500), total]
    assert {announced for _, announced in seen} == {total}
    seen.clear()
    upgrade_slice(small_file, 3, tmp_path / "slice", progress=lambda *both: seen.append(both))
    assert seen[-1] == (full.layout.ends[2] - total,) * 2


def test_no_torch(small_file: Path, tmp_path: Path) -> None:
    code = (
        "import sys; from nestify.file.slicing import slice_file, upgrade_slice;"
        f"slice_file({str(small_file)!r}, 1, 'slice'); upgrade_slice({str(small_file)!r}, 3, 'slice');"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=False).returncode == 0
    assert (tmp_path / "slice").read_bytes() == small_file.read_bytes()


# Refused slices


def test_a_damaged_level_is_found_while_it_is_copied(small_file: Path, tmp_path: Path) -> None:
    full = open_nested_file(small_file)
    content = bytearray(small_file.read_bytes())
    content[full.prefix_bytes(1)] ^= 1
    small_file.write_bytes(content)
    output = tmp_path / "slice"
    slice_file(small_file, 1, output)
    for action in (slice_file, upgrade_slice):
        message = refusal(BadFileError, action, small_file, 2, output)
        assert message.startswith(f"{small_file}: the bytes of level 2 (size-2) do not match their SHA-256")


@pytest.mark.parametrize("level", [1, 2])
def test_a_truncated_file_gives_its_complete_levels(level: int, small_file: Path, tmp_path: Path) -> None:
    slice_file(small_file, level, tmp_path / "intact")
    full = open_nested_file(small_file)
    content = small_file.read_bytes()
    for end in (full.prefix_bytes(level), full.prefix_bytes(level + 1) - 1):
        small_file.write_bytes(content[:end])
        with pytest.raises(BadFileError, match=f"keep them with `nestify slice` and --level {level}$"):
            open_nested_file(small_file)
        slice_file(small_file, level, tmp_path / "slice")
        assert (tmp_path / "slice").read_bytes() == (tmp_path / "intact").read_bytes()
        for action in (slice_file, upgrade_slice):
            message = refusal(BadFileError, action, small_file, level + 1, tmp_path / "slice")
            found, expected = end - full.header_bytes, full.layout.ends[-1]
            assert f"is truncated, with {found} of {expected} data bytes" in message


def test_no_complete_level(small_file: Path, tmp_path: Path) -> None:
    content = small_file.read_bytes()
    small_file.write_bytes(content[: open_nested_file(small_file).prefix_bytes(1) - 1])
    assert "no level is complete in it; " in refusal(
        BadFileError, slice_file, small_file, 1, tmp_path / "slice"
    )


def test_bytes_after_the_end(small_file: Path, tmp_path: Path) -> None:
    small_file.write_bytes(small_file.read_bytes() + b"more")
    assert "has 4 bytes after" in refusal(BadFileError, slice_file, small_file, 1, tmp_path / "slice")


@pytest.mark.parametrize("kind", ["itself", "symlink", "hardlink"])
def test_not_over_its_own_source(kind: str, small_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "other"
    if kind == "itself":
        output = small_file
    elif kind == "symlink":
        output.symlink_to(small_file)
    else:
        output.hardlink_to(small_file)
    message = refusal(OutputError, slice_file, small_file, 1, output)
    assert message == f"{output}: is the file to be sliced; choose another path"


def test_no_such_level(small_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "slice"
    for level in (0, 4, "size-4", "", "all"):
        message = refusal(RecipeError, slice_file, small_file, level, output)
        assert message.endswith(
            f"has no level {str(level)!r}; give one of 1 (size-1), 2 (size-2), 3 (size-3)"
        )
    slice_file(small_file, 1, output)
    refusal(RecipeError, upgrade_slice, small_file, 4, output)


def test_a_slice_that_would_not_be_read(
    small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The full file is below the limit on how much a file may unpack to, but its core is above it."""
    size = small_file.stat().st_size
    dense = sum(tensor.nbytes for tensor in small_state().shared.values())
    monkeypatch.setattr(checks, "FREE_DENSE_BYTES", 0)
    monkeypatch.setattr(checks, "MAX_EXPANSION", dense / (size - 1))
    message = refusal(BadFileError, slice_file, small_file, 1, tmp_path / "slice")
    assert "cut to level 1, tensor" in message


# Upgrading a slice


def test_a_slice_that_has_the_level_is_not_touched(small_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "slice"
    slice_file(small_file, 2, output)
    before = (output.read_bytes(), output.stat().st_mtime_ns, output.stat().st_ino)
    done = upgrade_slice(small_file, 2, output)
    assert (output.read_bytes(), output.stat().st_mtime_ns, output.stat().st_ino) == before
    assert done.bytes_written == 0
    assert done.levels == ("size-1", "size-2")


def test_a_slice_does_not_shrink(small_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "slice"
    slice_file(small_file, 2, output)
    message = refusal(RecipeError, upgrade_slice, small_file, 1, output)
    assert message == f"{output} has 2 levels, more than 1; slice to a new file instead"


@pytest.mark.parametrize("change", ["weights", "seed", "recipe", "levels"])
def test_a_slice_of_another_file(change: str, small_file: Path, tmp_path: Path) -> None:
    state = small_state(4 if change == "levels" else 3)
    if change == "weights":
        state.shared["fc.bias"][0] += 1
    changes = {"seed": {"seed": 4}, "recipe": {"recipe": {}}}.get(change, {})
    write_nested_file(tmp_path / "other", state, description(state.entry.n_levels, **changes))
    output = tmp_path / "slice"
    slice_file(tmp_path / "other", 1, output)
    for level in (1, 2):
        message = refusal(BadFileError, upgrade_slice, small_file, level, output)
        assert message.startswith(f"{output}: was not made from {small_file}; ")


def test_a_damaged_slice(small_file: Path, tmp_path: Path) -> None:
    output = tmp_path / "slice"
    slice_file(small_file, 2, output)
    content = output.read_bytes()
    output.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    message = refusal(BadFileError, upgrade_slice, small_file, 3, output)
    assert message.startswith(
        f"{output}: the bytes of level 2 (size-2) do not match their SHA-256; slice anew"
    )
    output.write_bytes(content[:-1])
    refusal(BadFileError, upgrade_slice, small_file, 3, output)


def test_no_slice_to_upgrade(small_file: Path, tmp_path: Path) -> None:
    message = refusal(BadFileError, upgrade_slice, small_file, 3, tmp_path / "nowhere")
    assert "there is no such file" in message
