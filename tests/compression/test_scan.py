"""What layers, channels and blocks cost: fits against NumPy, measures against definitions, sizes counted."""

import json
import tomllib
from copy import deepcopy
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from PIL import Image
from torch import nn

import nestify
from nestify.compression.candidates import Change, Probe
from nestify.compression.scan import Scan
from nestify.errors import NestifyError
from nestify.report.html.scan import plots
from nestify.schedule.layer_calls import LayerCall, layer_calls
from nestify.schedule.refit import RIDGE, fit_alone
from tests.cli.driver import nestify as command


@pytest.fixture(scope="module")
def scanned() -> Scan:
    return nestify.scan("digits", images=16, sparsities=(0.5, 0.9), widths=(0.5,))


def of_kind(scan: Scan, kind: str) -> list[Change]:
    return [change for change in scan.changes if change.kind == kind]


def test_a_fitted_layer_is_the_ridge_solution() -> None:
    """(A + p I) w = b + p w0 for the kept weights of each output, p = RIDGE * mean(A_ii) * c."""
    torch.manual_seed(3)
    layer = nn.Linear(12, 4, bias=False).double()
    inputs = torch.randn(200, 12).double()
    inputs[:, 6:] = inputs[:, :6] + 0.3 * inputs[:, 6:]  # so that some inputs can stand in for others
    mask = torch.rand(4, 12) < 0.5
    [found] = fit_alone(LayerCall("weight", inputs, layer.weight.detach(), None), [mask])
    x, w = inputs.numpy(), layer.weight.detach().numpy()
    gram = x.T @ x
    for row in range(4):
        kept = np.flatnonzero(mask[row].numpy())
        pull = np.diag(np.diag(gram)[kept]) * RIDGE * 12 / 200
        right = (gram @ w[row])[kept] + pull @ w[row][kept]
        expected = np.zeros(12)
        expected[kept] = np.linalg.solve(gram[np.ix_(kept, kept)] + pull, right)
        np.testing.assert_allclose(found[row].numpy(), expected, rtol=1e-3, atol=1e-3)


def test_fitting_lowers_the_error_of_a_convolution() -> None:
    model = timm.create_model("test_resnet", num_classes=10).eval()
    images = torch.randn(16, 3, 32, 32)
    call = next(call for call in layer_calls(model, images, batch_statistics=False) if "layer1" in call.name)
    mask = call.weight.abs() > call.weight.abs().median()
    [fitted] = fit_alone(call, [mask])
    outputs = [
        nn.functional.conv2d(call.inputs, weight, **dict(call.options or {}))
        for weight in (call.weight, call.weight * mask, fitted)
    ]
    assert (outputs[2] - outputs[0]).square().sum() < (outputs[1] - outputs[0]).square().sum()
    assert not fitted[~mask].any()


def test_measures_by_their_definitions() -> None:
    torch.manual_seed(1)
    model = timm.create_model("test_resnet", num_classes=10).eval()
    other = timm.create_model("test_resnet", num_classes=10).eval()
    images, target = torch.randn(32, 3, 32, 32), torch.randint(0, 10, (32,))
    found = Probe(model, images[:8], images, target).measure(other)
    with torch.no_grad():
        p, q = (network(images).double().softmax(-1).numpy() for network in (model, other))
    assert found.divergence == pytest.approx(float((p * np.log(p / q)).sum(1).mean()), rel=1e-4)
    assert found.agreement == 100 * np.mean(p.argmax(1) == q.argmax(1))
    assert found.top1 == 100 * np.mean(q.argmax(1) == target.numpy())
    assert Probe(model, images[:8], images, None).measure(other).top1 is None


def test_the_original_agrees_with_itself_after_a_measurement_of_its_statistics() -> None:
    model = timm.create_model("test_resnet", num_classes=10).eval()
    images = torch.randn(16, 3, 32, 32)
    probe = Probe(model, images, images, torch.zeros(16, dtype=torch.int64))
    copy = deepcopy(model)
    probe.recalibrate(copy)
    assert probe.measure(copy).divergence < 1e-6


def test_every_layer_group_and_block_is_measured(scanned: Scan) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    weights = [name for name, tensor in model.named_parameters() if tensor.ndim > 1]
    assert [change.name for change in of_kind(scanned, "weight")[::2]] == weights
    assert {change.amount for change in of_kind(scanned, "weight")} == {0.5, 0.9}
    assert {change.name for change in of_kind(scanned, "layer")} == {"layer1.0"}
    assert len({change.name for change in of_kind(scanned, "channel")}) == 11


def test_savings_are_those_of_the_part(scanned: Scan) -> None:
    model = timm.create_model("test_resnet", num_classes=10)
    sizes = {name: tensor.numel() for name, tensor in model.named_parameters()}
    for change in of_kind(scanned, "weight"):
        assert change.parameters == round(change.amount * sizes[change.name])
    [block] = of_kind(scanned, "layer")
    inside = [size for name, size in sizes.items() if name.startswith("layer1.0.")]
    assert block.parameters == sum(inside)
    fc = next(change for change in scanned.changes if change.name == "fc.weight")
    assert fc.macs == fc.parameters  # a linear layer multiplies each weight once
    assert scanned.parameters == sum(sizes.values())


def test_more_sparsity_costs_more(scanned: Scan) -> None:
    pairs = zip(of_kind(scanned, "weight")[::2], of_kind(scanned, "weight")[1::2], strict=True)
    worse = [half.measured.divergence <= most.measured.divergence for half, most in pairs]
    assert sum(worse) >= 0.9 * len(worse)


def test_a_plot_has_every_change(scanned: Scan) -> None:
    dots = [dot for plot in plots(scanned) for row in plot.rows for dot in row.dots]
    assert len(dots) == len(scanned.changes)
    assert "layer1.0" in str(scanned)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"sparsities": (1.0,)}, "--sparsities has 1"),
        ({"widths": (0.0,)}, "--widths has 0"),
        ({"images": 4000}, "smaller --images"),
        ({"budget": "speed=2"}, "--budget speed=2"),
        ({"overrides": {"model.new_head": True}}, "classifier.*is new"),
    ],
)
def test_refusals(options: dict[str, object], words: str) -> None:
    with pytest.raises(NestifyError, match=words):
        nestify.scan("digits", **options)  # type: ignore[arg-type]


def test_a_budget_that_no_schedule_meets_is_refused_before_anything_is_measured() -> None:
    def progress(done: int, total: int) -> None:
        raise AssertionError("a candidate was measured")

    few = {"schedule.fit_images": 4, "data.max_train": 32, "data.max_val": 8}
    with pytest.raises(NestifyError) as told:
        nestify.scan("digits", few, images=4, kinds=["weight"], budget="bytes=1", progress=progress)
    lines = str(told.value).splitlines()
    starts = [f"--budget bytes=1, {kind} levels: cannot be met within 2%" for kind in ("weight", "channel")]
    assert [line[: len(start)] for line, start in zip(lines, starts, strict=False)] == starts
    assert all("choose the nearest that can be met" in line for line in lines)


@pytest.mark.long
def test_the_command(tmp_path: Path) -> None:
    few = ("scan", "digits", "--images", "16", "--sparsities", "0.9", "--only", "weight,layer")
    few += ("--set", "schedule.fit_images=16", "--set", "data.max_train=64", "--set", "data.max_val=20")
    page, recipe = tmp_path / "scan.html", tmp_path / "recipe.toml"
    done = command(*few, "--budget", "macs=0.4", "-o", recipe, "--html", page, "--json")
    assert done.code == 0, done.err
    document = done.document
    assert {change["kind"] for change in document["changes"]} == {"weight", "layer"}
    assert document["suggestion"]["best"]["schedule"] in ("weight", "channel")
    assert page.read_text(encoding="ascii").count("<circle") == len(document["changes"])
    assert tomllib.loads(recipe.read_text())["level"][0] == {"budget": "macs=0.4"}
    assert nestify.load_recipe(recipe).level[0].budget == "macs=0.4"
    assert json.dumps(document)


def test_images_without_labels(tmp_path: Path) -> None:
    """A flat folder is enough, because a change is compared with the original's predictions."""
    rng = np.random.default_rng(0)
    for number in range(40):
        pixels = rng.integers(0, 256, (32, 32, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{number}.png")
    few = ("--images", "8", "--sparsities", "0.9", "--only", "layer", "--json")
    done = command("scan", "digits", "--data", tmp_path, "--unlabelled", *few)
    assert done.code == 0, done.err
    changes = done.document["changes"]
    assert changes
    assert {change["kind"] for change in changes} == {"layer"}
    assert all(change["measured"]["top1"] is None for change in changes)


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("-o", "a.toml"), "--budget"),
        (("--only", "width"), "--only width"),
        (("--sparsities", "a"), "--sparsities a"),
        (("--set", "train.lr=x"), "train.lr"),
    ],
)
def test_refusals_of_the_command(words: tuple[str, ...], message: str) -> None:
    done = command("scan", "digits", *words)
    assert done.code == 2
    assert message in done.message
