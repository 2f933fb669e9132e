"""`nestify compress` from its options to its output: what it prints and writes, and where."""

import filecmp
from pathlib import Path

import torch

from nestify import load
from nestify.file.reader import open_nested_file
from nestify.files import metrics_path
from tests.cli.driver import CHECKPOINT, QUICK, TWO_STEPS, events, nestify, stored_recipe

PLAN_STEPS = 132  # 6 epochs of 1438 images in batches of 64, the last incomplete one dropped


def test_table_on_stdout_progress_on_stderr_log_next_to_the_file(tmp_path: Path) -> None:
    done = nestify("compress", "digits", *TWO_STEPS)
    assert done.code == 0
    assert {path.name for path in tmp_path.iterdir()} == {"digits.nested.safetensors", "digits.metrics.jsonl"}

    lines = done.out.splitlines()
    assert lines[0] == "test_resnet, 10 classes"
    head = next(line for line in lines if line.startswith("level"))
    assert head.split("  ")[-3:] == ["top-1 %", "top-1 interval", "top-5 %"]
    assert [line.split()[1] for line in lines if "level" in line and "0." in line] == [
        "level1",
        "level2",
        "level3",
    ]
    assert lines[-1] == "Written: digits.nested.safetensors"

    for expected in (
        "images: 200 to train on, 50 to validate on",
        "2 of nested training",
        "train epoch 1 (2/2",
    ):
        assert expected in done.err
        assert expected not in done.out

    log = tmp_path / "digits.metrics.jsonl"
    [trained] = events(log, "train")
    assert (trained["step"], trained["total_steps"], len(trained["losses"])) == (2, 2, 3)
    original, after = events(log, "evaluation")
    assert (original["moment"], after["moment"]) == ("original", "after")
    stored = [level.metrics.top1 for level in open_nested_file("digits.nested.safetensors").manifest.levels]
    assert [level["top1"] for level in after["levels"]] == stored


def test_levels_before_training_are_evaluated_by_default() -> None:
    both = ("--set", "train.eval_before=true", "--set", "schedule.fit=false")
    done = nestify("compress", "digits", *TWO_STEPS, *both, "--json")
    [before] = [
        event for event in events(Path("digits.metrics.jsonl"), "evaluation") if event["moment"] == "before"
    ]
    assert [level["top1_before"] for level in done.document["levels"]] == [
        level["top1"] for level in before["levels"]
    ]


def test_json_is_one_document() -> None:
    done = nestify("compress", "digits", *QUICK, "--json", "-o", "a.safetensors")
    assert done.code == 0
    document = done.document
    assert document["schema_version"] == 1
    assert document["path"] == "a.safetensors"
    assert [level["name"] for level in document["levels"]] == ["level1", "level2", "level3"]
    size = Path("a.safetensors").stat().st_size
    assert document["file_bytes"] == document["levels"][-1]["prefix_bytes"] == size
    assert document["levels"][-1]["layers"][0]["name"] == "conv1.0.weight"
    assert "evaluating" in done.err


def test_dry_run_writes_nothing(tmp_path: Path) -> None:
    text = nestify("compress", "digits", "--dry-run")
    assert text.code == 0
    assert f"0 of fine-tuning, {PLAN_STEPS} of nested training" in text.out
    assert "estimate: " in text.out

    plan = nestify("compress", "digits", "--dry-run", "--json", "--finetune-epochs", "2").document
    assert plan["schema_version"] == 1
    assert (plan["steps"], plan["finetune_steps"]) == (PLAN_STEPS, 44)
    assert plan["seconds"] > 0
    assert [level["level"] for level in plan["levels"]] == [1, 2, 3]
    assert list(tmp_path.iterdir()) == []


def test_an_option_beats_the_recipe_and_the_recipe_the_default(tmp_path: Path) -> None:
    (tmp_path / "mine.toml").write_text(
        'extends = "digits"\nseed = 7\n[train]\nepochs = 3\nbatch_size = 100\n[data]\nmax_train = 300\n'
    )
    assert nestify("compress", "mine.toml", "--dry-run", "--json").document["steps"] == 3 * 3
    beaten = ("--epochs", "0", "--batch-size", "50", "--set", "train.recalibrate_batches=1")
    beaten += ("--max-val", "50", "--set", "schedule.fit=false", "--set", "train.eval_before=false")
    assert nestify("compress", "mine.toml", *beaten, "-o", "a.safetensors").code == 0
    recipe = stored_recipe(Path("a.safetensors"))
    assert (recipe["train"]["epochs"], recipe["train"]["batch_size"]) == (0, 50)
    assert (recipe["seed"], recipe["data"]["max_train"]) == (7, 300)
    assert recipe["train"]["lr"] == 0.01


def test_the_seed_decides_every_byte() -> None:
    """It decides the order of images, augmentation, mixup, the levels of a step, and dropout."""
    chances = ("--levels", "0.9,0.8,0.5,0", "--epochs", "1", "--max-train", "32", "--batch-size", "16")
    chances += ("--max-val", "10")
    for setting in ("train.sandwich=2", "augment.mixup=0.2", "model.kwargs.drop_rate=0.3"):
        chances += ("--set", setting)
    output = Path("out.safetensors")
    for name, seed in (("first", "1"), ("second", "1"), ("other", "2")):
        assert nestify("compress", "digits", *TWO_STEPS, *chances, "--seed", seed, "-o", output).code == 0
        output.rename(name)
    assert filecmp.cmp("first", "second", shallow=False)
    first, other = (
        load(name).at_level(1).state_dict()["layer1.0.conv1.weight"] for name in ("first", "other")
    )
    assert not torch.equal(first, other)


def test_an_older_file_is_replaced(tmp_path: Path) -> None:
    output = tmp_path / "digits.nested.safetensors"
    output.write_text("something else")
    assert nestify("compress", "digits", *QUICK).code == 0
    assert open_nested_file(output).n_levels == 3


def test_a_model_by_name_with_a_folder_of_images(digits_folder: Path) -> None:
    words = ("compress", "test_resnet", "--checkpoint", CHECKPOINT, "--input-size", "32", "--epochs", "0")
    few = ("--batch-size", "32", "--set", "train.recalibrate_batches=1", "--set", "schedule.fit=false")
    assert nestify(*words, *few, "--data", digits_folder).code == 0
    assert open_nested_file("test_resnet.nested.safetensors").manifest.model.class_names == [*"0123456789"]
    held_out = nestify(
        *words, *few, "--data", digits_folder / "train", "--holdout", "0.2", "--dry-run", "--json"
    )
    assert (held_out.document["train_images"], held_out.document["val_images"]) == (160, 40)


def test_the_log_is_named_after_the_output() -> None:
    for name in ("a.nested.safetensors", "a.safetensors", "a"):
        assert metrics_path(Path("b", name)) == Path("b", "a.metrics.jsonl")
