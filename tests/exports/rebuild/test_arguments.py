"""What timm's classes are built with, and the numbers among it."""

import json

import timm
import torch
from timm.models.vision_transformer import VisionTransformer

from nestify.exports.rebuild.arguments import constructor_arguments, replaced, slots, value_at


def test_what_the_class_is_given_and_its_defaults() -> None:
    original = VisionTransformer.__init__
    found = constructor_arguments("vit_tiny_patch16_224", {"num_classes": 3, "depth": 2})
    assert found["num_classes"] == 3
    assert found["depth"] == 2
    assert (found["embed_dim"], found["num_heads"], found["mlp_ratio"]) == (192, 3, 4.0)
    assert (found["class_token"], found["global_pool"], found["init_values"]) == (True, "token", None)
    assert "mlp_layer" not in found  # a class
    assert "self" not in found
    assert json.loads(json.dumps(found)) == found
    assert VisionTransformer.__init__ is original


def test_a_class_that_hands_on_what_it_is_given() -> None:
    model = timm.create_model("deit_tiny_distilled_patch16_224")
    assert type(model) is not VisionTransformer
    found = constructor_arguments("deit_tiny_distilled_patch16_224", {})
    assert (found["embed_dim"], found["mlp_ratio"]) == (192, 4.0)


def test_fields_of_a_configuration_object() -> None:
    found = constructor_arguments("repvgg_a0", {})
    assert found["width_factor"] == 1.0
    assert "blocks" not in found  # they are objects themselves
    assert constructor_arguments("repvgg_a0", {"width_factor": 0.5})["width_factor"] == 0.5


def test_nothing_else_changes() -> None:
    state = torch.get_rng_state()
    constructor_arguments("test_vit", {})
    assert torch.equal(torch.get_rng_state(), state)


def test_numbers_among_arguments() -> None:
    arguments = {"a": 1, "b": [2.5, [3, 0, True]], "c": "4", "img_size": [5, 5], "d": None, "e": -6}
    assert [(slot, value_at(arguments, slot)) for slot in slots(arguments)] == [
        (("a", ()), 1),
        (("b", (0,)), 2.5),
        (("b", (1, 0)), 3),
    ]
    assert replaced(arguments, ("b", (1, 0)), 7) == arguments | {"b": [2.5, [7, 0, True]]}
    assert arguments["b"] == [2.5, [3, 0, True]]
