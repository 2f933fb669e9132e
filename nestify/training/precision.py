"""How a device computes: the floating-point type of the forward passes, and the kernels of a GPU."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch

from nestify.accelerator import device_model, fast_kernels, has_bfloat16, is_gpu
from nestify.errors import RecipeError
from nestify.recipe.options import AmpDtype, TrainOptions


@dataclass(frozen=True)
class Precision:
    """The precision of the forward passes: float32, or autocast, with a gradient scaler for float16.

    Args:
        device: the device that computes.
        amp: whether to use a 16-bit type, if the device supports one; None does not.
        requested: the 16-bit type; `auto` chooses bfloat16 if the device supports it, otherwise float16 on a
            CUDA GPU and float32 on other devices.

    Raises:
        RecipeError: on construction, if float16 is requested for a CPU.
    """

    device: torch.device
    amp: bool | None
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


def chosen_kernels(options: TrainOptions, device: torch.device) -> AbstractContextManager[None]:
    """Return a context in which a GPU uses the kernels that a recipe allows."""
    return fast_kernels(device, tf32=bool(options.tf32), benchmark=bool(options.cudnn_benchmark))


def describe_computing(options: TrainOptions, device: torch.device) -> list[str]:
    """Describe how a GPU computes, each option with its key; an empty list for other devices.

    Args:
        options: the options, of which none is open any more.
        device: the device that computes.
    """
    if not is_gpu(device):
        return []
    dtype = str(Precision(device, options.amp, options.amp_dtype).dtype).removeprefix("torch.")
    used = {
        f"{dtype} (train.amp)": options.amp,
        "channels last (train.channels_last)": options.channels_last,
        "TF32 (train.tf32)": options.tf32,
        "the fastest of cuDNN's algorithms (train.cudnn_benchmark)": options.cudnn_benchmark,
    }
    return [device_model(device), *(text for text, on in used.items() if on)]
