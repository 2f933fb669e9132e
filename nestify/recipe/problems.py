"""Problems of a recipe as sentences, with dotted keys, TOML values, ranges and the nearest known key.

Pydantic finds the problems; this module only words them, so that an option's type and range are in one place.
Does not import torch.
"""

import json
import re
from collections.abc import Iterator, Sequence, ValuesView
from difflib import get_close_matches
from typing import Any, NamedTuple, get_args, get_origin

from pydantic import BaseModel, Tag
from pydantic.fields import FieldInfo
from pydantic_core import ErrorDetails

from nestify.recipe.amounts import did_you_mean, percent_meant, share_meant

KeyPath = Sequence[str | int]
"""Path of a value, such as `("level", 0, "sparsity")`; positions count from 0 here, from 1 in sentences."""

DEEPEST = 32
"""Largest depth of tables and lists in a recipe; no option needs more than a few."""

_NOT_A = {
    "bool_type": "true or false",
    "dict_type": "a table",
    "finite_number": "a finite number",
    "float_type": "a number",
    "int_type": "a whole number",
    "list_type": "a list",
    "string_type": "a text in quotes",
    "tuple_type": "a list",
}


class Problem(NamedTuple):
    """One problem of a recipe: a sentence, and the dotted key that it is about."""

    key: str
    text: str


def dotted(path: KeyPath) -> str:
    """Return the dotted key of a path: `("level", 0, "sparsity")` -> `level[1].sparsity`."""
    text = ""
    for part in path:
        if isinstance(part, int):
            text += f"[{part + 1}]"
        else:
            bare = part if re.fullmatch(r"[\w-]+", part) else json.dumps(part, ensure_ascii=False)
            text += f".{bare}" if text else bare
    return text


def format_toml(value: object) -> str:
    """Format a value as TOML, cut if it is long."""
    if isinstance(value, float):
        return f"{value:.15g}"
    try:
        text = json.dumps(value, ensure_ascii=False, default=str)
    except ValueError:  # Python does not convert numbers of more than 4300 digits
        return "a number of thousands of digits"
    return text if len(text) <= 80 else f"{text[:77]}..."


def is_too_deep(value: object) -> bool:
    """Return whether tables and lists are nested more than `DEEPEST` deep; does not recurse."""
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inner if isinstance(items, list | ValuesView) for item in items]
    return bool(level)


def section_of(field: FieldInfo) -> type[BaseModel] | None:
    """Return the class of a section: TrainOptions for `[train]`, LevelOptions for `[[level]]`."""
    for candidate in (field.annotation, *get_args(field.annotation)):
        if isinstance(candidate, type) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _find_option(recipe: type[BaseModel], path: KeyPath) -> FieldInfo | None:
    """Return the deepest option on a path: augment.scale for `("augment", "scale", 1)`."""
    found: FieldInfo | None = None
    section: type[BaseModel] | None = recipe
    for part in _without_names(recipe, path):
        field = section.model_fields.get(part) if section else None
        if field is None:
            break
        found, section = field, section_of(field)
    return found


def _without_names(recipe: type[BaseModel], path: KeyPath) -> list[str]:
    """Return a path without list positions and names that users give (core in gates.level.core)."""
    keys: list[str] = []
    section: type[BaseModel] | None = recipe
    is_name = False
    for part in path:
        if isinstance(part, int) or is_name:
            is_name = False
            continue
        keys.append(part)
        field = section.model_fields.get(part) if section else None
        section = section_of(field) if field else None
        is_name = field is not None and get_origin(field.annotation) is dict and section is not None
    return keys


def sentence(recipe: type[BaseModel], error: ErrorDetails) -> Problem:
    """Turn one of pydantic's errors about a recipe into a problem."""
    path, value, context = error["loc"], error["input"], error.get("ctx", {})
    if error["type"] == "extra_forbidden":
        return Problem(dotted(path), _unknown(recipe, path))
    field = _find_option(recipe, path)
    key = dotted(_without_tag(path, field))
    hint = f" ({field.description})" if field and field.description else ""
    if error["type"] == "missing":
        return Problem(key, f"{key} is not given; set it in the recipe or as an option{hint}")
    subject = f"{key} = {format_toml(value)}"
    match error["type"]:
        case "value_error":
            predicate = str(context["error"])
        case "literal_error":
            predicate = f"is not {context['expected']}"
        case "string_too_short":
            predicate = f"is empty{hint}"
        case "greater_than" | "greater_than_equal" | "less_than" | "less_than_equal" if field:
            predicate = f"{_outside(field)}{hint}{_meant_number(field, value)}"
        case "model_type":
            header = f"[{path[0]}]" if len(path) == 1 else f"[[{path[0]}]]"
            predicate = f"is not a section; write {header} and its options below it"
        case "tuple_type" if field and section_of(field):
            subject, predicate = key, f"is not a list of sections; write [[{key}]] above each {key}"
        case kind if kind in _NOT_A:
            predicate = f"is not {_NOT_A[kind]}{hint}{_meant_number(field, value)}"
        case _:
            predicate = f"is wrong: {error['msg']}{hint}"
    return Problem(key, f"{subject} {predicate}")


def _without_tag(path: KeyPath, field: FieldInfo | None) -> KeyPath:
    """Return a path without the kind of value that pydantic adds where an option takes several kinds."""
    tags = [each.tag for each in (_constraints(field) if field else ()) if isinstance(each, Tag)]
    return path[:-1] if path[-1] in tags else path


def _outside(field: FieldInfo) -> str:
    """Say how a number is outside the range of its option: `is not in [0, 1)`, `is not above 0`."""
    limits: dict[str, object] = {}
    for constraint in _constraints(field):
        limits |= {
            name: getattr(constraint, name) for name in ("ge", "gt", "le", "lt") if hasattr(constraint, name)
        }
    text = {name: format_toml(limit) for name, limit in limits.items()}
    if "le" in text or "lt" in text:
        low = f"[{text['ge']}" if "ge" in text else f"({text['gt']}"
        high = f"{text['le']}]" if "le" in text else f"{text['lt']})"
        return f"is not in {low}, {high}"
    return f"is less than {text['ge']}" if "ge" in text else f"is not above {text['gt']}"


def _meant_number(field: FieldInfo | None, value: object) -> str:
    """Suggest a share in place of a percentage (10, `10%`), or the number where the option is in percent."""
    largest = [
        getattr(constraint, name)
        for constraint in (_constraints(field) if field else ())
        for name in ("le", "lt")
        if hasattr(constraint, name)
    ]
    if 1 in largest:
        return did_you_mean(share_meant(value))
    return did_you_mean(percent_meant(value)) if 100 in largest and isinstance(value, str) else ""


def _constraints(field: FieldInfo) -> Iterator[Any]:
    """Return the constraints of an option; those of `Annotated[...] | None` are inside the union."""
    yield from field.metadata
    for member in get_args(field.annotation):
        for item in getattr(member, "__metadata__", ()):
            yield from item.metadata if isinstance(item, FieldInfo) else (item,)


def _unknown(recipe: type[BaseModel], path: KeyPath) -> str:
    """Name an unknown key and the likely one: the same name elsewhere, or a similar name."""
    name, section = str(path[-1]), recipe
    for part in _without_names(recipe, path[:-1]):
        section = section_of(section.model_fields[part]) or section
    here = {option: dotted((*path[:-1], option)) for option in section.model_fields}
    elsewhere = _all_keys(recipe)
    near = [here[close] for close in get_close_matches(name, here, n=1)]
    near += [elsewhere[close] for close in get_close_matches(name, elsewhere, n=1)]
    meant = elsewhere.get(name) or next(iter(near), None)
    place = dotted(path[:-1]) or "a recipe"
    return f"unknown key {dotted(path)}; " + (
        f"did you mean {meant}?" if meant else f"{place} has {', '.join(here)}"
    )


def _all_keys(recipe: type[BaseModel]) -> dict[str, str]:
    """Return all options' dotted keys by their last part; if ambiguous, train wins and level loses."""
    keys: dict[str, str] = {}
    for outer in sorted(recipe.model_fields, key=lambda name: {"level": 0, "train": 2}.get(name, 1)):
        section = section_of(recipe.model_fields[outer])
        prefix = "[[level]] " if outer == "level" else f"{outer}."
        keys |= {name: f"{prefix}{name}" for name in section.model_fields} if section else {outer: outer}
    return keys
