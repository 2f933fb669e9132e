"""Predicted times of levels: closed forms over made-up tables, and tables of small models."""

import numpy as np
import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

from nestify.engine import profile
from nestify.engine.layer_times import LayerTime, LayerTimes, NetworkTimes, Shape
from nestify.engine.library import Library, cache_folder
from nestify.engine.profile import layer_times, measure_layers, weight_names, without_overhead
from nestify.exports.onnx import translate
from nestify.exports.target import ExportFacts
from nestify.model.spec import describe_model

FULL = NetworkTimes(
    {
        "packed": LayerTime(dense=4.0, fixed=1.0, slope=5.0, after=0.5),
        "dense": LayerTime(dense=2.0, after=1.0),
    },
    2.0,
    0.5,
    {"packed": (4, 4, 3, 3), "dense": (8, 2)},
)
HALF = NetworkTimes(
    {"packed": LayerTime(dense=1.0, after=0.25), "dense": LayerTime(dense=0.5, after=0.5)},
    1.0,
    1.0,
    {"packed": (2, 2, 3, 3), "dense": (4, 2)},
)
TABLE = LayerTimes([FULL], 1)
WIDTHS = LayerTimes([HALF, FULL], 1)


@pytest.mark.parametrize(
    ("densities", "seconds"),
    [
        ({}, 8.0),
        ({"packed": 0.46, "dense": 0.1}, 8.0),  # too dense to be packed, and never packed
        # 1 + 0.2 * 5 and 2 for the layers; 4 of 6 seconds are packed, so the rest is 2 - 1.5 * 2 / 3
        ({"packed": 0.2}, 2 + 2 + 1.0),
        ({"packed": 0.0, "dense": 0.0}, 1 + 2 + 1.0),
    ],
)
def test_a_level_takes_the_time_of_its_layers_and_of_the_rest(
    densities: dict[str, float], seconds: float
) -> None:
    assert TABLE.share(densities) == pytest.approx(seconds / 8)


@given(st.floats(0, 1), st.floats(0, 1))
def test_a_sparser_level_is_never_predicted_to_be_slower(one: float, other: float) -> None:
    sparser, denser = sorted((one, other))
    assert TABLE.share({"packed": sparser}) <= TABLE.share({"packed": denser}) + 1e-12


@pytest.mark.parametrize(
    ("shapes", "densities", "seconds"),
    [
        ({}, {}, 8.0),
        ({"packed": None}, {}, 0.5 + 3.0),  # a layer that is skipped takes nothing, nor what runs after it
        ({"packed": (2, 2, 3, 3), "dense": (4, 2)}, {}, 0.5 + 1.25 + 1.0),
        ({"packed": (2, 4, 3, 3)}, {}, 0.5 + (1.25 + (4.5 - 1.25) / 3) + 3.0),  # a third of the way
        ({"packed": (1, 1, 3, 3)}, {}, 0.5 + 1.25 + 3.0),  # never below what was measured
        # At 0.2, the narrow layer is too small to be packed, and takes 1.25. The full one takes
        # 1 + 0.2 * 5 + 0.5 seconds, less 1.5 * 4 / 6 for layouts that are not converted.
        ({"packed": (2, 2, 3, 3)}, {"packed": 0.2}, 0.5 + 1.25 + 3.0),
        ({"packed": (4, 4, 3, 3)}, {"packed": 0.2}, 0.5 + 1.5 + 3.0),
        ({"packed": (2, 4, 3, 3)}, {"packed": 0.2}, 0.5 + (1.25 + 0.25 / 3) + 3.0),
    ],
)
def test_layers_are_interpolated_by_the_size_of_their_weights(
    shapes: dict[str, Shape | None], densities: dict[str, float], seconds: float
) -> None:
    assert WIDTHS.share(densities, shapes) == pytest.approx(seconds / 8)


def test_a_part_of_a_block_of_channels_takes_as_long_as_a_whole_one() -> None:
    blocks = LayerTimes([HALF, FULL], 2)
    assert blocks.share({}, {"packed": (3, 4, 3, 3)}) == blocks.share({}) == 1
    assert blocks.share({}, {"packed": (2, 3, 3, 3)}) == WIDTHS.share({}, {"packed": (2, 4, 3, 3)})
    assert blocks.share({}, {"dense": (7, 2)}) == WIDTHS.share({}, {"dense": (7, 2)}) < 1  # a linear layer


EXTENTS = st.tuples(st.integers(1, 4), st.integers(1, 4), st.integers(1, 8))


@given(EXTENTS, EXTENTS, st.booleans(), st.sampled_from([1, 2, 4]))
def test_a_level_with_less_of_every_layer_is_never_predicted_to_be_slower(
    one: tuple[int, int, int], other: tuple[int, int, int], skips: bool, block: int
) -> None:
    table = LayerTimes([HALF, FULL], block)

    def share(pick) -> float:
        outputs, inputs, dense = (pick(*pair) for pair in zip(one, other, strict=True))
        packed = None if skips and pick is min else (outputs, inputs, 3, 3)
        return table.share({}, {"packed": packed, "dense": (dense, 2)})

    assert share(min) <= share(max) + 1e-12


@pytest.mark.parametrize(
    ("total", "seconds"), [(4.0, [2.0, 2.0]), (3.0, [1.5, 1.5]), (5.0, [2.5, 2.5]), (9.0, [2.5, 2.5])]
)
def test_the_time_of_profiling_is_taken_off_every_node(total: float, seconds: list[float]) -> None:
    found = {"a": ("Conv", 2.5), "b": ("Add", 2.5)}
    assert [time for _, time in without_overhead(found, total).values()] == seconds


def test_no_node_takes_less_than_nothing() -> None:
    found = {"a": ("Conv", 9.5), "b": ("Add", 0.5)}
    assert without_overhead(found, 7.0) == {"a": ("Conv", 8.0), "b": ("Add", 0.0)}


def vit_and_its_model():
    network = timm.create_model("test_vit", img_size=64, depth=2).eval()
    spec = describe_model(network, (3, 64, 64))
    facts = ExportFacts(spec.architecture, spec.kwargs, 1000, None, spec.preprocessing, 1, "full", 0.0, {})
    return network, spec, translate(network, facts, 1, None)


def test_linear_weights_are_found_under_other_names() -> None:
    network, spec, model = vit_and_its_model()
    weights = {name: network.get_parameter(name).detach().numpy() for name in spec.maskable}
    assert set(weight_names(model, weights).values()) == set(spec.maskable)


@pytest.mark.usefixtures("library")
@pytest.mark.parametrize("name", ["test_resnet", "test_vit"])
def test_every_layer_of_a_model_gets_a_time(name: str) -> None:
    options = {"img_size": 96, "depth": 2} if name == "test_vit" else {}
    network = timm.create_model(name, **options).eval()
    spec = describe_model(network, (3, 96, 96))
    times = measure_layers([network], spec, packed=True)
    [found] = times.networks
    assert set(found.layers) == set(spec.maskable)
    assert all(layer.dense >= 0 and np.isfinite(layer.dense) for layer in found.layers.values())
    assert times.share({}) == 1
    classifier = found.layers[f"{spec.classifier[0]}.weight"]
    assert classifier.fixed is None  # it has one position
    assert 0 < sum(layer.after for layer in found.layers.values()) <= found.rest * (1 + 1e-9)
    if name == "test_vit":  # an activation follows the first layer of each block's perceptron
        assert all(found.layers[f"blocks.{block}.mlp.fc1.weight"].after > 0 for block in range(2))


def test_times_are_measured_once_and_again_if_the_cache_is_damaged(
    library: Library, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    monkeypatch.setattr(profile, "measure_layers", lambda *given, packed: measured.append(given) or WIDTHS)
    network = timm.create_model("test_resnet")
    spec = describe_model(network)
    assert [layer_times([network], spec, packed=True) for _ in range(2)] == [WIDTHS, WIDTHS]
    assert len(measured) == 1
    [path] = (cache_folder() / "layer-times").iterdir()
    for damage in ("", "{}", '{"networks": [{"layers": {"a": 1}, "rest": 1, "packed_rest": 1}]}', "[1]"):
        path.write_text(damage)
        assert layer_times([network], spec, packed=True) == WIDTHS
    assert len(measured) == 5
    assert layer_times([network], describe_model(network, (3, 64, 64)), packed=True) == WIDTHS
    assert len(measured) == 6  # another size
