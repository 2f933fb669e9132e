"""Sources of a recipe: files, built-in recipes, `extends`, and overrides. Does not import torch.

The result is one table, as from TOML. Nothing here knows which keys exist, except those that hold paths, and
`level`.
"""

import json
import os
import re
import tomllib
from collections import Counter
from collections.abc import Mapping, Sequence
from copy import deepcopy
from importlib.resources import files
from pathlib import Path
from typing import Any

from nestify.errors import RecipeError
from nestify.files import is_special
from nestify.recipe.level_options import DEFAULT_LEVELS, QUANTITY
from nestify.recipe.level_texts import parse_levels
from nestify.recipe.options import CHECKPOINT_ENDINGS
from nestify.recipe.paths import IMAGES, INPUT_FILES, LOCAL_MODEL, MAY_BE_ELSEWHERE, MODELS
from nestify.recipe.problems import DEEPEST, Problem, format_toml, is_too_deep
from nestify.text import printable

Table = dict[str, Any]

RECIPE_ENDINGS = (".toml", ".json")

_HUB = re.compile(r"(local-dir|hf-hub|hf_hub):", re.IGNORECASE)
_LEVEL_AS_TABLE = re.compile(r"levels?\.([0-9]{1,3})\.(.+)")
_OF_LEVEL = re.compile(r"level\[(?P<k>[0-9]{1,3})\]\.(?P<option>.+)")
_DATASET = re.compile(r"(hfds|hfids|tfds|wds|torch)/", re.IGNORECASE)  # prefixes of timm's create_dataset


def builtin_recipes() -> list[str]:
    """Return the names of the built-in recipes."""
    return sorted(path.stem for path in _builtin_folder().glob("*.toml"))


def _builtin_folder() -> Path:
    return Path(str(files("nestify") / "recipes"))


def read_source(source: str | os.PathLike[str]) -> tuple[Table, str]:
    """Read a recipe file, a built-in recipe or a model's name: its table, and its name in errors.

    Raises:
        RecipeError: where there is no such file, or it cannot be read.
    """
    source = os.fspath(source)
    if source in builtin_recipes():
        return _read_extended(_builtin_folder() / f"{source}.toml", ()), source
    if not _looks_like_path(source):
        return {"model": {"name": source}}, ""
    path = Path(source)
    if not os.path.exists(path):
        hint = f" (a model of the hub is hf-hub:{source})" if path.suffix not in RECIPE_ENDINGS else ""
        raise RecipeError(
            "there is no such file; give a .toml or .json recipe, a model's name, or a built-in recipe: "
            f"{', '.join(builtin_recipes())}{hint}",
            source,
        )
    if os.path.isfile(path) and path.suffix not in RECIPE_ENDINGS:
        raise RecipeError(
            "this is not a .toml or .json recipe; a checkpoint goes with its model's name, as "
            "model.checkpoint",
            source,
        )
    return _read_extended(path, ()), source


def recipe_text(source: str | os.PathLike[str]) -> str:
    """Return the text of a recipe file or of a built-in recipe, as it is written.

    Raises:
        RecipeError: if it is neither, or cannot be read.
    """
    check_is_recipe(source)
    name = os.fspath(source)
    path = _builtin_folder() / f"{name}.toml" if name in builtin_recipes() else Path(name)
    read_source(source)  # refuses what is no recipe
    return path.read_bytes().decode("utf-8-sig")


def check_is_recipe(source: str | os.PathLike[str]) -> None:
    """Refuse the name of a model.

    Raises:
        RecipeError: if this is neither the path of a file nor the name of a built-in recipe.
    """
    name = os.fspath(source)
    if name not in builtin_recipes() and not _looks_like_path(name):
        raise RecipeError(
            "this is neither a .toml or .json recipe nor a built-in one: " + ", ".join(builtin_recipes()),
            name,
        )


def read_table(path: str) -> Table:
    """Read the table of a TOML file, on top of the one that it extends.

    Raises:
        RecipeError: where it cannot be read.
    """
    return _read_extended(Path(path), ())


def _looks_like_path(source: str) -> bool:
    separators = {"/", os.sep, os.altsep or "/"}
    return not _HUB.match(source) and (
        source.endswith((*RECIPE_ENDINGS, *CHECKPOINT_ENDINGS))
        or any(separator in source for separator in separators)
    )


def _read_extended(path: Path, chain: Sequence[Path]) -> Table:
    """Read a recipe on top of those that it extends; every path is resolved against its own file."""
    table = _read_table(path)
    if isinstance(table.get("matrix"), dict):
        table["matrix"] = _flat_matrix(table["matrix"], str(path))
    table = _resolve_paths(table, path.parent)
    base = table.pop("extends", None)
    if base is None:
        return table
    if not isinstance(base, str) or not base:
        raise RecipeError(
            "extends is not a text in quotes; give a .toml file or a built-in recipe", str(path)
        )
    base_path = path.parent / base if base.endswith(".toml") else _builtin_folder() / f"{base}.toml"
    if not os.path.isfile(base_path):  # unlike Path.is_file, False for names that no system accepts
        raise RecipeError(
            f"extends = {format_toml(base)} is neither a .toml file next to this one nor a built-in recipe: "
            f"{', '.join(builtin_recipes())}",
            str(path),
        )
    chain = [*chain, path]
    if any(base_path.samefile(earlier) for earlier in chain):
        names = " -> ".join(file.name for file in [*chain, base_path])
        raise RecipeError(
            f"extends = {format_toml(base)} leads back to itself: {names}; remove one", str(path)
        )
    return merge(_read_extended(base_path, chain), table)


def _read_table(path: Path) -> Table:
    place = str(path)
    if os.path.isdir(path):
        raise RecipeError("this is a folder; give the path of a .toml or .json recipe", place)
    if is_special(path):
        raise RecipeError("this is not a regular file; give the path of a .toml or .json recipe", place)
    try:
        text = path.read_bytes().decode("utf-8-sig")
        table = tomllib.loads(text) if path.suffix != ".json" else _json_table(text)
        if is_too_deep(table):
            raise ValueError(f"its tables and lists are nested more than {DEEPEST} deep")
        return table
    except OSError as error:
        raise RecipeError(f"this file cannot be read: {error.strerror or error}", place) from error
    except UnicodeDecodeError as error:
        raise RecipeError(f"byte {error.start} is not UTF-8; save the recipe as UTF-8 text", place) from error
    except tomllib.TOMLDecodeError as error:
        raise RecipeError(_syntax_error(str(error), text), place) from error
    except Exception as error:  # a number with thousands of digits, or thousands of brackets
        raise RecipeError(f"this is not a recipe that can be read: {error}", place) from error


def _json_table(text: str) -> Table:
    table = json.loads(text, object_pairs_hook=_unique_keys, parse_constant=_refuse_constant)
    json.dumps(table, ensure_ascii=False).encode()  # ValueError for half a character, as in "\\ud800"
    if not isinstance(table, dict):
        raise ValueError(f"it holds {format_toml(table)}, not an object with a recipe's sections")
    return table


def _refuse_constant(text: str) -> object:
    raise ValueError(f"{text} is not a number of JSON")


def _unique_keys(pairs: Sequence[tuple[str, Any]]) -> Table:
    """Return a JSON object as a table; as in TOML, no key may occur twice."""
    counts = Counter(key for key, _ in pairs)
    if twice := [key for key, count in counts.items() if count > 1]:
        raise ValueError(f"the key {format_toml(twice[0])} occurs {counts[twice[0]]} times; keep one")
    return dict(pairs)


def _flat_matrix(matrix: Table, place: str) -> Table:
    """Return [matrix] by dotted keys; `levels.1.sparsity` becomes `level[1].sparsity`."""
    flat: Table = {}

    def add(key: str, value: object) -> None:
        if isinstance(value, dict):
            for name, item in value.items():
                add(f"{key}.{name}" if key else name, item)
            return
        key = _LEVEL_AS_TABLE.sub(r"level[\1].\2", key) if _LEVEL_AS_TABLE.fullmatch(key) else key
        if key in flat:
            raise RecipeError(f"matrix has {key} twice; remove one", place)
        flat[key] = value

    add("", matrix)
    return flat


def _syntax_error(message: str, text: str) -> str:
    found = re.fullmatch(r"(.*) \(at (?:line (\d+), column (\d+)|end of document)\)", message, re.DOTALL)
    if found is None:
        return f"this is not TOML: {message}"
    what, line, column = found.groups()
    if line is None:
        line, column = text.count("\n") + 1, len(text) - text.rfind("\n")
    return f"line {line}, column {column}: {what[0].lower()}{what[1:]}; the format is described at toml.io"


def _resolve_paths(table: Table, folder: Path) -> Table:
    """Resolve relative paths against the recipe's folder, so that a recipe means the same in every folder.

    Images, and tables about them, are also searched in the current folder, if the recipe's folder has nothing
    of that name. Outputs are written relative to the current folder.
    """

    def below(text: str, must_exist: bool = False) -> str:
        path = str(folder / os.path.expanduser(text))
        return path if not must_exist or os.path.exists(path) else text

    def resolve(key: str, value: object) -> object:
        if not isinstance(value, str) or value in ("", "none"):
            return value
        if key == "data.path" and _DATASET.match(value):
            return value
        if key in (*INPUT_FILES, *IMAGES):
            return below(value, must_exist=key in MAY_BE_ELSEWHERE)
        rest = value.removeprefix(LOCAL_MODEL)
        return f"{LOCAL_MODEL}{below(rest)}" if key in MODELS and rest not in ("", value) else value

    def resolve_all(name: str, part: object) -> object:
        if not isinstance(part, dict):
            return part
        if name != "matrix":
            return {key: resolve(f"{name}.{key}", value) for key, value in part.items()}
        return {
            key: [resolve(key, value) for value in values] if isinstance(values, list) else values
            for key, values in part.items()
        }

    return {name: resolve_all(name, part) for name, part in table.items()}


def is_named_data(path: str) -> bool:
    """Return whether `data.path` names a data set instead of a file or folder."""
    return bool(_DATASET.match(path)) or path.startswith("embedded/")


def merge(base: Table, over: Mapping[str, Any]) -> Table:
    """Merge `over` into `base`: tables key by key; anything else, lists included, is replaced."""
    merged = dict(base)
    for key, value in over.items():
        old = merged.get(key)
        merged[key] = merge(old, value) if isinstance(old, dict) and isinstance(value, Mapping) else value
    return merged


def parse_setting(text: str) -> tuple[str, object]:
    """Read `train.warmup_epochs=2`: the dotted key, and the value as TOML, or as a text if it is not TOML.

    Raises:
        RecipeError: if there is no key or no `=`.
    """
    key, equals, value = (part.strip() for part in text.partition("="))
    if not key or not equals:
        raise RecipeError(f"setting {text!r} is not KEY=VALUE, as in train.epochs=3")
    if not key.isprintable():
        raise RecipeError(f"setting {key!r} has a character that is not visible; give a key of a recipe")
    if key.count(".") > DEEPEST:
        raise RecipeError(f"setting {printable(key)!r} has more than {DEEPEST} dots; give a key of a recipe")
    try:
        parsed = tomllib.loads(f"value = {value}")
    except (ValueError, RecursionError):
        return key, value
    plain = parsed.keys() == {"value"} and isinstance(parsed["value"], str | bool | int | float | list | dict)
    if is_too_deep(parsed):
        raise RecipeError(
            f"setting {printable(key)!r} is nested more than {DEEPEST} deep; give a plain value"
        )
    return key, parsed["value"] if plain else value


def apply_options(table: Table, options: Mapping[str, object]) -> tuple[Table, list[Problem]]:
    """Apply overrides to a recipe: dotted keys, `levels`, and `level[2].weight`; None means not given.

    Returns:
        The table, and problems with the options themselves.
    """
    table = deepcopy(table)
    given = {key: deepcopy(value) for key, value in options.items() if value is not None}
    problems: list[Problem] = []
    kind = _schedule_kind(table, given)
    if "levels" in given:
        table["level"], problems = parse_levels(given.pop("levels"), kind)
    of_levels = {found: given.pop(found[0]) for key in list(given) if (found := _OF_LEVEL.fullmatch(key))}
    for key, value in given.items():
        table = merge(table, _nested(key, os.fspath(value) if isinstance(value, os.PathLike) else value))
    if isinstance(table.get("level"), tuple):
        table["level"] = list(table["level"])
    if of_levels or kind in ("channel", "layer"):
        defaults = [{QUANTITY[kind]: value} for value in DEFAULT_LEVELS[kind]] if kind in QUANTITY else []
        levels = table.setdefault("level", defaults)
        known = dict(enumerate(levels, start=1)) if isinstance(levels, list) else {}
        for found, value in of_levels.items():
            level = known.get(int(found["k"]))
            if isinstance(level, dict):
                level[found["option"]] = value
            else:
                problems.append(
                    Problem(found[0], f"{found[0]} is set, but the recipe has {len(known)} levels")
                )
    return table, problems


def _nested(key: str, value: object) -> Table:
    """Return `train.epochs` and 3 as `{"train": {"epochs": 3}}`."""
    first, _, rest = key.partition(".")
    return {first: _nested(rest, value) if rest else value}


def _schedule_kind(table: Table, given: Mapping[str, object]) -> str:
    """Return the kind of schedule, if it is given and valid."""
    schedule = table.get("schedule")
    kind = given.get("schedule.kind", schedule.get("kind") if isinstance(schedule, dict) else None)
    return kind if isinstance(kind, str) else "weight"
