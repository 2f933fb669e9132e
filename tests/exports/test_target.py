"""Where an export goes, and what the facts say as text."""

import json
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nestify.errors import NestifyError, OutputError, RecipeError
from nestify.exports.target import ExportFacts, ExportFormat, Target, choose_target

SOURCE = Path("models/digits.nested.safetensors")


def facts(level_name: str = "phone", class_names: list[str] | None = None) -> ExportFacts:
    preprocessing = {"input_size": [3, 32, 48], "mean": [0.5], "interpolation": "bicubic"}
    return ExportFacts(
        "test_resnet", {"a": [1, None]}, 10, class_names, preprocessing, 1, level_name, 0.9, {}
    )


@pytest.mark.parametrize(
    ("format", "output", "expected"),
    [
        ("timm", None, Target(Path("models/digits.phone.timm.safetensors"), ExportFormat.timm)),
        ("onnx", None, Target(Path("models/digits.phone.onnx"), ExportFormat.onnx)),
        (None, "a.onnx", Target(Path("a.onnx"), ExportFormat.onnx)),
        (None, "a.ONNX", Target(Path("a.ONNX"), ExportFormat.onnx)),
        (None, "a.pt2", Target(Path("a.pt2"), ExportFormat.pt2)),
        (None, "a.b.safetensors", Target(Path("a.b.safetensors"), ExportFormat.timm)),
        ("pt2", "a.pt2", Target(Path("a.pt2"), ExportFormat.pt2)),
        (None, "new/", Target(Path("new"), ExportFormat.timm, folder=True)),
        ("timm", "new/", Target(Path("new"), ExportFormat.timm, folder=True)),
        (None, "empty", Target(Path("empty"), ExportFormat.timm, folder=True)),
        ("openvino", None, Target(Path("models/digits.phone.openvino"), ExportFormat.openvino, folder=True)),
        ("openvino", "any/", Target(Path("any"), ExportFormat.openvino, folder=True)),
        (None, "a.openvino", Target(Path("a.openvino"), ExportFormat.openvino, folder=True)),
        (None, "a.mlpackage/", Target(Path("a.mlpackage"), ExportFormat.coreml, folder=True)),
        (None, "a.pte", Target(Path("a.pte"), ExportFormat.executorch)),
        (None, "full/a.onnx", Target(Path("full/a.onnx"), ExportFormat.onnx)),
    ],
)
def test_places(folders: Path, format: str | None, output: str | None, expected: Target) -> None:
    assert choose_target(SOURCE, facts(), format, output) == expected


@pytest.mark.parametrize(
    ("format", "output", "kind", "said"),
    [
        (None, None, RecipeError, "format of the export is not given"),
        ("tflite", None, RecipeError, "format 'tflite' is not one of timm, onnx, pt2"),
        (None, "model.bin", RecipeError, "does not end with one of .safetensors, .onnx, .pt2"),
        (None, "model.tflite", RecipeError, "--format pt2 --batch 1"),
        ("coreml", "any/", OutputError, "does not end with .mlpackage"),
        ("coreml", "full", OutputError, "is not an empty folder; give a new one"),
        (None, "model", RecipeError, "add --format"),
        ("onnx", "model.pt2", OutputError, "does not end with .onnx"),
        ("timm", "model.bin", OutputError, "does not end with .safetensors"),
        ("onnx", "new/", OutputError, "is a folder; give the path of a .onnx file in it"),
        ("onnx", "empty", OutputError, "is a folder"),
        ("timm", "full", OutputError, "is not an empty folder"),
        ("timm", "full/file/", OutputError, "is not an empty folder"),
        ("timm", "models/digits.nested.safetensors", OutputError, "is the nested file itself"),
        ("timm", "models/../models/digits.nested.safetensors", OutputError, "is the nested file itself"),
        ("timm", "link.safetensors", OutputError, "is the nested file itself"),
        ("onnx", "none/model.onnx", OutputError, "its folder does not exist"),
        ("onnx", f"{'long' * 100}.onnx", OutputError, "cannot be accessed (File name too long)"),
    ],
)
def test_no_places(
    folders: Path, format: str | None, output: str | None, kind: type[NestifyError], said: str
) -> None:
    with pytest.raises(kind) as caught:
        choose_target(SOURCE, facts(), format, output)
    assert said in str(caught.value)


@pytest.fixture
def folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """`models/` with the nested file, an empty folder, one that is not, and a link to the file."""
    monkeypatch.chdir(tmp_path)
    for name in ("models", "empty", "full"):
        Path(name).mkdir()
    SOURCE.touch()
    Path("full/file").touch()
    Path("link.safetensors").symlink_to(SOURCE)
    return tmp_path


@given(st.text(min_size=1), st.sampled_from(list(ExportFormat)))
def test_no_level_name_leads_into_another_folder(name: str, format: ExportFormat) -> None:
    path = choose_target(SOURCE, facts(name), format).path
    assert path.parent == SOURCE.parent
    assert path.name.startswith("digits.")
    assert path.suffix == format.suffix
    assert path.name.isprintable()
    assert facts(name).title.isprintable()


@given(st.none() | st.lists(st.text(st.characters(exclude_categories=["Cs"]))))
def test_facts_as_text_say_the_same(names: list[str] | None) -> None:
    texts = facts(class_names=names).metadata()
    document = facts(class_names=names).document()
    assert all(isinstance(text, str) for text in texts.values())
    for key, value in document.items():
        if value is None:
            assert key not in texts
        else:
            assert (texts[key] if isinstance(value, str) else json.loads(texts[key])) == value
    assert document["classes"] == names
    assert facts().input_size == (3, 32, 48)
