"""Writes a recipe as TOML with every key, defaults included. Does not import torch."""

import json
import re
from collections.abc import Iterator, Mapping

from pydantic import BaseModel

from nestify.errors import RecipeError
from nestify.recipe.recipe import Recipe


def recipe_toml(recipe: Recipe, *, defaults: bool = True) -> str:
    """Return a recipe as TOML; `load_recipe` reads an equal recipe from a file with this text.

    Args:
        recipe: the recipe.
        defaults: whether to write keys that have their default, too.

    Keys that are not set have the text "none". Relative paths are those of the recipe, so that the file must
    be saved in the current folder.

    Raises:
        RecipeError: if the recipe, read from JSON, has a null in model.kwargs, which TOML does not have.
    """
    return "\n".join(_table(recipe, "", "", defaults)).lstrip("\n") + "\n"


def _table(section: BaseModel, key: str, header: str, defaults: bool) -> Iterator[str]:
    """Yield the lines of a section: its header and its values, then the sections in it.

    Args:
        section: the section.
        key: dotted key of the section; "" for the recipe.
        header: line above the values; "" for the recipe.
        defaults: whether to write values that are defaults.
    """
    values = {
        name: value
        for name, field in type(section).model_fields.items()
        if (value := getattr(section, name)) != field.default or defaults
    }
    inner = {name: value for name, value in values.items() if _is_section(value)}
    if header:
        yield from ("", header)
    for name, value in values.items():
        if name not in inner:
            yield f"{name} = {_value(value, _join(key, name))}"
    for name, value in inner.items():
        path = _join(key, name)
        if isinstance(value, BaseModel):
            yield from _table(value, path, f"[{path}]", defaults)
        elif isinstance(value, Mapping):
            for each, table in value.items():
                yield from _table(table, _join(path, each), f"[{_join(path, each)}]", defaults)
        else:
            for table in value:
                yield from _table(table, path, f"[[{path}]]", defaults)


def _is_section(value: object) -> bool:
    items = list(value.values()) if isinstance(value, Mapping) else value
    if isinstance(items, list | tuple):
        return bool(items) and all(isinstance(item, BaseModel) for item in items)
    return isinstance(value, BaseModel)


def _join(key: str, name: str) -> str:
    return f"{key}.{_key(name)}" if key else _key(name)


def _key(name: str) -> str:
    return name if re.fullmatch(r"[A-Za-z0-9_-]+", name) else _text(name)


def _value(value: object, key: str) -> str:
    """Return a value as TOML, on one line.

    Args:
        value: the value; None at the top of a key becomes "none".
        key: dotted key of the value, for errors.
    """
    match value:
        case None:
            return _text("none")
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return _text(value)
        case Mapping():
            pairs = [f"{_key(name)} = {_inner(item, f'{key}.{_key(name)}')}" for name, item in value.items()]
            return f"{{ {', '.join(pairs)} }}" if pairs else "{}"
        case list() | tuple():
            return f"[{', '.join(_inner(item, key) for item in value)}]"
    raise AssertionError(f"{key} is no value of a recipe")


def _inner(value: object, key: str) -> str:
    """Return a value in a list or a table, where "none" would be a text."""
    if value is None:
        raise RecipeError(f"{key} has a null, which TOML does not have; add --json")
    return _value(value, key)


def _text(text: str) -> str:
    """Return a text in quotes; the escapes of JSON are among those of TOML, which also escapes U+007F."""
    return json.dumps(text, ensure_ascii=False).replace("\x7f", "\\u007f")
