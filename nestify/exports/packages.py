"""Optional packages that formats need, and the sentence that names a missing one."""

import importlib.util
from importlib import import_module
from typing import Any

from nestify.errors import RecipeError
from nestify.exports.draft import quiet


def import_package(name: str, format: str, extra: str, size: str = "") -> Any:
    """Import a package, or a module of one.

    Args:
        name: its name.
        format: the format that needs it.
        extra: the extra of nestify that installs it.
        size: its size when installed, such as "about 180 MB"; empty if it is small.

    Raises:
        RecipeError: if the package is missing, or cannot be imported.
    """
    try:
        with quiet():
            return import_module(name)
    except ImportError as error:
        package = name.partition(".")[0]
        reason = "" if importlib.util.find_spec(package) is None else f", which cannot be imported ({error})"
        sized = f" ({size})" if size else ""
        raise RecipeError(
            f"format {format} needs the package {package}{reason}; pip install 'nestify[{extra}]'{sized}"
        ) from error
