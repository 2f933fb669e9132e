"""Skipping blocks of several kinds of networks gives the logits of timm with disabled modules."""

from typing import Any

import pytest
import timm
import torch

from tests.model.graph.builders import randomise
from tests.model.graph.skipping import walk_blocks

MODELS: dict[str, tuple[dict[str, Any], int, int]] = {
    "levit_128s": (  # branches in blocks that downsample
        {"embed_dim": [32, 48, 64], "num_heads": [2, 3, 4], "depth": [1, 2, 1], "img_size": 64},
        4,
        2,
    ),
    "mobilenetv3_small_050": ({}, 7, 0),  # activations after sums, squeeze-excite gates
    "swin_tiny_patch4_window7_224": (  # attention in windows
        {"img_size": 56, "embed_dim": 24, "depths": (2, 1), "num_heads": (2, 4)},
        3,
        0,
    ),
}
"""Name -> arguments that make the model small, number of blocks that are modules, and that are branches."""


@pytest.mark.parametrize(
    "name",
    [
        pytest.param(name, marks=pytest.mark.long if name != "swin_tiny_patch4_window7_224" else ())
        for name in MODELS
    ],
)
def test_skipping_blocks_equals_disabling_modules(name: str) -> None:
    kwargs, modules, branches = MODELS[name]
    model = timm.create_model(name, num_classes=10, **kwargs).double().eval()
    side = kwargs.get("img_size", 64)
    walked = walk_blocks(randomise(model), torch.randn(2, 3, side, side, dtype=torch.float64))
    assert (walked.modules, walked.branches) == (modules, branches)
    assert walked.compared == walked.tried == 4 + (branches > 0)
    assert walked.error < 1e-10
