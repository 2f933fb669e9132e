"""`nestify eval`: levels, forms of data, gates."""

import json
import shutil
from pathlib import Path

import pytest
import timm
import torch
from PIL import Image
from safetensors.torch import load_file
from timm.data import create_transform, resolve_model_data_config

import nestify as package
from tests.cli.driver import CHECKPOINT, DIGITS, at_terminal, nestify


def test_every_level_by_default(digits_file: Path, digits_folder: Path) -> None:
    done = nestify("eval", digits_file, "--data", digits_folder)
    assert done.code == 0
    assert done.err == ""
    lines = done.out.splitlines()
    assert lines[0] == f"{digits_file} on {digits_folder}"
    assert lines[2].split("  ")[0] == "level"
    assert [line.split()[:2] for line in lines[4:7]] == [["1", "level1"], ["2", "level2"], ["3", "level3"]]
    assert all(line.split()[6] == "80" for line in lines[4:7])
    assert lines[8] == f"Images: all 80 images of {digits_folder}/validation."


def test_the_full_level_is_as_good_as_the_plain_model(digits_file: Path, digits_folder: Path) -> None:
    """The full level of an untrained file is the plain model, evaluated here with timm and Pillow alone."""
    model = timm.create_model("test_resnet", num_classes=10).eval()
    model.load_state_dict(load_file(CHECKPOINT))
    config = resolve_model_data_config(model)
    config["input_size"] = (3, 32, 32)
    transform = create_transform(**config, is_training=False)
    files = sorted((digits_folder / "train").glob("*/*.png"))
    images = torch.stack([transform(Image.open(file).convert("RGB")) for file in files])
    with torch.no_grad():
        answers = model(images).argmax(1).tolist()
    right = sum(answer == int(file.parent.name) for answer, file in zip(answers, files, strict=True))

    [level] = nestify(
        "eval", digits_file, "--data", digits_folder, "--split", "train", "--level", "3", "--json"
    ).document["levels"]
    assert level["images"] == len(files)
    assert level["top1"] == pytest.approx(100 * right / len(files))


@pytest.mark.parametrize("level", ["2", "level2"])
def test_one_level(level: str, digits_file: Path, digits_folder: Path) -> None:
    done = nestify("eval", digits_file, "--data", digits_folder, "--level", level, "--json")
    document = done.document
    assert document["schema_version"] == 1
    assert [each["level"] for each in document["levels"]] == [2]
    assert document["levels"][0]["name"] == "level2"
    assert (document["skipped"], document["min_top1"], document["passed"]) == ({}, None, True)


def test_a_level_that_is_not_there(digits_file: Path, digits_folder: Path) -> None:
    for level in ("4", "0", "tiny"):
        done = nestify("eval", digits_file, "--data", digits_folder, "--level", level)
        assert done.code == 2
        assert done.message == (
            f"{digits_file} has no level '{level}'; give one of 1 (level1), 2 (level2), 3 (level3)"
        )


def test_gate(digits_file: Path, digits_folder: Path) -> None:
    words = ("eval", digits_file, "--data", digits_folder)
    top1 = [level["top1"] for level in nestify(*words, "--json").document["levels"]]
    assert top1[0] < top1[1]
    gate = f"{(top1[0] + top1[1]) / 2:.2f}"  # the core level misses it, the next level meets it

    failed = nestify(*words, "--min-top1", gate)
    assert failed.code == 1
    assert failed.message == (
        f"{digits_file}: level 1 (level1) has top-1 {top1[0]:.2f} %, below --min-top1 {float(gate):g}"
    )
    assert "level3" in failed.out
    document = nestify(*words, "--min-top1", gate, "--json")
    assert (document.code, document.document["passed"]) == (1, False)

    assert nestify(*words, "--min-top1", gate, "--level", "2").code == 0
    assert nestify(*words, "--min-top1", f"{top1[0]:.2f}").code == 0


def test_forms_of_data(digits_file: Path, digits_folder: Path, images: Path) -> None:
    def images_in(*words: str | Path) -> int:
        done = nestify("eval", digits_file, "--level", "3", "--json", *words)
        assert done.code == 0, done.err
        count: int = done.document["levels"][0]["images"]
        return count

    assert images_in("--data", digits_folder) == 80
    assert images_in("--data", digits_folder, "--split", "train") == 200
    assert images_in("--data", digits_folder / "validation") == 80
    assert images_in("--data", digits_folder, "--split", ".") == 280
    assert images_in("--data", DIGITS / "validation.tar") == 359
    assert images_in("--data", DIGITS) == 359
    assert images_in("--data", "embedded/digits", "--split", "train", "--max-images", "30") == 30
    (images / "validation").rename(images / "val")
    assert images_in("--data", images) == 80
    shutil.rmtree(images / "val" / "3")
    assert images_in("--data", images) == 72


def test_a_class_that_the_model_does_not_know(digits_file: Path, images: Path) -> None:
    (images / "validation" / "7").rename(images / "validation" / "seven")
    done = nestify("eval", digits_file, "--data", images)
    assert done.code == 3
    assert done.message.startswith(f"{images}/validation: class 'seven' is not among the model's 10 classes")


def test_unreadable_images(digits_file: Path, images: Path) -> None:
    damaged = sorted((images / "validation" / "5").iterdir())[:4]
    for file in damaged:
        file.write_bytes(file.read_bytes()[:50])
    refused = nestify("eval", digits_file, "--data", images)
    assert refused.code == 3
    assert refused.message.startswith(f"{damaged[0]}: not a readable image")
    assert "--on-bad-image skip" in refused.message

    words = ("eval", digits_file, "--data", images, "--on-bad-image", "skip")
    skipped = nestify(*words)
    assert skipped.code == 0
    assert skipped.out.splitlines()[-1] == (
        f"Skipped 4 unreadable images: {', '.join(map(str, damaged[:3]))}, ..."
    )
    document = nestify(*words, "--json").document
    assert document["skipped"].keys() == {str(file) for file in damaged}
    assert document["levels"][0]["images"] == 76


def test_worker_processes_change_nothing(digits_file: Path, digits_folder: Path) -> None:
    words = ("eval", digits_file, "--data", digits_folder, "--json", "--batch-size", "16")
    results = []
    for workers in ("0", "2"):
        levels = nestify(*words, "--workers", workers).document["levels"]
        results.append([(level["top1"], level["top5"], level["loss"]) for level in levels])
    assert results[0] == results[1]


def test_save_stores_the_accuracy_by_class(digits_file: Path, digits_folder: Path, tmp_path: Path) -> None:
    file = Path(shutil.copy(digits_file, tmp_path / "net.nested.safetensors"))
    done = nestify("eval", file, "--data", digits_folder, "--save", "--json")
    assert (done.code, done.err) == (0, f"Saved: {tmp_path / 'net.eval.json'}\n")
    stored = json.loads((tmp_path / "net.eval.json").read_text())
    for level, saved in zip(done.document["levels"], stored["levels"], strict=True):
        assert saved["images"] == [8] * 10
        assert level["top1"] == pytest.approx(100 * sum(saved["correct"]) / 80)
    page = nestify("report", file, "--format", "html").out
    assert "Accuracy by class" in page
    assert str(digits_folder) in page
    assert nestify("-q", "eval", file, "--data", digits_folder, "--save").err == ""


def test_save_is_refused_before_anything_is_evaluated(
    digits_file: Path, digits_folder: Path, tmp_path: Path
) -> None:
    file = Path(shutil.copy(digits_file, tmp_path / "net.nested.safetensors"))
    (tmp_path / "net.eval.json").write_text("my own notes")
    done = nestify("eval", file, "--data", digits_folder, "--save")
    assert (done.code, done.out) == (3, "")
    assert "net.eval.json" in done.message
    assert "remove it" in done.message
    assert (tmp_path / "net.eval.json").read_text() == "my own notes"
    seen: list[tuple[int, int]] = []
    with pytest.raises(package.NestifyError, match="remove it"):
        package.evaluate(file, str(digits_folder), save=True, progress=lambda *counts: seen.append(counts))
    assert seen == []


def test_a_bar_at_a_terminal(digits_file: Path, digits_folder: Path) -> None:
    words = ("eval", digits_file, "--data", digits_folder, "--batch-size", "8", "--workers", "0")
    assert any("/240 images" in line for line in at_terminal(100, *words))
    assert not any("/240 images" in line for line in at_terminal(100, *words, "--quiet"))


def test_progress_and_counts_in_python(digits_file: Path, digits_folder: Path) -> None:
    seen: list[tuple[int, int]] = []
    done = package.evaluate(
        digits_file,
        str(digits_folder),
        batch_size=50,
        progress=lambda count, total: seen.append((count, total)),
    )
    assert seen == [(50, 240), (80, 240), (130, 240), (160, 240), (210, 240), (240, 240)]
    for level, counts in zip(done.levels, done.by_class, strict=True):
        assert level.top1 == pytest.approx(100 * sum(counts.correct) / 80)
    assert done.saved is None


def test_warnings_in_python(digits_file: Path, digits_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are in the result, and issued at the line that called nestify."""
    monkeypatch.setattr("nestify.machine.cores", lambda: 0)
    with pytest.warns(package.NestifyWarning, match="--workers") as caught:
        done = package.evaluate(digits_file, str(digits_folder), workers=1, max_images=10)
    assert [warning.filename for warning in caught] == [__file__]
    assert [str(warning.message) for warning in caught] == list(done.warnings)
