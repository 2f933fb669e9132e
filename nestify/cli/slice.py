"""`nestify slice`: write the first levels of a nested file as a nested file."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestify.cli.arguments import AsJson, NestedFileOrAddress

if TYPE_CHECKING:
    from nestify.file.slicing import Sliced

SCHEMA_VERSION = 1


def slice_levels(
    file: NestedFileOrAddress,
    level: Annotated[
        str, typer.Option("--level", help="Highest level to keep, by number or name.", show_default=False)
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write the slice to this file.", show_default=False)
    ] = None,
    upgrade: Annotated[
        Path | None,
        typer.Option("--upgrade", help="Add the missing levels to this slice.", show_default=False),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write levels 1 to K of a nested file as a nested file.

    Only the header and these levels are read, from disk or by range requests.
    """
    from nestify.cli.output import Verbosity, json_text, verbosity, write_result
    from nestify.errors import RecipeError
    from nestify.file.slicing import slice_file, upgrade_slice
    from nestify.report.results import sliced_lines
    from nestify.terminal import progress_bar
    from nestify.text import printable

    if (output is None) == (upgrade is None):
        raise RecipeError(
            "give either --output, to write a new slice, or --upgrade, to add levels to an existing one"
        )
    with progress_bar("bytes", hidden=verbosity() is Verbosity.quiet) as progress:
        if output is not None:
            done = slice_file(file, level, output, progress=progress)
        else:
            assert upgrade is not None
            done = upgrade_slice(file, level, upgrade, progress=progress)
    text = "\n".join(map(printable, sliced_lines(done))) + "\n"
    write_result(json_text(_document(done)) if as_json else text, None)


def _document(done: "Sliced") -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "source": done.source,
        "path": str(done.path),
        "levels": [{"level": number, "name": name} for number, name in enumerate(done.levels, start=1)],
        "bytes_written": done.bytes_written,
        "bytes_read": done.bytes_read,
    }
