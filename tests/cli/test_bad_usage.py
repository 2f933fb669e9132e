"""Invalid options, recipes and names: exit code 2 before any work, with all problems at once."""

from pathlib import Path

import pytest

from tests.cli.conftest import Refused
from tests.cli.driver import QUICK, nestify

START = ("compress", "digits", *QUICK)


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["--levels", "0.5,0.8,0"], "level[2].sparsity = 0.8 is not below level[1].sparsity = 0.5"),
        (["--levels", "0.8,0.8"], "level[2].sparsity = 0.8 is not below level[1].sparsity = 0.8"),
        (["--levels", "0.5"], "1 level given; a nested network has 2 to 254"),
        (["--set", "level=[]"], "0 levels given; a nested network has 2 to 254"),
        (["--levels", "1.5,0"], "level[1].sparsity = 1.5 is not in [0, 1)"),
        (["--levels", "0.5,-0.5"], "level[2].sparsity = -0.5 is not in [0, 1)"),
        (["--levels", "half,0"], 'levels has "half", not a sparsity (0.8), N:M (2:4) or budget (macs=0.5)'),
        (["--levels", "1:4,4:8,0"], "patterns 1:4, 4:8 do not nest"),
        (["--set", "train.epoch=3"], "unknown key train.epoch; did you mean train.epochs?"),
        (["--set", "nonsense=3"], "unknown key nonsense; a recipe has output, dtype, seed"),
        (["--set", "nonsense"], "setting 'nonsense' is not KEY=VALUE"),
        (["--batch-size", "0"], "train.batch_size = 0 is less than 1"),
        (["--workers", "-1"], "data.workers = -1 is less than 0"),
        (["--lr", "0"], "train.lr = 0 is not above 0"),
        (["--epochs", "nan"], "train.epochs = nan is not a finite number"),
        (["--seed", "-1"], "seed = -1 is not in [0, 4294967296)"),
        (["--schedule", "head"], 'schedule.kind = "head" is not '),
        (["--score", "random"], 'schedule.score = "random" is not '),
        (["--bn", "shared"], 'train.bn = "shared" is not '),
        (["--pattern", "2:4"], 'schedule.pattern = "2:4" is N:M'),
        (["--output", ""], 'output = "" is empty'),
        (["--new-head", "--finetune-epochs", "0"], "model.new_head = true needs finetune.epochs above 0"),
        (["--skip", "nothing"], "schedule.skip = 'nothing' matches no maskable weight of test_resnet"),
        (["--skip", "*"], "schedule.skip = ['*'] leaves no weight of test_resnet to mask"),
        (
            ["--opt", "adam_w"],
            "train.opt = 'adam_w' cannot be used (Optimizer w not found in registry); try ",
        ),
        (["--opt", "adahessian"], "train.opt = 'adahessian' needs second derivatives"),
        (["--device", "cuda:99"], "device = 'cuda:99' is not available here; give auto or cpu"),
        (["--device", "abacus"], "device = 'abacus' is not available here; give auto or cpu"),
        (["--device", "meta"], "device = 'meta' is not available here; give auto or cpu"),
        (["--device", "a b"], 'device = "a b" is not a device'),
    ],
)
def test_options_of_compress(words: list[str], expected: str, refused: Refused) -> None:
    message = refused(2, *START, *words)
    assert expected in message
    assert "\n" not in message


def test_the_message_says_that_an_option_set_the_value(refused: Refused) -> None:
    message = refused(2, *START, "--batch-size", "0")
    assert message.startswith("digits: ")
    assert message.endswith(" (set by an option) (flag: --batch-size)")


def test_all_problems_are_reported_at_once(tmp_path: Path) -> None:
    (tmp_path / "bad.toml").write_text("[train]\nepoch = 3\nlr = -1.0\n[[level]]\nsparsity = 2.0\n")
    done = nestify("compress", "bad.toml")
    assert done.code == 2
    for problem in (
        *("unknown key train.epoch; did you mean train.epochs?", "train.lr = -1 is not above 0"),
        *("level[1].sparsity = 2.0 is not in [0, 1)", "1 level given", "model.name is not given"),
    ):
        assert f"bad.toml: {problem}" in done.err
    assert len(done.err.splitlines()) == 6  # the sixth is about data.path


@pytest.mark.parametrize(
    ("model", "expected"),
    [
        ("test_resnett", "model.name = 'test_resnett' is not a model of timm "),
        (
            "nowhere.toml",
            "nowhere.toml: there is no such file; give a .toml or .json recipe, a model's name, or",
        ),
        (
            "digits.nested.safetensors",
            "this is not a .toml or .json recipe; a checkpoint goes with its model's name",
        ),
    ],
)
def test_models_and_recipes_that_are_not_there(model: str, expected: str, refused: Refused) -> None:
    assert expected in refused(2, "compress", model, "--data", "embedded/digits")


def test_no_images_named(refused: Refused) -> None:
    assert refused(2, "compress", "test_resnet").startswith("data.path is not given; set it in the recipe or")


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["compres"], "No such command 'compres'"),
        (["compress"], "Missing argument 'RECIPE_OR_MODEL'"),
        (["compress", "digits", "--epoch", "1"], "No such option: --epoch"),
        (["compress", "digits", "--epochs", "many"], "Invalid value for '--epochs'"),
        (["report"], "Missing argument 'FILE_OR_URL'"),
        (["report", "a", "b"], "unexpected extra argument"),
        (
            ["report", "a", "--format", "pdf"],
            "'--format': 'pdf' is not one of 'table', 'json', 'markdown', 'html'",
        ),
        (
            ["export", "a", "--level", "1", "--format", "pdf"],
            "'--format': 'pdf' is not one of 'timm', 'onnx', 'pt2'",
        ),
        (["eval", "a"], "Missing option '--data'"),
        (["eval", "a", "--data", "b", "--batch-size", "0"], "Invalid value for '--batch-size'"),
        (["eval", "a", "--data", "b", "--workers", "-1"], "Invalid value for '--workers'"),
        (["eval", "a", "--data", "b", "--max-images", "0"], "Invalid value for '--max-images'"),
        (["eval", "a", "--data", "b", "--min-top1", "101"], "Invalid value for '--min-top1'"),
        (
            ["eval", "a", "--data", "b", "--on-bad-image", "hide"],
            "'--on-bad-image': 'hide' is not one of 'refuse', 'skip'",
        ),
        (
            ["eval", "a", "--data", "b", "--consensus", "most"],
            "'--consensus': 'most' is not one of 'mean', 'learned'",
        ),
        (["--unknown"], "No such option: --unknown"),
    ],
)
def test_command_lines_that_do_not_parse(words: list[str], expected: str, tmp_path: Path) -> None:
    done = nestify(*words)
    assert done.code == 2
    assert expected in done.err
    assert "Value error" not in done.err
    assert "Traceback" not in done.err
    assert done.out == ""
    assert list(tmp_path.iterdir()) == []


def test_eval_refuses_an_unknown_device(digits_file: Path, refused: Refused) -> None:
    words = ("eval", digits_file, "--data", "embedded/digits", "--device")
    for device in ("abacus", "meta", "cuda:99"):
        assert refused(2, *words, device).startswith(f"device = '{device}' is not available here")
