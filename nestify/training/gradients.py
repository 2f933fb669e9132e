"""Gradients of a step: how the gradients of the levels are added, and how each weight's sum is scaled.

On a GPU, a step is slow if it has many small launches, so that all tensors of a level are handled together
there. On a CPU this would only take more memory.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from math import sqrt

import torch
from torch import Tensor

from nestify.model.masking import FlatEntry, tensor_versions
from nestify.model.nested_model import NestedModel
from nestify.model.projection import own_projection, shared_parts
from nestify.training.usual_rate import is_adaptive

MIDDLE_PACE = 2.0
"""How much faster weights learn that several trained levels use, but not all.

The weights that all levels use have to suit all of them. Faster ones let the levels in the middle adapt to
that. The number was chosen by the accuracy on images held out of the training images.
"""

TOP_PACE = 2.0
"""How much faster weights learn that only one of several trained levels uses.

Only gradients have this factor, so that it has no effect on optimizers such as AdamW, with which the full
level would lose by it.
"""


def paces(level_weights: Sequence[float], top: float = 1.0) -> list[float]:
    """Return how fast weights learn by their entry level, from 1 on, where 1 is as fast as in a level alone.

    A weight that m of n trained levels use has sqrt(m), times `MIDDLE_PACE` if 1 < m < n, and `top` if
    1 = m < n.

    Args:
        level_weights: a_k by level, core first; a level with weight 0 is not trained and does not count.
        top: as above.
    """
    trained = [weight > 0 for weight in level_weights]
    users = [sum(trained[level:]) for level in range(len(trained))]
    factors = {0: 1.0, 1: top, sum(trained): 1.0}
    return [sqrt(m or 1) * factors.get(m, MIDDLE_PACE) for m in users]


class EntryFactors:
    """Multiplies tensors by a factor for each weight, which depends on the weight's entry level.

    Args:
        nested: the nested model.
        factors: by entry level, from 1 on.
    """

    def __init__(self, nested: NestedModel, factors: Sequence[float]) -> None:
        self._nested = nested
        device = next(nested.parameters()).device
        # Index 0 is unused, because entry levels count from 1; entry level n + 1 means that no level uses it.
        self._factors = torch.tensor([1.0, *factors, 1.0], device=device)
        # The rest of the entry levels changes while sparsity increases.
        constant = {name: e for name, e in nested.lowest_levels().items() if name not in nested.entry}
        self._constant = {name: entry.to(device) for name, entry in constant.items()}
        self._flat = FlatEntryCache()

    def entry_levels(self) -> dict[str, Tensor]:
        """Return the entry levels of the shared tensors in which levels differ, by state-dict name."""
        return self._constant | dict(self._nested.entry.items())

    def multiply(self, tensors: Mapping[str, Tensor]) -> None:
        """Multiply tensors by the factors, in place.

        Args:
            tensors: by names that `entry_levels` has.
        """
        entry = self.entry_levels()
        if self._factors.device.type != "cpu" and tensors:
            found, levels = list(tensors.values()), [entry[name] for name in tensors]
            torch._foreach_mul_(found, self._flat.find(0, found, levels).look_up(self._factors))
            return
        for name, tensor in tensors.items():
            tensor.mul_(self._factors_of(entry[name], tensor))

    def scaled(self, name: str, gradient: Tensor) -> Tensor:
        """Return the scaled gradient of a shared tensor; one that all levels share alike is not scaled."""
        entry = self._nested.entry[name] if name in self._nested.entry else self._constant.get(name)
        return gradient if entry is None else gradient * self._factors_of(entry, gradient)

    def _factors_of(self, entry: Tensor, gradient: Tensor) -> Tensor:
        factors = self._factors.to(gradient.dtype)
        # index_select is four times as fast as factors[entry.int()]
        return factors.index_select(0, entry.flatten().int()).view(entry.shape)


class LevelGradients(EntryFactors):
    """Scales each weight's gradient, according to the levels that use the weight.

    The gradient becomes the weighted mean over these levels, times the weight's pace.

    Args:
        nested: the nested model.
        level_weights: as for `paces`.
    """

    def __init__(self, nested: NestedModel, level_weights: Sequence[float]) -> None:
        sums = [sum(level_weights[level:]) for level in range(nested.n_levels)]
        pairs = zip(paces(level_weights, TOP_PACE), sums, strict=True)
        super().__init__(nested, [pace / total if total else 1.0 for pace, total in pairs])

    def apply(self) -> None:
        """Scale the gradients, which are the sums over all levels."""
        gradients = {name: self._nested.shared_tensor(name).grad for name in self.entry_levels()}
        self.multiply({name: gradient for name, gradient in gradients.items() if gradient is not None})


class PacedSteps(EntryFactors):
    """Multiplies the steps that an adaptive optimizer takes by each weight's pace.

    An optimizer such as AdamW divides the gradient by its size, so that a factor in it has no effect.

    Args:
        nested: the nested model.
        level_weights: as for `paces`.
        optimizer: calls this before and after its steps, if it is adaptive.
    """

    def __init__(
        self, nested: NestedModel, level_weights: Sequence[float], optimizer: torch.optim.Optimizer
    ) -> None:
        factors = paces(level_weights)
        super().__init__(nested, factors)
        self._before: dict[str, Tensor] = {}
        if is_adaptive(optimizer) and any(factor != 1 for factor in factors):
            optimizer.register_step_pre_hook(self._keep)
            optimizer.register_step_post_hook(self._apply)

    @torch.no_grad()
    def _keep(self, *_: object) -> None:
        """Copy the weights that the optimizer is about to change, which are those with a gradient."""
        weights = {name: self._nested.shared_tensor(name) for name in self.entry_levels()}
        weights = {name: weight for name, weight in weights.items() if weight.grad is not None}
        if {n: w.device for n, w in weights.items()} != {n: w.device for n, w in self._before.items()}:
            self._before = {name: torch.empty_like(weight) for name, weight in weights.items()}
        if weights:
            torch._foreach_copy_(list(self._before.values()), list(weights.values()))

    @torch.no_grad()
    def _apply(self, *_: object) -> None:
        """Multiply what the optimizer has added to the weights."""
        weights = {name: self._nested.shared_tensor(name) for name in self._before}
        if weights:
            torch._foreach_sub_(list(weights.values()), list(self._before.values()))
            self.multiply(weights)
            torch._foreach_add_(list(weights.values()), list(self._before.values()))


class FlatEntryCache:
    """Keeps the `FlatEntry` of each level until an entry level or the set of weights changes."""

    def __init__(self) -> None:
        self._found: dict[int, tuple[object, FlatEntry]] = {}

    def find(self, level: int, weights: Sequence[Tensor], entry: Sequence[Tensor]) -> FlatEntry:
        """Return the entry levels of weights in one tensor.

        Args:
            level: the level, or another number that identifies the set of weights.
            weights: the weights, or tensors of their shapes and memory layouts.
            entry: their entry levels, which may be views.
        """
        layouts = tuple((weight.shape, weight.stride()) for weight in weights)
        whole = [tensor if tensor._base is None else tensor._base for tensor in entry]
        state = layouts, tensor_versions(whole)
        if level not in self._found or self._found[level][0] != state:
            self._found[level] = state, FlatEntry(weights, entry)
        return self._found[level][1]


class LevelTensors:
    """The tensors of a level for one forward and one backward pass on a GPU.

    The backward pass ends at these tensors, which are leaves. Otherwise autograd would mask each gradient,
    pad it to the shared tensor and add it there, with several launches per tensor.

    Args:
        nested: the nested model.
        level: 1-based.
        device: the device that computes.
        cache: keeps the masks from step to step.

    Attributes:
        view: the module that computes the level, and its tensors, as `NestedModel.view` returns them.
    """

    def __init__(self, nested: NestedModel, level: int, device: torch.device, cache: FlatEntryCache) -> None:
        self._nested, self._level, self._cache = nested, level, cache
        self._parts = shared_parts(nested, level)
        # Found now, because the network holds the level's tensors while activations are recomputed.
        self._shared = {name: nested.shared_tensor(name) for name in self._parts}
        self._parameters = [p for p in nested.network.parameters() if p.requires_grad]
        self._leaves: dict[str, Tensor] = {}
        with torch.no_grad():
            masked = {name: part for name, part in self._parts.items() if part.entry is not None}
            if masked:
                weights = [part.weight for part in masked.values()]
                products = torch._foreach_mul(weights, self._masks(list(masked)))
                self._leaves = dict(zip(masked, products, strict=True))
            for name, part in self._parts.items():
                if name not in masked and part.is_cut:
                    self._leaves[name] = part.weight.detach()
        for name, leaf in self._leaves.items():
            leaf.requires_grad_(self._parts[name].weight.requires_grad)
        whole = {name: part.weight for name, part in self._parts.items()}
        changed = own_projection(nested, level) | whole | self._leaves
        self.view = nested.view_with(level, device, changed)

    def _masks(self, names: Sequence[str]) -> list[Tensor]:
        """Return the masks of some weights, in the type and layout of their parts."""
        parts = [self._parts[name] for name in names]
        entry = [part.entry for part in parts if part.entry is not None]
        return self._cache.find(self._level, [part.weight for part in parts], entry).masks(
            self._level, parts[0].weight.dtype
        )

    @contextmanager
    def adding_gradients(self) -> Iterator[None]:
        """Run the level's backward pass in the block, and add its gradients to the shared ones."""
        before = [parameter.grad for parameter in self._parameters]
        for parameter in self._parameters:
            parameter.grad = None
        yield
        add_gradients(self._parameters, before)
        self._add_gradients_of_leaves()

    @torch.no_grad()
    def _add_gradients_of_leaves(self) -> None:
        masked = [name for name, leaf in self._leaves.items() if self._parts[name].entry is not None]
        gradients = {name: leaf.grad for name, leaf in self._leaves.items() if leaf.grad is not None}
        if masked := [name for name in masked if name in gradients]:
            torch._foreach_mul_([gradients[name] for name in masked], self._masks(masked))
        sums: list[Tensor] = []
        added: list[Tensor] = []
        for name, gradient in gradients.items():
            parameter, part = self._shared[name], self._parts[name]
            if parameter.grad is None and not part.is_cut:
                parameter.grad = gradient
            elif (total := self._part_of_gradient(parameter, name)) is not None:
                sums.append(total)
                added.append(gradient)
            else:
                with torch.enable_grad():
                    part.weight.backward(gradient)
        if sums:
            torch._foreach_add_(sums, added)

    def _part_of_gradient(self, parameter: Tensor, name: str) -> Tensor | None:
        """Return the level's part of a shared tensor's gradient as a view; None if it is not a view."""
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
        part = self._nested.cut(self._level, name, parameter.grad)
        return part if part is parameter.grad or part._is_view() else None


def add_gradients(parameters: Sequence[Tensor], before: Sequence[Tensor | None]) -> None:
    """Add earlier gradients to the current ones, in place of the earlier ones if both exist."""
    sums: list[Tensor] = []
    added: list[Tensor] = []
    for parameter, earlier in zip(parameters, before, strict=True):
        if parameter.grad is not None and earlier is not None:
            sums.append(earlier)
            added.append(parameter.grad)
        if earlier is not None:
            parameter.grad = earlier
    if sums:
        torch._foreach_add_(sums, added)


@contextmanager
def unweighted_gradients(parameters: Sequence[Tensor], weight: float) -> Iterator[None]:
    """Divide the gradients that the block adds to parameters by a level's weight."""
    before = [parameter.grad for parameter in parameters]
    for parameter in parameters:
        parameter.grad = None
    yield
    found = [parameter.grad for parameter in parameters if parameter.grad is not None]
    if found:
        torch._foreach_div_(found, weight)
    add_gradients(parameters, before)
