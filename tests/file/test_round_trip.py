"""Written files are read unchanged: by nestify for each level, and by the official safetensors library."""

import subprocess
import sys
import tempfile
import tracemalloc
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from safetensors import safe_open

from nestify.errors import RecipeError
from nestify.file.reader import open_nested_file
from nestify.file.writer import write_nested_file
from nestify.model.entry_levels import EntryLevels, NestedState
from tests.file.builders import (
    assert_same_state,
    at_level,
    axes_description,
    axes_state,
    box,
    description,
    small_state,
)

FLOATING = [torch.float32, torch.float16, torch.bfloat16]
OTHERS = [torch.float64, torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool]
GOLDEN = Path(__file__).parent / "golden"


def random_tensor(draw: st.DrawFn, shape: tuple[int, ...], dtype: torch.dtype) -> torch.Tensor:
    seed = draw(st.integers(0, 2**32 - 1))
    tensor = torch.randn(shape, generator=torch.Generator().manual_seed(seed)) * 3
    return tensor.to(dtype)


@st.composite
def states(draw: st.DrawFn) -> NestedState:
    """Draw a state: shapes of 0 to 4 dims (also sides of 0), densities, blocks, types, private tensors."""
    n_levels = draw(st.integers(1, 4))
    shared, entry, units, axes = {}, {}, {}, {}
    for index in range(draw(st.integers(0, 4))):
        name = f"layer{index}.weight"
        shape = draw(hnp.array_shapes(min_dims=0, max_dims=4, min_side=0, max_side=6))
        shared[name] = random_tensor(draw, shape, draw(st.sampled_from(FLOATING + OTHERS)))
        if not shared[name].is_floating_point() or draw(st.booleans()):
            continue
        unit = draw(st.sampled_from([(1, 1), (2, 1), (1, 3), (4, 4)])) if len(shape) >= 2 else (1, 1)
        used = draw(st.lists(st.integers(1, n_levels + 1), min_size=1, max_size=4))
        rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
        levels = rng.choice(np.array(used, np.uint8), shape)
        for axis, side in enumerate(unit if len(shape) >= 2 else ()):
            levels = np.take(levels, np.arange(shape[axis]) // side, axis=axis)
        if unit == (1, 1) and draw(st.booleans()):
            axes[name] = draw(axis_levels(shape, n_levels))
            levels = np.maximum(levels, box(shape, axes[name]).numpy())
        entry[name] = torch.from_numpy(np.array(levels, np.uint8))
        units[name] = unit
    private = [
        {
            f"bn{index}": random_tensor(
                draw,
                draw(hnp.array_shapes(min_dims=0, max_dims=2, min_side=0, max_side=5)),
                draw(st.sampled_from(FLOATING + OTHERS)),
            )
            for index in range(draw(st.integers(0, 2)))
        }
        for _ in range(n_levels)
    ]
    aliases = {"tied.weight": next(iter(shared))} if shared and draw(st.booleans()) else {}
    return NestedState(shared, EntryLevels(n_levels, entry), private, aliases, units, axes)


@st.composite
def axis_levels(draw: st.DrawFn, shape: tuple[int, ...], n_levels: int) -> dict[int, torch.Tensor]:
    """Draw levels of the indices of some of the dimensions."""
    dims = draw(st.sets(st.integers(0, len(shape) - 1))) if shape else set()
    return {
        dim: torch.tensor(
            draw(st.lists(st.integers(1, n_levels + 1), min_size=shape[dim], max_size=shape[dim])),
            dtype=torch.uint8,
        )
        for dim in dims
    }


def cast_shared(state: NestedState, dtype: torch.dtype) -> NestedState:
    """Cast the shared floating-point tensors to the type in which a file stores them."""
    shared = {n: t.to(dtype) if t.is_floating_point() else t for n, t in state.shared.items()}
    return replace(state, shared=shared)


@settings(deadline=None, max_examples=80)
@given(states(), st.sampled_from(FLOATING))
def test_every_level_round_trips(state: NestedState, dtype: torch.dtype) -> None:
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        manifest = write_nested_file(path, state, description(state.entry.n_levels), dtype)
        file = open_nested_file(path)
        assert file.manifest == manifest
        for level in range(1, file.n_levels + 1):
            assert_same_state(file.state(level), at_level(cast_shared(state, dtype), level))
        assert_same_state(file.state(), file.state(file.n_levels))
        assert file.prefix_bytes(file.n_levels) == path.stat().st_size
        stock = safetensors.torch.load_file(path)
        assert set(stock) == {slot.spec.name for slot in file.layout.slots}


@pytest.mark.parametrize("dtype", FLOATING)
def test_stock_safetensors_reads_the_same_tensors(tmp_path: Path, dtype: torch.dtype) -> None:
    path = tmp_path / "model.safetensors"
    state = small_state()
    write_nested_file(path, state, description(3), dtype)
    tensors = safetensors.torch.load_file(path)
    for name in state.entry:
        for level in (1, 2, 3):
            values = state.shared[name][state.entry[name] == level].to(dtype)
            assert torch.equal(tensors[f"level{level}/values/{name}"], values)
    assert torch.equal(tensors["level1/values/fc.bias"], state.shared["fc.bias"].to(dtype))
    assert torch.equal(tensors["level1/values/index"], state.shared["index"])
    for level, private in enumerate(state.private, start=1):
        for name, tensor in private.items():
            assert torch.equal(tensors[f"level{level}/private/{name}"], tensor)
    kinds = {name.split("/")[1] for name in tensors}
    assert kinds == {"values", "entry", "private", "pad"}
    with safe_open(path, "pt") as opened:
        assert opened.metadata()["nestify.format"] == "1"


def test_a_level_needs_no_byte_after_its_prefix(small_file: Path) -> None:
    file = open_nested_file(small_file)
    full = small_file.read_bytes()
    for level in (1, 2, 3):
        end = file.prefix_bytes(level)
        small_file.write_bytes(full[:end] + bytes(len(full) - end))
        assert_same_state(open_nested_file(small_file).state(level), at_level(small_state(), level))


def test_masked_out_weights_are_not_stored(tmp_path: Path) -> None:
    """A masked-out weight may have any value, even NaN; a weight that no level uses is not stored."""
    state = small_state()
    for name in state.entry:
        state.shared[name][state.entry[name] > 3] = torch.nan
    manifest = write_nested_file(tmp_path / "model", state, description(3))
    file = open_nested_file(tmp_path / "model")
    assert_same_state(file.state(), at_level(state, 3))
    kept = {name: int((state.entry[name] <= 3).sum()) for name in state.entry}
    stored = dict.fromkeys(kept, 0)
    for slot in file.layout.slots:
        kind, name = slot.spec.name.split("/")[1:]
        if kind == "values" and name in stored:
            stored[name] += slot.spec.shape[0]
    assert stored == kept
    assert sum(manifest.parameters[1].entering) == kept["fc.weight"]


def test_tensors_without_elements(tmp_path: Path) -> None:
    """Shared tensors are not stored, as the manifest has their shape; private tensors are, with no bytes."""
    shared = {"w": torch.empty(0, 3), "b": torch.empty(2, 0)}
    entry = EntryLevels(1, {"w": torch.empty(0, 3, dtype=torch.uint8)})
    state = NestedState(shared, entry, [{"p": torch.empty(0, dtype=torch.int64)}])
    write_nested_file(tmp_path / "model", state, description(1))
    stock = safetensors.numpy.load_file(tmp_path / "model")
    assert {name: array.shape for name, array in stock.items()} == {"level1/private/p": (0,)}
    assert_same_state(open_nested_file(tmp_path / "model").state(), state)


def test_layouts_in_memory_do_not_matter(tmp_path: Path) -> None:
    """Channels-last tensors, slices and parameters that require gradients give the same bytes."""
    state = small_state()
    write_nested_file(tmp_path / "plain", state, description(3))
    shared = dict(state.shared)
    shared["conv.weight"] = torch.nn.Parameter(shared["conv.weight"].to(memory_format=torch.channels_last))
    shared["fc.weight"] = torch.stack([shared["fc.weight"]] * 2, dim=-1)[..., 1]
    entry = {name: state.entry[name].transpose(0, 1).contiguous().transpose(0, 1) for name in state.entry}
    other = NestedState(shared, EntryLevels(3, entry), state.private, state.aliases, state.units)
    write_nested_file(tmp_path / "other", other, description(3))
    assert (tmp_path / "plain").read_bytes() == (tmp_path / "other").read_bytes()


def test_the_largest_number_of_levels(tmp_path: Path) -> None:
    entry = torch.arange(1, 256, dtype=torch.uint8)
    state = NestedState({"w": torch.arange(255.0)}, EntryLevels(254, {"w": entry}), [{} for _ in range(254)])
    write_nested_file(tmp_path / "model", state, description(254))
    assert_same_state(open_nested_file(tmp_path / "model").state(), at_level(state, 254))


def test_levels_are_found_by_name_and_number(small_file: Path) -> None:
    file = open_nested_file(small_file)
    assert [file.level_index(name) for name in ("size-2", "2", "level2")] == [2, 2, 2]
    for wrong in ("size-4", "4", "0", "level0", "-1", ""):
        with pytest.raises(RecipeError, match=r"size-1.*size-2.*size-3"):
            file.level_index(wrong)
    for number in (0, 4, -1):
        with pytest.raises(RecipeError, match="no level"):
            file.state(number)
        with pytest.raises(RecipeError, match="no level"):
            file.prefix_bytes(number)


def test_a_name_comes_before_a_number(tmp_path: Path) -> None:
    levels = [
        level.model_copy(update={"name": n})
        for level, n in zip(description(2).levels, ("level2", "b"), strict=True)
    ]
    state = small_state(2)
    write_nested_file(tmp_path / "model", state, description(2, levels=levels))
    file = open_nested_file(tmp_path / "model")
    assert file.level_index("level2") == 1
    assert file.level_index("2") == 2


@pytest.mark.parametrize("dtype", FLOATING)
def test_golden_files_read_and_are_written_the_same(tmp_path: Path, dtype: torch.dtype) -> None:
    """Format 1 is frozen: these files must stay readable, and writing them must give the same bytes."""
    golden = GOLDEN / f"{str(dtype).removeprefix('torch.')}.safetensors"
    write_nested_file(tmp_path / "model", small_state(), description(3), dtype)
    assert_same_state(open_nested_file(golden).state(), at_level(cast_shared(small_state(), dtype), 3))
    assert (tmp_path / "model").read_bytes() == golden.read_bytes()


def test_golden_file_with_axes(tmp_path: Path) -> None:
    """It is format 1 as well: fields that the first files did not have are omitted if they are empty."""
    golden = GOLDEN / "axes.safetensors"
    write_nested_file(tmp_path / "model", axes_state(), axes_description(3))
    assert_same_state(open_nested_file(golden).state(), at_level(axes_state(), 3))
    assert (tmp_path / "model").read_bytes() == golden.read_bytes()
    assert b"skipped" not in (GOLDEN / "float32.safetensors").read_bytes()


def test_opening_imports_no_torch(small_file: Path) -> None:
    code = (
        "import sys; from nestify.file.reader import open_nested_file;"
        f"file = open_nested_file({str(small_file)!r}); file.prefix_bytes(2); file.level_index('2');"
        "sys.exit('torch' in sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_state_holds_no_file_bytes(tmp_path: Path) -> None:
    """Small tensors are copies, so they do not keep their level's complete chunk (2 MiB here) in memory."""
    shared = {"w": torch.ones(2**19), "bias": torch.ones(3)}
    entry = EntryLevels(1, {"w": torch.ones(2**19, dtype=torch.uint8)})
    write_nested_file(tmp_path / "model", NestedState(shared, entry, [{"m": torch.ones(3)}]), description(1))
    file = open_nested_file(tmp_path / "model")
    tracemalloc.start()
    state = file.state()
    held = tracemalloc.get_traced_memory()[0]
    tracemalloc.stop()
    assert state.entry.total == 2**19
    assert held < 2**20
