"""The manifest: everything a nested file says about itself, as one JSON document. No torch here."""

from operator import not_
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, JsonValue

from nestify.recipe.levels import MAX_LEVELS

SCHEMA_VERSION = 1

Coding = Literal["all", "bits", "elias-fano", "none"]
"""How a parameter's entry positions in one chunk are stored (see `entry_codec`): `all` remaining
positions enter, `none` does, or the two codings."""

Item = TypeVar("Item")
Many = Annotated[list[Item], Field(fail_fast=True)]
"""A list that is refused at its first wrong item: pydantic would collect all, hundreds of bytes for each."""

Scalar = bool | int | float | str | None
Kwarg = Scalar | Many[Scalar] | Many[Many[Scalar]]
Size = Annotated[int, Field(ge=0)]
Count = Annotated[int, Field(ge=0)]
Side = Annotated[int, Field(ge=1)]
Share = Annotated[float, Field(ge=0, le=1)]
Percent = Annotated[float, Field(ge=0, le=100)]
Label = Annotated[str, Field(pattern=r"^\P{C}*$")]
"""A text that is printed: without control characters, which would steer a terminal."""
BlockSide = Annotated[int, Field(ge=1, le=9999)]
FromList = BeforeValidator(lambda value: tuple(value) if isinstance(value, list) else value)
"""JSON has lists where Python has tuples."""
Sha256 = Annotated[str, Field(pattern="^[0-9a-f]{64}$")]
Run = Annotated[tuple[Annotated[int, Field(ge=1, le=MAX_LEVELS + 1)], Side], FromList]
"""A level, and how many adjacent indices of a dimension it is the lowest to have."""

# Fields that the first files of format 1 did not have are left out where they say nothing.
WholeShare = Annotated[Share, Field(exclude_if=lambda share: share == 1)]
ManyOrNone = Annotated[Many[Item], Field(exclude_if=not_)]


class _Part(BaseModel):
    model_config = ConfigDict(extra="forbid", frozen=True, allow_inf_nan=False, protected_namespaces=())


class Preprocessing(_Part):
    """What timm's `create_transform` needs to prepare an image for evaluation.

    `input_size` is (channels, height, width); `mean` and `std` are per channel, for pixels in [0, 1].
    """

    input_size: Annotated[tuple[Side, Side, Side], FromList]
    mean: Annotated[Many[float], Field(min_length=1)]
    std: Annotated[Many[Annotated[float, Field(ge=1e-6)]], Field(min_length=1)]
    interpolation: str
    crop_pct: Annotated[float, Field(ge=0.01, le=100)]
    crop_mode: str


class ModelEntry(_Part):
    """The timm model that every level is built from: `timm.create_model(architecture, **kwargs)`."""

    architecture: str
    kwargs: dict[str, Kwarg]
    num_classes: Annotated[int, Field(ge=1)]
    preprocessing: Preprocessing
    class_names: Many[str] | None


class ClassMap(_Part):
    """Coarser classes than the model's own.

    Attributes:
        name: of the set.
        class_names: by index.
        parents: the coarse class of each of the model's classes, (num_classes,).
    """

    name: Annotated[Label, Field(min_length=1)]
    class_names: Annotated[Many[str], Field(min_length=1)]
    parents: Many[Count]


class ParameterEntry(_Part):
    """Layout of one shared tensor.

    Attributes:
        name: timm's state-dict name.
        shape: of the dense tensor.
        dtype: safetensors' name of the stored values' type, such as `F32`.
        maskable: whether it has entry levels; a tensor that has none enters at level 1 whole.
        unit: (rows, cols) of the blocks of output x input channels that enter together.
        coding: one per level, core first, of a maskable tensor; empty otherwise.
        entering: likewise, how many units enter at the level.
        aliases: other state-dict names of the same tensor (tied weights).
        axes: of a maskable tensor whose indices not all belong to level 1, the runs of every dimension,
            in ascending order of its indices; no runs for a dimension that level 1 has whole (see `axes`).
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
    """What was measured or counted for one level. None means: not measured.

    Attributes:
        parameters: elements of the plain model at this level (dense, private tensors included).
        nonzero_parameters: those that are not masked out.
        dense_macs: multiply-accumulates per image that dense kernels execute.
        effective_macs: multiply-accumulates per image that a kernel would execute if it skipped every
            masked-out weight at no cost; theory, not time.
        uncounted: operators that the MAC counter does not know, with how often they ran; empty when
            the counts are whole.
        top1, top5: accuracy in percent on `images` validation images; `loss` is mean cross-entropy.
        top1_before: top-1 of the same level before training, its batch norm recalibrated.
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


class LevelDescription(_Part):
    """What the writer is told of one level: what was asked, what was reached, what was measured.

    Attributes:
        sparsity, width, depth: shares that were asked for: of weights that are zero, of channels and of
            layers that the level has.
        skipped: names of the modules that the level leaves out; each level skips no others than the one
            below.
        fingerprint: logits of the fixed synthetic input, one per class of the level.
        classes: name of the coarser classes that it tells; empty: the model's own.
        temperature: softmax(logits / temperature) is how sure it is; None where that was not fitted.
        consensus: weights of the log-probabilities of this level and those below, core first, in their
            combined answer; empty where they were not fitted.
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


class LevelEntry(LevelDescription):
    """One level in a file: its description, where its bytes are, and how to check them.

    Attributes:
        private: state-dict names of the level's private tensors.
        data_bytes: bytes of the level's own chunk.
        sha256: of the level's own chunk, hexadecimal.
    """

    private: Many[str]
    data_bytes: Size
    sha256: Sha256


class _Run(_Part):
    """What a description and a manifest share: the model and the run that made the file."""

    model: ModelEntry
    schedule: Literal["weight", "channel", "layer", "combined"]
    original: dict[str, float]
    """Validation accuracy of the unchanged pretrained model: `top1`, `top5`, `loss`; empty: not measured."""
    recipe: dict[str, JsonValue]
    seed: int
    versions: dict[Label, Label]
    source_sha256: Sha256 | None
    """SHA-256 of the checkpoint file that the run started from; None when there was no file."""
    hierarchy: ManyOrNone[ClassMap] = []
    """Coarser classes that levels tell. If there are any, every level has a classifier of its own."""


class Description(_Run):
    """What the writer is told: all of the manifest that does not follow from the tensors."""

    levels: Many[LevelDescription]


class Manifest(_Run):
    """The whole document. `levels` run from the core level to the full level."""

    schema_version: Literal[1] = 1
    levels: Annotated[Many[LevelEntry], Field(min_length=1, max_length=MAX_LEVELS)]
    parameters: Many[ParameterEntry]

    def class_map(self, level: int) -> ClassMap | None:
        """The coarser classes that a level tells, given by its number; None: the model's own."""
        name = self.levels[level - 1].classes
        return next((classes for classes in self.hierarchy if classes.name == name), None)

    def num_classes(self, level: int) -> int:
        """How many classes a level tells."""
        classes = self.class_map(level)
        return self.model.num_classes if classes is None else len(classes.class_names)

    def class_names(self, level: int) -> list[str] | None:
        """Names of the classes that a level tells, by index; None where the file has none."""
        classes = self.class_map(level)
        return self.model.class_names if classes is None else classes.class_names
