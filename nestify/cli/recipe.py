"""`nestify recipe`: print the JSON Schema of recipes, show a recipe, check recipes."""

import json
from typing import Annotated

import typer

from nestify.cli.arguments import AsJson, Command, Group, Settings, complete_recipe
from nestify.cli.output import json_text, write_result
from nestify.errors import RecipeError
from nestify.recipe.sources import parse_setting

SCHEMA_VERSION = 1

recipe = typer.Typer(
    cls=Group, no_args_is_help=True, help="Show and check recipes, and print their JSON Schema."
)


@recipe.command("check", cls=Command)
def check(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="FILES...",
            help="Recipes, or names of built-in ones (digits).",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ],
    settings: Settings = None,
    as_json: AsJson = False,
) -> None:
    """Check recipes: keys, values, and what does not fit together, in every combination of a matrix.

    Nothing is trained, no image is read, and no model is made: whether the model and the files exist is not
    checked. The exit code is 2 if any recipe is wrong; all problems of all recipes are printed.
    """
    from nestify.compression.batch.matrix import expand
    from nestify.errors import joined
    from nestify.recipe.sources import check_is_recipe
    from nestify.text import printable

    options = dict(map(parse_setting, settings or []))
    errors: list[RecipeError] = []
    lines: list[str] = []
    entries: list[dict[str, object]] = []
    for file in files:
        problems: list[str] = []
        variants = []
        try:
            check_is_recipe(file)
            variants = expand([file], options)
        except RecipeError as error:
            errors.append(error)
            problems = str(error).split("\n")
        else:
            number = len(variants[0].recipe.levels)
            jobs = f", {len(variants)} jobs" if len(variants) > 1 else ""
            lines.append(f"{printable(file)}: ok, {number} levels{jobs}\n")
        entries.append({"recipe": file, "problems": problems, "jobs": len(variants)})
    document = {"schema_version": SCHEMA_VERSION, "recipes": entries, "passed": not errors}
    write_result(json_text(document) if as_json else "".join(lines), None)
    if errors:
        raise joined(errors)


@recipe.command("schema", cls=Command)
def schema() -> None:
    """Print the JSON Schema of recipes (draft 2020-12), from which editors complete and check TOML."""
    from nestify.recipe.schema import schema_text

    write_result(schema_text(), None)


@recipe.command("show", cls=Command)
def show(
    source: Annotated[
        str,
        typer.Argument(
            metavar="RECIPE",
            help="A .toml or .json recipe, or a built-in one (digits); with --resolved also a timm model.",
            show_default=False,
            autocompletion=complete_recipe,
        ),
    ],
    resolved: Annotated[
        bool,
        typer.Option(
            "--resolved", help="Show every key, with what the recipe extends, --set, and the defaults."
        ),
    ] = False,
    settings: Settings = None,
    as_json: Annotated[bool, typer.Option("--json", help="Print the resolved recipe as JSON.")] = False,
) -> None:
    """Print a recipe as it is written, or with --resolved every key that a run would use.

    The output of --resolved is a recipe itself, TOML or JSON; its relative paths are relative to the current
    folder. The text "none" stands for a key that is not set.
    """
    from nestify.recipe.recipe import load_recipe
    from nestify.recipe.sources import recipe_text
    from nestify.recipe.toml import recipe_toml

    if resolved:
        found = load_recipe(source, dict(map(parse_setting, settings or [])))
        as_text = json.dumps(found.to_dict(), indent=2, ensure_ascii=False) + "\n"
        write_result(as_text if as_json else recipe_toml(found), None)
        return
    for option, given in (("--set", settings), ("--json", as_json)):
        if given:
            raise RecipeError(f"{option} needs --resolved; without it a recipe is shown as it is written")
    write_result(recipe_text(source), None)
