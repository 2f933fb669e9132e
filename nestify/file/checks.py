"""The gate: what a manifest must contain, and how it must agree with the header. Does not import torch.

Reader and writer use the same gate, so nothing is written that would not be read.
"""

import re
from collections import Counter
from collections.abc import Iterator, Mapping
from itertools import accumulate, chain, pairwise
from math import prod

from pydantic import ValidationError

from nestify.file.axes import Runs, available_units
from nestify.file.entry_codec import choose_codings, coded_bytes, remaining_units
from nestify.file.header import MAX_DIMS, Header, bounded_bytes
from nestify.file.layout import (
    ALIGNMENT,
    DTYPE_BYTES,
    FILE_DTYPES,
    Layout,
    Shape,
    Slot,
    TensorSpec,
    chunk_names,
    entry_name,
    place,
    values_name,
)
from nestify.file.manifest import Coding, Manifest, ParameterEntry
from nestify.file.untrusted import Refusal, quoted, strict_json
from nestify.recipe.levels import LONGEST_NAME

MAX_EXPANSION = 4096
"""Dense bytes per file byte that a reader accepts. A real file needs about 1 / density: 0.999 sparsity
in float16 takes some 600. Without a bound, a few bytes could ask for all memory."""

MAX_KEYS = 4096
"""Keys of one object in a manifest; each that is unknown takes memory until it is refused."""

LOADING_KWARGS = {"pretrained", "pretrained_cfg", "pretrained_cfg_overlay", "checkpoint_path", "cache_dir"}
"""Arguments of `timm.create_model` that fetch weights, from disk or from the network."""

FREE_DENSE_BYTES = 64 * 2**20
"""Dense bytes that a file of any size may ask for, so that the bound never meets small models."""


def parse_manifest(text: str) -> Manifest:
    """Read the manifest and check it against its schema.

    Raises:
        Refusal: naming the first problem and its place.
    """
    try:
        return Manifest.model_validate(strict_json(text, MAX_KEYS), strict=True)
    except ValidationError as error:
        first = error.errors(include_url=False, include_input=False)[0]
        place = ".".join(str(part) for part in first["loc"])
        raise Refusal(f"has a manifest that fails its schema at {quoted(place)} ({first['msg']})") from None
    except ValueError as error:
        raise Refusal(f"has a manifest that is not valid JSON ({error})") from None


def check_manifest(manifest: Manifest, file_bytes: int) -> None:
    """Check what the schema cannot express, from the manifest alone.

    Only the characters of the architecture's name are checked here; building the model checks whether timm
    has it.

    Args:
        file_bytes: size of the file, which bounds the size of what it may unpack to.

    Raises:
        Refusal: naming the tensor or field.
    """
    if not re.fullmatch("[A-Za-z0-9_.]+", manifest.model.architecture):
        name = quoted(manifest.model.architecture)
        raise Refusal(f"has {name} as its architecture, which is not a name in timm")
    for argument in LOADING_KWARGS & manifest.model.kwargs.keys():
        raise Refusal(f"has a model argument {quoted(argument)}, which would load other weights")
    names = manifest.model.class_names
    if names is not None and len(names) != manifest.model.num_classes:
        raise Refusal(f"has {len(names)} class names for {manifest.model.num_classes} classes")
    _check_outputs(manifest)
    _check_hierarchy(manifest)
    _check_distinct("level", [level.name for level in manifest.levels])
    for level in manifest.levels:
        if len(level.name) > LONGEST_NAME:
            raise Refusal(
                f"has {quoted(level.name)}, of {len(level.name)} characters, as the name of a level"
            )
        _check_distinct("private tensor", level.private)
        if [layer.name for layer in level.layers] != [layer.name for layer in manifest.levels[0].layers]:
            raise Refusal(f"level {quoted(level.name)} lists different layers than the core level")
    _check_skipped(manifest)
    _check_distinct("tensor", [n for entry in manifest.parameters for n in (entry.name, *entry.aliases)])
    dense_bytes = 0
    for parameter in manifest.parameters:
        if problem := _parameter_problem(parameter, len(manifest.levels)):
            raise Refusal(f"tensor {quoted(parameter.name)} {problem}")
        dense_bytes += bounded_bytes(parameter.shape, parameter.dtype)
        if dense_bytes > FREE_DENSE_BYTES + MAX_EXPANSION * file_bytes:
            raise Refusal(
                f"tensor {quoted(parameter.name)} would unpack {file_bytes} bytes to more than "
                f"{MAX_EXPANSION} times as many"
            )


def _check_outputs(manifest: Manifest) -> None:
    """Check that levels list channels if and only if the model is a backbone, and as many as they have."""
    model = manifest.model
    if model.output != "logits" and (model.class_names is not None or manifest.hierarchy):
        raise Refusal(f"has names of classes, but {model.architecture} predicts none")
    for level in manifest.levels:
        maps = len(level.feature_channels)
        if (model.output == "logits") != (not maps):
            raise Refusal(
                f"level {quoted(level.name)} has {maps} feature maps for a model that returns {model.output}"
            )
        due = len(model.feature_reductions) or 1
        if maps and maps != due:
            raise Refusal(f"level {quoted(level.name)} has {maps} feature maps where {due} are due")
        if maps and sum(level.feature_channels) != len(level.fingerprint):
            raise Refusal(
                f"level {quoted(level.name)} has {sum(level.feature_channels)} channels, but a fingerprint "
                f"of {len(level.fingerprint)} numbers"
            )


def _check_hierarchy(manifest: Manifest) -> None:
    _check_distinct("set of classes", [classes.name for classes in manifest.hierarchy])
    for classes in manifest.hierarchy:
        name, count = quoted(classes.name), len(classes.class_names)
        if len(classes.parents) != manifest.model.num_classes:
            raise Refusal(f"maps {len(classes.parents)} of {manifest.model.num_classes} classes to {name}")
        if set(classes.parents) != set(range(count)):
            raise Refusal(f"maps its classes to indices outside the {count} of {name}")
    for k, level in enumerate(manifest.levels, start=1):
        if len(level.consensus) not in (0, k):
            count = len(level.consensus)
            raise Refusal(f"level {quoted(level.name)} has {count} weights for a consensus of {k} levels")
        if level.classes and level.classes not in {classes.name for classes in manifest.hierarchy}:
            raise Refusal(
                f"level {quoted(level.name)} predicts classes {quoted(level.classes)}, which the file lacks"
            )


def check_layout(manifest: Manifest, header: Header) -> Layout:
    """Check that the header has exactly the tensors of a checked manifest, each at its position.

    Raises:
        Refusal: naming the tensor that is missing, extra, or has a wrong type, shape or position, or the
            level whose number of bytes is wrong.
    """
    if header.data_start % ALIGNMENT:
        raise Refusal(f"has data that begins misaligned, at byte {header.data_start}")
    chunks = [list(chunk_names(manifest, level)) for level in range(1, len(manifest.levels) + 1)]
    for name in chain.from_iterable(chunks):
        if name not in header.slots:
            raise Refusal(f"tensor {quoted(name)} is missing")
    for parameter in manifest.parameters:
        _check_stored(parameter, header.slots)
    layout = place([[header.slots[name].spec for name in chunk] for chunk in chunks])
    _check_places({slot.spec.name: slot for slot in layout.slots}, header.slots)
    for level, due in zip(manifest.levels, layout.chunk_bytes, strict=True):
        if level.data_bytes != due:
            raise Refusal(
                f"level {quoted(level.name)} has {due} bytes where its manifest says {level.data_bytes}"
            )
    return layout


def units_left(parameter: ParameterEntry) -> Iterator[tuple[int, int, Coding]]:
    """Yield per level, core first: available units that no lower level uses, how many enter, their coding."""
    remaining = remaining_units(_available(parameter), parameter.entering)
    return zip(remaining, parameter.entering, parameter.coding, strict=True)


def _available(parameter: ParameterEntry) -> list[int]:
    """Return the number of units that each level may use."""
    shape, n_levels = tuple(parameter.shape), len(parameter.entering)
    return available_units(shape, parameter.unit, parameter.axes, n_levels)


def _check_skipped(manifest: Manifest) -> None:
    for level in manifest.levels:
        _check_distinct("skipped module", level.skipped)
    for lower, higher in pairwise(manifest.levels):
        if more := set(higher.skipped) - set(lower.skipped):
            raise Refusal(
                f"level {quoted(higher.name)} skips {quoted(min(more))}, which the level below does not skip"
            )


def _check_distinct(kind: str, names: list[str]) -> None:
    for name, times in Counter(names).items():
        if times > 1:
            raise Refusal(f"lists the {kind} {quoted(name)} twice")
        if not name or not name.isprintable():
            raise Refusal(f"has {quoted(name)} as the name of a {kind}")


def _parameter_problem(parameter: ParameterEntry, n_levels: int) -> str | None:
    allowed = FILE_DTYPES if parameter.maskable else tuple(DTYPE_BYTES)
    if parameter.dtype not in allowed:
        return f"has dtype {quoted(parameter.dtype)}, not one of {', '.join(allowed)}"
    if len(parameter.shape) > MAX_DIMS:
        return f"has {len(parameter.shape)} dimensions, more than {MAX_DIMS}"
    if parameter.unit != (1, 1) and not (parameter.maskable and len(parameter.shape) >= 2):
        return "has blocks, which only maskable tensors of two or more dimensions have"
    if parameter.axes and (problem := _axes_problem(parameter, n_levels)):
        return problem
    due = n_levels if parameter.maskable else 0
    if not len(parameter.coding) == len(parameter.entering) == due:
        return f"does not list {due} levels of entering weights"
    return _entering_problem(parameter) if parameter.maskable else None


def _axes_problem(parameter: ParameterEntry, n_levels: int) -> str | None:
    if not parameter.maskable or parameter.unit != (1, 1):
        return "has axes, which only maskable tensors without blocks have"
    if len(parameter.axes) != len(parameter.shape) or not any(parameter.axes):
        return f"has axes that do not fit its {len(parameter.shape)} dimensions"
    for dim, (extent, runs) in enumerate(zip(parameter.shape, parameter.axes, strict=True)):
        if runs and (problem := _runs_problem(runs, extent, n_levels)):
            return f"has an axis {dim} {problem}"
    return None


def _runs_problem(runs: Runs, extent: int, n_levels: int) -> str | None:
    if (highest := max(level for level, _ in runs)) > n_levels + 1:
        return f"with level {highest} where {n_levels + 1} is the highest"
    if (indices := sum(count for _, count in runs)) != extent:
        return f"with {indices} indices where it has {extent}"
    if highest == 1 or any(one[0] == next_one[0] for one, next_one in pairwise(runs)):
        return "in more runs than it takes"
    return None


def _entering_problem(parameter: ParameterEntry) -> str | None:
    available = _available(parameter)
    for level, (taken, units) in enumerate(
        zip(accumulate(parameter.entering), available, strict=True), start=1
    ):
        if taken > units:
            return f"has {taken} entering units at level {level} where it has {units}"
    if parameter.coding != choose_codings(available, parameter.entering):
        return "has entry positions in a coding that does not fit their number"
    return None


def _check_stored(parameter: ParameterEntry, slots: Mapping[str, Slot]) -> None:
    """Refuse stored tensors of a parameter whose type or shape differs from what the manifest implies."""
    if not parameter.maskable:
        if 0 not in parameter.shape:
            spec = slots[values_name(1, parameter.name)].spec
            _expect(spec, parameter.dtype, tuple(parameter.shape))
        return
    for level, (remaining, entering, coding) in enumerate(units_left(parameter), start=1):
        if size := coded_bytes(coding, remaining, entering):
            _expect(slots[entry_name(level, parameter.name)].spec, "U8", (size,))
        if entering:
            spec = slots[values_name(level, parameter.name)].spec
            most = entering * prod(parameter.unit)  # blocks at a ragged edge hold fewer weights
            count = min(max(prod(spec.shape), entering), most)
            _expect(spec, parameter.dtype, (count,))


def _expect(spec: TensorSpec, dtype: str, shape: Shape) -> None:
    if (spec.dtype, spec.shape) != (dtype, shape):
        raise Refusal(
            f"tensor {quoted(spec.name)} is {spec.dtype} of shape {list(spec.shape)} where {dtype} of shape "
            f"{list(shape)} is due"
        )


def _check_places(due: Mapping[str, Slot], found: Mapping[str, Slot]) -> None:
    for name, slot in found.items():
        if name not in due:
            raise Refusal(f"holds a tensor {quoted(name)} that its manifest does not list")
        if slot.begin != due[name].begin:
            raise Refusal(
                f"tensor {quoted(name)} begins at data byte {slot.begin} where {due[name].begin} is due "
                "(8-byte aligned, in level order)"
            )
        _expect(slot.spec, due[name].spec.dtype, due[name].spec.shape)
    if missing := set(due) - set(found):
        raise Refusal(f"tensor {quoted(min(missing))} is missing")
