"""Narrow levels equal plain narrower networks, train the shared weights, and survive saving and loading."""

from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch import nn

import nestify
from nestify.errors import BadFileError, UnsupportedModelError
from nestify.file.writer import write_nested_file
from nestify.model.batch_norm import recalibrate
from nestify.model.graph.block_map import map_blocks
from nestify.model.graph.channel_map import map_channels, permute_channels
from nestify.model.level_sizes import LevelSizes, derive_level_sizes
from nestify.model.nested_model import NestedModel
from nestify.model.spec import describe_model
from nestify.recipe.levels import Level
from nestify.schedule.channels import channel_counts
from tests.file.builders import description

SIDE = 64
WIDTHS = (0.25, 0.5, 1.0)


def narrow_model(architecture: str, widths: tuple[float, ...] = WIDTHS) -> NestedModel:
    """Return a nested model with random weights and one level for each width, in eval mode."""
    torch.manual_seed(0)
    network = timm.create_model(architecture, num_classes=7).eval()
    with torch.no_grad():
        for tensor in (*network.parameters(), *network.buffers()):
            if tensor.is_floating_point():
                tensor.copy_(
                    torch.rand_like(tensor) + 0.5 if tensor.ndim < 2 else torch.randn_like(tensor) / 9
                )
    channels = map_channels(network, (3, SIDE, SIDE))
    levels = [Level(f"size-{k}", 0.0, width=width) for k, width in enumerate(widths, start=1)]
    counts = channel_counts(channels.groups, levels, 8)
    names = [level.name for level in levels]
    level_sizes = LevelSizes(channels, map_blocks(channels), tuple(counts), (frozenset(),) * len(counts))
    spec = describe_model(network, (3, SIDE, SIDE))
    return NestedModel(network, spec, names, masked=(), level_sizes=level_sizes).eval()


def images(count: int = 2) -> torch.Tensor:
    return torch.randn(count, 3, SIDE, SIDE)


def write_file(nested: NestedModel, path: Path) -> Path:
    """Write a nested model of 7 classes to a file, and return its path."""
    n = nested.n_levels
    model = description(n).model.model_copy(
        update={
            "architecture": nested.spec.architecture,
            "kwargs": nested.spec.kwargs,
            "num_classes": 7,
            "class_names": None,
            "preprocessing": description(n).model.preprocessing.model_copy(
                update={"input_size": (3, SIDE, SIDE)}
            ),
        }
    )
    write_nested_file(path, nested.nested_state(), description(n, model=model))
    return path


def slim_resnet(nested: NestedModel, level: int) -> nn.Module:
    """Return timm's own ResNet with the level's widths and the first channels of the full level's tensors."""
    shapes = {name: tensor.shape for name, tensor in nested.projection(level).items()}
    network = timm.create_model("test_resnet", num_classes=7).eval()
    for name, module in network.named_modules():
        own = f"{name}.weight"
        if own not in shapes:
            continue
        tensors = dict(module.named_parameters(recurse=False))
        tensors |= dict(module.named_buffers(recurse=False))
        for local, tensor in tensors.items():
            shape = shapes.get(f"{name}.{local}", tensor.shape)
            full = nested.network.get_submodule(name).state_dict()[local]
            cut = full[tuple(slice(extent) for extent in shape)].clone()
            if isinstance(tensor, nn.Parameter):
                setattr(module, local, nn.Parameter(cut))
            else:
                setattr(module, local, cut)
    return network


@pytest.mark.parametrize("level", [1, 2])
def test_a_narrow_resnet_equals_the_plain_one_of_its_width(level: int) -> None:
    nested = narrow_model("test_resnet")
    plain, inputs = slim_resnet(nested, level), images()
    with torch.no_grad():
        torch.testing.assert_close(nested(inputs, level=level), plain(inputs), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(nested.at_level(level)(inputs), plain(inputs), rtol=1e-4, atol=1e-5)
        assert torch.equal(nested(inputs, level=3), nested.network(inputs))
    sizes = [sum(t.numel() for t in nested.at_level(k).parameters()) for k in (1, 2, 3)]
    assert sizes[0] < 0.12 * sizes[2]
    assert sizes[1] < 0.35 * sizes[2]


@pytest.mark.parametrize("level", [1, 2])
def test_a_training_step_equals_that_of_the_plain_network(level: int) -> None:
    """Logits, running statistics and gradients are equal; other channels have no gradient."""
    nested = narrow_model("test_resnet").train()
    plain, inputs = slim_resnet(nested, level).train(), images(8)
    expected = plain(inputs)
    found = nested(inputs, level=level)
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
    expected.square().sum().backward()
    found.square().sum().backward()
    full = dict(nested.network.named_parameters())
    own = nested.own_tensors(level)
    for name, parameter in plain.named_parameters():
        assert parameter.grad is not None
        if name in own:
            gradient = own[name].grad
        else:
            box = tuple(slice(extent) for extent in parameter.shape)
            gradient = full[name].grad
            assert gradient is not None
            rest = gradient.clone()
            rest[box] = 0
            assert not rest.any()
            gradient = gradient[box]
        assert gradient is not None
        torch.testing.assert_close(gradient, parameter.grad, rtol=1e-3, atol=1e-3)
    for name, buffer in plain.named_buffers():
        if "running" in name:
            torch.testing.assert_close(own[name], buffer, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "architecture",
    [
        "test_resnet",
        *(
            pytest.param(name, marks=pytest.mark.long)
            for name in ("test_vit", "test_efficientnet", "test_convnext")
        ),
    ],
)
def test_levels_are_the_same_after_saving_and_loading(tmp_path: Path, architecture: str) -> None:
    nested = narrow_model(architecture)
    path, inputs = write_file(nested, tmp_path / "file"), images()
    again = nestify.load(path, check=False)
    for level in (1, 2, 3):
        with torch.no_grad():
            expected = nested(inputs, level=level)
            torch.testing.assert_close(again(inputs, level=level), expected, rtol=1e-5, atol=1e-5)
            plain = nestify.load(path, level=level, check=False)
            torch.testing.assert_close(plain(inputs), expected, rtol=1e-5, atol=1e-5)


def test_a_slice_holds_only_the_narrow_levels(tmp_path: Path) -> None:
    nested, inputs = narrow_model("test_efficientnet"), images()
    path = write_file(nested, tmp_path / "file")
    nestify.slice_file(path, 2, tmp_path / "slice")
    assert (tmp_path / "slice").stat().st_size < 0.6 * path.stat().st_size
    again = nestify.load(tmp_path / "slice", check=False)
    assert again.n_levels == 2
    with torch.no_grad():
        for level in (1, 2):
            expected = nested(inputs, level=level)
            torch.testing.assert_close(again(inputs, level=level), expected, rtol=1e-5, atol=1e-5)
    nestify.slice_file(path, 1, tmp_path / "core")
    nestify.upgrade_slice(path, 2, tmp_path / "core")
    assert (tmp_path / "core").read_bytes() == (tmp_path / "slice").read_bytes()


def test_channel_positions_are_not_stored(tmp_path: Path) -> None:
    """A file consists of the full network's values, the lower levels' private tensors, and a header."""
    nested = narrow_model("test_resnet")
    write_file(nested, tmp_path / "file")
    state = nested.nested_state()
    values = sum(t.numel() * t.element_size() for t in state.shared.values())
    private = sum(t.numel() * t.element_size() for own in state.private for t in own.values())
    report = nestify.read_report(tmp_path / "file")
    data = report.file_bytes - report.header_bytes
    assert 0 <= data - values - private < 8 * len(state.shared) * len(WIDTHS)


def test_level_sizes_are_derived_from_their_axes() -> None:
    nested = narrow_model("test_vit")
    assert nested.level_sizes is not None
    state = nested.network.state_dict()
    names = set(nested.level_sizes.channels.names)
    skipped: list[list[str]] = [[], [], []]
    channels, layers = nested.level_sizes.channels, nested.level_sizes.layers
    again = derive_level_sizes(channels, layers, nested.level_sizes.axis_levels(state), names, skipped)
    assert again.counts == nested.level_sizes.counts


def test_inconsistent_axes_are_refused() -> None:
    nested = narrow_model("test_resnet")
    assert nested.level_sizes is not None
    levels = nested.level_sizes.axis_levels(nested.network.state_dict())
    name = next(name for name in levels if 0 in levels[name])
    levels[name][0] = levels[name][0].flip(0)
    names = set(nested.level_sizes.channels.names)
    with pytest.raises((ValueError, UnsupportedModelError), match=r"coupled with|first channels"):
        derive_level_sizes(
            nested.level_sizes.channels, nested.level_sizes.layers, levels, names, [[], [], []]
        )


def test_a_file_of_another_architecture_is_refused(tmp_path: Path) -> None:
    path = write_file(narrow_model("test_resnet"), tmp_path / "file")
    content = path.read_bytes().replace(b"test_resnet", b"test_nfnet2")
    path.write_bytes(content)
    with pytest.raises(BadFileError):
        nestify.load(path, level=1)


@pytest.mark.parametrize("sizes", [(4, 4, 4), (8, 2), (8, 5, 1)])
def test_a_narrow_level_is_recalibrated_like_a_plain_network(sizes: tuple[int, ...]) -> None:
    """The reference is a plain network of its width, recalibrated by fvcore; images count alike."""
    nested = narrow_model("test_resnet")
    batches = [images(size) * (1 + 3 * i) for i, size in enumerate(sizes)]
    graph, plain = nested.at_level(1), slim_resnet(nested, 1)
    assert recalibrate(graph, batches, 3) == recalibrate(plain, batches, 3)
    expected = dict(plain.named_buffers())
    for name, buffer in graph.named_buffers():
        torch.testing.assert_close(buffer, expected[name], rtol=1e-3, atol=1e-4)
    nested.load_own(1, graph.state_dict())
    with torch.no_grad():
        inputs = images()
        torch.testing.assert_close(nested(inputs, level=1), plain(inputs), rtol=1e-3, atol=1e-4)


@pytest.mark.long
def test_values_cached_in_eval_mode_are_dropped() -> None:
    """LeViT computes its position biases only once in eval mode; permuted channels need new ones."""
    torch.manual_seed(0)
    network = timm.create_model("levit_128s", num_classes=7).eval()
    inputs = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        for name, parameter in network.named_parameters():
            if "attention_biases" in name:
                parameter.normal_(std=9)
            elif parameter.ndim < 2:  # timm initialises residual branches to 0
                parameter.uniform_(0.5, 1.5)
        expected = network(inputs)
        channels = map_channels(network, (3, 224, 224))
        permute_channels(network, channels, [np.arange(group.units)[::-1] for group in channels.groups])
        torch.testing.assert_close(network(inputs), expected, rtol=0, atol=1e-4)
