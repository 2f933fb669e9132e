"""Nested models that are trained in a loop of the user's own."""

from collections.abc import Callable, Mapping
from copy import deepcopy
from itertools import chain
from pathlib import Path
from typing import Any

import pytest
import timm
import torch
from timm.optim import Lookahead, create_optimizer_v2
from timm.utils import ModelEmaV3
from torch import Tensor, nn
from torch.nn import functional

import nestify
from nestify.compression.inputs import augmentation, open_recipe_images
from nestify.compression.trainable import TrainableNestedModel, readable_again
from nestify.data.loaders import eval_loader, train_loader
from nestify.errors import BudgetError, NestifyError, NestifyWarning, RecipeError
from tests.cli.driver import CHECKPOINT


@pytest.fixture(autouse=True)
def _own_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


SETTINGS = {
    "train.epochs": 2,
    "train.batch_size": 32,
    "train.lr": 0.02,
    "train.sched": "constant",
    "train.eval_before": False,
    "train.recalibrate_batches": 2,
    "data.max_train": 96,
    "data.max_val": 20,
}
STEPS = 6
SHAPE = (3, 32, 32)


def digits_model() -> nn.Module:
    """The model of the recipe `digits` with its weights."""
    model: nn.Module = timm.create_model("test_resnet", num_classes=10, checkpoint_path=CHECKPOINT)
    return model


def digits_batches(recipe: nestify.Recipe, *, shuffled: bool = False) -> Any:
    """The batches that `compress` trains on, or those on which it measures statistics."""
    images, _ = open_recipe_images(recipe)
    preprocessing = timm.data.resolve_model_data_config(digits_model(), args={"input_size": SHAPE})
    preprocessing["exif_orientation"] = recipe.data.exif_orientation
    if shuffled:
        return eval_loader(images, preprocessing, batch_size=32, workers=0, shuffle_seed=recipe.seed)
    loader = train_loader(
        images,
        preprocessing,
        batch_size=32,
        min_images=2,
        workers=0,
        augment=augmentation(recipe),
        seed=recipe.seed,
        device=torch.device("cpu"),
    )
    return chain.from_iterable(loader.epoch(epoch) for epoch in range(2))


def same_tensors(one: nn.Module, other: nn.Module) -> bool:
    mine, yours = one.state_dict(), other.state_dict()
    return mine.keys() == yours.keys() and all(torch.equal(mine[name], yours[name]) for name in mine)


ADAMW = {"train.opt": "adamw", "train.lr": 0.001}


@pytest.mark.parametrize(
    ("schedule", "levels", "more"),
    [
        ("weight", "0.9,0.5,0", {"schedule.ramp": 0.5, "train.teacher": "original", **ADAMW}),
        pytest.param(
            "weight",
            "macs=0.4,1",
            {"schedule.ramp": 0.5, "train.teacher": "none"},
            marks=pytest.mark.long,
        ),
        pytest.param("channel", "0.25,0.5,1", {"train.teacher": "self"}, marks=pytest.mark.long),
    ],
)
def test_the_same_weights_as_compress(
    tmp_path: Path, schedule: Any, levels: str, more: Mapping[str, object]
) -> None:
    given = {**SETTINGS, "schedule.kind": schedule, "levels": levels, "data.workers": 0, **more}
    recipe = nestify.load_recipe("digits", {**given, "output": str(tmp_path / "compress.safetensors")})
    nestify.compress(recipe, observer=nestify.Observer())

    teachers: dict[str, Any] = {"original": digits_model().eval(), "self": "self", "none": None}
    nested = nestify.nest(
        digits_model(),
        levels,
        schedule,
        options={"train.distill": 0.5, "train.recalibrate_batches": 2},
        ramp_steps=round(STEPS * more.get("schedule.ramp", 0)),  # type: ignore[operator]
        teacher=teachers[str(more["train.teacher"])],
        images=digits_batches(recipe, shuffled=True),
        input_size=SHAPE,
    )
    opt, lr = ("adamw", 0.001) if "train.opt" in more else ("sgd", 0.02)
    optimizer = create_optimizer_v2(nested, opt, lr=lr, weight_decay=1e-4, momentum=0.9)
    nested.pace(optimizer)
    for step, (images, target) in enumerate(digits_batches(recipe)):
        nested.update(step)
        optimizer.zero_grad()
        nested.backward(images, target)
        optimizer.step()
    nested.update(STEPS)
    nested.save(tmp_path / "own.safetensors")

    assert same_tensors(
        nestify.load(tmp_path / "compress.safetensors"), nestify.load(tmp_path / "own.safetensors")
    )


def loop(levels: Any = "0.9,0.5,0", schedule: Any = "weight", **options: Any) -> TrainableNestedModel:
    torch.manual_seed(0)
    # With a zero as the last scale of its block, most convolutions would have no gradient.
    model = timm.create_model("test_resnet", num_classes=10, zero_init_last=False)
    return nestify.nest(model, levels, schedule, input_size=SHAPE, **options)


def batch(count: int = 8) -> tuple[Tensor, Tensor]:
    draw = torch.Generator().manual_seed(1)
    return torch.randn(count, *SHAPE, generator=draw), torch.randint(0, 10, (count,), generator=draw)


def gradients(nested: nn.Module) -> dict[str, Tensor]:
    return {name: p.grad.clone() for name, p in nested.named_parameters() if p.grad is not None}


def test_gradients_by_the_definition() -> None:
    """Those of the weighted mean over the levels that use a weight, times the weight's pace."""
    nested = loop().eval()  # without the noise of batch statistics
    images, target = batch()
    nested.backward(images, target)
    found = gradients(nested)
    weights = [2.0, 1.5, 1.0]
    losses = [functional.cross_entropy(nested(images, level), target) for level in (1, 2, 3)]
    shared = nested.shared_tensor("layer2.0.conv1.weight")
    each = [torch.autograd.grad(loss, shared, retain_graph=True)[0] for loss in losses]
    entry = nested.entry["layer2.0.conv1.weight"]
    assert all(bool(gradient.any()) for gradient in each)
    for level in (1, 2, 3):
        users = range(level, 4)
        mean = sum(weights[k - 1] * each[k - 1] for k in users) / sum(weights[k - 1] for k in users)
        expected = mean * {1: 3**0.5, 2: 8**0.5, 3: 2}[level]
        where = entry == level
        torch.testing.assert_close(
            found["network.layer2.0.conv1.weight"][where], expected[where], atol=1e-6, rtol=1e-4
        )


class Wrapper:
    """An optimizer as Lightning Fabric and Accelerate return it."""

    def __init__(self, optimizer: torch.optim.Optimizer) -> None:
        self.optimizer = optimizer


@pytest.mark.parametrize("calls", [1, 2])
@pytest.mark.parametrize("wrap", [lambda optimizer: optimizer, Wrapper, Lookahead])
def test_the_pace_of_an_adaptive_optimizer(calls: int, wrap: Callable[[Any], Any]) -> None:
    """The first step of Adam is the learning rate times the sign of the gradient."""
    nested = loop("0.5,1", "channel")
    another = loop("0.5,1", "channel")  # the optimizer may have several models
    optimizer = torch.optim.Adam([*another.parameters(), *nested.parameters()], lr=0.01)
    for _ in range(calls):
        another.pace(wrap(optimizer))
        nested.pace(wrap(optimizer))
    shared = nested.shared_tensor("layer2.0.conv1.weight")
    before = shared.detach().clone()
    nested.backward(*batch())
    optimizer.step()
    out, inputs = (size // 2 for size in shared.shape[:2])
    step = (shared.detach() - before).abs() / 0.01
    core, rest = step[:out, :inputs], step[out:]
    assert core[core > 0].median().item() == pytest.approx(2**0.5, rel=0.01)
    assert rest[rest > 0].median().item() == pytest.approx(1, rel=0.01)


def test_pace_leaves_other_optimizers_as_they_are() -> None:
    nested, other = loop(), loop()
    other.load_state_dict(nested.state_dict())
    for each in (nested, other):
        optimizer = torch.optim.SGD(each.parameters(), lr=0.01)
        if each is nested:
            each.pace(optimizer)
        each.backward(*batch())
        optimizer.step()
    assert same_tensors(nested, other)


def test_gradients_add_up() -> None:
    nested = loop("0.5,1", "channel")
    images, target = batch()
    nested.eval()
    nested.backward(images, target)
    once = gradients(nested)
    nested.backward(images, target, lambda logits, labels: 2 * functional.cross_entropy(logits, labels))
    for name, gradient in gradients(nested).items():
        torch.testing.assert_close(gradient, 3 * once[name])


def test_the_loss_function_gets_the_target_as_it_is() -> None:
    nested = loop("0.9,0")
    images, target = batch()
    seen: list[Any] = []

    def loss_fn(logits: Tensor, pair: Any) -> Mapping[str, Any]:
        seen.append(pair)
        return {"loss": functional.cross_entropy(logits, pair[0], reduction="mean").reshape(1), "other": 1}

    results = nested.backward(images, (target, "extra"), loss_fn)
    assert [result.level for result in results] == [2, 1]
    assert all(pair[1] == "extra" for pair in seen)
    assert results[0].logits.shape == (8, 10)
    plain = functional.cross_entropy(nested(images, 2), target)
    torch.testing.assert_close(results[0].loss, plain.detach())


@pytest.mark.parametrize(
    ("loss_fn", "words"),
    [
        (lambda logits, target: functional.cross_entropy(logits, target, reduction="none"), r"\(8,\)"),
        (lambda logits, target: 1.0, "float"),
        (lambda logits, target: {"total": logits.sum()}, "'loss'"),
    ],
)
def test_a_loss_that_is_not_one_number(loss_fn: Any, words: str) -> None:
    with pytest.raises(RecipeError, match=f"loss_fn.*{words}"):
        loop("0.9,0").backward(*batch(), loss_fn)


@pytest.mark.parametrize(("levels", "schedule"), [("0.9,0.5,0", "weight"), ("0.25,0.5,1", "channel")])
def test_a_task_of_timm_has_the_same_gradients(levels: str, schedule: Any) -> None:
    images, target = batch()
    nested, other = loop(levels, schedule), loop(levels, schedule)
    nested.backward(images, target)
    result = other.task()(images, target)
    result["loss"].backward()
    assert result["output"].shape == (8, 10)
    expected = gradients(nested)
    assert gradients(other).keys() == expected.keys()
    for name, gradient in gradients(other).items():
        torch.testing.assert_close(gradient, expected[name], rtol=1e-4, atol=1e-6)
    with pytest.raises(RecipeError, match=r"task\(\)"):
        other.backward(images, target)


def test_a_backward_pass_of_another_library() -> None:
    scaled, plain = loop(), loop()
    scaled.backward(*batch(), backward=lambda loss: (8 * loss).backward())
    plain.backward(*batch())
    for name, gradient in gradients(scaled).items():
        torch.testing.assert_close(gradient, 8 * gradients(plain)[name])


def test_sparsity_increases_and_is_saved_at_its_target(tmp_path: Path) -> None:
    nested = loop("0.9,0", ramp_steps=10)
    found = []
    for step in range(0, 11, 5):
        nested.update(step)
        found.append(nested.sparsity(1))
    # s(t) = 0.9 (1 - (1 - t / T)^3)
    assert found == pytest.approx([0, 0.9 * (1 - 0.5**3), 0.9], abs=1e-3)
    nested.save(tmp_path / "a.safetensors")
    assert nestify.load(tmp_path / "a.safetensors").sparsity(1) == pytest.approx(0.9, abs=1e-3)


@pytest.mark.parametrize("levels", ["0.9,0.5,0", "macs=0.4,1"])
def test_a_loop_resumes_within_the_ramp(levels: str, tmp_path: Path) -> None:
    """With the same images, the levels are those of a loop that was not interrupted; with others it warns."""
    images = batch(16)
    nested = loop(levels, ramp_steps=100, images=[images])
    nested.update(40)
    torch.save(nested.state_dict(), tmp_path / "state.pt")
    nested.update(100)
    other = loop(levels, ramp_steps=100, images=[images])
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    other.update(100)
    assert same_tensors(nested, other)
    third = loop(levels, ramp_steps=100, images=[(-images[0], None)])
    with pytest.warns(NestifyWarning, match=r"ranked by their effect on other images.*give nest the same"):
        third.load_state_dict(torch.load(tmp_path / "state.pt"))


def test_a_running_average_goes_on_after_the_ramp() -> None:
    nested = loop("0.9,0", ramp_steps=2, images=[batch(16)])
    averaged = ModelEmaV3(nested, decay=0.5)
    for step in range(4):
        nested.update(step)
        averaged.update(nested)


def test_an_update_that_comes_late_still_ends_the_ramp() -> None:
    nested = loop("0.9,0", ramp_steps=10)
    nested.update(17)
    assert nested.sparsity(1) == pytest.approx(0.9, abs=1e-3)


def test_a_loop_resumes_from_its_state_dict(tmp_path: Path) -> None:
    """After the ramp, the weights of the levels are those of the state, whatever the weights are by then."""
    nested = loop("macs=0.4,1", ramp_steps=2)
    for step in range(3):
        nested.update(step)
    with torch.no_grad():
        for parameter in nested.parameters():
            parameter.add_(torch.randn_like(parameter))
    torch.save(nested.state_dict(), tmp_path / "state.pt")
    other = loop("macs=0.4,1", ramp_steps=2)
    other.load_state_dict(torch.load(tmp_path / "state.pt"))
    for resumed in (nested, other):
        resumed.update(3)
    assert same_tensors(nested, other)
    assert same_tensors(
        nestify.load(nested.save(tmp_path / "one.safetensors")),
        nestify.load(other.save(tmp_path / "other.safetensors")),
    )


def test_saving_changes_nothing(tmp_path: Path) -> None:
    nested = loop(options={"dtype": "float16"}).train()
    before = deepcopy(nested.state_dict())
    nested.save(tmp_path / "a.safetensors", [f"class {k}" for k in range(10)])
    assert nested.training
    assert all(torch.equal(before[name], tensor) for name, tensor in nested.state_dict().items())
    report = nestify.read_report(tmp_path / "a.safetensors")
    assert report.class_names == [f"class {k}" for k in range(10)]
    assert nestify.verify(tmp_path / "a.safetensors").passed


def test_a_copy_is_a_loop_of_its_own() -> None:
    """As timm's running average (ModelEmaV3) makes one."""
    nested = loop()
    copy = deepcopy(nested)
    copy.backward(*batch())
    assert gradients(copy)
    assert not gradients(nested)


COMBINED = {"level": [{"width": 0.5, "sparsity": 0.5}, {"width": 0.5}, {"width": 1.0}]}


@pytest.mark.long
@pytest.mark.parametrize(
    ("levels", "schedule", "options"), [("0.25,0.5,1", "channel", {}), (None, "combined", COMBINED)]
)
def test_images_of_an_iterator_serve_all_levels(levels: str | None, schedule: str, options: Any) -> None:
    """A generator ends when the ranking of weights, or the first level, has read it."""
    images = [batch(16)] * 3
    lists = loop(levels, schedule, images=images, options=options)
    generators = loop(levels, schedule, images=iter(images), options=options)
    assert same_tensors(lists, generators)
    assert not same_tensors(lists, loop(levels, schedule, options=options))


def test_batches_of_an_iterator_can_be_read_again() -> None:
    images = [torch.full((1,), float(value)) for value in range(5)]
    assert readable_again(images, 2) is images
    found = readable_again(iter(images), 3)
    assert list(found) == list(found) == images[:3]


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"levels": "0.5,0.9,0"}, "level"),
        ({"options": {"train.lr": 0.1}}, "train.lr"),
        ({"options": {"schedule.ramp": 0.1}}, "ramp_steps="),
        ({"options": {"schedule.score": "erk"}}, "score="),
        ({"options": {"level[1].freeze": True}}, "freeze"),
        ({"levels": "0.5,1", "schedule": "layer", "options": {"schedule.rank": "loss"}}, "images="),
        ({"schedule": "wide"}, "wide"),
        ({"ramp_steps": -1}, "ramp_steps"),
        ({"teacher": "original"}, "teacher"),
    ],
)
def test_refusals(arguments: dict[str, Any], words: str) -> None:
    with pytest.raises(NestifyError, match=words):
        nestify.nest(timm.create_model("test_resnet", num_classes=10), input_size=SHAPE, **arguments)


def test_what_cannot_be_saved(tmp_path: Path) -> None:
    nested = loop(ramp_steps=4)
    with pytest.raises(RecipeError, match="step 4"):
        nested.save(tmp_path / "a.safetensors")
    nested.update(4)
    with pytest.raises(RecipeError, match="3 class names"):
        nested.save(tmp_path / "a.safetensors", ["a", "b", "c"])
    (tmp_path / "file").touch()
    with pytest.raises(NestifyError, match="file"):
        nested.save(tmp_path / "file" / "a.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_missed_budget_is_an_error_after_the_file_is_written(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    nested = loop("macs=0.4,1")
    monkeypatch.setattr("nestify.schedule.budgets.Solver.check", lambda *_: ["level1 costs too much"])
    with pytest.raises(BudgetError, match=r"level1 costs too much.*was written"):
        nested.save(tmp_path / "a.safetensors")
    assert nestify.verify(tmp_path / "a.safetensors").passed


GUIDE = (Path(nestify.__file__).parent / "guide" / "own-loop.md").read_text(encoding="utf-8")
EXAMPLES = [block.removeprefix("python\n") for block in GUIDE.split("```") if block.startswith("python\n")]


def test_the_first_example_of_the_guide(capsys: pytest.CaptureFixture[str]) -> None:
    """Run as it is printed, with a smaller model and few steps."""
    text = EXAMPLES[0].replace('timm.create_model("resnet50", pretrained=True)', "small_model")
    text = text.replace("ramp_steps=500", "ramp_steps=2, input_size=(3, 32, 32)")
    exec(text, {"loader": [batch()] * 2, "epochs": 1, "small_model": digits_model()})
    assert "1: " in capsys.readouterr().out
    assert nestify.verify("resnet50.nested.safetensors").passed


@pytest.mark.parametrize("number", [1, 2, 3, 4], ids=["channels", "fabric", "accelerate", "timm"])
def test_the_other_examples_of_the_guide(number: int) -> None:
    text = EXAMPLES[number]
    for package in ("lightning_fabric", "accelerate"):
        if package in text:
            pytest.importorskip(package, reason=f"{package} is tried by hand")
    nested = loop("0.9,0")
    before = deepcopy(nested.state_dict())
    given = {
        "model": timm.create_model("test_resnet", num_classes=10),
        "loader": [batch()] * 2,
        "nested": nested,
        "optimizer": torch.optim.SGD(nested.parameters(), lr=0.1),
        "loss_fn": nn.CrossEntropyLoss(),
    }
    exec(text, given)
    if "nestify.nest(" in text:
        assert given["nested"].sparsity(1) == 0
        assert given["nested"].level_sizes is not None
    else:
        assert not torch.equal(before["network.fc.weight"], nested.state_dict()["network.fc.weight"])
