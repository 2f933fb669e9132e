"""The pretrained model that a run starts from: a timm model with timm's weights or a local checkpoint."""

import hashlib
import logging
import re
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

import timm
import torch
from safetensors.torch import save
from timm.models import load_state_dict, resolve_model_input_args
from torch import Tensor, nn

from nestify.errors import CheckpointError, RecipeError, foreign_code
from nestify.files import atomic_file
from nestify.model.spec import Kwargs, ModelSpec, describe_model

Weights = Mapping[str, Tensor]


@dataclass(frozen=True)
class PretrainedModel:
    """A model with its weights, its description, and the origin of the weights.

    Attributes:
        model: the timm model, in eval mode, on the CPU.
        spec: its description.
        source_sha256: hexadecimal SHA-256 of the checkpoint file; None without a file.
        new_head: whether the classifier is newly initialised, so that it has yet to learn its classes.
    """

    model: nn.Module
    spec: ModelSpec
    source_sha256: str | None
    new_head: bool


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
    _check_name(name, options[0])
    arguments = dict(kwargs or {})
    if input_size is not None:
        arguments = _with_input_size(name, arguments, input_size)
    weights: Weights | None = None
    if checkpoint is not None:
        weights = _read_checkpoint(Path(checkpoint))
    with _raise_as_checkpoint_error(name, options[1]):
        if weights is None:
            classes = {} if new_head_classes is None else {"num_classes": new_head_classes}
            model = timm.create_model(name, pretrained=pretrained, **{**arguments, **classes})
        else:
            model = _create_with(name, weights, arguments, new_head_classes, str(checkpoint))
    _check_finite(model, name, options[1])
    model.eval()
    size = None if input_size is None else (_in_chans(model), *_height_and_width(input_size))
    return PretrainedModel(
        model=model,
        spec=describe_model(model, input_size=size),
        source_sha256=None if checkpoint is None else _sha256(Path(checkpoint)),
        new_head=new_head_classes is not None or (weights is None and not pretrained),
    )


def _check_name(name: str, option: str) -> None:
    if name.startswith(("hf-hub:", "hf_hub:", "local-dir:")):
        return
    architecture = name.partition(".")[0]
    if not timm.is_model(architecture):
        close = get_close_matches(architecture, timm.list_models(), n=3)
        hint = f"similar names are {', '.join(close)}" if close else "timm.list_models() lists all names"
        raise RecipeError(f"{option} = {name!r} is not a model of timm {timm.__version__}; {hint}")


def _check_finite(model: nn.Module, name: str, option: str) -> None:
    """Refuse values that are not finite, as a nested file cannot store them.

    Some models start with infinite bounds, which only a checkpoint replaces.

    Raises:
        CheckpointError: naming the first such tensor.
    """
    for key, tensor in model.state_dict().items():
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


def _read_checkpoint(path: Path) -> dict[str, Tensor]:
    """Read the state dict of a checkpoint; never runs code from it."""
    if not path.is_file():
        raise CheckpointError(
            f"checkpoint {path} is not a file; give the path of a .safetensors or .pth file"
        )
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns about the legacy formats that it still reads
            state: Weights = load_state_dict(str(path), weights_only=True)
    except Exception as error:  # foreign bytes can make the unpickler raise anything
        raise CheckpointError(
            f"checkpoint {path} cannot be read ({_reason(error)}); it may be truncated, or contain more than "
            "weights: copy it again, or save only its state_dict"
        ) from error
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor)}
    if not tensors:
        raise CheckpointError(f"checkpoint {path} contains no tensors; give the state dict of a timm model")
    for key, tensor in tensors.items():
        if not torch.isfinite(tensor).all():
            raise CheckpointError(
                f"checkpoint {path}: {key} has values that are not finite; give a checkpoint of a run that "
                "did not diverge"
            )
    return tensors


def _reason(error: Exception) -> str:
    """Return the first sentence of an exception, or its type if it has no message."""
    text = str(error).strip()
    return re.split(r"\. |\n", text)[0].rstrip(".") if " " in text else type(error).__name__


def _create_with(
    name: str, weights: Weights, arguments: Kwargs, new_head_classes: int | None, source: str
) -> nn.Module:
    """Make a model with the checkpoint's weights; timm loads them, so its key conversions apply."""
    probe_cfg = timm.models.get_pretrained_cfg(name.removeprefix("local-dir:"), allow_unregistered=True)
    classifier = (probe_cfg.classifier if probe_cfg else None) or ()
    names = (classifier,) if isinstance(classifier, str) else tuple(classifier)
    classes = next((weights[f"{n}.weight"].shape[0] for n in names if f"{n}.weight" in weights), None)
    num_classes = new_head_classes if new_head_classes is not None else classes
    if num_classes is not None:
        arguments = {**arguments, "num_classes": int(num_classes)}
    # timm makes a new head only if the class counts differ, but a new head may have the same count: use -1.
    declared = -1 if new_head_classes is not None else arguments.get("num_classes")
    overlay = {"state_dict": dict(weights), "num_classes": declared, "custom_load": False, "label_offset": 0}
    if declared is None:
        del overlay["num_classes"]
    try:
        model: nn.Module = timm.create_model(
            name, pretrained=True, pretrained_cfg_overlay=overlay, **arguments
        )
    except (RuntimeError, KeyError) as error:
        difference = _difference(name, weights, arguments)
        if not difference:
            raise
        raise CheckpointError(f"checkpoint {source} does not fit {name}: {difference}") from error
    cfg = model.pretrained_cfg
    assert isinstance(cfg, dict)
    cfg.pop("state_dict", None)  # otherwise every copy of the model would contain the checkpoint
    if new_head_classes is not None:
        _check_only_head_is_new(model, weights, names, f"checkpoint {source} does not fit {name}")
    return model


def _check_only_head_is_new(model: nn.Module, weights: Weights, heads: tuple[str, ...], prefix: str) -> None:
    """Refuse a checkpoint that lacks more than half of a model's keys, apart from the head's.

    With a new head timm ignores missing keys, so a checkpoint of another architecture would be accepted and
    the network would be random.

    Raises:
        CheckpointError: naming the missing keys.
    """
    wanted = {
        key: tensor
        for key, tensor in model.state_dict().items()
        if not any(key.startswith(f"{head}.") for head in heads)
    }
    absent = [key for key in wanted if key not in weights]
    if len(absent) > len(wanted) // 2:
        raise CheckpointError(f"{prefix}: {_summarise('keys are missing', absent)}")


def _difference(name: str, weights: Weights, arguments: Kwargs) -> str:
    """Describe which keys of a checkpoint do not fit the architecture; empty if all fit."""
    expected = timm.create_model(name, pretrained=False, **arguments).state_dict()
    missing = [key for key in expected if key not in weights]
    extra = [key for key in weights if key not in expected]
    shapes = [
        f"{key} is {tuple(weights[key].shape)}, not {tuple(tensor.shape)}"
        for key, tensor in expected.items()
        if key in weights and weights[key].shape != tensor.shape
    ]
    parts = [
        _summarise("keys are missing", missing),
        _summarise("keys are unknown", extra),
        _summarise("shapes differ", shapes),
    ]
    return "; ".join(part for part in parts if part)


def _summarise(problem: str, items: list[str]) -> str:
    """Return the number of items, the problem and the first items in one phrase; empty for no items."""
    if not items:
        return ""
    more = ", ..." if len(items) > 3 else ""
    return f"{len(items)} {problem} ({', '.join(items[:3])}{more})"


@contextmanager
def _raise_as_checkpoint_error(name: str, option: str) -> Iterator[None]:
    """Turn errors of timm and the hub into a CheckpointError with the remedy, and silence their warnings."""

    def describe(reason: str) -> CheckpointError:
        return CheckpointError(
            f"{name} cannot be created with its weights ({reason.rstrip('.')}); "
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
