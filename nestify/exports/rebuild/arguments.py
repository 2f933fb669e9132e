"""The arguments that the class of a timm model is built with, and the numbers among them."""

import dataclasses
import inspect
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from functools import reduce, wraps
from operator import getitem
from typing import Any

import torch
from torch import nn

from nestify.exports.draft import quiet
from nestify.model.spec import build_model

Arguments = dict[str, Any]
"""By name: plain values as JSON has them."""
Slot = tuple[str, tuple[int, ...]]
"""Where a number is among the arguments: the argument's name, and the places in its nested lists."""

GIVEN = frozenset({"num_classes", "in_chans", "img_size"})
"""Arguments that say what goes in and comes out; no level changes them."""


def without_weights(architecture: str, kwargs: Mapping[str, Any]) -> nn.Module:
    """Build a timm model on the meta device.

    Raises:
        UnsupportedModelError: if timm cannot build it.
    """
    with quiet(), torch.device("meta"):
        return build_model(architecture, dict(kwargs))


def constructor_arguments(architecture: str, kwargs: Mapping[str, Any]) -> Arguments:
    """Return the plain arguments that the class of a timm model is called with, defaults included.

    Fields of a configuration object count as arguments: timm lets keyword arguments replace them.

    Raises:
        UnsupportedModelError: if timm cannot build it.
    """
    with _first_call(type(without_weights(architecture, kwargs))) as found:
        without_weights(architecture, kwargs)
    fields = {
        field.name: getattr(value, field.name)
        for value in found.values()
        if dataclasses.is_dataclass(value) and not isinstance(value, type)
        for field in dataclasses.fields(value)
    }
    everything = {**fields, **found, **kwargs}
    return {key: _as_json(value) for key, value in everything.items() if _is_plain(value)}


@contextmanager
def _first_call(cls: type[nn.Module]) -> Iterator[Arguments]:
    """Record the arguments of the first call of a class in the block."""
    found: Arguments = {}
    # A subclass that passes on all its arguments takes its signature from its base.
    owner = next((c for c in cls.__mro__ if "__init__" in vars(c) and not _hands_on(c)), cls)
    original = vars(owner)["__init__"]
    signature = inspect.signature(original)

    @wraps(original)
    def record(*args: Any, **kwargs: Any) -> None:
        if not found:
            bound = signature.bind(*args, **kwargs)
            bound.apply_defaults()
            for name, value in bound.arguments.items():
                is_rest = signature.parameters[name].kind is inspect.Parameter.VAR_KEYWORD
                found.update(value if is_rest else {name: value})
        original(*args, **kwargs)

    owner.__init__ = record  # type: ignore[misc]
    try:
        yield found
    finally:
        owner.__init__ = original  # type: ignore[misc]


def _hands_on(cls: type) -> bool:
    kinds = {parameter.kind for parameter in inspect.signature(cls.__init__).parameters.values()}  # type: ignore[misc]
    return inspect.Parameter.VAR_POSITIONAL in kinds


def _is_plain(value: object) -> bool:
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def _as_json(value: Any) -> Any:
    return [_as_json(item) for item in value] if isinstance(value, list | tuple) else value


def slots(arguments: Arguments) -> Iterator[Slot]:
    """Return the places of positive numbers that can differ for a level."""
    for name, value in arguments.items():
        if name not in GIVEN:
            yield from ((name, places) for places in _numbers(value))


def _numbers(value: Any) -> Iterator[tuple[int, ...]]:
    if isinstance(value, list):
        for place, item in enumerate(value):
            yield from ((place, *places) for places in _numbers(item))
    elif isinstance(value, int | float) and not isinstance(value, bool) and value > 0:
        yield ()


def value_at(arguments: Arguments, slot: Slot) -> Any:
    """Return the number at a place."""
    name, places = slot
    return reduce(getitem, places, arguments[name])


def replaced(arguments: Arguments, slot: Slot, value: float) -> Arguments:
    """Return a copy of the arguments with another number at a place."""
    name, places = slot
    return arguments | {name: _replaced(arguments[name], places, value)}


def _replaced(items: Any, places: tuple[int, ...], value: float) -> Any:
    if not places:
        return value
    here, *inner = places
    return [*items[:here], _replaced(items[here], tuple(inner), value), *items[here + 1 :]]
