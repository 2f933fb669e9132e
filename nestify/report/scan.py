"""What `scan` measured, as tables and as one JSON document. No torch here."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Any

from nestify.report.sheet import Column, Sheet
from nestify.report.table import quantity
from nestify.report.text import Screen

if TYPE_CHECKING:
    from nestify.compression.candidates import Change
    from nestify.compression.scan import Scan

SCHEMA_VERSION = 1

PARTS = {
    "weight": ("Sparse layers", "layer", "sparsity"),
    "channel": ("Narrower groups of channels", "first layer of the group", "width"),
    "layer": ("Skipped blocks", "block", ""),
}
"""By the kind of change: title of its table, what a row is, and what its amounts are."""


def scan_screen(scan: "Scan") -> Screen:
    """Return title, tables and notes of a scan."""
    size = f"{quantity(scan.parameters)} parameters, {quantity(scan.macs)} MACs"
    return Screen(f"{scan.model}: {size}", scan_sheets(scan), scan_notes(scan))


def scan_sheets(scan: "Scan") -> list[Sheet]:
    """Return a table for each kind of change, whose rows are in the order of execution."""
    return [
        _sheet(kind, by_name)
        for kind in PARTS
        if (by_name := group_by_name([change for change in scan.changes if change.kind == kind]))
    ]


def group_by_name(changes: "Sequence[Change]") -> "dict[str, dict[float, Change]]":
    """Return the changes by name and amount."""
    found: dict[str, dict[float, Change]] = {}
    for change in changes:
        found.setdefault(change.name, {})[change.amount] = change
    return found


def _sheet(kind: str, by_name: "Mapping[str, Mapping[float, Change]]") -> Sheet:
    title, subject, axis = PARTS[kind]
    amounts = sorted({amount for row in by_name.values() for amount in row}, reverse=kind == "channel")
    last = [row.get(amounts[-1]) for row in by_name.values()]
    at = f" at {axis} {amounts[-1]:g}" if axis else ""
    columns = [Column(subject, list(by_name), is_text=True)]
    for amount in amounts:
        cells = [_percent(row.get(amount)) for row in by_name.values()]
        columns.append(Column(f"agreement % {axis} {amount:g}".removesuffix(" 0").rstrip(), cells))
    columns += [
        Column(f"divergence{at}", [f"{c.measured.divergence:.4f}" if c else "-" for c in last], rank=1),
        Column(f"MACs saved{at}", [quantity(c.macs) if c else "-" for c in last], rank=2),
        Column(f"parameters saved{at}", [quantity(c.parameters) if c else "-" for c in last], rank=3),
    ]
    return Sheet(columns, title)


def _percent(change: "Change | None") -> str:
    return "-" if change is None else f"{change.measured.agreement:.1f}"


def scan_notes(scan: "Scan") -> list[str]:
    """Return the sentences below the tables."""
    notes = [
        f"Agreement: share of {scan.images} images whose predicted class is still the original model's; "
        "divergence: KL divergence from its predictions, in nats. Each change is measured alone, without "
        "training, after least squares.",
    ]
    if scan.original.top1 is not None:
        notes.append(f"The original model's top-1 on these images: {scan.original.top1:.1f} %.")
    if any(change.kind == "weight" for change in scan.changes):
        notes.append("MACs that a sparse layer saves are those in theory: dense kernels multiply zeros too.")
    notes += scan.notes
    if scan.suggestion is not None:
        tried = ", ".join(
            f"{row.schedule} {row.measured.agreement:.1f} %" for row in scan.suggestion.tried if row.measured
        )
        notes.append(f"Core level at {scan.suggestion.budget}, agreement without training: {tried}.")
        notes += [f"{row.schedule}: {row.refused}." for row in scan.suggestion.tried if row.refused]
    return notes


def scan_document(scan: "Scan") -> dict[str, Any]:
    """Return a scan as plain JSON values."""
    return {"schema_version": SCHEMA_VERSION, **asdict(scan)}
