"""The calls of a network's layers, one at a time, so that two networks can run side by side."""

from collections.abc import Callable, Generator, Mapping
from dataclasses import dataclass
from queue import SimpleQueue
from threading import Semaphore, Thread
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from nestify.model.spec import state_tensors

CONVOLUTIONS = frozenset({torch.conv2d, torch.ops.aten.conv2d.default, torch.ops.aten.conv2d.padding})
LINEARS = frozenset({functional.linear, torch.ops.aten.linear.default})


_OPTIONS = {"stride": 1, "padding": 0, "dilation": 1, "groups": 1}
_CONVOLUTION: Mapping[str, Any] = {"input": None, "weight": None, "bias": None, **_OPTIONS}
_BATCH_NORM: Mapping[str, Any] = {
    **dict.fromkeys(("input", "running_mean", "running_var", "weight", "bias")),
    **{"training": False, "momentum": 0.1, "eps": 1e-5},
}
"""The arguments of torch's functions in their order, with their defaults."""


@dataclass(frozen=True)
class LayerCall:
    """One call of a layer, before it is computed.

    Attributes:
        name: state-dict name of its weight.
        inputs: (B, C, H, W) of a convolution, (..., C) of a linear layer.
        weight: (out, in, *kernel); the call computes with the values that it has when the call resumes.
        options: stride, padding, dilation and groups of a convolution; None for a linear layer.
    """

    name: str
    inputs: Tensor
    weight: Tensor
    options: Mapping[str, Any] | None

    @property
    def groups(self) -> int:
        """Number of groups of channels that do not read each other's inputs."""
        return 1 if self.options is None else int(self.options["groups"])

    def columns(self, positions: int, seed: int) -> Tensor:
        """Return the inputs of output positions: for each, the c numbers that an output channel multiplies.

        Args:
            positions: largest number of positions of each image. Calls with outputs of the same size and the
                same seed choose the same.
            seed: seed of the choice.

        Returns:
            (groups, images * positions, c)
        """
        if self.options is None:
            rows = self.inputs.reshape(len(self.inputs), -1, self.inputs.shape[-1])  # (B, P, C)
            chosen = _choose(len(rows), rows.shape[1], positions, seed).to(rows.device)
            chosen = chosen[..., None].expand(-1, -1, rows.shape[2])
            return rows.gather(1, chosen).flatten(0, 1).unsqueeze(0)
        return _patches(self.inputs, self.weight.shape[2:], self.options, positions, seed)


def layer_calls(
    network: nn.Module, images: Tensor, *, batch_statistics: bool
) -> Generator[LayerCall, None, None]:
    """Run a network on images, and stop before each layer.

    The network runs in a thread, which waits while the caller has a call.

    Args:
        network: the network, in eval mode.
        images: (B, C, H, W).
        batch_statistics: whether batch norm normalises by the statistics of these images.

    Yields:
        The calls of convolutions over images and of linear layers whose weight is a tensor of the network,
        in the order of execution.
    """
    thread = _Run(network, images, batch_statistics)
    thread.start()
    try:
        while (item := thread.items.get()) is not None:
            if isinstance(item, BaseException):
                raise item
            yield item
            del item  # with what the layer reads, which may be as large as what the next one reads
            thread.resume.release()
    finally:
        thread.stopped = True
        thread.resume.release()
        thread.join()


class _Stop(Exception):
    """Ends a network whose remaining calls are not needed."""


class _Run(Thread):
    """Runs a network, and hands over each call.

    Attributes:
        items: calls, then None, or the exception that ended the network.
        resume: released when the network may continue.
        stopped: whether to end at the next call.
    """

    def __init__(self, network: nn.Module, images: Tensor, batch_statistics: bool) -> None:
        super().__init__(daemon=True)
        self.items: SimpleQueue[LayerCall | BaseException | None] = SimpleQueue()
        self.resume = Semaphore(0)
        self.stopped = False
        self._network, self._images = network, images
        self._mode = _Watch(network, self._hand_over, batch_statistics)

    def run(self) -> None:
        try:
            with torch.no_grad(), self._mode:
                self._network(self._images)
            self.items.put(None)
        except _Stop:
            pass
        except BaseException as error:  # the caller raises it
            self.items.put(error)

    def _hand_over(self, call: LayerCall) -> None:
        self.items.put(call)
        self.resume.acquire()
        if self.stopped:
            raise _Stop


class _Watch(TorchFunctionMode):
    """A mode that reports the calls of layers, and can make batch norm use the statistics of the batch."""

    def __init__(
        self, network: nn.Module, report: Callable[[LayerCall], None], batch_statistics: bool
    ) -> None:
        super().__init__()
        self._names = {id(tensor): name for name, tensor in state_tensors(network).items()}
        self._report = report
        self._batch_statistics = batch_statistics

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func in CONVOLUTIONS or func in LINEARS:
            given = {**_CONVOLUTION, **dict(zip(_CONVOLUTION, args, strict=False)), **kwargs}
            name = self._names.get(id(given["weight"]))
            if name is not None:
                options = {key: given[key] for key in _OPTIONS} if func in CONVOLUTIONS else None
                self._report(LayerCall(name, given["input"], given["weight"], options))
        elif self._batch_statistics and func is functional.batch_norm:
            given = {**_BATCH_NORM, **dict(zip(_BATCH_NORM, args, strict=False)), **kwargs}
            if _has_variance(given["input"]):
                return _normalise(given["input"], given["weight"], given["bias"], given["eps"])
        elif self._batch_statistics and func is torch.ops.aten.batch_norm.default:
            x, weight, bias, _, _, _, _, eps, *_ = args
            if _has_variance(x):
                return _normalise(x, weight, bias, eps)
        return func(*args, **kwargs)


def _has_variance(x: Tensor) -> bool:
    """Whether a batch (B, C, ...) has more than one value per channel."""
    return x.numel() > x.shape[1]


def _normalise(x: Tensor, weight: Tensor | None, bias: Tensor | None, eps: float) -> Tensor:
    return functional.batch_norm(x, None, None, weight, bias, training=True, eps=eps)


def _choose(images: int, available: int, wanted: int, seed: int) -> Tensor:
    """Choose positions of each image, int64 (images, min(available, wanted))."""
    if available <= wanted:
        return torch.arange(available).expand(images, -1)
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(images, available, generator=generator).topk(wanted).indices


def _patches(x: Tensor, kernel: torch.Size, options: Mapping[str, Any], positions: int, seed: int) -> Tensor:
    """Cut the patches of chosen output positions out of images, (groups, images * positions, c).

    torch's `unfold` does this for all positions, which takes much more memory.
    """
    stride, dilation = _pair(options["stride"]), _pair(options["dilation"])
    reach = [d * (k - 1) for d, k in zip(dilation, kernel, strict=True)]
    if options["padding"] == "same":
        sides = [(r // 2, r - r // 2) for r in reach]
    else:
        padding = (0, 0) if options["padding"] == "valid" else _pair(options["padding"])
        sides = [(p, p) for p in padding]
    x = functional.pad(x, (*sides[1], *sides[0]))
    size = [(n - r - 1) // s + 1 for n, r, s in zip(x.shape[2:], reach, stride, strict=True)]
    chosen = _choose(len(x), size[0] * size[1], positions, seed).to(x.device)  # (B, P)
    down, across = (torch.arange(k, device=x.device) * d for k, d in zip(kernel, dilation, strict=True))
    rows = (chosen // size[1] * stride[0])[..., None] + down  # (B, P, kernel height)
    columns = (chosen % size[1] * stride[1])[..., None] + across  # (B, P, kernel width)
    pixels = (rows[..., None] * x.shape[3] + columns[..., None, :]).flatten(1)  # (B, P * kernel)
    flat = x.flatten(2)
    found = flat.gather(2, pixels[:, None].expand(-1, x.shape[1], -1))  # (B, C, P * kernel)
    groups = int(options["groups"])
    found = found.view(len(x), groups, x.shape[1] // groups, chosen.shape[1], -1)  # (B, g, C / g, P, kernel)
    return found.permute(1, 0, 3, 2, 4).reshape(groups, len(x) * chosen.shape[1], -1)


def _pair(value: Any) -> tuple[int, int]:
    if isinstance(value, int):
        return value, value
    return (int(value[0]), int(value[-1]))
