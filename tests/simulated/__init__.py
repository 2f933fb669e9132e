"""A simulated accelerator, so that tests find on any machine what goes wrong on a GPU.

Its tensors are in the host's memory and its kernels are the CPU's, so that results equal the CPU's bit by
bit. It refuses operations on tensors of several devices and generators of another device, has random states,
pinned memory and autocast of its own, and counts what a GPU would launch and where the host would wait for
it. It has two devices, `simulated:0` and `simulated:1`.
"""

import types
from collections import Counter
from dataclasses import dataclass

import torch

from tests.simulated.build import build_library

NAME = "simulated"


@dataclass(frozen=True)
class Work:
    """What the device was asked to do.

    Attributes:
        launches: number of launches by operator.
        waits: number of times that the host waited for the device, by reason.
    """

    launches: Counter[str]
    waits: Counter[str]


def load_device() -> str:
    """Give torch the device; return why it cannot have it, or an empty text."""
    if hasattr(torch, NAME):
        return ""
    library = build_library()
    if isinstance(library, str):
        return library
    torch.ops.load_library(library)
    torch.utils.rename_privateuse1_backend(NAME)
    torch._register_device_module(NAME, _module())
    torch.utils.generate_methods_for_privateuse1_backend(for_storage=True)
    return ""


def work() -> Work:
    """Return what the device was asked to do since `reset_work`."""
    counts: dict[str, Counter[str]] = {"launch": Counter(), "wait": Counter(), "copy": Counter()}
    for what, number in torch.ops.simulated.counts().items():
        kind, _, name = what.partition(" ")
        counts[kind][name] += number
    return Work(counts["launch"], counts["wait"])


def reset_work() -> None:
    """Forget what the device was asked to do."""
    torch.ops.simulated.reset_counts()


def _index(device: object = None) -> int:
    if isinstance(device, int):
        return device
    index = None if device is None else torch.device(device).index  # type: ignore[call-overload]
    return torch.ops.simulated.current_device() if index is None else index


class _Device:
    """The context manager that makes a device the current one."""

    def __init__(self, device: object) -> None:
        self._index = _index(device)

    def __enter__(self) -> None:
        self._before = _index()
        torch.ops.simulated.set_device(self._index)

    def __exit__(self, *_: object) -> None:
        torch.ops.simulated.set_device(self._before)


def _module() -> types.ModuleType:
    """Return `torch.simulated`, with the functions of `torch.cuda` that torch and nestify call."""
    ops = torch.ops.simulated
    module = types.ModuleType(f"torch.{NAME}")
    numbers = range(ops.device_count())

    def set_states(states: list[torch.Tensor]) -> None:
        for index, state in enumerate(states):
            ops.set_rng_state(index, state)

    def seed_all(seed: int) -> None:
        for index in numbers:
            ops.seed(index, seed)

    functions = {
        "_is_in_bad_fork": lambda: False,
        "_lazy_init": lambda: None,
        "is_initialized": lambda: True,
        "is_available": lambda: True,
        "device_count": ops.device_count,
        "current_device": ops.current_device,
        "set_device": lambda device: ops.set_device(_index(device)),
        "device": _Device,
        "synchronize": lambda device=None: ops.synchronize(),
        "get_rng_state": lambda device=NAME: ops.get_rng_state(_index(device)),
        "set_rng_state": lambda state, device=NAME: ops.set_rng_state(_index(device), state),
        "get_rng_state_all": lambda: [ops.get_rng_state(index) for index in numbers],
        "set_rng_state_all": set_states,
        "manual_seed": lambda seed: ops.seed(_index(), seed),
        "manual_seed_all": seed_all,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_amp_supported_dtype": lambda: [torch.bfloat16, torch.float16],
        "get_device_name": lambda device=None: "Simulated GPU",
        "get_device_capability": lambda device=None: (8, 0),
        "get_device_properties": lambda device=None: types.SimpleNamespace(
            name="Simulated GPU", total_memory=2**34, uuid=f"simulated-{_index(device)}"
        ),
        "empty_cache": lambda: None,
        "current_stream": lambda device=None: torch.Stream(device=f"{NAME}:{_index(device)}"),
    }
    for name, function in functions.items():
        setattr(module, name, function)
    return module
