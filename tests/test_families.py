"""Models of timm families that differ in their layers pass the walk; with `-m long`, one of every family."""

from typing import Any

import pytest
import timm

from nestify.errors import UnsupportedModelError
from nestify.model.spec import build_model, describe_model
from tests.family_walk import smallest_model, walk

FAST: dict[str, tuple[str, dict[str, Any]]] = {
    "byobnet": ("test_byobnet", {}),  # blocks of several kinds
    "coat": (  # modules with several names
        "coat_tiny",
        {"embed_dims": [32] * 4, "serial_depths": [1] * 4, "parallel_depth": 1},
    ),
    "convnext": ("test_convnext", {}),
    "dla": ("dla46x_c", {}),  # grouped convolutions
    "efficientnet": ("test_efficientnet", {}),  # depthwise convolutions
    "fastvit": ("fastvit_t8", {"layers": [1, 1, 1, 1]}),  # branches that can be fused
    "gemma4_vit": (  # infinite bounds
        "gemma4_vit_167m",
        {"embed_dim": 16, "depth": 2, "num_heads": 1, "head_dim": 16, "intermediate_size": 32},
    ),
    "levit": (  # position biases cached in eval mode, two heads
        "levit_128s",
        {"embed_dim": [32, 48, 64], "num_heads": [2, 3, 4], "depth": [1, 1, 1]},
    ),
    "mambaout": ("test_mambaout", {}),
    "maxxvit": ("test_coatnet", {}),  # convolutions and attention with relative positions
    "nfnet": ("test_nfnet", {}),  # standardised weights
    "resnet": ("test_resnet", {}),
    "sequencer": (  # LSTM
        "sequencer2d_s",
        {"layers": [1] * 4, "embed_dims": [16, 32, 32, 32], "hidden_sizes": [4, 8, 8, 8]},
    ),
    "swin_transformer": (  # shifted windows
        "swin_tiny_patch4_window7_224",
        {"embed_dim": 16, "depths": [2, 2, 1, 1], "num_heads": [1, 2, 4, 8]},
    ),
    "swin_transformer_v2": (
        "swinv2_tiny_window8_256",
        {"embed_dim": 16, "depths": [1, 1, 1, 1], "num_heads": [1, 2, 4, 8]},
    ),
    "vision_transformer": ("test_vit", {}),
    "vision_transformer_relpos": ("test_vit_relpos", {}),
}


SLOWER = ("dla", "maxxvit", "vision_transformer_relpos")
"""Families of `FAST` that are `long`: others have grouped convolutions and relative positions too."""


@pytest.mark.parametrize(
    "family", [pytest.param(family, marks=pytest.mark.long if family in SLOWER else ()) for family in FAST]
)
def test_model_passes_the_walk(family: str) -> None:
    name, kwargs = FAST[family]
    assert name in timm.list_models(module=family)
    walk(name, kwargs=kwargs)


@pytest.mark.long
@pytest.mark.parametrize("family", [family for family in timm.list_modules() if family not in FAST])
def test_family_passes_the_walk(family: str) -> None:
    walk(smallest_model(family))


def test_auxiliary_classifiers_are_refused() -> None:
    model = build_model("inception_v3", {"aux_logits": True, "num_classes": 10})
    with pytest.raises(UnsupportedModelError, match="inception_v3 with auxiliary classifiers has several"):
        describe_model(model)
