"""`nestify push`: upload a nested file and its model card to the hub."""

import sys
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestify.cli.arguments import AsJson
from nestify.cli.card import BaseModel, Dataset, License

if TYPE_CHECKING:
    from nestify.hub.push import Pushed

SCHEMA_VERSION = 1


def push(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_FOLDER",
            help="Nested file (a path or an address), or a folder that nestify card wrote.",
            show_default=False,
        ),
    ],
    repo: Annotated[
        str, typer.Argument(metavar="OWNER/REPO", help="Repository on the hub.", show_default=False)
    ],
    private: Annotated[bool, typer.Option("--private", help="Nobody else may see the repository.")] = False,
    license: License = None,
    base_model: BaseModel = None,
    dataset: Dataset = None,
    as_json: AsJson = False,
) -> None:
    """Upload a nested file with a model card to the Hugging Face hub.

    The repository is created if it does not exist; README.md, config.json and the nested file in it are
    replaced, as one commit. To edit the card first, write the folder with nestify card and push the folder.
    Log in with hf auth login, or set HF_TOKEN.
    """
    from nestify.cli.output import Verbosity, json_text, verbosity, write_result
    from nestify.hub.push import push as run
    from nestify.report.results import pushed_lines
    from nestify.terminal import is_terminal
    from nestify.text import printable

    done = run(
        file,
        repo,
        private=private,
        license=license,
        base_model=base_model,
        dataset=dataset,
        bars=is_terminal(sys.stderr) and verbosity() is not Verbosity.quiet,
    )
    text = "\n".join(map(printable, pushed_lines(done))) + "\n"
    write_result(json_text(_document(done)) if as_json else text, None)


def _document(done: "Pushed") -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "source": done.source,
        "repo": done.repo,
        "url": done.url,
        "commit": done.commit,
        "private": done.private,
        "address": done.address,
        "license": done.license,
        "levels": [{"level": number, "name": name} for number, name in enumerate(done.levels, start=1)],
    }
