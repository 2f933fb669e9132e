"""A model that asks for too much is refused while it is built; the reasons are checked, not the times."""

import sys
import threading
import time
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from torch import nn

from nestify.errors import CheckpointError, UnsupportedModelError
from nestify.model.build_limits import BeyondLimit, BuildLimits, limited_build
from nestify.model.pretrained import load_pretrained, save_plain
from nestify.model.spec import build_model

SMALL = BuildLimits.for_tensors(100, 400_000, "file")


@pytest.mark.parametrize(
    ("architecture", "kwargs", "reason"),
    [
        ("test_resnet", {"layers": [10**9] * 4}, "layers has a number"),
        ("test_resnet", {"layers": [1e9] * 4}, "layers has a number"),
        ("test_vit", {"mlp_ratio": 1e308}, "mlp_ratio has a number"),
        ("test_vit", {"mlp_ratio": float("nan")}, "mlp_ratio has a number"),
        ("test_resnet", {"layers": [50_000] * 4}, "modules"),
        ("resnet50", {"layers": [2000, 1, 1, 1]}, "modules"),
        ("densenet121", {"block_config": [50_000] * 4}, "modules"),
        ("cait_xxs24_224", {"depth": 50_000}, "modules|steps"),
        ("test_vit", {"depth": 200_000}, "modules|steps"),
        ("test_vit", {"embed_dim": 65_536}, "GB"),
        ("test_vit", {"img_size": 60_000}, "GB"),
        ("test_resnet", {"channels": [60_000] * 4}, "GB"),
        ("beit_base_patch16_224", {"img_size": 3200}, "GB"),
        ("swin_tiny_patch4_window7_224", {"window_size": 1000, "img_size": 2000}, "GB"),
        ("test_resnet", {"device": "meta"}, "device is not an argument"),
        ("test_resnet", {"dtype": "float16"}, "dtype is not an argument"),
        ("test_resnet", {"act_layer": "x" * 10**6}, "act_layer has a text"),
    ],
)
def test_what_is_refused(architecture: str, kwargs: dict[str, Any], reason: str) -> None:
    with pytest.raises(UnsupportedModelError, match=reason):
        build_model(architecture, kwargs, random_weights=False, limits=SMALL)


def test_a_loop_that_makes_no_tensors_has_a_deadline() -> None:
    """timm copies a block's description so many times before it makes the first block."""
    limits = BuildLimits(1000, 1000, 2**24, 2**28, 0.2, "beyond this test")
    with pytest.raises(UnsupportedModelError, match=r"more than 0 s, beyond this test"):
        build_model("mobilenetv2_100", {"depth_multiplier": 1e6}, limits=limits)


def test_the_deadline_holds_in_any_thread_and_reaches_no_other() -> None:
    limits = BuildLimits(1000, 1000, 2**24, 2**28, 0.05, "beyond this test")
    outcomes: list[str] = []

    def loop_for_ever() -> None:
        try:
            with limited_build({}, limits):
                while True:
                    pass
        except BeyondLimit:
            outcomes.append("stopped")

    thread = threading.Thread(target=loop_for_ever)
    thread.start()
    thread.join(60)
    assert outcomes == ["stopped"]


@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the time of the whole process counts")
def test_time_in_which_others_run_does_not_count() -> None:
    limits = BuildLimits(1000, 1000, 2**24, 2**28, 0.2, "beyond this test")
    with limited_build({}, limits):
        time.sleep(0.6)


def test_nothing_remains_after_the_block() -> None:
    limits = BuildLimits(10, 1000, 2**24, 2**20, 0.01, "beyond this test")
    with limited_build({}, limits):
        pass
    for _ in range(10**5):  # the deadline passes
        pass
    nn.Sequential(*(nn.Identity() for _ in range(100)))
    assert torch.empty(2**21).numel() == 2**21


@pytest.mark.parametrize(
    "allocate",
    [
        lambda: torch.empty(2**30),
        lambda: torch.arange(2**30),
        lambda: torch.linspace(0, 1, 2**30),
        lambda: torch.zeros(2**15)[:, None] - torch.zeros(2**15)[None],
        lambda: torch.zeros(2**15).expand(2**15, 2**15).clone(),
        lambda: torch.zeros(2).repeat(2**30),
        lambda: torch.outer(torch.ones(2**15), torch.ones(2**15)),
        lambda: torch.stack(torch.meshgrid(torch.arange(2**15), torch.arange(2**15), indexing="ij")),
        lambda: nn.functional.pad(torch.zeros(1), (0, 2**30)),
        lambda: torch.tril_indices(2**15, 2**15),
        lambda: nn.functional.one_hot(torch.zeros(2, dtype=torch.long), 2**30),
    ],
)
def test_large_tensors_are_refused_before_they_are_made(allocate: Any) -> None:
    with pytest.raises(BeyondLimit, match="GB"), limited_build({}, SMALL):
        allocate()


def test_views_and_small_results_of_large_arguments_are_not() -> None:
    with limited_build({}, SMALL):
        torch.zeros(2).expand(2**30, 2)
        torch.zeros(2**12) @ torch.zeros(2**12)
        torch.zeros(4).fill_(1e30)
        torch.full((2,), 1e30)


def test_real_models_are_far_below_the_limits_of_their_own_tensors() -> None:
    for name in (
        "test_resnet",
        "test_vit",
        "mobilenetv3_small_100",
        "swin_tiny_patch4_window7_224",
        "poolformer_s12",
    ):
        state = build_model(name, {}, random_weights=False).state_dict()
        elements = sum(tensor.numel() for tensor in state.values())
        limits = BuildLimits.for_tensors(len(state), elements, "file")
        assert build_model(name, {}, random_weights=False, limits=limits).state_dict().keys() == state.keys()


def test_the_classifier_that_timm_builds_and_cuts_off_is_within_the_limits() -> None:
    kwargs = {"features_only": True}
    cut = build_model("vgg11", kwargs, random_weights=False)
    tensors = cut.state_dict().values()
    limits = BuildLimits.for_tensors(len(tensors), sum(tensor.numel() for tensor in tensors), "file")
    again = build_model("vgg11", kwargs, random_weights=False, limits=limits)
    assert again.state_dict().keys() == cut.state_dict().keys()


def test_limits_do_not_change_random_weights() -> None:
    torch.manual_seed(0)
    free = build_model("test_vit", {}).state_dict()
    torch.manual_seed(0)
    limited = build_model("test_vit", {}, limits=BuildLimits.for_this_machine()).state_dict()
    assert all(torch.equal(free[name], limited[name]) for name in free)


@pytest.mark.parametrize(
    ("kwargs", "has_checkpoint"),
    [
        pytest.param(
            kwargs, has, marks=pytest.mark.long if not has and kwargs == {"layers": [2_000_000] * 4} else ()
        )
        for has in (True, False)
        for kwargs in ({"layers": [2_000_000] * 4}, {"channels": [2_000_000] * 4}, {"layers": [10**9] * 4})
    ],
)
def test_arguments_of_a_recipe(has_checkpoint: bool, kwargs: dict[str, Any], tmp_path: Path) -> None:
    path = tmp_path / "a.safetensors"
    save_plain(timm.create_model("test_resnet"), path)
    with pytest.raises(CheckpointError, match=r"far beyond|not within"):
        load_pretrained(
            "test_resnet", checkpoint=path if has_checkpoint else None, pretrained=False, kwargs=kwargs
        )
