"""nestify: n networks of different size in one set of weights, in one file."""

import ast
from importlib import import_module
from pathlib import Path

from nestify.shown import Shown

__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))

_MODULES = {
    alias.name: statement.module
    for statement in _STUB.body
    if isinstance(statement, ast.ImportFrom) and statement.module
    for alias in statement.names
}
"""The module of each public name, as imported by the stub, which type checkers also read."""

__all__ = [*_MODULES, "__version__"]  # noqa: PLE0604  # all of them strings


def __getattr__(name: str) -> object:
    """Import a public name when it is first used, so that the command line starts without torch."""
    if name not in _MODULES:
        raise AttributeError(f"module 'nestify' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)


def __dir__() -> list[str]:
    """Return the public names, also those that are not imported yet, and Python's own names of a module."""
    return sorted([*__all__, *(name for name in globals() if name.startswith("__") and name not in __all__)])


Shown.as_text = lambda result: import_module("nestify.report.results").result_text(result)
Shown.as_html = lambda result: import_module("nestify.report.results").result_html(result)
