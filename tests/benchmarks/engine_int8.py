"""Measures sparse int8 models on the engine next to dense int8 ones on ONNX Runtime, OpenVINO and NNCF.

Masks are random and uniform, in groups of four inputs of each convolution and linear layer. All models take
turns on one thread, so that other load slows all of them alike; times are 25th percentiles of the processor
time.

Run: OMP_NUM_THREADS=1 python -m tests.benchmarks.engine_int8 [--models NAME ...] [--seconds 10]
"""

import argparse
import tempfile
import time
from collections.abc import Sequence
from functools import partial
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import onnx
from onnx import numpy_helper

from nestify.engine.graph_int8 import make_sparse_int8
from nestify.engine.model_graph import attributes
from nestify.engine.pack_int8 import QUAD
from nestify.engine.session import Session
from nestify.evaluation.bench import Effort, interleave
from nestify.evaluation.runtimes import RUNTIMES, Call, Images, quantise
from tests.benchmarks.engine import SEED, export

MODELS = ("resnet50",)
SPARSITIES = (50, 70, 80, 90, 95)


def mask_quads(model: onnx.ModelProto, sparsity: float) -> onnx.ModelProto:
    """Return a copy in which a random share of each layer's groups of four inputs is 0."""
    rng, model = np.random.default_rng(SEED), onnx.ModelProto.FromString(model.SerializeToString())
    constants = {entry.name: entry for entry in model.graph.initializer}
    for node in model.graph.node:
        name = node.input[1] if node.op_type in ("Conv", "Gemm", "MatMul") else ""
        if name not in constants or attributes(node).get("group", 1) > 1:
            continue
        weight = numpy_helper.to_array(constants[name])
        by_row = node.op_type == "MatMul" or (
            node.op_type == "Gemm" and not attributes(node).get("transB", 0)
        )
        by_output = weight.swapaxes(0, 1) if by_row else weight
        outputs, inputs, *kernel = by_output.shape
        if inputs % QUAD:
            continue
        kept = np.ones(weight.size // QUAD, bool)
        kept[rng.permutation(kept.size)[: round(sparsity * kept.size)]] = False
        masked = by_output * kept.reshape(outputs, -1, *kernel).repeat(QUAD, 1)
        masked = np.ascontiguousarray(masked.swapaxes(0, 1) if by_row else masked)
        constants[name].CopyFrom(numpy_helper.from_array(masked, name))
    return model


def on_nncf(path: Path, images: Images, calibration: Images) -> Call:
    """Quantise a float32 model with NNCF, and load it with OpenVINO."""
    import nncf  # type: ignore[import-not-found]
    import openvino

    core = openvino.Core()
    model = core.read_model(str(path))
    model.reshape(list(images.shape))
    data = nncf.Dataset([calibration[i : i + 1] for i in range(len(calibration))])
    quantised = path.with_name("nncf.xml")
    openvino.save_model(nncf.quantize(model, data, subset_size=len(calibration)), quantised)
    return RUNTIMES["openvino"](quantised, images, 1)


def measure(name: str, sparsities: Sequence[int], seconds: float) -> None:
    """Print one row of ratios."""
    calibration = np.random.default_rng(SEED).standard_normal((4, 3, 224, 224), np.float32)
    images = calibration[:1]
    with tempfile.TemporaryDirectory() as folder:
        dense, int8 = Path(folder) / "dense.onnx", Path(folder) / "int8.onnx"
        export(name, dense, Path(folder) / "dense.pt")
        quantise(dense, int8, calibration)
        rivals = {runtime: load(int8, images, 1) for runtime, load in RUNTIMES.items()}
        if find_spec("nncf"):
            rivals["NNCF"] = on_nncf(dense, images, calibration)
        calls: dict[str, Call] = dict(rivals)
        for sparsity in sparsities:
            path = Path(folder) / f"{sparsity}.onnx"
            onnx.save(mask_quads(onnx.load(dense), sparsity / 100), Path(folder) / "masked.onnx")
            quantise(Path(folder) / "masked.onnx", Path(folder) / "masked8.onnx", calibration)
            model = onnx.load(Path(folder) / "masked8.onnx")
            make_sparse_int8(model)
            onnx.save(model, path)
            session = Session(path, 1)
            expected = np.asarray(RUNTIMES["onnxruntime"](Path(folder) / "masked8.onnx", images, 1)())[0]
            difference = np.abs(session(images) - expected).max() / np.abs(expected).max()
            assert difference < 0.05, f"{difference:.3f} from ONNX Runtime's int8 at {sparsity} %"
            calls[f"{sparsity} %"] = partial(session, images)
        numbers = dict(enumerate(calls.values()))
        rounds = interleave(numbers, Effort(warmup=1, seconds=seconds), time.process_time)
        times = np.array([[each[number] for number in numbers] for each in rounds])
        first, third = np.percentile(times, [25, 75], axis=0)
        best = first[: len(rivals)].min()
        cells = [f"{time / best:.2f}" for time in first]
        row = [name, f"{1000 * best:.1f}", *cells, f"{np.median(third / first):.2f}"]
        titles = ["model", "best dense int8 ms", *calls, "spread"]
        print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}\n| {' | '.join(row)} |", flush=True)


def main() -> None:
    """Print Markdown, with a table per model."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--sparsities", nargs="+", type=int, default=SPARSITIES, metavar="PERCENT")
    parser.add_argument("--seconds", type=float, default=10.0)
    options = parser.parse_args()
    for name in options.models:
        measure(name, options.sparsities, options.seconds)


if __name__ == "__main__":
    main()
