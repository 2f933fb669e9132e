"""Measures sparse models on the engine next to dense ones on ONNX Runtime, OpenVINO and torch.

ONNX Runtime and OpenVINO run float32 and int8, OpenVINO also with its bfloat16 hint; torch runs eagerly and
compiled.

Masks are random and uniform: the same share of each convolution and linear layer, depthwise ones excepted.
All take turns, so that other load slows all of them alike; times are 25th percentiles: of processor time with
one thread, and of wall time with more.

Run: OMP_NUM_THREADS=1 python tests/benchmarks/engine.py [--models NAME ...] [--sparsities 80 90 95]
"""

import argparse
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import onnx
import timm
import torch
from onnx import numpy_helper

from nestify.engine.graph import make_sparse
from nestify.engine.model_graph import attributes
from nestify.engine.session import Session
from nestify.evaluation.bench import Effort, interleave
from nestify.evaluation.runtimes import RUNTIMES, Call, Images, on_openvino, quantise

MODELS = ("resnet18", "resnet50", "vit_small_patch16_224", "mobilenetv2_100", "tf_efficientnet_lite0")
SPARSITIES = (50, 70, 80, 90, 95)
SEED = 0


def export(name: str, path: Path, pickled: Path) -> None:
    """Write a model with random weights as ONNX, for any number of images, and as torch saves it."""
    torch.manual_seed(SEED)
    model = timm.create_model(name, pretrained=False, exportable=True).eval()
    for module in model.modules():
        # ResNets start with batch norms of weight 0, which would make the convolutions before them empty.
        if isinstance(module, torch.nn.BatchNorm2d):
            torch.nn.init.uniform_(module.weight, 0.5, 1.5)
    torch.save(model, pickled)
    torch.onnx.export(
        model,
        (torch.zeros(2, 3, 224, 224),),
        path,
        dynamo=True,
        external_data=False,
        verbose=False,
        input_names=["images"],
        output_names=["logits"],
        dynamic_shapes=({0: "batch"},),
    )


def mask(model: onnx.ModelProto, sparsity: float) -> onnx.ModelProto:
    """Return a copy in which a random share of each weight is 0."""
    rng, model = np.random.default_rng(SEED), onnx.ModelProto.FromString(model.SerializeToString())
    constants = {entry.name: entry for entry in model.graph.initializer}
    for node in model.graph.node:
        name = node.input[1] if node.op_type in ("Conv", "Gemm", "MatMul") else ""
        if name not in constants or attributes(node).get("group", 1) > 1:
            continue
        weight = numpy_helper.to_array(constants[name])
        assert np.count_nonzero(weight) > 0.99 * weight.size, f"{name} is sparse before it is masked"
        kept = np.ones(weight.size, bool)
        kept[rng.permutation(weight.size)[: round(sparsity * weight.size)]] = False
        constants[name].CopyFrom(numpy_helper.from_array(weight * kept.reshape(weight.shape), name))
    return model


def on_engine(path: Path, images: Images, threads: int) -> Call:
    """Load a packed model."""
    return partial(Session(path, threads), images)


def on_torch(path: Path, images: Images, threads: int, compiled: bool = False) -> Call:
    """Load a model that torch saved; the number of threads holds for all such models of the process."""
    torch.set_num_threads(threads)
    network = torch.load(path, weights_only=False)
    network = torch.compile(network) if compiled else network
    batch = torch.from_numpy(images)

    def call() -> object:
        with torch.inference_mode():
            return network(batch)

    call()
    return call


LOADERS: dict[str, Callable[[Path, Images, int], Call]] = {
    **RUNTIMES,
    "openvino bf16": partial(on_openvino, precision="bf16"),
    "torch": on_torch,
    "torch.compile": partial(on_torch, compiled=True),
    "engine": on_engine,
}

DENSE = tuple(runtime for runtime in LOADERS if runtime != "engine")
"""Runtimes of dense models; float32 and int8 ratios are to the fastest of those in `RUNTIMES`."""


def run_alone(runtime: str, path: Path) -> tuple[float, float]:
    """Load a model in a process of its own.

    Returns:
        Its resident memory in MiB, beyond that of the process before, after two images; and the seconds that
        loading and the first image took.
    """
    command = [sys.executable, __file__, "--load", runtime, str(path)]
    found = subprocess.run(command, check=True, capture_output=True, text=True).stdout.split()
    return float(found[-2]), float(found[-1])


def print_memory_and_time(runtime: str, path: Path) -> None:
    """Print what `run_alone` returns."""
    images = np.zeros((1, 3, 224, 224), np.float32)
    ends = [
        onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, [1, 3, 224, 224])
        for name in ("images", "logits")
    ]
    node = onnx.helper.make_node("Relu", ["images"], ["logits"])
    opset = [onnx.helper.make_opsetid("", 18)]
    graph = onnx.helper.make_graph([node], "tiny", ends[:1], ends[1:])
    with tempfile.TemporaryDirectory() as folder:
        tiny = Path(folder) / "tiny.onnx"
        onnx.save(onnx.helper.make_model(graph, opset_imports=opset, ir_version=9), tiny)
        if not runtime.startswith("torch"):  # which this process has loaded already
            LOADERS[runtime](tiny, images, 1)()  # the runtime itself, and its libraries
    before, start = resident(), time.perf_counter()
    call = LOADERS[runtime](path, images, 1)
    call()
    seconds = time.perf_counter() - start
    call()
    print(resident() - before, seconds)


def resident() -> float:
    """Return the resident memory of this process in MiB."""
    [line] = [each for each in Path("/proc/self/status").read_text().splitlines() if each.startswith("VmRSS")]
    return int(line.split()[1]) / 1024


def make_models(
    name: str, folder: Path, sparsities: Sequence[int], runtimes: Sequence[str]
) -> dict[tuple[str, str], Path]:
    """Return the models to measure, by runtime and variant."""
    images = np.random.default_rng(SEED).standard_normal((4, 3, 224, 224), np.float32)
    dense = folder / "dense.onnx"
    export(name, dense, folder / "dense.pt")
    quantise(dense, folder / "int8.onnx", images)
    found: dict[tuple[str, str], Path] = {}
    for runtime in runtimes:
        found[runtime, "float32"] = folder / "dense.pt" if runtime.startswith("torch") else dense
        if runtime in RUNTIMES:
            found[runtime, "int8"] = folder / "int8.onnx"
    model = onnx.load(dense)
    for sparsity in sparsities:
        sparse = mask(model, sparsity / 100)
        onnx.save(sparse, folder / "masked.onnx")
        make_sparse(sparse)
        path = found["engine", f"{sparsity} %"] = folder / f"{sparsity}.onnx"
        onnx.save(sparse, path)
        expected = np.asarray(RUNTIMES["onnxruntime"](folder / "masked.onnx", images[:1], 1)())[0]
        np.testing.assert_allclose(Session(path, 1)(images[:1]), expected, atol=1e-4 * np.abs(expected).max())
    return found


def measure(
    name: str,
    sparsities: Sequence[int],
    threads: Sequence[int],
    seconds: float,
    memory: bool,
    runtimes: Sequence[str],
) -> None:
    """Print one row of ratios per number of threads, and one of memory and load time."""
    images = np.random.default_rng(SEED).standard_normal((1, 3, 224, 224), np.float32)
    with tempfile.TemporaryDirectory() as folder:
        models = make_models(name, Path(folder), sparsities, runtimes)
        for count in threads:
            calls = {
                number: LOADERS[runtime](path, images, count)
                for number, ((runtime, _), path) in enumerate(models.items())
            }
            # Processor time leaves out what other programs take; with several threads it counts waiting too.
            clock = time.process_time if count == 1 else time.perf_counter
            rounds = interleave(calls, Effort(warmup=1, seconds=seconds), clock)
            times = np.array([[each[number] for number in calls] for each in rounds])
            quartiles = np.percentile(times, [25, 75], axis=0)
            first = dict(zip(models, quartiles[0], strict=True))
            best, best8 = (
                min(first[runtime, dtype] for runtime in RUNTIMES if runtime in runtimes)
                for dtype in ("float32", "int8")
            )
            cells = [f"{first[runtime, dtype] / best:.2f}" for runtime, dtype in models]
            over8 = [f"{first['engine', f'{sparsity} %'] / best8:.2f}" for sparsity in sparsities]
            spread = np.median(quartiles[1] / quartiles[0])
            row = [name, str(count), f"{1000 * best:.1f}", *cells, " / ".join(over8), f"{spread:.2f}"]
            print(f"| {' | '.join(row)} |", flush=True)
        if memory:
            alone = [run_alone(runtime, path) for (runtime, _), path in models.items()]
            sizes = [f"{path.stat().st_size / 1e6:.1f}" for path in models.values()]
            cells = [
                f"{mib:.0f} MiB, {1000 * load:.0f} ms, {size} MB"
                for (mib, load), size in zip(alone, sizes, strict=True)
            ]
            print(f"| {name} | {' | '.join(cells)} |", file=sys.stderr, flush=True)


def main() -> None:
    """Print Markdown: ratios on standard output; memory, load time and size on standard error."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--models", nargs="+", default=MODELS)
    parser.add_argument("--runtimes", nargs="+", default=DENSE, choices=DENSE, metavar="NAME")
    parser.add_argument("--threads", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--sparsities", nargs="+", type=int, default=SPARSITIES, metavar="PERCENT")
    parser.add_argument("--seconds", type=float, default=10.0)
    parser.add_argument("--no-memory", action="store_true")
    parser.add_argument("--load", nargs=2, metavar=("RUNTIME", "PATH"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.load:
        print_memory_and_time(options.load[0], Path(options.load[1]))
        return
    titles = ["model", "threads", "best dense ms"]
    for runtime in options.runtimes:
        titles += (
            [f"{runtime} {dtype}" for dtype in ("float32", "int8")] if runtime in RUNTIMES else [runtime]
        )
    titles += [f"{sparsity} %" for sparsity in options.sparsities]
    titles += ["sparse over int8", "spread"]
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}", flush=True)
    for name in options.models:
        memory = not options.no_memory
        measure(name, options.sparsities, options.threads, options.seconds, memory, options.runtimes)


if __name__ == "__main__":
    main()
