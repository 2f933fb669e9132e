"""The JSON Schema of recipe files, generated from the fields of `Recipe`. Does not import torch.

After a change of a field, write the published file again (a test compares them):

    python -m nestify recipe schema > nestify/recipe/recipe.schema.json
"""

import json
from collections.abc import Iterator
from typing import Any

from nestify.recipe.recipe import Recipe

Schema = dict[str, Any]

DRAFT = "https://json-schema.org/draft/2020-12/schema"

_OF_FILES: Schema = {
    "extends": {
        "description": "recipe that this one builds on: a .toml file next to it, or a built-in recipe",
        "minLength": 1,
        "type": "string",
    },
    "matrix": {
        "additionalProperties": {
            "minItems": 1,
            "minProperties": 1,
            "type": ["array", "object"],
            "uniqueItems": True,
        },
        "description": "lists of values by key, such as train.lr = [0.01, 0.03]; nestify batch runs every "
        "combination",
        "minProperties": 1,
        "type": "object",
    },
}
"""Keys of recipe files that are not fields of a recipe."""


def recipe_schema() -> Schema:
    """Return the JSON Schema of recipe files (draft 2020-12).

    No key is required: a flag, or a recipe that extends this one, may give it. Keys that may be unset also
    take the text "none". Rules that span several keys are not part of the schema; `nestify recipe check`
    checks them.
    """
    schema = Recipe.model_json_schema()
    for section in [schema, *schema["$defs"].values()]:
        for key in ("title", "required"):
            section.pop(key, None)
        for field in section["properties"].values():
            field.pop("title", None)
            if "default" in field and field["default"] is None:
                del field["default"]  # TOML has no null
                forms = "anyOf" if "anyOf" in field else "oneOf"
                field[forms] = list(_with_none(field[forms]))
    schema["properties"]["level"].pop("default")  # depends on schedule.kind
    schema["properties"] |= _OF_FILES
    description = "A recipe of nestify: everything that one run of nestify compress does."
    return {"$schema": DRAFT, "title": "nestify recipe", **schema, "description": description}


def schema_text() -> str:
    """Return the schema as JSON, as it is published in the package."""
    return json.dumps(recipe_schema(), indent=2) + "\n"


def _with_none(forms: list[Schema]) -> Iterator[Schema]:
    """Yield the forms of an optional value, with the text "none" before JSON's null."""
    for form in forms:
        if form.get("type") == "null":
            yield {"const": "none"}
        yield form
