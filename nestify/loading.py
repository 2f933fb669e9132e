"""From an open nested file to networks: all of its levels, or one as a plain timm model."""

from dataclasses import replace
from functools import partial

import timm
import torch
from torch import nn

from nestify.errors import BadFileError, UnsupportedModelError
from nestify.fingerprint import TOLERANCE, Network, fingerprint_error
from nestify.hierarchy import stored_labels
from nestify.model.nested_model import NestedModel
from nestify.model.spec import ModelSpec, build_model, describe_model, fill_model, state_tensors
from nestify.nested_file.reader import NestedFile
from nestify.restoring import restored


def load_nested(file: NestedFile, *, check: bool = True) -> NestedModel:
    """Rebuild all levels of a file, on the CPU, in eval mode.

    Args:
        check: prove by its fingerprint that every level came out as it was stored.

    Raises:
        BadFileError: if the file is damaged, or does not make the model that it names.
    """
    network, spec = _build(file, file.n_levels)
    with torch.no_grad():
        state = file.state(into=state_tensors(network))
    names = [level.name for level in file.manifest.levels]
    try:
        nested = restored(network, spec, state, names, _classes(file, file.n_levels))
    except (ValueError, UnsupportedModelError) as error:
        raise _misfit(file, error) from error
    if check:
        for level in range(1, nested.n_levels + 1):
            check_fingerprint(file, partial(nested, level=level), level)
    return nested


def load_level(file: NestedFile, level: int, *, check: bool = True) -> nn.Module:
    """Rebuild one level as a plain timm model, on the CPU, in eval mode; reads no byte of the levels above.

    Args:
        level: its number, 1 for the core.
        check: prove by its fingerprint that it came out as it was stored.

    Raises:
        RecipeError: if there is no such level.
        BadFileError: if the file is damaged, or does not make the model that it names.
    """
    network, spec = _build(file, level)
    skips = any(entry.skipped for entry in file.manifest.levels)
    if skips or any(parameter.axes for parameter in file.manifest.parameters):
        network = _smaller_level(file, network, spec, level)
        if check:
            check_fingerprint(file, network, level)
        return network
    with torch.no_grad():
        tensors = file.level_tensors(level, into=state_tensors(network))
    try:
        fill_model(network, tensors, spec.architecture)
    except ValueError as error:
        raise _misfit(file, error) from error
    network.eval()
    if check:
        check_fingerprint(file, network, level)
    return network


def _smaller_level(file: NestedFile, network: nn.Module, spec: ModelSpec, level: int) -> nn.Module:
    state = file.state(level)
    names = [entry.name for entry in file.manifest.levels[:level]]
    try:
        return restored(network, spec, state, names, _classes(file, level)).at_level(level)
    except (ValueError, UnsupportedModelError) as error:
        raise _misfit(file, error) from error


def check_fingerprint(file: NestedFile, network: Network, level: int) -> float:
    """How far a rebuilt level's logits are from the stored ones, relative to the largest.

    Raises:
        BadFileError: if they are others.
    """
    entry = file.manifest.levels[level - 1]
    input_size = file.manifest.model.preprocessing.input_size
    try:
        with torch.random.fork_rng():
            off = fingerprint_error(network, input_size, entry.fingerprint)
    except RuntimeError as error:  # the input's size is no size for this network
        size = "x".join(map(str, input_size))
        raise BadFileError(
            f"{file.name}: level {level} ({entry.name}) takes no images of {size} ({error})"
        ) from error
    if not off <= TOLERANCE:
        raise BadFileError(
            f"{file.name}: level {level} ({entry.name}) gives other logits than when it was stored (off by "
            f"{off:.2g} of the largest); {_made_with(file)}"
        )
    return off


def _classes(file: NestedFile, n_levels: int) -> list[int] | None:
    """How many classes the first levels tell, where every level has a classifier of its own."""
    counts = stored_labels(file.manifest).counts(file.manifest.model.num_classes)
    return None if counts is None else counts[:n_levels]


def _build(file: NestedFile, level: int) -> tuple[nn.Module, ModelSpec]:
    """The network that a file names, for the classes of a level, its weights yet to be filled."""
    model, classes = file.manifest.model, file.manifest.num_classes(level)
    kwargs = model.kwargs if classes == model.num_classes else {**model.kwargs, "num_classes": classes}
    try:
        network = build_model(model.architecture, kwargs, filled=False)
        described = describe_model(network)
    except UnsupportedModelError as error:
        raise BadFileError(f"{file.name}: {error}") from error
    if described.num_classes != classes:
        raise BadFileError(
            f"{file.name}: says {classes} classes, but describes a network of "
            f"{described.num_classes}; get an intact copy or write it again"
        )
    return network, replace(described, preprocessing=model.preprocessing.model_dump())


def _misfit(file: NestedFile, error: Exception) -> BadFileError:
    return BadFileError(f"{file.name}: {error}; {_made_with(file)}")


def _made_with(file: NestedFile) -> str:
    """The first thing to check when a file does not fit: another timm may build another network."""
    return f"it was made with timm {file.manifest.versions.get('timm')}, this is {timm.__version__}"
