"""The floating-point type of the forward passes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from nestify.accelerator import has_bfloat16, is_gpu
from nestify.errors import RecipeError
from nestify.recipe.options import AmpDtype


@dataclass(frozen=True)
class Precision:
    """The precision of the forward passes: float32, or autocast, with a gradient scaler for float16.

    Args:
        device: the device that computes.
        amp: whether to use a 16-bit type, if the device supports one.
        requested: the 16-bit type; `auto` chooses bfloat16 if the device supports it, otherwise float16 on a
            CUDA GPU and float32 on other devices.

    Raises:
        RecipeError: on construction, if float16 is requested for a CPU.
    """

    device: torch.device
    amp: bool
    requested: AmpDtype = "auto"

    def __post_init__(self) -> None:
        if self.amp and self.requested == "float16" and self.device.type == "cpu":
            raise RecipeError('train.amp_dtype = "float16" is for GPUs; use "bfloat16" or "auto" on a CPU')

    @property
    def dtype(self) -> torch.dtype:
        """The type in which the forward passes compute; float32 if 16 bits are off or would be slower."""
        if not self.amp:
            return torch.float32
        if self.requested != "auto":
            return torch.bfloat16 if self.requested == "bfloat16" else torch.float16
        if has_bfloat16(self.device):
            return torch.bfloat16
        return torch.float16 if is_gpu(self.device) else torch.float32

    def autocast(self) -> AbstractContextManager[object]:
        """Return a new context for one forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Return a scaler that prevents gradients from underflowing; it is enabled only for float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
