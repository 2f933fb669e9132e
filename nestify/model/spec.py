"""A timm model as data: how to build it again, how to preprocess images, which weights are maskable."""

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any

import timm
import torch
from timm.data import resolve_model_data_config
from timm.models import get_model_args
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from nestify.errors import UnsupportedModelError, foreign_code
from nestify.model.build_limits import BuildLimits, limited_build
from nestify.model.outputs import RETURNED, OutputKind, output_kind
from nestify.text import printable

Kwargs = dict[str, Any]


@dataclass(frozen=True)
class ModelSpec:
    """Everything that nestify needs to know about a timm model, except its tensors.

    Attributes:
        architecture: name in timm's registry, without a pretrained tag.
        kwargs: arguments, all plain values, with which `timm.create_model(architecture, **kwargs)` builds
            the model again.
        num_classes: number of outputs of the classifier; 0 for a backbone.
        preprocessing: timm's data configuration (input_size (C, H, W), mean, std, interpolation,
            crop_pct, crop_mode), and whether images are turned upright (exif_orientation, False if missing).
        classifier: module names of the classifiers, such as `("fc",)`.
        first: module names of the first convolutions.
        maskable: state-dict names of the weights that a weight schedule may mask, in module order.
        depthwise: names in `maskable` that belong to depthwise convolutions.
        aliases: state-dict name of a tied tensor -> the name under which the tensor is kept.
        channels_last: whether the feature maps of a backbone are (B, H, W, C) and not (B, C, H, W).
        reductions: pixels of the image per position of each feature map, in each direction; empty unless the
            model returns feature maps.
    """

    architecture: str
    kwargs: Kwargs
    num_classes: int
    preprocessing: dict[str, Any]
    classifier: tuple[str, ...]
    first: tuple[str, ...]
    maskable: tuple[str, ...]
    depthwise: frozenset[str]
    aliases: Mapping[str, str]
    channels_last: bool = False
    reductions: tuple[int, ...] = ()

    @property
    def output(self) -> OutputKind:
        """What the model returns."""
        return output_kind(self.kwargs, self.num_classes)

    @property
    def returned(self) -> str:
        """What the model returns, in words."""
        return RETURNED[self.output]

    @property
    def input_size(self) -> tuple[int, int, int]:
        """Size of one image: (channels, height, width), the latter two in pixels."""
        channels, height, width = self.preprocessing["input_size"]
        return int(channels), int(height), int(width)


def describe_model(model: nn.Module, input_size: tuple[int, int, int] | None = None) -> ModelSpec:
    """Describe a model that was made by `timm.create_model`.

    Args:
        model: a timm model: a classifier, or a backbone (`features_only=True` or `num_classes=0`).
        input_size: (channels, height, width) in pixels; None: the model's default.

    Raises:
        UnsupportedModelError: if the model was not made by timm, has auxiliary outputs or no weight to mask,
            or has an argument that is not a plain value.
    """
    cfg: dict[str, Any] = dict(getattr(model, "pretrained_cfg", None) or {})
    architecture = cfg.get("architecture")
    if not architecture:
        raise UnsupportedModelError(
            f"{type(model).__name__} was not made by timm.create_model, so it cannot be built again"
        )
    kwargs = _plain_kwargs(model)
    num_classes = 0 if returns_feature_maps(model) else int(getattr(model, "num_classes", 0))
    if getattr(model, "aux_logits", False):
        raise UnsupportedModelError(
            f"{architecture} with auxiliary classifiers has several outputs; build it with aux_logits = false"
        )
    maskable, depthwise = _maskable_weights(model)
    if not maskable:
        raise UnsupportedModelError(f"{architecture} has no convolution or linear weight to mask")
    args = {"input_size": input_size} if input_size else None
    is_backbone = output_kind(kwargs, num_classes) != "logits"
    layout = getattr(model, "output_fmt", None)
    return ModelSpec(
        architecture=architecture,
        kwargs=kwargs,
        num_classes=num_classes,
        preprocessing=resolve_model_data_config(model, args=args),
        classifier=_as_tuple(cfg.get("classifier")),
        first=_as_tuple(cfg.get("first_conv")),
        maskable=tuple(maskable),
        depthwise=frozenset(depthwise),
        aliases=tied_names(model),
        channels_last=is_backbone and getattr(layout, "value", layout) in ("NHWC", "NLC"),
        reductions=_reductions(model) if returns_feature_maps(model) else (),
    )


def _reductions(model: nn.Module) -> tuple[int, ...]:
    info: Any = model.feature_info
    return tuple(map(int, info.reduction()))


def returns_feature_maps(model: nn.Module) -> bool:
    """Whether timm made the model with `features_only`, so that it returns a list of feature maps."""
    return bool(get_model_args(model).get("features_only"))


class NoRandomFill(TorchFunctionMode):
    """A mode that turns random initialisation off: tensors are set to zero, or left as they are."""

    _FILLS = frozenset({Tensor.normal_, Tensor.uniform_, Tensor.erfinv_, nn.init.kaiming_uniform_})

    def __torch_function__(
        self, func: Callable[..., Any], types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        kwargs = kwargs or {}
        if func is Tensor.normal_:  # torch redraws a truncated normal until all values are within bounds
            return (args[0] if args else kwargs["tensor"]).zero_()
        if func in self._FILLS:
            return args[0] if args else kwargs["tensor"]
        return func(*args, **kwargs)


def build_model(
    architecture: str, kwargs: Kwargs, *, random_weights: bool = True, limits: BuildLimits | None = None
) -> nn.Module:
    """Build a timm model without pretrained weights; never uses the internet.

    Args:
        architecture: name in timm's registry.
        kwargs: arguments of `timm.create_model`.
        random_weights: whether to draw random weights, as timm does. With False the weights are not
            initialised, which takes a fraction of the time; the caller must load all of them.
        limits: what the model may take while it is built; None if the arguments are trusted.

    Raises:
        UnsupportedModelError: if timm has no such architecture or refuses the arguments, or the model takes
            more than its limits.
    """
    if not timm.is_model(architecture):
        raise UnsupportedModelError(
            f"{architecture!r} is not in the registry of timm {timm.__version__}; install a timm that has it"
        )
    refused = f"timm cannot build {architecture} with {printable(str(kwargs))}"
    fill = nullcontext() if random_weights else NoRandomFill()
    limit = nullcontext() if limits is None else limited_build(kwargs, limits)
    with foreign_code(lambda reason: UnsupportedModelError(f"{refused}: {reason}")), limit, fill:
        model: nn.Module = timm.create_model(architecture, pretrained=False, **kwargs)
    return model


def fill_model(model: nn.Module, tensors: Mapping[str, Tensor], architecture: str) -> None:
    """Load all tensors of a model.

    Args:
        model: the model, changed in place.
        tensors: state-dict name -> tensor.
        architecture: the model's name, for messages.

    Raises:
        ValueError: if a name is missing or unknown, or a shape differs.
    """
    try:
        missing, unexpected = model.load_state_dict(tensors, strict=False)
    except RuntimeError as error:  # a shape that differs
        raise ValueError(str(error).splitlines()[-1].strip()) from error
    if missing or unexpected:
        problem = f"lacks {missing[0]!r}" if missing else f"has the unknown tensor {unexpected[0]!r}"
        raise ValueError(f"the file {problem}, so its tensors do not fit {architecture}")


def tied_names(model: nn.Module) -> dict[str, str]:
    """Return the state-dict names that share a tensor with an earlier name: tied name -> first name."""
    first: dict[int, str] = {}
    tied: dict[str, str] = {}
    for name, tensor in model.state_dict(keep_vars=True).items():
        kept = first.setdefault(id(tensor), name)
        if kept != name:
            tied[name] = kept
    return tied


def _maskable_weights(model: nn.Module) -> tuple[list[str], list[str]]:
    """Return the names of the maskable weights, and of the depthwise ones among them; a tied weight once.

    A weight is maskable if it multiplies its input. The test is two or more dimensions and `weight` in the
    name, which covers every Conv and Linear, timm's subclasses of them, and layers with raw parameters
    (`weight_ih_l0` of an LSTM, `in_proj_weight` of an attention). Embeddings are excluded: they are looked
    up, not multiplied. Position tables, tokens and scales have other names.
    """
    maskable: list[str] = []
    depthwise: list[str] = []
    seen: set[int] = set()
    for prefix, module in model.named_modules():
        if isinstance(module, nn.Embedding | nn.EmbeddingBag):
            continue
        for local, parameter in module.named_parameters(recurse=False):
            is_weight = "weight" in local and parameter.ndim >= 2 and parameter.is_floating_point()
            if not is_weight or id(parameter) in seen:
                continue
            seen.add(id(parameter))
            name = f"{prefix}.{local}" if prefix else local
            maskable.append(name)
            groups = getattr(module, "groups", 1)
            if isinstance(groups, int) and groups > 1 and groups == getattr(module, "in_channels", 0):
                depthwise.append(name)
    return maskable, depthwise


def _plain_kwargs(model: nn.Module) -> Kwargs:
    """Return the arguments that build the model again, as timm recorded them, with class count and size."""
    return {key: _plain(value) for key, value in get_model_args(model).items()}


def _plain(value: Any) -> Any:
    if isinstance(value, tuple | list):
        return [_plain(item) for item in value]
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise UnsupportedModelError(
        f"model argument {value!r} is a {type(value).__name__}; a nested file can hold plain values only, "
        "so give numbers, texts, booleans or lists of these (model.kwargs)"
    )


def _as_tuple(value: str | tuple[str, ...] | list[str] | None) -> tuple[str, ...]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else tuple(value)


def state_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Return parameters and persistent buffers by state-dict name, each tied tensor once, not detached."""
    aliases = tied_names(model)
    return {name: t for name, t in model.state_dict(keep_vars=True).items() if name not in aliases}


def synthetic_input(input_size: tuple[int, int, int], batch: int = 1) -> Tensor:
    """Make the fixed input of logit fingerprints: a sine of the position, the same on every machine.

    Args:
        input_size: (channels, height, width) in pixels.
        batch: number of images.

    Returns:
        float32 of shape (batch, channels, height, width), values in [-1, 1].
    """
    channels, height, width = input_size
    phase = torch.arange(batch * channels, dtype=torch.float64).view(batch, channels, 1, 1)
    rows = torch.arange(height, dtype=torch.float64).view(1, 1, height, 1)
    cols = torch.arange(width, dtype=torch.float64).view(1, 1, 1, width)
    wave = torch.sin(0.11 * rows + 0.23 * cols + 1.7 * phase) * torch.cos(0.013 * rows * cols / width + phase)
    return wave.float()


def owner(network: nn.Module, name: str) -> tuple[nn.Module, str]:
    """Return the module that holds a tensor, and the tensor's name in that module.

    Args:
        network: the network that contains the module.
        name: state-dict name of the tensor.
    """
    prefix, _, local = name.rpartition(".")
    return network.get_submodule(prefix), local


def tied_across_modules(network: nn.Module) -> dict[str, str]:
    """Return the tied names that are held by further modules, one per module: tied name -> kept name."""
    tied: dict[str, str] = {}
    seen: set[tuple[int, str]] = set()
    for alias, name in tied_names(network).items():
        seen.add((id(owner(network, name)[0]), name.rpartition(".")[2]))
        holder = (id(owner(network, alias)[0]), alias.rpartition(".")[2])
        if holder not in seen:
            tied[alias] = name
            seen.add(holder)
    return tied
