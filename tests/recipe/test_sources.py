"""Where recipes come from: files, built-in recipes, `extends`, and options that beat them."""

import re
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.errors import RecipeError
from nestify.recipe.level_options import LevelOptions, level_weights
from nestify.recipe.recipe import Recipe, load_recipe
from nestify.recipe.sources import builtin_recipes, parse_setting
from tests.recipe.test_problems import LR

ROOT = Path(__file__).parents[2]
ORDER = "levels run from the core (sparsest) to the full level"
EPOCHS = "passes over the training images; 0 trains nothing"
NEITHER = f"is neither a .toml file next to this one nor a built-in recipe: {', '.join(builtin_recipes())}"
BASIC = '[model]\nname = "resnet18"\n[data]\npath = "hfds/cifar10"\n'


def write(folder: Path, text: str | bytes, name: str = "a.toml") -> str:
    path = folder / name
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    return str(path)


def message(source: str, overrides: dict[str, object] | None = None) -> str:
    with pytest.raises(RecipeError) as caught:
        load_recipe(source, overrides)
    return str(caught.value)


def test_a_file_is_read(tmp_path: Path) -> None:
    recipe = load_recipe(
        write(tmp_path, BASIC + "[train]\nepochs = 3\n[[level]]\nsparsity=0.5\n[[level]]\nsparsity=0")
    )
    assert recipe.model.name == "resnet18"
    assert recipe.train.epochs == 3
    assert [level.sparsity for level in recipe.levels] == [0.5, 0]


def test_a_byte_order_mark_and_windows_line_ends_do_no_harm(tmp_path: Path) -> None:
    text = b"\xef\xbb\xbf" + BASIC.replace("\n", "\r\n").encode()
    assert load_recipe(write(tmp_path, text)).model.name == "resnet18"


@pytest.mark.parametrize(
    "text",
    [
        '{"model": {"name": "resnet18"}, "data": {"path": "a"}, "data": {"path": "b"}}',
        '{"model": {"name": "resnet18"}, "data": {"path": "a", "path": "a"}}',
        '{"model": {"name": "resnet18"}, "data": {"path": "a"}, "level": [{"sparsity": 0, "sparsity": 0.5}]}',
        '{"model": {"name": "resnet18"}, "data": {"path": "a", "p\\u0061th": "b"}}',
    ],
)
def test_a_json_key_that_occurs_twice_is_refused(tmp_path: Path, text: str) -> None:
    told = message(write(tmp_path, text, "a.json"))
    assert "occurs 2 times" in told
    assert "keep one" in told


def test_every_problem_of_a_file_names_the_file(tmp_path: Path) -> None:
    path = write(
        tmp_path, BASIC + '[[level]]\nsparsity = 1.5\n[[level]]\nsparsity = 0\n[train]\nepochs = "three"\n'
    )
    assert message(path).splitlines() == [
        f'{path}: train.epochs = "three" is not a number ({EPOCHS})',
        f"{path}: level[1].sparsity = 1.5 is not in [0, 1); {ORDER}",
    ]


def test_a_problem_of_an_option_is_not_blamed_on_the_file(tmp_path: Path) -> None:
    path = write(tmp_path, BASIC + "[train]\nlr = -1\n")
    told = message(path, {"levels": "1.5,0", "train.epochs": -1, "train.epohcs": 1, "level[2].weight": -1})
    assert told.splitlines() == [
        f"{path}: level[2].weight = -1 is less than 0 (relative weight in the loss, scaled so that all "
        "weights sum to 1; a level with weight 0 is not trained; by default evenly spaced from 2 for the "
        "core level to 1 for the full level) (set by an option)",
        f"{path}: train.epochs = -1 is less than 0 ({EPOCHS}) (set by an option)",
        f"{path}: train.lr = -1 is not above 0 ({LR})",
        f"{path}: unknown key train.epohcs; did you mean train.epochs? (set by an option)",
        f"{path}: level[1].sparsity = 1.5 is not in [0, 1); {ORDER} (set by an option)",
    ]


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("a = 1\nb = = 2\n", "line 2, column 5: invalid value; the format is described at toml.io"),
        ("a = 1\nb = [1,", "line 2, column 8: invalid value; the format is described at toml.io"),
        ("[a]\n[a]\n", "line 2, column 3: cannot declare ('a',) twice; the format is described at toml.io"),
        (b"a = 1\nb = '\xff'\n", "byte 11 is not UTF-8; save the recipe as UTF-8 text"),
    ],
)
def test_what_is_not_toml_is_told_with_its_place(tmp_path: Path, text: str | bytes, told: str) -> None:
    path = write(tmp_path, text)
    assert message(path) == f"{path}: {told}"


@pytest.mark.parametrize("text", [f"seed = {'9' * 5000}", f"seed = 0x{'f' * 9000}", f"seed = {'[' * 3000}"])
def test_hostile_toml_is_a_recipe_error(tmp_path: Path, text: str) -> None:
    path = write(tmp_path, BASIC.replace("[model]", f"{text}\n[model]"))
    assert message(path).startswith(path)


def test_a_missing_file_is_told(tmp_path: Path) -> None:
    known = ", ".join(builtin_recipes())
    remedy = (
        f"there is no such file; give a .toml or .json recipe, a model's name, or a built-in recipe: {known}"
    )
    path = str(tmp_path / "none.toml")
    assert message(path) == f"{path}: {remedy}"
    assert message("timm/resnet18") == f"timm/resnet18: {remedy} (a model of the hub is hf-hub:timm/resnet18)"


def test_a_folder_is_no_recipe(tmp_path: Path) -> None:
    assert (
        message(f"{tmp_path}/") == f"{tmp_path}: this is a folder; give the path of a .toml or .json recipe"
    )


def test_a_checkpoint_is_no_recipe(tmp_path: Path) -> None:
    path = write(tmp_path, b"\x00" * 9, "resnet18.safetensors")
    assert message(path) == (
        f"{path}: this is not a .toml or .json recipe; a checkpoint goes with its model's name, as "
        "model.checkpoint"
    )


def test_an_unreadable_file_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = write(tmp_path, BASIC)

    def refuse(_: Path) -> bytes:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(Path, "read_bytes", refuse)
    assert message(path) == f"{path}: this file cannot be read: Permission denied"


@pytest.mark.parametrize("name", ["hf-hub:timm/resnet18.a1_in1k", "local-dir:models/mine", "hf_hub:a/b"])
def test_a_model_with_a_scheme_is_not_a_path(name: str) -> None:
    assert load_recipe(name, {"data.path": "x"}).model.name == name


def test_missing_sections_are_told(tmp_path: Path) -> None:
    path = write(tmp_path, "seed = 1\n")
    assert [line.partition("; ")[0] for line in message(path).splitlines()] == [
        f"{path}: model.name is not given",
        f"{path}: data.path is not given",
    ]


def test_paths_start_at_the_recipe(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "recipes" / "photos").mkdir(parents=True)
    text = """
        output = "out.safetensors"
        [model]
        name = "local-dir:mine"
        checkpoint = "weights/a.pth"
        [data]
        path = "photos"
        root = "elsewhere"
        [train]
        teacher = "resnet18"
        teacher_checkpoint = "/abs/t.pth"
    """
    write(tmp_path / "recipes", text)
    monkeypatch.chdir(tmp_path)
    recipe = load_recipe("recipes/a.toml")
    assert recipe.model.checkpoint == str(Path("recipes/weights/a.pth"))
    assert recipe.model.name == f"local-dir:{Path('recipes/mine')}"
    assert recipe.data.path == str(Path("recipes/photos"))
    assert recipe.data.root == "elsewhere"  # not beside the recipe, so below the current folder
    assert recipe.train.teacher_checkpoint == "/abs/t.pth"
    assert recipe.output == "out.safetensors"
    given = load_recipe("recipes/a.toml", {"model.checkpoint": Path("b.pth"), "data.path": "photos"})
    assert (given.model.checkpoint, given.data.path) == ("b.pth", "photos")  # an option's path is the user's


@pytest.mark.parametrize("name", ["hfds/cifar10", "torch/cifar10", "wds/x", "tfds/x", "HFIDS/x"])
def test_the_name_of_a_data_set_is_no_path(tmp_path: Path, name: str) -> None:
    (tmp_path / name).mkdir(parents=True)
    path = write(tmp_path, f'[model]\nname = "m"\n[data]\npath = "{name}"\n')
    assert load_recipe(path).data.path == name


def test_extends_builds_on_another_recipe(tmp_path: Path) -> None:
    base = BASIC + "seed_ = 0\n"
    base = base.replace("seed_ = 0\n", "[model.kwargs]\na = 1\nb = 2\n[train]\nepochs = 3\nlr = 0.5\n")
    write(
        tmp_path, base + '[[level]]\nsparsity = 0.9\nname = "x"\n[[level]]\nsparsity = 0\n', "base/base.toml"
    )
    write(tmp_path, 'extends = "base/base.toml"\nseed = 7\n', "middle.toml")
    top = "[train]\nepochs = 5\n[model.kwargs]\nb = 3\n[[level]]\nsparsity = 0.5\n[[level]]\nsparsity = 0.1\n"
    recipe = load_recipe(write(tmp_path, 'extends = "middle.toml"\n' + top))
    assert (recipe.seed, recipe.train.epochs, recipe.train.lr) == (7, 5, 0.5)
    assert recipe.model.kwargs == {"a": 1, "b": 3}
    assert [(level.name, level.sparsity) for level in recipe.levels] == [("level1", 0.5), ("level2", 0.1)]


def test_an_extended_recipe_keeps_its_own_folder(tmp_path: Path) -> None:
    (tmp_path / "base" / "photos").mkdir(parents=True)
    write(tmp_path, '[model]\nname = "m"\ncheckpoint = "w.pth"\n[data]\npath = "photos"\n', "base/base.toml")
    recipe = load_recipe(write(tmp_path, 'extends = "base/base.toml"\n'))
    assert recipe.model.checkpoint == str(tmp_path / "base" / "w.pth")
    assert recipe.data.path == str(tmp_path / "base" / "photos")
    without = load_recipe(write(tmp_path, 'extends = "base/base.toml"\n[model]\ncheckpoint = "none"\n'))
    assert without.model.checkpoint is None


def test_extends_in_a_circle_is_refused(tmp_path: Path) -> None:
    a = write(tmp_path, 'extends = "b.toml"\n')
    b = write(tmp_path, 'extends = "./a.toml"\n', "b.toml")
    assert message(a) == (
        f'{b}: extends = "./a.toml" leads back to itself: a.toml -> b.toml -> a.toml; remove one'
    )


@pytest.mark.parametrize(
    ("value", "told"),
    [
        ("3", "extends is not a text in quotes; give a .toml file or a built-in recipe"),
        ('"nothing"', f'extends = "nothing" {NEITHER}'),
        ('"no.toml"', f'extends = "no.toml" {NEITHER}'),
        (r'"a\u0000.toml"', rf'extends = "a\u0000.toml" {NEITHER}'),
    ],
)
def test_a_wrong_extends_is_told(tmp_path: Path, value: str, told: str) -> None:
    path = write(tmp_path, f"extends = {value}\n")
    assert message(path) == f"{path}: {told}"


def test_the_built_in_recipes_load() -> None:
    assert "digits" in builtin_recipes()
    for name in builtin_recipes():
        assert isinstance(load_recipe(name), Recipe)


def test_the_digits_recipe_of_the_readme_is_the_built_in_one() -> None:
    assert load_recipe(str(ROOT / "recipes" / "digits.toml")) == load_recipe("digits")
    assert load_recipe("digits").augment.hflip == 0
    assert [level.sparsity for level in load_recipe("digits").levels] == [0.95, 0.8, 0]


def test_what_the_digits_recipe_suggests_works(tmp_path: Path) -> None:
    text = (ROOT / "recipes" / "digits.toml").read_text(encoding="utf-8")
    settings, suggestions = text.split("# Things to try:\n")
    recipe = load_recipe(write(tmp_path, settings + re.sub(r"^# ?", "", suggestions, flags=re.MULTILINE)))
    assert [level.name for level in recipe.levels] == ["core", "half", "full"]
    assert recipe.train.teacher == "both"


@pytest.mark.parametrize(
    ("text", "key", "value"),
    [
        ("train.warmup_epochs=2", "train.warmup_epochs", 2),
        (" train.lr = 1e-3 ", "train.lr", 1e-3),
        ("train.amp=true", "train.amp", True),
        ("schedule.score=erk", "schedule.score", "erk"),
        ('schedule.skip=["a", "b"]', "schedule.skip", ["a", "b"]),
        ("data.path=a=b", "data.path", "a=b"),
        ("levels=0.9,0.5,0", "levels", "0.9,0.5,0"),
        ("output=2024-01-01", "output", "2024-01-01"),
        ("output=1\nseed=2", "output", "1\nseed=2"),
        ("output=", "output", ""),
        ("level[1].weight=2", "level[1].weight", 2),
        (f"seed={'9' * 5000}", "seed", "9" * 5000),
    ],
)
def test_a_setting_is_read_as_toml_or_as_text(text: str, key: str, value: object) -> None:
    assert parse_setting(text) == (key, value)


@pytest.mark.parametrize("text", ["train.epochs", "=3", ""])
def test_a_setting_without_key_or_value_is_refused(text: str) -> None:
    with pytest.raises(RecipeError) as caught:
        parse_setting(text)
    assert str(caught.value) == f"setting {text!r} is not KEY=VALUE, as in train.epochs=3"


@settings(deadline=None)  # a busy machine is no defect
@given(st.integers(0, 10**6), st.integers(0, 10**6))
def test_an_option_beats_the_recipe(
    tmp_path_factory: pytest.TempPathFactory, in_file: int, option: int
) -> None:
    path = write(tmp_path_factory.getbasetemp(), f"seed = {in_file}\n{BASIC}[train]\nepochs = {in_file}\n")
    assert load_recipe(path, {"train.epochs": None}).train.epochs == in_file
    recipe = load_recipe(path, {"train.epochs": option, "seed": option})
    assert (recipe.train.epochs, recipe.seed) == (option, option)
    assert load_recipe(path, {"train": {"epochs": option}}).train.epochs == option


def test_options_reach_into_tables_and_levels() -> None:
    skip = ["a"]
    options = {"data.path": "x", "model.kwargs.drop_rate": 0.1, "schedule.skip": skip, "level[1].weight": 2}
    recipe = load_recipe("m", options)
    assert recipe.model.kwargs == {"drop_rate": 0.1}
    assert [level.weight for level in recipe.level] == [2, None, None]
    assert [level.sparsity for level in recipe.levels] == [0.95, 0.8, 0]


def test_options_are_not_changed() -> None:
    levels = [{"sparsity": 0.5}, {"sparsity": 0}]
    recipe = load_recipe("m", {"data.path": "x", "level": levels, "level[2].name": "full"})
    assert recipe.levels[1].name == "full"
    assert levels == [{"sparsity": 0.5}, {"sparsity": 0}]


def test_the_levels_option_replaces_all_levels(tmp_path: Path) -> None:
    path = write(tmp_path, BASIC + '[[level]]\nsparsity = 0.9\nname = "x"\n[[level]]\nsparsity = 0\n')
    recipe = load_recipe(path, {"levels": " 1:4, 2:4, 0 "})
    assert [(level.name, level.sparsity, str(level.pattern)) for level in recipe.levels] == [
        ("level1", 0.75, "1:4"),
        ("level2", 0.5, "2:4"),
        ("level3", 0, "unstructured"),
    ]


@pytest.mark.parametrize("levels", ["0.9,half,0", "0.9,,0", "0.5,x,1", "32x1,0"])
def test_levels_that_are_no_levels_are_told(levels: str) -> None:
    wrong = next(item for item in levels.split(",") if not re.fullmatch(r"[\d.]+", item))
    assert message("m", {"levels": levels, "data.path": "x"}) == (
        f'levels has "{wrong}", not a sparsity (0.8), N:M (2:4) or budget (macs=0.5); give the levels from '
        "the core to the full level, as in 0.95,0.8,0, and blocks as schedule.pattern"
    )


def test_a_level_that_does_not_exist_is_told() -> None:
    told = message("m", {"level[4].weight": 2, "data.path": "x"})
    assert told == "level[4].weight is set, but the recipe has 3 levels"


@pytest.mark.parametrize(
    ("own", "expected"),
    [
        ((None, None, None), [2.0, 1.5, 1.0]),
        ((None, None), [2.0, 1.0]),
        ((None,), [1.0]),
        ((None,) * 5, [2.0, 1.75, 1.5, 1.25, 1.0]),
        ((3.0, None, 0.0), [3.0, 1.5, 0.0]),
    ],
)
def test_levels_weigh_less_from_the_core_up(own: tuple[float | None, ...], expected: list[float]) -> None:
    assert level_weights([LevelOptions(weight=weight) for weight in own]) == expected
