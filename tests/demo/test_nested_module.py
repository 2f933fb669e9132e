"""The page's decoder of nested files gives the tensors that were written, at every level."""

import base64
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from nestify.file.reader import open_nested_file
from nestify.file.tensors import TORCH_DTYPES
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState
from tests.demo.node import PAGE, needs_node, run_node
from tests.demo.serving import serving
from tests.file.builders import at_level, axes_description, axes_state, description, entry_levels, small_state

pytestmark = needs_node


def as_dtype(state: NestedState, dtype: torch.dtype) -> NestedState:
    """Return a state whose shared floating-point tensors have a type."""
    shared = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in state.shared.items()
    }
    return replace(state, shared=shared)


def dense_state(dtype: torch.dtype) -> NestedState:
    """Return a larger state, with entry positions of every density and tiny and huge values."""
    shape = (61, 67)
    values = torch.randn(shape) * 10.0 ** torch.randint(-7, 4, shape)
    entry = {
        "sparse.weight": entry_levels(shape, [0.004, 0.01, 0.02], salt=30),
        "half.weight": entry_levels(shape, [0.5, 0.9, 1.0], salt=31),
        "late.weight": torch.full(shape, 2, dtype=torch.uint8),
        "none.weight": torch.full(shape, 4, dtype=torch.uint8),
    }
    shared = {name: values.to(dtype) for name in entry}
    private: list[dict[str, Tensor]] = [{"bn.weight": torch.randn(9)} for _ in range(3)]
    return NestedState(shared=shared, entry=EntryLevels(3, entry), private=private, aliases={})


STATES = {
    "small": (small_state(), description(3), torch.float32),
    "axes": (axes_state(), axes_description(3), torch.float32),
    "float16": (as_dtype(small_state(), torch.float16), description(3), torch.float16),
    "bfloat16": (as_dtype(axes_state(), torch.bfloat16), axes_description(3), torch.bfloat16),
}


def expected_tensors(state: NestedState, level: int) -> dict[str, np.ndarray]:
    """Return a level's tensors as the page must have them, from the state that was written."""
    found = {}
    for name, tensor in at_level(state, level).shared.items():
        values = tensor
        for dim, levels in state.axes.get(name, {}).items():
            values = values.index_select(dim, torch.nonzero(levels <= level).reshape(-1))
        if values.is_floating_point():
            found[name] = values.float().numpy()
    private = state.private[level - 1].items()
    return found | {name: tensor.numpy() for name, tensor in private if tensor.dtype == torch.float32}


def check(lines: list[dict[str, object]], state: NestedState) -> None:
    assert [line["level"] for line in lines] == list(range(1, state.entry.n_levels + 1))
    for level, line in enumerate(lines, start=1):
        tensors = line["tensors"]
        assert isinstance(tensors, dict)
        expected = expected_tensors(state, level)
        assert tensors.keys() == expected.keys()
        for name, values in expected.items():
            found = np.frombuffer(base64.b64decode(tensors[name]), np.float32)
            assert found.tobytes() == values.tobytes(), (level, name)


@pytest.mark.parametrize("name", STATES)
def test_tensors_of_every_level(name: str, tmp_path: Path) -> None:
    state, about, dtype = STATES[name]
    write_nested_file(path := tmp_path / "net.safetensors", state, about, dtype)
    assert dtype in {TORCH_DTYPES[entry.dtype] for entry in open_nested_file(path).manifest.parameters}
    check(run_node("decode.mjs", "nested.js", path), state)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_densities_and_values(dtype: torch.dtype, tmp_path: Path) -> None:
    state = dense_state(dtype)
    write_nested_file(path := tmp_path / "net.safetensors", state, description(3), dtype)
    codings = {coding for entry in open_nested_file(path).manifest.parameters for coding in entry.coding}
    assert codings == {"all", "bits", "elias-fano", "none"}
    check(run_node("decode.mjs", "nested.js", path), state)


@pytest.fixture
def served(tmp_path: Path) -> Iterator[str]:
    write_nested_file(tmp_path / "net.safetensors", small_state(), description(3))
    with serving(tmp_path) as address:
        yield f"{address}/net.safetensors"


def test_a_level_fetches_what_is_missing(served: str, tmp_path: Path) -> None:
    lines = run_node("decode.mjs", "nested.js", served)
    check(lines, small_state())
    file = open_nested_file(tmp_path / "net.safetensors")
    assert [line["fetched"] for line in lines] == file.layout.chunk_bytes


@pytest.mark.parametrize(
    ("change", "problem"), [("data", "SHA-256"), ("cut", "lost"), ("header", "nested file")]
)
def test_damage_is_noticed(change: str, problem: str, served: str, tmp_path: Path) -> None:
    path = tmp_path / "net.safetensors"
    data = bytearray(path.read_bytes())
    if change == "data":
        data[-30] ^= 1
    elif change == "cut":
        del data[-30:]
    else:
        data = bytearray(data.replace(b'"nestify.format":"1"', b'"nestify.format":"2"'))
    path.write_bytes(data)
    with pytest.raises(AssertionError, match=problem):
        run_node("decode.mjs", "nested.js", served)


def test_the_page_has_no_markup_from_names() -> None:
    """Names of a file are untrusted: the page's modules set text, and never HTML."""
    for path in PAGE.glob("*.js"):
        text = path.read_text()
        for word in (
            "innerHTML",
            "outerHTML",
            "insertAdjacentHTML",
            "document.write",
            "eval(",
            "new Function",
        ):
            assert word not in text, (path.name, word)
