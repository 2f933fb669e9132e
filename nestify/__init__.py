"""nestify: n networks of different size in one set of weights, in one file."""

import ast
from importlib import import_module
from pathlib import Path

__version__ = "0.1.0"

_STUB = ast.parse(Path(__file__).with_suffix(".pyi").read_text(encoding="utf-8"))

_HOME = {
    alias.name: statement.module
    for statement in _STUB.body
    if isinstance(statement, ast.ImportFrom) and statement.module
    for alias in statement.names
}
"""Module of each public name, as the stub imports it, which type checkers read too."""

__all__ = [*_HOME, "__version__"]  # noqa: PLE0604  # all of them texts


def __getattr__(name: str) -> object:
    """Import a public name when it is first used: the command line must not wait for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'nestify' has no attribute {name!r}")
    return getattr(import_module(_HOME[name]), name)


def __dir__() -> list[str]:
    """Names of the module, with the public ones that are not imported yet."""
    return sorted({*globals(), *__all__})
