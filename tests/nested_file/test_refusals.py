"""Each thing that a reader refuses, made by damaging a real small file by hand."""

import json
import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from nestify.errors import BadFileError
from nestify.nested_file.checks import MAX_EXPANSION
from nestify.nested_file.layout import MAX_HEADER_BYTES
from nestify.nested_file.reader import open_nested_file
from nestify.nested_file.state import NestedState
from nestify.nested_file.writer import write_nested_file
from nestify.nesting import EntryLevels

from .builders import description
from .damage import Parts, damage, take_apart, write_raw


def refusal(path: Path) -> str:
    """The one sentence, after the file's name, with which opening or reading fails."""
    with pytest.raises(BadFileError) as caught:
        open_nested_file(path).state()
    file_name, message = str(caught.value).split(": ", maxsplit=1)
    assert file_name == str(path)
    assert "\n" not in message
    assert "; " in message, "names a remedy"
    assert caught.value.exit_code == 3
    return message


# Files that are no nested files


def test_missing(tmp_path: Path) -> None:
    assert "no such file" in refusal(tmp_path / "missing")


def test_below_a_file(small_file: Path) -> None:
    assert "cannot be opened" in refusal(small_file / "below")


def test_nul_in_path() -> None:
    with pytest.raises(BadFileError, match="cannot be opened"):
        open_nested_file("a\0b")


def test_directory(tmp_path: Path) -> None:
    assert "is a directory" in refusal(tmp_path)


def test_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    assert "not a regular file" in refusal(tmp_path / "pipe")


@pytest.mark.parametrize(
    ("content", "problem"),
    [
        (b"", "is empty"),
        (b"abc", "not a safetensors file"),
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), "not a safetensors file"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "64 MiB"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "64 MiB"),
        ((100).to_bytes(8, "little") + b"{}", "truncated inside its header, with 10 of 108 bytes"),
        ((0).to_bytes(8, "little"), "not valid JSON"),
    ],
)
def test_no_safetensors(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "file").write_bytes(content)
    assert problem in refusal(tmp_path / "file")


@pytest.mark.parametrize(
    ("header", "problem"),
    [
        ("{", "not valid JSON"),
        ("[]", "not a JSON object"),
        (" {}", "not a JSON object"),
        ('{"a": 1, "a": 2}', "key 'a' is given twice"),
        ('{"a": NaN}', "NaN"),
        ('{"a": -Infinity}', "-Infinity"),
        ('{"a": 1e999}', "1e999"),
        ('{"a": ' + "9" * 5000 + "}", "beyond 64 bits"),
        ('{"a": ' + "[" * 100_000 + "]" * 100_000 + "}", "nested too deep"),
        ('{"a": "\\ud800"}', "not valid Unicode"),
        ('{"__metadata__": 1}', "__metadata__"),
        ('{"__metadata__": {"nestify.format": 1}}', "__metadata__"),
        ("{}", "not a nested file"),
        ('{"__metadata__": {"format": "pt"}}', "not a nested file"),
        ('{"__metadata__": {"nestify.format": "2"}}', "format '2'.*upgrade nestify"),
        ('{"__metadata__": {"nestify.format": "x"}}', "format 'x'.*intact copy"),
        ('{"__metadata__": {"nestify.format": "1"}}', "no nestify.manifest"),
    ],
)
def test_headers(tmp_path: Path, header: str, problem: str) -> None:
    write_raw(tmp_path / "file", header, b"")
    assert re.search(problem, refusal(tmp_path / "file"))


def test_header_that_is_no_text(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes((8).to_bytes(8, "little") + b'{"\xff": 1}')
    assert "not valid JSON" in refusal(tmp_path / "file")


def test_plain_safetensors(tmp_path: Path) -> None:
    safetensors.numpy.save_file({"w": np.zeros(3, np.complex64)}, tmp_path / "file")
    assert "is a safetensors file but not a nested file" in refusal(tmp_path / "file")


def test_data_that_begins_misaligned(small_file: Path) -> None:
    content = small_file.read_bytes()
    length = int.from_bytes(content[:8], "little")
    small_file.write_bytes(
        (length + 4).to_bytes(8, "little") + content[8 : 8 + length] + b"    " + content[8 + length :]
    )
    assert "data that begins misaligned" in refusal(small_file)


# Headers of nested files


def set_tensor(name: str, /, **changes: object) -> Callable[[Parts], None]:
    return lambda parts: parts.header[name].update(changes)


BN = "level1/private/bn.running_mean"
FC = "level2/values/fc.weight"


@pytest.mark.parametrize(
    ("change", "tensor", "problem"),
    [
        (lambda p: p.header.update({FC: 1}), FC, "lacks one of"),
        (lambda p: p.header[FC].pop("dtype"), FC, "lacks one of"),
        (set_tensor(FC, more=1), FC, "lacks one of"),
        (set_tensor(FC, dtype="F8_E4M3"), FC, "has dtype 'F8_E4M3'"),
        (set_tensor(FC, dtype=[]), FC, "has dtype that is not a string"),
        (set_tensor(FC, dtype="F16"), FC, "has 644 bytes where its shape .* takes 322"),
        (set_tensor(FC, dtype="I32"), FC, "is I32 of shape .* where F32"),
        (set_tensor(FC, shape=[-161]), FC, "no possible shape"),
        (set_tensor(FC, shape=[161.0]), FC, "no possible shape"),
        (set_tensor(FC, shape=161), FC, "no possible shape"),
        (set_tensor(FC, shape=[True, 161]), FC, "no possible shape"),
        (set_tensor(FC, shape=[2**32, 2**32]), FC, "no possible shape"),
        (set_tensor(FC, shape=[0, 2**62]), FC, "no possible shape"),
        (set_tensor(FC, shape=[1] * 17), FC, "no possible shape"),
        (set_tensor(FC, shape=[162]), FC, "has 644 bytes where its shape .* takes 648"),
        (set_tensor(FC, shape=[1, 161]), FC, r"is F32 of shape \[1, 161\] where"),
        (set_tensor(FC, data_offsets=[8]), FC, "no possible data_offsets"),
        (set_tensor(FC, data_offsets=[8, -8]), FC, "no possible data_offsets"),
        (set_tensor(FC, data_offsets=[16, 8]), FC, "no possible data_offsets"),
        (set_tensor(FC, data_offsets=[2**64, 2**64 + 644]), FC, "no possible data_offsets"),
        (set_tensor(FC, data_offsets=[0, 644]), "level1/entry/conv.weight|" + FC, "overlaps"),
        (set_tensor(FC, data_offsets=[2**40, 2**40 + 644]), "level2/pad/1", "out of range"),
        (lambda p: p.header.pop(FC), "level2/pad/1", "out of range"),
        (
            lambda p: p.header.pop("level3/private/bn.num_batches_tracked"),
            "bn.num_batches_tracked",
            "is missing",
        ),
        (set_tensor(BN, shape=[4], data_offsets=[0, 16]), BN, "overlaps|out of range"),
    ],
)
def test_header_entries(
    small_file: Path, change: Callable[[Parts], object], tensor: str, problem: str
) -> None:
    damage(small_file, change)
    message = refusal(small_file)
    assert re.search(problem, message)
    assert re.search(tensor, message)


def rename(old: str, new: str) -> Callable[[Parts], None]:
    return lambda parts: parts.header.update({new: parts.header.pop(old)})


def swap_places(parts: Parts) -> None:
    """Level 2's last tensor (8 bytes) trades places with level 3's first (8 bytes)."""
    one = parts.header["level2/private/bn.num_batches_tracked"]
    two = parts.header["level3/entry/conv.weight"]
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]


def add_tensor(parts: Parts) -> None:
    end = len(parts.data)
    parts.header["level3/private/more"] = {"dtype": "U8", "shape": [8], "data_offsets": [end, end + 8]}
    parts.data += bytes(8)


def misalign(parts: Parts) -> None:
    """The last tensor follows the one before it without padding."""
    begin, _ = parts.header.pop("level3/pad/2")["data_offsets"]
    parts.header["level3/private/bn.num_batches_tracked"]["data_offsets"] = [begin, begin + 8]
    del parts.data[-4:]


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (rename(FC, "level2/values/other"), f"tensor '{FC}' is missing"),
        (rename("level1/pad/0", "padding"), "holds a tensor 'padding' that its manifest does not list"),
        (add_tensor, "holds a tensor 'level3/private/more' that its manifest does not list"),
        (swap_places, "tensor 'level3/entry/conv.weight' begins at data byte .* is due"),
        (misalign, "tensor 'level3/private/bn.num_batches_tracked' begins at data byte .* is due"),
        (lambda p: p.data.extend(bytes(5)), "5 bytes after its last tensor"),
    ],
)
def test_layouts(small_file: Path, change: Callable[[Parts], object], problem: str) -> None:
    damage(small_file, change)
    assert re.search(problem, refusal(small_file))


def test_last_padding_that_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_nested_file(
        path, NestedState({"b": torch.tensor([True])}, EntryLevels(1, {}), [{}]), description(1)
    )

    def drop(parts: Parts) -> None:
        del parts.header["level1/pad/0"]
        del parts.data[1:]

    damage(path, drop)
    assert "tensor 'level1/pad/0' is missing" in refusal(path)


# Manifests


def set_parameter(name: str, /, **changes: object) -> Callable[[Parts], None]:
    return lambda parts: parts.parameter(name).update(changes)


def set_level(index: int, /, **changes: object) -> Callable[[Parts], None]:
    return lambda parts: parts.manifest["levels"][index].update(changes)


def set_model(**changes: object) -> Callable[[Parts], None]:
    return lambda parts: parts.manifest["model"].update(changes)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (lambda p: p.manifest.pop("seed"), "fails its schema at 'seed'"),
        (lambda p: p.manifest.update(more=1), "fails its schema at 'more'"),
        (lambda p: p.manifest.update(seed="3"), "fails its schema at 'seed'"),
        (lambda p: p.manifest.update(seed=10**30), "beyond 64 bits"),
        (lambda p: p.manifest.update(seed=float("nan")), "NaN"),
        (lambda p: p.manifest.update(schema_version=2), "fails its schema at 'schema_version'"),
        (lambda p: p.manifest.update(levels=[]), "fails its schema at 'levels'"),
        (lambda p: p.manifest.update(levels=p.manifest["levels"] * 100), "fails its schema at 'levels'"),
        (lambda p: p.manifest.update(schedule="other"), "fails its schema at 'schedule'"),
        (set_model(architecture="hf-hub:someone/model"), "'hf-hub:someone/model' as its architecture"),
        (set_model(architecture="../model"), "as its architecture"),
        (set_model(architecture="resnet18\n"), "as its architecture"),
        (set_model(kwargs={"act_layer": {"a": 1}}), "fails its schema at 'model.kwargs.act_layer"),
        (set_level(0, sha256="0"), "fails its schema at 'levels.0.sha256'"),
        (set_level(0, name="size-2"), "lists the level 'size-2' twice"),
        (set_level(0, name="\x1b[31m"), r"has '\\x1b\[31m' as the name of a level"),
        (set_level(0, name=""), "has '' as the name of a level"),
        (set_level(0, private=["a", "a"]), "lists the private tensor 'a' twice"),
        (set_level(0, private=["a"]), "tensor 'level1/private/a' is missing"),
        (set_level(1, data_bytes=8), "level 'size-2' has .* bytes where its manifest says 8"),
        (set_parameter("fc.bias", name="fc.weight"), "lists the tensor 'fc.weight' twice"),
        (set_parameter("fc.bias", aliases=["tied.weight"]), "lists the tensor 'tied.weight' twice"),
        (set_parameter("fc.bias", dtype="F8"), "tensor 'fc.bias' has dtype 'F8'"),
        (set_parameter("fc.weight", dtype="I64"), "tensor 'fc.weight' has dtype 'I64'"),
        (set_parameter("fc.weight", dtype="F16"), "level1/values/fc.weight' is F32 of shape"),
        (set_parameter("fc.bias", shape=[4]), "level1/values/fc.bias' is F32 of shape"),
        (set_parameter("fc.bias", shape=[-1]), "fails its schema at 'parameters.2.shape.0'"),
        (set_parameter("fc.bias", shape=[1] * 20), "tensor 'fc.bias' has 20 dimensions"),
        (set_parameter("fc.bias", unit=[2, 2]), "tensor 'fc.bias' has blocks"),
        (set_parameter("fc.bias", maskable=True), "tensor 'fc.bias' does not list 3 levels"),
        (set_parameter("fc.weight", maskable=False), "tensor 'fc.weight' does not list 0 levels"),
        (set_parameter("conv.weight", unit=[0, 1]), "fails its schema at 'parameters.0.unit.0'"),
        (set_parameter("conv.weight", unit=[10**15, 1]), "fails its schema at 'parameters.0.unit.0'"),
        (set_parameter("fc.weight", entering=[59, 161, -1]), "fails its schema at 'parameters.1.entering.2'"),
        (set_parameter("fc.weight", entering=[59, 161, 900]), "tensor 'fc.weight' has 1120 entering units"),
        (set_parameter("fc.weight", entering=[58, 162, 149]), "level1/values/fc.weight' is F32 of shape"),
        (set_parameter("conv.weight", entering=[22, 17, 16]), "conv.weight' is F32 of shape"),
        (
            set_parameter("conv.weight", entering=[2, 24, 15], coding=["elias-fano", "bits", "bits"]),
            "conv.weight",
        ),
        (
            set_parameter("fc.weight", coding=["bits"] * 3),
            "tensor 'fc.weight' has entry positions in a coding",
        ),
        (set_parameter("fc.weight", coding=["gaps"] * 3), "fails its schema at 'parameters.1.coding.0'"),
        (set_parameter("fc.weight", shape=[20, 34]), "fc.weight"),
        (set_parameter("fc.weight", shape=[10**12, 10**12]), "tensor 'fc.weight' "),
        (set_parameter("fc.weight", shape=[0, 2**62]), "tensor 'fc.weight' "),
    ],
)
def test_manifests(small_file: Path, change: Callable[[Parts], object], problem: str) -> None:
    damage(small_file, change)
    assert re.search(problem, refusal(small_file))


def test_manifest_that_is_not_json(small_file: Path) -> None:
    parts = take_apart(small_file)
    for text, problem in [
        ("{", "Expecting"),
        ('{"a": 1, "a": 1}', "twice"),
        ("[" * 99_999, "too deep"),
        ("3", "schema"),
    ]:
        metadata = {"nestify.format": "1", "nestify.manifest": text}
        write_raw(small_file, json.dumps({"__metadata__": metadata} | parts.header), bytes(parts.data))
        assert problem in refusal(small_file)


@pytest.mark.parametrize("shape", [[2**15, 2**15], [2**62, 2**62], [0, 2**62]])
def test_small_file_that_would_unpack_to_much(small_file: Path, shape: list[int]) -> None:
    """A tensor of which nothing is stored takes no bytes in the file, whatever its shape."""
    entry = {"name": "bomb", "shape": shape, "dtype": "F32", "maskable": True}
    entry |= {"coding": ["none"] * 3, "entering": [0] * 3}
    damage(small_file, lambda parts: parts.manifest["parameters"].append(entry))
    assert re.search(f"tensor 'bomb' would unpack .* {MAX_EXPANSION} times", refusal(small_file))


# Data


def flip_data(name: str, byte: int = 0) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.tensor(name)[byte] ^= 1

    return change


@pytest.mark.parametrize("level", [1, 2, 3])
def test_hash_of_a_chunk(small_file: Path, level: int) -> None:
    damage(small_file, flip_data(f"level{level}/values/fc.weight"))
    assert f"bytes of level {level} (size-{level}) do not match their SHA-256" in refusal(small_file)
    if level > 1:
        open_nested_file(small_file).state(level - 1)
    open_nested_file(small_file).state(verify=False)


def put_value(name: str, value: float) -> Callable[[Parts], None]:
    def change(parts: Parts) -> None:
        parts.tensor(name)[-4:] = np.float32(value).tobytes()

    return change


@pytest.mark.parametrize(
    ("change", "tensor", "problem"),
    [
        (put_value(FC, np.nan), FC, "not finite"),
        (put_value(FC, np.inf), FC, "not finite"),
        (put_value(BN, -np.inf), BN, "not finite"),
        (put_value("level1/values/fc.bias", np.nan), "level1/values/fc.bias", "not finite"),
        (flip_data("level2/entry/fc.weight"), "level2/entry/fc.weight", "name .* units where 161 enter"),
        (flip_data("level1/entry/fc.weight", -1), "level1/entry/fc.weight", "damaged"),
        (flip_data("level2/entry/conv.weight", -1), "level2/entry/conv.weight", "padding"),
    ],
)
def test_forged_data(small_file: Path, change: Callable[[Parts], None], tensor: str, problem: str) -> None:
    """Damage under hashes that fit; found with and without looking at the hashes."""

    def forge(parts: Parts) -> None:
        change(parts)
        parts.rehash()

    damage(small_file, forge)
    message = refusal(small_file)
    assert f"tensor '{tensor}'" in message
    assert re.search(problem, message)
    with pytest.raises(BadFileError):
        open_nested_file(small_file).state(verify=False)


def test_entry_bits_that_disagree_with_the_number_of_values(small_file: Path) -> None:
    """As many blocks as there should be, but one at the ragged edge traded for a whole one."""

    def forge(parts: Parts) -> None:
        bits = parts.tensor("level1/entry/conv.weight")
        unpacked = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        ragged = np.flatnonzero(unpacked[54:81])[0] + 54
        whole = np.flatnonzero(unpacked[:54] == 0)[0]
        unpacked[[ragged, whole]] = [0, 1]
        bits[:] = np.packbits(unpacked, bitorder="little").tobytes()
        parts.rehash()

    damage(small_file, forge)
    message = refusal(small_file)
    assert "'level1/entry/conv.weight' names 22 weights where 21 values are stored" in message


def test_bool_that_is_none(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_nested_file(
        path, NestedState({"b": torch.tensor([True])}, EntryLevels(1, {}), [{}]), description(1)
    )

    def forge(parts: Parts) -> None:
        parts.tensor("level1/values/b")[0] = 2
        parts.rehash()

    damage(path, forge)
    assert "tensor 'level1/values/b' holds a BOOL" in refusal(path)


# Truncation


def test_truncated_file_says_which_levels_are_whole(small_file: Path) -> None:
    file = open_nested_file(small_file)
    content = small_file.read_bytes()
    for end, whole in [
        (file.header_bytes, "no level is whole"),
        (file.prefix_bytes(1) - 1, "no level is whole"),
        (file.prefix_bytes(1), r"levels 1 \(size-1\) are whole"),
        (file.prefix_bytes(2), r"levels 1 \(size-1\), 2 \(size-2\) are whole"),
        (len(content) - 1, r"levels 1 \(size-1\), 2 \(size-2\) are whole"),
    ]:
        small_file.write_bytes(content[:end])
        assert re.search(f"is truncated.*{whole}", refusal(small_file))


def test_file_that_shrinks_after_opening(small_file: Path) -> None:
    file = open_nested_file(small_file)
    small_file.write_bytes(small_file.read_bytes()[:-8])
    with pytest.raises(BadFileError, match="became shorter"):
        file.state()
