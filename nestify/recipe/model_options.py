"""The section [model] of a recipe. Does not import torch."""

import math
from typing import Annotated, Any

from pydantic import AfterValidator, BeforeValidator, Field

from nestify.recipe.flags import Flag, Panel
from nestify.recipe.options import CheckpointPath, PositiveInt, Section, Text


def _image_size(value: object) -> object:
    sides = value if isinstance(value, list | tuple) else [value, value]
    if value is not None and not (len(sides) == 2 and all(type(side) is int and side > 0 for side in sides)):
        raise ValueError("is not an image size in pixels; give one side (224) or [height, width]")
    return None if value is None else tuple(sides)


def _is_plain(value: object) -> bool:
    finite = not isinstance(value, float) or math.isfinite(value)
    return finite and (value is None or isinstance(value, bool | int | float | str))


def _kwarg(value: object) -> object:
    """Accept plain data only, because the arguments are stored in the nested file as JSON."""
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
    checkpoint: Annotated[CheckpointPath | None, Flag(Panel.model)] = Field(
        default=None,
        description="file of pretrained weights: .safetensors, or a .pth that holds only weights",
    )
    pretrained: bool = Field(
        default=True, description="whether to start from timm's own weights if no checkpoint is given"
    )
    kwargs: Annotated[dict[str, Annotated[Any, BeforeValidator(_kwarg)]], AfterValidator(_free_kwargs)] = (
        Field(default={}, description="further arguments of timm.create_model")
    )
    new_head: Annotated[bool | None, Flag(Panel.model, "--new-head/--keep-head")] = Field(
        default=None,
        description="whether to replace the classifier with a freshly initialized one for the data's "
        "classes; by default if their number differs",
    )
    input_size: Annotated[
        tuple[int, int] | None,
        BeforeValidator(
            _image_size, json_schema_input_type=PositiveInt | tuple[PositiveInt, PositiveInt] | None
        ),
        Flag(Panel.model, value=int),
    ] = Field(
        default=None,
        description="image size in pixels: one side, or [height, width]; the model's own by default",
    )
