"""Writing a nested file: the plan follows from counts, then tensors are streamed one at a time.

All lengths follow from how many weights enter at each level, so the header's length is known before any byte
is encoded. The data is encoded, hashed and written once; then the header with its hashes replaces its
placeholder, and the file is moved to its path.
"""

import hashlib
import os
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import BinaryIO

import numpy as np
import torch
from torch import Tensor

from nestify.errors import OutputError
from nestify.file.checks import check_manifest
from nestify.file.encoder import StoredTensor, axis_arrays, entry_array, parameter_entries, stored_tensors
from nestify.file.layout import FILE_DTYPES, MAX_HEADER_BYTES, Layout, chunk_names, encode_header, place
from nestify.file.manifest import Description, LevelEntry, Manifest, ParameterEntry
from nestify.file.tensors import TORCH_DTYPES
from nestify.file.untrusted import Refusal, quoted
from nestify.files import atomic_file
from nestify.model.entry_levels import NestedState, box_levels

UNKNOWN_SHA256 = "0" * 64
"""Placeholder of hashes that are not known yet, of the same length."""


def write_nested_file(
    path: str | os.PathLike[str],
    state: NestedState,
    description: Description,
    dtype: torch.dtype = torch.float32,
    check: Callable[[Path], object] | None = None,
) -> Manifest:
    """Write a nested network to one file, atomically.

    The additional memory is one tensor and its coding, and for a state that is not on the CPU one byte per
    maskable weight.

    Args:
        path: path of the file; an older file is replaced only when the new one is complete.
        state: the tensors. Weights that no level uses are not stored.
        description: the part of the manifest that does not follow from the tensors.
        dtype: type of the stored shared floating-point tensors: float32, float16 or bfloat16. Private
            tensors keep their own type.
        check: called with the path of the complete file before it is moved; may raise to refuse it.

    Returns:
        The manifest as written.

    Raises:
        OutputError: if the file system refuses, a value is not finite or overflows `dtype`, a tensor's
            type is not supported, or a reader would refuse the file. An older file at `path` is
            then unchanged.
        ValueError: if state, description and dtype contradict each other (a bug of the caller).
    """
    file_name = os.fspath(path)
    _check_arguments(state, description, dtype)
    _check_types(file_name, state)
    parameters = parameter_entries(state, dtype)
    stored = {tensor.spec.name: tensor for tensor in stored_tensors(parameters, state)}
    manifest, layout = _plan(parameters, stored, state, description)
    header = encode_header(layout, manifest)
    _check_readable(file_name, manifest, len(header), layout.ends[-1])
    with atomic_file(path, check) as file:
        file.write(header)
        hashes = _write_data(file, file_name, layout, stored)
        manifest = _update_levels(manifest, "sha256", hashes)
        file.seek(0)
        file.write(encode_header(layout, manifest))
    return manifest


def planned_bytes(state: NestedState, description: Description, dtype: torch.dtype) -> list[int]:
    """Return the prefix bytes of each level, header included, of the file that would be written.

    Args:
        state: see `write_nested_file`.
        description: see `write_nested_file`.
        dtype: see `write_nested_file`.
    """
    parameters = parameter_entries(state, dtype)
    stored = {tensor.spec.name: tensor for tensor in stored_tensors(parameters, state)}
    manifest, layout = _plan(parameters, stored, state, description)
    header = len(encode_header(layout, manifest))
    return [header + end for end in layout.ends]


def _check_arguments(state: NestedState, description: Description, dtype: torch.dtype) -> None:
    if dtype not in [TORCH_DTYPES[name] for name in FILE_DTYPES]:
        raise ValueError(f"{dtype} is not one of {', '.join(FILE_DTYPES)}")
    counts = {len(description.levels), len(state.private), state.entry.n_levels}
    if len(counts) > 1:
        raise ValueError(f"description, private tensors and entry levels differ in levels: {counts}")
    unknown = (set(state.aliases.values()) | set(state.entry)) - set(state.shared)
    if unknown := unknown | (set(state.units) - set(state.entry)):
        raise ValueError(f"aliases, entry levels or units of unknown tensors: {sorted(unknown)}")
    for name in state.entry:
        tensor = state.shared[name]
        if tensor.shape != state.entry[name].shape or not tensor.is_floating_point():
            raise ValueError(
                f"tensor {name!r} is {tensor.dtype} {tuple(tensor.shape)}; its entry levels differ"
            )
    for name, axes in state.axes.items():
        _check_axes(name, axes, state)


def _check_axes(name: str, axes: Mapping[int, Tensor], state: NestedState) -> None:
    if name not in state.entry.tensors or state.units.get(name, (1, 1)) != (1, 1):
        raise ValueError(f"tensor {name!r} has axes, but blocks or no entry levels")
    shape = tuple(state.shared[name].shape)
    highest = state.entry.n_levels + 1
    for dim, levels in axes.items():
        if dim not in range(len(shape)) or levels.shape != (shape[dim],) or levels.dtype != torch.uint8:
            raise ValueError(f"tensor {name!r} of shape {shape} has no axis {dim} of {levels.shape}")
        if levels.numel() and not 1 <= int(levels.min()) <= int(levels.max()) <= highest:
            raise ValueError(f"axis {dim} of {name!r} has levels that are not in 1..{highest}")
    if np.any(entry_array(state, name) < box_levels(shape, axis_arrays(state, name))):
        raise ValueError(f"weights of {name!r} enter before their indices")


def _check_types(file_name: str, state: NestedState) -> None:
    for tensors in (state.shared, *state.private):
        for name, tensor in tensors.items():
            if tensor.dtype not in TORCH_DTYPES.values():
                raise OutputError(
                    f"{file_name}: tensor {quoted(name)} is {tensor.dtype}, not one of "
                    f"{', '.join(TORCH_DTYPES)}; convert it first"
                )


def _plan(
    parameters: list[ParameterEntry],
    stored: Mapping[str, StoredTensor],
    state: NestedState,
    description: Description,
) -> tuple[Manifest, Layout]:
    """Return the manifest without hashes, and the layout."""
    levels = [
        LevelEntry(**dict(level), private=list(private), data_bytes=0, sha256=UNKNOWN_SHA256)
        for level, private in zip(description.levels, state.private, strict=True)
    ]
    manifest = Manifest(**{**dict(description), "levels": levels}, parameters=parameters)
    numbers = range(1, len(levels) + 1)
    layout = place([[stored[name].spec for name in chunk_names(manifest, level)] for level in numbers])
    return _update_levels(manifest, "data_bytes", layout.chunk_bytes), layout


def _check_readable(file_name: str, manifest: Manifest, header_bytes: int, data_bytes: int) -> None:
    """Refuse to write what a reader would refuse to read."""
    if header_bytes > MAX_HEADER_BYTES:
        raise OutputError(
            f"{file_name}: its header of {header_bytes} bytes is above 64 MiB; shorten the recipe"
        )
    try:
        check_manifest(manifest, header_bytes + data_bytes)
    except Refusal as error:
        raise OutputError(
            f"{file_name}: {error.problem}, so it could not be read back; change it first"
        ) from None


def _write_data(
    file: BinaryIO, file_name: str, layout: Layout, stored: Mapping[str, StoredTensor]
) -> list[str]:
    """Encode and write all chunks; return the SHA-256 of each."""
    hashes = []
    for chunk in layout.chunks:
        digest = hashlib.sha256()
        for slot in chunk:
            name = slot.spec.name
            try:
                data = stored[name].encode() if name in stored else np.zeros(slot.spec.nbytes, np.uint8)
            except ValueError as error:
                raise OutputError(f"{file_name}: tensor {quoted(name)} {error}") from None
            assert data.size == slot.spec.nbytes, name
            digest.update(data.data)
            file.write(data.data)
        hashes.append(digest.hexdigest())
    return hashes


def _update_levels(manifest: Manifest, field: str, values: Iterable[object]) -> Manifest:
    levels = [
        level.model_copy(update={field: value}) for level, value in zip(manifest.levels, values, strict=True)
    ]
    return manifest.model_copy(update={"levels": levels})
