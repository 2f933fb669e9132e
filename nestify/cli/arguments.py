"""Arguments that several commands have."""

from typing import Annotated

import typer

NestedFileOrAddress = Annotated[
    str,
    typer.Argument(
        metavar="FILE_OR_URL",
        help="Nested file: a path, https://..., or hf://owner/repo/file.",
        show_default=False,
    ),
]
