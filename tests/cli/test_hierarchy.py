"""Levels that predict coarser classes, from the command line to the exported model."""

from pathlib import Path

import onnxruntime
import pytest
import timm
import torch
from PIL import Image
from timm.data import create_transform

import nestify as package
from nestify.file.reader import open_nested_file
from tests.cli.driver import TWO_STEPS, UNTRAINED, nestify

ROUND = {
    "0": "round",
    "6": "round",
    "8": "round",
    "9": "round",
    "1": "straight",
    "4": "straight",
    "7": "straight",
}
KINDS = ("open", "round", "straight")


@pytest.fixture
def table() -> Path:
    path = Path("kinds.csv")
    rows = [f"{digit},{ROUND.get(str(digit), 'open')}" for digit in range(10)]
    path.write_text("\n".join(["digit,kind", *rows]))
    return path


@pytest.mark.parametrize(
    "schedule",
    [(), pytest.param(("--schedule", "channel", "--levels", "0.25,0.5,1"), marks=pytest.mark.long)],
)
def test_the_core_level_predicts_the_coarse_classes(
    schedule: tuple[str, ...], table: Path, digits_folder: Path
) -> None:
    done = nestify("compress", "digits", *UNTRAINED, *schedule, "--hierarchy", table, "-o", "a", "--json")
    assert done.code == 0, done.err
    levels = done.document["levels"]
    assert [(level["classes"], level["class_set"]) for level in levels] == [(3, "kind"), (10, ""), (10, "")]
    manifest = open_nested_file("a").manifest
    assert manifest.class_names(1) == list(KINDS)
    assert nestify("verify", "a").code == 0

    evaluated = nestify("eval", "a", "--data", digits_folder, "--json").document["levels"]
    assert [(level["classes"], level["class_set"]) for level in evaluated] == [
        (3, "kind"),
        (10, ""),
        (10, ""),
    ]
    files = sorted((digits_folder / "validation").glob("*/*.png"))
    preprocessing = manifest.model.preprocessing
    transform = create_transform(
        preprocessing.input_size, mean=preprocessing.mean, std=preprocessing.std,
        interpolation=preprocessing.interpolation, crop_pct=preprocessing.crop_pct,
    )  # fmt: skip
    batch = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    digits = [file.parent.name for file in files]
    right = {
        1: [KINDS.index(ROUND.get(digit, "open")) for digit in digits],
        2: [int(digit) for digit in digits],
    }
    for level, labels in right.items():
        with torch.no_grad():
            answers = package.load("a", level=level)(batch).argmax(-1)
        top1 = 100 * (answers == torch.tensor(labels)).float().mean().item()
        assert evaluated[level - 1]["top1"] == pytest.approx(top1)
    assert "3 kind" in nestify("eval", "a", "--data", digits_folder).out
    report = nestify("report", "a")
    assert "3 kind" in report.out
    assert "its own classifier" in " ".join(report.out.split())


@pytest.mark.long
def test_exports_predict_the_levels_own_classes(table: Path) -> None:
    assert nestify("compress", "digits", *UNTRAINED, "--hierarchy", table, "-o", "a").code == 0
    images = torch.randn(2, 3, 32, 32)
    with torch.no_grad():
        expected = package.load("a", level=1)(images)
    assert nestify("export", "a", "--level", "1", "-o", "core.onnx").code == 0
    session = onnxruntime.InferenceSession("core.onnx")
    (logits,) = session.run(["logits"], {"images": images.numpy()})
    torch.testing.assert_close(torch.from_numpy(logits), expected, rtol=1e-4, atol=1e-4)
    assert session.get_modelmeta().custom_metadata_map["classes"] == '["open", "round", "straight"]'
    assert nestify("export", "a", "--level", "1", "--format", "timm", "-o", "core/").code == 0
    model = timm.create_model("local-dir:core", pretrained=True).eval()
    with torch.no_grad():
        torch.testing.assert_close(model(images), expected, rtol=0, atol=1e-5)
    assert model.pretrained_cfg["label_names"] == list(KINDS)


def test_training_improves_the_coarse_level(table: Path) -> None:
    done = nestify(
        "compress", "digits", *TWO_STEPS, "--hierarchy", table, "--teacher", "both", "-o", "a", "--json"
    )
    assert done.code == 0, done.err
    assert [level["classes"] for level in done.document["levels"]] == [3, 10, 10]


@pytest.mark.parametrize(
    ("words", "code", "problem"),
    [
        (("--set", "level[1].classes=kind"), 2, 'level[1].classes = "kind" needs data.hierarchy'),
        (
            ("--hierarchy", "kinds.csv", "--set", "level[3].classes=kind"),
            2,
            "the full level predicts the data's own",
        ),
        (("--hierarchy", "kinds.csv", "--set", "level[1].classes=kin"), 2, "did you mean 'kind'?"),
        (
            ("--hierarchy", "none.csv"),
            3,
            "data.hierarchy = none.csv is not a file; give the path of a",
        ),
        (("--hierarchy", "short.csv"), 3, "short.csv: lacks the class '1' and 8 others"),
    ],
)
def test_refusals(words: tuple[str, ...], code: int, problem: str, table: Path) -> None:
    Path("short.csv").write_text("digit,kind\n0,round\n")
    done = nestify("compress", "digits", *UNTRAINED, *words)
    assert done.code == code
    assert problem in done.err
