"""Flags of `nestify compress`, generated from the fields of `Recipe`."""

import inspect
import re
from collections.abc import Callable, Collection
from functools import wraps
from types import GenericAlias
from typing import Annotated, Any

import typer

from nestify.cli.arguments import completer, placeholder
from nestify.errors import NestifyError
from nestify.recipe.amounts import share_meant
from nestify.recipe.flags import FlaggedField, Panel, flagged_fields, name_flags
from nestify.recipe.recipe import Recipe, option_help


def with_recipe_flags(command: Callable[..., None], leave_out: Collection[str] = ()) -> Callable[..., None]:
    """Give a command one flag for each field of `Recipe` that declares one.

    Args:
        command: function with a keyword-only parameter `overrides`, which receives the values of the flags
            that were given, by dotted key: `{"train.epochs": 3}`.
        leave_out: dotted keys of fields that get no flag.

    Returns:
        The command for typer: a function with one parameter per flag in place of `overrides`. Its errors
        name the flags of the recipe's keys.
    """
    fields = [field for field in flagged_fields(Recipe) if field.key not in leave_out]
    keys = {_parameter_name(field): field.key for field in fields}

    @wraps(command)
    def with_flags(**values: Any) -> None:
        flags = {key: values.pop(name) for name, key in keys.items()}
        # Versions of typer differ in whether a list without values is None.
        overrides = {key: value for key, value in flags.items() if value not in (None, [])}
        try:
            command(**values, overrides=overrides)
        except NestifyError as error:
            error.args = (name_flags(Recipe, str(error), leave_out),)
            raise

    signature = inspect.signature(command)
    own = [parameter for name, parameter in signature.parameters.items() if name != "overrides"]
    parameters = [*own, *map(_parameter, fields)]
    with_flags.__signature__ = signature.replace(  # type: ignore[attr-defined]
        parameters=sorted(parameters, key=_sort_key)
    )
    return with_flags


def _parameter(field: FlaggedField) -> inspect.Parameter:
    """Return the parameter from which typer makes the flag of a field.

    Its values are not restricted to the field's choices here: the recipe reports all problems at once.
    """
    info = typer.Option(
        *field.names,
        help=_escape_markdown(option_help(field.key)) + ("; may be repeated" if field.repeated else ""),
        metavar=_placeholder(field),
        parser=_number_parser(field.words) if field.value is float else None,
        autocompletion=completer(field.completions) if field.completions else None,
        rich_help_panel=field.panel,
        show_default=False,  # the help text states the recipe's default
    )
    value: Any = GenericAlias(list, (field.value,)) if field.repeated else field.value
    return inspect.Parameter(
        _parameter_name(field),
        inspect.Parameter.KEYWORD_ONLY,
        default=None,
        annotation=Annotated[value | None, info],
    )


def _placeholder(field: FlaggedField) -> str | None:
    """Return what the help shows as the value of a flag; None for the name of its type."""
    if field.words:
        return placeholder([field.value.__name__, *field.words])
    return placeholder(field.choices) if field.choices else None


def _number_parser(words: Collection[str]) -> Callable[[str], float | str]:
    """Return the parser of a flag whose value is a number.

    It passes on words that the field takes, and percentages, which the recipe refuses with the share that is
    meant.

    Args:
        words: texts that the field takes as well.
    """

    def parse(text: str) -> float | str:
        try:
            return text if text in words or share_meant(text) is not None else float(text)
        except ValueError:
            meant = " or ".join(["a number", *words])
            raise typer.BadParameter(f"{text!r} is not {meant}.") from None

    parse.__name__ = "float"  # the help shows it as the type of the value
    return parse


def _parameter_name(field: FlaggedField) -> str:
    return field.key.replace(".", "__")


def _sort_key(parameter: inspect.Parameter) -> tuple[bool, int]:
    """Return a sort key: positional parameters, then those of each panel, then those without a panel."""
    [info] = parameter.annotation.__metadata__
    panels = list(Panel)
    panel = panels.index(info.rich_help_panel) if info.rich_help_panel in panels else len(panels)
    return parameter.kind is inspect.Parameter.KEYWORD_ONLY, panel


def _escape_markdown(text: str) -> str:
    """Escape a text so that Markdown, the format of help texts, shows it unchanged."""
    return re.sub(r"([\\`*_{}\[\]<>#|])", r"\\\1", text)
