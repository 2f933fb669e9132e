"""Backbones of timm families pass the walk by every schedule; with `-m long`, those of 20 families."""

import runpy
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import timm
import torch

import nestify
from nestify.engine import open as open_engine
from nestify.errors import BadFileError, NestifyError, RecipeError, UnsupportedModelError
from nestify.evaluation.int8 import export_int8
from nestify.file.reader import open_nested_file
from nestify.model.spec import describe_model
from tests.backbone_walk import EMBEDDING, FEATURES, SCHEDULES, make_backbone, run_onnx, walk_backbone
from tests.engine.conftest import library, library_path

__all__ = ["library", "library_path"]  # fixtures

FAST: list[tuple[str, dict[str, Any], int, set[str]]] = [
    ("test_resnet", FEATURES, 64, {"channel"}),
    ("test_vit", {**FEATURES, "img_size": 64}, 64, {"layer"}),
    ("test_efficientnet", EMBEDDING, 64, {"weight"}),
]
"""Models, and the schedules that each walks by default; the others are `long`."""

WALKS = [
    pytest.param(name, kwargs, side, schedule, marks=() if schedule in default else pytest.mark.long)
    for name, kwargs, side, default in FAST
    for schedule in SCHEDULES
]

LONG: list[tuple[str, dict[str, Any], int]] = [
    ("test_byobnet", {}, 64),
    ("test_convnext", {}, 64),
    ("test_efficientnet", {}, 64),
    ("test_mambaout", {}, 64),
    ("test_nfnet", {}, 64),
    ("test_resnet", {"layers": [2, 2, 2, 2]}, 64),
    ("test_vit", {"img_size": 64}, 64),
    ("densenet121", {"growth_rate": 8, "block_config": [2, 2, 2, 2]}, 64),
    ("dla46x_c", {}, 64),
    ("edgenext_xx_small", {"depths": [1, 1, 2, 1]}, 64),
    ("efficientformer_l1", {"depths": [1, 1, 1, 2]}, 224),
    ("hrnet_w18_small", {}, 64),
    ("inception_next_atto", {"depths": [1, 1, 2, 1]}, 64),
    ("mobilenetv3_small_050", {}, 64),
    ("mobilevit_xxs", {}, 64),
    ("regnetx_002", {}, 64),
    ("repvgg_a0", {}, 64),
    (
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": [2, 2, 1, 1], "num_heads": [1, 2, 4, 8]},
        224,
    ),
    ("vgg11", {}, 64),
    ("xcit_nano_12_p16_224", {"depth": 3}, 224),
]


def channels_that_apply(schedule: str, made: Any) -> bool:
    """Whether a level's outputs have the channels that its schedule says."""
    core, full = made.channels
    narrower = schedule in ("channel", "combined")
    return bool(full == made.original and (narrower or core == full))


@pytest.mark.parametrize(("name", "kwargs", "side", "schedule"), WALKS)
def test_backbone_passes_the_walk(
    name: str, kwargs: dict[str, Any], side: int, schedule: str, tmp_path: Path
) -> None:
    made = walk_backbone(name, kwargs, schedule, side, tmp_path, onnx=False)
    if made is None:
        assert schedule == "layer"
        return
    assert channels_that_apply(schedule, made)
    if schedule == "channel":
        assert all(core == full // 2 for core, full in zip(*made.channels, strict=True))


@pytest.mark.long
@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize("extra", [EMBEDDING, FEATURES], ids=["embedding", "features"])
@pytest.mark.parametrize(("name", "kwargs", "side"), LONG, ids=[name for name, _, _ in LONG])
def test_backbone_of_a_family_passes_the_walk(
    name: str, kwargs: dict[str, Any], side: int, extra: dict[str, Any], schedule: str, tmp_path: Path
) -> None:
    made = walk_backbone(name, {**kwargs, **extra}, schedule, side, tmp_path)
    assert made is None or channels_that_apply(schedule, made)


@pytest.fixture(scope="module")
def backbone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A nested file of a backbone that returns feature maps, by the weight schedule."""
    nested = nestify.nest(make_backbone("test_resnet", **FEATURES), [0.9, 0], input_size=(3, 64, 64))
    return nested.save(tmp_path_factory.mktemp("backbone") / "resnet.nested.safetensors")


def test_narrower_maps_are_the_first_channels() -> None:
    model = make_backbone("test_resnet", **FEATURES)
    stem = model.conv1[0].weight.detach().clone()  # type: ignore[index]
    last = model.layer4[-1].bn2.weight.detach().clone()  # type: ignore[index]
    nested = nestify.nest(model, [0.5, 1], "channel", input_size=(3, 64, 64))
    core = nested.at_level(1).state_dict()
    torch.testing.assert_close(core["layer4.0.bn2.weight"], last[:48], rtol=0, atol=0)
    assert core["conv1.0.weight"].shape[0] == stem.shape[0] // 2


def test_manifest_tells_a_neck_what_it_gets(backbone: Path) -> None:
    timm_says = timm.create_model("test_resnet", features_only=True).feature_info
    manifest = open_nested_file(backbone).manifest
    assert manifest.model.feature_reductions == timm_says.reduction()
    assert [level.feature_channels for level in manifest.levels] == [timm_says.channels()] * 2
    assert manifest.model.num_classes == 0


def test_each_level_may_have_a_loss_of_its_own() -> None:
    nested = nestify.nest(make_backbone("test_resnet", **EMBEDDING), [0.9, 0.5, 0], input_size=(3, 64, 64))
    losses = [lambda found, target, k=k: found.sum() * 0 + k for k in (1.0, 2.0, 3.0)]
    results = nested.backward(torch.randn(2, 3, 64, 64), None, losses)
    assert [(result.level, float(result.loss)) for result in results] == [(3, 3), (2, 2), (1, 1)]
    with pytest.raises(RecipeError, match="loss_fn has 2 functions for 3 levels"):
        nested.backward(torch.randn(2, 3, 64, 64), None, losses[:2])


@pytest.mark.long
def test_exports_have_named_outputs(backbone: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = nestify.load(backbone, level=1)(images)
    path = nestify.export(backbone, 1, output=tmp_path / "core.onnx").path
    import onnxruntime

    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    assert [output.name for output in session.get_outputs()] == [f"features_{k}" for k in range(5)]
    program = nestify.export(backbone, 1, output=tmp_path / "core.pt2").path
    found = torch.export.load(program).module()(images)
    for ours, theirs in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-4, atol=1e-4)
    for ours, theirs in zip(run_onnx(path, images), expected, strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-3, atol=1e-3)


def test_timm_loads_an_exported_backbone(backbone: Path, tmp_path: Path) -> None:
    done = nestify.export(backbone, 1, output=tmp_path / "core.safetensors")
    images = torch.randn(1, 3, 64, 64)
    with torch.no_grad():
        ours, theirs = eval(done.load_line, {"timm": timm})(images), nestify.load(backbone, level=1)(images)
    for one, other in zip(ours, theirs, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-4)
    with pytest.raises(UnsupportedModelError, match=r"\.safetensors"):
        nestify.export(backbone, 1, "timm", output=f"{tmp_path}/folder/")


@pytest.mark.long
@pytest.mark.usefixtures("library")
def test_sparse_engine_returns_all_maps(backbone: Path, tmp_path: Path) -> None:
    images = torch.randn(2, 3, 64, 64)
    with torch.no_grad():
        expected = nestify.load(backbone, level=1)(images)
    found = open_engine(backbone, level=1, cache=tmp_path)(images.numpy())
    for ours, theirs in zip(found, expected, strict=True):
        np.testing.assert_allclose(ours, theirs.numpy(), rtol=1e-3, atol=1e-3)


def test_what_needs_classes_is_refused(backbone: Path, tmp_path: Path) -> None:
    for refused in (
        lambda: nestify.evaluate(backbone, "digits"),
        lambda: export_int8(backbone, 1, "digits", output=tmp_path / "int8.onnx"),
    ):
        with pytest.raises(NestifyError, match=r"feature maps.*nestify\.load"):
            refused()
    model = make_backbone("test_resnet", **FEATURES)
    with pytest.raises(RecipeError, match="teacher"):
        nestify.nest(model, [0.9, 0], teacher="self")
    classifier = timm.create_model("test_resnet", num_classes=10)
    with pytest.raises(RecipeError, match="keep_outputs"):
        nestify.nest(classifier, [0.5, 1], "channel", options={"schedule.keep_outputs": True})


def test_compress_refuses_a_backbone(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModelError, match=r"feature maps.*nestify\.nest"):
        nestify.compress(
            "digits",
            {
                "model.checkpoint": "none",
                "model.pretrained": False,
                "model.kwargs.features_only": True,
                "output": tmp_path / "x.safetensors",
            },
        )


def test_damaged_channels_are_refused(backbone: Path, tmp_path: Path) -> None:
    damaged = tmp_path / "damaged.safetensors"
    text = backbone.read_bytes()
    old, new = rb"\"feature_channels\":[32,", rb"\"feature_channels\":[33,"
    assert old in text
    damaged.write_bytes(text.replace(old, new))
    with pytest.raises(BadFileError, match="channels"):
        open_nested_file(damaged)


def test_description_of_a_backbone() -> None:
    spec = describe_model(timm.create_model("test_vit", num_classes=0))
    assert (spec.output, spec.num_classes, spec.reductions) == ("embedding", 0, ())
    swin = timm.create_model("swin_tiny_patch4_window7_224", features_only=True, embed_dim=16)
    assert describe_model(swin).channels_last
    assert describe_model(swin).reductions == (4, 8, 16, 32)


class Head(torch.nn.Module):
    """A head that reads the last feature map, as the guide's example needs one."""

    def __init__(self, channels: tuple[int, ...]) -> None:
        super().__init__()
        self.linear = torch.nn.Linear(channels[-1], 10)

    def loss(self, maps: list[torch.Tensor], target: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.cross_entropy(self.linear(maps[-1].mean((2, 3))), target)


def test_the_example_of_the_guide() -> None:
    """Run as it is printed, with a smaller model."""
    guide = (Path(nestify.__file__).parent / "guide" / "own-loop.md").read_text(encoding="utf-8")
    text = guide.partition("## Backbones")[2].split("```")[1].removeprefix("python\n")
    text = text.replace('"resnet50", pretrained=True', '"test_resnet"').replace(
        "images=loader", "images=loader, input_size=(3, 64, 64)"
    )
    loader = [(torch.randn(2, 3, 64, 64), torch.arange(2))] * 2
    exec(text, {"loader": loader, "timm": timm, "torch": torch, "nestify": nestify, "Head": Head})
    assert nestify.verify("backbone.nested.safetensors").passed


def test_the_detector_script_runs(capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("torchvision")
    script = runpy.run_path(str(Path(__file__).parents[1] / "recipes" / "detector.py"))
    assert len(script["main"](1, "0.5,1")) == 2
    assert "level 1, (24, 96, 48) channels: AP50" in capsys.readouterr().out
    boxes, labels = torch.tensor([[0.0, 0, 10, 10], [20, 20, 30, 30]]), torch.tensor([3, 4])
    wanted = [{"boxes": boxes, "labels": labels}]
    half = [{"boxes": boxes, "labels": torch.tensor([3, 5]), "scores": torch.tensor([0.5, 0.9])}]
    assert script["average_precision"](half, wanted) == pytest.approx(25)  # one of two, behind a wrong one
