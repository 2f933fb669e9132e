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

from collections.abc import Sequence
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from nestify.model.nested_model import NestedModel
from nestify.schedule.layer_calls import LayerCall, layer_calls
from nestify.schedule.least_squares import Equations, solve

POSITIONS = 64
"""Positions of a feature map that are used of each image."""

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
def refit(nested: NestedModel, images: Tensor, protect: float = PROTECT) -> Refitted:
    """Refit the shared weights of a nested model that was not trained, in place.

    Convolutions over images and linear layers are refitted; other layers, biases and private tensors stay.

    Args:
        nested: the model with its entry levels chosen.
        images: training images (B, C, H, W) on the model's device. All of them run through two networks at
            once, which takes their activations of the largest layers.
        protect: weight of the full level's squared error while lower levels are fitted.
    """
    original = deepcopy(nested.network).eval()
    state = nested.nested_state()
    shared = nested.shared_tensors()
    entry = {name: e.to(images.device) for name, e in state.entry.tensors.items() if name in state.shared}
    for name, tensor in shared.items():
        if name in state.shared and name not in entry:
            entry[name] = torch.ones_like(tensor, dtype=torch.uint8)
    fitted: dict[str, None] = {}
    for level in range(1, nested.n_levels + 1):
        fit = _LevelFit(nested, level, original, entry, protect if level < nested.n_levels else 0.0)
        for name, weight in fit.run(images):
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
    """

    def __init__(
        self,
        nested: NestedModel,
        level: int,
        original: nn.Module,
        entry: dict[str, Tensor],
        protect: float,
    ) -> None:
        self.nested, self.level, self.entry, self.protect = nested, level, entry, protect
        self.original = original
        self.plain = nested.at_level(level)

    def run(self, images: Tensor) -> list[tuple[str, Tensor]]:
        """Fit the layers one after the other, and return their full weights by name."""
        fitted: dict[str, Tensor] = {}
        targets = layer_calls(self.original, images, batch_statistics=False)
        calls = layer_calls(self.plain, images, batch_statistics=self.nested.is_reduced(self.level))
        with closing(targets), closing(calls):
            for call in calls:
                own = self.entry.get(call.name)
                if own is None or call.name in fitted or not self._can_fit(own):
                    continue
                target = next((other for other in targets if other.name == call.name), None)
                if target is None:  # the level's layers come in another order
                    break
                solution = self._fit(call, target, seed=len(fitted))
                if bool(solution.isfinite().all()):  # 32-bit sums of very large inputs may overflow
                    used, places = solution * (own <= self.level), self._places(call.name, solution)
                    call.weight.copy_(used if places is None else used[places])
                    fitted[call.name] = solution
        return list(fitted.items())

    def _can_fit(self, entry: Tensor) -> bool:
        """Whether the level has own weights in a layer, and higher levels can make up for their change."""
        higher = (entry > self.level) & (entry <= self.nested.n_levels)
        return bool((entry == self.level).any()) and (not self.protect or bool(higher.any()))

    def _fit(self, call: LayerCall, target: LayerCall, seed: int) -> Tensor:
        """Fit one layer, and return its full weight."""
        entry, name, n = self.entry[call.name], call.name, self.nested.n_levels
        wanted = target.weight
        inputs = target.columns(POSITIONS, seed)  # (g, R, c)
        outputs = inputs @ _by_group(wanted, target.groups).transpose(1, 2)  # (g, R, o)
        places = self._places(name, wanted)
        own_inputs = call.columns(POSITIONS, seed)  # (g', R, c')
        own_outputs = outputs.transpose(1, 2)  # (g, o, R)
        if places is not None:
            own_outputs = own_outputs.flatten(0, 1)[places[0].flatten()].unflatten(0, (call.groups, -1))
        own = Equations(
            gram=own_inputs.transpose(1, 2) @ own_inputs,
            products=own_outputs @ own_inputs,
            places=places,
            mask=entry <= self.level,
        )
        equations, free, pull = [own], entry == self.level, own.diagonal()
        if self.protect:
            gram = inputs.transpose(1, 2) @ inputs
            products = outputs.transpose(1, 2) @ inputs
            full = Equations(gram, products, None, entry <= n, self.protect)
            equations.append(full)
            free = (entry >= self.level) & (entry <= n)
            pull = torch.where(entry == self.level, pull, self.protect * full.diagonal())
        pull = pull * RIDGE * own_inputs.shape[2] / own_inputs.shape[1]
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


def _by_group(weight: Tensor, groups: int) -> Tensor:
    """Reshape a weight (groups * o, in, *kernel) to (groups, o, c)."""
    return weight.reshape(groups, len(weight) // groups, -1)


def _mesh(indices: Sequence[Tensor]) -> tuple[Tensor, ...]:
    """Return indices of the dimensions of a tensor that broadcast together."""
    return tuple(
        index.view([-1 if dim == place else 1 for place in range(len(indices))])
        for dim, index in enumerate(indices)
    )
