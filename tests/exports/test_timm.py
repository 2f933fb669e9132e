"""Narrower and shallower levels as files and folders that timm loads by itself."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from safetensors import safe_open
from torch import nn

from nestify.errors import UnsupportedModelError
from nestify.exports.target import ExportFormat, Target
from nestify.exports.write import export_level
from tests.exports.builders import alive, facts_of, half, shallow, target_in

SIDE = 64
NARROW = {"embed_dim": 32, "num_heads": 1}


@pytest.mark.parametrize(
    ("smaller", "skipped", "changed"),
    [
        pytest.param(shallow, (), {}, marks=pytest.mark.long),  # a graph, with all that the model has
        pytest.param(half, (), NARROW, marks=pytest.mark.long),
        (shallow, ("blocks.1",), {"depth": 1}),
        (half, ("blocks.1",), NARROW | {"depth": 1}),
    ],
)
def test_a_file_and_a_folder(
    tmp_path: Path,
    smaller: Callable[[nn.Module, int, tuple[str, ...]], nn.Module],
    skipped: tuple[str, ...],
    changed: dict[str, Any],
) -> None:
    """A level, what a nested file says of it, and the arguments that it differs in."""
    model = alive("test_vit", img_size=SIDE, global_pool="avg", depth=2)
    level, facts = smaller(model, SIDE, skipped), facts_of(model, SIDE)
    kwargs = facts.kwargs | changed
    file = export_level(level, facts, target_in(tmp_path, "timm"))
    folder = export_level(level, facts, Target(tmp_path / "folder", ExportFormat.timm, folder=True))
    images = torch.randn(3, 3, SIDE, SIDE)
    with torch.no_grad():
        logits = level(images)
    for network in (
        timm.create_model("test_vit", **kwargs, checkpoint_path=str(file.path)),
        eval(file.load_line, {"timm": timm}),
        timm.create_model(f"local-dir:{folder.path}", pretrained=True),
        eval(folder.load_line, {"timm": timm}),
    ):
        with torch.no_grad():
            found = network.eval()(images)
        assert torch.allclose(found, logits, rtol=0, atol=1e-5 * float(logits.abs().max()))
    config = json.loads((tmp_path / "folder" / "config.json").read_text())
    assert config["architecture"] == "test_vit"
    assert config["model_args"] == kwargs
    assert file.facts.kwargs == folder.facts.kwargs == kwargs
    with safe_open(file.path, "pt") as opened:
        assert json.loads(opened.metadata()["kwargs"]) == kwargs
        assert set(opened.keys()) == set(network.state_dict())
    assert file.bytes < 4 * sum(tensor.numel() for tensor in network.state_dict().values()) + 2**16


def test_what_a_level_lacks_is_as_timm_makes_it(tmp_path: Path) -> None:
    """A level has no counts of batches, and timm loads no file without them."""
    model = alive("densenet121", growth_rate=8, block_config=[2, 2])
    level = half(model, SIDE)
    count = "features.norm0.num_batches_tracked"
    model.get_buffer(count).fill_(7)
    assert count not in level.state_dict()
    done = export_level(level, facts_of(model, SIDE), target_in(tmp_path, "timm"))
    with safe_open(done.path, "pt") as opened:
        assert int(opened.get_tensor(count)) == 0


def test_a_level_that_timm_does_not_build(tmp_path: Path) -> None:
    model = alive("test_efficientnet")
    level, facts = half(model, SIDE), facts_of(model, SIDE)
    for target in (target_in(tmp_path, "timm"), Target(tmp_path / "new", ExportFormat.timm, folder=True)):
        with pytest.raises(UnsupportedModelError) as caught:
            export_level(level, facts, target)
        assert str(caught.value) == (
            "level 2 (laptop) of test_efficientnet is not a network that timm builds (the size of "
            "'conv_stem.weight' is no argument); export it as onnx or pt2"
        )
    assert not list(tmp_path.iterdir())
