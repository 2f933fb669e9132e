"""`nestify scan`: what each layer, group of channels and block costs if it is left out."""

import sys
from functools import partial
from pathlib import Path
from typing import Annotated, get_args

import typer

from nestify.cli.arguments import AsJson, RecipeOrModel, Settings
from nestify.cli.flags import with_recipe_flags
from nestify.recipe.flags import flagged_fields
from nestify.recipe.level_options import Part
from nestify.recipe.recipe import Recipe
from nestify.recipe.sources import parse_setting

USED = (
    "seed",
    "model",
    "data.path",
    "data.root",
    "data.train_split",
    "data.class_names",
    "data.on_bad_image",
    "data.unlabelled",
)
"""Keys and sections of a recipe that `scan` has flags for."""

NOT_USED = [
    field.key
    for field in flagged_fields(Recipe)
    if field.key not in USED and field.key.partition(".")[0] not in USED
]


@partial(with_recipe_flags, leave_out=NOT_USED)
def scan(
    recipe: RecipeOrModel,
    *,
    only: Annotated[
        str,
        typer.Option(
            "--only",
            help="What to measure: weight (sparse layers), channel (narrower groups of channels), layer "
            "(skipped blocks).",
        ),
    ] = ",".join(get_args(Part)),
    images: Annotated[
        int,
        typer.Option(
            "--images", min=2, help="Training images to fit on; as many others show what each change costs."
        ),
    ] = 64,
    sparsities: Annotated[
        str, typer.Option("--sparsities", help="Sparsities of each layer, between 0 and 1.")
    ] = "0.5,0.75,0.9",
    widths: Annotated[
        str, typer.Option("--widths", help="Shares of each group's channels, between 0 and 1.")
    ] = "0.75,0.5",
    budget: Annotated[
        str | None,
        typer.Option(
            "--budget",
            help="Suggest levels whose core level meets this budget: macs=0.5, params=2M, bytes=4MB. Each "
            "schedule is tried without training.",
        ),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option("--output", "-o", help="Write the suggested recipe (.toml), which --budget needs."),
    ] = None,
    html: Annotated[
        Path | None, typer.Option("--html", help="Write plot and tables as one HTML page.")
    ] = None,
    settings: Settings = None,
    as_json: AsJson = False,
    overrides: dict[str, object],
) -> None:
    """Measure what each layer, group of channels and block costs if a level leaves it out, without training.

    Each change is made alone. Weights are fitted by least squares on a few training images, and other images
    show how often the predicted class is still that of the original model.
    """
    from nestify.errors import RecipeError
    from nestify.files import check_apart

    if output is not None and budget is None:
        raise RecipeError("-o writes the suggested recipe, which needs --budget, such as --budget macs=0.5")
    overrides |= dict(parse_setting(text) for text in settings or [])
    read = {"the recipe": recipe, "the checkpoint": overrides.get("model.checkpoint")}
    for path in (html, output):
        if path is not None:
            check_apart(path, {what: each for what, each in read.items() if isinstance(each, str)})
    if html is not None and output is not None:
        check_apart(output, {"the page of --html too": html})
    kinds = _parts(only)
    numbers = {"--sparsities": sparsities, "--widths": widths}
    shares = {option: _numbers(option, text) for option, text in numbers.items()}
    from nestify.cli.output import Verbosity, json_text, print_unless_quiet, verbosity, write_result
    from nestify.compression.scan import scan as run
    from nestify.report.html.scan import scan_page
    from nestify.report.scan import scan_document, scan_screen
    from nestify.report.text import render
    from nestify.terminal import progress_bar
    from nestify.training.display import Display

    quiet = verbosity() is Verbosity.quiet
    with progress_bar("candidates", hidden=quiet) as progress:
        done = run(
            recipe,
            overrides,
            kinds=kinds,
            images=images,
            sparsities=shares["--sparsities"],
            widths=shares["--widths"],
            budget=budget,
            observer=Display(quiet=True),
            progress=progress,
        )
    if html is not None:
        write_result(scan_page(done), html)
    if output is not None:
        assert done.suggestion is not None
        write_result(done.suggestion.recipe, output)
    if as_json:
        write_result(json_text(scan_document(done)), None)
    else:
        write_result(render(*scan_screen(done), sys.stdout), None)
        if done.suggestion is not None and output is None:
            write_result(f"Suggested recipe:\n\n{done.suggestion.recipe}", None)
    for path in (html, output):
        if path is not None:
            print_unless_quiet(f"Written: {path}")


def _numbers(option: str, text: str) -> tuple[float, ...]:
    from nestify.errors import RecipeError

    try:
        return tuple(float(part) for part in text.split(","))
    except ValueError:
        raise RecipeError(f"{option} {text}: give numbers between 0 and 1, such as 0.5,0.9") from None


def _parts(text: str) -> list[Part]:
    from nestify.errors import RecipeError

    parts: list[Part] = [part for part in get_args(Part) if part in text.split(",")]
    if unknown := set(text.split(",")) - set(parts):
        raise RecipeError(f"--only {', '.join(sorted(unknown))}: give some of {', '.join(get_args(Part))}")
    return parts
