"""`--unlabelled`: levels learned from the original's predictions, and evaluated by agreement with it."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

from nestify.file.reader import open_nested_file
from tests.cli.driver import CHECKPOINT, nestify

MODEL = ("test_resnet", "--checkpoint", CHECKPOINT, "--input-size", "32", "--workers", "0", "--unlabelled")
UNFITTED = ("--set", "schedule.fit=false")
SHORT = ("--levels", "0.5,0", "--epochs", "1", "--batch-size", "32", "--lr", "0.001", *UNFITTED)


@pytest.fixture(scope="module")
def photos(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Half of the digits in one folder, the others two folders deeper."""
    root = tmp_path_factory.mktemp("photos")
    (root / "2023" / "summer").mkdir(parents=True)
    for k, file in enumerate(sorted((digits_folder / "train").glob("*/*.png"))):
        folder = root if k % 2 else root / "2023" / "summer"
        shutil.copy(file, folder / f"{file.parent.name}-{file.name}")
    return root


@pytest.fixture(scope="module")
def learned(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learned") / "without.nested.safetensors"
    done = nestify("compress", *MODEL, "--data", photos, *SHORT, "-o", path)
    assert done.code == 0, done.err
    assert "validation agreement" in done.err
    assert "  agreement " in done.err
    assert "top-1" not in done.err + done.out
    assert "accura" not in (done.err + done.out).replace("Accuracy was not measured", "")
    return path


def test_the_file_holds_agreement_and_no_accuracy(learned: Path) -> None:
    manifest = open_nested_file(learned).manifest
    assert manifest.original == {}
    assert manifest.model.num_classes == 10
    assert manifest.model.class_names is None
    assert manifest.held_out is not None
    assert manifest.held_out.unlabelled
    assert manifest.recipe["data"]["unlabelled"] is True  # type: ignore[call-overload, index]
    assert manifest.recipe["train"]["distill"] == 1  # type: ignore[call-overload, index]
    for level in manifest.levels:
        metrics = level.metrics
        assert (metrics.top1, metrics.top5, metrics.loss, metrics.top1_before) == (None,) * 4
        assert metrics.images == 20
        assert metrics.agreement is not None
        assert metrics.agreement > 50
        assert metrics.agreement_before is not None
        assert metrics.cosine is not None


def test_reports_call_it_agreement(learned: Path, tmp_path: Path) -> None:
    done = nestify("report", learned)
    assert "agreement %" in done.out
    assert "top-1" not in done.out
    levels = nestify("report", learned, "--json").document["levels"]
    assert all(level["top1"] is None and level["agreement"] > 50 for level in levels)
    assert nestify("report", learned, "--format", "html", "-o", tmp_path / "page.html").code == 0
    page = (tmp_path / "page.html").read_text()
    assert "<h2>Agreement</h2>" in page
    assert "Validation: agreement" in page  # the curves, from the log of the run
    assert "top-1" not in page.lower()


def test_logs_call_it_agreement(learned: Path) -> None:
    lines = [json.loads(line) for line in learned.with_name("without.metrics.jsonl").read_text().splitlines()]
    [epoch] = [line for line in lines if line["event"] == "train"]
    assert "top1" not in epoch
    assert len(epoch["agreement"]) == 2
    assert {moment["moment"] for moment in lines if moment["event"] == "evaluation"} == {"before", "after"}
    assert all("top1" not in line["levels"][0] for line in lines if line["event"] == "evaluation")


def test_eval_is_what_timm_computes(learned: Path, photos: Path) -> None:
    """The agreement of level 1 with the original, by timm and Pillow on all images."""
    import nestify as package

    document = nestify(
        "eval", learned, "--data", photos, "--unlabelled", "--all-images", "--original", CHECKPOINT, "--json"
    ).document
    model = timm.create_model("test_resnet", num_classes=10).eval()
    model.load_state_dict(load_file(CHECKPOINT))
    config = resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    transform = create_transform(**config, is_training=False)
    images = torch.stack([transform(Image.open(f).convert("RGB")) for f in sorted(photos.rglob("*.png"))])
    level = package.load(learned).at_level(1)
    with torch.no_grad():
        ours, theirs = level(images), model(images)
    [core, full] = document["levels"]
    assert core["images"] == len(images) == 200
    assert core["agreement"] == pytest.approx(
        100 * float((ours.argmax(1) == theirs.argmax(1)).float().mean())
    )
    assert core["cosine"] == pytest.approx(float(torch.cosine_similarity(ours, theirs).mean()), abs=1e-5)
    assert core["agreement"] < 100 or core["cosine"] < 1
    assert full["cosine"] < 1  # trained, so that it is no longer the original
    assert not {"top1", "top5", "loss"} & core.keys()
    assert document["reference"] == str(CHECKPOINT)


def test_eval_compares_with_the_full_level(learned: Path, photos: Path) -> None:
    document = nestify("eval", learned, "--data", photos, "--unlabelled", "--json").document
    assert document["images"]["used"] == "held-out"
    assert document["levels"][1]["agreement"] == 100
    assert document["levels"][1]["cosine"] == pytest.approx(1)
    done = nestify("eval", learned, "--data", photos, "--unlabelled", "--level", "1")
    assert "agreement %" in done.out
    assert "top-1" not in done.out


def test_gates(learned: Path, photos: Path, tmp_path: Path) -> None:
    words = ("eval", learned, "--data", photos, "--unlabelled")
    assert nestify(*words, "--min-agreement", "10").code == 0
    core = nestify(*words, "--level", "1", "--json").document["levels"][0]["agreement"]
    if core < 100:
        assert nestify(*words, "--min-agreement", "100").code == 1
    gates = tmp_path / "gates.toml"
    gates.write_text("[gates]\nmin_agreement = 10\n")
    assert nestify("report", learned, "--check", gates).code == 0
    gates.write_text("[gates]\nmin_agreement = 99\n[gates.level.1]\nmin_agreement = 100\n")
    assert nestify("report", learned, "--check", gates).code == (0 if core == 100 else 1)


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--unlabelled", "--consensus", "mean"), "--consensus"),
        (("--unlabelled", "--cascade", "0.8"), "--cascade"),
        (("--unlabelled", "--save"), "--save"),
        (("--unlabelled", "--min-top1", "50"), "--min-agreement"),
        (("--min-agreement", "50"), "--unlabelled"),
        (("--original", "x.pth"), "--unlabelled"),
    ],
)
def test_eval_refuses_what_needs_labels(
    words: tuple[str, ...], option: str, learned: Path, photos: Path
) -> None:
    done = nestify("eval", learned, "--data", photos, *words)
    assert done.code == 2
    assert option in done.message


def test_folders_without_classes_name_the_remedy(learned: Path, photos: Path) -> None:
    assert "--unlabelled" in nestify("eval", learned, "--data", photos).message


def test_the_classifier_stays_whatever_the_folders_are(digits_folder: Path, tmp_path: Path) -> None:
    """Three class folders, and ten classes of the model."""
    data = tmp_path / "three"
    for name in "012":
        shutil.copytree(digits_folder / "train" / name, data / name)
    words = ("--levels", "0.5,0", "--epochs", "0", "--batch-size", "16", "-o", tmp_path / "o.safetensors")
    done = nestify("compress", *MODEL, "--data", data, *words, "--set", "schedule.fit_images=16")
    assert done.code == 0, done.err
    manifest = open_nested_file(tmp_path / "o.safetensors").manifest
    assert manifest.model.num_classes == 10
    assert manifest.levels[1].metrics.agreement == 100  # the original itself


@pytest.mark.parametrize(
    ("words", "option"),
    [
        (("--new-head",), "--new-head"),
        (("--finetune-epochs", "2"), "--finetune-epochs"),
        (("--teacher", "none"), "--teacher"),
        (("--hierarchy", "x.csv"), "--hierarchy"),
        (("--set", "augment.mixup=0.2"), "augment.mixup"),
        (("--set", "gates.min_top1=50"), "min_agreement"),
    ],
)
def test_compress_refuses_what_needs_labels(words: tuple[str, ...], option: str, photos: Path) -> None:
    done = nestify("compress", *MODEL, "--data", photos, *words)
    assert done.code == 2
    assert option in done.err
    assert "unlabelled" in done.err


@pytest.mark.parametrize("teacher", ["self", "both"])
def test_other_teachers(teacher: str, photos: Path, tmp_path: Path) -> None:
    output = tmp_path / "o.safetensors"
    words = ("--teacher", teacher, "--max-train", "64", "--set", "train.eval_before=false", "-o", output)
    done = nestify("compress", *MODEL, "--data", photos, *SHORT, *words)
    assert done.code == 0, done.err
    agreement = open_nested_file(output).manifest.levels[1].metrics.agreement
    assert agreement is not None
    assert agreement > 80


def test_class_names_name_the_outputs(photos: Path, tmp_path: Path) -> None:
    names = tmp_path / "names.txt"
    output = tmp_path / "o.safetensors"
    words = ("--data", photos, "--class-names", names, "--levels", "0.5,0", "--epochs", "0", "-o", output)
    names.write_text("\n".join(f"digit {k}" for k in range(10)))
    assert nestify("compress", *MODEL, *words, *UNFITTED).code == 0
    assert open_nested_file(output).manifest.model.class_names == [f"digit {k}" for k in range(10)]
    names.write_text("one\ntwo\n")
    assert "--class-names" in nestify("compress", *MODEL, *words).message


def test_knn_is_that_of_timms_features(learned: Path, digits_folder: Path) -> None:
    """The full level's k-NN accuracy by timm, Pillow and a loop."""
    import nestify as package

    done = nestify("eval", learned, "--knn", digits_folder, "--level", "2", "--json")
    assert done.code == 0, done.err
    document = done.document
    model = package.load(learned).at_level(2)
    config = resolve_model_data_config(model) | {"input_size": (3, 32, 32)}
    transform = create_transform(**config, is_training=False)

    def features(split: str) -> tuple[torch.Tensor, list[int]]:
        files = sorted((digits_folder / split).glob("*/*.png"))
        images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
        with torch.no_grad():
            found = model.forward_head(model.forward_features(images), pre_logits=True)
        return torch.nn.functional.normalize(found, dim=1), [int(file.parent.name) for file in files]

    (bank, labels), (queries, wanted) = features("train"), features("validation")
    right = 0
    for query, label in zip(queries, wanted, strict=True):
        votes = [0.0] * 10
        similarity = bank @ query
        for index in similarity.argsort(descending=True)[:20].tolist():
            votes[labels[index]] += float((similarity[index] / 0.07).exp())
        right += votes.index(max(votes)) == label
    [level] = document["levels"]
    assert (level["level"], level["name"], level["features"]) == (2, "level2", "pre-logits")
    assert level["knn"] == pytest.approx(100 * right / 80)
    assert (document["voting"], document["images"], document["held_out"]) == (200, 80, False)
    assert level["knn"] > 50


def test_knn_needs_no_validation_split_and_no_other_option(learned: Path, digits_folder: Path) -> None:
    done = nestify("eval", learned, "--knn", digits_folder / "train", "--max-images", "50")
    assert done.code == 0, done.err
    assert "k-NN %" in done.out
    assert "held out" in done.out
    done = nestify("eval", learned, "--knn", digits_folder, "--unlabelled", "--min-top1", "3")
    assert done.code == 2
    assert "--unlabelled" in done.message
    assert "--min-top1" in done.message
    assert "--unlabelled" in nestify("eval", learned, "--knn", digits_folder / "train" / "1").message


def test_the_model_card_calls_it_agreement(learned: Path, tmp_path: Path) -> None:
    done = nestify("card", learned, "-o", tmp_path / "folder")
    assert done.code == 0, done.err
    card = (tmp_path / "folder" / "README.md").read_text()
    assert "agreement %" in card
    assert "top-1" not in card.lower()
    assert "of each class" not in card
