"""Arithmetic of the forward passes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from nestify.errors import RecipeError
from nestify.recipe.options import AmpDtype


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the forward passes: float32, or autocast with a gradient scaler where it is float16.

    Args:
        amp: whether to use 16 bits where the device computes with them.
        wanted: which 16 bits; auto: bfloat16 where the device has it, and else float16 on a GPU.

    Raises:
        RecipeError: on construction, for float16 on a CPU, which has no use for it.
    """

    device: torch.device
    amp: bool
    wanted: AmpDtype = "auto"

    def __post_init__(self) -> None:
        if self.amp and self.wanted == "float16" and self.device.type == "cpu":
            raise RecipeError('train.amp_dtype = "float16" is for GPUs; give bfloat16 or auto for a CPU')

    @property
    def dtype(self) -> torch.dtype:
        """What the forward passes compute with; float32 where 16 bits are off, or would be slower."""
        if not self.amp:
            return torch.float32
        if self.wanted != "auto":
            return torch.bfloat16 if self.wanted == "bfloat16" else torch.float16
        if self.device.type == "cuda":
            return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16
        return torch.bfloat16 if self.device.type == "cpu" and _cpu_has_bfloat16() else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """A fresh context for one forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss against underflow; does nothing but in float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)


def _cpu_has_bfloat16() -> bool:
    """Whether this CPU has instructions for it, without which it is slow. Older torch does not tell."""
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))
