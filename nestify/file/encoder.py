"""Encoding of a nested state as stored tensors: what the header says about each, and how its bytes are made.

Nothing is encoded until its bytes are needed; types and lengths follow from counting entry levels.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch
from torch import Tensor

from nestify.file.axes import available_units, axis_runs
from nestify.file.checks import units_left
from nestify.file.entry_codec import U8Array, choose_codings, coded_bytes, encode, reduce_to_units
from nestify.file.layout import Shape, TensorSpec, entry_name, private_name, values_name
from nestify.file.manifest import Coding, ParameterEntry
from nestify.file.tensors import TORCH_DTYPES, check_finite, dtype_name, elements, from_bytes, to_bytes
from nestify.model.entry_levels import NestedState, box_levels


@dataclass(frozen=True)
class StoredTensor:
    """A tensor to be stored.

    `encode` returns its bytes, (spec.nbytes,); it raises ValueError if a value is not finite or overflows the
    type.
    """

    spec: TensorSpec
    encode: Callable[[], U8Array]


def parameter_entries(state: NestedState, dtype: torch.dtype) -> list[ParameterEntry]:
    """Return the layout of every shared tensor; floating-point tensors are stored as `dtype`."""
    return [
        _maskable_entry(name, state, dtype)
        if name in state.entry.tensors
        else ParameterEntry(
            name=name,
            shape=list(tensor.shape),
            dtype=dtype_name(dtype if tensor.is_floating_point() else tensor.dtype),
            maskable=False,
            aliases=_aliases(name, state),
        )
        for name, tensor in state.shared.items()
    ]


def stored_tensors(parameters: list[ParameterEntry], state: NestedState) -> Iterator[StoredTensor]:
    """Yield all tensors of a state for a file, without padding, in no particular order."""
    for parameter in parameters:
        name, tensor = parameter.name, state.shared[parameter.name]
        if parameter.maskable:
            entry, axes = entry_array(state, name), axis_arrays(state, name)
            yield from _stored_maskable(parameter, tensor, entry, axes)
        else:
            yield _stored_whole(values_name(1, name), tensor, parameter.dtype)
    for level, tensors in enumerate(state.private, start=1):
        for name, tensor in tensors.items():
            yield _stored_whole(private_name(level, name), tensor, dtype_name(tensor.dtype))


def _maskable_entry(name: str, state: NestedState, dtype: torch.dtype) -> ParameterEntry:
    tensor = state.shared[name]
    unit = state.units.get(name, (1, 1)) if tensor.dim() >= 2 else (1, 1)
    units = reduce_to_units(entry_array(state, name), unit)
    n_levels = state.entry.n_levels
    entering = [int(np.count_nonzero(units == level)) for level in range(1, n_levels + 1)]
    axes = axis_runs(axis_arrays(state, name), tensor.dim())
    return ParameterEntry(
        name=name,
        shape=list(tensor.shape),
        dtype=dtype_name(dtype),
        maskable=True,
        unit=unit,
        coding=choose_codings(available_units(tuple(tensor.shape), unit, axes, n_levels), entering),
        entering=entering,
        aliases=_aliases(name, state),
        axes=axes,
    )


def _aliases(name: str, state: NestedState) -> list[str]:
    return sorted(alias for alias, target in state.aliases.items() if target == name)


def _stored_whole(name: str, tensor: Tensor, dtype: str) -> StoredTensor:
    return StoredTensor(TensorSpec(name, dtype, tuple(tensor.shape)), partial(_cast, tensor, dtype))


def _stored_maskable(
    parameter: ParameterEntry, tensor: Tensor, entry: U8Array, axes: Mapping[int, U8Array]
) -> Iterator[StoredTensor]:
    units = reduce_to_units(entry, parameter.unit)
    for level, (remaining, entering, coding) in enumerate(units_left(parameter), start=1):
        size = coded_bytes(coding, remaining, entering)
        spec = TensorSpec(entry_name(level, parameter.name), "U8", (size,))
        yield StoredTensor(spec, partial(_encode_entry, units, entry.shape, axes, level, coding))
        count = entering if units.size == entry.size else int(np.count_nonzero(entry == level))
        spec = TensorSpec(values_name(level, parameter.name), parameter.dtype, (count,))
        yield StoredTensor(spec, partial(_encode_values, tensor, entry, level, parameter.dtype))


def _encode_entry(
    units: U8Array, shape: Shape, axes: Mapping[int, U8Array], level: int, coding: Coding
) -> U8Array:
    left = units >= level
    if axes:
        left &= box_levels(shape, axes).reshape(-1) <= level
    return encode(coding, units[left] == level)


def _encode_values(tensor: Tensor, entry: U8Array, level: int, dtype: str) -> U8Array:
    """Encode the values that enter at a level; values that no level uses are ignored."""
    chosen = elements(tensor)[entry.reshape(-1) == level]
    own = from_bytes(chosen.view(np.uint8), dtype_name(tensor.dtype), chosen.shape)
    return _cast(own, dtype)


def _cast(tensor: Tensor, dtype: str) -> U8Array:
    check_finite(tensor)
    cast = tensor.detach().to(TORCH_DTYPES[dtype])
    try:
        check_finite(cast)
    except ValueError:
        largest = float(tensor.detach().abs().max())
        raise ValueError(f"holds {largest:g}, which overflows {dtype}; choose another dtype") from None
    return to_bytes(cast)


def entry_array(state: NestedState, name: str) -> U8Array:
    """Return entry levels in the parameter's shape; shares memory with a tensor on the CPU."""
    return _array(state.entry[name])


def axis_arrays(state: NestedState, name: str) -> dict[int, U8Array]:
    """Return the levels of the indices of a parameter's dimensions."""
    return {dim: _array(levels) for dim, levels in state.axes.get(name, {}).items()}


def _array(tensor: Tensor) -> U8Array:
    array: U8Array = tensor.detach().cpu().numpy()
    return array
