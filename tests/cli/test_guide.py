"""`nestify guide`: pages in a pipe and at a terminal; the recipe reference is generated from the fields."""

import re
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

from nestify.cli.guide import ORDER, page
from nestify.recipe.recipe import Recipe
from nestify.recipe.reference import recipe_reference

from .driver import at_terminal, environment, finish, nestify, spawn

ROOT = Path(__file__).parents[2]
GUIDE = ROOT / "nestify" / "guide"


def test_the_topics_are_the_pages() -> None:
    assert sorted(ORDER) == sorted(path.stem for path in GUIDE.glob("*.md"))


def test_the_topics_are_listed_with_their_first_sentence() -> None:
    done = nestify("guide")
    assert done.code == 0
    lines = [line.split() for line in done.out.splitlines()]
    assert [words[0] for words in lines if words and words[0] in ORDER] == list(ORDER)
    for topic in ORDER:
        text = (GUIDE / f"{topic}.md").read_text().partition("\n\n")[2].replace("\n", " ").replace("`", "")
        first = next(line for line in done.out.splitlines() if line.split()[:1] == [topic])
        sentence = first.removeprefix(topic).strip()
        assert text.startswith(sentence)
        assert sentence.endswith((".", "?"))


@pytest.mark.parametrize("topic", ORDER)
def test_a_pipe_gets_the_page_as_it_is(topic: str) -> None:
    done = nestify("guide", topic)
    assert (done.code, done.err) == (0, "")
    assert done.out == (GUIDE / f"{topic}.md").read_text()
    assert done.out.isascii()  # every terminal and pipe can show it


@pytest.mark.parametrize("topic", ["levels", "recipe-reference"])
def test_a_terminal_gets_it_laid_out(topic: str) -> None:
    lines = at_terminal(90, "guide", topic)
    text = "\n".join(lines)
    assert max(map(len, lines)) <= 90
    assert "## " not in text  # headings, tables and links are laid out
    assert "|---" not in text
    assert "](" not in text


def test_links_at_a_terminal_are_commands() -> None:
    text = " ".join(" ".join(at_terminal(200, "guide", "levels")).split())
    assert "how levels learn (nestify guide training)" in text
    assert "#budgets" not in text


def test_an_unknown_topic_is_refused_with_the_nearest_one() -> None:
    done = nestify("guide", "trianing")
    assert (done.code, done.out) == (2, "")
    assert "'trianing'" in done.message
    assert "training" in done.message
    done = nestify("guide", "qqq")
    assert done.code == 2
    assert all(topic in done.message for topic in ORDER)


def test_a_reader_may_stop_after_the_first_line() -> None:
    for words in ([], ["recipe-reference"]):
        process = subprocess.Popen(
            [sys.executable, "-m", "nestify", "guide", *words],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            env=environment(),
        )
        assert process.stdout is not None
        process.stdout.close()  # earlier than `head -1` would close it
        assert process.wait() == 0
        assert process.stderr is not None
        assert process.stderr.read() == b""
        process.stderr.close()


def test_shells_complete_topics() -> None:
    request = {"_NESTIFY_COMPLETE": "complete_bash", "COMP_WORDS": "nestify guide re", "COMP_CWORD": "2"}
    assert finish(spawn(env=environment(**request))).out.split() == [
        "recipes",
        "recipe-reference",
        "resuming",
    ]


@pytest.mark.parametrize("words", [[], ["levels"], ["recipe-reference"]])
def test_no_torch(words: list[str]) -> None:
    code = "import sys; from nestify.cli.app import run; run(sys.argv[1:]); sys.exit('torch' in sys.modules)"
    done = subprocess.run([sys.executable, "-c", code, "guide", *words], check=False, capture_output=True)
    assert done.returncode == 0


def test_the_recipe_reference_is_generated_from_the_fields() -> None:
    assert page("recipe-reference") == recipe_reference(), (
        "write the page again; the command is in the docstring of the module of recipe_reference"
    )


def test_the_recipe_reference_has_every_key() -> None:
    rows = dict(re.findall(r"^\| `([^`]+)` \| (.*) \|$", recipe_reference(), re.MULTILINE))
    for name, field in Recipe.model_fields.items():
        if name in ("model", "data", "augment", "schedule", "train", "finetune"):
            assert {f"{name}.{key}" for key in field.annotation.model_fields} <= set(rows)  # type: ignore[union-attr]
        elif name not in ("level", "gates"):
            assert name in rows
    assert rows["data.holdout"].startswith("number in (0, 1) | - | share of the training images")
    assert rows["train.epochs"].startswith("number, at least 0 | `10` | passes")
    assert rows["train.bn"].startswith('`"private"`, `"recalibrate"` | `"private"` | batch norm')
    assert rows["model.name"].startswith("text | required | ")
    assert rows["model.input_size"].startswith("whole number, at least 1, or list of 2 whole numbers | - | ")
    assert rows["augment.scale"].startswith("list of 2 numbers | `[0.35, 1]` | ")
    assert rows["train.log"].startswith('list of `"csv"`, `"tensorboard"`, `"wandb"`, `"mlflow"` | `[]` | ')
    assert rows["level[k].weight"].startswith("number, at least 0 | - | ")
    assert rows["gates.level.NAME.max_bytes"].startswith("whole number, at least 1, or text | - | ")
    assert len(rows) == len(re.findall(r"^\| `", recipe_reference(), re.MULTILINE))


def test_the_wheel_has_the_guide() -> None:
    settings = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["package-data"]
    shipped = {path for pattern in settings["nestify"] for path in (ROOT / "nestify").glob(pattern)}
    assert set(GUIDE.iterdir()) <= shipped
