"""Conversion of torch tensors to raw bytes and back, by safetensors' names of the types."""

import math
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from nestify.file.entry_codec import U8Array
from nestify.file.layout import Shape

TORCH_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}
_NAMES = {dtype: name for name, dtype in TORCH_DTYPES.items()}


def dtype_name(dtype: torch.dtype) -> str:
    """Return safetensors' name of a type.

    Raises:
        ValueError: if nested files do not support it.
    """
    if dtype not in _NAMES:
        raise ValueError(f"{dtype} is not one of {', '.join(TORCH_DTYPES)}")
    return _NAMES[dtype]


def to_bytes(tensor: Tensor) -> U8Array:
    """Return a tensor's elements as bytes in C order; shares memory with a contiguous tensor on the CPU."""
    flat = tensor.detach().cpu().contiguous().reshape(-1)
    array: U8Array = flat.view(torch.uint8).numpy()
    return array


def from_bytes(data: U8Array, dtype: str, shape: Shape) -> Tensor:
    """Return the tensor of the given bytes, the inverse of `to_bytes`; shares memory with `data`.

    Raises:
        ValueError: if a BOOL is neither 0 nor 1, or a floating-point value is not finite.
    """
    if dtype == "BOOL" and data.size and data.max() > 1:
        raise ValueError("holds a BOOL that is neither 0 nor 1")
    tensor = torch.from_numpy(data).view(TORCH_DTYPES[dtype]).reshape(shape)
    check_finite(tensor)
    return tensor


def check_finite(tensor: Tensor) -> None:
    """Refuse NaN and infinities.

    Raises:
        ValueError: if a value is not finite.
    """
    if not tensor.is_floating_point() or not tensor.numel():
        return
    # Minimum and maximum are NaN if any value is. Ten times as fast as isfinite, and without a copy.
    if not all(math.isfinite(end) for end in torch.aminmax(tensor.detach())):
        raise ValueError("holds a value that is not finite")


def elements(tensor: Tensor) -> NDArray[np.unsignedinteger[Any]]:
    """Return a tensor's elements (numel,) as unsigned integers of their size; see `to_bytes` for sharing."""
    return to_bytes(tensor).view(f"u{tensor.element_size()}")
