"""The nested model: one set of weights, seen at any level."""

from collections.abc import Callable, Sequence
from copy import deepcopy

import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestify.errors import UnsupportedModelError
from nestify.model.batch_norm import own_names
from nestify.model.entry_levels import EntryLevels, NestedState
from nestify.model.heads import head_names, rows_for, set_classes
from nestify.model.level_sizes import LevelSizes
from nestify.model.masking import MaskedWeight, NamedTensors, WholeWeights, identity, masked_weight
from nestify.model.spec import ModelSpec, owner, state_tensors, tied_across_modules, tied_names
from nestify.recipe.options import BatchNormMode


class NestedModel(nn.Module):
    """n networks in one set of weights.

    The full level lives in `network`, an ordinary timm model. A lower level is the same architecture with
    other tensors in some places (its projection): shared weights times the level's mask, and the level's
    private tensors. The projection is differentiable, so training a level trains the shared weights.

    Args:
        network: a timm model; it is taken over, not copied.
        spec: its description.
        level_names: core level first.
        entry: entry levels of the maskable weights that the schedule uses, taken over; None starts dense.
        bn: what of batch norm is private to a level.
        masked: names of the weights that have entry levels; ignored where `entry` is given.
        structure: channels and blocks of the levels, where some have fewer; such a level is a network of
            its own, which computes with slices of the shared weights.
        classes: how many classes each level tells, core first; every level then has a classifier of its
            own. None: all share one.
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
        self.heads = () if classes is None else tuple(head_names(network, spec))
        self.classes = (spec.num_classes,) * self.n_levels if classes is None else tuple(classes)
        self.owned = (*own_names(network, bn), *self.heads)
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
        # The full level owns the tensors inside `network`; every other level owns a copy of them.
        self.private = nn.ModuleList(
            NamedTensors(
                {
                    name: self._start(level, name, shared[name].detach())
                    for name in self.owned
                    if level_sizes is None or level_sizes.has(level, name)
                },
                like=shared,
            )
            for level in range(1, self.n_levels + self.is_smaller(self.n_levels))
        )
        self._whole = WholeWeights(self.entry, self.n_levels)
        self._cached: tuple[object, dict[str, Tensor]] | None = None
        assert entry is None or entry.n_levels == self.n_levels

    def _start(self, level: int, name: str, shared: Tensor) -> Tensor:
        """A level's own copy of a tensor of the full level; zeros for a classifier of other classes."""
        own = self.cut(level, name, shared).clone()
        return rows_for(own, self.classes[level - 1]) if name in self.heads else own

    # -- levels ------------------------------------------------------------------------------------

    def level_number(self, level: int | str) -> int:
        """1-based number of a level that is given by number or name.

        Raises:
            ValueError: for a level that this model does not have.
        """
        if isinstance(level, str) and level in self.level_names:
            return self.level_names.index(level) + 1
        number = int(level) if isinstance(level, int) or level.isdecimal() else 0
        if not 1 <= number <= self.n_levels:
            names = ", ".join(f"{k} ({name})" for k, name in enumerate(self.level_names, 1))
            raise ValueError(f"level {level!r} is not one of {names}")
        return number

    @property
    def entry_levels(self) -> EntryLevels:
        """The entry levels as they are now; the tensors are the model's own."""
        return EntryLevels(self.n_levels, dict(self.entry.items()))

    @torch.no_grad()
    def set_entry_levels(self, entry: EntryLevels) -> None:
        """Take over new entry levels, of the same weights and the same number of levels."""
        assert set(entry) == set(self.entry)
        assert entry.n_levels == self.n_levels
        for name in entry:
            self.entry[name].copy_(entry[name])

    def is_smaller(self, level: int) -> bool:
        """Whether a level has fewer channels or blocks than the network."""
        return self.level_sizes is not None and not self.level_sizes.is_whole(level)

    def is_part(self, level: int) -> bool:
        """Whether a level lacks channels, blocks or weights that the network has."""
        return self.is_smaller(level) or self.sparsity(level) > 0

    def available(self) -> dict[str, Tensor]:
        """The lowest level that can use each maskable weight, uint8: that has its channels and its block."""
        return self._available({name: self.shared_tensor(name).detach() for name in self.entry})

    def _available(self, weights: dict[str, Tensor]) -> dict[str, Tensor]:
        found = {} if self.level_sizes is None else self.level_sizes.entry_levels(weights)
        return {
            name: found[name].to(weight.device)
            if name in found
            else torch.ones_like(weight, dtype=torch.uint8)
            for name, weight in weights.items()
        }

    def sparsity(self, level: int) -> float:
        """Share of a level's maskable weights that are zero: of those that its channels and blocks have."""
        kept = sum(int(torch.count_nonzero(entry <= level)) for _, entry in self.entry.items())
        total = sum(self.elements(level, name) for name in self.entry)
        return 1 - kept / total if total else 0.0

    def shared_tensors(self) -> dict[str, Tensor]:
        """The tensors of the full network by state-dict name, each tied one once."""
        return {name: self.shared_tensor(name) for name in self._shared}

    def elements(self, level: int, name: str) -> int:
        """Number of elements that a level has of a tensor of the network, masked-out ones included."""
        if name in self.heads:
            return self.own_tensors(level)[name].numel()
        if self.level_sizes is not None and not self.level_sizes.has(level, name):
            return 0
        return self.cut(level, name, self.shared_tensor(name)).numel()

    def cut(self, level: int, name: str, tensor: Tensor) -> Tensor:
        """A level's channels of a shared tensor."""
        return tensor if self.level_sizes is None else self.level_sizes.cut(level, name, tensor)

    # -- views -------------------------------------------------------------------------------------

    def projection(self, level: int, *, lazy: bool = False) -> dict[str, Tensor]:
        """The tensors in which a level differs from `network`, by state-dict name; differentiable.

        A smaller level differs in all that its network has.

        Args:
            level: 1-based.
            lazy: give masked weights that are made where they are used, to save memory.
        """
        make = MaskedWeight if lazy else masked_weight
        if self.level_sizes and self.is_smaller(level):
            own = self.own_tensors(level)
            names = self.level_sizes.names(level)
            return {name: own[name] if name in own else self._part(level, name, make) for name in names}
        dense = self._whole.at(level)
        masked = {
            name: make(self.shared_tensor(name), entry, level)
            for name, entry in self.entry.items()
            if name not in dense
        }
        return masked | self.own_tensors(level, shared_too=False)

    def _part(self, level: int, name: str, make: Callable[[Tensor, Tensor, int], Tensor]) -> Tensor:
        """What a smaller level has of a shared tensor, masked where it is."""
        weight = self.cut(level, name, self.shared_tensor(name))
        if name not in self.entry:
            return weight
        entry = self.cut(level, name, self.entry[name])
        return weight if int(entry.max()) <= level else make(weight, entry, level)

    def own_tensors(self, level: int, *, shared_too: bool = True) -> dict[str, Tensor]:
        """The tensors that a level owns, by state-dict name.

        Args:
            shared_too: give the full level's tensors, which live in `network`, as well.
        """
        if level <= len(self.private):
            return dict(self._private(level).items())
        if not shared_too:
            return {}
        return {name: self.shared_tensor(name) for name in self.owned}

    def shared_tensor(self, name: str) -> Tensor:
        """A tensor of `network` by state-dict name, as it is now."""
        module, local = self._shared[name]
        tensor = getattr(module, local)
        assert isinstance(tensor, Tensor)
        return tensor

    def _private(self, level: int) -> NamedTensors:
        tensors = self.private[level - 1]
        assert isinstance(tensors, NamedTensors)
        return tensors

    def forward(self, images: Tensor, level: int | str | None = None) -> Tensor:
        """Logits of a level.

        Args:
            images: (B, C, H, W), prepared as `spec.preprocessing` says.
            level: number or name; None is the full level.

        Returns:
            (B, classes of the level)

        Raises:
            UnsupportedModelError: if the network gives more than one tensor.
        """
        number = self.n_levels if level is None else self.level_number(level)
        module, tensors = self.view(number, images.device, torch.is_grad_enabled())
        output = functional_call(module, tensors, (images,), tie_weights=False) if tensors else module(images)
        if not isinstance(output, Tensor):
            raise UnsupportedModelError(
                f"{self.spec.architecture} gives a {type(output).__name__} and not one tensor of logits; "
                "switch its auxiliary or distillation outputs off (set_distilled_training(False))"
            )
        return output

    def view(self, level: int, device: torch.device, lazy: bool) -> tuple[nn.Module, dict[str, Tensor]]:
        """A module, and the tensors with which it computes a level: for `torch.func.functional_call`.

        Args:
            device: of the images. `level`, `lazy`: as for `projection`.
        """
        changed = self._projection_now(level, lazy)
        if self.level_sizes is not None and self.is_smaller(level):
            return self.level_sizes.skeleton(level, training=self.training, device=device), changed
        # A module that is registered under several names must be given under one, and a tensor that
        # several modules hold under each: torch's own tying does the first wrongly.
        tied = {alias: changed[name] for alias, name in self._tied.items() if name in changed}
        return self.network, changed | tied

    def _projection_now(self, level: int, lazy: bool) -> dict[str, Tensor]:
        """The projection; kept between calls while nothing changes, one level at a time."""
        if self.training or torch.is_grad_enabled():
            self._cached = None
            return self.projection(level, lazy=lazy)
        state = (level, self._whole.at(level), identity(self.parameters()))
        if self._cached is None or self._cached[0] != state:
            self._cached = None  # free the old level's copy before the new one is made
            self._cached = (state, self.projection(level))
        return self._cached[1]

    @torch.no_grad()
    def at_level(self, level: int | str) -> nn.Module:
        """A plain model of one level in eval mode, which shares no tensor with this one.

        A timm model, or for a smaller level the network that torch.export made of it.
        """
        number = self.level_number(level)
        if self.level_sizes and self.is_smaller(number):
            return self.level_sizes.network(number, self.projection(number))
        plain = deepcopy(self.network).eval()
        if self.classes[number - 1] != self.spec.num_classes:
            set_classes(plain, self.heads, self.classes[number - 1])
        for parameter in plain.parameters():
            parameter.grad = None
        own = state_tensors(plain)
        for name, tensor in self.projection(number).items():
            own[name].copy_(tensor)
        return plain

    @torch.no_grad()
    def load_own(self, level: int, plain: nn.Module) -> None:
        """Take a level's private tensors over from a plain model, such as a recalibrated one."""
        theirs = state_tensors(plain)
        for name, tensor in self.own_tensors(level).items():
            if name in theirs:  # a smaller level counts no batches
                tensor.copy_(theirs[name])

    @torch.no_grad()
    def round_to(self, dtype: torch.dtype) -> None:
        """Round the shared weights to what a file of this type can hold; those that no level uses become 0.

        Raises:
            ValueError: if a weight is too large for the type.
        """
        for name in self._shared:
            tensor = self.shared_tensor(name)
            if name in self.owned or not tensor.is_floating_point():
                continue
            if name in self.entry:
                tensor.masked_fill_(self.entry[name] > self.n_levels, 0)
            largest = float(tensor.abs().max()) if tensor.numel() else 0.0
            if largest > torch.finfo(dtype).max:
                raise ValueError(f"tensor {name!r} holds {largest:g}, which overflows {dtype}")
            tensor.copy_(tensor.to(dtype))
        self.network.train().train(self.training)  # some keep what they computed of the weights before

    # -- state -------------------------------------------------------------------------------------

    def nested_state(self, units: dict[str, tuple[int, int]] | None = None) -> NestedState:
        """The tensors that a nested file stores, on the CPU."""
        shared = {k: t.detach().cpu() for k, t in state_tensors(self.network).items() if k not in self.owned}
        entry: dict[str, Tensor] = {}
        axes: dict[str, dict[int, Tensor]] = {}
        skipped: list[list[str]] = []
        if self.level_sizes is not None:
            axes = self.level_sizes.axis_levels(shared)
            entry = self.level_sizes.entry_levels(shared)
            skipped = self.level_sizes.skipped_in_order()
        entry |= {name: t.cpu() for name, t in self.entry.items()}  # none below what its structure allows
        return NestedState(
            shared=shared,
            entry=EntryLevels(self.n_levels, entry),
            axes=axes,
            private=[
                {name: t.detach().cpu() for name, t in self.own_tensors(level).items()}
                for level in range(1, self.n_levels + 1)
            ],
            aliases=tied_names(self.network),
            units=units or {},
            skipped=skipped,
        )

    def train(self, mode: bool = True) -> "NestedModel":
        """Switch between training and eval mode; a cached level is dropped."""
        self._cached = None
        super().train(mode)
        return self
