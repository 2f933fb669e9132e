"""`nestify export`: files in every format, messages, and refusals."""

import json
import subprocess
import sys
from hashlib import sha256
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import timm
import torch
from safetensors import safe_open

from nestify.file.reader import open_nested_file
from nestify.model.spec import synthetic_input
from tests.cli.conftest import Refused
from tests.cli.driver import environment, nestify

SUFFIXES = {"timm": ".safetensors", "onnx": ".onnx", "pt2": ".pt2"}
SHAPE = (3, 32, 32)
RUN_AND_LIST = """
import sys
from nestify.cli.app import run
code = run(sys.argv[1:])
loaded = [name for name in ("torch", "timm", "onnx", "onnxruntime") if name in sys.modules]
print(loaded, code, file=sys.stderr)
"""


def stored_logits(file: Path, level: int) -> np.ndarray:
    """Return the logits of the fixed synthetic input that are stored in the nested file."""
    return np.array(open_nested_file(file).manifest.levels[level - 1].fingerprint)


def loaded_logits(path: Path) -> np.ndarray:
    """Return the logits that the stock libraries compute from an export for the same input."""
    images = synthetic_input(SHAPE)
    if path.suffix == ".onnx":
        session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
        return np.asarray(session.run(["logits"], {"images": images.numpy()})[0][0])
    if path.suffix == ".pt2":
        return np.asarray(torch.export.load(path).module()(images).detach()[0])
    if path.is_dir():
        model = timm.create_model(f"local-dir:{path}", pretrained=True)
    else:
        model = timm.create_model("test_resnet", num_classes=10, checkpoint_path=str(path))
    with torch.no_grad():
        return np.asarray(model.eval()(images)[0])


@pytest.mark.parametrize(
    ("level", "format"),
    [
        pytest.param(level, format, marks=pytest.mark.long)
        if (level, format) in (("1", "onnx"), ("level3", "onnx"), ("level3", "pt2"))
        else (level, format)
        for level in ("1", "level3")
        for format in SUFFIXES
    ],
)
def test_formats(digits_file: Path, format: str, level: str) -> None:
    path = Path(f"plain{SUFFIXES[format]}")
    done = nestify("export", digits_file, "--level", level, "--format", format, "-o", path)
    assert (done.code, done.err) == (0, "")
    number = int(level[-1])
    np.testing.assert_allclose(loaded_logits(path), stored_logits(digits_file, number), rtol=1e-3, atol=1e-4)
    lines = done.out.splitlines()
    assert lines[0] == f"{digits_file}: level {number} (level{number}) of test_resnet"
    assert lines[-1] == f"Written: {path}"
    assert f"{path.stat().st_size / 2**20:.2f} MiB, any number of images per call" in done.out
    assert ("It stores and multiplies the zeros (95.0% of" in done.out) == (number == 1)


def test_a_folder_for_timm(digits_file: Path) -> None:
    done = nestify("export", digits_file, "--level", "2", "-o", "digits/")
    assert done.code == 0
    assert "timm.create_model('local-dir:digits', pretrained=True).eval()" in done.out
    np.testing.assert_allclose(
        loaded_logits(Path("digits")), stored_logits(digits_file, 2), rtol=1e-4, atol=1e-5
    )
    config = json.loads(Path("digits/config.json").read_text())
    assert config["label_names"] == [str(digit) for digit in range(10)]
    assert config["pretrained_cfg"]["input_size"] == list(SHAPE)


def test_json(digits_file: Path) -> None:
    words = ["export", digits_file, "--level", "level2", "--json", "-o", "digits.onnx"]
    document = nestify(*words).document
    difference = document.pop("max_logit_difference")
    assert 0 <= difference <= document.pop("tolerance")
    file = open_nested_file(digits_file)
    begin, end = file.prefix_bytes(1), file.prefix_bytes(2)
    level_sha256 = sha256(digits_file.read_bytes()[begin:end]).hexdigest()
    metadata = {entry.key: entry.value for entry in onnx.load("digits.onnx").metadata_props}
    assert metadata["level_sha256"] == level_sha256
    assert document == {
        "schema_version": 1,
        "file": str(digits_file),
        "level": 2,
        "name": "level2",
        "sparsity": pytest.approx(0.8, abs=1e-5),
        "level_sha256": level_sha256,
        "source_sha256": open_nested_file(digits_file).manifest.source_sha256,
        "format": "onnx",
        "output": "digits.onnx",
        "bytes": Path("digits.onnx").stat().st_size,
        "dtype": "float32",
        "checked_by": f"onnxruntime {onnxruntime.__version__}",
        "max_weight_difference": None,
        "with_preprocessing": False,
        "dynamic_batch": True,
        "batch": None,
        "opset": 18,
        "load": "onnxruntime.InferenceSession('digits.onnx').run(['logits'], {'images': images})",
    }
    document = nestify(*words, "--batch", "4", "--opset", "19").document
    assert (document["dynamic_batch"], document["batch"], document["opset"]) == (False, 4, 19)
    assert onnx.load("digits.onnx").opset_import[0].version == 19


def test_the_default_output_is_next_to_the_file_and_is_no_slice(digits_file: Path, tmp_path: Path) -> None:
    file = tmp_path / "models" / "digits.nested.safetensors"
    file.parent.mkdir()
    file.write_bytes(digits_file.read_bytes())
    nestify("slice", file, "--level", "1", "-o", file.parent / "digits.level1.safetensors")
    sliced = (file.parent / "digits.level1.safetensors").read_bytes()
    done = nestify("export", file, "--level", "1", "--format", "timm")
    assert done.code == 0
    assert (file.parent / "digits.level1.safetensors").read_bytes() == sliced
    assert sorted(path.name for path in file.parent.iterdir()) == [
        "digits.level1.safetensors",
        "digits.level1.timm.safetensors",
        "digits.nested.safetensors",
    ]


def test_the_zeros_are_those_of_the_level(digits_file: Path) -> None:
    nestify("export", digits_file, "--level", "1", "-o", "plain.safetensors")
    level = open_nested_file(digits_file).manifest.levels[0]
    with safe_open("plain.safetensors", "np") as file:
        for layer in level.layers:
            assert np.count_nonzero(file.get_tensor(layer.name)) <= layer.kept, layer.name


@pytest.mark.parametrize(
    ("words", "code", "said"),
    [
        (["--level", "4", "--format", "timm"], 2, "has no level '4'; give one of 1 (level1), 2 (level2)"),
        (["--level", "1"], 2, "format of the export is not given; add --format timm, onnx, pt2"),
        (["--level", "1", "-o", "a.bin"], 2, "a.bin: does not end with one of .safetensors, .onnx, .pt2"),
        (["--level", "1", "--format", "onnx", "-o", "a.pt2"], 3, "a.pt2: does not end with .onnx"),
        (["--level", "1", "-o", "none/a.onnx"], 3, "none/a.onnx: its folder does not exist"),
        (["--level", "1", "-o", "a.pt2", "--opset", "18"], 2, "--opset 18 applies to --format onnx"),
        (["--level", "1", "-o", "a.onnx", "--batch", "1000000000"], 2, "--batch 1000000000 is not from 1 to"),
        (["--level", "1", "-o", "a.safetensors", "--batch", "2"], 2, "--batch 2 does not apply to"),
        (["--level", "1", "-o", "a.onnx", "--opset", "1000"], 2, "opset 1000 is not a version of ONNX"),
    ],
)
def test_refusals(digits_file: Path, refused: Refused, words: list[str], code: int, said: str) -> None:
    assert said in refused(code, "export", digits_file, *words)


def test_the_nested_file_is_not_overwritten(digits_file: Path) -> None:
    before = digits_file.read_bytes()
    done = nestify("export", digits_file, "--level", "1", "-o", digits_file)
    assert (done.code, done.message) == (3, f"{digits_file}: is the nested file itself; choose another path")
    assert digits_file.read_bytes() == before


def test_a_damaged_file_is_refused(digits_file: Path, refused: Refused, tmp_path: Path) -> None:
    data = bytearray(digits_file.read_bytes())
    data[-1] ^= 1
    Path("damaged.safetensors").write_bytes(data)
    assert "damaged.safetensors" in refused(3, "export", "damaged.safetensors", "--level", "3", "-o", "a.pt2")


def test_the_level_is_required(digits_file: Path) -> None:
    done = nestify("export", digits_file, "--format", "timm")
    assert done.code == 2
    assert "--level" in done.err


@pytest.mark.parametrize("words", [["--help"], ["FILE", "--level", "9", "--format", "onnx"]])
def test_help_and_wrong_usage_import_no_torch(digits_file: Path, words: list[str]) -> None:
    words = [str(digits_file) if word == "FILE" else word for word in words]
    command = [sys.executable, "-c", RUN_AND_LIST, "export", *words]
    done = subprocess.run(command, capture_output=True, text=True, check=True, env=environment())
    assert done.stderr.splitlines()[-1] == ("[] 0" if words == ["--help"] else "[] 2")


def test_help_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "200")
    text = nestify("export", "--help").out
    assert "pip install 'nestify[onnx]'" in text
    assert "local-dir:" in text
