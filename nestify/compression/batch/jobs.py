"""The jobs of a batch: recipes with absolute paths, whose outputs are in the job's own folder."""

import json
import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

from nestify.compression.batch.identity import Contents, job_identity
from nestify.compression.batch.matrix import NO_SETTINGS, Variant, expand
from nestify.errors import OutputError, RecipeError
from nestify.files import is_special
from nestify.recipe.paths import IMAGES, INPUT_FILES, LOCAL_MODEL, MODELS
from nestify.recipe.recipe import Recipe
from nestify.recipe.sources import is_named_data

T = TypeVar("T")

RECIPE, RESULT, LOG = "recipe.json", "result.json", "log.txt"


@dataclass(frozen=True)
class Job:
    """One run of `compress`.

    Attributes:
        name: name of the job and of its folder.
        source: the recipe that it comes from.
        options: options of the recipe's matrix and of --set, by dotted key.
        recipe: the complete recipe, whose output is in the folder.
        folder: absolute path of its folder.
    """

    name: str
    source: str
    options: Mapping[str, Any]
    recipe: Recipe
    folder: Path
    contents: Contents

    @cached_property
    def identity(self) -> str:
        """Hash of everything that the result depends on, computed at the first access."""
        return job_identity(self.recipe, self.contents)

    @property
    def recipe_text(self) -> str:
        """The recipe as JSON, as `compress` reads it."""
        return json.dumps(self.recipe.to_dict(), indent=2, ensure_ascii=False) + "\n"


@dataclass(frozen=True)
class Shard:
    """A machine's share of a batch: jobs number, number + count, ... counted from 1."""

    number: int = 1
    count: int = 1

    def __str__(self) -> str:
        return f"{self.number}/{self.count}"

    @property
    def suffix(self) -> str:
        """Suffix of files that several machines write into one folder."""
        return "" if self.count == 1 else f".{self.number}-of-{self.count}"

    def select(self, items: Sequence[T]) -> Sequence[T]:
        """Return its share of a batch."""
        return items[self.number - 1 :: self.count]


def parse_shard(text: str) -> Shard:
    """Read `2/4`, the second of four.

    Raises:
        RecipeError: if it is not of this form.
    """
    number, slash, count = text.partition("/")
    digits = all(part.isascii() and part.isdecimal() and len(part) < 10 for part in (number, count))
    if not slash or not digits or not 1 <= int(number) <= int(count):
        raise RecipeError(f"--shard {text} is not I/N with I from 1 to N; give 1/4 to 4/4 to four machines")
    return Shard(int(number), int(count))


def make_jobs(
    sources: Sequence[str], out: Path, shard: Shard, settings: Mapping[str, object] = NO_SETTINGS
) -> list[Job]:
    """Return the jobs of one shard, in order; the recipes of all shards are checked.

    Args:
        sources: the recipes.
        out: folder for the jobs' folders.
        shard: the shard.
        settings: options that replace those of every recipe, by dotted key.

    Raises:
        RecipeError: with every problem of every recipe.
        OutputError: if a file of a job is a pipe or a device.
    """
    variants = expand(sources, settings)
    if problems := [problem for variant in variants for problem in _clashes(variant)]:
        raise RecipeError(list(dict.fromkeys(problems)))
    contents = Contents()
    out = Path(os.path.abspath(out))
    jobs = [
        Job(
            each.name,
            each.source,
            each.options,
            _with_absolute_paths(each.recipe, out / each.name),
            out / each.name,
            contents,
        )
        for each in shard.select(variants)
    ]
    for path in (job.folder / name for job in jobs for name in (RECIPE, RESULT, LOG)):
        if is_special(path):
            raise OutputError(f"{path}: is not a regular file; remove it, or choose another --out")
    return jobs


def _clashes(variant: Variant) -> list[str]:
    """Return problems of a job whose files would have the same name."""
    recipe, source = variant.recipe, variant.source
    taken, problems = {RECIPE, RESULT, LOG}, []
    for key, path in (("output", str(recipe.output_path)), ("finetune.save", recipe.finetune.save)):
        name = Path(path).name if path else None
        if name in taken:
            problems.append(
                f"{source}: {key} = {path} is the name of another file of the job; choose another"
            )
        taken |= {name} if name else set()
    return problems


def _with_absolute_paths(recipe: Recipe, folder: Path) -> Recipe:
    """Return the recipe with outputs in a folder, and with absolute paths of inputs."""
    data, save = recipe.data, recipe.finetune.save
    is_local = not is_named_data(data.path) and os.path.exists(data.path)
    sections: dict[str, dict[str, object]] = {"finetune": {"save": save and str(folder / Path(save).name)}}
    for key in (*INPUT_FILES, *IMAGES, *MODELS):
        section, _, option = key.partition(".")
        value = getattr(getattr(recipe, section), option)
        absolute = _local_model(value) if key in MODELS else _absolute(value)
        sections.setdefault(section, {})[option] = absolute
    sections["data"]["path"] = os.path.abspath(data.path) if is_local else data.path
    changed = {name: getattr(recipe, name).model_copy(update=values) for name, values in sections.items()}
    return recipe.model_copy(update={"output": str(folder / recipe.output_path.name), **changed})


def _absolute(path: str | None) -> str | None:
    return path and os.path.abspath(path)


def _local_model(name: str) -> str:
    folder = name.removeprefix(LOCAL_MODEL)
    return f"{LOCAL_MODEL}{os.path.abspath(folder)}" if folder not in ("", name) else name
