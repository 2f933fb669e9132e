"""`nestify guide`: show the manual at the terminal."""

import io
import re
import sys
from difflib import get_close_matches
from importlib.resources import files
from typing import Annotated

import typer

_PAGE_LINK = re.compile(r"\[([^\]]+)\]\(([\w-]+)\.md(?:#[\w-]*)?\)")
_ANCHOR_LINK = re.compile(r"\[([^\]]+)\]\(#[\w-]+\)")

ORDER = (
    *(
        "first-model",
        "levels",
        "classes",
        "recipes",
        "recipe-reference",
        "images",
        "training",
        "own-loop",
        "resuming",
    ),
    *("evaluating", "shipping", "engine", "ci", "clusters", "python", "numbers", "formats"),
)
"""Topics in the order in which a new user needs them."""


def _complete_topic(incomplete: str) -> list[str]:
    """Return the topics that a shell may complete a word to."""
    return [topic for topic in ORDER if topic.startswith(incomplete)]


def guide(
    topic: Annotated[
        str | None,
        typer.Argument(
            metavar="TOPIC",
            help="Page to show; without it, the topics are listed.",
            show_default=False,
            autocompletion=_complete_topic,
        ),
    ] = None,
) -> None:
    """Show a page of the manual, or list its topics.

    If standard output is not a terminal, the page is printed as plain Markdown.
    """
    from nestify.cli.output import write_result
    from nestify.errors import RecipeError
    from nestify.report.sheet import Column, Sheet
    from nestify.report.text import render
    from nestify.terminal import is_terminal

    if topic is None:
        columns = [
            Column("topic", list(ORDER), is_text=True),
            Column("", [summary(page(name)) for name in ORDER], is_text=True),
        ]
        notes = ["nestify guide TOPIC shows a page; nestify COMMAND --help lists the options of a command."]
        write_result(render("The nestify guide", [Sheet(columns)], notes, sys.stdout), None)
        return
    if topic not in ORDER:
        near = get_close_matches(topic.lower(), ORDER, n=1)
        remedy = f"did you mean {near[0]}?" if near else f"the topics are {', '.join(ORDER)}"
        raise RecipeError(f"the guide has no topic {topic!r}; {remedy}")
    write_result(_for_terminal(page(topic)) if is_terminal(sys.stdout) else page(topic), None)


def page(topic: str) -> str:
    """Return a page of the guide as Markdown."""
    return (files("nestify") / "guide" / f"{topic}.md").read_text(encoding="utf-8")


def summary(text: str) -> str:
    """Return the first sentence of a page below its title, in one line."""
    paragraph = text.split("\n\n")[1].replace("\n", " ").replace("`", "")
    return re.split(r"(?<=[.?]) ", paragraph)[0]


def _for_terminal(text: str) -> str:
    """Lay a page out for the terminal; links to other pages become the commands that show them."""
    from rich.console import Console
    from rich.markdown import Markdown

    text = _PAGE_LINK.sub(r"\1 (`nestify guide \2`)", _ANCHOR_LINK.sub(r"\1", text))
    terminal = Console(file=sys.stdout)
    buffer = io.StringIO()
    console = Console(file=buffer, width=terminal.width, force_terminal=True, color_system="auto")
    console.print(Markdown(text, code_theme="ansi_dark", hyperlinks=False))
    return "".join(f"{line.rstrip()}\n" for line in buffer.getvalue().splitlines())
