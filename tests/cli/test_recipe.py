"""`nestify recipe`: show, check and the JSON Schema."""

import json
from pathlib import Path

import pytest

from nestify.recipe.recipe import load_recipe

from .driver import nestify

GOOD = '[model]\nname = "resnet18"\n[data]\npath = "photos"\n'
BUILT_IN = Path(__file__).parents[2] / "nestify" / "recipes" / "digits.toml"


def test_show_prints_a_recipe_as_it_is_written() -> None:
    assert nestify("recipe", "show", "digits").out == BUILT_IN.read_text()
    Path("a.toml").write_text('# mine\nextends = "digits"\n')
    done = nestify("recipe", "show", "a.toml")
    assert (done.code, done.out, done.err) == (0, '# mine\nextends = "digits"\n', "")


@pytest.mark.parametrize(
    ("source", "setting", "options"),
    [
        ("digits", "seed=7", {"seed": 7}),
        ("folder/a.toml", "train.epochs=3", {"train.epochs": 3}),
        ("resnet18", "data.path=x", {"data.path": "x"}),
    ],
)
def test_show_resolved_prints_a_recipe_that_means_the_same(
    source: str, setting: str, options: dict[str, object]
) -> None:
    Path("folder/photos").mkdir(parents=True)
    Path("folder/a.toml").write_text(GOOD)
    words = ["recipe", "show", source, "--resolved", "--set", setting]
    done = nestify(*words)
    assert (done.code, done.err) == (0, "")
    Path("again.toml").write_text(done.out)
    Path("again.json").write_text(nestify(*words, "--json").out)
    assert load_recipe("again.toml") == load_recipe(source, options) == load_recipe("again.json")


def test_show_refuses_what_it_cannot_show() -> None:
    for words, named in (
        (["resnet18"], "digits"),
        (["no.toml"], "no such file"),
        (["digits", "--json"], "--resolved"),
        (["digits", "--set", "seed=1"], "--resolved"),
    ):
        done = nestify("recipe", "show", *words)
        assert (done.code, done.out) == (2, "")
        assert named in done.message


def test_check_prints_a_line_for_each_recipe() -> None:
    Path("a.toml").write_text(GOOD)
    Path("b.toml").write_text(f'{GOOD}[matrix]\n"train.lr" = [0.1, 0.2]\n')
    done = nestify("recipe", "check", "a.toml", "b.toml", "digits")
    assert (done.code, done.err) == (0, "")
    assert [line.partition(":")[0] for line in done.out.splitlines()] == ["a.toml", "b.toml", "digits"]
    assert "2 jobs" in done.out.splitlines()[1]


def test_check_reports_every_wrong_recipe() -> None:
    Path("a.toml").write_text(f"{GOOD}[train]\nepochs = -1\n")
    Path("b.toml").write_text(GOOD)
    Path("c.toml").write_text("[model\n")
    Path("d.toml").write_text(f'{GOOD}[matrix]\n"train.lr" = [0.1, -2]\n')
    done = nestify("recipe", "check", "a.toml", "b.toml", "c.toml", "d.toml", "none.toml", "resnet18")
    assert done.code == 2
    assert done.out.startswith("b.toml: ok")
    assert len(done.out.splitlines()) == 1
    lines = done.err.removeprefix("nestify: ").splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "a.toml",
        "c.toml",
        "d.toml",
        "none.toml",
        "resnet18",
    ]
    assert "train.epochs = -1" in lines[0]
    assert "train.lr = -2" in lines[2]


def test_check_as_json() -> None:
    Path("a.toml").write_text(GOOD)
    Path("b.toml").write_text(f"{GOOD}[train]\nepoch = 1\n")
    done = nestify("recipe", "check", "a.toml", "b.toml", "--json")
    assert done.code == 2
    first, second = done.document["recipes"]
    assert (done.document["passed"], first["problems"], first["jobs"]) == (False, [], 1)
    assert "train.epochs" in second["problems"][0]
    assert nestify("recipe", "check", "a.toml", "--json").document["passed"] is True


def test_check_takes_what_a_base_recipe_lacks() -> None:
    Path("base.toml").write_text("[train]\nepochs = 3\n")
    assert nestify("recipe", "check", "base.toml").code == 2
    words = ["--set", "model.name=resnet18", "--set", "data.path=photos"]
    assert nestify("recipe", "check", "base.toml", *words).code == 0


def test_the_schema_is_printed() -> None:
    done = nestify("recipe", "schema")
    assert (done.code, done.err) == (0, "")
    assert "epochs" in json.loads(done.out)["$defs"]["TrainOptions"]["properties"]


def test_a_group_without_a_command_shows_its_commands() -> None:
    done = nestify("recipe")
    assert done.code == 2
    assert "schema" in done.out + done.err
