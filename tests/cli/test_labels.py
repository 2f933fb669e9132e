"""`--labels`: several labels per image, learned with binary cross-entropy and judged by the mAP."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import onnxruntime
import pytest
from safetensors.torch import save_file

import nestify as library
from nestify.data.dataset import open_images
from nestify.data.loaders import eval_loader
from nestify.file.reader import open_nested_file
from tests.cli.driver import CHECKPOINT, nestify
from tests.evaluation.test_precision import by_definition

MODEL = ("test_resnet", "--checkpoint", CHECKPOINT, "--input-size", "32", "--workers", "0")
SHORT = (
    *("--levels", "0.5,0", "--epochs", "1", "--finetune-epochs", "2", "--batch-size", "32"),
    *("--set", "schedule.fit=false"),
)
RULES = {"even": (0, 2, 4, 6, 8), "loop": (0, 6, 8, 9), "big": (5, 6, 7, 8, 9)}


@pytest.fixture(scope="module")
def photos(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The digits in one folder, with a table that says which are even, have a loop, or are big."""
    root = tmp_path_factory.mktemp("photos")
    rows: list[list[object]] = [["file", *RULES]]
    for file in sorted((digits_folder / "train").glob("*/*.png")):
        name, digit = f"{file.parent.name}-{file.name}", int(file.parent.name)
        shutil.copy(file, root / name)
        rows.append([name, *(int(digit in digits) for digits in RULES.values())])
    with (root / "labels.csv").open("w", newline="", encoding="utf-8") as table:
        csv.writer(table).writerows(rows)
    return root


@pytest.fixture(scope="module")
def learned(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learned") / "several.nested.safetensors"
    labels = photos / "labels.csv"
    logs = ("--log", "csv", "--log", "tensorboard")
    done = nestify("compress", *MODEL, "--data", photos, "--labels", labels, *SHORT, *logs, "-o", path)
    assert done.code == 0, done.err
    assert "validation mAP" in done.err
    assert "top-1" not in done.err + done.out
    assert "accura" not in done.err + done.out
    assert "mAP %" in done.out
    return path


def test_the_file_holds_precisions_and_no_accuracy(learned: Path) -> None:
    manifest = open_nested_file(learned).manifest
    assert manifest.model.class_names == list(RULES)
    assert set(manifest.original) == {"map", "loss"}
    assert manifest.held_out is not None
    assert manifest.held_out.unlabelled
    train = manifest.recipe["train"]
    assert isinstance(train, dict)
    assert train["loss"] == "bce"
    for level in manifest.levels:
        metrics = level.metrics
        assert (metrics.top1, metrics.top5, metrics.top1_before, metrics.agreement) == (None,) * 4
        assert metrics.map is not None
        assert metrics.map > 50
        assert metrics.map_before is not None


def test_logs_have_precisions(learned: Path) -> None:
    text = learned.with_name("several.csv").read_text()
    assert "eval_map_1" in text
    assert "top1" not in text


def test_eval_is_the_map_of_the_logits(learned: Path, photos: Path) -> None:
    labels = photos / "labels.csv"
    done = nestify(
        "eval", learned, "--data", photos, "--labels", labels, "--all-images", "--json", "--min-map", "1"
    )
    document = done.document
    assert (done.code, document["min_map"], document["passed"]) == (0, 1, True)
    assert "consensus" not in document
    images = open_images(str(photos), "train", labels=str(labels), class_names=list(RULES))
    model = library.load(learned)
    batches = list(eval_loader(images, model.spec.preprocessing, batch_size=512))
    for level in document["levels"]:
        logits = np.concatenate([model(batch, level=level["level"]).detach().numpy() for batch, _ in batches])
        target = np.concatenate([each.numpy() for _, each in batches]) > 0
        expected = [by_definition(logits[:, k], target[:, k]) for k in range(len(RULES))]
        assert level["map"] == pytest.approx(100 * np.mean(expected), abs=0.01)
        assert "top1" not in level
    missed = nestify("eval", learned, "--data", photos, "--labels", labels, "--min-map", "100")
    assert missed.code == 1
    assert "below --min-map 100" in missed.err


def test_everything_that_shows_scores_shows_precisions(learned: Path, tmp_path: Path) -> None:
    table = nestify("report", learned)
    assert "mAP %" in table.out
    assert "top-1" not in table.out
    page = tmp_path / "report.html"
    assert nestify("report", learned, "--format", "html", "-o", page).code == 0
    text = page.read_text()
    assert "Mean average precision against MACs" in text
    assert "Validation: mAP" in text
    assert "top-1" not in text
    assert nestify("card", learned, "-o", tmp_path / "card").code == 0
    card = (tmp_path / "card" / "README.md").read_text()
    assert "mean_average_precision" in card
    assert ".sigmoid()[0]" in card
    assert "op-1" not in card
    config = json.loads((tmp_path / "card" / "config.json").read_text())
    assert config["levels"][0]["map"] == open_nested_file(learned).manifest.levels[0].metrics.map
    document = nestify("report", learned, "--json").document
    assert document["levels"][0]["map"] > 50
    gates = tmp_path / "gates.toml"
    gates.write_text("[gates]\nmin_map = 100\n")
    missed = nestify("report", learned, "--check", gates)
    assert missed.code == 1
    assert "min_map" in missed.out


@pytest.mark.long
def test_int8_is_judged_by_precision(learned: Path, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "core.onnx"
    options = ("--level", "1", "--int8", "--data", photos, "--max-drop", "100", "-o", output)
    refused = nestify("export", learned, *options)
    assert refused.code == 2
    assert "--labels" in refused.err
    done = nestify("export", learned, *options, "--labels", photos / "labels.csv", "--json")
    found = done.document["int8"]
    assert found["drop"] == pytest.approx(found["float32_map"] - found["map"])
    assert onnxruntime.InferenceSession(str(output)).get_outputs()[0].name == "logits"


def test_a_level_is_added_with_the_labels_in_another_order(
    learned: Path, photos: Path, tmp_path: Path
) -> None:
    core, larger, checkpoint = (tmp_path / f"{name}.safetensors" for name in ("core", "larger", "dense"))
    assert nestify("slice", learned, "--level", "1", "-o", core).code == 0
    save_file(library.load(learned, level=2).state_dict(), checkpoint)
    rows = [line.split(",") for line in (photos / "labels.csv").read_text().split()]
    for name, columns in (("turned", (0, 3, 1, 2)), ("fewer", (0, 1, 2))):
        table = "\n".join(",".join(row[column] for column in columns) for row in rows)
        (tmp_path / f"{name}.csv").write_text(table)
    words = ("extend", core, "--levels", "0", "--checkpoint", checkpoint, "--data", photos)
    words = (*words, "--epochs", "0", "--workers", "0", "--labels")
    done = nestify(*words, tmp_path / "turned.csv", "-o", larger)
    assert done.code == 0, done.err
    old, new = open_nested_file(core).manifest, open_nested_file(larger).manifest
    assert new.levels[0] == old.levels[0]
    trained = open_nested_file(learned).manifest.levels[1].metrics.map
    assert new.levels[1].metrics.map == pytest.approx(trained, abs=0.5)  # the same labels by name
    refused = nestify(*words, tmp_path / "fewer.csv", "-o", larger)
    assert refused.code == 3
    assert "'big'" in refused.message


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ((), "several labels per image"),
        (("--unlabelled",), "no class to agree on"),
        (("--labels", "labels.csv", "--unlabelled"), "exclude each other"),
        (("--labels", "labels.csv", "--cascade", "0.8"), "--cascade needs one class per image"),
        (("--labels", "labels.csv", "--min-top1", "50"), "use --min-map"),
        (("--min-map", "50"), "give --labels"),
    ],
)
def test_wrong_options_of_eval(learned: Path, photos: Path, options: tuple[str, ...], told: str) -> None:
    done = nestify("eval", learned, "--data", photos, *options)
    assert done.code == 2
    assert told in done.err
