"""Rebuilding networks from a nested file: all of its levels, or one as a plain timm model."""

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import replace
from typing import overload

import timm
import torch
from torch import Tensor, nn
from torch.func import functional_call

from nestify.errors import BadFileError, UnsupportedModelError, foreign_code
from nestify.file.fingerprint import Network, fingerprint_error
from nestify.file.reader import NestedFile, open_nested_file
from nestify.model.batch_norm import own_names
from nestify.model.build_limits import BuildLimits
from nestify.model.entry_levels import EntryLevels, NestedState
from nestify.model.feature_maps import Outputs
from nestify.model.graph.block_map import map_blocks
from nestify.model.graph.channel_map import map_built_channels
from nestify.model.level_sizes import LevelSizes, derive_level_sizes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import (
    ModelSpec,
    build_model,
    describe_model,
    fill_model,
    state_tensors,
)

TOLERANCE = 1e-2
"""Largest allowed difference of a rebuilt level's logits, relative to the largest. Machines round
differently; a wrong level or a damaged weight differs by far more."""


class UnbuildableError(BadFileError):
    """The network that a nested file names cannot be built."""


def lazy_level(nested: NestedModel, level: int) -> Network:
    """Return a level as a function that computes each masked weight when it is used, to save memory."""

    def run(images: Tensor) -> Outputs:
        module, tensors = nested.view(level, images.device, lazy=True)
        outputs: Outputs = functional_call(module, tensors, (images,), tie_weights=False)
        return outputs

    return run


@torch.no_grad()
def restore(
    network: nn.Module,
    spec: ModelSpec,
    state: NestedState,
    level_names: Sequence[str],
    classes: Sequence[int] | None = None,
    *,
    keep_outputs: bool = True,
) -> NestedModel:
    """Make a nested model, in eval mode, from a newly built timm model and the tensors of a nested file.

    Args:
        network: the timm model, which is modified; its classes are those of the highest level.
        spec: description of the model.
        state: the tensors, which are used or copied; tensors that belong to the network stay in place.
        level_names: names of the levels, core first.
        classes: number of classes of each level, if every level has its own classifier.
        keep_outputs: whether the channels of the network's outputs are the same at all levels.

    Raises:
        ValueError: if the tensors do not fit the architecture.
        UnsupportedModelError: if the levels that they describe do not form a network.
    """
    full = state.shared | state.private[-1]
    level_sizes = None
    entry = state.entry
    if state.axes or any(state.skipped):
        level_sizes = _derive_level_sizes(network, spec, state, keep_outputs)
        if not level_sizes.is_full(entry.n_levels):  # no level computes with `network` itself
            full = state_tensors(network) | state.shared
        entry = _masks(level_sizes, spec, state)
    given = full | {name: full[kept] for name, kept in state.aliases.items()}
    fill_model(network, given, spec.architecture)
    affine = set(own_names(network, "private")) - set(own_names(network, "recalibrate"))
    nested = NestedModel(
        network,
        spec,
        level_names,
        entry=entry,
        bn="private" if not affine or affine & state.private[-1].keys() else "recalibrate",
        level_sizes=level_sizes,
        classes=classes,
    )
    for level, tensors in enumerate(state.private[: len(nested.private)], start=1):
        own = nested.own_tensors(level)
        if {n: t.shape for n, t in own.items()} != {n: t.shape for n, t in tensors.items()}:
            raise ValueError(f"the private tensors of level {level} do not fit {spec.architecture}")
        for name, tensor in tensors.items():
            own[name].copy_(tensor)
    return nested.eval()


def _derive_level_sizes(
    network: nn.Module, spec: ModelSpec, state: NestedState, keep_outputs: bool
) -> LevelSizes:
    channels = map_built_channels(network, spec, keep_outputs=keep_outputs)
    names = {n for n in channels.names if n in state.shared and state.shared[n].is_floating_point()}
    skipped = state.skipped or [[] for _ in range(state.entry.n_levels)]
    return derive_level_sizes(channels, map_blocks(channels), state.axes, names, skipped)


def _masks(level_sizes: LevelSizes, spec: ModelSpec, state: NestedState) -> EntryLevels:
    """Return the entry levels of weights that are masked in addition to missing channels and blocks.

    Raises:
        ValueError: if a level uses weights of a block that it skips.
    """
    entry = state.entry
    available = level_sizes.entry_levels(state.shared)
    masked: dict[str, Tensor] = {}
    for name in entry:
        at_least = available.get(name)
        if at_least is None:
            at_least = torch.ones_like(entry[name])
        if bool((entry[name] < at_least).any()):
            raise ValueError(f"a level stores weights of {name!r} but skips the only blocks that use it")
        if name in spec.maskable and not torch.equal(entry[name], at_least):
            masked[name] = entry[name]
    return EntryLevels(entry.n_levels, masked)


def load_nested(file: NestedFile, *, check: bool = True) -> NestedModel:
    """Rebuild all levels of a file, on the CPU, in eval mode.

    Args:
        file: the open file.
        check: whether to compare each level's logits with its stored fingerprint.

    Raises:
        BadFileError: if the file is damaged, or does not make the model that it names.
    """
    network, spec = build_network(file, file.n_levels)
    with torch.no_grad():
        state = file.state(into=state_tensors(network))
    names = [level.name for level in file.manifest.levels]
    with _must_fit(file):
        classes, keep = _classes(file, file.n_levels), _keeps_outputs(file)
        nested = restore(network, spec, state, names, classes, keep_outputs=keep)
    if check:
        for level in range(1, nested.n_levels + 1):
            check_fingerprint(file, lazy_level(nested, level), level)
    return nested


def load_level(file: NestedFile, level: int, *, check: bool = True) -> nn.Module:
    """Rebuild one level as a plain timm model, on the CPU, in eval mode; reads no byte of the levels above.

    Args:
        file: the open file.
        level: number of the level, 1 for the core level.
        check: whether to compare its logits with its stored fingerprint.

    Raises:
        RecipeError: if there is no such level.
        BadFileError: if the file is damaged, or does not make the model that it names.
    """
    network, spec = build_network(file, level)
    skips = any(entry.skipped for entry in file.manifest.levels)
    if skips or any(parameter.axes for parameter in file.manifest.parameters):
        network = _smaller_level(file, network, spec, level)
        if check:
            check_fingerprint(file, network, level)
        return network
    with torch.no_grad():
        tensors = file.level_tensors(level, into=state_tensors(network))
    with _must_fit(file):
        fill_model(network, tensors, spec.architecture)
    network.eval()
    if check:
        check_fingerprint(file, network, level)
    return network


def _smaller_level(file: NestedFile, network: nn.Module, spec: ModelSpec, level: int) -> nn.Module:
    state = file.state(level)
    names = [entry.name for entry in file.manifest.levels[:level]]
    with _must_fit(file):
        classes, keep = _classes(file, level), _keeps_outputs(file)
        return restore(network, spec, state, names, classes, keep_outputs=keep).at_level(level)


def check_fingerprint(file: NestedFile, network: Network, level: int) -> float:
    """Return the difference of a rebuilt level's logits from the stored ones, relative to the largest.

    Raises:
        BadFileError: if the difference is above the tolerance.
    """
    entry = file.manifest.levels[level - 1]
    model = file.manifest.model
    input_size = model.preprocessing.input_size

    def describe(reason: str) -> BadFileError:
        size = "x".join(map(str, input_size))
        return BadFileError(
            f"{file.name}: level {level} ({entry.name}) does not accept images of {size} ({reason})"
        )

    with foreign_code(describe), torch.random.fork_rng([]):
        off = fingerprint_error(network, input_size, entry.fingerprint, model.channels_last)
    if not off <= TOLERANCE:
        raise BadFileError(
            f"{file.name}: level {level} ({entry.name}) gives other {model.output} than when it was stored "
            f"(off by {off:.2g} of the largest); {_made_with(file)}"
        )
    return off


def _classes(file: NestedFile, n_levels: int) -> list[int] | None:
    """Number of classes of each of the first levels, if every level has a classifier of its own."""
    manifest = file.manifest
    return [manifest.num_classes(k) for k in range(1, n_levels + 1)] if manifest.hierarchy else None


def _keeps_outputs(file: NestedFile) -> bool:
    """Whether the outputs of all levels have all channels, as those of classifiers do."""
    model = file.manifest.model
    return model.keep_outputs or model.output == "logits"


def build_network(file: NestedFile, level: int) -> tuple[nn.Module, ModelSpec]:
    """Build the network that a file names, for the classes of a level, without its weights.

    Raises:
        BadFileError: if it cannot be built.
    """
    model, classes = file.manifest.model, file.manifest.num_classes(level)
    kwargs = model.kwargs if classes == model.num_classes else {**model.kwargs, "num_classes": classes}

    def describe(reason: str) -> UnbuildableError:
        return UnbuildableError(f"{file.name}: {model.architecture} cannot be described ({reason})")

    try:
        network = build_model(model.architecture, kwargs, random_weights=False, limits=_limits(file))
        with foreign_code(describe):
            described = describe_model(network)
    except UnsupportedModelError as error:
        raise UnbuildableError(f"{file.name}: {error}") from error
    if described.num_classes != classes:
        raise BadFileError(
            f"{file.name}: says {classes} classes, but describes a network of "
            f"{described.num_classes}; get an intact copy or write it again"
        )
    return network, replace(described, preprocessing=model.preprocessing.model_dump())


def _limits(file: NestedFile) -> BuildLimits:
    """Return limits for the network that a file names, from the tensors that it lists."""
    parameters, levels = file.manifest.parameters, file.manifest.levels
    names = sum(1 + len(parameter.aliases) for parameter in parameters)
    names += max(len(level.private) for level in levels)
    # Private tensors are not listed with their shapes; an element takes at least a byte.
    private = max(level.data_bytes for level in levels)
    elements = sum(math.prod(parameter.shape) for parameter in parameters) + private
    return BuildLimits.for_tensors(names, elements, "file")


@contextmanager
def _must_fit(file: NestedFile) -> Iterator[None]:
    """Turn whatever goes wrong when a file's tensors become a network into a BadFileError."""

    def describe(reason: str) -> BadFileError:
        return BadFileError(f"{file.name}: {reason}; {_made_with(file)}")

    try:
        with foreign_code(describe):
            yield
    except UnsupportedModelError as error:
        raise describe(str(error)) from error


def _made_with(file: NestedFile) -> str:
    """Name the timm versions, because a different timm may build a different network."""
    return f"it was made with timm {file.manifest.versions.get('timm')}, this is {timm.__version__}"


@overload
def load(path: str | os.PathLike[str], *, level: None = None, check: bool = True) -> NestedModel: ...


@overload
def load(path: str | os.PathLike[str], *, level: int | str, check: bool = True) -> nn.Module: ...


def load(
    path: str | os.PathLike[str], *, level: int | str | None = None, check: bool = True
) -> NestedModel | nn.Module:
    """Rebuild a nested model, or one level of it, on the CPU, in eval mode.

    Args:
        path: a nested file, or its address `https://`, `http://`, `hf://owner/repo/file`; a local path
            makes no network request.
        level: number or name of one level, which is returned as a plain timm model: nothing after the level's
            prefix is read, and little more memory than the model's own is needed. None for all levels.
        check: whether to compare each level's logits with its stored fingerprint.

    Raises:
        RecipeError: if there is no such level.
        BadFileError: if the file is damaged, or does not make the model that it names.
    """
    if level is None:
        return load_nested(open_nested_file(path), check=check)
    file = open_nested_file(path, truncated=True)
    file.check_whole(number := file.level_index(str(level)))
    return load_level(file, number, check=check)
