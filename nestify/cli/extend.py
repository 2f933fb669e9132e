"""`nestify extend`: add higher levels to a nested file."""

from functools import partial
from typing import Annotated

import typer

from nestify.cli.arguments import AsJson, NestedFileOrAddress, Settings
from nestify.cli.compress import show_run
from nestify.cli.flags import with_recipe_flags
from nestify.recipe.extension import SET_BY_FILE
from nestify.recipe.flags import Panel
from nestify.recipe.sources import parse_setting


@partial(with_recipe_flags, leave_out=SET_BY_FILE)
def extend(
    file: NestedFileOrAddress,
    *,
    levels: Annotated[
        str,
        typer.Option(
            "--levels",
            help="The levels to add above the highest one, in the quantity of the file's schedule: 0, or "
            "0.5,0 (sparsities, or N:M patterns); 0.75,1 (widths or depths).",
            rich_help_panel=Panel.levels,
            show_default=False,
        ),
    ],
    settings: Settings = None,
    resume: Annotated[
        bool | None,
        typer.Option(
            "--resume/--restart",
            help="Resume from the checkpoint of an interrupted run, or start again. By default the run "
            "resumes if there is a checkpoint.",
            show_default=False,
        ),
    ] = None,
    as_json: AsJson = False,
    overrides: dict[str, object],
) -> None:
    """Add higher levels to a nested file that does not end at a full level, such as a slice.

    The file's own levels stay as they are, bit for bit. Devices that have them fetch only the new bytes, with
    slice --upgrade. The new levels learn around them from the weights of the original model (--checkpoint).
    Options that are not given have the values of the run that made the file. The result is a new file,
    NAME.extended.nested.safetensors by default.
    """
    from nestify.compression.extend import extend as start

    overrides |= dict(parse_setting(text) for text in settings or [])
    show_run(lambda observer: start(file, levels, overrides, observer=observer, resume=resume), as_json)
