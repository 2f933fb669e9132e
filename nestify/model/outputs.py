"""What a model returns: logits, an embedding, or feature maps. Does not import torch."""

from collections.abc import Mapping
from typing import Any, Literal

OutputKind = Literal["logits", "embedding", "features"]

RETURNED: Mapping[OutputKind, str] = {
    "logits": "logits",
    "embedding": "an embedding",
    "features": "feature maps",
}


def output_kind(kwargs: Mapping[str, Any], num_classes: int) -> OutputKind:
    """Return what a timm model returns.

    Args:
        kwargs: arguments of `timm.create_model`; with `features_only` it returns a list of feature maps.
        num_classes: number of classes that it predicts; 0 for a model without a classifier.
    """
    if kwargs.get("features_only"):
        return "features"
    return "logits" if num_classes else "embedding"


def output_names(kind: OutputKind, count: int) -> list[str]:
    """Return the names that a model's outputs have in formats that name them.

    Args:
        kind: what the model returns.
        count: number of tensors that it returns; 1 unless they are feature maps.
    """
    return [f"features_{index}" for index in range(count)] if kind == "features" else [kind]
