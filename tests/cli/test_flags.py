"""Flags of compress, which come from the recipe's fields, and the choices that help and shells show."""

import re
from functools import reduce
from typing import Annotated, Any

import pytest
import typer

from nestify.cli.flags import with_recipe_flags
from nestify.recipe.flags import FlaggedField, flagged_fields
from nestify.recipe.recipe import Recipe, load_recipe

from .driver import environment, finish, nestify
from .forked import Forked

COMMANDS = ("batch", "bench", "compress", "doctor", "eval", "export", "pick", "report", "slice", "verify")

TEXTS = {"model.checkpoint": "a.pth", "schedule.pattern": "32x1", "device": "cpu"}
"""Valid values of text fields that do not accept every text."""


def recipe_from(*words: str) -> Recipe:
    """Return the recipe that a command with these flags receives."""
    given: dict[str, object] = {}

    @with_recipe_flags
    def command(recipe: Annotated[str, typer.Argument()], *, overrides: dict[str, object]) -> None:
        given.update(overrides)

    app = typer.Typer()
    app.command()(command)
    typer.main.get_command(app).main(["digits", *words], standalone_mode=False)
    return load_recipe("digits", given)


def value_at(recipe: Recipe, key: str) -> Any:
    return reduce(getattr, key.split("."), recipe)


@pytest.fixture
def help_of(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the lines of a command's help, with each flag on one line."""
    monkeypatch.setenv("COLUMNS", "300")
    return lambda *words: nestify(*words, "--help").out.splitlines()


def flags_in(lines: list[str]) -> list[str]:
    """Return the names of all flags in a help text, each as often as it is listed."""
    rows = [found[1] for line in lines if (found := re.match(r"│ (?:\* )? *(-\S+(?: +-\S+)*)", line))]
    return [name for row in rows for name in re.split(r"[ ,]+", row)]


@pytest.mark.parametrize(
    ("words", "key", "value"),
    [
        (["--data", "photos"], "data.path", "photos"),
        (["--data-root", "cache"], "data.root", "cache"),
        (["--input-size", "96"], "model.input_size", (96, 96)),
        (["--new-head", "--finetune-epochs", "2"], "model.new_head", True),
        (["--keep-head"], "model.new_head", False),
        (["--finetune-epochs", "2"], "finetune.epochs", 2),
        (["--schedule", "weight"], "schedule.kind", "weight"),
        (["--score", "erk"], "schedule.score", "erk"),
        (["--criterion", "erk"], "schedule.score", "erk"),
        (["--skip", "first", "--skip", "fc"], "schedule.skip", ("first", "fc")),
        (["--bn", "recalibrate"], "train.bn", "recalibrate"),
        (["--batch-size", "3"], "train.batch_size", 3),
        (["--epochs", "0.5"], "train.epochs", 0.5),
        (["--amp"], "train.amp", True),
        (["--no-amp"], "train.amp", False),
        (["--compile"], "train.compile", True),
        (["--log", "csv", "--log", "tensorboard"], "train.log", ("csv", "tensorboard")),
        (["--calibrate", "0.1"], "data.calibrate", 0.1),
        (["-o", "a.safetensors"], "output", "a.safetensors"),
        (["--output", "a.safetensors"], "output", "a.safetensors"),
        (["--seed", "0"], "seed", 0),
        (["--device", "cuda:1"], "device", "cuda:1"),
    ],
)
def test_a_flag_sets_its_key(words: list[str], key: str, value: object) -> None:
    assert value_at(recipe_from(*words), key) == value


def test_without_flags_the_recipe_stays_as_it_is() -> None:
    assert recipe_from() == load_recipe("digits")


@pytest.mark.parametrize("field", flagged_fields(Recipe), ids=lambda field: field.key)
def test_every_flag_is_shown_once_and_reaches_the_recipe(field: FlaggedField, help_of: Any) -> None:
    name = field.names[-1].partition("/")[0]
    assert flags_in(help_of("compress")).count(name) == 1
    text = {bool: "", int: "7", float: "0.25", str: TEXTS.get(field.key, "text")}[field.value]
    text = field.choices[-1] if field.choices else text
    words = [name, text] if text else [name]
    also = ["--finetune-epochs", "1"] if field.key == "model.new_head" else []
    value = value_at(recipe_from(*words, *also), field.key)
    expected: Any = {bool: True, int: 7, float: 0.25, str: text}[field.value]
    if field.key == "model.input_size":
        expected = (7, 7)
    assert value == ((expected,) if field.repeated else expected)


def test_no_flag_is_shown_twice(help_of: Any) -> None:
    for command in COMMANDS:
        names = flags_in(help_of(command))
        assert "--help" in names
        assert len(names) == len(set(names)), command


@pytest.mark.parametrize(
    ("command", "shown"),
    [
        ("compress", r"--schedule +\[weight\|channel\|layer\|combined\] "),
        ("compress", r"--score,--criterion +\[fisher\|lamp\|magnitude\|per_mac\|uniform\|erk\] "),
        ("compress", r"--dtype +\[float32\|float16\|bfloat16\] .*\(default float32\)"),
        ("compress", r"--log +\[csv\|tensorboard\|wandb\|mlflow\] .*may be repeated"),
        ("compress", r"--lr +\[float\|auto\] +learning rate"),
        ("compress", r"--skip .*may be repeated"),
        ("compress", r"--amp +--no-amp +whether "),
        ("compress", r"--dry-run +Print the plan"),
        ("compress", r"--help +-h +Show "),
        ("eval", r"--consensus +\[mean\|learned\] "),
        ("eval", r"--on-bad-image +\[refuse\|skip\] .*"),
        ("export", r"--format +\[timm\|onnx\|pt2\|openvino\|coreml\|executorch\]"),
        ("report", r"--format +\[table\|json\|markdown\|html\] "),
        ("report", r"--layers +Show the density"),
    ],
)
def test_help_shows_choices_and_no_value_for_switches(command: str, shown: str, help_of: Any) -> None:
    assert re.search(shown, "\n".join(help_of(command)))


def test_no_command_shows_a_value_for_a_switch(help_of: Any) -> None:
    for words in ((), *((command,) for command in COMMANDS)):
        text = "\n".join(help_of(*words))
        assert "--help" in text
        assert "bool" not in text.lower(), words


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        ("compress digits --schedule ", "weight channel layer combined"),
        ("compress digits --bn ", "private recalibrate"),
        ("compress digits --score ", "fisher lamp magnitude per_mac uniform erk"),
        ("compress digits --criterion la", "lamp"),
        ("compress digits --dtype fl", "float32 float16"),
        ("compress digits --log ", "csv tensorboard wandb mlflow"),
        ("compress digits --on-bad-image ", "refuse skip"),
        ("compress digits --teacher ", "original self both none"),
        ("compress digits --device c", "cpu cuda"),
        ("eval a --consensus ", "mean learned"),
        ("eval a --on-bad-image s", "skip"),
        ("eval a --device ", "auto cpu cuda mps"),
        ("bench a --device m", "mps"),
        ("pick a --device a", "auto"),
        ("export a --format ", "timm onnx pt2 openvino coreml executorch"),
        ("report a --format ", "table json markdown html"),
        ("batch dig", "digits digits-pretrain"),
    ],
)
def test_shells_complete_choices(words: str, expected: str) -> None:
    request = {
        "_NESTIFY_COMPLETE": "complete_bash",
        "COMP_WORDS": f"nestify {words}",
        "COMP_CWORD": str(len(words.split(" "))),
    }
    done = finish(Forked([], environment(**request)))
    assert (done.code, done.out.split()) == (0, expected.split())


def test_a_wrong_choice_is_reported_with_the_recipes_other_problems() -> None:
    done = nestify("compress", "digits", "--score", "random", "--epochs", "nan", "--log", "paper")
    assert done.code == 2
    for problem in (
        "schedule.score = \"random\" is not 'fisher', 'lamp', 'magnitude', 'per_mac', 'uniform' or 'erk'",
        "train.epochs = nan is not",
        "train.log[1] = \"paper\" is not 'csv', 'tensorboard', 'wandb' or 'mlflow'",
    ):
        assert problem in done.err
