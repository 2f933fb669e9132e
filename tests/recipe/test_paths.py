"""Which keys of a recipe hold paths, and that all of them are relative to the recipe."""

from pathlib import Path

import pytest

from nestify.recipe.paths import IMAGES, INPUT_FILES, MODELS, OUTPUT_FILES, without_folders
from nestify.recipe.problems import section_of
from nestify.recipe.recipe import Recipe, load_recipe

NO_PATHS = {
    "data.train_split",
    "data.val_split",
    "device",
    "train.opt",
    "train.class_weights",
    "augment.auto_augment",
    "schedule.pattern",
    "gates.max_bytes",
    "gates.max_macs",
    "gates.max_params",
}
"""Keys of texts that name neither a file nor a folder."""


def texts() -> set[str]:
    """Every key of a recipe, except those of levels, that any text may be the value of."""
    schema = Recipe.model_json_schema()
    found = set()
    for name, field in Recipe.model_fields.items():
        section = section_of(field)
        place = schema["$defs"][section.__name__] if section else {"properties": {name: {}}}
        if section is None:
            place = {"properties": {name: schema["properties"][name]}}
        prefix = f"{name}." if section else ""
        for option, entry in place["properties"].items():
            forms = entry.get("anyOf", [entry])
            if any(form.get("type") == "string" and "enum" not in form for form in forms):
                found.add(prefix + option)
    return {key for key in found if not key.startswith("level.")}


def test_every_text_of_a_recipe_is_a_path_or_is_known_to_be_none() -> None:
    assert texts() == {*INPUT_FILES, *IMAGES, *MODELS, *OUTPUT_FILES, *NO_PATHS}


def read(recipe: Recipe, key: str) -> object:
    section, _, option = key.partition(".")
    return getattr(getattr(recipe, section), option)


@pytest.mark.parametrize("key", [*INPUT_FILES, *IMAGES])
def test_what_a_run_reads_is_relative_to_the_recipe(
    key: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    name = "torch/a.safetensors" if key != "data.path" else "photos"
    (tmp_path / "torch").mkdir()
    (tmp_path / "photos").mkdir()
    (tmp_path / "torch" / "a.safetensors").touch()
    sections: dict[str, list[str]] = {"model": ['name = "resnet18"'], "data": ['path = "photos"']}
    section, _, option = key.partition(".")
    if key != "data.path":
        sections.setdefault(section, []).append(f'{option} = "{name}"')
    if key == "train.teacher_checkpoint":
        sections["train"].append('teacher = "resnet18"')
    text = "\n".join(line for part, lines in sections.items() for line in (f"[{part}]", *lines))
    if key == "gates.baseline":
        text += "\nmax_regression = 1"
    (tmp_path / "recipe.toml").write_text(text)
    monkeypatch.chdir("/")
    assert read(load_recipe(tmp_path / "recipe.toml"), key) == str(tmp_path / name)


def test_a_file_names_no_folder_of_the_machine() -> None:
    options = {
        "model": {"name": "local-dir:/home/me/model", "checkpoint": "/home/me/a.safetensors"},
        "data": {"path": "/home/me/photos", "root": None, "hierarchy": "/home/me/b.csv", "class_names": None},
        "train": {"teacher": "local-dir:/home/me/teacher", "teacher_checkpoint": None, "lr": 0.5},
        "finetune": {"save": "/home/me/dense.safetensors"},
        "gates": {"baseline": "/home/me/base.json"},
        "output": "out/c.safetensors",
    }
    assert without_folders(options) == {
        "model": {"name": "local-dir:model", "checkpoint": "a.safetensors"},
        "data": {"path": "photos", "root": None, "hierarchy": "b.csv", "class_names": None},
        "train": {"teacher": "local-dir:teacher", "teacher_checkpoint": None, "lr": 0.5},
        "finetune": {"save": "dense.safetensors"},
        "gates": {"baseline": "base.json"},
        "output": "c.safetensors",
    }
