"""Generates the page of recipe keys from the fields of `Recipe`. Does not import torch.

After a change of a field, write the page again (a test compares them):

    python -c "from nestify.recipe.reference import recipe_reference; print(recipe_reference(), end='')" \
        > nestify/guide/recipe-reference.md
"""

import json
import re
from collections.abc import Iterator, Mapping
from typing import Any

from nestify.recipe.level_options import DEFAULT_LEVELS, QUANTITY
from nestify.recipe.recipe import Recipe

Schema = Mapping[str, Any]
"""JSON Schema of one field or one section, as pydantic writes it."""

_TYPES = {"boolean": "true or false", "integer": "whole number", "number": "number", "string": "text"}
_PLURALS = {"integer": "whole numbers", "number": "numbers", "string": "texts"}

_INTRODUCTION = """\
# Recipe reference

Every key of a recipe, with its type, its default and its meaning. [Recipes](recipes.md) explains how
recipes work.

This page is generated from the code. Keys are written as `--set` takes them: `train.epochs` is the key
`epochs` of the section `[train]`, and `level[1].weight` is the key `weight` of the first `[[level]]`. A
dash in the column of defaults means that the key is not set; the text `"none"` unsets a key that another
recipe has set. The files and folders that a run reads are relative to the recipe's folder, those that it
writes to the current folder.
"""


def recipe_reference() -> str:
    """Return the page as Markdown: one section per table of a recipe, one row per key."""
    schema = Recipe.model_json_schema()
    sections = list(_sections(schema, schema["$defs"]))
    contents = [f"- [{title}](#{_anchor(title)})" for title, _, _ in sections]
    pages = [f"## {title}\n\n{text}\n\n" + "\n".join(rows) + "\n" for title, text, rows in sections]
    return "\n".join([_INTRODUCTION, *contents, "", "\n".join(pages)])


def _sections(recipe: Schema, models: Mapping[str, Schema]) -> Iterator[tuple[str, str, list[str]]]:
    """Yield the heading, the explanation and the table's lines of every section."""
    yield (
        "Keys of no section",
        "These keys stand at the top of the file, before the first section.",
        _table(recipe, ""),
    )
    for name, field in recipe["properties"].items():
        model = _model_of(field, models)
        if model is None:
            continue
        is_list = field.get("type") == "array"
        title = f"`[[{name}]]`" if is_list else f"`[{name}]`"
        text = _sentence(model["description"].partition(": ")[2])
        if is_list:
            text += f" {_default_levels()}"
        yield title, text, _table(model, f"{name}[k]." if is_list else f"{name}.")
        for inner, inner_field in model["properties"].items():
            if by_name := _model_of(inner_field, models):
                prefix = f"{name}.{inner}.NAME"
                yield f"`[{prefix}]`", _sentence(inner_field["description"]), _table(by_name, f"{prefix}.")


def _model_of(field: Schema, models: Mapping[str, Schema]) -> Schema | None:
    """Return the section that a field holds, once, in a list or by name; None for an option."""
    for holder in (field, field.get("items"), field.get("additionalProperties")):
        if isinstance(holder, Mapping) and "$ref" in holder:
            return models[holder["$ref"].rpartition("/")[2]]
    return None


def _table(section: Schema, prefix: str) -> list[str]:
    lines = ["| key | type | default | meaning |", "|---|---|---|---|"]
    for name, field in section["properties"].items():
        if not re.search(r"\$ref", json.dumps(field)):
            default = "required" if name in section.get("required", []) else _default(field.get("default"))
            lines.append(
                f"| `{prefix}{name}` | {_type(field)} | {default} | {_escaped(field['description'])} |"
            )
    return lines


def _type(field: Schema) -> str:
    """Say in words what values a field takes: its choices, or its type and range."""
    if variants := field.get("anyOf") or field.get("oneOf"):
        kinds = [_type(each) for each in variants if each.get("type") != "null"]
        return (", or " if any("," in kind for kind in kinds[:-1]) else " or ").join(kinds)
    if "enum" in field or "const" in field:
        return ", ".join(f"`{json.dumps(choice)}`" for choice in field.get("enum", [field.get("const")]))
    kind = field.get("type")
    if kind == "array":
        if items := field.get("prefixItems"):
            return f"list of {len(items)} {_PLURALS[items[0]['type']]}"
        items = field["items"]
        return f"list of {_PLURALS[items['type']] if 'enum' not in items else _type(items)}"
    if kind == "object":
        return "table"
    return _TYPES[str(kind)] + _range(field)


def _range(field: Schema) -> str:
    low, high = field.get("minimum"), field.get("maximum")
    above, below = field.get("exclusiveMinimum"), field.get("exclusiveMaximum")
    if high is not None or below is not None:
        start = f"[{low}" if above is None else f"({above}"
        return f" in {start}, {f'{high}]' if below is None else f'{below})'}"
    if above is not None:
        return f" above {above}"
    return "" if low is None else f", at least {low}"


def _default(value: object) -> str:
    if value is None:
        return "-"
    return f"`{_toml(value)}`"


def _toml(value: object) -> str:
    if isinstance(value, list):
        return f"[{', '.join(map(_toml, value))}]"
    return f"{value:.5g}" if isinstance(value, float) else json.dumps(value)


def _default_levels() -> str:
    levels = [
        f"`{kind}`: {QUANTITY[kind]} {', '.join(f'{value:g}' for value in values)}"
        for kind, values in DEFAULT_LEVELS.items()
    ]
    return f"By default there are three levels, by `schedule.kind`: {'; '.join(levels)}."


def _sentence(text: str) -> str:
    text = text.rstrip(".")
    return f"{text[0].upper()}{text[1:]}."


def _escaped(text: str) -> str:
    """Escape what Markdown would read as a column, a tag or emphasis."""
    return re.sub(r"([|<*])", r"\\\1", text)


def _anchor(title: str) -> str:
    """Return a heading's anchor, as hosting sites make it."""
    return re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-")
