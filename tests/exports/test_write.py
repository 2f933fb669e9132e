"""What is not the level is not kept, and what cannot be exported is refused in one sentence."""

import logging
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from nestify.errors import NestifyError, OutputError, RecipeError, UnsupportedModelError
from nestify.exports import onnx as onnx_export
from nestify.exports import timm as timm_export
from nestify.exports.target import ExportFormat, Target
from nestify.exports.write import export_level
from tests.exports.builders import facts_of, installed_formats, target_in

Make = Callable[..., nn.Module]
OLDER = b"an older file"


class Head(nn.Module):
    """Flat images of 2x2 pixels through one layer; `change` is what a model does besides."""

    def __init__(self, change: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.fc = nn.Linear(12, 10)
        self.change = change

    def forward(self, images: Tensor) -> Tensor:
        return self.change(self.fc(images.flatten(1)))


def refused(
    plain: nn.Module, make_model: Make, target: Target, side: int = 2, **options: int
) -> NestifyError:
    """The error of an export, after which an older file is as it was and nothing lies beside it."""
    if not target.folder:
        target.path.write_bytes(OLDER)
    before = sorted(target.path.parent.iterdir())
    facts = facts_of(make_model("test_resnet"), side)
    with pytest.raises(NestifyError) as caught:
        export_level(plain.eval(), facts, target, **options)
    assert sorted(target.path.parent.iterdir()) == before
    assert target.folder or target.path.read_bytes() == OLDER
    assert "\n" not in str(caught.value)
    return caught.value


@pytest.mark.parametrize("format", ["onnx", "pt2"])
def test_other_logits_are_not_kept(make_model: Make, tmp_path: Path, format: str) -> None:
    calls = [0]

    def drift(logits: Tensor) -> Tensor:
        calls[0] += 1  # what a graph cannot see: it keeps the factor that it was traced with
        return logits * calls[0]

    error = refused(Head(drift), make_model, target_in(tmp_path, format))
    assert isinstance(error, OutputError)
    assert "logits differ from the level" in str(error)


def test_a_model_that_caches_can_be_used_afterwards(make_model: Make, tmp_path: Path) -> None:
    """What a model keeps of its first call must be real numbers, not those of the trace."""
    kept: list[Tensor] = []

    def offset(logits: Tensor) -> Tensor:
        if not kept:
            kept.append(torch.ones_like(logits[:1]))
        return logits + kept[0]

    plain = Head(offset).eval()
    done = export_level(plain, facts_of(make_model("test_resnet"), 2), target_in(tmp_path, "pt2"))
    images = torch.ones(2, 3, 2, 2)
    assert torch.allclose(torch.export.load(done.path).module()(images), plain(images))
    assert torch.equal(plain(images), plain.fc(images.flatten(1)) + 1)


@pytest.mark.parametrize("folder", [False, True])
def test_other_weights_are_not_kept(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, folder: bool
) -> None:
    save = timm_export.save

    def nudged(tensors: dict[str, Tensor], metadata: dict[str, str]) -> bytes:
        return save(tensors | {"fc.bias": tensors["fc.bias"] + 1e-3}, metadata)

    monkeypatch.setattr(timm_export, "save", nudged)
    target = (
        Target(tmp_path / "new", ExportFormat.timm, folder=True) if folder else target_in(tmp_path, "timm")
    )
    error = refused(make_model("test_resnet"), make_model, target, side=32)
    assert isinstance(error, OutputError)
    assert "logits differ from the level" in str(error)


def test_logits_that_are_no_numbers_are_not_kept(make_model: Make, tmp_path: Path) -> None:
    error = refused(Head(lambda logits: logits / 0 * 0), make_model, target_in(tmp_path, "pt2"))
    assert "by nan of the largest" in str(error)


@pytest.mark.parametrize("format", [pytest.param("onnx", marks=pytest.mark.long), "pt2"])
def test_a_batch_that_is_written_into_the_model(make_model: Make, tmp_path: Path, format: str) -> None:
    def count(logits: Tensor) -> Tensor:
        return logits * len(list(range(logits.shape[0])))

    error = refused(Head(count), make_model, target_in(tmp_path, format))
    assert isinstance(error, UnsupportedModelError)
    assert "cannot trace level 2 (laptop) of test_resnet for batches of any size" in str(error)
    assert "try --batch 1" in str(error)
    done = export_level(
        Head(count).eval(), facts_of(make_model("test_resnet"), 2), target_in(tmp_path, format), batch=1
    )
    assert done.batch == 1


def test_a_model_that_torch_cannot_trace(make_model: Make, tmp_path: Path) -> None:
    def choose(logits: Tensor) -> Tensor:
        return logits if logits.sum() > 0 else -logits

    error = refused(Head(choose), make_model, target_in(tmp_path, "onnx"), batch=1)
    assert isinstance(error, UnsupportedModelError)
    assert str(error).endswith("; export it as timm")


def test_an_operator_that_onnx_lacks_is_named(make_model: Make, tmp_path: Path) -> None:
    plain = Head(torch.special.bessel_j0)
    error = refused(plain, make_model, target_in(tmp_path, "onnx"))
    assert isinstance(error, UnsupportedModelError)
    assert str(error) == (
        "ONNX has no operator for prims.bessel_j0, which level 2 (laptop) of test_resnet uses; "
        "export it as pt2 or timm"
    )
    export_level(plain, facts_of(make_model("test_resnet"), 2), target_in(tmp_path, "pt2"))


def test_an_opset_without_an_operator_of_the_model(make_model: Make, tmp_path: Path) -> None:
    def shrink(logits: Tensor) -> Tensor:  # antialiasing is in ONNX since opset 18
        pixels = nn.functional.interpolate(logits[:, None, None], (1, 10), mode="bilinear", antialias=True)
        return pixels.flatten(1)

    error = refused(Head(shrink), make_model, target_in(tmp_path, "onnx"), opset=17)
    assert isinstance(error, UnsupportedModelError)
    assert "cannot be written in opset 17; give --opset 18" in str(error)
    for opset in (0, 1000):
        error = refused(Head(shrink), make_model, target_in(tmp_path, "onnx"), opset=opset)
        assert isinstance(error, RecipeError)
        assert f"opset {opset} is not a version of ONNX" in str(error)


@pytest.mark.parametrize("package", ["onnx", "onnxscript", "onnxruntime"])
def test_a_missing_package_is_named(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, package: str
) -> None:
    monkeypatch.setitem(sys.modules, package, None)
    error = refused(nn.Flatten(), make_model, target_in(tmp_path, "onnx"))
    assert isinstance(error, RecipeError)
    assert (
        str(error) == f"format onnx needs the package {package}; pip install 'nestify[onnx]' (about 120 MB)"
    )


def test_what_is_too_large_for_one_onnx_file(
    make_model: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    weights = (12 * 10 + 10) * 4
    monkeypatch.setattr(onnx_export, "MAX_BYTES", weights - 1)
    error = refused(Head(torch.relu), make_model, target_in(tmp_path, "onnx"))
    assert f"has {weights} bytes, and an ONNX file holds at most {weights - 1}" in str(error)
    monkeypatch.setattr(onnx_export, "MAX_BYTES", weights)  # the graph itself takes some, too
    assert "an ONNX file holds at most" in str(
        refused(Head(torch.relu), make_model, target_in(tmp_path, "onnx"))
    )


@pytest.mark.parametrize("folder", [False, True])
def test_what_is_no_timm_model_is_not_exported_as_one(make_model: Make, tmp_path: Path, folder: bool) -> None:
    target = (
        Target(tmp_path / "new", ExportFormat.timm, folder=True) if folder else target_in(tmp_path, "timm")
    )
    error = refused(Head(torch.relu), make_model, target)
    assert isinstance(error, UnsupportedModelError)
    assert "level 2 (laptop) of test_resnet is not a network that timm builds (" in str(error)
    assert str(error).endswith("export it as onnx or pt2")


@pytest.mark.parametrize(
    ("format", "options"), [("timm", {"batch": 1}), ("timm", {"opset": 18}), ("pt2", {"opset": 18})]
)
def test_options_of_other_formats_are_refused(
    make_model: Make, tmp_path: Path, format: str, options: dict[str, int]
) -> None:
    error = refused(nn.Flatten(), make_model, target_in(tmp_path, format), **options)
    assert isinstance(error, RecipeError)
    assert f"--{next(iter(options))}" in str(error)


def test_a_place_that_cannot_be_written(make_model: Make, tmp_path: Path) -> None:
    plain = make_model("test_resnet").eval()
    target = Target(tmp_path / "none" / "folder", ExportFormat.timm, folder=True)
    with pytest.raises(OutputError, match="cannot be written"):
        export_level(plain, facts_of(plain, 32), target)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(OutputError, match="cannot be written"):
        export_level(plain, facts_of(plain, 32), replace(target, path=tmp_path / "full"))
    assert [path.name for path in tmp_path.rglob("*")] == ["full", "file"]


def test_an_older_file_is_replaced_and_an_empty_folder_filled(make_model: Make, tmp_path: Path) -> None:
    plain = make_model("test_resnet").eval()
    facts = facts_of(plain, 32)
    target = target_in(tmp_path, "timm")
    target.path.write_bytes(OLDER)
    assert export_level(plain, facts, target).bytes == target.path.stat().st_size > 1_000_000
    (tmp_path / "folder").mkdir()
    done = export_level(plain, facts, Target(tmp_path / "folder", ExportFormat.timm, folder=True))
    files = sorted((tmp_path / "folder").iterdir())
    assert [file.name for file in files] == ["config.json", "model.safetensors"]
    assert done.bytes == sum(file.stat().st_size for file in files)


def _root_logger() -> tuple[object, ...]:
    root = logging.root
    return root.manager.disable, root.level, root.filters[:], root.handlers[:]


@pytest.mark.long
def test_it_is_silent_and_leaves_no_trace(
    make_model: Make, tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    """What torch and ONNX Runtime print goes through Python or past it; neither is seen."""
    plain = make_model("test_resnet").eval()
    training, filters, logs = plain.training, list(warnings.filters), _root_logger()
    before = {name: tensor.clone() for name, tensor in plain.state_dict().items()}
    for format in installed_formats():
        export_level(plain, facts_of(plain, 32), target_in(tmp_path, format))
    assert capfd.readouterr() == ("", "")
    assert (plain.training, _root_logger()) == (training, logs)
    assert list(warnings.filters) == filters
    for name, tensor in plain.state_dict().items():
        assert torch.equal(tensor, before[name]), name
