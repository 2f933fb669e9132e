"""The walk: one model is opened, planned, nested, trained, saved and loaded, as every timm family must be.

Every comparison is with a plain timm model, which timm builds without nestify.
"""

import time
import warnings
from collections.abc import Iterator, Mapping
from copy import deepcopy
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import timm
import torch
from safetensors.torch import save_file
from torch import Tensor, nn
from torch.nn import functional

import nestify
from nestify.data.hierarchy import ClassLevels
from nestify.file.fingerprint import fingerprint_error
from nestify.file.writer import write_nested_file
from nestify.model.nested_model import NestedModel
from nestify.model.pretrained import PretrainedModel, load_pretrained
from nestify.recipe.recipe import Recipe, load_recipe
from nestify.schedule.costs import MacCount, count_macs, level_costs
from nestify.schedule.description import describe, prefix_bytes
from nestify.schedule.sensitivity import measure_sensitivity
from nestify.schedule.weights import kept_weights, select_entry_levels
from nestify.training.task import NestedTask, Teacher

Kwargs = dict[str, Any]

CLASSES = 10
SPARSITIES = (0.9, 0.5, 0.0)
SIDES = (64, 96, 128, 224)
"""Image sides in pixels, tried in turn before a model's own."""
TOLERANCE = 1e-5
"""Largest difference of float32 logits, relative to the largest logit."""
SMALLER: Mapping[str, Kwargs] = {"deepseek_vit_412m": {"depth": 2}}
"""Arguments that make a family's smallest model small enough for the walk."""


@dataclass(frozen=True)
class WalkResult:
    """A model that passed the walk.

    Attributes:
        name: name in timm's registry.
        kwargs: arguments with which the model was made, without the class count.
        input_size: (channels, height, width) in pixels.
        parameters: number of elements of the plain model's parameters.
        maskable: number of these that have entry levels.
        seconds: time of the complete walk.
    """

    name: str
    kwargs: Kwargs
    input_size: tuple[int, int, int]
    parameters: int
    maskable: int
    seconds: float


def smallest_model(family: str, seconds: float = 30) -> str:
    """Return the first of `small_models`."""
    return next(small_models(family, seconds))


def small_models(family: str, seconds: float = 30) -> Iterator[str]:
    """Iterate over the models in a module of timm, smallest first; timm's own test models come before others.

    Args:
        family: one of `timm.list_modules()`.
        seconds: time limit for building models of each kind, test models and others, to learn their sizes.
    """
    names = timm.list_models(module=family)
    tests = [name for name in names if name.startswith("test_")]
    for group in (tests, [name for name in names if name not in tests]):
        sizes: dict[str, int] = {}
        end = time.perf_counter() + seconds
        for name in group:
            with torch.device("meta"):
                model = _create(name)
            sizes[name] = sum(parameter.numel() for parameter in model.parameters())
            if time.perf_counter() > end:
                break
        yield from sorted(sizes, key=lambda name: sizes[name])


def walk(name: str, *, macs: bool = True, kwargs: Kwargs | None = None) -> WalkResult:
    """Open a checkpoint of random weights, plan, nest, train, save and load; check every step.

    Args:
        name: name in timm's registry.
        macs: whether to count MACs, which traces the model.
        kwargs: arguments that make the model smaller; None: those of `SMALLER`.

    Raises:
        AssertionError: if a check fails.
        NestifyError: if nestify refuses the model.
    """
    start = time.perf_counter()
    torch.manual_seed(0)
    kwargs = dict(SMALLER.get(name, {}) if kwargs is None else kwargs)
    plain, side = create_plain(name, kwargs)
    randomise_constants(plain)
    pretrained = _open_checkpoint(name, plain, kwargs, side)
    network, spec = pretrained.model, pretrained.spec
    recipe = load_recipe(name, {"data.path": "none", "levels": ",".join(map(str, SPARSITIES))})
    nested = NestedModel(network, spec, [level.name for level in recipe.levels])
    images, target = torch.randn(2, *spec.input_size), torch.arange(2)
    _measure(nested, images)
    _choose_weights(nested, recipe)
    count = _check_plan(nested, recipe) if macs else _empty_count(network)
    _train_once(nested, plain, images, target)
    logits = _check_logits(nested, plain, images, target)
    del plain
    _check_file(nested, recipe, count, logits, images)
    return WalkResult(
        name=name,
        kwargs=kwargs,
        input_size=spec.input_size,
        parameters=sum(parameter.numel() for parameter in nested.network.parameters()),
        maskable=nested.entry_levels.total,
        seconds=time.perf_counter() - start,
    )


def create_plain(name: str, kwargs: Kwargs) -> tuple[nn.Module, int | None]:
    """Return timm's model, and the first of `SIDES` at which it runs; None if only its own size works."""
    cfg = timm.models.get_pretrained_cfg(name)
    assert cfg is not None
    own = cfg.input_size[-1]
    for side in (*(side for side in SIDES if side < own), None):
        size = {"img_size": side} if side and cfg.fixed_input_size else {}
        try:
            model = _create(name, num_classes=CLASSES, **kwargs, **size)
            _run_both_ways(model, torch.zeros(2, 3, side or own, side or own))
        except Exception:  # a model may raise anything at a size that it was not made for
            if side is None:
                raise
            continue
        return model, side
    raise AssertionError("unreachable: the own size returns or raises")


def _create(name: str, **kwargs: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # some timm models cause warnings
        model: nn.Module = timm.create_model(name, **kwargs)
    return model


@torch.no_grad()
def _run_both_ways(model: nn.Module, images: Tensor) -> None:
    trial = deepcopy(model)
    trial.train()(images)
    trial.eval()(images)


@torch.no_grad()
def randomise_constants(model: nn.Module) -> None:
    """Change a new model as training would: vary constant tensors (zero branches), make bounds finite."""
    for parameter in model.parameters():
        if parameter.numel() > 1 and bool((parameter == parameter.flatten()[0]).all()):
            parameter.add_(0.1 * torch.randn_like(parameter))
    for buffer in model.buffers():
        if buffer.is_floating_point():
            buffer.nan_to_num_(posinf=10, neginf=-10)


def _open_checkpoint(name: str, plain: nn.Module, kwargs: Kwargs, side: int | None) -> PretrainedModel:
    """Save the model's checkpoint and open it with nestify; its tensors and classes must be the same."""
    state = {key: tensor.clone() for key, tensor in plain.state_dict().items()}
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.safetensors"
        save_file(state, path, metadata={"format": "pt"})
        pretrained = load_pretrained(name, checkpoint=path, kwargs=kwargs, input_size=side)
    assert pretrained.spec.num_classes == CLASSES
    found = pretrained.model.state_dict()
    assert list(found) == list(state)
    for key, tensor in state.items():
        assert torch.equal(found[key], tensor), f"{key} is not as in the checkpoint"
    return pretrained


def _measure(nested: NestedModel, images: Tensor) -> None:
    """Measure the effect of the weights, after which the network must be as it was, and can be copied."""
    with torch.no_grad():
        before = nested.eval()(images, level=nested.n_levels)
    measured = measure_sensitivity(nested.network, list(nested.entry), [images], "class")
    assert all(bool(each.isfinite().all()) for each in measured.values())
    copy = deepcopy(nested.network)  # fails if a module has kept what was computed with gradients
    with torch.no_grad():
        _assert_same(copy(images), before, "a copy of the network that was measured")


def _choose_weights(nested: NestedModel, recipe: Recipe) -> None:
    """Set entry levels as a run does, and check the number of weights at each level."""
    weights = {name: nested.shared_tensor(name) for name in nested.entry}
    nested.set_entry_levels(select_entry_levels(weights, recipe.levels, "lamp"))
    entry = nested.entry_levels
    assert set(entry) == set(nested.spec.maskable)
    for k, level in enumerate(recipe.levels, start=1):
        assert entry.count_kept(k) == kept_weights(entry.total, level.sparsity)


def _check_plan(nested: NestedModel, recipe: Recipe) -> MacCount:
    """Count MACs and bytes of all levels, check them, and return the MACs of the full level."""
    count = count_macs(nested.network, nested.spec.input_size)
    assert not count.uncounted, f"MACs not counted: {dict(count.uncounted)}"
    costs = level_costs(nested, count)
    sizes = prefix_bytes(recipe, recipe.levels, nested, costs, ClassLevels())
    assert sizes == sorted(sizes)
    assert [cost.dense_macs for cost in costs] == [count.total] * nested.n_levels
    macs = [cost.effective_macs for cost in costs]
    assert 0 < macs[0] < macs[1] < macs[2] == count.total
    return count


def _empty_count(network: nn.Module) -> MacCount:
    return MacCount(0, {name: 0 for name, _ in network.named_parameters()}, frozenset(), {})


def _train_once(nested: NestedModel, plain: nn.Module, images: Tensor, target: Tensor) -> None:
    """Run forward and backward of every level; the same weights as in the plain model must get gradients."""
    criterion = nn.CrossEntropyLoss()
    criterion(plain.train()(images), target).backward()
    trained = {name for name, parameter in plain.named_parameters() if parameter.grad is not None}
    task = NestedTask(nested, criterion, weights=[1.0] * 3, distill=[0.5, 0.5, 0.0], teacher=Teacher("self"))
    nested.train()
    results = task.backward(images, target)
    nested.eval()
    assert [result.level for result in results] == [3, 2, 1]
    for result in results:
        assert torch.isfinite(result.loss), f"the loss of level {result.level} is {result.loss}"
        assert result.logits.shape == (len(images), CLASSES)
    for name in nested.entry:
        grad = nested.shared_tensor(name).grad
        assert (grad is not None) == (name in trained), f"{name} is trained in one model only"
        assert grad is None or bool(torch.isfinite(grad).all()), f"the gradient of {name} is not finite"


def _check_logits(nested: NestedModel, plain: nn.Module, images: Tensor, target: Tensor) -> dict[int, Tensor]:
    """Return the logits of every level, (B, classes); four ways must agree, and levels must differ."""
    logits: dict[int, Tensor] = {}
    for level in range(1, nested.n_levels + 1):
        plain.load_state_dict(_level_state(nested, level))
        plain.train().eval()  # makes LeViT and similar models drop position biases cached in eval mode
        expected = plain(images)
        trained = nested(images, level=level)
        _assert_same(trained, expected, f"level {level} of the nested model, with gradients,")
        _assert_same_gradients(nested, plain, level, trained, expected, target)
        logits[level] = expected.detach()
        nested.eval()  # drops cached biases, too
        with torch.no_grad():
            _assert_same(nested(images, level=level), logits[level], f"level {level} of the nested model")
            _assert_same(nested.at_level(level)(images), logits[level], f"the model of level {level}")
    for level in range(1, nested.n_levels):
        assert _difference(logits[level], logits[level + 1]) > 10 * TOLERANCE, "two levels are the same"
    return logits


def _assert_same_gradients(
    nested: NestedModel, plain: nn.Module, level: int, ours: Tensor, theirs: Tensor, target: Tensor
) -> None:
    """Check that a level's gradient is the plain model's gradient times the level's mask."""
    nested.zero_grad()
    plain.zero_grad()
    functional.cross_entropy(ours, target).backward()
    functional.cross_entropy(theirs, target).backward()
    entry, parameters = nested.entry_levels, dict(plain.named_parameters())
    expected = {name: grad for name in entry if (grad := parameters[name].grad) is not None}
    smallest = 1e-6 * max(float(grad.norm()) for grad in expected.values())  # less is rounding error
    for name, grad in expected.items():
        grad = grad * (entry[name] <= level)
        found = nested.shared_tensor(name).grad
        assert found is not None
        off, size = float((found - grad).norm()), float(grad.norm())
        assert off <= 1e-3 * size + smallest, (
            f"the gradient of {name} at level {level} is off by {off:.2g} of {size:.2g}"
        )


@torch.no_grad()
def _level_state(nested: NestedModel, level: int) -> dict[str, Tensor]:
    """Return the state dict of a plain model for a level, computed without nestify's projection."""
    state = dict(nested.network.state_dict())
    entry = nested.entry_levels
    own = nested.own_tensors(level)
    for name, tensor in state.items():
        kept = nested.spec.aliases.get(name, name)
        if kept in entry.tensors:
            state[name] = tensor.where(entry[kept] <= level, 0.0)
        elif kept in own:
            state[name] = own[kept]
    return state


def _check_file(
    nested: NestedModel,
    recipe: Recipe,
    count: MacCount,
    logits: Mapping[int, Tensor],
    images: Tensor,
) -> None:
    """Save and load the model, and compare its logits; loading also verifies the file's fingerprints."""
    with TemporaryDirectory() as folder:
        path = Path(folder) / "model.nested.safetensors"
        description = describe(recipe, recipe.levels, nested, level_costs(nested, count))
        manifest = write_nested_file(path, nested.nested_state(), description)
        again = nestify.load(path)
    assert not again.training
    for level, expected in logits.items():
        with torch.no_grad():
            _assert_same(again(images, level=level), expected, f"level {level} of the file")
        stored = manifest.levels[level - 1].fingerprint
        assert fingerprint_error(partial(again, level=level), again.spec.input_size, stored) < TOLERANCE


def _assert_same(found: Tensor, expected: Tensor, what: str) -> None:
    off = _difference(found, expected)
    assert off <= TOLERANCE, f"{what} is off by {off:.2g} of the largest logit"


def _difference(found: Tensor, expected: Tensor) -> float:
    """Return the largest difference, relative to the largest expected magnitude."""
    assert found.shape == expected.shape
    found, expected = found.detach(), expected.detach()
    return float((found - expected).abs().max() / expected.abs().max())
