"""Arguments that several commands share, and how the help and shells show the choices of flags."""

import re
from collections.abc import Callable, Iterable
from typing import Annotated, Any

import typer
from typer.core import TyperCommand, TyperGroup

from nestify.accelerator import DEVICE_EXAMPLES, DEVICES
from nestify.errors import RecipeError
from nestify.recipe.amounts import did_you_mean, percent_meant
from nestify.recipe.sources import builtin_recipes


def placeholder(choices: Iterable[str]) -> str:
    """Return the placeholder that the help shows for a flag's value: `[csv|tensorboard]`."""
    return f"[{'|'.join(choices)}]"


def choice_option(
    choices: Iterable[str], *names: str, help: str, show_default: bool | str = True
) -> typer.models.OptionInfo:
    """Return a flag whose help shows its choices; typer reads the choices from the parameter's type.

    Args:
        choices: members of the parameter's type, an enum or a Literal.
        names: the flag's names, such as `--format`.
        help: help text.
        show_default: as in `typer.Option`.
    """
    info: typer.models.OptionInfo = typer.Option(
        *names, help=help, metavar=placeholder(choices), show_default=show_default
    )
    return info


def completer(values: Iterable[str]) -> Callable[[str], list[str]]:
    """Return a callback through which shells complete a word to one of these values."""
    words = list(values)

    def complete(incomplete: str) -> list[str]:
        return [word for word in words if word.startswith(incomplete)]

    return complete


def complete_recipe(incomplete: str) -> list[str]:
    """Complete the name of a built-in recipe; shells complete paths by themselves."""
    return completer(builtin_recipes())(incomplete)


class Command(TyperCommand):
    """A command whose help shows no value for switches."""

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the command's parameters, including --help."""
        return _without_switch_values(super().get_params(ctx))


class Group(TyperGroup):
    """A group of commands in alphabetical order, whose help shows no value for switches."""

    def list_commands(self, ctx: Any) -> list[str]:
        """Return the names of the commands."""
        return sorted(super().list_commands(ctx))

    def get_params(self, ctx: Any) -> list[Any]:
        """Return the group's own parameters, including --help."""
        return _without_switch_values(super().get_params(ctx))


def _without_switch_values(parameters: list[Any]) -> list[Any]:
    for parameter in parameters:
        if getattr(parameter, "is_flag", False):
            parameter.metavar = ""
    return parameters


NestedFileOrAddress = Annotated[
    str,
    typer.Argument(
        metavar="FILE_OR_URL",
        help="Nested file: a path, https://..., or hf://owner/repo/file.",
        show_default=False,
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

RecipeOrModel = Annotated[
    str,
    typer.Argument(
        metavar="RECIPE_OR_MODEL",
        help="A .toml recipe, a built-in recipe (digits), or the name of a timm model.",
        show_default=False,
        autocompletion=complete_recipe,
    ),
]

Settings = Annotated[
    list[str] | None,
    typer.Option(
        "--set",
        metavar="KEY=VALUE",
        help="any other key of the recipe, as in train.warmup_epochs=2; may be repeated",
    ),
]

Device = Annotated[
    str,
    typer.Option(
        "--device",
        help=f"Device to run on: {DEVICE_EXAMPLES}.",
        autocompletion=completer(DEVICES),
    ),
]

Engine = Annotated[bool, typer.Option("--engine", help="Run levels on the sparse engine, on the CPU.")]

Int8 = Annotated[
    bool,
    typer.Option("--int8", help="With --engine: run levels in int8, as export --sparse --int8 writes them."),
]

ReduceRange = Annotated[
    bool,
    typer.Option(
        "--reduce-range",
        help="Give --int8 weights of 7 bits, whose sums do not saturate on x86 without VNNI.",
    ),
]

TrainSplit = Annotated[
    str | None,
    typer.Option(
        "--train-split", help="Split of --data to calibrate int8 on.", show_default="the training split"
    ),
]


def parse_percent(text: str) -> float:
    """Parse a percentage in [0, 100]: `70` or `70%`; below 1 only with its sign, because 0.7 may mean 70 %.

    Raises:
        typer.BadParameter: if the text is anything else.
    """
    number = text.strip().removesuffix("%").strip()
    if not re.fullmatch(r"[0-9]+\.?[0-9]*|\.[0-9]+", number) or float(number) > 100:
        raise typer.BadParameter(f"{text!r} is not a percentage from 0 to 100, such as 70.")
    if number == text.strip() and (meant := percent_meant(float(number))) is not None:
        raise typer.BadParameter(
            f"{text!r} is a share, and the limit is in percent{did_you_mean(meant)} Give {text}% otherwise."
        )
    return float(number)


def parse_whole_numbers(option: str, text: str) -> list[int]:
    """Parse whole numbers above 0 as users write them: `1` or `1,16`.

    Args:
        option: name of the option, for the message.
        text: value of the option.

    Raises:
        RecipeError: if the text is anything else.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,8}", word) for word in words):
        raise RecipeError(
            f"{option} {text!r} is not understood; give whole numbers above 0, one (1) or several (1,16)"
        )
    return [int(word) for word in words]
