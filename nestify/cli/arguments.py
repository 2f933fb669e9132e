"""Arguments that several commands have."""

import re
from typing import Annotated

import typer

from nestify.errors import RecipeError

NestedFileOrAddress = Annotated[
    str,
    typer.Argument(
        metavar="FILE_OR_URL",
        help="Nested file: a path, https://..., or hf://owner/repo/file.",
        show_default=False,
    ),
]


AsJson = Annotated[bool, typer.Option("--json", help="Print one JSON document.")]

Device = Annotated[str, typer.Option("--device", help="auto, cpu, cuda, cuda:1, mps.")]


def whole_numbers(option: str, text: str) -> list[int]:
    """Numbers as users write them, `1` or `1,16`.

    Raises:
        RecipeError: if the text is none.
    """
    words = [word.strip() for word in text.split(",")]
    if not all(re.fullmatch("0*[1-9][0-9]{0,8}", word) for word in words):
        raise RecipeError(
            f"{option} {text!r} is not understood; give whole numbers above 0, one (1) or several (1,16)"
        )
    return [int(word) for word in words]
