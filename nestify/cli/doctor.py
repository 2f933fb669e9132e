"""`nestify doctor`: what this machine has of what nestify needs."""

import json
import sys
from typing import TYPE_CHECKING

from nestify.cli.arguments import AsJson

if TYPE_CHECKING:
    from nestify.doctor import Diagnosis
    from nestify.report.sheet import Sheet


def doctor(
    as_json: AsJson = False,
) -> None:
    """Show versions, devices, and what is missing for which extra; exit with 3 if nestify cannot work.

    Nothing is changed, and no network is used.
    """
    from nestify.cli.output import render, write_result
    from nestify.doctor import diagnose
    from nestify.errors import SetupError

    found = diagnose()
    if as_json:
        write_result(json.dumps(found.to_dict(), indent=2) + "\n", None)
    else:
        title = f"nestify {found.nestify}, Python {found.python}, {found.platform}"
        write_result(render(title, _sheets(found), _notes(found), sys.stdout), None)
    if found.problems:
        names = ", ".join(f"{package.name} ({package.state})" for package in found.problems)
        raise SetupError(f"nestify does not work here: {names}; see the remedies above")


def _sheets(found: "Diagnosis") -> "list[Sheet]":
    from nestify.report.sheet import Column, Sheet
    from nestify.report.table import mebibytes

    packages = found.packages
    return [
        Sheet(
            [
                Column("package", [package.name for package in packages], is_text=True),
                Column("version", [package.version or "-" for package in packages], is_text=True),
                Column("needs", [package.needs or "any" for package in packages], is_text=True, rank=2),
                Column("for", [package.extra or "nestify" for package in packages], is_text=True, rank=1),
                Column("state", [package.state for package in packages], is_text=True),
            ]
        ),
        Sheet(
            [
                Column("device", [device.name for device in found.devices], is_text=True),
                Column("model", [device.model for device in found.devices], is_text=True),
                Column(
                    "memory MiB",
                    ["-" if d.memory_bytes is None else mebibytes(d.memory_bytes) for d in found.devices],
                ),
                Column(
                    "bfloat16", ["yes" if d.bfloat16 else "no" for d in found.devices], is_text=True, rank=1
                ),
            ]
        ),
    ]


def _notes(found: "Diagnosis") -> list[str]:
    remedies = [f"{p.name} ({p.extra or 'nestify'}): {p.remedy}" for p in found.packages if p.remedy]
    return [*remedies, *(f"{name}: {value}" for name, value in found.environment.items())]
