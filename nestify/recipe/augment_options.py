"""The section [augment] of a recipe. Does not import torch."""

import math
import re
from typing import Annotated

from pydantic import AfterValidator, BeforeValidator, Field

from nestify.recipe.options import Section, Share, Text, in_schema

_Positive = Annotated[float, Field(gt=0)]
_Area = Annotated[float, Field(gt=0, le=1)]


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


_RANDOM_POLICY = r"(rand|augmix)(-(mstd|mmax|inc|m|n|p|w|d|a|b)-?\d+(\.\d+)?|-t[a-z]+)*"
_FIXED_POLICY = r"(v0r?|originalr?|3a)(-mstd\d+(\.\d+)?)?"
_POLICY = f"{_RANDOM_POLICY}|{_FIXED_POLICY}"


def _auto_augment(text: str) -> str:
    if not re.fullmatch(_POLICY, text):
        raise ValueError(
            "is not one of timm's; give rand-m9-mstd0.5, augmix-m5-w4-d2, original, originalr, v0, v0r or 3a"
        )
    return text


class AugmentOptions(Section):
    """[augment]: random changes of training images."""

    hflip: Share = Field(default=0.5, description="probability of a left-right flip; 0 suits digits and text")
    vflip: Share = Field(default=0.0, description="probability of an upside-down flip")
    scale: Annotated[
        tuple[float, float],
        BeforeValidator(_rising_pair, json_schema_input_type=tuple[_Area, _Area]),
        AfterValidator(_relative_area),
    ] = Field(
        default=(0.35, 1.0),
        description="smallest and largest area of a random crop, as shares of the image's area",
    )
    ratio: Annotated[
        tuple[float, float],
        BeforeValidator(_rising_pair, json_schema_input_type=tuple[_Positive, _Positive]),
    ] = Field(default=(3 / 4, 4 / 3), description="smallest and largest width/height ratio of a random crop")
    color_jitter: float = Field(
        default=0.0, ge=0, description="largest relative change of brightness, contrast and saturation"
    )
    auto_augment: (
        Annotated[Text, AfterValidator(_auto_augment), in_schema(pattern=f"^({_POLICY})$")] | None
    ) = Field(
        default=None, description="timm's augmentation policy, such as rand-m9-mstd0.5; none by default"
    )
    random_erase: Share = Field(default=0.0, description="probability that a random rectangle is erased")
    mixup: float = Field(default=0.0, ge=0, description="alpha of mixup's beta distribution; 0 disables it")
    cutmix: float = Field(default=0.0, ge=0, description="alpha of cutmix's beta distribution; 0 disables it")
    smoothing: float = Field(
        default=0.0,
        ge=0,
        lt=1,
        description="label smoothing: share of the target that is spread over all classes",
    )
