"""Results that are shown as tables by Python and by notebooks.

The tables are made in `report/`, which is above the rooms of most results. The package therefore says once,
in its `__init__`, where they are made.
"""

from collections.abc import Callable
from typing import ClassVar


class Shown:
    """Base class of results: `repr` is one screen of text, and notebooks show it as HTML."""

    as_text: ClassVar[Callable[[object], str]]
    as_html: ClassVar[Callable[[object], str]]

    def __repr__(self) -> str:
        return Shown.as_text(self)

    def _repr_html_(self) -> str:
        return Shown.as_html(self)
