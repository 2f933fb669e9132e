"""Predicted times of levels: closed forms over made-up tables, and tables of small models."""

import numpy as np
import pytest
import timm
from hypothesis import given
from hypothesis import strategies as st

from nestify.engine import profile
from nestify.engine.layer_times import LayerTime, LayerTimes
from nestify.engine.library import Library, cache_folder
from nestify.engine.profile import layer_times, measure_layers, weight_names
from nestify.exports.onnx import translate
from nestify.exports.target import ExportFacts
from nestify.model.spec import describe_model

TABLE = LayerTimes(
    {"packed": LayerTime(dense=4.0, fixed=1.0, slope=5.0), "dense": LayerTime(dense=2.0)}, 2.0, 0.5
)


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


def vit_and_its_model():
    network = timm.create_model("test_vit", img_size=64).eval()
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
    options = {"img_size": 96} if name == "test_vit" else {}
    network = timm.create_model(name, **options).eval()
    spec = describe_model(network, (3, 96, 96))
    times = measure_layers(network, spec)
    assert set(times.layers) == set(spec.maskable)
    assert all(layer.dense >= 0 and np.isfinite(layer.dense) for layer in times.layers.values())
    assert times.share({}) == 1
    classifier = times.layers[f"{spec.classifier[0]}.weight"]
    assert classifier.fixed is None  # it has one position


def test_times_are_measured_once_and_again_if_the_cache_is_damaged(
    library: Library, tmp_path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    measured = []
    monkeypatch.setattr(profile, "measure_layers", lambda *given: measured.append(given) or TABLE)
    network = timm.create_model("test_resnet")
    spec = describe_model(network)
    assert [layer_times(network, spec) for _ in range(2)] == [TABLE, TABLE]
    assert len(measured) == 1
    [path] = (cache_folder() / "layer-times").iterdir()
    for damage in ("", "{}", '{"layers": {"a": 1}, "rest": 1, "packed_rest": 1}', "[1]"):
        path.write_text(damage)
        assert layer_times(network, spec) == TABLE
    assert len(measured) == 5
    assert layer_times(network, describe_model(network, (3, 64, 64))) == TABLE
    assert len(measured) == 6  # another size
