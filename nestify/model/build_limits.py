"""Limits of what a timm model may take while it is built, before its tensors can be compared with a file.

The arguments of a model come from a nested file or a recipe, and ask for any number of blocks and channels.
Modules, parameters and buffers are counted as they are registered, tensors are measured before they are
allocated, and a deadline ends loops that do neither.
"""

import ctypes
import math
import sys
import threading
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves, tree_map

from nestify.machine import memory_bytes

LARGEST_NUMBER = 2**24
"""Largest number in a model's arguments. Some are lengths of lists that are made before any module is."""

USUAL_NUMBER = 2**16
"""Numbers up to this one are accepted for the smallest models too."""

LONGEST_TEXT = 1000
"""Largest number of characters of a text in a model's arguments."""

RESERVED = {"device", "dtype"}
"""Arguments of timm's models that decide where and how tensors are stored, which nestify does itself."""

_BYTES = 4  # of a float32, the type in which models are built


@dataclass(frozen=True)
class BuildLimits:
    """What a model may take while it is built.

    Attributes:
        entries: number of modules, parameters and buffers.
        operators: number of calls of torch's operators.
        number: largest number among the arguments.
        bytes: bytes of all parameters and buffers, and of any one tensor.
        seconds: processor time, so that a busy machine refuses no more than an idle one.
        reason: where the limits come from, to follow "more than 3 GB, ".
    """

    entries: int
    operators: int
    number: int
    bytes: float
    seconds: float
    reason: str

    @classmethod
    def for_tensors(cls, tensors: int, elements: int, holder: str) -> "BuildLimits":
        """Return limits for a model whose tensors are known; they leave room for what is not stored.

        timm's models register at most three entries per stored tensor, and 2 % more elements than they store.
        Backbones for feature maps are built with their classifiers, of up to 0.6 GB in VGG, and then cut.

        Args:
            tensors: number of stored tensors.
            elements: number of their elements.
            holder: what holds them, as in "file".
        """
        return cls(
            entries=1000 + 8 * tensors,
            operators=10_000 + 100 * tensors,
            number=min(max(elements, USUAL_NUMBER), LARGEST_NUMBER),
            bytes=2**30 + 4 * _BYTES * elements,
            seconds=10 + elements / 2e7,
            reason=f"far beyond the {tensors:,} tensors of the {holder}",
        )

    @classmethod
    def for_this_machine(cls) -> "BuildLimits":
        """Return limits for a model of which nothing is known: what this machine could train at all."""
        memory = memory_bytes()
        return cls(
            entries=50_000,
            operators=1_000_000,
            number=LARGEST_NUMBER,
            bytes=2**36 if memory is None else memory / 2,
            seconds=300,
            reason="far beyond what this machine can train",
        )


class BeyondLimit(Exception):
    """A model takes more than its limits while it is built."""


class _TooSlow(Exception):
    """The deadline has passed."""


def _check_arguments(kwargs: Mapping[str, Any], limits: BuildLimits) -> None:
    """Refuse arguments that are reserved, and numbers and texts that no model needs."""
    for name, value in kwargs.items():
        if name in RESERVED:
            raise BeyondLimit(f"{name} is not an argument of the network; leave it out")
        for item in tree_leaves(value):
            if isinstance(item, int | float) and not abs(item) <= limits.number:
                raise BeyondLimit(f"{name} has a number that is not within ±{limits.number:,}")
            if isinstance(item, str) and len(item) > LONGEST_TEXT:
                raise BeyondLimit(f"{name} has a text of {len(item):,} characters")


@contextmanager
def limited_build(kwargs: Mapping[str, Any], limits: BuildLimits) -> Iterator[None]:
    """Limit what the models that this thread builds in the block may take.

    Args:
        kwargs: arguments of the models, which are checked first.
        limits: the limits.

    Raises:
        BeyondLimit: if an argument is refused, or as soon as they take more; when the time has passed, after
            the instruction of Python that runs then.
    """
    _check_arguments(kwargs, limits)
    _register_counters()
    token = _tally.set(tally := _Tally(limits))
    try:
        with _deadline(limits.seconds), _MeasureTensors(tally):
            yield
    except _TooSlow:
        raise BeyondLimit(f"it takes more than {limits.seconds:.0f} s, {limits.reason}") from None
    finally:
        _tally.reset(token)


class _Tally:
    """Counts what has been registered in one block, and refuses what is beyond its limits."""

    def __init__(self, limits: BuildLimits) -> None:
        self._limits = limits
        self._entries = 0
        self._operators = 0
        self._bytes = 0

    def call(self) -> None:
        """Count a call of an operator."""
        self._operators += 1
        if self._operators > self._limits.operators:
            raise BeyondLimit(f"it takes more than {self._limits.operators:,} steps, {self._limits.reason}")

    def add(self, size: int) -> None:
        """Count an entry of `size` bytes."""
        self._entries += 1
        self._bytes += size
        if self._entries > self._limits.entries:
            raise BeyondLimit(f"it has more than {self._limits.entries:,} modules, {self._limits.reason}")
        self.check(self._bytes)

    def check(self, size: float) -> None:
        """Refuse `size` bytes if they are too many."""
        if not size <= self._limits.bytes:
            raise BeyondLimit(f"it needs more than {self._limits.bytes / 1e9:.2g} GB, {self._limits.reason}")

    def exceeds(self, size: float) -> bool:
        """Return whether `size` bytes are too many."""
        return not size <= self._limits.bytes


_tally: ContextVar[_Tally | None] = ContextVar("tally", default=None)
"""The tally of the block that this thread is in; hooks of torch are shared by all threads."""


@cache
def _register_counters() -> None:
    """Let torch report each registration; done once, as removing hooks would disturb other threads."""

    def count(owner: nn.Module, name: str, item: nn.Module | Tensor | None) -> None:
        if (tally := _tally.get()) is not None:
            tally.add(item.numel() * item.element_size() if isinstance(item, Tensor) else 0)

    torch_module.register_module_module_registration_hook(count)
    torch_module.register_module_parameter_registration_hook(count)
    torch_module.register_module_buffer_registration_hook(count)


class _MeasureTensors(TorchDispatchMode):
    """Refuses tensors that are too large before they are allocated."""

    def __init__(self, tally: _Tally) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._tally = tally

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        self._tally.call()
        allocates = all(result.alias_info is None for result in func._schema.returns)
        if allocates and self._tally.exceeds(8 * _most_elements((*args, *kwargs.values()))):
            self._tally.check(_result_bytes(func, args, kwargs))
        return func(*args, **kwargs)


def _most_elements(arguments: Iterable[Any]) -> float:
    """Return a number that the elements of an operator's result do not exceed, from its arguments alone.

    The product of all sizes and numbers is one for factories, broadcasting, products and repetition.
    """
    product = 1.0
    for item in arguments:
        if isinstance(item, Tensor):
            product *= max(item.numel(), 1)
        elif isinstance(item, int | float):
            product *= max(abs(item), 1)
        elif isinstance(item, list | tuple):
            product *= _most_elements(item)
    return product


def _result_bytes(func: Callable[..., Any], args: Any, kwargs: dict[str, Any]) -> float:
    """Return the bytes of an operator's results, found on the meta device, which allocates nothing."""

    def to_meta(item: Any) -> Any:
        return item.to("meta") if isinstance(item, Tensor) else item

    args, kwargs = tree_map(to_meta, (args, kwargs))
    if any(argument.name == "device" for argument in func._schema.arguments):  # type: ignore[attr-defined]
        kwargs["device"] = torch.device("meta")
    try:
        results = func(*args, **kwargs)
    except (NotImplementedError, RuntimeError):  # an operator that the meta device lacks, or a wrong call
        return 0
    sizes = [item.numel() * item.element_size() for item in tree_leaves(results) if isinstance(item, Tensor)]
    return math.fsum(sizes)


@contextmanager
def _deadline(seconds: float) -> Iterator[None]:
    """Raise `_TooSlow` in this thread when it has used its time; works in every thread, without signals."""
    thread = ctypes.c_ulong(threading.get_ident())
    raise_in = ctypes.pythonapi.PyThreadState_SetAsyncExc
    time_used = _clock_of_this_thread()
    end = time_used() + seconds
    lock = threading.Lock()
    is_done = threading.Event()

    def watch() -> None:
        while (left := end - time_used()) > 0:
            if is_done.wait(left):  # time passes at least as fast as one thread can use it
                return
        with lock:
            if not is_done.is_set():
                raise_in(thread, ctypes.py_object(_TooSlow))

    threading.Thread(target=watch, daemon=True).start()
    try:
        yield
    finally:
        with lock:
            is_done.set()
        raise_in(thread, None)  # one that has not arrived yet


def _clock_of_this_thread() -> Callable[[], float]:
    """Return a function that reads this thread's processor time, in seconds, from any thread.

    Where a thread's time is not known to others, it is that of the process, which includes other threads.
    """
    if sys.platform != "linux":
        return time.process_time
    clock = time.pthread_getcpuclockid(threading.get_ident())

    def time_used() -> float:
        try:
            return time.clock_gettime(clock)
        except OSError:  # the thread has ended
            return 0.0

    return time_used
