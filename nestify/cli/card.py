"""`nestify card`: write the folder of a repository on the hub, with a model card."""

from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestify.cli.arguments import AsJson, NestedFileOrAddress

if TYPE_CHECKING:
    from nestify.hub.folder import Card

SCHEMA_VERSION = 1

License = Annotated[
    str | None,
    typer.Option(
        "--license", metavar="ID", help="Licence, by the hub's identifier.", show_default="not stated"
    ),
]
BaseModel = Annotated[
    str | None,
    typer.Option(
        "--base-model",
        metavar="OWNER/NAME",
        help="Model on the hub that it was made from.",
        show_default=False,
    ),
]
Dataset = Annotated[
    str | None,
    typer.Option(
        "--dataset",
        metavar="OWNER/NAME",
        help="Data set on the hub that it was trained and validated on.",
        show_default=False,
    ),
]


def card(
    file: NestedFileOrAddress,
    output: Annotated[Path, typer.Option("-o", "--output", help="New folder to write.", show_default=False)],
    repo: Annotated[
        str | None,
        typer.Option(
            "--repo",
            metavar="OWNER/REPO",
            help="Repository, for the commands in the card.",
            show_default=False,
        ),
    ] = None,
    license: License = None,
    base_model: BaseModel = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
) -> None:
    """Write the folder of a repository on the Hugging Face hub.

    It holds the nested file, README.md with a model card, and config.json. Accuracies by class (nestify eval
    --save) and latencies (nestify bench --save) that are stored next to the file are in the card. Edit it as
    you like, then upload the folder with nestify push.
    """
    from nestify.cli.output import Verbosity, json_text, verbosity, write_result
    from nestify.hub.folder import write_card
    from nestify.report.results import card_lines
    from nestify.terminal import progress_bar
    from nestify.text import printable

    with progress_bar("bytes", hidden=verbosity() is Verbosity.quiet) as progress:
        done = write_card(
            file,
            output,
            repo=repo,
            license=license,
            base_model=base_model,
            dataset=dataset,
            progress=progress,
        )
    text = "\n".join(map(printable, card_lines(done))) + "\n"
    write_result(json_text(_document(done)) if as_json else text, None)


def _document(done: "Card") -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "source": done.source,
        "folder": str(done.folder),
        "file": done.file,
        "bytes": done.bytes,
        "sha256": done.sha256,
        "levels": [{"level": number, "name": name} for number, name in enumerate(done.levels, start=1)],
        "repo": done.options.repo,
        "license": done.options.license,
        "base_model": done.options.base_model,
        "dataset": done.options.dataset,
    }
