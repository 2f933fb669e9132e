"""The pretrained model that a run starts from: a timm model with timm's weights or a local checkpoint."""

import hashlib
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path
from typing import Any

import timm
import torch
from safetensors.torch import save
from timm.models import resolve_model_input_args
from torch import nn

from nestify.errors import CheckpointError, RecipeError, foreign_code
from nestify.files import atomic_file
from nestify.model.build_limits import BuildLimits, limited_build
from nestify.model.checkpoint_fit import Weights, difference_from, inside_wrapper, without_modules
from nestify.model.hub import hub_or_cache
from nestify.model.recorded_loads import as_tuple, classifier_modules, difference_of_load, recorded_loads
from nestify.model.spec import Kwargs, ModelSpec, NoRandomFill, describe_model
from nestify.model.weights_file import read_weights

_HUB_PREFIXES = ("hf-hub:", "hf_hub:")

LARGEST_HEAD = 8192
"""Values per class of a new classifier, as far as limits are concerned."""


@dataclass(frozen=True)
class PretrainedModel:
    """A model with its weights, its description, and the origin of the weights.

    Attributes:
        model: the timm model, in eval mode, on the CPU.
        spec: its description.
        source_sha256: hexadecimal SHA-256 of the checkpoint file; None without a file.
        new_head: whether the classifier is newly initialised, so that it has yet to learn its classes.
        notices: sentences that say what was changed when the checkpoint was read.
    """

    model: nn.Module
    spec: ModelSpec
    source_sha256: str | None
    new_head: bool
    notices: tuple[str, ...] = ()


def load_pretrained(
    name: str,
    *,
    checkpoint: str | Path | None = None,
    pretrained: bool = True,
    kwargs: Kwargs | None = None,
    new_head_classes: int | None = None,
    input_size: int | tuple[int, int] | None = None,
    options: tuple[str, str] = ("model.name", "model.checkpoint"),
) -> PretrainedModel:
    """Make a timm model with pretrained weights.

    Args:
        name: a name in timm's registry, `hf-hub:owner/name`, or `local-dir:folder`.
        checkpoint: a local `.safetensors` file, or a `.pth` file that contains only weights; None: timm's
            own weights, or random ones.
        pretrained: whether timm fetches its own weights; False: random weights. Ignored with a checkpoint.
        kwargs: further arguments of `timm.create_model`.
        new_head_classes: number of classes of a newly initialised classifier, for data whose classes are
            not those of the checkpoint; None keeps the checkpoint's classifier.
        input_size: image side, or (height, width), in pixels; None: the model's default.
        options: the recipe keys that `name` and `checkpoint` come from, for messages.

    Raises:
        RecipeError: if timm does not know the name, or the input size does not fit the model.
        CheckpointError: if the checkpoint is missing, damaged or of another architecture, if timm cannot
            make the model, or if values are not finite.
        UnsupportedModelError: if nestify cannot handle the model; see `describe_model`.
    """
    check_name(name, options[0])
    arguments = dict(kwargs or {})
    if input_size is not None:
        arguments = _with_input_size(name, arguments, input_size)
    file = None if checkpoint is None else read_weights(Path(checkpoint))
    notices = () if file is None else file.notices
    on_hub = name.startswith(_HUB_PREFIXES)
    uses_hub = on_hub or (file is None and pretrained and not name.startswith("local-dir:"))
    with hub_or_cache(uses_hub) as problems, _raise_as_checkpoint_error(name, options[1], problems):
        if file is None:
            model = _create_pretrained(name, pretrained, arguments, new_head_classes)
        else:
            model, notice = _create_from(name, file.tensors, arguments, new_head_classes, str(checkpoint))
            notices += notice
    _check_finite(model, name, options[1])
    model.eval()
    size = None if input_size is None else (_in_chans(model), *_height_and_width(input_size))
    return PretrainedModel(
        model=model,
        spec=describe_model(model, input_size=size),
        source_sha256=None if checkpoint is None else _sha256(Path(checkpoint)),
        new_head=new_head_classes is not None or (file is None and not pretrained),
        notices=notices,
    )


def check_name(name: str, option: str = "model.name") -> None:
    """Refuse a name that is not in timm's registry; names of a hub or a folder are not looked up.

    Args:
        name: see `load_pretrained`.
        option: the recipe key that it comes from, for messages.

    Raises:
        RecipeError: with similar names.
    """
    if name.startswith((*_HUB_PREFIXES, "local-dir:")):
        return
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"similar names are {', '.join(close)}" if close else "timm.list_models() lists all names"
        raise RecipeError(f"{option} = {name!r} is not a model of timm {timm.__version__}; {hint}")


def _check_finite(model: nn.Module, name: str, option: str) -> None:
    """Refuse tensors without values, and values that are not finite: a nested file cannot store them.

    Some models start with infinite bounds, which only a checkpoint replaces.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for key, tensor in model.state_dict().items():
        if tensor.is_meta:
            raise CheckpointError(f"{name}: {key} has no values; leave device out of model.kwargs")
        if tensor.is_floating_point() and not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"{name}: {key} has values that are not finite; set {option} to a file that has finite ones"
            )


def _height_and_width(size: int | tuple[int, int]) -> tuple[int, int]:
    return (size, size) if isinstance(size, int) else (size[0], size[1])


def _in_chans(model: nn.Module) -> int:
    return int(getattr(model, "in_chans", 3))


def _with_input_size(name: str, arguments: Kwargs, size: int | tuple[int, int]) -> Kwargs:
    """Add `img_size` to the arguments if the architecture fixes its input size when it is built."""
    refused = f"model.input_size = {size} does not fit {name}"
    with foreign_code(lambda reason: RecipeError(f"{refused}: {reason}")):
        resolved = resolve_model_input_args(name, {"img_size": list(_height_and_width(size))}, **arguments)
    return {key: value for key, value in resolved.items() if key not in ("model_name", "pretrained_cfg")}


def _create_pretrained(
    name: str, pretrained: bool, arguments: Kwargs, new_head_classes: int | None
) -> nn.Module:
    """Make a model with timm's own weights, or those of the folder or hub that its name gives.

    Raises:
        CheckpointError: if a part of the model other than a new classifier would stay random.
    """
    if new_head_classes is not None:
        arguments = {**arguments, "num_classes": new_head_classes}
    if arguments or ":" in name:  # the user's arguments, or those in a folder or on the hub
        random_state = torch.get_rng_state()
        with limited_build(arguments, BuildLimits.for_this_machine()), NoRandomFill():
            timm.create_model(name, pretrained=False, **arguments)
        torch.set_rng_state(random_state)
    with recorded_loads() as loads:
        model: nn.Module = timm.create_model(name, pretrained=pretrained, **arguments)
    new = classifier_modules(model) if new_head_classes is not None else ()
    # Some of the files that timm publishes contain more than its models use.
    if problems := difference_of_load(model, loads, new, unknown=name.startswith("local-dir:")):
        raise CheckpointError(f"the weights of {name} do not fit it with model.kwargs: {problems}")
    return model


def _create_from(
    name: str, weights: Weights, arguments: Kwargs, new_head_classes: int | None, source: str
) -> tuple[nn.Module, tuple[str, ...]]:
    """Make a model with a checkpoint's weights, also where the model is a part of another module.

    Returns:
        The model, and a sentence that names the part, if so.
    """
    random_state = torch.get_rng_state()
    try:
        return _create_with(name, weights, arguments, new_head_classes, source), ()
    except CheckpointError:
        cfg = _known_cfg(name)
        found = inside_wrapper(weights, as_tuple(cfg.first_conv if cfg else None))
        if found is None:
            raise
        inner, prefix = found
        torch.set_rng_state(random_state)
        try:
            model = _create_with(name, inner, arguments, new_head_classes, source)
        except CheckpointError:
            model = None
        if model is None:
            raise
    others = len(weights) - len(inner)
    rest = f", without {others} other tensor{'s' * (others > 1)}" if others else ""
    return model, (f"checkpoint {source}: using the weights under {prefix.rstrip('.')}{rest}",)


def _known_cfg(name: str) -> Any:
    return timm.models.get_pretrained_cfg(name.removeprefix("local-dir:"), allow_unregistered=True)


def _create_with(
    name: str, weights: Weights, arguments: Kwargs, new_head_classes: int | None, source: str
) -> nn.Module:
    """Make a model with the checkpoint's weights.

    They are loaded as they are if they fit; otherwise timm loads them, so that its key conversions apply.
    The classifier's are left out if the arguments ask for no classes, or for feature maps, which need no
    layers above the last one.

    Raises:
        CheckpointError: if they do not fit the model, apart from a new classifier.
    """
    probe_cfg = _known_cfg(name)
    names = as_tuple(probe_cfg.classifier if probe_cfg else None)
    has_maps = bool(arguments.get("features_only"))
    if has_maps or arguments.get("num_classes") == 0:
        weights = without_modules(weights, names)
    heads = [weights[f"{head}.weight"] for head in names if f"{head}.weight" in weights]
    classes = next((head.shape[0] for head in heads if head.dim() and head.numel()), None)
    num_classes = new_head_classes if new_head_classes is not None else classes
    if num_classes is not None:
        arguments = {**arguments, "num_classes": int(num_classes)}
    # timm makes a new head only if the class counts differ, but a new head may have the same count: use -1.
    declared = -1 if new_head_classes is not None else arguments.get("num_classes")
    # Without a source timm would prefer the weights of a hub or a folder that the name gives.
    overlay = {"num_classes": declared, "custom_load": False, "label_offset": 0, "source": ""}
    if declared is None:
        del overlay["num_classes"]
    random_state = torch.get_rng_state()
    elements = sum(tensor.numel() for tensor in weights.values())
    elements += LARGEST_HEAD * (new_head_classes or 0)
    with limited_build(arguments, BuildLimits.for_tensors(len(weights), elements, "checkpoint")):
        model: nn.Module = timm.create_model(
            name, pretrained=False, pretrained_cfg_overlay=overlay, **arguments
        )
    new = classifier_modules(model) if new_head_classes is not None else ()
    difference = difference_from(model.state_dict(), weights, new, unknown=not has_maps)
    if not difference:
        model.load_state_dict(without_modules(weights, new), strict=False)
        return model
    torch.set_rng_state(random_state)  # as if the model had been made once
    refused = f"checkpoint {source} does not fit {name}"
    remedy = ""
    if not difference_from(model.state_dict(), weights, (*new, *classifier_modules(model))):
        remedy = "; it lacks the classifier alone, which compress --new-head makes and trains"

    def describe(reason: str) -> CheckpointError:
        return CheckpointError(f"{refused}: {difference}{remedy}")

    with foreign_code(describe), recorded_loads() as loads:
        model = timm.create_model(
            name,
            pretrained=True,
            pretrained_cfg_overlay={**overlay, "state_dict": dict(weights)},
            **arguments,
        )
    cfg = model.pretrained_cfg
    assert isinstance(cfg, dict)
    cfg.pop("state_dict", None)  # otherwise every copy of the model would contain the checkpoint
    if problems := difference_of_load(model, loads, new):
        raise CheckpointError(f"{refused}: {problems}{remedy}")
    return model


@contextmanager
def _raise_as_checkpoint_error(name: str, option: str, problems: Sequence[str]) -> Iterator[None]:
    """Turn errors of timm and the hub into a CheckpointError with the remedy, and silence their warnings.

    Args:
        name: name of the model.
        option: the recipe key of the checkpoint.
        problems: why the hub cannot be used, if so.
    """

    def describe(reason: str) -> CheckpointError:
        if problems:
            return CheckpointError(
                f"{name} is not in the hub's cache on this machine, and {problems[0]}; connect to the "
                f"network, or set {option} to a file with the weights"
            )
        return CheckpointError(
            f"{name} cannot be created with its weights ({reason}); "
            f"set {option} to a file with the weights, or check model.kwargs"
        )

    logger = logging.getLogger("timm.models._builder")
    level = logger.level
    logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), foreign_code(describe):
            warnings.simplefilter("ignore")
            yield
    finally:
        logger.setLevel(level)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def save_plain(network: nn.Module, path: Path) -> None:
    """Write a dense model to a plain timm checkpoint (safetensors), atomically."""
    state = network.state_dict()
    tensors = {
        name: t.detach().cpu().clone(memory_format=torch.contiguous_format) for name, t in state.items()
    }
    with atomic_file(path) as file:
        file.write(save(tensors, metadata={"format": "pt"}))
