"""Random damage: a reader raises only NestifyError, and notices all damage to data.

`tests/benchmarks/fuzz.py` does the same for many more files.
"""

import json
import time
from collections import Counter
from pathlib import Path

import pytest
import torch

from nestify.file.manifest import Coding
from nestify.file.reader import open_nested_file
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState
from tests.file.builders import description
from tests.file.damage import Parts, damage, raw_content, take_apart
from tests.file.fuzzing import (
    Base,
    Hang,
    TorchMemory,
    alarm,
    base_files,
    corrupted_files,
    judge,
    measure_memory,
)
from tests.file.mutations import KINDS, is_forgery

GOLDEN = Path(__file__).parent / "golden" / "float16.safetensors"
NEVER_READ = ["flip length", "flip data", "header length", "truncate", "extend"]
"""Kinds of damage that are always noticed. Other kinds may produce the intact file or another valid file."""


@pytest.fixture(scope="module")
def bases(tmp_path_factory: pytest.TempPathFactory) -> list[Base]:
    return base_files(tmp_path_factory.mktemp("bases"), GOLDEN)


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.long) for seed in (1, 2, 3))])
def test_corrupted_files(bases: list[Base], tmp_path: Path, seed: int) -> None:
    tried, refused = Counter[str](), Counter[str]()
    for number, (kind, path, base, donor) in enumerate(corrupted_files(bases, tmp_path, seed, range(400))):
        try:
            verdict = judge(path, base, donor, kind)
        except BaseException as error:
            error.add_note(f"file {number} of seed {seed}, {kind}: see corrupted_files")
            raise
        tried[kind] += 1
        refused[kind] += verdict.message is not None
    assert set(tried) == set(KINDS)
    assert {kind: refused[kind] for kind in NEVER_READ} == {kind: tried[kind] for kind in NEVER_READ}
    assert sum(refused.values()) < 0.9 * sum(tried.values()), "some pass the checks"


def test_corrupted_files_can_be_reproduced(bases: list[Base], tmp_path: Path) -> None:
    first = [path.read_bytes() for _, path, _, _ in corrupted_files(bases, tmp_path, 7, range(40))]
    again = [path.read_bytes() for _, path, _, _ in corrupted_files(bases, tmp_path, 7, range(20, 40))]
    assert first[20:] == again
    assert len(set(first)) > 30


def test_intact_files_cover_the_format(bases: list[Base]) -> None:
    """They have all codings and types, blocks, axes, private tensors, and 1 to 6 levels."""
    entries = [entry for base in bases for entry in base.manifest.parameters]
    assert {coding for entry in entries for coding in entry.coding} == set(Coding.__args__)
    assert {entry.dtype for entry in entries if entry.maskable} == {"F32", "F16", "BF16"}
    assert {entry.unit for entry in entries} == {(1, 1), (2, 1), (4, 3)}
    assert {coding for entry in entries if entry.axes for coding in entry.coding} == set(Coding.__args__)
    assert {len(base.manifest.levels) for base in bases} == {1, 2, 3, 6}
    assert all(base.manifest.levels[0].private for base in bases)


def test_taking_apart_changes_nothing(small_file: Path) -> None:
    """A file that was parsed and written again without damage can still be read."""
    damage(small_file, lambda parts: parts.rehash())
    assert take_apart(small_file).metadata["nestify.format"] == "1"
    open_nested_file(small_file).state()


BOMBS = {
    "lists": '{"a":[' + "[]," * 20_000 + "[]]}",
    "tables": '{"a":[' + "{}," * 20_000 + "{}]}",
    "tables of one": '{"a":[' + '{"b":1},' * 10_000 + "{}]}",
    "numbers": '{"a":[' + "1.5," * 20_000 + "1]}",
    "keys": "{" + ",".join(f'"{number}":1' for number in range(10_000)) + "}",
    "one string": '{"a":"' + "x" * 100_000 + '"}',
    "one wide string": '{"a":"' + "x" * 100_000 + '\U0001f600"}',
    "depth": '{"a":' + "[" * 100_000,
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_headers_of_many_values(bases: list[Base], tmp_path: Path, text: str) -> None:
    """JSON that takes the most memory per byte takes no more than `HEADER_FACTOR` allows."""
    judge_changed(bases, tmp_path / "file", "JSON text", raw_content(text, b""))


MANIFEST_BOMBS = {
    "empty parameters": '{"parameters":[' + "{}," * 20_000 + "{}]}",
    "numbers for parameters": '{"parameters":[' + "0," * 20_000 + "0]}",
    "numbers for levels": '{"levels":[' + "0," * 20_000 + "0]}",
    "names of levels": '{"levels":[{"private":[' + "0," * 20_000 + "0]}]}",
    "arguments": '{"model":{"kwargs":{"a":[' + "{}," * 20_000 + "{}]}}}",
    "unknown keys": "{" + ",".join(f'"{number}":1' for number in range(20_000)) + "}",
    "runs": '{"parameters":[{"axes":[[' + "[1,1],[2,1]," * 10_000 + "[1,1]]]}]}",
    "numbers for runs": '{"parameters":[{"axes":[[' + "0," * 20_000 + "0]]}]}",
}


@pytest.mark.parametrize("text", MANIFEST_BOMBS.values(), ids=MANIFEST_BOMBS)
def test_manifests_of_many_problems(bases: list[Base], tmp_path: Path, text: str) -> None:
    """The first problem is enough to refuse; collecting all problems takes a thousand bytes for each byte."""
    header = {"__metadata__": {"nestify.format": "1", "nestify.manifest": text}}
    judge_changed(bases, tmp_path / "file", "JSON text", raw_content(json.dumps(header), b""))


def test_many_runs_of_many_levels(bases: list[Base], tmp_path: Path) -> None:
    """An intact file whose manifest has mostly runs is read within the limits of time and memory."""
    runs = 30_000
    levels = (torch.arange(runs) % 2 + 1).to(torch.uint8)
    state = NestedState(
        {"w": torch.zeros(runs)}, EntryLevels(254, {"w": levels}), [{}] * 254, axes={"w": {0: levels}}
    )
    write_nested_file(tmp_path / "file", state, description(254))
    verdict = judge(tmp_path / "file", bases[0], bases[0], "forged data")
    assert verdict.message is None
    assert len(open_nested_file(tmp_path / "file").manifest.parameters[0].axes[0]) == runs


# Tests of `judge`


def judge_changed(bases: list[Base], path: Path, kind: str, content: bytes) -> None:
    path.write_bytes(content)
    judge(path, bases[0], bases[0], kind)


def test_judge_notices_changed_data_with_correct_hashes(bases: list[Base], tmp_path: Path) -> None:
    parts = Parts.parse(bases[0].content)
    parts.tensor("level1/private/bn.running_mean")[0] ^= 1
    parts.rehash()
    assert is_forgery("forged data")
    judge_changed(bases, tmp_path / "file", "forged data", parts.content)
    with pytest.raises(AssertionError, match="did not notice"):
        judge_changed(bases, tmp_path / "file", "flip data", parts.content)


def test_judge_notices_different_tensors(bases: list[Base], tmp_path: Path) -> None:
    other = Base(bases[0].content, bases[0].manifest, bases[2].state)
    with pytest.raises(AssertionError):
        judge_changed([other], tmp_path / "file", "flip header", other.content)


def test_memory_of_both_libraries_is_counted() -> None:
    def allocate() -> int:
        one = torch.zeros(2**20)
        del one
        two = torch.zeros(2**19, dtype=torch.float64)
        half = two[::2].numpy().copy()
        return half.size

    size, peak = measure_memory(allocate)
    assert size == 2**18
    assert 6 * 2**20 <= peak < 6 * 2**20 + 2**16


def test_memory_that_is_shared_counts_once() -> None:
    with TorchMemory() as memory:
        tensor = torch.ones(1000)
        views = [tensor[i:] for i in range(10)]
        del tensor
        assert memory.held == 4000
        del views
        assert memory.held == 0
        torch.from_numpy(torch.ones(10).numpy()).view(torch.int32)
        assert memory.peak == 4000


def test_alarm_rings() -> None:
    with pytest.raises(Hang), alarm(0.05):
        time.sleep(10)
    with alarm(0.05):
        pass
    time.sleep(0.1)
