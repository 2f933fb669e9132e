"""Arithmetic of the forward passes."""

from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Precision:
    """Arithmetic of the forward passes: float32, or autocast with a gradient scaler where it is float16."""

    device: torch.device
    amp: bool

    @property
    def dtype(self) -> torch.dtype:
        """bfloat16 where the device computes with it, else float16; float32 when off."""
        if not self.amp or self.device.type != "cuda":
            return torch.float32
        return torch.bfloat16 if torch.cuda.is_bf16_supported() else torch.float16

    def autocast(self) -> AbstractContextManager[object]:
        """A fresh context for one forward pass."""
        if self.dtype == torch.float32:
            return nullcontext()
        return torch.autocast(self.device.type, self.dtype)

    def scaler(self) -> torch.amp.GradScaler:
        """Scales the loss against underflow; does nothing but in float16."""
        return torch.amp.GradScaler(self.device.type, enabled=self.dtype == torch.float16)
