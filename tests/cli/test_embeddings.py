"""Embeddings learned without labels: from the original's alone, judged by their cosine similarity."""

import json
from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from safetensors.torch import load_file

import nestify as library
from nestify.data.dataset import open_images
from nestify.data.loaders import eval_loader
from nestify.file.reader import open_nested_file
from tests.cli.driver import CHECKPOINT, nestify

UNFITTED = ("--set", "schedule.fit=false")
MODEL = ("test_resnet", "--checkpoint", CHECKPOINT, "--input-size", "32", "--workers", "0", "--unlabelled")
BACKBONE = ("--set", "model.kwargs.num_classes=0")
STEPS = (
    *("--epochs", "1", "--batch-size", "32", "--lr", "0.001", "--max-train", "160", "--max-val", "50"),
    *("--set", "train.recalibrate_batches=2"),
)
SHORT = ("--schedule", "channel", "--levels", "0.5,1", *STEPS, "--set", "schedule.fit_images=16")


@pytest.fixture(scope="module")
def learned(digits_folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("learned") / "embedding.nested.safetensors"
    data = ("--data", digits_folder / "train", "--set", "gates.min_cosine=10")
    done = nestify("compress", *MODEL, *BACKBONE, *data, *SHORT, "-o", path)
    assert done.code == 0, done.err
    assert "validation cosine" in done.err
    assert "keep_outputs" in done.err
    assert "min_cosine" in done.out
    assert "agreement" not in done.err + done.out
    assert "top-1" not in done.err + done.out
    return path


def test_the_file_holds_similarities_and_whole_embeddings(learned: Path) -> None:
    manifest = open_nested_file(learned).manifest
    assert manifest.model.num_classes == 0
    assert manifest.model.keep_outputs
    assert manifest.original == {}
    features = timm.create_model("test_resnet", num_classes=0).num_features
    for level in manifest.levels:
        metrics = level.metrics
        assert level.feature_channels == [features]
        assert (metrics.top1, metrics.agreement, metrics.map) == (None,) * 3
        assert metrics.cosine is not None
        assert metrics.cosine > 0.5
        assert metrics.cosine_before is not None
    lines = [
        json.loads(line) for line in learned.with_name("embedding.metrics.jsonl").read_text().splitlines()
    ]
    [epoch] = [line for line in lines if line["event"] == "train"]
    assert not {"top1", "agreement"} & epoch.keys()


def test_eval_is_what_timm_computes(learned: Path, digits_folder: Path) -> None:
    words = ("--data", digits_folder / "train", "--unlabelled", "--all-images", "--original", CHECKPOINT)
    done = nestify("eval", learned, *words, "--min-cosine", "10", "--json")
    assert done.code == 0, done.err
    model = timm.create_model("test_resnet", num_classes=0).eval()
    weights = load_file(CHECKPOINT)
    model.load_state_dict({key: tensor for key, tensor in weights.items() if not key.startswith("fc.")})
    nested = library.load(learned)
    images = open_images(str(digits_folder / "train"), "train", labelled=False)
    batches = [batch for batch, _ in eval_loader(images, nested.spec.preprocessing, batch_size=512)]
    with torch.no_grad():
        theirs = torch.cat([model(batch) for batch in batches])
        for level in done.document["levels"]:
            ours = torch.cat([nested(batch, level=level["level"]) for batch in batches])
            expected = float(torch.cosine_similarity(ours, theirs).mean())
            assert level["cosine"] == pytest.approx(expected, abs=1e-5)
            assert "agreement" not in level
    assert done.document["passed"] is True
    assert nestify("eval", learned, *words, "--min-cosine", "100").code == 1
    refused = nestify("eval", learned, *words, "--min-agreement", "10")
    assert refused.code == 2
    assert "--min-cosine" in refused.err


def test_reports_and_neighbours(learned: Path, digits_folder: Path, tmp_path: Path) -> None:
    assert "cosine %" in nestify("report", learned).out
    page = tmp_path / "page.html"
    assert nestify("report", learned, "--format", "html", "-o", page).code == 0
    assert "Similarity against MACs" in page.read_text()
    document = nestify("eval", learned, "--knn", digits_folder, "--max-images", "50", "--json").document
    assert [level["features"] for level in document["levels"]] == ["embedding"] * 2


@pytest.mark.long
def test_int8_is_compared_with_the_level(learned: Path, digits_folder: Path, tmp_path: Path) -> None:
    output = tmp_path / "core.onnx"
    words = ("--level", "1", "--int8", "--data", digits_folder, "-o", output, "--json")
    done = nestify("export", learned, *words)
    assert done.code == 0, done.err
    assert done.document["int8"]["cosine"] > 90
    assert "'embedding'" in done.document["load"]
    assert onnxruntime.InferenceSession(str(output)).get_outputs()[0].name == "embedding"


def test_feature_maps_learn_too(digits_folder: Path, tmp_path: Path) -> None:
    path = tmp_path / "maps.nested.safetensors"
    maps = ("--set", "model.pretrained=false", "--set", "model.kwargs.features_only=true")
    words = ("--input-size", "32", "--workers", "0", "--unlabelled", "--data", digits_folder / "train")
    done = nestify(
        "compress", "test_resnet", *maps, *words, "--levels", "0.5,0", *STEPS, *UNFITTED, "-o", path
    )
    assert done.code == 0, done.err
    full = open_nested_file(path).manifest.levels[1]
    assert (
        full.feature_channels == timm.create_model("test_resnet", features_only=True).feature_info.channels()
    )
    assert full.metrics.cosine is not None
    assert full.metrics.cosine_before == pytest.approx(1)


@pytest.mark.parametrize("maps", [False, pytest.param(True, marks=pytest.mark.long)])
def test_a_level_is_added_and_the_core_stays(
    maps: bool, learned: Path, digits_folder: Path, tmp_path: Path
) -> None:
    """Backbones take their weights from a checkpoint that has a classifier too."""
    whole, core, larger = learned, tmp_path / "core.safetensors", tmp_path / "larger.safetensors"
    data = ("--data", digits_folder / "train")
    if maps:
        whole = tmp_path / "maps.nested.safetensors"
        words = ("--set", "model.kwargs.features_only=true", *data)
        made = nestify("compress", *MODEL, *words, "--levels", "0.5,0", *STEPS, *UNFITTED, "-o", whole)
        assert made.code == 0, made.err
    assert nestify("slice", whole, "--level", "1", "-o", core).code == 0
    options = ("--checkpoint", CHECKPOINT, *data, "--workers", "0", "--epochs", "0", "-o", larger)
    done = nestify("extend", core, "--levels", "0" if maps else "1", *options)
    assert done.code == 0, done.err
    old, new = open_nested_file(core).manifest, open_nested_file(larger).manifest
    assert new.levels[0] == old.levels[0]
    assert new.levels[1].metrics.cosine == pytest.approx(1, abs=1e-4)
    assert new.levels[1].feature_channels == open_nested_file(whole).manifest.levels[1].feature_channels
    assert nestify("verify", larger).code == 0
    assert nestify("slice", larger, "--level", "1", "-o", tmp_path / "again.safetensors").code == 0
    assert (tmp_path / "again.safetensors").read_bytes() == core.read_bytes()


@pytest.mark.parametrize(
    ("words", "told"),
    [
        (("--set", "gates.min_agreement=50"), "min_cosine"),
        (("--teacher", "test_vit"), "train.teacher"),
    ],
)
def test_what_compares_classes_is_refused(
    words: tuple[str, ...], told: str, digits_folder: Path, tmp_path: Path
) -> None:
    data = ("--data", digits_folder / "train", "-o", tmp_path / "x.safetensors")
    done = nestify("compress", *MODEL, *BACKBONE, *data, *words)
    assert done.code == 2
    assert told in done.err


def test_labels_need_a_classifier(digits_folder: Path, tmp_path: Path) -> None:
    words = (*MODEL[:-1], *BACKBONE, "--data", digits_folder, "-o", tmp_path / "x.safetensors")
    done = nestify("compress", *words)
    assert done.code == 3
    assert "--unlabelled" in done.err
