"""Forged manifests, damaged data and truncated files: each is refused with one sentence."""

import json
import re
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from nestify.errors import BadFileError
from nestify.file.checks import MAX_EXPANSION
from nestify.file.reader import open_nested_file
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState
from tests.file.builders import description
from tests.file.damage import Parts, damage, refusal, take_apart, write_raw

BN = "level1/private/bn.running_mean"
FC = "level2/values/fc.weight"

# Manifests


def set_parameter(name: str, /, **changes: object) -> Callable[[Parts], None]:
    return lambda parts: parts.parameter(name).update(changes)


def set_level(index: int, /, **changes: object) -> Callable[[Parts], None]:
    return lambda parts: parts.manifest["levels"][index].update(changes)


def set_model(**changes: object) -> Callable[[Parts], None]:
    return lambda parts: parts.manifest["model"].update(changes)


def set_hierarchy(
    class_names: list[str], parents: list[int], times: int = 1, name: str = "kind"
) -> Callable[[Parts], None]:
    kind = {"name": name, "class_names": class_names, "parents": parents}
    return lambda parts: parts.manifest.update(hierarchy=[kind] * times)


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
        (set_level(0, classes="kinds"), "level 'size-1' predicts classes 'kinds', which the file lacks"),
        (set_level(0, consensus=[1.0, 2.0]), "level 'size-1' has 2 weights for a consensus of 1 levels"),
        (set_level(0, temperature=0.0), "fails its schema at 'levels.0.temperature'"),
        (set_hierarchy(["kind"], [0]), "maps 1 of 2 classes to 'kind'"),
        (set_hierarchy(["kind"], [0, 1]), "maps its classes to indices outside the 1 of 'kind'"),
        (set_hierarchy(["a", "b"], [1, 1]), "maps its classes to indices outside the 2 of 'kind'"),
        (set_hierarchy([], []), "fails its schema at 'hierarchy.0.class_names'"),
        (set_hierarchy(["a"], [0, -1]), "fails its schema at 'hierarchy.0.parents.1'"),
        (set_hierarchy(["a"], [0, 0], times=2), "lists the set of classes 'kind' twice"),
        (set_hierarchy(["a"], [0, 0], name="\x1b[31m"), "fails its schema at 'hierarchy.0.name'"),
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
    """A tensor of which no value is stored takes no bytes in the file, regardless of its shape."""
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
    """Damaged data with correct hashes is found, whether or not the hashes are checked."""

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
    """The number of blocks is right, but a full block enters instead of an incomplete one at the edge."""

    def forge(parts: Parts) -> None:
        bits = parts.tensor("level1/entry/conv.weight")
        unpacked = np.unpackbits(np.frombuffer(bits, np.uint8), bitorder="little")
        incomplete = np.flatnonzero(unpacked[54:81])[0] + 54
        full = np.flatnonzero(unpacked[:54] == 0)[0]
        unpacked[[incomplete, full]] = [0, 1]
        bits[:] = np.packbits(unpacked, bitorder="little").tobytes()
        parts.rehash()

    damage(small_file, forge)
    message = refusal(small_file)
    assert "'level1/entry/conv.weight' names 22 weights where 21 values are stored" in message


def test_bool_that_is_neither_0_nor_1(tmp_path: Path) -> None:
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


def test_message_for_a_truncated_file_lists_complete_levels(small_file: Path) -> None:
    file = open_nested_file(small_file)
    content = small_file.read_bytes()
    for end, complete in [
        (file.header_bytes, "no level is complete"),
        (file.prefix_bytes(1) - 1, "no level is complete"),
        (file.prefix_bytes(1), r"levels 1 \(size-1\) are complete"),
        (file.prefix_bytes(2), r"levels 1 \(size-1\), 2 \(size-2\) are complete"),
        (len(content) - 1, r"levels 1 \(size-1\), 2 \(size-2\) are complete"),
    ]:
        small_file.write_bytes(content[:end])
        assert re.search(f"is truncated.*{complete}", refusal(small_file))


def test_file_that_shrinks_after_opening(small_file: Path) -> None:
    file = open_nested_file(small_file)
    small_file.write_bytes(small_file.read_bytes()[:-8])
    with pytest.raises(BadFileError, match="became shorter"):
        file.state()
