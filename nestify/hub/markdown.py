"""Untrusted text in Markdown: names of a file that are shown as they are, whatever characters they have."""

import re

from nestify.text import printable

_PUNCTUATION = re.compile(r"[\\`*{}\[\]<>()#+!|~$&=^\"@]|(?<![^\W_])_|_(?![^\W_])")
"""Characters that can begin or end something in Markdown or HTML; an underscore within a word cannot."""


def literal(text: str) -> str:
    """Return a text as one line of Markdown that shows exactly this text.

    Every character that Markdown, its tables, HTML or formulas could read as their own gets a backslash.
    Characters that are not visible are escaped, and a long text is cut, as everywhere else.
    """
    return _PUNCTUATION.sub(r"\\\g<0>", printable(text))


def fenced(language: str, text: str) -> str:
    """Return lines of code as a block, with a fence that is longer than any within the text."""
    longest = max((len(run) for run in re.findall("`+", text)), default=0)
    fence = "`" * max(3, longest + 1)
    return f"{fence}{language}\n{text}\n{fence}"
