"""The sections of a recipe: every option with its type, range, default and unit, and no logic between them.

A description is a noun phrase; it is the option's help text, and the hint in errors about it. A validator
here raises ValueError with a predicate (`is not ...`), which follows `key = value` in the error. No torch.
"""

import math
import re
from typing import Annotated, Any, Literal

from pydantic import (
    AfterValidator,
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    ValidationInfo,
    field_validator,
)

AmpDtype = Literal["auto", "bfloat16", "float16"]
Dtype = Literal["float32", "float16", "bfloat16"]

CHECKPOINT_ENDINGS = (".safetensors", ".pth", ".pth.tar", ".pt", ".bin")
TEACHERS = ("original", "self", "both", "none")
"""Teachers that come from the run itself; anything else is the name of a timm model."""

Text = Annotated[str, Field(min_length=1)]
Share = Annotated[float, Field(ge=0, le=1)]


class Section(BaseModel):
    """What all sections share: nothing unknown, nothing converted (`"3"` is not 3), nothing changed later."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, allow_inf_nan=False)

    @field_validator("*", mode="before")
    @classmethod
    def _none(cls, value: object, info: ValidationInfo) -> object:
        """TOML has no null, so "none" takes an optional value back, as when a recipe extends another."""
        optional = cls.model_fields[str(info.field_name)].default is None
        return None if optional and value == "none" else value


def _checkpoint(path: str) -> str:
    if not path.endswith(CHECKPOINT_ENDINGS):
        raise ValueError(f"is not a checkpoint's name; it ends in {', '.join(CHECKPOINT_ENDINGS)}")
    return path


def _saved(path: str) -> str:
    if not path.endswith(".safetensors"):
        raise ValueError("does not end in .safetensors, the format it is written in")
    return path


def _image_size(value: object) -> object:
    sides = value if isinstance(value, list | tuple) else [value, value]
    if value is not None and not (len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)):
        raise ValueError("is not an image size in pixels; give one side (224) or [height, width]")
    return None if value is None else tuple(sides)


def _rising_pair(value: object) -> object:
    numbers = value if isinstance(value, list | tuple) else []
    if not (len(numbers) == 2 and all(type(number) in (int, float) for number in numbers)):
        raise ValueError("is not a list of two numbers, [low, high]")
    low, high = numbers
    if not 0 < low <= high < math.inf:
        raise ValueError("is not in order; [low, high] needs 0 < low <= high")
    return low, high


def _relative_area(pair: tuple[float, float]) -> tuple[float, float]:
    if pair[1] > 1:
        raise ValueError("is more than the whole image; [low, high] needs high <= 1")
    return pair


def _is_plain(value: object) -> bool:
    finite = not isinstance(value, float) or math.isfinite(value)
    return finite and (value is None or isinstance(value, bool | int | float | str))


def _kwarg(value: object) -> object:
    """Plain data only: the arguments are stored in the nested file as JSON."""
    rows = value if isinstance(value, list | tuple) else [value]
    if not all(map(_is_plain, (item for row in rows for item in (row if isinstance(row, list) else [row])))):
        raise ValueError("is not a number, a text, true or false, or a list of these")
    return value


def _free_kwargs(kwargs: dict[str, Any]) -> dict[str, Any]:
    reserved = {"pretrained": "model.pretrained", "checkpoint_path": "model.checkpoint"}
    for name, key in reserved.items():
        if name in kwargs:
            raise ValueError(f"has {name}, which has an option of its own; set {key}")
    return kwargs


class ModelOptions(Section):
    """[model]: the pretrained timm model to nest."""

    name: Text = Field(description="name in timm's registry, or local-dir:FOLDER, or hf-hub:OWNER/NAME")
    checkpoint: Annotated[Text, AfterValidator(_checkpoint)] | None = Field(
        default=None,
        description="file of pretrained weights: .safetensors, or a .pth that holds only weights",
    )
    pretrained: bool = Field(
        default=True, description="whether to start from timm's own weights where no checkpoint is given"
    )
    kwargs: Annotated[dict[str, Annotated[Any, BeforeValidator(_kwarg)]], AfterValidator(_free_kwargs)] = (
        Field(default={}, description="further arguments of timm.create_model")
    )
    new_head: bool = Field(
        default=False, description="whether to replace the classifier by a fresh one for the data's classes"
    )
    input_size: Annotated[
        tuple[int, int] | None,
        BeforeValidator(_image_size, json_schema_input_type=int | tuple[int, int] | None),
    ] = Field(
        default=None,
        description="image size in pixels: one side, or [height, width]; the model's own by default",
    )


class DataOptions(Section):
    """[data]: the images to train and to validate on."""

    path: Text = Field(
        description="images: a folder of class folders, a tar of them, or timm's hfds/..., wds/..., torch/..."
    )
    root: Text | None = Field(
        default=None, description="folder that holds a hfds/..., wds/... or torch/... data set"
    )
    train_split: Text = Field(default="train", description="name of the split to train on")
    val_split: Text = Field(default="validation", description="name of the split to validate on")
    holdout: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="share of the training images to validate on where there is no validation split",
    )
    calibrate: Annotated[float, Field(gt=0, lt=1)] | None = Field(
        default=None,
        description="share of the training images to hold out, to fit after training how sure each level is "
        "and how the levels' answers are combined (eval --cascade, --consensus learned); none by default",
    )
    max_train: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="number of training images to use at most; all by default"
    )
    max_val: Annotated[int, Field(ge=1)] | None = Field(
        default=None, description="number of validation images to use at most; all by default"
    )
    hierarchy: Text | None = Field(
        default=None,
        description="CSV table of the classes' coarser classes, for levels that tell those: first line "
        "fine,coarse, then a row per class",
    )
    workers: Annotated[int, Field(ge=0)] | None = Field(
        default=None,
        description="number of processes that load images; 0 loads in the main one, by default automatic",
    )
    on_bad_image: Literal["refuse", "skip"] = Field(
        default="refuse",
        description="what an unreadable image does: refuse stops the run, skip leaves it out",
    )


_AUTO_AUGMENT = r"(rand|augmix)(-(mstd|mmax|inc|m|n|p|w|d|a|b)-?\d+(\.\d+)?|-t[a-z]+)*"
_AUTO_AUGMENT_POLICY = r"(v0r?|originalr?|3a)(-mstd\d+(\.\d+)?)?"


def _auto_augment(text: str) -> str:
    if not re.fullmatch(f"{_AUTO_AUGMENT}|{_AUTO_AUGMENT_POLICY}", text):
        raise ValueError(
            "is not one of timm's; give rand-m9-mstd0.5, augmix-m5-w4-d2, original, originalr, v0, v0r or 3a"
        )
    return text


class AugmentOptions(Section):
    """[augment]: how training images are varied."""

    hflip: Share = Field(default=0.5, description="probability of a left-right flip; 0 for digits and text")
    vflip: Share = Field(default=0.0, description="probability of an upside-down flip")
    scale: Annotated[tuple[float, float], BeforeValidator(_rising_pair), AfterValidator(_relative_area)] = (
        Field(
            default=(0.35, 1.0),
            description="smallest and largest area of a random crop, as shares of the image's",
        )
    )
    ratio: Annotated[tuple[float, float], BeforeValidator(_rising_pair)] = Field(
        default=(3 / 4, 4 / 3), description="smallest and largest width / height of a random crop"
    )
    color_jitter: float = Field(
        default=0.0, ge=0, description="largest relative change of brightness, contrast and saturation"
    )
    auto_augment: Annotated[Text, AfterValidator(_auto_augment)] | None = Field(
        default=None, description="timm's automatic augmentation, such as rand-m9-mstd0.5; none by default"
    )
    random_erase: Share = Field(default=0.0, description="probability that a random rectangle is erased")
    mixup: float = Field(default=0.0, ge=0, description="alpha of mixup's beta distribution; 0 is off")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of cutmix's beta distribution; 0 is off")
    smoothing: float = Field(
        default=0.0, ge=0, lt=1, description="label smoothing, the share spread over all classes"
    )


class TrainOptions(Section):
    """[train]: how the levels learn together."""

    epochs: float = Field(default=10.0, ge=0, description="passes over the training images; 0 trains nothing")
    batch_size: int = Field(default=64, ge=1, description="images per training step and device")
    lr: float = Field(default=0.01, gt=0, description="learning rate after the warmup")
    opt: Text = Field(default="sgd", description="optimizer, by timm's name")
    momentum: float = Field(default=0.9, ge=0, lt=1, description="momentum of optimizers that have one")
    weight_decay: float = Field(
        default=1e-4, ge=0, description="weight decay per step, as the optimizer defines it"
    )
    sched: Literal["cosine", "constant"] = Field(default="cosine", description="course of the learning rate")
    warmup_epochs: float = Field(
        default=0.0, ge=0, description="epochs during which the learning rate rises to lr"
    )
    min_lr: float = Field(default=0.0, ge=0, description="learning rate at the end of a cosine course")
    clip_grad: Annotated[float, Field(gt=0)] | None = Field(
        default=None, description="largest norm of the gradient; not clipped by default"
    )
    accumulate: int = Field(
        default=1, ge=1, description="batches whose gradients are added up for one training step"
    )
    amp: bool = Field(
        default=False, description="whether to compute in mixed precision where the device has 16-bit numbers"
    )
    amp_dtype: AmpDtype = Field(
        default="auto",
        description="numbers of mixed precision: bfloat16, float16 (GPUs alone), or auto: bfloat16 where the "
        "device has it",
    )
    compile: bool = Field(
        default=False, description="whether to run each level through torch.compile while it trains"
    )
    grad_checkpointing: bool = Field(
        default=False,
        description="whether blocks compute their activations again in the backward, for less memory",
    )
    channels_last: bool = Field(
        default=False, description="whether weights lie channels last, which depthwise networks run faster in"
    )
    ema_decay: float = Field(
        default=0.0, ge=0, lt=1, description="decay of averaged weights per step; 0 is off"
    )
    bn: Literal["private", "recalibrate"] = Field(
        default="private",
        description="batch norm: private trains one per level, recalibrate shares one and measures its "
        "statistics per level afterwards",
    )
    recalibrate_batches: int = Field(
        default=100,
        ge=1,
        description="training batches from which batch-norm statistics are measured, at most",
    )
    teacher: Text = Field(
        default="original",
        description="who teaches by distillation: original (the frozen pretrained model), self (the full "
        "level), both (their mean), none, or a timm model's name",
    )
    teacher_checkpoint: Annotated[Text, AfterValidator(_checkpoint)] | None = Field(
        default=None, description="file of weights of a teacher that is a timm model"
    )
    distill: Share = Field(default=0.5, description="share of distillation in each level's loss")
    temperature: float = Field(
        default=1.0, gt=0, description="temperature that softens both sides of distillation"
    )
    sandwich: Annotated[int, Field(ge=2)] | None = Field(
        default=None,
        description="levels per training step, core and full always among them; by default all, or 4 of more",
    )
    eval_before: bool = Field(
        default=True, description="whether to validate the levels before training as well"
    )
    eval_every: int = Field(default=1, ge=1, description="epochs between validations")
    log: Annotated[tuple[Literal["csv", "tensorboard"], ...], Field(strict=False)] = Field(
        default=(),
        description="logs beside metrics.jsonl: csv (a row per epoch), tensorboard",
    )
    checkpoint_minutes: float = Field(
        default=10.0,
        ge=0,
        description="minutes between checkpoints, from which a run that was cut off goes on; one is written "
        "after each epoch too, and before a signal ends the run; 0 writes none",
    )


class FinetuneOptions(Section):
    """[finetune]: plain training of the dense model before it is nested."""

    epochs: int = Field(default=0, ge=0, description="passes over the training images; 0 is off")
    lr: float = Field(default=0.01, gt=0, description="learning rate at the start")
    save: Annotated[Text, AfterValidator(_saved)] | None = Field(
        default=None,
        description="file for the fine-tuned dense model, a plain timm checkpoint (.safetensors)",
    )
