"""Narrower and shallower levels: how a file stores them, and what a level reads."""

import re
import subprocess
import sys
import tempfile
import tracemalloc
from collections.abc import Callable, Mapping
from dataclasses import replace
from functools import reduce
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors.torch import load_file

from nestify.errors import OutputError
from nestify.file.axes import axis_levels
from nestify.file.manifest import Manifest
from nestify.file.reader import open_nested_file
from nestify.file.slicing import slice_file, upgrade_slice
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState
from tests.file.builders import (
    assert_same_state,
    at_level,
    axes_description,
    axes_state,
    box,
    description,
    pseudo_random,
)
from tests.file.damage import Parts, damage, refusal

LEVELS = (1, 2, 3)


@pytest.fixture
def axes_file(tmp_path: Path) -> Path:
    """Write a file with the three levels of `axes_state`, about 11 kB."""
    path = tmp_path / "axes.safetensors"
    write_nested_file(path, axes_state(), axes_description(3))
    return path


def u8(*levels: int) -> torch.Tensor:
    return torch.tensor(levels, dtype=torch.uint8)


def write_one(path: Path, axes: Mapping[int, torch.Tensor], entry: torch.Tensor, n_levels: int) -> Manifest:
    """Write a file with one tensor `w` of pseudo-random values."""
    state = NestedState(
        {"w": pseudo_random(entry.shape, salt=1)},
        EntryLevels(n_levels, {"w": entry}),
        [{}] * n_levels,
        axes={"w": dict(axes)},
    )
    return write_nested_file(path, state, description(n_levels))


# Manifest


@pytest.mark.parametrize(
    ("axes", "stored"),
    [
        ({0: u8(1, 1, 2, 3, 3, 1)}, [[[1, 2], [2, 1], [3, 2], [1, 1]], []]),
        ({1: u8(2, 2, 2, 2)}, [[], [[2, 4]]]),
        ({1: u8(4, 1, 2, 1), 0: u8(1, 2, 2, 2, 2, 2)}, [[[1, 1], [2, 5]], [[4, 1], [1, 1], [2, 1], [1, 1]]]),
        ({0: u8(1, 1, 1, 1, 1, 1), 1: u8(1, 1, 1, 2)}, [[], [[1, 3], [2, 1]]]),
    ],
)
def test_runs(tmp_path: Path, axes: dict[int, torch.Tensor], stored: list[Any]) -> None:
    write_one(tmp_path / "file", axes, box((6, 4), axes), 3)
    [parameter] = Parts.parse((tmp_path / "file").read_bytes()).manifest["parameters"]
    assert parameter["axes"] == stored


@pytest.mark.parametrize("axes", [{}, {0: u8(1, 1, 1, 1, 1, 1)}, {0: u8(*[1] * 6), 1: u8(*[1] * 4)}])
def test_no_axes_if_level_1_uses_all_indices(tmp_path: Path, axes: dict[int, torch.Tensor]) -> None:
    write_one(tmp_path / "file", axes, torch.ones(6, 4, dtype=torch.uint8), 2)
    manifest = Parts.parse((tmp_path / "file").read_bytes()).manifest
    assert "axes" not in manifest["parameters"][0]
    assert not {"width", "depth", "skipped"} & set(manifest["levels"][0])
    assert open_nested_file(tmp_path / "file").state().axes == {}


def test_the_manifest_has_the_requested_sizes(axes_file: Path) -> None:
    file = open_nested_file(axes_file)
    assert file.manifest.schedule == "combined"
    assert [level.width for level in file.manifest.levels] == pytest.approx([1 / 3, 2 / 3, 1])
    assert [level.depth for level in file.manifest.levels] == [0.5, 1, 1]
    assert [level.skipped for level in file.manifest.levels] == [["block"], [], []]


def test_axis_levels(axes_file: Path) -> None:
    state = axes_state()
    for parameter in open_nested_file(axes_file).manifest.parameters:
        axes = state.axes.get(parameter.name, {})
        for level in LEVELS:
            found = axis_levels(parameter, level)
            assert list(found) == sorted(axes)
            for dim, levels in found.items():
                assert levels.dtype == np.uint8
                assert levels.tolist() == [min(own, level + 1) for own in axes[dim].tolist()]


def test_axis_levels_need_no_torch(axes_file: Path) -> None:
    code = (
        "import sys; from nestify.file.axes import axis_levels;"
        "from nestify.file.reader import open_nested_file;"
        f"[axis_levels(p, 2) for p in open_nested_file({str(axes_file)!r}).manifest.parameters];"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


# Stored tensors


def test_channel_levels_need_no_positions(axes_file: Path) -> None:
    """The values of a level are those in its box, but in no smaller box, in C order."""
    state, stock = axes_state(), load_file(axes_file)
    for name in ("stem.weight", "stem.bias", "table", "head.weight"):
        assert not [stored for stored in stock if stored.endswith(f"/entry/{name}")]
        first = box(state.shared[name].shape, state.axes[name])
        for level in LEVELS:
            values = state.shared[name][first == level]
            assert torch.equal(stock[f"level{level}/values/{name}"], values)


def test_positions_are_coded_over_what_is_available(axes_file: Path) -> None:
    """Positions have one bit for each weight that is available at the level and not used by a lower level."""
    state, stock = axes_state(), load_file(axes_file)
    entry = state.entry["qkv.weight"]
    first = box(entry.shape, state.axes["qkv.weight"])
    for level in LEVELS:
        enters = entry[(entry >= level) & (first <= level)] == level
        bits = np.unpackbits(stock[f"level{level}/entry/qkv.weight"].numpy(), bitorder="little")
        assert bits[: enters.numel()].tolist() == enters.int().tolist()
        assert bits.size == -(-enters.numel() // 64) * 64
        values = state.shared["qkv.weight"][entry == level]
        assert torch.equal(stock[f"level{level}/values/qkv.weight"], values)


def test_a_skipped_module_takes_no_bytes(axes_file: Path) -> None:
    stock = load_file(axes_file)
    assert [name for name in stock if "/block." in name and name.startswith("level1")] == []
    state = open_nested_file(axes_file).state(1)
    assert not state.shared["block.weight"].any()
    assert state.axes["block.weight"][0].tolist() == [2] * 45
    assert state.shared["block.gamma"].item() == 0


def test_private_tensors_are_as_wide_as_their_level(axes_file: Path) -> None:
    state = open_nested_file(axes_file).state()
    assert [private["bn.running_var"].shape for private in state.private] == [(3,), (6,), (9,)]
    for level in LEVELS:
        tensors = open_nested_file(axes_file).level_tensors(level)
        assert torch.equal(tensors["bn.running_var"], axes_state().private[level - 1]["bn.running_var"])


@pytest.mark.parametrize("level", LEVELS)
def test_a_level_fills_tensors_of_full_shape(axes_file: Path, level: int) -> None:
    """Tensors to fill get the level's values, and 0 elsewhere, regardless of their old content."""
    state = axes_state()
    into = {name: torch.full_like(tensor, torch.nan) for name, tensor in state.shared.items()}
    tensors = open_nested_file(axes_file).level_tensors(level, into=into)
    for name, tensor in at_level(state, level).shared.items():
        assert tensors[name].data_ptr() == into[name].data_ptr()
        assert torch.equal(tensors[name], tensor)
    assert tensors["tied.weight"] is tensors["head.weight"]


# Random axes


@st.composite
def random_axes(draw: st.DrawFn) -> tuple[int, dict[int, torch.Tensor], torch.Tensor]:
    """Draw a number of levels, levels of the indices, and entry levels with or without sparsity."""
    n_levels = draw(st.integers(1, 5))
    shape = draw(hnp.array_shapes(min_dims=1, max_dims=4, min_side=1, max_side=7))
    axes = {
        dim: torch.from_numpy(draw(hnp.arrays(np.uint8, shape[dim], elements=st.integers(1, n_levels + 1))))
        for dim in draw(st.sets(st.integers(0, len(shape) - 1), min_size=1))
    }
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    highest = draw(st.integers(1, n_levels + 1))
    entry = rng.integers(1, highest, shape, np.uint8, endpoint=True)
    entry[rng.random(shape) < draw(st.sampled_from([0.0, 0.5, 1.0]))] = 1
    return n_levels, axes, torch.maximum(box(shape, axes), torch.from_numpy(entry))


@settings(deadline=None, max_examples=80)
@given(random_axes(), st.data())
def test_random_axes_round_trip(
    drawn: tuple[int, dict[int, torch.Tensor], torch.Tensor], data: st.DataObject
) -> None:
    n_levels, axes, entry = drawn
    low = data.draw(st.integers(1, n_levels))
    high = data.draw(st.integers(low, n_levels))
    with tempfile.TemporaryDirectory() as folder:
        full, first, second, third = (Path(folder) / name for name in ("full", "first", "second", "third"))
        manifest = write_one(full, axes, entry, n_levels)
        assert open_nested_file(full).manifest == manifest
        for level in range(1, n_levels + 1):
            check_level(full, axes, entry, level)
        slice_file(full, low, first)
        assert_same_state(open_nested_file(first).state(), open_nested_file(full).state(low))
        slice_file(full, high, second)
        slice_file(second, low, third)
        assert third.read_bytes() == first.read_bytes()
        upgrade_slice(full, high, third)
        assert third.read_bytes() == second.read_bytes()
        slice_file(full, n_levels, third)
        assert third.read_bytes() == full.read_bytes()


def check_level(path: Path, axes: dict[int, torch.Tensor], entry: torch.Tensor, level: int) -> None:
    """Check that a level is the box of its indices in the masked tensor, and 0 elsewhere."""
    file = open_nested_file(path)
    masked = np.where(entry.numpy() <= level, pseudo_random(entry.shape, salt=1).numpy(), 0)
    kept = {dim: np.flatnonzero(levels.numpy() <= level) for dim, levels in axes.items()}
    everything = [np.arange(extent) for extent in entry.shape]
    cut = np.ix_(*(kept.get(dim, everything[dim]) for dim in range(entry.dim())))
    available = reduce(
        np.logical_and.outer,
        [np.isin(every, kept.get(dim, every)) for dim, every in enumerate(everything)],
    )
    found = file.level_tensors(level)["w"].numpy()
    assert np.array_equal(found[cut], masked[cut])
    assert not found[~available].any()
    state = file.state(level)
    assert np.array_equal(state.entry["w"].numpy(), np.minimum(entry.numpy(), level + 1))
    expected = {dim: levels.clamp(max=level + 1).tolist() for dim, levels in axes.items() if levels.max() > 1}
    assert {dim: levels.tolist() for dim, levels in state.axes.get("w", {}).items()} == expected


def test_more_weights_than_one_segment(tmp_path: Path) -> None:
    """Segments end inside rows; every coding occurs, and so do levels at which no weight enters."""
    shape = (37, 611, 13)
    assert np.prod(shape) > 2 * 2**17
    rng = np.random.default_rng(0)
    levels = np.array([1, 3, 4, 5, 6], np.uint8)
    axes = {dim: torch.from_numpy(rng.choice(levels, shape[dim])) for dim in (0, 1)}
    axes[2] = u8(*[1] * 6, *[3] * 7)
    sparse = torch.bucketize(torch.from_numpy(rng.random(shape)), torch.tensor([0.01, 0.01, 0.3])) + 1
    for entry in (box(shape, axes), torch.maximum(box(shape, axes), sparse.to(torch.uint8))):
        manifest = write_one(tmp_path / "file", axes, entry, 5)
        for level in (1, 2, 3, 4, 5):
            check_level(tmp_path / "file", axes, entry, level)
    assert manifest.parameters[0].coding == ["elias-fano", "none", "bits", "all", "all"]


def test_memory_is_a_byte_per_weight(tmp_path: Path) -> None:
    """Counts NumPy's memory, which includes the positions, but not the tensor that is filled."""
    shape = (2048, 2048)
    axes = {dim: torch.arange(shape[dim]).remainder(3).add(1).to(torch.uint8) for dim in (0, 1)}
    entry = box(shape, axes)
    entry[::2] = 3
    into = {"w": torch.empty(shape)}
    write_one(tmp_path / "file", axes, entry, 3)
    file = open_nested_file(tmp_path / "file")
    tracemalloc.start()
    file.level_tensors(3, into=into)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 1.5 * entry.numel()


def test_the_largest_number_of_levels(tmp_path: Path) -> None:
    axes = {0: torch.arange(1, 256, dtype=torch.uint8), 1: torch.arange(255, 0, -1, dtype=torch.uint8)}
    entry = box((255, 255), axes)
    write_one(tmp_path / "file", axes, entry, 254)
    for level in (1, 127, 128, 253, 254):
        check_level(tmp_path / "file", axes, entry, level)


# Slices


def test_slices_with_axes(axes_file: Path, tmp_path: Path) -> None:
    for level in LEVELS:
        slice_file(axes_file, level, tmp_path / "slice")
        own = open_nested_file(tmp_path / "slice")
        assert_same_state(own.state(), at_level(axes_state(), level))
        assert [entry.skipped for entry in own.manifest.levels] == [["block"], [], []][:level]
    assert (tmp_path / "slice").read_bytes() == axes_file.read_bytes()


def test_slices_merge_runs(tmp_path: Path) -> None:
    axes = {0: u8(1, 2, 3, 4, 1, 3), 1: u8(1, 1, 3, 4)}
    write_one(tmp_path / "file", axes, box((6, 4), axes), 3)
    for level, stored in [
        (1, [[[1, 1], [2, 3], [1, 1], [2, 1]], [[1, 2], [2, 2]]]),
        (2, [[[1, 1], [2, 1], [3, 2], [1, 1], [3, 1]], [[1, 2], [3, 2]]]),
        (3, [[[1, 1], [2, 1], [3, 1], [4, 1], [1, 1], [3, 1]], [[1, 2], [3, 1], [4, 1]]]),
    ]:
        slice_file(tmp_path / "file", level, tmp_path / "slice")
        [parameter] = Parts.parse((tmp_path / "slice").read_bytes()).manifest["parameters"]
        assert parameter["axes"] == stored


# Refused files


def set_parameter(name: str, /, **changes: object) -> Callable[[Parts], None]:
    return lambda parts: parts.parameter(name).update(changes)


def set_axis(*runs: object) -> Callable[[Parts], None]:
    return set_parameter("stem.bias", axes=[list(runs)])


def set_level(index: int, /, **changes: object) -> Callable[[Parts], None]:
    return lambda parts: parts.manifest["levels"][index].update(changes)


@pytest.mark.parametrize(
    ("change", "problem"),
    [
        (set_axis([1, 3], [2, 3], [5, 3]), "'stem.bias' has an axis 0 with level 5 where 4 is the highest"),
        (set_axis([0, 3], [2, 3], [3, 3]), r"schema at 'parameters.1.axes.0.0.0'"),
        (set_axis([256, 3], [2, 3], [3, 3]), r"schema at 'parameters.1.axes.0.0.0'"),
        (set_axis([1, 3], [2, 0], [3, 6]), r"schema at 'parameters.1.axes.0.1.1'"),
        (set_axis([1, 3], [2, -3], [3, 9]), r"schema at 'parameters.1.axes.0.1.1'"),
        (set_axis([1, 3, 1], [2, 3], [3, 3]), r"schema at 'parameters.1.axes.0.0"),
        (set_axis([1, 3], [2, 3], [3.0, 3]), r"schema at 'parameters.1.axes.0.2.0'"),
        (set_axis(None), r"schema at 'parameters.1.axes.0.0'"),
        (set_axis([1, 3], [2, 3], [3, 2]), "'stem.bias' has an axis 0 with 8 indices where it has 9"),
        (set_axis([1, 3], [2, 3], [3, 10**18]), "has an axis 0 with .* indices where it has 9"),
        (set_axis([1, 3], [2, 1], [2, 2], [3, 3]), "'stem.bias' has an axis 0 in more runs than it takes"),
        (set_axis([1, 9]), "'stem.bias' has an axis 0 in more runs than it takes"),
        (set_axis(), "'stem.bias' has axes that do not fit its 1 dimensions"),
        (set_parameter("stem.bias", axes=[]), "entry positions in a coding that does not fit"),
        (set_parameter("stem.bias", axes=[[[1, 3], [2, 6]], []]), "axes that do not fit its 1 dimensions"),
        (set_parameter("block.gamma", axes=[[[2, 1]]]), "axes that do not fit its 0 dimensions"),
        (set_parameter("head.bias", axes=[[[1, 2], [2, 3]]]), "only maskable tensors without blocks have"),
        (set_parameter("stem.weight", unit=[3, 1]), "only maskable tensors without blocks have"),
        (set_axis([1, 2], [2, 4], [3, 3]), "'stem.bias' has 3 entering units at level 1 where it has 2"),
        (set_axis([1, 3], [2, 2], [3, 4]), "'stem.bias' has 6 entering units at level 2 where it has 5"),
        (set_axis([1, 4], [2, 2], [3, 3]), "entry positions in a coding that does not fit"),
        (set_axis([1, 3], [2, 3], [4, 3]), "'stem.bias' has 9 entering units at level 3 where it has 6"),
        (set_parameter("stem.bias", entering=[3, 4, 2]), "'stem.bias' has 7 entering units at level 2"),
        (set_level(1, skipped=["block", "more"]), "level 'size-2' skips 'more', which the level below does"),
        (set_level(2, skipped=["block"]), "level 'size-3' skips 'block', which the level below does not"),
        (set_level(0, skipped=["block", "block"]), "lists the skipped module 'block' twice"),
        (set_level(0, skipped=["\x1b[31m"]), "as the name of a skipped module"),
        (set_level(0, skipped=[3]), "schema at 'levels.0.skipped.0'"),
        (set_level(0, width=1.5), "schema at 'levels.0.width'"),
        (set_level(0, depth="1"), "schema at 'levels.0.depth'"),
    ],
)
def test_forged_axes(axes_file: Path, change: Callable[[Parts], object], problem: str) -> None:
    damage(axes_file, change)
    assert re.search(problem, refusal(axes_file))


@pytest.mark.parametrize(
    "change",
    [
        set_axis([2, 3], [1, 3], [3, 3]),  # the same number of channels at each level, but different ones
        set_axis([1, 1], [2, 3], [1, 2], [3, 3]),
        set_level(0, width=0, depth=0),
        set_level(1, skipped=["block"]),
    ],
)
def test_different_axes_that_fit_the_data_are_accepted(
    axes_file: Path, change: Callable[[Parts], object]
) -> None:
    """The reader accepts any manifest that the data does not contradict."""
    damage(axes_file, change)
    state = open_nested_file(axes_file).state()
    assert sorted(state.axes["stem.bias"][0].tolist()) == [1, 1, 1, 2, 2, 2, 3, 3, 3]
    assert torch.equal(state.entry["stem.bias"], state.axes["stem.bias"][0])


def contradictions() -> list[tuple[str, NestedState]]:
    good = axes_state()

    def state(name: str, axes: dict[int, torch.Tensor], **changes: Any) -> NestedState:
        return replace(good, axes=good.axes | {name: axes}, **changes)

    return [
        ("'head.bias' has axes, but", state("head.bias", {0: u8(1, 1, 1, 2, 2)})),
        ("'unknown' has axes, but", state("unknown", {0: u8(1, 2)})),
        ("has axes, but blocks", replace(good, units={"head.weight": (5, 1)})),
        (r"'stem.bias' of shape \(9,\) has no axis 1", state("stem.bias", {1: u8(*[2] * 9)})),
        ("'stem.bias' .* has no axis -1", state("stem.bias", {-1: u8(*[2] * 9)})),
        ("'stem.bias' .* has no axis 0", state("stem.bias", {0: u8(*[2] * 8)})),
        ("'stem.bias' .* has no axis 0", state("stem.bias", {0: torch.ones(9, dtype=torch.int64)})),
        ("'stem.bias' has levels that are not in 1..4", state("stem.bias", {0: u8(0, *[1] * 8)})),
        ("'stem.bias' has levels that are not in 1..4", state("stem.bias", {0: u8(*[1] * 8, 5)})),
        ("weights of 'stem.bias' enter before", state("stem.bias", {0: u8(2, 1, 1, 2, 2, 2, 3, 3, 3)})),
    ]


@pytest.mark.parametrize(("problem", "state"), contradictions())
def test_contradictions_are_bugs(tmp_path: Path, problem: str, state: NestedState) -> None:
    with pytest.raises(ValueError, match=problem):
        write_nested_file(tmp_path / "file", state, axes_description(3))
    assert list(tmp_path.iterdir()) == []


def test_levels_that_skip_more_are_not_written(tmp_path: Path) -> None:
    plain = axes_description(3)
    levels = [
        level.model_copy(update={"skipped": ["block"] if k == 2 else []})
        for k, level in enumerate(plain.levels)
    ]
    with pytest.raises(OutputError, match="skips 'block', which the level below does not skip"):
        write_nested_file(tmp_path / "file", axes_state(), plain.model_copy(update={"levels": levels}))
