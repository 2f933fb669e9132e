"""Loading one level: it is the plain network, no other bytes are read, and little other memory is needed."""

import tracemalloc
from pathlib import Path

import pytest
import timm
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import nestify
from nestify.errors import BadFileError, RecipeError
from nestify.file import reader
from nestify.file.source import LocalFile
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels
from nestify.model.nested_model import NestedModel
from nestify.model.spec import build_model, describe_model, state_tensors
from tests.file.builders import description

LEVELS = 3


def nested_model(architecture: str, seed: int = 0) -> NestedModel:
    """Return a model with random entry levels and private tensors that differ from level to level."""
    torch.manual_seed(seed)
    network = timm.create_model(architecture, num_classes=7).eval()
    spec = describe_model(network)
    entry = {
        name: torch.randint(1, LEVELS + 1, tensor.shape, dtype=torch.uint8)
        for name, tensor in state_tensors(network).items()
        if name in spec.maskable
    }
    names = [f"size-{level}" for level in range(1, LEVELS + 1)]
    nested = NestedModel(network, spec, names, entry=EntryLevels(LEVELS, entry)).eval()
    with torch.no_grad():
        for level in range(1, LEVELS + 1):
            for name, tensor in nested.own_tensors(level).items():
                if name.endswith("running_mean"):
                    tensor.normal_(std=0.1)
    return nested


def write_file(nested: NestedModel, path: Path, dtype: torch.dtype = torch.float32) -> Path:
    """Write a file of the model; its fingerprints are wrong and must not be checked."""
    model = description(LEVELS).model.model_copy(
        update={
            "architecture": nested.spec.architecture,
            "kwargs": nested.spec.kwargs,
            "num_classes": nested.spec.num_classes,
            "class_names": None,
        }
    )
    write_nested_file(path, nested.nested_state(), description(LEVELS, model=model), dtype)
    return path


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_efficientnet"])
@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_a_level_is_the_plain_network(tmp_path: Path, architecture: str, level: int) -> None:
    nested = nested_model(architecture)
    plain = nestify.load(write_file(nested, tmp_path / "file"), level=level, check=False)
    assert not plain.training
    assert all(parameter.requires_grad for parameter in plain.parameters())
    expected = nested.at_level(level).state_dict()
    found = plain.state_dict()
    assert list(found) == list(expected)
    for name, tensor in expected.items():
        assert torch.equal(found[name], tensor), name
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        assert torch.equal(plain(images), nested(images, level=level))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_other_types_are_read_into_a_float32_network(tmp_path: Path, dtype: torch.dtype) -> None:
    nested = nested_model("test_resnet")
    path = write_file(nested, tmp_path / "file", dtype)
    expected = nested.at_level(2).state_dict()
    for name, tensor in nestify.load(path, level=2, check=False).state_dict().items():
        stored = expected[name]
        if name not in nested.own_tensors(2) and stored.is_floating_point():
            stored = stored.to(dtype).float()
        assert torch.equal(tensor, stored), name
    full = nestify.load(path, check=False)
    assert torch.equal(full.network.conv1[0].weight, nested.network.conv1[0].weight.to(dtype).float())


def test_a_level_by_name(tmp_path: Path) -> None:
    path = write_file(nested_model("test_resnet"), tmp_path / "file")
    by_number = nestify.load(path, level=2, check=False).state_dict()
    by_name = nestify.load(path, level="size-2", check=False).state_dict()
    assert all(torch.equal(by_name[name], tensor) for name, tensor in by_number.items())
    with pytest.raises(RecipeError, match="no level '4'; give one of 1"):
        nestify.load(path, level=4)


def test_no_byte_above_the_level_is_read(tmp_path: Path) -> None:
    """The file is truncated after the level, so that a higher level is refused."""
    path = write_file(nested_model("test_resnet"), tmp_path / "file")
    end = reader.open_nested_file(path).prefix_bytes(2)
    expected = nestify.load(path, level=2, check=False).state_dict()
    path.write_bytes(path.read_bytes()[:end])
    found = nestify.load(path, level=2, check=False).state_dict()
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())
    with pytest.raises(BadFileError, match=r"truncated.*levels 1 .*, 2 .* are complete"):
        nestify.load(path, level=3)


@pytest.mark.parametrize("level", range(1, LEVELS + 1))
def test_a_remote_level_reads_only_its_prefix(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, level: int
) -> None:
    path = write_file(nested_model("test_resnet"), tmp_path / "file")
    expected = nestify.load(path, level=level, check=False).state_dict()
    prefix = reader.open_nested_file(path).prefix_bytes(level)
    local = LocalFile(path)

    class Remote:
        name, size = "remote", local.size
        bytes_read = 0

        def read(self, offset: int, length: int) -> bytearray:
            Remote.bytes_read += length
            return local.read(offset, length)

    monkeypatch.setattr(reader, "open_source", lambda path: Remote())
    found = nestify.load("https://example.org/file", level=level, check=False).state_dict()
    assert Remote.bytes_read == prefix
    assert all(torch.equal(found[name], tensor) for name, tensor in expected.items())


def test_memory_beyond_the_network(tmp_path: Path) -> None:
    """NumPy and Python need memory for the entry levels of the largest weight, plus a small constant."""
    nested = nested_model("resnet18")
    path = write_file(nested, tmp_path / "file")
    largest = max(entry.numel() for _, entry in nested.entry.items())
    del nested
    nestify.load(path, level=1, check=False)
    tracemalloc.start()
    nestify.load(path, level=3, check=False)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 2 * largest + 4 * 2**20


@pytest.mark.parametrize("architecture", ["test_resnet", "test_vit", "test_efficientnet", "test_convnext"])
def test_an_unfilled_network_differs_only_in_its_weights(architecture: str) -> None:
    filled, bare = build_model(architecture, {}), build_model(architecture, {}, random_weights=False)
    expected = filled.state_dict()
    assert {n: (t.shape, t.dtype) for n, t in bare.state_dict().items()} == {
        n: (t.shape, t.dtype) for n, t in expected.items()
    }
    persistent = set(expected)
    for (name, buffer), (_, other) in zip(bare.named_buffers(), filled.named_buffers(), strict=True):
        if name not in persistent:
            assert torch.equal(buffer, other), name
    bare.load_state_dict(expected)
    images = torch.randn(1, 3, 160, 160)
    with torch.no_grad():
        assert torch.equal(bare.eval()(images), filled.eval()(images))


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**32 - 1), st.sampled_from([torch.float32, torch.float16, torch.bfloat16]))
def test_rounding_is_the_same_as_in_a_file(tmp_path_factory, seed: int, dtype: torch.dtype) -> None:
    path = tmp_path_factory.mktemp("rounded") / "file"
    nested = nested_model("test_resnet", seed)
    write_file(nested, path, dtype)
    nested.round_to(dtype)
    again = nestify.load(path, check=False)
    for level in range(1, LEVELS + 1):
        expected = nested.at_level(level).state_dict()
        for name, tensor in again.at_level(level).state_dict().items():
            assert torch.equal(tensor, expected[name]), name


def test_rounding_refuses_values_that_overflow() -> None:
    nested = nested_model("test_resnet")
    with torch.no_grad():
        nested.network.conv1[0].weight[0, 0, 0, 0] = 1e6
    with pytest.raises(ValueError, match=r"'conv1.0.weight' holds 1e\+06, which overflows torch.float16"):
        nested.round_to(torch.float16)
    nested.round_to(torch.bfloat16)


def test_rounding_zeroes_weights_that_no_level_uses() -> None:
    nested = nested_model("test_resnet")
    entry = nested.entry["conv1.0.weight"]
    entry[0, 0, 0, 0] = LEVELS + 1
    with torch.no_grad():
        nested.network.conv1[0].weight[0, 0, 0, 0] = float("inf")
    nested.round_to(torch.float16)
    assert nested.network.conv1[0].weight[0, 0, 0, 0] == 0
