"""How much a command tells of itself on standard error: --quiet, --verbose."""

import logging
import sys
from collections.abc import Sequence
from contextvars import ContextVar
from enum import IntEnum


class Verbosity(IntEnum):
    """quiet: warnings and errors alone. verbose: also what libraries log, and progress every few seconds."""

    quiet = 0
    normal = 1
    verbose = 2


_WORDS = {
    "-q": Verbosity.quiet,
    "--quiet": Verbosity.quiet,
    "-v": Verbosity.verbose,
    "--verbose": Verbosity.verbose,
}

_now = ContextVar("verbosity", default=Verbosity.normal)


def verbosity() -> Verbosity:
    """How much the running command tells."""
    return _now.get()


def take_verbosity(words: Sequence[str]) -> list[str]:
    """Set it as a command line says, the last word counting.

    Returns:
        The words that are left.
    """
    found = [_WORDS[word] for word in words if word in _WORDS]
    _now.set(found[-1] if found else Verbosity.normal)
    if verbosity() is Verbosity.verbose:
        logging.basicConfig(level=logging.INFO, stream=sys.stderr, format="%(name)s: %(message)s", force=True)
    return [word for word in words if word not in _WORDS]
