"""The manifest: everything that a nested file says about itself, as one JSON document. Without torch."""

from math import prod
from operator import not_
from typing import Annotated, Literal, Self, TypeVar

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, JsonValue, model_validator

from nestify.model.outputs import OutputKind, output_kind
from nestify.recipe.levels import MAX_LEVELS

SCHEMA_VERSION = 1

Coding = Literal["all", "bits", "elias-fano", "none"]
"""How a parameter's entry positions in one chunk are stored (see `entry_codec`): `all` remaining
positions enter, `none` does, or the two codings."""

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is refused at its first wrong item; pydantic would collect all errors."""

Scalar = bool | int | float | str | None
Kwarg = Scalar | Many[Scalar] | Many[Many[Scalar]]
Size = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Label = Annotated[str, Field(pattern=r"^\P{C}*$")]
"""A text that may be printed: control characters, which would control a terminal, are refused."""
BlockSide = Annotated[int, Field(ge=1, le=9999)]
FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""JSON has lists where Python has tuples."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Run = Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_LEVELS + 1)], Side], FromList]
"""A level, and the number of adjacent indices of a dimension for which it is the lowest level."""

# Fields that the first files of format 1 did not have are left out if they have their default.
WholeShare = Annotated[Share, Field(exclude_if=lambda share: share == 1)]
ManyOrNone = Annotated[Many[Item], Field(exclude_if=not_)]
_UNLESS_NONE = Field(exclude_if=lambda value: value is None)
OptionalPercent = Annotated[Percent | None, _UNLESS_NONE]
OptionalCosine = Annotated[Annotated[float, Field(ge=-1, le=1)] | None, _UNLESS_NONE]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


MAX_IMAGE = 2**25
"""Values of one image of the synthetic input: 3 channels of 3344 x 3344 pixels."""

MAX_RESIZED = 2**27
"""Values of an image before it is cropped."""


def _bounded_image(size: tuple[int, int, int]) -> tuple[int, int, int]:
    if prod(size) > MAX_IMAGE:
        raise ValueError(f"an image has more than {MAX_IMAGE:,} values")
    return size


class Preprocessing(_Part):
    """How an image is prepared for evaluation: arguments of timm's `create_transform`, and orientation.

    `input_size` is (channels, height, width); `mean` and `std` are per channel, for pixels in [0, 1];
    `exif_orientation` says whether images are first turned upright as their EXIF orientation says.
    """

    input_size: Annotated[tuple[Side, Side, Side], FromList, AfterValidator(_bounded_image)]
    mean: Annotated[Many[float], Field(min_length=1)]
    std: Annotated[Many[Annotated[float, Field(ge=1e-6)]], Field(min_length=1)]
    interpolation: str
    crop_pct: Annotated[float, Field(ge=0.01, le=100)]
    crop_mode: str
    exif_orientation: Annotated[bool, Field(exclude_if=not_)] = False

    @model_validator(mode="after")
    def _is_bounded(self) -> Self:
        """Check the size to which an image is resized before it is cropped."""
        if prod(self.input_size) / self.crop_pct**2 > MAX_RESIZED:
            raise ValueError(
                f"crop_pct {self.crop_pct:g} resizes an image to more than {MAX_RESIZED:,} values"
            )
        return self


class ModelEntry(_Part):
    """The timm model that every level is built from: `timm.create_model(architecture, **kwargs)`.

    `num_classes` is 0 for a backbone. `channels_last` says whether its feature maps are (B, H, W, C), and
    `feature_reductions` has the pixels of the image per position of each feature map, in each direction;
    `keep_outputs` whether the outputs of all its levels have all channels, as `schedule.keep_outputs` asked.
    """

    architecture: str
    kwargs: dict[str, Kwarg]
    num_classes: Count
    preprocessing: Preprocessing
    class_names: Many[str] | None
    channels_last: Annotated[bool, Field(exclude_if=not_)] = False
    feature_reductions: ManyOrNone[Side] = []
    keep_outputs: Annotated[bool, Field(exclude_if=not_)] = False

    @property
    def output(self) -> OutputKind:
        """What the model returns."""
        return output_kind(self.kwargs, self.num_classes)


class ClassMap(_Part):
    """Coarser classes than the model's own.

    Attributes:
        name: name of this set of classes.
        class_names: names of the coarse classes, by index.
        parents: (num_classes,), the coarse class of each of the model's classes.
    """

    name: Annotated[Label, Field(min_length=1)]
    class_names: Annotated[Many[str], Field(min_length=1)]
    parents: Many[Count]


class HeldOut(_Part):
    """How the validation images were held out of the training images.

    Attributes:
        share: share of each class.
        seed: seed of the choice.
        split: name of the split that they were held out of.
        images: number of images of this split, held-out ones included.
        sha256: SHA-256 of the names and labels of these images, on which the choice depends too.
        unlabelled: whether the choice is one of all images, without regard to their classes, whose labels
            then count as 0 in the SHA-256.
    """

    share: Annotated[float, Field(gt=0, lt=1)]
    seed: Annotated[int, Field(ge=0, lt=2**32)]
    split: Annotated[str, Field(min_length=1)]
    images: Count
    sha256: Sha256
    unlabelled: Annotated[bool, Field(exclude_if=not_)] = False


class ParameterEntry(_Part):
    """Layout of one shared tensor.

    Attributes:
        name: timm's state-dict name.
        shape: shape of the dense tensor.
        dtype: safetensors' name of the stored values' type, such as `F32`.
        maskable: whether it has entry levels; without them, the whole tensor enters at level 1.
        unit: (rows, cols) of the blocks of output x input channels that enter together.
        coding: coding of the positions per level, core first; empty if not maskable.
        entering: number of units that enter per level, core first; empty if not maskable.
        aliases: other state-dict names of the same tensor (tied weights).
        axes: runs of every dimension, in ascending order of its indices, if not all indices of a maskable
            tensor belong to level 1; no runs for a dimension that level 1 has completely (see `axes`).
    """

    name: str
    shape: Many[Size]
    dtype: str
    maskable: bool
    unit: Annotated[tuple[BlockSide, BlockSide], FromList] = (1, 1)
    coding: Many[Coding] = []
    entering: Many[Count] = []
    aliases: Many[str] = []
    axes: ManyOrNone[Many[Run]] = []


class LayerEntry(_Part):
    """One maskable tensor at one level, for the per-layer table."""

    name: Label
    weights: Count
    kept: Count
    dense_macs: Count | None
    effective_macs: Count | None


class Metrics(_Part):
    """Values that were measured or counted for one level; None if not measured.

    Attributes:
        parameters: number of parameters of the plain model at this level (dense, private tensors included).
        nonzero_parameters: number of parameters that are not masked out.
        dense_macs: multiply-accumulates per image that dense kernels execute.
        effective_macs: multiply-accumulates per image that a kernel would execute if it skipped every
            masked-out weight at no cost; theory, not time.
        uncounted: operators that the MAC counter does not know, with their number of calls; empty if the
            counts are complete.
        top1: top-1 accuracy in percent on the validation images.
        top5: top-5 accuracy in percent on the validation images.
        loss: mean cross-entropy on the validation images.
        images: number of validation images.
        top1_before: top-1 of the same level before training, with recalibrated batch norm.
        agreement: share in percent of the validation images for which the level predicts the same class as
            the original model; only of levels learned without labels, which have no accuracy.
        cosine: mean cosine similarity of the level's logits and those of the original model; of a backbone,
            which has no agreement, that of its embedding or its feature maps.
        agreement_before: agreement of the same level before training.
        cosine_before: cosine similarity of the same level before training, of a backbone.
        map: mean average precision in percent on the validation images, which have several labels each.
        map_before: mean average precision of the same level before training.
    """

    parameters: Count
    nonzero_parameters: Count
    dense_macs: Count | None
    effective_macs: Count | None
    uncounted: dict[Label, int] = {}
    top1: Percent | None = None
    top5: Percent | None = None
    loss: float | None = None
    images: Count | None = None
    top1_before: Percent | None = None
    agreement: OptionalPercent = None
    cosine: OptionalCosine = None
    agreement_before: OptionalPercent = None
    cosine_before: OptionalCosine = None
    map: OptionalPercent = None
    map_before: OptionalPercent = None


class Extension(_Part):
    """The run that added levels to a file; the rest of the manifest is about the run before.

    Attributes:
        recipe: the recipe of the run, with all levels.
        original: validation accuracy of the original model in this run, as in the manifest.
        versions: versions of nestify, torch and timm.
        source_sha256: SHA-256 of the checkpoint that the new levels started from; None without a file.
    """

    recipe: dict[str, JsonValue]
    original: dict[str, float]
    versions: dict[Label, Label]
    source_sha256: Sha256 | None


class LevelDescription(_Part):
    """Description of one level for the writer: what was requested, reached and measured.

    Attributes:
        sparsity: requested share of weights that are zero.
        width: requested share of channels.
        depth: requested share of blocks.
        skipped: names of the blocks that the level skips, a subset of those of the level below.
        fingerprint: logits of the fixed synthetic input, one per class of the level. For a backbone the
            embedding, or the mean of each channel of each feature map.
        classes: name of the coarser classes that it predicts; empty for the model's own.
        temperature: its confidence is softmax(logits / temperature); None if not fitted.
        consensus: weights of the log-probabilities of this level and those below, core first, in their
            consensus; empty if not fitted.
        extension: the run that added this level and the levels above it, up to the next one with such a
            record; None for the levels of the first run, and for further levels of the same run.
        feature_channels: channels of each feature map of a backbone, or the length of its embedding; empty
            for a classifier.
    """

    name: str
    sparsity: Share
    achieved_sparsity: Share
    pattern: Annotated[str, Field(pattern="^(unstructured|[0-9]{1,4}[:x][0-9]{1,4})$")]
    fingerprint: Many[float]
    metrics: Metrics
    layers: Many[LayerEntry]
    width: WholeShare = 1.0
    depth: WholeShare = 1.0
    skipped: ManyOrNone[str] = []
    classes: Annotated[str, Field(exclude_if=not_)] = ""
    temperature: Annotated[float | None, Field(gt=0, exclude_if=lambda value: value is None)] = None
    consensus: ManyOrNone[float] = []
    extension: Annotated[Extension | None, Field(exclude_if=lambda value: value is None)] = None
    feature_channels: ManyOrNone[Side] = []


class LevelEntry(LevelDescription):
    """One level in a file: its description, where its bytes are, and how to check them.

    Attributes:
        private: state-dict names of the level's private tensors.
        data_bytes: number of bytes of the level's own chunk.
        sha256: SHA-256 of the level's own chunk, in hexadecimal.
    """

    private: Many[str]
    data_bytes: Size
    sha256: Sha256


class _Run(_Part):
    """The fields that a description and a manifest share: the model, and the run that made the file."""

    model: ModelEntry
    schedule: Literal["weight", "channel", "layer", "combined"]
    original: dict[str, float]
    """Validation accuracy of the original model: `top1`, `top5`, `loss`, or `map`, `loss`; or empty."""
    recipe: dict[str, JsonValue]
    seed: int
    versions: dict[Label, Label]
    source_sha256: Sha256 | None
    """SHA-256 of the checkpoint file that the run started from; None if there was no file."""
    hierarchy: ManyOrNone[ClassMap] = []
    """Coarser classes that levels predict; if there are any, every level has its own classifier."""
    held_out: Annotated[HeldOut | None, Field(exclude_if=lambda value: value is None)] = None
    """How the validation images were held out; None if they are a split of their own."""


class Description(_Run):
    """The part of the manifest that the writer cannot derive from the tensors."""

    levels: Many[LevelDescription]


class Manifest(_Run):
    """The complete manifest; `levels` are in order from the core level to the full level."""

    schema_version: Literal[1] = 1
    levels: Annotated[Many[LevelEntry], Field(min_length=1, max_length=MAX_LEVELS)]
    parameters: Many[ParameterEntry]

    def class_map(self, level: int) -> ClassMap | None:
        """Return the coarser classes that a level predicts, given by its number; None for the model's own."""
        name = self.levels[level - 1].classes
        return next((classes for classes in self.hierarchy if classes.name == name), None)

    def num_classes(self, level: int) -> int:
        """Return the number of classes that a level predicts."""
        classes = self.class_map(level)
        return self.model.num_classes if classes is None else len(classes.class_names)

    def class_names(self, level: int) -> list[str] | None:
        """Return the names of the classes that a level predicts, by index; None if the file has none."""
        classes = self.class_map(level)
        return self.model.class_names if classes is None else classes.class_names
