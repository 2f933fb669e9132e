"""Writing: what is refused, and that files are written atomically."""

import errno
import hashlib
import os
import resource
import tracemalloc
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from nestify import files as atomic
from nestify.errors import OutputError
from nestify.file import writer
from nestify.file.reader import open_nested_file
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState
from tests.file.builders import assert_same_state, at_level, description, small_state


def refusal(
    path: Path, state: NestedState | None = None, dtype: torch.dtype = torch.float32, **changes: Any
) -> str:
    """Return the one sentence with which writing fails; check that the folder is unchanged."""
    before = {entry: entry.read_bytes() for entry in path.parent.glob("*") if entry.is_file()}
    with pytest.raises(OutputError) as caught:
        write_nested_file(path, state or small_state(), description(3, **changes), dtype)
    assert {entry: entry.read_bytes() for entry in path.parent.glob("*") if entry.is_file()} == before
    file_name, message = str(caught.value).split(": ", maxsplit=1)
    assert file_name == str(path)
    assert "\n" not in message
    assert caught.value.exit_code == 3
    return message


def test_hashes_and_sizes_are_those_of_the_bytes(tmp_path: Path) -> None:
    path = tmp_path / "model"
    manifest = write_nested_file(path, small_state(), description(3))
    content = path.read_bytes()
    begin = 8 + int.from_bytes(content[:8], "little")
    for level in manifest.levels:
        assert hashlib.sha256(content[begin : begin + level.data_bytes]).hexdigest() == level.sha256
        begin += level.data_bytes
    assert begin == len(content)


def test_same_state_same_bytes(tmp_path: Path, small_file: Path) -> None:
    write_nested_file(tmp_path / "again", small_state(), description(3))
    assert (tmp_path / "again").read_bytes() == small_file.read_bytes()


# States that cannot be stored


def with_value(name: str, value: float, level: int) -> NestedState:
    """Return a state in which one weight that enters at `level` has the given value."""
    state = small_state()
    tensor = state.shared[name].clone()
    index = (state.entry[name] == level).nonzero()[0] if name in state.entry else torch.tensor([0])
    tensor[tuple(index)] = value
    return replace(state, shared=state.shared | {name: tensor})


@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf")])
@pytest.mark.parametrize(("name", "level"), [("conv.weight", 1), ("fc.weight", 3), ("fc.bias", 1)])
def test_non_finite_values(tmp_path: Path, name: str, level: int, value: float) -> None:
    message = refusal(tmp_path / "model", with_value(name, value, level))
    assert f"tensor 'level{level}/values/{name}' holds a value that is not finite" in message


def test_non_finite_private_values(tmp_path: Path) -> None:
    state = small_state()
    state.private[1]["bn.running_mean"][2] = float("nan")
    assert "tensor 'level2/private/bn.running_mean' holds a value" in refusal(tmp_path / "model", state)


@pytest.mark.parametrize(
    ("dtype", "name", "value"), [(torch.float16, "F16", -1e5), (torch.bfloat16, "BF16", 3.4028e38)]
)
def test_values_that_overflow(tmp_path: Path, dtype: torch.dtype, name: str, value: float) -> None:
    message = refusal(tmp_path / "model", with_value("fc.weight", value, 2), dtype)
    assert f"tensor 'level2/values/fc.weight' holds {abs(value):g}, which overflows {name}" in message
    write_nested_file(tmp_path / "model", with_value("fc.weight", value, 2), description(3))
    write_nested_file(tmp_path / "model", with_value("fc.weight", value, 4), description(3), dtype)


@pytest.mark.parametrize("dtype", [torch.complex64, torch.float8_e4m3fn, torch.uint16])
def test_types_outside_the_format(tmp_path: Path, dtype: torch.dtype) -> None:
    state = small_state()
    state.private[0]["odd"] = torch.zeros(3).to(dtype)
    assert f"tensor 'odd' is {dtype}, not one of F64" in refusal(tmp_path / "model", state)


def test_a_file_that_a_reader_would_refuse_is_not_written(tmp_path: Path) -> None:
    model = description(3).model.model_copy(update={"architecture": "hf-hub:a/b"})
    assert "as its architecture" in refusal(tmp_path / "model", model=model)
    levels = [level.model_copy(update={"name": "same"}) for level in description(3).levels]
    assert "level 'same' twice" in refusal(tmp_path / "model", levels=levels)


def test_header_above_the_limit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(writer, "MAX_HEADER_BYTES", 1000)
    assert "header" in refusal(tmp_path / "model")


def contradictions() -> list[tuple[str, NestedState]]:
    good = small_state()
    weight = good.entry["fc.weight"]

    def state(**changes: Any) -> NestedState:
        return NestedState(**(vars(good) | changes))

    return [
        ("levels", state(private=good.private[:2])),
        ("levels", state(entry=EntryLevels(2, {}), units={})),
        ("unknown", state(aliases={"a": "b"})),
        ("unknown", state(units={"fc.bias": (2, 2)})),
        ("unknown", state(entry=EntryLevels(3, {"other": weight}), units={})),
        ("differ", state(entry=EntryLevels(3, {"fc.weight": weight[1:]}), units={})),
        ("differ", state(entry=EntryLevels(3, {"index": torch.ones(5, dtype=torch.uint8)}), units={})),
        ("differ inside a block", state(units={"fc.weight": (4, 4)})),
    ]


@pytest.mark.parametrize(("problem", "state"), contradictions())
def test_contradictions_are_bugs(tmp_path: Path, problem: str, state: NestedState) -> None:
    with pytest.raises(ValueError, match=problem):
        write_nested_file(tmp_path / "model", state, description(3))
    assert list(tmp_path.iterdir()) == []


def test_only_three_types_for_shared_tensors(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="F32, F16, BF16"):
        write_nested_file(tmp_path / "model", small_state(), description(3), torch.float64)


# Atomic writing


def test_folder_that_is_missing(tmp_path: Path) -> None:
    assert "No such file or directory" in refusal(tmp_path / "missing" / "model")


def test_folder_that_is_a_file(small_file: Path) -> None:
    assert "Not a directory" in refusal(small_file / "model")


def test_path_that_is_a_folder(tmp_path: Path) -> None:
    assert "not a regular file" in refusal(tmp_path)


def test_path_that_is_a_device() -> None:
    with pytest.raises(OutputError, match="not a regular file"):
        write_nested_file("/dev/full", small_state(), description(3))


def test_path_with_a_nul() -> None:
    with pytest.raises(OutputError, match="cannot be written"):
        write_nested_file("a\0b", small_state(), description(3))


def test_name_that_is_too_long(tmp_path: Path) -> None:
    assert "File name too long" in refusal(tmp_path / ("a" * 300))


def fail_after(writes: int, error: BaseException) -> Callable[..., Any]:
    """Return a replacement for `open` whose files fail at a later write, like a disk that fills up."""

    def fake_open(path: Path, mode: str) -> Any:
        file = open(path, mode)  # noqa: SIM115
        real_write, left = file.write, iter(range(writes))

        class Failing:
            def __getattr__(self, name: str) -> Any:
                return getattr(file, name)

            def __enter__(self) -> "Failing":
                return self

            def __exit__(self, *_: object) -> None:
                file.close()

            def write(self, data: bytes) -> int:
                if next(left, None) is None:
                    raise error
                return real_write(data)

        return Failing()

    return fake_open


@pytest.mark.parametrize("writes", [0, 1, 5, 20])
def test_disk_that_fills_up(small_file: Path, monkeypatch: pytest.MonkeyPatch, writes: int) -> None:
    error = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    monkeypatch.setattr(atomic, "open", fail_after(writes, error), raising=False)
    assert "No space left on device" in refusal(small_file)


def test_file_size_limit_of_the_system(small_file: Path) -> None:
    """The kernel refuses a write in the middle of the file."""
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (6000, hard))
    try:
        message = refusal(small_file)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
    assert "File too large" in message
    assert_same_state(open_nested_file(small_file).state(), at_level(small_state(), 3))


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_last_steps_that_fail(small_file: Path, monkeypatch: pytest.MonkeyPatch, call: str) -> None:
    def fail(*_: object) -> None:
        raise OSError(errno.EIO, "Input/output error")

    monkeypatch.setattr(os, call, fail)
    assert "Input/output error" in refusal(small_file)


def test_interrupt_midway(small_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    before = small_file.read_bytes()
    monkeypatch.setattr(atomic, "open", fail_after(5, KeyboardInterrupt()), raising=False)
    with pytest.raises(KeyboardInterrupt):
        write_nested_file(small_file, small_state(), description(3))
    assert list(small_file.parent.iterdir()) == [small_file]
    assert small_file.read_bytes() == before


def test_old_file_is_replaced_and_links_stay(small_file: Path, tmp_path: Path) -> None:
    small_file.write_bytes(b"old")
    link = tmp_path / "link"
    link.symlink_to(small_file)
    write_nested_file(link, small_state(), description(3))
    assert link.is_symlink()
    assert_same_state(open_nested_file(small_file).state(), at_level(small_state(), 3))


def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    old = os.umask(0o027)
    try:
        write_nested_file(tmp_path / "model", small_state(), description(3))
    finally:
        os.umask(old)
    assert (tmp_path / "model").stat().st_mode & 0o777 == 0o640


def test_memory_is_that_of_one_tensor(tmp_path: Path) -> None:
    """Counts NumPy's memory: it is a fraction of the 20 tensors of 2**17 weights, 10 MiB in float32."""
    generator = torch.Generator().manual_seed(0)
    shared = {f"w{index}": torch.randn(2**17, generator=generator) for index in range(20)}
    entry = {name: torch.randint(1, 4, (2**17,), dtype=torch.uint8, generator=generator) for name in shared}
    state = NestedState(shared, EntryLevels(3, entry), [{}, {}, {}])
    tracemalloc.start()
    write_nested_file(tmp_path / "model", state, description(3))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * 2**20
