"""Budgets of latency from the plan to the measurement at the end, for each kind of level."""

import re
from pathlib import Path

import pytest
import timm
from safetensors.torch import save_file

import nestify as package
from nestify.compression import latency
from nestify.engine import profile
from nestify.errors import RecipeError
from nestify.training.observer import Observer

FEW = {"data.max_train": 64, "data.max_val": 32, "train.batch_size": 32}


@pytest.mark.long
@pytest.mark.parametrize(
    ("kind", "core", "full"),
    [
        ("layer", {}, {"depth": 1.0}),
        pytest.param("channel", {}, {"width": 1.0}, marks=pytest.mark.long),
        pytest.param("combined", {"sparsity": 0.8}, {"width": 1.0}, marks=pytest.mark.long),
    ],
)
@pytest.mark.usefixtures("library")
def test_levels_of_each_kind_are_measured_on_the_engine(
    kind: str,
    core: dict[str, object],
    full: dict[str, object],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """The whole path without made-up times; which times are met depends on the machine."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(latency, "LATENCY_TOLERANCE", 1e6)
    monkeypatch.setattr(profile, "SECONDS", 0.1)
    kwargs, checkpoint, output = (
        {"img_size": 32, "patch_size": 8, "depth": 2},
        tmp_path / "vit.safetensors",
        tmp_path / "a",
    )
    save_file(timm.create_model("test_vit", num_classes=10, **kwargs).state_dict(), checkpoint)
    model = {"model.name": "test_vit", "model.checkpoint": str(checkpoint), "model.kwargs": kwargs}
    options = {**FEW, **model, "schedule.kind": kind, "train.epochs": 0, "output": str(output)}

    def levels(share: str) -> dict[str, object]:
        return {"level": [{"budget": f"latency={share}", **core}, full]}

    with pytest.raises(RecipeError, match="nearest that can be met") as refused:
        package.plan("digits", {**options, **levels("0.001")})
    [nearest] = re.findall(r"met: ([0-9.]+) ", str(refused.value))
    package.compress("digits", {**options, **levels(nearest)}, observer=Observer())
    report = package.read_report(output)
    [measurement] = report.measured
    assert [level.level for level in measurement.levels] == [1, 2]
    assert report.levels[0].dense_macs < report.levels[1].dense_macs
