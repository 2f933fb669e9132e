"""The nested model: one set of weights that can be run at any level."""

from collections.abc import Mapping, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestify.errors import RecipeError
from nestify.model.batch_norm import own_names
from nestify.model.call_lock import CallLock
from nestify.model.entry_levels import EntryLevels, NestedState
from nestify.model.feature_maps import Outputs, checked_outputs, output_channels
from nestify.model.heads import head_names, resize_rows, set_classes
from nestify.model.level_sizes import LevelSizes
from nestify.model.masking import MaskedWeight, NamedTensors, UnmaskedWeights, masked_weight, tensor_versions
from nestify.model.projection import own_projection, shared_parts
from nestify.model.spec import ModelSpec, owner, state_tensors, tied_across_modules, tied_names
from nestify.model.weight_facts import WeightFacts
from nestify.recipe.options import BatchNormMode
from nestify.shown import Shown


class NestedModel(Shown, nn.Module):
    """n networks in one set of weights.

    The full level is `network`, an ordinary timm model. A lower level has the same architecture, but some of
    its tensors (its projection) differ: shared weights times the level's mask, and the level's private
    tensors. The projection is differentiable, so training a level trains the shared weights.

    Args:
        network: a timm model; used as it is, not copied.
        spec: its description.
        level_names: names of the levels, core first.
        entry: entry levels of the weights that the schedule masks, used without a copy. None: all dense.
        bn: which batch-norm tensors are private to a level.
        masked: names of the weights that have entry levels; None: all maskable ones. Ignored with `entry`.
        level_sizes: channels and blocks of the levels; None if no level has fewer than `network`. A smaller
            level is a separate network that computes with slices of the shared weights.
        classes: number of classes that each level predicts, core first; each level then has its own
            classifier. None: all levels share one classifier.
    """

    def __init__(
        self,
        network: nn.Module,
        spec: ModelSpec,
        level_names: Sequence[str],
        *,
        entry: EntryLevels | None = None,
        masked: Sequence[str] | None = None,
        bn: BatchNormMode = "private",
        level_sizes: LevelSizes | None = None,
        classes: Sequence[int] | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.spec = spec
        self.level_names = tuple(level_names)
        self.n_levels = len(self.level_names)
        self.bn = bn
        self.level_sizes = level_sizes
        self.facts = WeightFacts()
        self.heads = () if classes is None else tuple(head_names(network, spec))
        self.classes = (spec.num_classes,) * self.n_levels if classes is None else tuple(classes)
        self.own_names = (*own_names(network, bn), *self.heads)
        shared = state_tensors(network)
        self._shared = {name: owner(network, name) for name in shared}
        self._tied = tied_across_modules(network)
        names = tuple(entry) if entry is not None else tuple(spec.maskable if masked is None else masked)
        names = tuple(name for name in names if name not in self.heads)
        self.entry = NamedTensors(
            self._available({name: shared[name].detach() for name in names})
            if entry is None
            else {name: entry[name].contiguous() for name in names}
        )
        # The full level owns the tensors in `network`, unless it is smaller; every other level owns a copy.
        self.private = nn.ModuleList(
            NamedTensors(
                {
                    name: self._initial_copy(level, name, shared[name].detach())
                    for name in self.own_names
                    if level_sizes is None or level_sizes.has_tensor(level, name)
                },
                like=shared,
            )
            for level in range(1, self.n_levels + self.is_smaller(self.n_levels))
        )
        self.unmasked = UnmaskedWeights(self.entry, self._cut_if_used)
        self._cached: tuple[object, dict[str, Tensor]] | None = None
        self._calls = CallLock()
        assert entry is None or entry.n_levels == self.n_levels

    def _initial_copy(self, level: int, name: str, shared: Tensor) -> Tensor:
        """Copy a tensor for a level; zeros for a classifier of another number of classes."""
        own = self.cut(level, name, shared).clone()
        return resize_rows(own, self.classes[level - 1]) if name in self.heads else own

    def level_number(self, level: int | str) -> int:
        """Return the 1-based number of a level that is given by its number or name.

        Raises:
            RecipeError: if the model has no such level.
        """
        if level in self.level_names:
            return self.level_names.index(str(level)) + 1
        number = int(level) if str(level).isdecimal() else 0
        if not 1 <= number <= self.n_levels:
            names = ", ".join(f"{k} ({name})" for k, name in enumerate(self.level_names, start=1))
            raise RecipeError(f"there is no level {level!r}; give one of {names}")
        return number

    @property
    def entry_levels(self) -> EntryLevels:
        """The current entry levels; the tensors are not copied."""
        return EntryLevels(self.n_levels, dict(self.entry.items()))

    @torch.no_grad()
    def set_entry_levels(self, entry: EntryLevels) -> None:
        """Copy new entry levels into the model, for the same weights and the same number of levels."""
        assert set(entry) == set(self.entry)
        assert entry.n_levels == self.n_levels
        for name in entry:
            self.entry[name].copy_(entry[name])

    def is_smaller(self, level: int) -> bool:
        """Whether a level has fewer channels or blocks than the network."""
        return self.level_sizes is not None and not self.level_sizes.is_full(level)

    def is_reduced(self, level: int) -> bool:
        """Whether a level lacks channels, blocks or weights of the network."""
        return self.is_smaller(level) or self.sparsity(level) > 0

    def available(self) -> dict[str, Tensor]:
        """Return, by name, the lowest level that has each maskable weight's channels and block (uint8)."""
        return self._available({name: self.shared_tensor(name).detach() for name in self.entry})

    def _available(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {} if self.level_sizes is None else self.level_sizes.entry_levels(weights)
        return {
            name: found[name].to(weight.device)
            if name in found
            else torch.ones_like(weight, dtype=torch.uint8)
            for name, weight in weights.items()
        }

    def lowest_levels(self) -> dict[str, Tensor]:
        """Return, by name, the lowest level that uses each element of the tensors in which levels differ."""
        shared = {name: t for name, t in self.shared_tensors().items() if name not in self.own_names}
        by_size = {} if self.level_sizes is None else self.level_sizes.entry_levels(shared)
        return by_size | dict(self.entry.items())  # entry is never below what the level sizes allow

    def sparsity(self, level: int) -> float:
        """Return the share of zeros among the maskable weights of a level's channels and blocks."""
        kept = sum(int(torch.count_nonzero(entry <= level)) for _, entry in self.entry.items())
        total = sum(self.elements(level, name) for name in self.entry)
        return 1 - kept / total if total else 0.0

    def shared_tensors(self) -> dict[str, Tensor]:
        """Return the tensors of the full network by state-dict name, each tied tensor once."""
        return {name: self.shared_tensor(name) for name in self._shared}

    def elements(self, level: int, name: str) -> int:
        """Return the number of elements that a level has of a tensor, masked-out ones included."""
        if name in self.heads:
            return self.own_tensors(level)[name].numel()
        part = self._cut_if_used(level, name, self.shared_tensor(name))
        return 0 if part is None else part.numel()

    def cut(self, level: int, name: str, tensor: Tensor) -> Tensor:
        """Cut a level's channels out of a shared tensor."""
        return tensor if self.level_sizes is None else self.level_sizes.cut(level, name, tensor)

    def _cut_if_used(self, level: int, name: str, tensor: Tensor) -> Tensor | None:
        has = self.level_sizes is None or self.level_sizes.has_tensor(level, name)
        return self.cut(level, name, tensor) if has else None

    def projection(self, level: int, *, lazy: bool = False) -> dict[str, Tensor]:
        """Return the tensors in which a level differs from `network`, by state-dict name; differentiable.

        For a smaller level these are all tensors of its network.

        Args:
            level: 1-based.
            lazy: return masked weights that are computed only when they are used, to save memory.
        """
        mask = MaskedWeight if lazy else masked_weight
        return own_projection(self, level) | {
            name: part.weight if part.entry is None else mask(part.weight, part.entry, level)
            for name, part in shared_parts(self, level).items()
        }

    def own_tensors(self, level: int, *, shared_too: bool = True) -> dict[str, Tensor]:
        """Return the tensors that a level owns, by state-dict name.

        Args:
            level: 1-based.
            shared_too: whether to include a full level's own tensors, which are part of `network`.
        """
        if level <= len(self.private):
            return dict(self._private(level).items())
        return {name: self.shared_tensor(name) for name in self.own_names} if shared_too else {}

    def shared_tensor(self, name: str) -> Tensor:
        """Return the current tensor of `network` by state-dict name."""
        module, local = self._shared[name]
        tensor = getattr(module, local)
        assert isinstance(tensor, Tensor)
        return tensor

    def _private(self, level: int) -> NamedTensors:
        tensors = self.private[level - 1]
        assert isinstance(tensors, NamedTensors)
        return tensors

    def forward(self, images: Tensor, level: int | str | None = None) -> Outputs:
        """Compute the logits of a level, its embedding, or its feature maps; one call at a time.

        Args:
            images: (B, C, H, W), preprocessed according to `spec.preprocessing`.
            level: number or name of the level; None is the highest level.

        Returns:
            (B, classes of the level), an embedding (B, C), or a list of feature maps.

        Raises:
            UnsupportedModelError: if the network returns anything else.
            RecipeError: if the model has no such level.
        """
        number = self.n_levels if level is None else self.level_number(level)
        with self._calls.held():  # other levels replace the tensors of the same modules
            return self.run(*self.view(number, images.device, torch.is_grad_enabled()), images)

    def run(self, module: nn.Module, tensors: dict[str, Tensor], images: Tensor) -> Outputs:
        """Run a module with the tensors that `view` returned with it; see `forward`."""
        found = functional_call(module, tensors, (images,), tie_weights=False) if tensors else module(images)
        return checked_outputs(found, self.spec.architecture)

    def feature_channels(self, level: int | str) -> tuple[int, ...]:
        """Return the channels of each feature map of a level, or the length of its embedding or logits."""
        return output_channels(self.at_level(level), self.spec)

    def view(self, level: int, device: torch.device, lazy: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return a module, and the tensors that `torch.func.functional_call` needs to run it as a level.

        Args:
            level: 1-based.
            device: device of the images.
            lazy: as for `projection`.
        """
        return self.view_with(level, device, self._current_projection(level, lazy))

    def view_with(
        self, level: int, device: torch.device, changed: dict[str, Tensor]
    ) -> tuple[nn.Module, dict[str, Tensor]]:
        """Return what `view` returns, with given tensors in place of the projection."""
        if self.level_sizes is not None and self.is_smaller(level):
            return self.level_sizes.skeleton(level, training=self.training, device=device), changed
        # A module that is registered under several names is passed under one of them, but a tensor that
        # several modules share under each: torch's own tying gets the first case wrong.
        tied = {alias: changed[name] for alias, name in self._tied.items() if name in changed}
        return self.network, changed | tied

    def _current_projection(self, level: int, lazy: bool) -> dict[str, Tensor]:
        """Return the projection; in eval mode without gradients that of the last level used is kept."""
        if lazy or self.training or torch.is_grad_enabled():
            self._cached = None
            return self.projection(level, lazy=lazy)
        state = (level, self.unmasked.for_level(level), tensor_versions(self.parameters()))
        if self._cached is None or self._cached[0] != state:
            self._cached = None  # free the old level's copy before making the new one
            self._cached = (state, self.projection(level))
        return self._cached[1]

    @torch.no_grad()
    def at_level(self, level: int | str) -> nn.Module:
        """Return a plain model of one level in eval mode that shares no tensor with this model.

        This is a timm model, or for a smaller level a network made by torch.export.
        """
        with self._calls.held():
            return self._plain(self.level_number(level))

    def _plain(self, number: int) -> nn.Module:
        tensors = self.projection(number, lazy=True)  # so that one masked weight at a time is in memory
        if self.level_sizes and self.is_smaller(number):
            return self.level_sizes.make_network(number, tensors)
        plain = deepcopy(self.network).eval()
        if self.classes[number - 1] != self.spec.num_classes:
            set_classes(plain, self.heads, self.classes[number - 1])
        plain.zero_grad()
        own = state_tensors(plain)
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
        return plain

    @torch.no_grad()
    def load_own(self, level: int, tensors: Mapping[str, Tensor]) -> None:
        """Copy values, by state-dict name, to a level's private tensors; the others are left unchanged."""
        for name, tensor in self.own_tensors(level).items():
            if name in tensors:  # a smaller level has no num_batches_tracked
                tensor.copy_(tensors[name])

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round the shared weights to the type of a file, and set weights that no level uses to 0.

        Raises:
            ValueError: if a weight is too large for the type.
        """
        for name in self._shared:
            tensor = self.shared_tensor(name)
            if name in self.own_names or not tensor.is_floating_point():
                continue
            if name in self.entry:
                tensor.masked_fill_(self.entry[name] > self.n_levels, 0)
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if largest > torch.finfo(dtype).max:
                raise ValueError(f"tensor {name!r} holds {largest:g}, which overflows {dtype}")
            tensor.copy_(tensor.to(dtype))
        self.network.train().train(self.training)  # some models cache values computed from the old weights

    def nested_state(self, units: dict[str, tuple[int, int]] | None = None) -> NestedState:
        """Return the tensors that a nested file stores, on the CPU.

        Args:
            units: as in `NestedState`; None if entry levels are not constant in blocks.
        """
        tensors = self.shared_tensors().items()
        shared = {name: t.detach().cpu() for name, t in tensors if name not in self.own_names}
        axes = {} if (sizes := self.level_sizes) is None else sizes.axis_levels(shared)
        return NestedState(
            shared=shared,
            entry=EntryLevels(self.n_levels, {n: t.cpu() for n, t in self.lowest_levels().items()}),
            axes=axes,
            private=[
                {name: t.detach().cpu() for name, t in self.own_tensors(level).items()}
                for level in range(1, self.n_levels + 1)
            ],
            aliases=tied_names(self.network),
            units=units or {},
            skipped=sizes.skipped_in_order() if sizes else [],
        )

    def train(self, mode: bool = True) -> "NestedModel":
        """Switch between training and eval mode, and drop the cached level."""
        self._cached = None
        super().train(mode)
        return self
