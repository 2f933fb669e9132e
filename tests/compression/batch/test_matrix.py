"""What jobs a recipe's matrix makes, what they are called, and what is refused."""

import itertools
import json
import re
import tempfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.compression.batch.matrix import MAX_VARIANTS, Variant, expand
from nestify.errors import RecipeError
from nestify.recipe.recipe import load_recipe
from tests.compression.batch.builders import DATA, write_recipe
from tests.recipe.test_problems import LR


def variants(folder: Path, rest: str, name: str = "a.toml") -> list[Variant]:
    return expand([write_recipe(folder / name, "resnet18", rest)])


def refused(*sources: str) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        expand(sources)
    return str(caught.value).split("\n")


def test_a_recipe_without_a_matrix_is_one_job(tmp_path: Path) -> None:
    [only] = variants(tmp_path, "")
    assert (only.name, only.options, only.recipe.model.name) == ("a", {}, "resnet18")


def test_the_last_option_changes_fastest(tmp_path: Path) -> None:
    found = variants(tmp_path, '[matrix]\n"train.lr" = [0.01, 0.03]\nseed = [1, 2]\n')
    assert [each.name for each in found] == [
        "a-lr=0.01-seed=1",
        "a-lr=0.01-seed=2",
        "a-lr=0.03-seed=1",
        "a-lr=0.03-seed=2",
    ]
    pairs = [(each.recipe.train.lr, each.recipe.seed) for each in found]
    assert pairs == list(itertools.product([0.01, 0.03], [1, 2]))
    assert found[3].options == {"train.lr": 0.03, "seed": 2}


@pytest.mark.parametrize(
    "matrix",
    [
        '[matrix]\n"level[1].sparsity" = [0.9, 0.95]',
        "[matrix]\nlevels.1.sparsity = [0.9, 0.95]",
        "[matrix]\nlevel.1.sparsity = [0.9, 0.95]",
        "[matrix.levels.1]\nsparsity = [0.9, 0.95]",
        '[matrix]\n"levels.1.sparsity" = [0.9, 0.95]',
        "matrix = {levels = {1 = {sparsity = [0.9, 0.95]}}}",
    ],
)
def test_ways_to_write_a_levels_option(matrix: str, tmp_path: Path) -> None:
    levels = "[[level]]\nsparsity = 0.5\n[[level]]\nsparsity = 0.0\n"
    path = tmp_path / "a.toml"
    inline = f"{matrix}\n" if matrix.startswith("matrix") else ""
    path.write_text(f'{inline}[model]\nname = "resnet18"\n{DATA}{levels}{matrix if not inline else ""}\n')
    found = expand([str(path)])
    assert [each.recipe.levels[0].sparsity for each in found] == [0.9, 0.95]
    assert [each.recipe.levels[1].sparsity for each in found] == [0, 0]
    assert [each.name for each in found] == ["a-level1.sparsity=0.9", "a-level1.sparsity=0.95"]


def test_options_that_are_lists_themselves(tmp_path: Path) -> None:
    found = variants(
        tmp_path, "[matrix]\nlevels = [[0.9, 0], [0.8, 0.5, 0]]\naugment.scale = [[0.5, 1.0], [0.7, 1.0]]\n"
    )
    assert [len(each.recipe.levels) for each in found] == [2, 2, 3, 3]
    assert [each.recipe.augment.scale for each in found[:2]] == [(0.5, 1.0), (0.7, 1.0)]
    assert found[0].name == "a-levels=0.9,0-scale=0.5,1.0"


def test_a_matrix_that_is_extended(tmp_path: Path) -> None:
    write_recipe(tmp_path / "base.toml", "resnet18", "[matrix]\ntrain.lr = [0.1, 0.2]\nseed = [1, 2]\n")
    own = tmp_path / "own.toml"
    own.write_text('extends = "base.toml"\n[matrix]\n"train.lr" = [0.5]\ntrain.epochs = [3]\n')
    assert [each.options for each in expand([str(own)])] == [
        {"train.lr": 0.5, "seed": seed, "train.epochs": 3} for seed in (1, 2)
    ]


def test_paths_start_at_the_recipes_folder(tmp_path: Path) -> None:
    (tmp_path / "sub" / "photos").mkdir(parents=True)
    found = variants(
        tmp_path,
        '[matrix]\nmodel.checkpoint = ["a.safetensors", "none"]\ndata.path = ["photos", "hfds/x"]\n',
        "sub/a.toml",
    )
    sub = tmp_path / "sub"
    assert [each.recipe.model.checkpoint for each in found[::2]] == [str(sub / "a.safetensors"), None]
    assert [each.recipe.data.path for each in found[:2]] == [str(sub / "photos"), "hfds/x"]


def test_options_that_end_alike_keep_their_sections(tmp_path: Path) -> None:
    found = variants(tmp_path, "[matrix]\ntrain.lr = [0.5]\nfinetune.lr = [0.1]\nseed = [3]\n")
    assert [each.name for each in found] == ["a-train.lr=0.5-finetune.lr=0.1-seed=3"]


def test_values_that_look_alike_are_told_apart(tmp_path: Path) -> None:
    found = variants(tmp_path, '[matrix]\nmodel.name = ["a/b", "a:b", "A-B", "c"]\n')
    names = [each.name for each in found]
    assert [name.partition("~")[0] for name in names] == [
        "a-name=a-b",
        "a-name=a-b",
        "a-name=A-B",
        "a-name=c",
    ]
    assert len({name.casefold() for name in names}) == 4


VALUES = st.one_of(st.text(min_size=1, max_size=200), st.integers(0, 10**30), st.floats(0, 1), st.booleans())


@given(st.lists(VALUES, min_size=1, max_size=6, unique_by=json.dumps), st.lists(VALUES, max_size=2))
@settings(max_examples=30, deadline=None)
def test_names_are_safe_and_of_one_job_each(names: list[object], sizes: list[object]) -> None:
    matrix = {"model.name": [str(name) for name in names], "train.opt": [f"o{i}" for i in range(len(sizes))]}
    matrix = {key: list(dict.fromkeys(values)) for key, values in matrix.items() if values}
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "my recipe.json")
        path.write_text(json.dumps({"model": {}, "data": {"path": "hfds/x"}, "matrix": matrix}))
        found = expand([str(path)])
        assert [tuple(each.options.values()) for each in found] == list(itertools.product(*matrix.values()))
        assert len({each.name.casefold() for each in found}) == len(found)
        for each in found:
            assert re.fullmatch(r"my-recipe-[\w.,+=~-]+", each.name), each.name
            assert len(each.name.encode()) <= 130
            Path(folder, each.name).mkdir()


def test_a_single_run_names_the_batch(tmp_path: Path) -> None:
    path = write_recipe(tmp_path / "a.toml", rest="[matrix]\nseed = [1, 2]\n")
    with pytest.raises(RecipeError) as caught:
        load_recipe(path)
    assert str(caught.value) == (
        f"{path}: [matrix] makes several runs of this recipe; start them with nestify batch, or remove it"
    )


@pytest.mark.parametrize(
    ("matrix", "told"),
    [
        ("matrix = 3", "matrix = 3 is not a table; write [matrix] and options with lists of values"),
        (
            "[matrix]",
            '[matrix] has no options; give it some, such as "train.lr" = [0.01, 0.03], or remove it',
        ),
        ("matrix.seed = 3", "matrix.seed = 3 is not a list of values; put it in brackets"),
        (
            "matrix.seed = []",
            "matrix.seed is an empty list, which makes no job; give it values or remove it",
        ),
        ("matrix.train.lr = [0.1, 0.2, 0.1]", "matrix.train.lr has 0.1 twice; remove one"),
        (
            "matrix.output = ['a']",
            "matrix.output has no use, for each job writes to its own folder; remove it",
        ),
        ('[matrix]\n"seed" = [1]\ntrain.lr = [1]\n"train.lr" = [2]', "matrix has train.lr twice; remove one"),
        (
            f"matrix.seed = {list(range(200))}\nmatrix.train.epochs = {list(range(51))}",
            f"[matrix] makes 10200 jobs, more than {MAX_VARIANTS}; make its lists shorter",
        ),
        ("matrix.train.lrr = [0.1]", "unknown key train.lrr; did you mean train.lr? (set by [matrix])"),
        (
            "matrix.train.lr = [0.1, -1, 0.2, -2]\nmatrix.seed = [1, 2]",
            f"train.lr = -1 is not above 0 ({LR}) (set by [matrix])",
        ),
    ],
)
def test_refusals(matrix: str, told: str, tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    path.write_text(f'{matrix}\n[model]\nname = "resnet18"\n{DATA}')
    assert refused(str(path))[0] == f"{path}: {told}"


def test_all_problems_of_all_recipes_are_told_once(tmp_path: Path) -> None:
    a = write_recipe(
        tmp_path / "a.toml", rest="[train]\nepochs = -1\n[matrix]\ntrain.lr = [-1, -2]\nseed = [1, 2]"
    )
    b = write_recipe(tmp_path / "b.toml", rest="[matrix]\nseed = 3\ntrain.lr = []")
    found = refused(a, b, str(tmp_path / "c.toml"))
    assert [line.split(" (")[0].removeprefix(f"{tmp_path}/") for line in found[:5]] == [
        "a.toml: train.epochs = -1 is less than 0",
        "a.toml: train.lr = -1 is not above 0",
        "a.toml: train.lr = -2 is not above 0",
        "b.toml: matrix.seed = 3 is not a list of values; put it in brackets",
        "b.toml: matrix.train.lr is an empty list, which makes no job; give it values or remove it",
    ]
    assert found[5].startswith(f"{tmp_path}/c.toml: there is no such file")
    assert len(found) == 6


def test_recipes_of_one_name_are_refused(tmp_path: Path) -> None:
    paths = [write_recipe(tmp_path / name) for name in ("a/same.toml", "b/Same.toml")]
    assert refused(*paths) == [
        f"{paths[0]} and {paths[1]} both make a job Same; rename one of the recipes, or run them in batches "
        "of their own"
    ]
    assert refused() == ["a batch needs at least one recipe"]


def test_a_recipe_as_json_is_the_same_recipe(tmp_path: Path) -> None:
    recipe = load_recipe("digits", {"data.hierarchy": "none", "augment.ratio": [0.5, 2.0]})
    path = tmp_path / "a.json"
    path.write_text(json.dumps(recipe.to_dict()))
    assert load_recipe(str(path)) == recipe
    path.write_text("[1]")
    with pytest.raises(RecipeError, match="it holds \\[1\\], not an object"):
        load_recipe(str(path))
    path.write_text('{"model": ')
    with pytest.raises(RecipeError, match="not a recipe that can be read: Expecting value"):
        load_recipe(str(path))


def test_settings_replace_options_of_every_recipe(tmp_path: Path) -> None:
    sources = [
        write_recipe(tmp_path / "a.toml", "resnet18", "[matrix]\nseed = [1, 2]\n"),
        write_recipe(tmp_path / "b.toml", "resnet18", "[train]\nlr = 0.5\n"),
    ]
    found = expand(sources, {"train.lr": 0.25, "levels": "0.9,0"})
    assert [each.name for each in found] == ["a-seed=1", "a-seed=2", "b"]
    assert [each.recipe.train.lr for each in found] == [0.25] * 3
    assert [len(each.recipe.level) for each in found] == [2] * 3
    assert found[1].options == {"train.lr": 0.25, "levels": "0.9,0", "seed": 2}


def test_problems_of_settings_are_told_for_every_recipe(tmp_path: Path) -> None:
    sources = [write_recipe(tmp_path / f"{name}.toml", "resnet18") for name in "ab"]
    with pytest.raises(RecipeError) as caught:
        expand(sources, {"train.lr": -1.0, "train.epoch": 3})
    told = str(caught.value).split("\n")
    assert [line.split(": ")[0] for line in told] == [*sources[:1] * 2, *sources[1:] * 2]
    assert all(line.endswith("(set by --set)") for line in told)


def test_a_setting_of_an_option_in_the_matrix(tmp_path: Path) -> None:
    source = write_recipe(tmp_path / "a.toml", "resnet18", "[matrix]\nseed = [1, 2]\n")
    with pytest.raises(RecipeError, match=r"matrix\.seed is also given by --set; give it once"):
        expand([source], {"seed": 3})
