"""[gates]: limits that levels must meet, in a recipe or in a separate TOML file. Does not import torch."""

from typing import Annotated, Any

from pydantic import AfterValidator, BaseModel, BeforeValidator, ConfigDict, Field, ValidationError

from nestify.errors import RecipeError
from nestify.recipe.amounts import Quantity, did_you_mean, parse_limit, percent_meant
from nestify.recipe.options import PositiveInt, Section, Text, in_schema
from nestify.recipe.problems import sentence
from nestify.recipe.sources import read_table

Points = Annotated[float, Field(ge=0, le=100)]


def _not_a_share(value: float) -> float:
    if (meant := percent_meant(value)) is not None:
        raise ValueError(f"is a share, and the limit is in percent{did_you_mean(meant)}")
    return value


Score = Annotated[
    Points,
    AfterValidator(_not_a_share),
    in_schema(**{"not": {"exclusiveMinimum": 0, "exclusiveMaximum": 1}}),
]


def _amount_of(quantity: Quantity, form: str) -> BeforeValidator:
    def check(value: object) -> object:
        try:
            if value is not None:
                parse_limit(quantity, str(value))
        except ValueError:
            raise ValueError(f"is not an amount of {quantity} above 0; give {form} or a number") from None
        return value

    return BeforeValidator(check, json_schema_input_type=PositiveInt | Text | None)


class LevelGates(Section):
    """Limits of one level; a limit that is None is not checked."""

    min_top1: Score | None = Field(default=None, description="minimum top-1 accuracy in percent")
    min_map: Score | None = Field(
        default=None,
        description="minimum mean average precision in percent, of images with several labels (data.labels)",
        exclude_if=lambda value: value is None,
    )
    min_agreement: Score | None = Field(
        default=None,
        description="minimum top-1 agreement with the original model in percent, of levels learned without "
        "labels",
        exclude_if=lambda value: value is None,
    )
    min_cosine: Score | None = Field(
        default=None,
        description="minimum mean cosine similarity with what the original model returns, in percent, of "
        "backbones learned without labels",
        exclude_if=lambda value: value is None,
    )
    max_drop: Points | None = Field(
        default=None,
        description="maximum drop in top-1, or mean average precision, from the full level, in points; for "
        "levels that predict the same classes",
    )
    max_regression: Points | None = Field(
        default=None,
        description="maximum drop in top-1, or mean average precision, from the same level of the baseline, "
        "in points",
    )
    max_bytes: Annotated[int | Text | None, _amount_of("bytes", "4MB, 4MiB")] = Field(
        default=None,
        description="maximum bytes of the file up to and including the level, with the header: 4MB, 4MiB or "
        "a number",
    )
    max_macs: Annotated[int | Text | None, _amount_of("macs", "500M")] = Field(
        default=None, description="maximum MACs per image that dense kernels execute: 500M or a number"
    )
    max_params: Annotated[int | Text | None, _amount_of("params", "2M")] = Field(
        default=None, description="maximum number of nonzero parameters: 2M or a number"
    )


class Gates(LevelGates):
    """[gates]: limits of every level; [gates.level.NAME] replaces them for one level."""

    baseline: Text | None = Field(
        default=None, description="nested file, or the output of report --json for one, for max_regression"
    )
    level: dict[str, LevelGates] = Field(
        default={}, description="limits of single levels, by name or number, which replace the common ones"
    )

    def for_level(self, number: int, name: str) -> LevelGates:
        """Return the limits of one level: its own, or else those of every level."""
        own: dict[str, Any] = {}
        for key in (str(number), name):
            own |= self.level[key].model_dump(exclude_none=True) if key in self.level else {}
        common = self.model_dump(include=set(LevelGates.model_fields), exclude_none=True)
        return LevelGates.model_validate(common | own)

    def given(self) -> bool:
        """Return whether any level has a limit."""
        limits = [self, *self.level.values()]
        return any(getattr(each, name) is not None for each in limits for name in LevelGates.model_fields)

    def unknown_levels(self, names: list[str]) -> list[str]:
        """Return the level names of limits that are not among the given names, core first."""
        known = {*names, *(str(number) for number in range(1, len(names) + 1))}
        return [name for name in self.level if name not in known]


class _HasGates(BaseModel):
    model_config = ConfigDict(extra="ignore")

    gates: Gates


def load_gates(path: str, *, compared: bool = False) -> Gates:
    """Read the gates of a TOML file: a recipe, or a file with nothing else.

    Args:
        path: the file.
        compared: whether a baseline is also given.

    Raises:
        RecipeError: if there are none, or with every problem that was found.
    """
    table = read_table(path)
    if "gates" not in table:
        raise RecipeError("this file has no [gates]; write [gates] and limits such as min_top1 = 70", path)
    try:
        gates = _HasGates.model_validate({"gates": table["gates"]}).gates
    except ValidationError as error:
        problems = [sentence(_HasGates, each).text for each in error.errors(include_url=False)]
        raise RecipeError(problems, path) from None
    if problem := baseline_problem(gates, compared):
        raise RecipeError(problem, path)
    return gates


def baseline_problem(gates: Gates, compared: bool = False) -> str | None:
    """Return a sentence if a limit needs a baseline and there is none.

    Args:
        gates: the gates.
        compared: whether a baseline is given elsewhere.
    """
    limits = [gates, *gates.level.values()]
    needed = any(each.max_regression is not None for each in limits)
    if needed and gates.baseline is None and not compared:
        return "gates.max_regression needs gates.baseline; set it to a nested file or a report in JSON"
    return None
