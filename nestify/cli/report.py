"""`nestify report`: show the contents of a nested file, without data and without torch."""

import sys
from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, TextIO

import typer

from nestify.cli.arguments import NestedFileOrAddress, choice_option
from nestify.errors import RecipeError

if TYPE_CHECKING:
    from nestify.evaluation.gates import GateResult
    from nestify.file.summary import Report


class ReportFormat(StrEnum):
    """Formats of a report."""

    table = "table"
    json = "json"
    markdown = "markdown"
    html = "html"


def report(
    file: NestedFileOrAddress,
    format: Annotated[
        ReportFormat, choice_option(ReportFormat, "--format", help="Format of the report.")
    ] = ReportFormat.table,
    as_json: Annotated[bool, typer.Option("--json", help="Same as --format json.")] = False,
    layers: Annotated[bool, typer.Option("--layers", help="Show the density of every layer too.")] = False,
    other: Annotated[
        str | None,
        typer.Option(
            "--compare",
            metavar="OTHER",
            help="Show the changes from another nested file, or from a stored report --json of one.",
        ),
    ] = None,
    check: Annotated[
        str | None,
        typer.Option(
            "--check",
            metavar="GATES",
            help="Check levels against the [gates] of a TOML file or recipe; exit with 1 if they miss one.",
        ),
    ] = None,
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="Write to this file.", show_default="stdout")
    ] = None,
) -> None:
    """Show the levels of a nested file: parameters, MACs, bytes, accuracy.

    Dense MACs are what dense kernels execute, effective MACs what would be left if every zero were skipped
    at no cost, and prefix MiB what a device must load to run the level. Latencies that nestify bench --save
    stored next to the file are shown too. Instead of a nested file, the output of report --json can be given,
    stored as a .json file. --format html writes a nested file's report as one page with charts, every layer
    and the recipe; the page needs no network and no scripts.
    """
    from nestify.cli.output import json_text, refuse_missed, write_result
    from nestify.evaluation.gates import check_gates
    from nestify.file.summary import open_report
    from nestify.files import check_apart
    from nestify.recipe.gates import load_gates

    if output is not None:
        read = {"the nested file itself": file, "the file to compare with": other, "the file of gates": check}
        check_apart(output, read)
    if as_json and format not in (ReportFormat.table, ReportFormat.json):
        raise RecipeError(f"--json and --format {format} exclude each other; leave one of them out")
    gates = load_gates(check, compared=other is not None) if check else None
    data = open_report(file)
    baseline = open_report(other) if other else None
    results = check_gates(gates, data, baseline) if gates else []
    format = ReportFormat.json if as_json else format
    if format is ReportFormat.html and file.endswith(".json"):
        raise RecipeError(
            f"{file}: a stored report lacks some of what --format html shows; give the nested file instead"
        )
    if format is ReportFormat.json:
        text = json_text(_document(data, baseline, results, layers, bool(gates)))
    elif format is ReportFormat.html:
        text = _page(data, baseline, results)
    else:
        text = _text(data, baseline, results, layers, None if output else sys.stdout, format)
    write_result(text, output)
    refuse_missed(data.path, results)


def _document(
    data: "Report", other: "Report | None", results: "list[GateResult]", layers: bool, checked: bool
) -> dict[str, Any]:
    """Return the report as JSON values, with the comparison and the gates if requested."""
    from nestify.cli.output import gates_document
    from nestify.report.compare import compare

    document = data.to_dict(layers=layers)
    if other is not None:
        document["comparison"] = compare(data, other).to_dict()
    return {**document, **gates_document(results)} if checked else document


def _page(data: "Report", other: "Report | None", results: "list[GateResult]") -> str:
    """Return the report as HTML, with everything that is stored next to the file, gates and changes."""
    from nestify.cli.output import gates_sheets
    from nestify.file.class_accuracy import SavedAccuracy, read_class_accuracy
    from nestify.file.history import read_history
    from nestify.file.reader import open_nested_file
    from nestify.report.bench import bench_sheets, noise_notes
    from nestify.report.compare import compare, comparison_notes, comparison_tables
    from nestify.report.html.page import PageSection, html_page

    problem = [data.measured_problem] if data.measured_problem else []
    latency = bench_sheets(data, data.measured), noise_notes(data, data.measured) + problem
    sections = [
        PageSection("latency", "Latency", *latency),
        PageSection("gates", "Gates", gates_sheets(results)),
    ]
    if other is not None:
        comparison = compare(data, other)
        tables = comparison_tables(comparison, layers=True)
        notes = comparison_notes(comparison, layers=True)
        sections.append(PageSection("changes", "What changed", tables, notes))
    is_local = Path(data.path).is_file()
    evaluated = read_class_accuracy(open_nested_file(data.path)) if is_local else SavedAccuracy()
    return html_page(data, sections, read_history(data), evaluated)


def _text(
    data: "Report",
    other: "Report | None",
    results: "list[GateResult]",
    layers: bool,
    stream: TextIO | None,
    format: ReportFormat,
) -> str:
    """Return the report as text or Markdown: the levels or their changes, and the gates."""
    from nestify.cli.output import gates_sheets
    from nestify.report.bench import bench_sheets, noise_notes
    from nestify.report.compare import compare, comparison_notes, comparison_tables
    from nestify.report.table import layer_table, report_notes, report_table, report_title
    from nestify.report.text import render, render_markdown

    title = report_title(data)
    if other is None:
        sheets = [report_table(data), *bench_sheets(data, data.measured)]
        sheets += [layer_table(data)] if layers else []
        notes = report_notes(data) + noise_notes(data, data.measured)
        notes += [data.measured_problem] if data.measured_problem else []
    else:
        comparison = compare(data, other)
        sheets = comparison_tables(comparison, layers=layers)
        notes = comparison_notes(comparison, layers=layers)
    sheets += gates_sheets(results)
    if format is ReportFormat.markdown:
        return render_markdown(title, sheets, notes)
    return render(title, sheets, notes, stream)
