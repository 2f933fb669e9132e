"""Byte layout: alignment, padding, order of the levels."""

import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestify.file.layout import (
    DTYPE_BYTES,
    TensorSpec,
    encode_header,
    entry_name,
    name_parts,
    pad_name,
    place,
    private_name,
    values_name,
)
from nestify.file.reader import open_nested_file

specs = st.builds(
    TensorSpec,
    name=st.uuids().map(str),
    dtype=st.sampled_from(sorted(DTYPE_BYTES)),
    shape=st.lists(st.integers(0, 5), max_size=3).map(tuple),
)


@given(st.lists(st.lists(specs, max_size=6), min_size=1, max_size=4))
def test_tensors_tile_the_data_aligned_and_in_order(chunks: list[list[TensorSpec]]) -> None:
    layout = place(chunks)
    offset = 0
    for level, (specs, chunk, end) in enumerate(
        zip(chunks, layout.chunks, layout.ends, strict=True), start=1
    ):
        assert [s.spec for s in chunk if not s.spec.name.startswith(f"level{level}/pad/")] == specs
        for slot in chunk:
            assert slot.begin == offset
            offset += slot.spec.nbytes
            assert slot.end == offset
            if slot.spec in specs:
                assert slot.begin % 8 == 0
            else:
                assert 0 < slot.spec.nbytes < 8
                assert slot.spec.dtype == "U8"
        assert end == offset
        assert end % 8 == 0
    assert sum(layout.chunk_bytes) == offset


def test_one_pad_after_each_tensor_that_needs_it() -> None:
    layout = place(
        [[TensorSpec("a", "F16", (3,)), TensorSpec("b", "F64", ())], [TensorSpec("c", "BOOL", (9,))]]
    )
    assert [(slot.spec.name, slot.begin, slot.end) for slot in layout.slots] == [
        ("a", 0, 6),
        ("level1/pad/0", 6, 8),
        ("b", 8, 16),
        ("c", 16, 25),
        ("level2/pad/0", 25, 32),
    ]
    assert layout.ends == (16, 32)


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        (values_name(12, "a/b.weight"), ("values", "a/b.weight")),
        (entry_name(1, "fc.weight"), ("entry", "fc.weight")),
        (private_name(3, "bn.bias"), ("private", "bn.bias")),
        (pad_name(2, 5), ("pad", "5")),
    ],
)
def test_names_are_split_into_kind_and_tensor(name: str, parts: tuple[str, str]) -> None:
    assert name_parts(name) == parts


def test_header_is_compact_aligned_and_sorted(small_file) -> None:
    file = open_nested_file(small_file)
    header = encode_header(file.layout, file.manifest)
    assert small_file.read_bytes().startswith(header)
    assert len(header) % 8 == 0
    assert int.from_bytes(header[:8], "little") == len(header) - 8
    metadata = json.loads(header[8:])["__metadata__"]
    assert set(metadata) == {"nestify.format", "nestify.manifest"}
    assert metadata["nestify.format"] == "1"
    manifest = json.loads(metadata["nestify.manifest"])
    assert metadata["nestify.manifest"] == json.dumps(manifest, sort_keys=True, separators=(",", ":"))
