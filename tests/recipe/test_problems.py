"""The sentences in which a recipe's problems are told."""

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nestify.errors import RecipeError
from nestify.recipe.problems import dotted, format_toml, section_of
from nestify.recipe.recipe import Recipe, load_recipe

EPOCHS = "passes over the training images; 0 trains nothing"
SIZE = "is not an image size in pixels; give one side (224) or [height, width]"
SECTIONS = {
    name: tuple(section.model_fields)
    for name, field in Recipe.model_fields.items()
    if (section := section_of(field)) and name != "level"
}


LR = (
    "learning rate after the warmup; by default 0.01, and 0.0005 for AdamW and its like; auto tries several "
    "in short trainings first"
)


def problems(options: dict[str, object]) -> list[str]:
    with pytest.raises(RecipeError) as caught:
        load_recipe("resnet18", {"data.path": "photos"} | options)
    return caught.value.problems


@pytest.mark.parametrize(
    ("key", "value", "told"),
    [
        ("train.epochs", "three", f'"three" is not a number ({EPOCHS})'),
        ("train.epochs", -1, f"-1 is less than 0 ({EPOCHS})"),
        ("train.epochs", True, f"true is not a number ({EPOCHS})"),
        ("train.lr", 0.0, f"0 is not above 0 ({LR})"),
        ("train.lr", "abc", f'"abc" is not a number ({LR})'),
        ("train.lr", float("inf"), f"inf is not a finite number ({LR})"),
        ("train.batch_size", 1.5, "1.5 is not a whole number (images per training step and device)"),
        (
            "train.eval_before",
            "yes",
            '"yes" is not true or false (whether to validate the levels before training as well)',
        ),
        ("train.momentum", 1, "1 is not in [0, 1) (momentum of optimizers that have one)"),
        ("train.distill", 1.1, "1.1 is not in [0, 1] (share of distillation in each level's loss)"),
        ("train.opt", 3, "3 is not a text in quotes (timm's name of the optimizer)"),
        ("train.opt", "", '"" is empty (timm\'s name of the optimizer)'),
        ("train.sched", "cos", "\"cos\" is not 'cosine' or 'constant'"),
        ("train.bn", "shared", "\"shared\" is not 'private' or 'recalibrate'"),
        ("train", 3, "3 is not a section; write [train] and its options below it"),
        (
            "data.holdout",
            1,
            "1 is not in (0, 1) (share of the training images to validate on; by default 0.1 if the data has "
            "no validation split)",
        ),
        ("data.on_bad_image", "ignore", "\"ignore\" is not 'refuse' or 'skip'"),
        ("seed", 2**32, "4294967296 is not in [0, 4294967296) (seed of every random choice)"),
        ("device", "GPU 1", '"GPU 1" is not a device; give auto, cpu, cuda, cuda:1 or mps'),
        ("model.input_size", [224], f"[224] {SIZE}"),
        ("model.input_size", 0, f"0 {SIZE}"),
        ("model.input_size", True, f"true {SIZE}"),
        (
            "model.checkpoint",
            "a.onnx",
            '"a.onnx" is not a checkpoint\'s name; it ends in .safetensors, .pth, .pth.tar, .pt, .ckpt, .bin',
        ),
        ("model.kwargs", 3, "3 is not a table (further arguments of timm.create_model)"),
        (
            "model.kwargs",
            {"pretrained": True},
            '{"pretrained": true} has pretrained, which has an option of its own; set model.pretrained',
        ),
        ("model.kwargs.x", {"y": 1}, '{"y": 1} is not a number, a text, true or false, or a list of these'),
        ("model.kwargs.x", float("nan"), "nan is not a number, a text, true or false, or a list of these"),
        ("augment.scale", [0.5, 1.5], "[0.5, 1.5] is more than the whole image; [low, high] needs high <= 1"),
        ("augment.ratio", [2, 1], "[2, 1] is not in order; [low, high] needs 0 < low <= high"),
        ("augment.ratio", 2, "2 is not a list of two numbers, [low, high]"),
        (
            "augment.auto_augment",
            "randm9",
            '"randm9" is not one of timm\'s; give rand-m9-mstd0.5, '
            "augmix-m5-w4-d2, original, originalr, v0, v0r or 3a",
        ),
        ("schedule.kind", "head", "\"head\" is not 'weight', 'channel', 'layer' or 'combined'"),
        (
            "schedule.score",
            "l1",
            "\"l1\" is not 'fisher', 'lamp', 'magnitude', 'per_mac', 'uniform' or 'erk'",
        ),
        (
            "schedule.pattern",
            "2:4",
            '"2:4" is N:M, which sets one level\'s sparsity; give it per level: pattern = "2:4"',
        ),
        ("schedule.pattern", "1x1", '"1x1" is not a block; RxC needs at least two weights'),
        (
            "schedule.skip",
            "fc",
            '"fc" is not a list (weights that stay dense in every level: names or wildcards of '
            "modules or parameters, or first, classifier, depthwise)",
        ),
        ("finetune.save", "a.pth", '"a.pth" does not end in .safetensors, the format it is written in'),
    ],
)
def test_a_wrong_value_is_told_with_key_value_and_range(key: str, value: object, told: str) -> None:
    assert problems({key: value}) == [f"{key} = {told}"]


def test_a_position_in_a_list_counts_from_one() -> None:
    assert problems({"schedule.skip": ["a", 3]})[0].startswith("schedule.skip[2] = 3 is not a text in quotes")
    assert dotted(("level", 0, "sparsity")) == "level[1].sparsity"
    assert dotted(("a b", "c\n")) == '"a b"."c\\n"'


@pytest.mark.parametrize(
    "text",
    [
        "rand-m9-mstd0.5",
        "rand-m9-n3-mstd0.5-inc1",
        "augmix-m5-w4-d2",
        "augmix-d-1",
        "original-mstd0.5",
        "v0r",
        "3a",
        "rand-mstd1-tweights",
    ],
)
def test_timms_augmentations_are_accepted(text: str) -> None:
    load_recipe("resnet18", {"data.path": "x", "augment.auto_augment": text})


@pytest.mark.parametrize(
    ("key", "told"),
    [
        ("train.epohcs", "unknown key train.epohcs; did you mean train.epochs?"),
        ("epochs", "unknown key epochs; did you mean train.epochs?"),
        ("epoch", "unknown key epoch; did you mean train.epochs?"),
        ("sparsity", "unknown key sparsity; did you mean [[level]] sparsity?"),
        ("pattern", "unknown key pattern; did you mean schedule.pattern?"),
        ("distill", "unknown key distill; did you mean train.distill?"),
        ("train.seed", "unknown key train.seed; did you mean seed?"),
        ("model.path", "unknown key model.path; did you mean data.path?"),
        ("model.epochz", "unknown key model.epochz; did you mean train.epochs?"),
        ("level[1].sparsty", "unknown key level[1].sparsty; did you mean level[1].sparsity?"),
        ("trian", "unknown key trian; did you mean train?"),
        ("finetune.zzz", "unknown key finetune.zzz; finetune has epochs, lr, save"),
        (
            "zzz",
            "unknown key zzz; a recipe has output, dtype, seed, device, model, data, augment, schedule, "
            "level, train, finetune, gates",
        ),
        (
            "a b",
            'unknown key "a b"; a recipe has output, dtype, seed, device, model, data, augment, schedule, '
            "level, train, finetune, gates",
        ),
    ],
)
def test_an_unknown_key_is_told_with_the_nearest(key: str, told: str) -> None:
    assert problems({key: 1}) == [told]


@settings(deadline=None)  # a busy machine is no defect
@given(st.data())
def test_every_misspelt_key_is_refused_with_a_known_one(data: st.DataObject) -> None:
    section = data.draw(st.sampled_from(sorted(SECTIONS)))
    name = data.draw(st.sampled_from([name for name in SECTIONS[section] if len(name) > 3]))
    k = data.draw(st.integers(0, len(name) - 1))
    misspelt = name[:k] + name[k] + name[k:]
    (told,) = problems({f"{section}.{misspelt}": 1})
    assert told == f"unknown key {section}.{misspelt}; did you mean {section}.{name}?"


def test_a_long_value_is_cut() -> None:
    assert format_toml("x" * 100) == '"' + "x" * 76 + "..."
    assert format_toml(1 << 20000) == "a number of thousands of digits"
