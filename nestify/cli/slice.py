"""`nestify slice`: write the first levels of a nested file as a nested file."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestify.cli.arguments import AsJson, NestedFileOrAddress

if TYPE_CHECKING:
    from nestify.file.slicing import Progress, Sliced

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
    from nestify.cli.output import write_result
    from nestify.errors import RecipeError
    from nestify.file.slicing import slice_file, upgrade_slice
    from nestify.report.results import sliced_lines
    from nestify.text import printable

    if (output is None) == (upgrade is None):
        raise RecipeError(
            "give either --output, to write a new slice, or --upgrade, to add levels to an existing one"
        )
    with _progress_bar() as progress:
        if output is not None:
            done = slice_file(file, level, output, progress=progress)
        else:
            assert upgrade is not None
            done = upgrade_slice(file, level, upgrade, progress=progress)
    text = "\n".join(map(printable, sliced_lines(done))) + "\n"
    write_result(json.dumps(_document(done), indent=2) + "\n" if as_json else text, None)


@contextmanager
def _progress_bar() -> "Iterator[Progress]":
    """Show a progress bar on standard error if it is a terminal; yields the callback that moves the bar."""
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TimeRemainingColumn, TransferSpeedColumn

    console = Console(stderr=True)
    columns = (BarColumn(bar_width=20), DownloadColumn(True), TransferSpeedColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


def _document(done: "Sliced") -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "source": done.source,
        "path": str(done.path),
        "levels": [{"level": number, "name": name} for number, name in enumerate(done.levels, start=1)],
        "bytes_written": done.bytes_written,
        "bytes_read": done.bytes_read,
    }
