"""Weights of untrained levels, refitted so that each layer's outputs are again those of the original network.

A level that leaves out weights or channels has other outputs than the network that it comes from. Its
remaining weights can make up for much of that without training: layer by layer, least squares finds the
weights W_k of level k for which

    || W_k X_k - W X ||^2

is smallest. W and X are the weights and the inputs of the layer in the original network, X_k the inputs that
the layer has in the level when all layers before it have been refitted, on some training images. (Layerwise
reconstruction with the inputs of the pruned network: He, Zhang and Sun, "Channel Pruning for Accelerating
Very Deep Neural Networks", 2017, section 3.1 and equation 5.)

Levels nest, so the core level's weights are found first, and each higher level's own ones around them. A
lower level's gain then costs the higher levels. To limit that, the squared error of the full level counts as
well, with the higher levels' weights free to make up for the change:

    minimise over W_k and W_n:  || W_k X_k - W X ||^2 + protect * || W_n X - W X ||^2

Only the weights whose entry level is k are kept from the solution. A layer that no higher level has own
weights in stays as it is.
"""

from collections.abc import Collection, Generator, Iterator, Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from nestify.machine import release_memory
from nestify.model.nested_model import NestedModel
from nestify.schedule.layer_calls import LayerCall
from nestify.schedule.least_squares import Equations, solve
from nestify.schedule.parted_calls import PartedCalls, images_ahead, part_images

POSITIONS = 64
"""Positions of a feature map that are used of each image; more in layers that run on a part of the images."""

MOST_INPUTS = 2**24
"""Numbers that a layer of one network reads at a time; with more, it runs on a part of the images."""

MOST_NUMBERS = 2**22
"""Numbers in the columns of one network that are in memory at a time."""

ITERATIONS = 20

RIDGE = 0.1
"""Pull towards the original weights: this times the mean squared input, for each weight of an output channel.

So it grows where there are few positions for many weights.
"""

PROTECT = 30.0
"""Weight of the full level's error while lower levels are fitted."""


@dataclass(frozen=True)
class Refitted:
    """What `refit` did.

    Attributes:
        fitted: names of the weights that were fitted, in the order of execution.
        left: names of the other weights that some level lacks a part of.
    """

    fitted: Sequence[str]
    left: Sequence[str]


@torch.no_grad()
def refit(
    nested: NestedModel,
    images: Tensor,
    protect: float = PROTECT,
    original: nn.Module | None = None,
    only: Collection[str] | None = None,
) -> Refitted:
    """Refit the shared weights of a nested model that was not trained, in place.

    Convolutions over images and linear layers are refitted; other layers, biases and private tensors stay.

    Args:
        nested: the model with its entry levels chosen.
        images: training images (B, C, H, W) on the model's device. They run through two networks at once,
            as many as `MOST_INPUTS` allows, at least eight.
        protect: weight of the full level's squared error while lower levels are fitted.
        original: the network whose outputs the levels get back, in eval mode; a copy of the model's network
            by default.
        only: names of the weights to refit; None for all.
    """
    original = deepcopy(nested.network).eval() if original is None else original
    state = nested.nested_state()
    shared = nested.shared_tensors()
    entry = {name: e.to(images.device) for name, e in state.entry.tensors.items() if name in state.shared}
    for name, tensor in shared.items():
        if name in state.shared and name not in entry:
            entry[name] = torch.ones_like(tensor, dtype=torch.uint8)
    if only is not None:
        entry = {name: levels for name, levels in entry.items() if name in only}
    fitted: dict[str, None] = {}
    room = images_ahead(original, images[:1], MOST_INPUTS)
    for level in range(1, nested.n_levels + 1):
        fit = _LevelFit(nested, level, original, entry, protect if level < nested.n_levels else 0.0, room)
        with closing(fit.run(images)) as weights:
            for name, weight in weights:
                shared[name].copy_(weight)
                fitted[name] = None
    reduced = [name for name, e in entry.items() if name in nested.spec.maskable and bool((e > 1).any())]
    return Refitted(list(fitted), [name for name in reduced if name not in fitted])


class _LevelFit:
    """Fits the own weights of one level.

    Args:
        nested: the nested model.
        level: the level, 1-based.
        original: the network before anything was fitted.
        entry: entry levels of the shared weights.
        protect: weight of the full level's squared error.
        room: for each layer of `original`, the number of images that may have joined.
    """

    def __init__(
        self,
        nested: NestedModel,
        level: int,
        original: nn.Module,
        entry: dict[str, Tensor],
        protect: float,
        room: Sequence[int],
    ) -> None:
        self.nested, self.level, self.entry, self.protect = nested, level, entry, protect
        self.original, self.room = original, room
        self.plain = nested.at_level(level)

    def run(self, images: Tensor) -> Generator[tuple[str, Tensor], None, None]:
        """Fit the layers one after the other, and yield the name and the full weight of each."""
        fitted: set[str] = set()
        maskable = set(self.nested.spec.maskable)
        pending = {name for name, own in self.entry.items() if name in maskable and self._can_fit(own)}
        parts = part_images(images, self.room[0] if self.room else len(images))
        targets = PartedCalls(self.original, parts, batch_statistics=False)
        calls = PartedCalls(self.plain, parts, batch_statistics=self.nested.is_reduced(self.level))
        with closing(targets), closing(calls):
            while calls.advance():
                name, weight = calls.calls[0].name, calls.calls[0].weight
                own = self.entry.get(name)
                if own is None or name in fitted or not self._can_fit(own):
                    continue
                while targets.advance() and targets.calls[0].name != name:
                    pass
                if not targets.calls:  # the level's layers come in another order
                    break
                while (more := targets.next_part) and targets.images + more <= self.room[targets.passed - 1]:
                    targets.join()
                    calls.join()
                if len(parts) > 1:  # of images so large that it is worth the time
                    release_memory()
                positions = POSITIONS * len(images) // targets.images
                solution = self._fit(
                    list(zip(targets.calls, calls.calls, strict=True)), positions, len(fitted)
                )
                if bool(solution.isfinite().all()):  # 32-bit sums of very large inputs may overflow
                    used, places = solution * (own <= self.level), self._places(name, solution)
                    weight.copy_(used if places is None else used[places])
                    fitted.add(name)
                    yield name, solution
                    if pending <= fitted:  # what comes after the last layer to fit need not run
                        break

    def _can_fit(self, entry: Tensor) -> bool:
        """Whether the level has own weights in a layer, and higher levels can make up for their change."""
        higher = (entry > self.level) & (entry <= self.nested.n_levels)
        return bool((entry == self.level).any()) and (not self.protect or bool(higher.any()))

    def _fit(self, pairs: Sequence[tuple[LayerCall, LayerCall]], positions: int, seed: int) -> Tensor:
        """Fit one layer, and return its full weight.

        Args:
            pairs: its calls in the original network and in the level, of each part of the images.
            positions: number of positions of a feature map to use of each image.
            seed: seed of their choice.
        """
        target, call = pairs[0]
        entry, name, n = self.entry[call.name], call.name, self.nested.n_levels
        places = self._places(name, target.weight)
        wanted = _by_group(target.weight, target.groups).transpose(1, 2)  # (g, c, o)
        rows, own_sums, sums = 0, _Sums(), _Sums()
        for inputs, own_inputs in _pieces(pairs, positions, seed):  # (g, R, c), (g', R, c')
            rows += inputs.shape[1]
            outputs = (inputs @ wanted).transpose(1, 2)  # (g, o, R)
            if self.protect:
                sums.add(inputs, outputs)
            if places is not None:
                outputs = outputs.flatten(0, 1)[places[0].flatten()].unflatten(0, (call.groups, -1))
            own_sums.add(own_inputs, outputs)  # (g', o', R)
        own = Equations(own_sums.gram, own_sums.products, places, entry <= self.level)
        equations, free, pull = [own], entry == self.level, own.diagonal()
        if self.protect:
            full = Equations(sums.gram, sums.products, None, entry <= n, self.protect)
            equations.append(full)
            free = (entry >= self.level) & (entry <= n)
            pull = torch.where(entry == self.level, pull, self.protect * full.diagonal())
        pull = pull * RIDGE * own.gram.shape[2] / rows
        start = self.nested.shared_tensor(name).detach()
        solution = solve(start, free, equations, ITERATIONS, pull)
        return torch.where(entry == self.level, solution, start)

    def _places(self, name: str, weight: Tensor) -> tuple[Tensor, ...] | None:
        """Return the part of a weight that the level has; None for all of it."""
        sizes = self.nested.level_sizes
        axes = {} if sizes is None else sizes.axes(self.level).get(name, {})
        if not axes:
            return None
        return _mesh(
            [
                torch.as_tensor(axes[dim] if dim in axes else range(size), device=weight.device)
                for dim, size in enumerate(weight.shape)
            ]
        )


class _Sums:
    """Sums over positions of X^T X and Z X, for inputs X (g, R, c) and outputs Z (g, o, R)."""

    def __init__(self) -> None:
        self.gram = self.products = torch.zeros(())

    def add(self, inputs: Tensor, outputs: Tensor) -> None:
        """Add the sums of some positions."""
        if self.gram.ndim == 0:
            self.gram, self.products = inputs.transpose(1, 2) @ inputs, outputs @ inputs
        else:
            self.gram.baddbmm_(inputs.transpose(1, 2), inputs)
            self.products.baddbmm_(outputs, inputs)


def _pieces(
    pairs: Sequence[tuple[LayerCall, LayerCall]], positions: int, seed: int
) -> Iterator[tuple[Tensor, Tensor]]:
    """Yield the columns of both calls at the same positions, of as many images as fit in memory together."""
    target, _ = pairs[0]
    size = max(1, MOST_NUMBERS // (positions * target.weight[0].numel() * target.groups))
    for pair in pairs:
        for start in range(0, len(pair[0].inputs), size):
            parts = (replace(call, inputs=call.inputs[start : start + size]) for call in pair)
            inputs, own_inputs = (part.columns(positions, seed + start) for part in parts)
            yield inputs, own_inputs
        seed += len(pair[0].inputs)


@torch.no_grad()
def fit_alone(call: LayerCall, masks: Sequence[Tensor]) -> list[Tensor]:
    """Return weights of one layer that keep some values each, fitted to the layer's own outputs.

    Args:
        call: the layer's call in the original network.
        masks: bool in the weight's shape, the values that a result keeps.
    """
    wanted = _by_group(call.weight, call.groups).transpose(1, 2)  # (g, c, o)
    size = max(1, MOST_NUMBERS // (POSITIONS * call.weight[0].numel() * call.groups))
    rows, sums = 0, _Sums()
    for start in range(0, len(call.inputs), size):
        inputs = replace(call, inputs=call.inputs[start : start + size]).columns(
            POSITIONS, start
        )  # (g, R, c)
        rows += inputs.shape[1]
        sums.add(inputs, (inputs @ wanted).transpose(1, 2))
    found = []
    for mask in masks:
        equations = Equations(sums.gram, sums.products, None, mask)
        pull = equations.diagonal() * RIDGE * sums.gram.shape[2] / rows
        found.append(solve(call.weight, mask, [equations], ITERATIONS, pull) * mask)
    return found


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """Reshape a weight (groups * o, in, *kernel) to (groups, o, c)."""
    return weight.reshape(groups, len(weight) // groups, -1)


def _mesh(indices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return indices of the dimensions of a tensor that broadcast together."""
    return tuple(
        index.view([-1 if dim == place else 1 for place in range(len(indices))])
        for dim, index in enumerate(indices)
    )
