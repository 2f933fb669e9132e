"""The device that computes. This is the only module that names a kind of GPU, so that a test can replace it.

torch is imported where it is needed, because recipes are read without it.
"""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nestify.errors import RecipeError, foreign_code
from nestify.launcher import Launch, read_launch

if TYPE_CHECKING:
    import torch

GPU = "cuda"
"""torch's name for GPUs by NVIDIA, and by AMD with ROCm; a test replaces it by a simulated device."""

DEVICES = ("auto", "cpu", GPU, "mps")
"""Devices that shells complete; others, such as the second GPU, are valid too."""

DEVICE_EXAMPLES = f"auto, cpu, {GPU}, {GPU}:1 or mps"

NO_FLOAT64 = frozenset({"mps"})
"""Kinds of devices without 64-bit floating-point numbers."""


@dataclass(frozen=True)
class GpuFacts:
    """One GPU of this machine.

    Attributes:
        name: value for --device, such as `cuda:0`.
        model: name of its hardware.
        memory: bytes of its memory.
    """

    name: str
    model: str
    memory: int


def is_gpu(device: "torch.device") -> bool:
    """Return whether a device is a GPU with its own memory."""
    return device.type == GPU


def as_float64(tensor: "torch.Tensor") -> "torch.Tensor":
    """Return a tensor in float64, on the CPU if its own device has no such numbers."""
    return (tensor.cpu() if tensor.device.type in NO_FLOAT64 else tensor).double()


def list_gpus() -> list[GpuFacts]:
    """Return the GPUs that torch can use."""
    import torch

    module = torch.get_device_module(GPU)
    facts = [module.get_device_properties(number) for number in range(gpu_count())]
    return [GpuFacts(f"{GPU}:{number}", each.name, each.total_memory) for number, each in enumerate(facts)]


def gpu_count() -> int:
    """Return the number of GPUs that torch can use."""
    import torch

    count: int = torch.get_device_module(GPU).device_count()
    return count


def gpu_build() -> str:
    """Return what torch was built for, CUDA or ROCm; an empty text for a build without GPUs."""
    import torch

    return "CUDA" if torch.version.cuda else "ROCm" if torch.version.hip else ""


def pick_device(name: str) -> "torch.device":
    """Return the device that a recipe names.

    Args:
        name: a torch device such as `cpu` or `cuda:1`, or `auto`: a GPU if available, otherwise the CPU.
            Each of several processes gets a GPU of its own, whatever the number.

    Raises:
        RecipeError: if the device is not available on this machine.
    """
    import torch

    if name == "auto":
        name = GPU if torch.get_device_module(GPU).is_available() else "cpu"
        if name == "cpu" or read_launch().size == 1:
            return torch.device(name)
    if name.partition(":")[0] == GPU and (launch := read_launch()).size > 1:
        name = f"{GPU}:{_gpu_number(launch, gpu_count())}"
    with foreign_code(
        lambda reason: RecipeError(f"device = {name!r} is not available here; give auto or cpu")
    ):
        device = torch.device(name)
        torch.zeros(1, device=device).item()  # fails on "meta", which creates tensors but computes nothing
    return device


def _gpu_number(launch: Launch, gpus: int) -> int:
    """Return the number of the GPU of one of several processes.

    Args:
        launch: the process.
        gpus: number of GPUs that this process sees; a launcher may show each process only its own.

    Raises:
        RecipeError: if this node has fewer GPUs than processes.
    """
    if launch.local_rank < gpus:
        return launch.local_rank
    if gpus == 1 and launch.launcher != "torchrun":
        return 0
    count = launch.local_size or f"{launch.local_rank + 1} or more"
    raise RecipeError(
        f"device = {GPU}: this node has {gpus} GPU{'s' * (gpus != 1)} for {count} processes; start as many "
        f"processes as GPUs (torchrun --nproc-per-node {max(gpus, 1)}), or use --device cpu"
    )


def claim_gpu(device: "torch.device") -> str:
    """Make a GPU the current one of this process.

    Returns:
        A name of the hardware that differs from those of the other GPUs of this machine; an empty text for
        other devices.
    """
    import torch

    if not is_gpu(device):
        return ""
    module = torch.get_device_module(GPU)
    module.set_device(device)
    return str(module.get_device_properties(device).uuid)


def device_model(device: "torch.device") -> str:
    """Return the name of a GPU's hardware; an empty text for other devices."""
    import torch

    return str(torch.get_device_module(device).get_device_name(device)) if is_gpu(device) else ""


def has_bfloat16(device: "torch.device") -> bool:
    """Return whether a device computes in bfloat16 faster than in float32.

    False if torch is too old to report that of a CPU, and for devices that are neither a CPU nor a GPU.
    """
    import torch

    if is_gpu(device):
        return bool(torch.get_device_module(GPU).is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    has: dict[str, bool] = getattr(torch.cpu, "get_capabilities", dict)()
    return bool(has.get("avx512_bf16") or has.get("amx_bf16") or has.get("bf16"))


def has_tf32(device: "torch.device") -> bool:
    """Return whether a GPU can round the factors of float32 products to TF32."""
    import torch

    if not is_gpu(device) or torch.version.hip:
        return False
    return bool(torch.get_device_module(GPU).get_device_capability(device) >= (8, 0))


@contextmanager
def fast_kernels(device: "torch.device", *, tf32: bool, benchmark: bool) -> Iterator[None]:
    """Choose the kernels of a GPU in the block; on other devices nothing happens.

    Args:
        device: the device that computes.
        tf32: whether float32 products may be computed in TF32.
        benchmark: whether cuDNN times several algorithms for each convolution and takes the fastest.
    """
    import torch

    if not is_gpu(device):
        yield
        return
    cudnn = torch.backends.cudnn
    before = torch.get_float32_matmul_precision(), cudnn.allow_tf32, cudnn.benchmark
    torch.set_float32_matmul_precision("high" if tf32 else "highest")
    cudnn.allow_tf32, cudnn.benchmark = tf32, benchmark
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before[0])
        _, cudnn.allow_tf32, cudnn.benchmark = before


def synchronize(device: "torch.device") -> None:
    """Wait until a device has finished its work; a CPU always has."""
    import torch

    if device.type != "cpu":
        torch.accelerator.synchronize(device)


def clock_of(device: "torch.device") -> Callable[[], float]:
    """Return a clock in seconds that waits for the device to finish its work."""
    if device.type == "cpu":
        return time.perf_counter

    def clock() -> float:
        synchronize(device)
        return time.perf_counter()

    return clock


class HostCopy:
    """Numbers of a device on the host. The host waits for them only if it reads them too early.

    Args:
        numbers: a small tensor (n,), which may change afterwards.
    """

    def __init__(self, numbers: "torch.Tensor") -> None:
        import torch

        self._copied: torch.Event | None = None
        self._numbers = numbers.detach().clone()
        if is_gpu(numbers.device):
            self._numbers = torch.empty(numbers.shape, dtype=numbers.dtype, pin_memory=True)
            self._numbers.copy_(numbers, non_blocking=True)
            self._copied = torch.Event(device=numbers.device)
            self._copied.record()

    def read(self) -> list[float]:
        """Return the numbers."""
        if self._copied is not None and not self._copied.query():
            self._copied.synchronize()
        found: list[float] = self._numbers.tolist()
        return found


def random_state(device: "torch.device") -> "torch.Tensor | None":
    """Return the state of a device's own random number generator; None for a CPU."""
    import torch

    if device.type == "cpu":
        return None
    module = torch.get_device_module(device)
    state: torch.Tensor = module.get_rng_state(*_only_one(device))
    return state


def set_random_state(device: "torch.device", state: "torch.Tensor") -> None:
    """Restore the state of a device's own random number generator."""
    import torch

    torch.get_device_module(device).set_rng_state(state, *_only_one(device))


def seed_device(device: "torch.device", seed: int) -> None:
    """Seed a device's own random number generator; a CPU has none of its own."""
    import torch

    if device.type != "cpu":
        torch.get_device_module(device).manual_seed(seed)


def _only_one(device: "torch.device") -> list["torch.device"]:
    """Return a device as an argument; the functions for mps take none, because a machine has only one."""
    return [] if device.type == "mps" else [device]


def fork_random_states(device: "torch.device") -> AbstractContextManager[None]:
    """Return a context that restores the random states of the CPU and of a device when it ends."""
    import torch

    if device.type == "cpu":
        return torch.random.fork_rng([])
    return torch.random.fork_rng([device], device_type=device.type)
