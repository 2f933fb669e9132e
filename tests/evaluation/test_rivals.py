"""Levels next to other runtimes: what each contender computes. No test expects a number of seconds."""

from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import numpy_helper
from torch import Tensor, nn

from nestify.errors import RecipeError
from nestify.evaluation.bench import Effort, interleave
from nestify.evaluation.rivals import (
    Contender,
    Match,
    Timing,
    bench_rivals,
    timing,
)
from nestify.evaluation.runtimes import (
    on_onnxruntime,
    on_openvino,
    optimise,
    quantise,
    quantise_optimised,
    sums_saturate,
)


@pytest.fixture
def images() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((4, 3, 12, 12)).astype(np.float32)


class Net(nn.Module):
    """A small network with a convolution whose channels have very different sizes, batch norm, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.conv, self.norm, self.head = nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.Linear(8, 5)
        with torch.no_grad():
            self.conv.weight *= torch.logspace(-2, 1, 8)[:, None, None, None]

    def forward(self, images: Tensor) -> Tensor:
        features: Tensor = self.norm(self.conv(images)).relu().mean((2, 3))
        logits: Tensor = self.head(features)
        return logits


def save_onnx(net: nn.Module, images: np.ndarray, path: Path) -> Path:
    """Translate a network, for any number of images."""
    batch = torch.export.Dim("batch")
    torch.onnx.export(
        net,
        (torch.zeros(2, *images.shape[1:]),),
        path,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["images"],
        dynamic_shapes=({0: batch},),
    )
    return path


@pytest.fixture
def model(tmp_path: Path, images: np.ndarray) -> tuple[Path, np.ndarray]:
    """An ONNX model for any number of images, and torch's logits for `images`."""
    net = Net().eval()
    path = save_onnx(net, images, tmp_path / "net.onnx")
    with torch.no_grad():
        return path, net(torch.from_numpy(images)).numpy()


@pytest.mark.parametrize("runtime", [on_onnxruntime, on_openvino])
@pytest.mark.parametrize("dtype", ["float32", "int8"])
def test_other_runtimes_compute_the_same(
    runtime: object, dtype: str, model: tuple[Path, np.ndarray], images: np.ndarray, tmp_path: Path
) -> None:
    path, expected = model
    if runtime is on_openvino:
        pytest.importorskip("openvino")
    elif dtype == "int8" and sums_saturate():
        pytest.skip("sums of onnxruntime's int8 models saturate on this processor")
    if dtype == "int8":
        quantise(path, path := tmp_path / "int8.onnx", images)
    assert callable(runtime)
    [logits] = list(runtime(path, images, 1)())
    if not isinstance(logits, np.ndarray):  # openvino's result is a mapping from outputs
        logits = runtime(path, images, 1)()[0]
    tolerance = 1e-5 if dtype == "float32" else 0.05
    np.testing.assert_allclose(logits, expected, atol=tolerance * np.abs(expected).max())


def test_int8_weights_have_a_scale_per_channel(
    model: tuple[Path, np.ndarray], images: np.ndarray, tmp_path: Path
) -> None:
    quantise(model[0], tmp_path / "int8.onnx", images)
    found = onnx.load(tmp_path / "int8.onnx")
    constants = {entry.name: numpy_helper.to_array(entry) for entry in found.graph.initializer}
    kinds = [node.op_type for node in found.graph.node]
    assert "BatchNormalization" not in kinds
    [conv] = [node for node in found.graph.node if node.op_type == "Conv"]
    [weight] = [node for node in found.graph.node if node.output[0] == conv.input[1]]
    assert weight.op_type == "DequantizeLinear"
    assert constants[weight.input[0]].dtype == np.int8
    assert constants[weight.input[1]].shape == (8,)


class Attention(nn.Module):
    """Attention to 400 tokens almost equally, which 8 bits cannot hold, in a residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.norm = nn.Linear(3, 16), nn.LayerNorm(16)
        self.q, self.k, self.v = (nn.Linear(16, 16) for _ in range(3))
        self.last, self.head = nn.LayerNorm(16), nn.Linear(16, 5)

    def forward(self, images: Tensor) -> Tensor:
        tokens: Tensor = self.embed(images.flatten(2).transpose(1, 2))
        given = self.norm(tokens)
        shares = (self.q(given) @ self.k(given).transpose(1, 2) / 16).softmax(-1)
        logits: Tensor = self.head(self.last(tokens + 8 * (shares @ self.v(given))).mean(1))
        return logits


def test_attention_stays_in_float32(tmp_path: Path) -> None:
    torch.manual_seed(0)
    net = Attention().eval()
    images = np.random.default_rng(1).standard_normal((4, 3, 20, 20)).astype(np.float32)
    path = save_onnx(net, images, tmp_path / "net.onnx")
    optimise(path, tmp_path / "optimised.onnx")
    quantise_optimised(
        tmp_path / "optimised.onnx", tmp_path / "int8.onnx", images, reduce_range=sums_saturate()
    )
    with torch.no_grad():
        expected = net(torch.from_numpy(images)).numpy()
    [logits] = onnxruntime.InferenceSession(tmp_path / "int8.onnx").run(None, {"images": images})
    np.testing.assert_allclose(logits, expected, atol=0.03 * np.abs(expected).max())
    nodes = onnx.load(tmp_path / "int8.onnx").graph.node
    quantised = {name for node in nodes if node.op_type == "QuantizeLinear" for name in node.input[:1]}
    softmax, *_ = [node for node in nodes if node.op_type == "Softmax"]
    assert quantised.isdisjoint([*softmax.input, *softmax.output])
    assert sum(node.op_type == "DequantizeLinear" for node in nodes) > 5  # the linear layers


def test_ratios_are_to_the_fastest_dense_network_of_a_type() -> None:
    times = {
        Contender(1, "engine", "float32"): 3.0,
        Contender(2, "torch", "float32"): 8.0,
        Contender(2, "onnxruntime", "float32"): 6.0,
        Contender(2, "onnxruntime", "int8"): 2.0,
        Contender(2, "openvino", "int8"): 4.0,
    }
    timings = [Timing(contender, seconds, seconds) for contender, seconds in times.items()]
    match = Match(1, 1, 10, timings)
    assert [match.over_best(each, "float32", 2) for each in timings] == [3 / 6, 8 / 6, 1, 2 / 6, 4 / 6]
    assert [match.over_best(each, "int8", 2) for each in timings] == [3 / 2, 4, 3, 1, 2]
    assert Match(1, 1, 10, timings[:3]).over_best(timings[0], "int8", 2) is None


def test_quartiles_are_numpys() -> None:
    seconds = [4.0, 1.0, 2.0, 9.0, 3.0, 7.0]
    found = timing(Contender(1, "torch", "float32"), [{0: 1.0, 1: each} for each in seconds], 1)
    assert (found.p25_seconds, found.p75_seconds) == tuple(np.percentile(seconds, [25, 75]))


def test_all_take_turns() -> None:
    order: list[int] = []
    calls = {number: lambda number=number: order.append(number) for number in range(3)}
    interleave(calls, Effort(warmup=0, rounds=2), lambda: 0.0)
    assert order[6:] == [0, 1, 2, 2, 1, 0]  # after two rounds of warm-up


def test_other_devices_are_refused(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="--device cuda"):
        bench_rivals(tmp_path / "none", device="cuda")
    with pytest.raises(RecipeError, match="--rounds 1"):
        bench_rivals(tmp_path / "none", rounds=1)


def test_a_reduced_range_is_the_same_on_every_processor(
    model: tuple[Path, np.ndarray], images: np.ndarray, tmp_path: Path
) -> None:
    """Weights of 7 bits: two products with 8 bits have a sum of at most 15 bits and a sign."""
    optimise(model[0], tmp_path / "optimised.onnx")
    quantise_optimised(tmp_path / "optimised.onnx", tmp_path / "int8.onnx", images, reduce_range=True)
    constants = [
        numpy_helper.to_array(tensor) for tensor in onnx.load(tmp_path / "int8.onnx").graph.initializer
    ]
    weights = [array for array in constants if array.dtype == np.int8 and array.ndim > 1]
    assert len(weights) == 2
    assert max(int(np.abs(array.astype(int)).max()) for array in weights) == 64
    assert 2 * 255 * 64 < 2**15
    [logits] = list(on_onnxruntime(tmp_path / "int8.onnx", images, 1)())  # type: ignore[call-overload]
    np.testing.assert_allclose(logits, model[1], atol=0.05 * np.abs(model[1]).max())
