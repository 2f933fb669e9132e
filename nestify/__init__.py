"""nestify: n networks of different size in one set of weights, in one file."""

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from nestify.api import Evaluation, Result, compress, evaluate, load, plan
    from nestify.nested_model import NestedModel
    from nestify.recipe import Recipe, load_recipe
    from nestify.report.document import read_report

__version__ = "0.1.0"

_HOME = {
    "compress": "nestify.api",
    "evaluate": "nestify.api",
    "load": "nestify.api",
    "plan": "nestify.api",
    "Evaluation": "nestify.api",
    "Result": "nestify.api",
    "NestedModel": "nestify.nested_model",
    "Recipe": "nestify.recipe",
    "load_recipe": "nestify.recipe",
    "read_report": "nestify.report.document",
}

__all__ = [
    "Evaluation",
    "NestedModel",
    "Recipe",
    "Result",
    "__version__",
    "compress",
    "evaluate",
    "load",
    "load_recipe",
    "plan",
    "read_report",
]


def __getattr__(name: str) -> object:
    """Import on first use: the command line must answer without waiting for torch."""
    if name not in _HOME:
        raise AttributeError(f"module 'nestify' has no attribute {name!r}")
    from importlib import import_module

    return getattr(import_module(_HOME[name]), name)
