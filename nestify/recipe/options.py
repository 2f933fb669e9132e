"""The sections of a recipe: every option with its type, range, default, unit and flag.

A description is a noun phrase: the option's help text, and the hint in errors about it. A validator
here raises ValueError with a predicate (`is not ...`), which follows `key = value` in the error. A field with
a `Flag` is a flag of `nestify compress`. Does not import torch.
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Discriminator,
    Field,
    JsonValue,
    Tag,
    ValidationInfo,
    field_validator,
)

from nestify.recipe.flags import Flag, Panel

AmpDtype = Literal["auto", "bfloat16", "float16"]
BatchNormMode = Literal["private", "recalibrate"]
Dtype = Literal["float32", "float16", "bfloat16"]
Log = Literal["csv", "tensorboard", "wandb", "mlflow"]
ConsensusKind = Literal["mean", "learned"]
"""How several levels predict together: by the mean of their probabilities, or with fitted weights."""
Loss = Literal["ce", "bce", "poly", "asl"]
OnBadImage = Literal["refuse", "skip"]

CHECKPOINT_ENDINGS = (".safetensors", ".pth", ".pth.tar", ".pt", ".ckpt", ".bin")
TEACHERS = ("original", "self", "both", "none")
"""Teachers that come from the run itself; anything else is the name of a timm model."""

OWN_LOOP = "own training loop"
"""What `data.path` is in files that a loop of the user's own has made."""

USUAL_HOLDOUT = 0.1
"""Share of the training images to validate on where the data has no validation split."""

DEFAULT_LR = 0.01
"""Learning rate, unless the recipe says otherwise or asks for a search that finds none."""

ADAPTIVE_LR = 0.0005
"""Learning rate in place of that for optimizers whose steps hardly depend on the size of the gradient."""

LEAST_FINETUNE_EPOCHS = 5
"""Passes over the training images that a new classifier is trained for, unless the recipe says otherwise."""

AUTO, NUMBER, USUAL = "auto", "number", "usual"

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]
OpenShare = Annotated[float, Field(gt=0, lt=1)]
PositiveInt = Annotated[int, Field(ge=1)]
LearningRate = Annotated[
    Annotated[float, Field(gt=0), Tag(NUMBER)]
    | Annotated[Literal["auto"], Tag(AUTO)]
    | Annotated[None, Tag(USUAL)],
    # so that errors are about one of them
    Discriminator(lambda value: AUTO if value == AUTO else USUAL if value is None else NUMBER),
]
"""A learning rate, or "auto": a short search before the training finds it."""


def in_schema(**keywords: JsonValue) -> Any:
    """Return metadata that adds keywords to a field's JSON Schema, for what its validator checks.

    Args:
        keywords: keywords of JSON Schema, such as `pattern`.
    """
    return Field(json_schema_extra=keywords)


LARGEST_NUMBER = 1e100
"""Largest number of any option; products of larger ones could be infinite."""


class Section(BaseModel):
    """Base of all sections: no unknown keys, no conversion (`"3"` is not 3), no later change."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _none(cls, value: object, info: ValidationInfo) -> object:
        """Turn "none" into None: TOML has no null, and a recipe that extends another may unset an option."""
        optional = cls.model_fields[str(info.field_name)].default is None
        if isinstance(value, int | float) and LARGEST_NUMBER < abs(value) < math.inf:
            raise ValueError("is too large; give a number of a usual size")
        return None if optional and value == "none" else value


_ENDS_AS_CHECKPOINT = f"({'|'.join(map(re.escape, CHECKPOINT_ENDINGS))})$"


def _checkpoint(path: str) -> str:
    if not path.endswith(CHECKPOINT_ENDINGS):
        raise ValueError(f"is not a checkpoint's name; it ends in {', '.join(CHECKPOINT_ENDINGS)}")
    return path


CheckpointPath = Annotated[Text, AfterValidator(_checkpoint), in_schema(pattern=_ENDS_AS_CHECKPOINT)]


def _saved(path: str) -> str:
    if not path.endswith(".safetensors"):
        raise ValueError("does not end in .safetensors, the format it is written in")
    return path


class DataOptions(Section):
    """[data]: the images to train and to validate on."""

    path: Annotated[Text, Flag(Panel.model, "--data")] = Field(
        description="images: a folder of class folders, a tar of them, or timm's hfds/..., wds/..., torch/..."
    )
    root: Annotated[Text | None, Flag(Panel.model, "--data-root")] = Field(
        default=None, description="folder that holds a hfds/..., wds/... or torch/... data set"
    )
    unlabelled: Annotated[bool, Flag(Panel.model)] = Field(
        default=False,
        description="whether to read no labels: the images may be in any folder, the levels learn from the "
        "predictions of the original model alone, and are evaluated by their agreement with it",
        exclude_if=lambda value: not value,
    )
    labels: Annotated[Text | None, Flag(Panel.model, "--labels")] = Field(
        default=None,
        description="CSV table of images that may have several labels each, in place of class folders: "
        "file,labels with labels divided by semicolons, or file and a column of 0 and 1 for each label",
        exclude_if=lambda path: path is None,
    )
    train_split: Annotated[Text, Flag(Panel.model)] = Field(
        default="train", description="name of the split to train on"
    )
    val_split: Annotated[Text, Flag(Panel.model)] = Field(
        default="validation", description="name of the split to validate on"
    )
    holdout: Annotated[OpenShare | None, Flag(Panel.model)] = Field(
        default=None,
        description="share of the training images to validate on; by default "
        f"{USUAL_HOLDOUT:g} if the data has no validation split",
    )
    calibrate: Annotated[OpenShare | None, Flag(Panel.levels)] = Field(
        default=None,
        description="share of the training images to hold out for fitting, after training, each level's "
        "temperature and the weights that combine the levels' predictions (eval --cascade, --consensus "
        "learned); none by default",
    )
    max_train: Annotated[PositiveInt | None, Flag(Panel.model)] = Field(
        default=None, description="maximum number of training images; all by default"
    )
    max_val: Annotated[PositiveInt | None, Flag(Panel.model)] = Field(
        default=None, description="maximum number of validation images; all by default"
    )
    hierarchy: Annotated[Text | None, Flag(Panel.levels)] = Field(
        default=None,
        description="CSV table that maps the data's classes to coarser ones, for levels that predict "
        "those: the first line is fine,coarse, followed by one row per class",
    )
    class_names: Annotated[Text | None, Flag(Panel.model)] = Field(
        default=None,
        description="file of class names, one per line, in the order of the checkpoint's outputs; by default "
        "the folders in natural order: 1, 2, 10",
        exclude_if=lambda path: path is None,
    )
    exif_orientation: Annotated[bool, Flag(Panel.model, "--exif-orientation/--no-exif-orientation")] = Field(
        default=True,
        description="whether to turn photos upright as their EXIF orientation says, in training and "
        "evaluation; timm does not",
        exclude_if=bool,
    )
    workers: Annotated[Annotated[int, Field(ge=0)] | None, Flag(Panel.model)] = Field(
        default=None,
        description="number of processes that load images; 0 loads in the main process; automatic by default",
    )
    on_bad_image: Annotated[OnBadImage, Flag(Panel.model)] = Field(
        default="refuse",
        description="what happens at an unreadable image: refuse stops the run, skip leaves the image out",
    )


class TrainOptions(Section):
    """[train]: joint training of the levels."""

    epochs: Annotated[float, Flag(Panel.training)] = Field(
        default=10.0, ge=0, description="passes over the training images; 0 trains nothing"
    )
    batch_size: Annotated[int, Flag(Panel.training)] = Field(
        default=64, ge=1, description="images per training step and device"
    )
    lr: Annotated[LearningRate, Flag(Panel.training)] = Field(
        default=None,
        description=f"learning rate after the warmup; by default {DEFAULT_LR}, and {ADAPTIVE_LR} for AdamW "
        "and its like; auto tries several in short trainings first",
    )
    opt: Annotated[Text, Flag(Panel.training)] = Field(
        default="sgd", description="timm's name of the optimizer"
    )
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of optimizers that have one")
    weight_decay: float = Field(
        default=1e-4, ge=0, description="weight decay per step, as the optimizer defines it"
    )
    sched: Literal["cosine", "constant"] = Field(default="cosine", description="learning-rate schedule")
    warmup_epochs: float = Field(
        default=0.0, ge=0, description="epochs during which the learning rate rises to lr"
    )
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of the cosine schedule")
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="maximum norm of the gradient; not clipped by default"
    )
    accumulate: int = Field(
        default=1, ge=1, description="batches whose gradients are accumulated for one training step"
    )
    amp: Annotated[bool | None, Flag(Panel.training, "--amp/--no-amp")] = Field(
        default=None,
        description="whether to compute in mixed precision if the device supports 16-bit numbers; by default "
        "on a GPU",
    )
    amp_dtype: AmpDtype = Field(
        default="auto",
        description="number type of mixed precision: bfloat16, float16 (GPUs only), or auto: bfloat16 if the "
        "device supports it",
    )
    compile: Annotated[bool, Flag(Panel.training)] = Field(
        default=False, description="whether to compile each level with torch.compile for training"
    )
    grad_checkpointing: bool = Field(
        default=False,
        description="whether blocks recompute their activations in the backward pass, to save memory",
    )
    channels_last: bool | None = Field(
        default=None,
        description="whether to store weights in channels-last order, in which depthwise networks run "
        "faster; by default on a GPU",
    )
    tf32: bool | None = Field(
        default=None,
        description="whether a GPU may round the factors of float32 products to TF32; by default if it "
        "has TF32",
        exclude_if=lambda value: value is None,
    )
    cudnn_benchmark: bool | None = Field(
        default=None,
        description="whether a GPU times several algorithms for each convolution and takes the fastest; by "
        "default it does",
        exclude_if=lambda value: value is None,
    )
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="decay per step of the averaged weights; 0 disables averaging"
    )
    bn: Annotated[BatchNormMode, Flag(Panel.levels)] = Field(
        default="private",
        description="batch norm: private trains one per level; recalibrate shares one and measures its "
        "statistics for each level after training",
    )
    recalibrate_batches: int = Field(
        default=100,
        ge=1,
        description="maximum number of training batches used to measure batch-norm statistics",
    )
    teacher: Annotated[Text, Flag(Panel.training, suggestions=TEACHERS)] = Field(
        default="original",
        description="teacher for distillation: original (the frozen pretrained model), self (the full "
        "level), both (their mean), none, or the name of a timm model",
    )
    teacher_checkpoint: CheckpointPath | None = Field(
        default=None, description="file with the weights of a teacher that is a timm model"
    )
    loss: Loss = Field(
        default="ce",
        description="loss of the labels, as timm has it: ce (cross-entropy), bce (binary cross-entropy of "
        "each class), poly (Poly-1) or asl (asymmetric); with data.labels, ce is replaced by bce",
        exclude_if=lambda value: value == "ce",
    )
    class_weights: Literal["balanced"] | None = Field(
        default=None,
        description="balanced: images of rare classes count more in the loss, so that all classes count "
        "alike, or with data.labels the images with a label as much as those without it; by default all "
        "images count alike",
        exclude_if=lambda value: value is None,
    )
    distill: Share = Field(default=0.5, description="share of distillation in each level's loss")
    temperature: float = Field(
        default=1.0, gt=0, description="distillation temperature, for both teacher and student"
    )
    sandwich: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="levels per training step, always including the lowest and the highest that learn; by "
        "default all, or 4 if there are more",
    )
    eval_before: bool = Field(
        default=True, description="whether to validate the levels before training as well"
    )
    eval_every: int = Field(default=1, ge=1, description="epochs between validations")
    log: Annotated[tuple[Log, ...], Field(strict=False), Flag(Panel.training)] = Field(
        default=(),
        description="logs in addition to metrics.jsonl: csv (a row per epoch), tensorboard, wandb, mlflow",
    )
    sync_batch_norm: bool = Field(
        default=False,
        description="whether batch norm normalises by the images of all processes in training, and not only "
        "by those of its own process",
        exclude_if=lambda value: not value,
    )
    exchange: Literal["float32", "bfloat16"] = Field(
        default="float32",
        description="number type in which several processes exchange gradients; bfloat16 halves the bytes",
        exclude_if=lambda value: value == "float32",
    )
    overlap: bool = Field(
        default=False,
        description="whether processes exchange a part of the gradients while lower levels still run",
        exclude_if=lambda value: not value,
    )
    timeout_minutes: float = Field(
        default=30.0,
        gt=0,
        description="minutes that one of several processes waits for the others before the run ends",
        exclude_if=lambda value: value == 30.0,
    )
    checkpoint_minutes: float = Field(
        default=10.0,
        ge=0,
        description="minutes between checkpoints, from which an interrupted run resumes; checkpoints are "
        "also saved after each epoch and before a signal ends the run; 0 saves none",
    )


class FinetuneOptions(Section):
    """[finetune]: plain training of the dense model before it is nested."""

    epochs: Annotated[Annotated[int, Field(ge=0)] | None, Flag(Panel.training, "--finetune-epochs")] = Field(
        default=None,
        description="passes over the training images before nesting; 0 disables fine-tuning; by default "
        f"{LEAST_FINETUNE_EPOCHS} or more for a new classifier, and else 0",
    )
    lr: LearningRate = Field(
        default=None,
        description=f"initial learning rate; by default {DEFAULT_LR}, and {ADAPTIVE_LR} for AdamW and its "
        "like; auto tries several in short trainings first",
    )
    save: Annotated[Text, AfterValidator(_saved), in_schema(pattern=r"\.safetensors$")] | None = Field(
        default=None,
        description="file to save the fine-tuned dense model to, a plain timm checkpoint (.safetensors)",
    )
