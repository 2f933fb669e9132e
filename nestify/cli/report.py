"""`nestify report`: what a nested file holds, without data and without torch."""

import json
import sys
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from nestify.cli.arguments import NestedFileOrAddress


class Format(StrEnum):
    """How the report is printed."""

    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"


def report(
    file: NestedFileOrAddress,
    format: Annotated[Format, typer.Option("--format", help="How to print it.")] = Format.table,
    as_json: Annotated[bool, typer.Option("--json", help="The same as --format json.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show the density of every layer too.")] = False,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write to this file.", show_default="stdout")
    ] = None,
) -> None:
    """Show the levels of a nested file: parameters, MACs, bytes, accuracy.

    Dense MACs are what dense kernels execute, effective MACs what would be left if every zero were skipped
    at no cost, prefix MiB what a device must load to run the level. --format html makes one page with
    charts, every layer and the recipe; it needs no network and no script.
    """
    from nestify.cli.output import render, render_markdown, write_result
    from nestify.report.document import read_report
    from nestify.report.table import layer_table, report_notes, report_table

    data = read_report(file)
    if as_json or format is Format.json:
        write_result(json.dumps(data.to_dict(layers=layers), indent=2) + "\n", output)
        return
    if format is Format.html:
        from nestify.report.html.page import html_page

        write_result(html_page(data), output)
        return
    title = f"{data.architecture}, {data.num_classes} classes, input {'x'.join(map(str, data.input_size))}"
    sheets = [report_table(data), layer_table(data)] if layers else [report_table(data)]
    notes = report_notes(data)
    if format is Format.markdown:
        write_result(render_markdown(title, sheets, notes), output)
    else:
        write_result(render(title, sheets, notes, None if output else sys.stdout), output)
