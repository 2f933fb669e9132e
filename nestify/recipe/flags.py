"""Flags of `nestify compress`, declared where the fields of a recipe are. Does not import torch."""

import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass
from enum import StrEnum
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, NamedTuple, Union, get_args, get_origin

from pydantic import BaseModel
from pydantic.fields import FieldInfo

from nestify.recipe.problems import section_of


class Panel(StrEnum):
    """Groups of flags in `nestify compress --help`, in the order in which they are shown."""

    model = "Model and images"
    levels = "Levels"
    training = "Training"


@dataclass(frozen=True)
class Flag:
    """Annotation that makes a field of a recipe a flag of `nestify compress`.

    Attributes:
        panel: group in which the help shows the flag.
        names: the flag's names, separated by spaces, such as `--amp/--no-amp`; by default the field's own
            name, such as `--batch-size` for `batch_size`.
        value: type of the flag's value, if it is not the field's type.
        suggestions: values that shells complete, for a field that takes other values too.
    """

    panel: Panel
    names: str = ""
    value: type | None = None
    suggestions: tuple[str, ...] = ()


class FlaggedField(NamedTuple):
    """A field of a recipe that has a flag.

    Attributes:
        key: dotted key, such as `train.batch_size`.
        names: names of the flag, such as `["-o", "--output"]`.
        panel: group in which the help shows the flag.
        value: type of one value of the flag.
        repeated: whether the flag may be given several times, once per value.
        choices: the only values that the field takes; empty if any value of the type may be valid.
        words: texts that a field of numbers takes as well, such as auto.
        completions: values that shells complete.
    """

    key: str
    names: list[str]
    panel: Panel
    value: type
    repeated: bool
    choices: tuple[str, ...]
    words: tuple[str, ...]
    completions: tuple[str, ...]


def flagged_fields(recipe: type[BaseModel]) -> list[FlaggedField]:
    """Return the fields of a recipe that have flags, panel by panel, those of its sections first."""
    found = [
        _flagged(key, field, flag)
        for key, field in _fields(recipe)
        for flag in field.metadata
        if isinstance(flag, Flag)
    ]
    panels = list(Panel)
    return sorted(found, key=lambda each: (panels.index(each.panel), "." not in each.key))


def name_flags(recipe: type[BaseModel], text: str, leave_out: Collection[str] = ()) -> str:
    """Name the flags of the recipe keys in a message, at the end of each line: `(flag: --data)`.

    A flag that the line names already is left out. The sizes of levels belong to `--levels`.

    Args:
        recipe: class of the recipe.
        text: a message of one or more lines.
        leave_out: dotted keys whose flags the command does not have.
    """
    fields = [field for field in flagged_fields(recipe) if field.key not in leave_out]
    flags = {field.key: "/".join(field.names) for field in fields}
    return "\n".join(_name_in_line(flags, line) for line in text.split("\n"))


_OF_LEVELS = (r"level\[\d+\]\.(?:sparsity|width|depth|budget)", r"levels(?= = | has )")


def _name_in_line(flags: Mapping[str, str], line: str) -> str:
    # A key without a dot, such as seed, is a word too.
    keys = {re.escape(key) if "." in key else rf"{key}(?= = )": names for key, names in flags.items()}
    keys |= dict.fromkeys(_OF_LEVELS, "--levels")
    found: dict[int, str] = {}
    for key, names in keys.items():
        mention = re.search(rf"(?<![\w.\-/\"'=\]])(?:{key})(?![\w\-\[/\"']|\.\w)", line)
        name = next(name for name in names.split("/") if name.startswith("--"))
        if mention and not any(re.search(rf"{each}(?![\w-])", line) for each in names.split("/")):
            found.setdefault(mention.start(), name)
    named = list(dict.fromkeys(found[start] for start in sorted(found)))
    return f"{line} (flag{'s' * (len(named) > 1)}: {', '.join(named)})" if named else line


def _fields(recipe: type[BaseModel]) -> Iterator[tuple[str, FieldInfo]]:
    """Yield the fields of a recipe and of its sections, by dotted key."""
    for name, field in recipe.model_fields.items():
        section = section_of(field)
        yield name, field
        if section is not None:
            yield from ((f"{name}.{option}", each) for option, each in section.model_fields.items())


def _flagged(key: str, field: FieldInfo, flag: Flag) -> FlaggedField:
    """Read type, choices and names of a flag from its field."""
    kind, words = _bare_type(field.annotation)
    repeated = get_origin(kind) is tuple and get_args(kind)[-1] is Ellipsis
    kind, words = _bare_type(get_args(kind)[0]) if repeated else (kind, words)
    choices = get_args(kind) if get_origin(kind) is Literal else ()
    option = key.rpartition(".")[2].replace("_", "-")
    return FlaggedField(
        key=key,
        names=flag.names.split() or [f"--{option}"],
        panel=flag.panel,
        value=flag.value or (str if choices else kind),
        repeated=repeated,
        choices=choices,
        words=words,
        completions=choices or words or flag.suggestions,
    )


def _bare_type(annotation: Any) -> tuple[Any, tuple[str, ...]]:
    """Return a type without its metadata and without None, and the texts that are allowed as well."""
    if get_origin(annotation) is Annotated:
        return _bare_type(get_args(annotation)[0])
    if get_origin(annotation) not in (Union, UnionType):
        return annotation, ()
    members = [_bare_type(each)[0] for each in get_args(annotation)]
    members = [each for each in members if each is not NoneType and each is not None]
    if len(members) == 1:
        return _bare_type(members[0])
    [kind] = [each for each in members if get_origin(each) is not Literal]
    return kind, tuple(word for each in members if each is not kind for word in get_args(each))
