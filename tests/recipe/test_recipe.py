"""Recipes: options, defaults, levels, and what does not fit together."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from nestify.errors import RecipeError
from nestify.recipe.levels import Level, parse_pattern
from nestify.recipe.problems import section_of
from nestify.recipe.recipe import Recipe, load_recipe, option_help

FALLS = "the learning rate falls from lr to min_lr, and the default is at most 0.01"
ORDER = "levels run from the core (sparsest) to the full level"
DATA = {"data.path": "photos"}
REMEDY = 'set it, or an N:M pattern such as "2:4", which implies it'
EXPECTED = "share of the maskable weights that are zero, in [0, 1); an N:M pattern implies it"


def load(**options: object) -> Recipe:
    """A recipe of a model's name and options, whose dots are written as two underscores."""
    return load_recipe("resnet18", DATA | {key.replace("__", "."): value for key, value in options.items()})


def problems(**options: object) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load(**options)
    return caught.value.problems


def options_of(recipe: type[Recipe]) -> list[str]:
    keys: list[str] = []
    for name, field in recipe.model_fields.items():
        section = section_of(field)
        keys += [f"{name}.{option}" for option in section.model_fields] if section else [name]
    return keys


def test_a_model_name_is_a_recipe() -> None:
    recipe = load()
    assert recipe == Recipe.model_validate({"model": {"name": "resnet18"}, "data": {"path": "photos"}})
    assert recipe.levels == (Level("level1", 0.95), Level("level2", 0.8), Level("level3", 0.0))
    assert (recipe.seed, recipe.train.epochs, recipe.schedule.score) == (42, 10, "fisher")


def test_a_recipe_cannot_be_changed() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load().train.epochs = 3  # type: ignore[misc]


def test_every_option_has_a_help_text() -> None:
    keys = options_of(Recipe)
    assert len(keys) > 60
    assert all(option_help(key) for key in keys)
    assert option_help("train.batch_size") == "images per training step and device (default 64)"
    assert option_help("model.pretrained").endswith("(default true)")
    assert option_help("schedule.score").endswith("(default fisher)")
    assert option_help("train.clip_grad") == "maximum norm of the gradient; not clipped by default"


@pytest.mark.parametrize("key", ["epochs", "train.epohcs", "trian.epochs", "seed.x", "model.kwargs.x"])
def test_there_is_no_help_for_an_unknown_key(key: str) -> None:
    with pytest.raises(KeyError):
        option_help(key)


def test_a_recipe_as_a_dictionary_is_plain_and_comes_back() -> None:
    recipe = load(
        levels="1:4,2:4,0",
        model__input_size=[96, 128],
        model__kwargs={"drop_rate": 0.1, "layers": [2, [1, None]], "act": "relu", "flag": True},
        schedule__skip=["first", "layer4.*"],
        data__holdout=0.1,
        finetune__epochs=3,
        model__new_head=True,
    )
    as_json = json.dumps(recipe.to_dict(), allow_nan=False)
    assert Recipe.model_validate(json.loads(as_json)) == recipe
    assert json.dumps(Recipe.model_validate(json.loads(as_json)).to_dict()) == as_json


@pytest.mark.parametrize(
    ("name", "output"),
    [
        ("resnet50.a1_in1k", "resnet50.a1_in1k.nested.safetensors"),
        ("hf-hub:timm/resnet18", "resnet18.nested.safetensors"),
        ("local-dir:/models/mine/", "mine.nested.safetensors"),
    ],
)
def test_the_output_is_named_after_the_model(name: str, output: str) -> None:
    assert load_recipe(name, DATA).output_path == Path(output)
    assert load_recipe(name, DATA | {"output": "a/b.safetensors"}).output_path == Path("a/b.safetensors")


def test_levels_take_the_common_pattern_unless_dense() -> None:
    recipe = load(levels="0.9,0.5,0", schedule__pattern="32x1")
    assert [str(level.pattern) for level in recipe.levels] == ["32x1", "32x1", "unstructured"]
    given = [{"sparsity": 0.9, "pattern": "unstructured"}, {"sparsity": 0}]
    recipe = load(level=given, schedule__pattern="4x1")
    assert str(recipe.levels[0].pattern) == "unstructured"


def test_an_n_of_m_pattern_implies_the_sparsity() -> None:
    levels = [{"pattern": "1:3", "sparsity": 0.67, "name": "core"}, {"pattern": "2:3"}, {"sparsity": 0}]
    assert load(level=levels).levels == (
        Level("core", 1 - 1 / 3, parse_pattern("1:3")),
        Level("level2", 1 - 2 / 3, parse_pattern("2:3")),
        Level("level3", 0.0),
    )


sparsities = st.floats(0, 1, exclude_max=True)


@settings(deadline=None)  # a busy machine is no defect
@given(st.lists(sparsities, min_size=2, max_size=8, unique=True))
def test_strictly_decreasing_levels_are_accepted(values: list[float]) -> None:
    values.sort(reverse=True)
    assert [level.sparsity for level in load(levels=values).levels] == values
    assert [level.sparsity for level in load(levels=",".join(map(repr, values))).levels] == values


@settings(deadline=None)  # a busy machine is no defect
@given(st.lists(sparsities, min_size=2, max_size=8))
def test_levels_that_do_not_get_denser_are_refused(values: list[float]) -> None:
    values.sort()
    told = problems(levels=values)
    assert len(told) == len(values) - 1
    assert all(ORDER in text and "is not below" in text for text in told)


@pytest.mark.parametrize(
    ("levels", "told"),
    [
        ([{}, {"sparsity": 0}], f"level[1].sparsity is not given; {REMEDY}"),
        ([{"pattern": "4x1"}, {"sparsity": 0}], f"level[1].sparsity is not given; {REMEDY}"),
        ([{"sparsity": 1.5}, {"sparsity": 0}], f"level[1].sparsity = 1.5 is not in [0, 1); {ORDER}"),
        (
            [{"sparsity": 0.9, "pattern": "2:4"}, {"sparsity": 0}],
            "level[1].sparsity = 0.9 does not agree with pattern 2:4, which is a sparsity of 0.5; "
            "give one of the two",
        ),
        (
            [{"sparsity": 0.9, "pattern": "4*1"}, {"sparsity": 0}],
            'level[1].pattern = "4*1" is not one of unstructured, N:M (2:4) or RxC (32x1)',
        ),
        ([{"sparsity": 0.9}, {"sparsity": "no"}], f'level[2].sparsity = "no" is not a number ({EXPECTED})'),
        ([{"sparsity": 0.9}, 0], "level[2] = 0 is not a section; write [[level]] and its options below it"),
        ({"sparsity": 0.9}, "level is not a list of sections; write [[level]] above each level"),
        (
            [{"sparsity": 0.9}],
            "1 level given; a nested network has 2 to 254, from the core (sparsest) to the full level",
        ),
        (
            [{"sparsity": 0.9, "weight": -1}, {"sparsity": 0}],
            "level[1].weight = -1 is less than 0 "
            "(relative weight in the loss, scaled so that all weights sum to 1; a level with weight 0 is not "
            "trained; by default evenly spaced from 2 for the core level to 1 for the full level)",
        ),
        (
            [{"sparsity": 0.9, "distill": 2}, {"sparsity": 0}],
            "level[1].distill = 2 is not in [0, 1] "
            "(share of distillation in the level's loss; train.distill by default)",
        ),
    ],
)
def test_a_wrong_level_is_told_once(levels: object, told: str) -> None:
    assert problems(level=levels) == [told]


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (
            {"model.new_head": True, "finetune.epochs": 0},
            "model.new_head = true needs finetune.epochs above 0; a fresh classifier must learn first",
        ),
        (
            {"finetune.save": "dense.safetensors", "finetune.epochs": 0},
            'finetune.save = "dense.safetensors" has nothing to save; set finetune.epochs above 0',
        ),
        (
            {"train.teacher_checkpoint": "a.pth", "train.teacher": "self"},
            'train.teacher_checkpoint = "a.pth" has no use with train.teacher = "self"; '
            "set train.teacher to the name of a timm model",
        ),
        (
            {"train.min_lr": 0.1},
            f"train.min_lr = 0.1 is above the default of train.lr; {FALLS}",
        ),
        (
            {"train.warmup_epochs": 2, "train.epochs": 1.5},
            "train.warmup_epochs = 2 is above train.epochs = 1.5; the warmup is part of the training",
        ),
    ],
)
def test_options_that_do_not_fit_together(options: dict[str, object], told: str) -> None:
    assert problems(**options) == [told]


@pytest.mark.parametrize(
    "options",
    [
        {"model.new_head": True, "finetune.epochs": 1, "finetune.save": "dense.safetensors"},
        {"train.teacher": "resnet50", "train.teacher_checkpoint": "a.pth"},
        {"train.epochs": 0, "train.warmup_epochs": 5},
    ],
)
def test_options_that_fit_together(options: dict[str, object]) -> None:
    load(**options)


def test_a_wrong_option_hides_no_other_problem_and_causes_none() -> None:
    told = problems(
        model__new_head=True,
        finetune__epochs="many",
        train__min_lr=1,
        schedule__pattern="4by1",
        level=[{"sparsity": 0.5, "pattern": "4x1"}, {"sparsity": 0.7}, {"sparsity": "x"}, {"sparsity": 2}],
    )
    assert told == [
        'schedule.pattern = "4by1" is not one of unstructured, N:M (2:4) or RxC (32x1)',
        f'level[3].sparsity = "x" is not a number ({EXPECTED})',
        'finetune.epochs = "many" is not a whole number (passes over the training images before nesting; '
        "0 disables fine-tuning; by default 5 or more for a new classifier, and else 0)",
        f"level[4].sparsity = 2.0 is not in [0, 1); {ORDER}",
        f"level[2].sparsity = 0.7 is not below level[1].sparsity = 0.5; {ORDER}",
        f"train.min_lr = 1 is above the default of train.lr; {FALLS}",
    ]


def test_levels_may_be_a_tuple() -> None:
    assert len(load(level=({"sparsity": 0.5}, {"sparsity": 0})).levels) == 2
    assert len(problems(level=({"sparsity": "x"}, {"sparsity": "y"}))) == 2


def test_none_takes_an_optional_value_back_and_no_other() -> None:
    recipe = load(train__clip_grad="none", train__teacher="none", model__checkpoint="none")
    assert (recipe.train.clip_grad, recipe.train.teacher, recipe.model.checkpoint) == (None, "none", None)
    assert "train.epochs" in problems(train__epochs="none")[0]


junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text("a0.:x/", max_size=5),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text("ab.", max_size=3), inner, max_size=3)
    ),
    max_leaves=5,
)


@settings(deadline=None)  # a busy machine is no defect
@example({"levels": [None, None]})
@given(
    st.dictionaries(st.sampled_from([*options_of(Recipe), *Recipe.model_fields, "levels"]), junk, max_size=6)
)
def test_whatever_is_given_is_a_recipe_or_a_recipe_error(options: dict[str, Any]) -> None:
    try:
        recipe = load_recipe("resnet18", DATA | options)
    except RecipeError as error:
        told, recipe = error.problems, None
    if recipe is None:
        assert all(told)
        assert len(set(told)) == len(told)
    else:
        assert Recipe.model_validate(json.loads(json.dumps(recipe.to_dict(), allow_nan=False))) == recipe
        assert len(recipe.levels) >= 2


def test_recipes_need_no_torch() -> None:
    code = "import nestify.recipe.recipe, sys; print({'torch', 'timm', 'numpy'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "set()"


@pytest.mark.parametrize("section", ["train", "finetune"])
def test_a_learning_rate_is_a_number_or_auto(section: str) -> None:
    recipe = load(**{f"{section}__lr": "auto"})
    assert getattr(recipe, section).lr == "auto"
    assert recipe.to_dict()[section]["lr"] == "auto"
    assert Recipe.model_validate(recipe.to_dict()) == recipe


def test_a_search_needs_a_default_above_the_lowest_rate() -> None:
    [problem] = problems(train__lr="auto", train__min_lr=0.1)
    assert 'train.min_lr = 0.1 is above train.lr = "auto"' in problem
    assert problem.endswith("0.01")
