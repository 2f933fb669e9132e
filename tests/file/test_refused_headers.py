"""Files that are not nested files, and damaged headers: each is refused with one sentence."""

import os
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch

from nestify.errors import BadFileError
from nestify.file.layout import MAX_HEADER_BYTES
from nestify.file.reader import open_nested_file
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState
from tests.file.builders import description
from tests.file.damage import Parts, damage, refusal, write_raw

# Files that are not nested files


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
        (b"PK\x03\x04\x00\x00\x08\x08" + bytes(100), "is a zip archive"),
        (b"\x80\x02\x8a\n" + b"\xff" * 100, "is a pickle"),
        (b"\x08\n\x12\x07pytorch" + bytes(100), "probably an ONNX model; give a nested file"),
        (b"\x1c\x00\x00\x00TFL3" + bytes(100), "is a LiteRT model; give a nested file"),
        (b"<!DOCTYPE html><html>" + bytes(100), "is a web page; download the file again"),
        (
            b"version https://git-lfs.github.com/spec/v1\n" + bytes(100),
            "Git LFS.*; fetch it with git lfs pull",
        ),
        (b"\xff" * 100, "not a safetensors file, or its header"),
        ((MAX_HEADER_BYTES + 1).to_bytes(8, "little") + b"{}", "64 MiB"),
        ((2**64 - 1).to_bytes(8, "little") + b"{}", "64 MiB"),
        ((100).to_bytes(8, "little") + b"{}", "truncated inside its header, with 10 of 108 bytes"),
        ((0).to_bytes(8, "little"), "not valid JSON"),
    ],
)
def test_not_a_safetensors_file(tmp_path: Path, content: bytes, problem: str) -> None:
    (tmp_path / "file").write_bytes(content)
    assert re.search(problem, refusal(tmp_path / "file"))


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


def test_header_that_is_not_utf8(tmp_path: Path) -> None:
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
        (set_tensor(FC, shape=[-161]), FC, "impossible shape"),
        (set_tensor(FC, shape=[161.0]), FC, "impossible shape"),
        (set_tensor(FC, shape=161), FC, "impossible shape"),
        (set_tensor(FC, shape=[True, 161]), FC, "impossible shape"),
        (set_tensor(FC, shape=[2**32, 2**32]), FC, "impossible shape"),
        (set_tensor(FC, shape=[0, 2**62]), FC, "impossible shape"),
        (set_tensor(FC, shape=[1] * 17), FC, "impossible shape"),
        (set_tensor(FC, shape=[162]), FC, "has 644 bytes where its shape .* takes 648"),
        (set_tensor(FC, shape=[1, 161]), FC, r"is F32 of shape \[1, 161\] where"),
        (set_tensor(FC, data_offsets=[8]), FC, "impossible data_offsets"),
        (set_tensor(FC, data_offsets=[8, -8]), FC, "impossible data_offsets"),
        (set_tensor(FC, data_offsets=[16, 8]), FC, "impossible data_offsets"),
        (set_tensor(FC, data_offsets=[2**64, 2**64 + 644]), FC, "impossible data_offsets"),
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
    """Exchange the offsets of level 2's last tensor and level 3's first tensor (8 bytes each)."""
    one = parts.header["level2/private/bn.num_batches_tracked"]
    two = parts.header["level3/entry/conv.weight"]
    one["data_offsets"], two["data_offsets"] = two["data_offsets"], one["data_offsets"]


def add_tensor(parts: Parts) -> None:
    end = len(parts.data)
    parts.header["level3/private/more"] = {"dtype": "U8", "shape": [8], "data_offsets": [end, end + 8]}
    parts.data += bytes(8)


def misalign(parts: Parts) -> None:
    """Remove the padding before the last tensor."""
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


def test_missing_padding_at_the_end(tmp_path: Path) -> None:
    path = tmp_path / "file"
    write_nested_file(
        path, NestedState({"b": torch.tensor([True])}, EntryLevels(1, {}), [{}]), description(1)
    )

    def drop(parts: Parts) -> None:
        del parts.header["level1/pad/0"]
        del parts.data[1:]

    damage(path, drop)
    assert "tensor 'level1/pad/0' is missing" in refusal(path)
