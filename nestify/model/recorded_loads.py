"""What timm loads while it makes a model, and which of it did not fit."""

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

from torch import nn

from nestify.model.checkpoint_fit import Weights, difference_from
from nestify.model.spec import returns_feature_maps


class Load(NamedTuple):
    """A state dict that a module has loaded."""

    module: nn.Module
    weights: Weights


@contextmanager
def recorded_loads() -> Iterator[list[Load]]:
    """Record the state dicts that modules load.

    timm ignores missing and unknown keys if the classifier is new, and for some architectures always, so
    parts of a network could stay random.
    """
    loads: list[Load] = []
    load_state_dict = nn.Module.load_state_dict

    def record(self: nn.Module, state_dict: Weights, *args: Any, **kwargs: Any) -> Any:
        result = load_state_dict(self, state_dict, *args, **kwargs)
        loads.append(Load(self, dict(state_dict)))
        return result

    nn.Module.load_state_dict = record  # type: ignore[method-assign]
    try:
        yield loads
    finally:
        nn.Module.load_state_dict = load_state_dict  # type: ignore[method-assign]


def difference_of_load(
    model: nn.Module, loads: Sequence[Load], new: tuple[str, ...], unknown: bool = True
) -> str:
    """Describe which weights did not fit when timm loaded them; empty if all fit, or none were loaded.

    timm makes a backbone with feature maps of a network that has loaded its weights before. The classifier
    of that network, and what else it has above the maps, does not matter.

    Args:
        model: the model that timm returned.
        loads: what was loaded while it was made.
        new: modules that load nothing.
        unknown: whether keys that the model does not have count.
    """
    if not loads:
        return ""
    own = [load for load in loads if load.module is model]
    load = (own or loads)[-1]
    if returns_feature_maps(model):
        new, unknown = (*new, *classifier_modules(load.module)), False
    elif not own:
        return ""
    return difference_from(load.module.state_dict(), load.weights, new, unknown)


def classifier_modules(model: nn.Module) -> tuple[str, ...]:
    """Return the module names of a timm model's classifiers."""
    return as_tuple((getattr(model, "pretrained_cfg", None) or {}).get("classifier"))


def as_tuple(names: str | Sequence[str] | None) -> tuple[str, ...]:
    return (names,) if isinstance(names, str) else tuple(names or ())
