"""Other runtimes for an ONNX model on the CPU, in float32 and in int8, as fast as each of them is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from nestify.errors import NestifyError, SetupError, foreign_code
from nestify.exports.draft import quiet
from nestify.exports.openvino import openvino_core

Images = NDArray[np.float32]
Call = Callable[[], object]


class _Reader:
    """The calibration images in batches of one size, as onnxruntime's quantiser asks for them."""

    def __init__(self, images: Images, batch: int) -> None:
        # The last batch is filled with the first images, which are repeated if there are too few.
        whole = np.resize(images, (-(-len(images) // batch) * batch, *images.shape[1:]))
        self._batches: Iterator[dict[str, Images]] = iter(
            [{"images": whole[i : i + batch]} for i in range(0, len(whole), batch)]
        )

    def get_next(self) -> dict[str, Images] | None:
        """Return the next batch, or None."""
        return next(self._batches, None)


def optimise(path: Path, output: Path) -> None:
    """Fold batch norm and infer shapes, as the quantiser of onnxruntime expects.

    Args:
        path: an ONNX model.
        output: path of the same model, prepared.

    Raises:
        SetupError: if onnxruntime cannot do it.
    """
    with _quantisation():
        shapes = import_module("onnxruntime.quantization.shape_inference")
        shapes.quant_pre_process(str(path), str(output), skip_symbolic_shape=True)


def quantise(path: Path, output: Path, images: Images) -> None:
    """Quantise an ONNX model to int8: weights per channel, activations by calibration, as QDQ nodes.

    Args:
        path: the float32 model.
        output: path of the int8 model.
        images: calibration images (B, C, H, W).

    Raises:
        SetupError: if onnxruntime cannot do it.
    """
    optimised = output.with_name("optimised.onnx")
    optimise(path, optimised)
    quantise_optimised(optimised, output, images)


def quantise_optimised(
    path: Path, output: Path, images: Images, float_nodes: Sequence[str] = (), batch: int = 1
) -> None:
    """Quantise a model that `optimise` wrote.

    Args:
        path: the float32 model.
        output: path of the int8 model.
        images: calibration images (B, C, H, W).
        float_nodes: names of the nodes that stay in float32.
        batch: number of images per call that the model takes; a model for any number takes 1.

    Raises:
        SetupError: if onnxruntime cannot do it.
    """
    with _quantisation():
        quantization = import_module("onnxruntime.quantization")
        quantization.quantize_static(
            str(path),
            str(output),
            _Reader(images, batch),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=list(float_nodes),
        )


@contextmanager
def _quantisation() -> Iterator[None]:
    def error(reason: str) -> NestifyError:
        return SetupError(f"onnxruntime cannot quantise this model ({reason})")

    with foreign_code(error), quiet():
        yield


def on_onnxruntime(path: Path, images: Images, threads: int) -> Call:
    """Load an ONNX model with onnxruntime."""
    runtime = import_module("onnxruntime")
    options = runtime.SessionOptions()
    options.intra_op_num_threads = threads
    options.inter_op_num_threads = 1
    options.log_severity_level = 4  # fatal; errors are raised
    options.add_free_dimension_override_by_name("batch", len(images))
    with _fenced("onnxruntime", path):
        session = runtime.InferenceSession(str(path), options, providers=["CPUExecutionProvider"])
        session.run(None, {"images": images})
    return lambda: session.run(None, {"images": images})


def on_openvino(path: Path, images: Images, threads: int, precision: str = "f32") -> Call:
    """Load an ONNX model with OpenVINO, for this batch size; it may use bfloat16 if `precision` is bf16."""
    options: dict[str, Any] = {
        "INFERENCE_NUM_THREADS": threads,
        "NUM_STREAMS": 1,
        "PERFORMANCE_HINT": "LATENCY",
        "INFERENCE_PRECISION_HINT": precision,
    }
    with _fenced("openvino", path):
        core = openvino_core()
        model = core.read_model(str(path))
        model.reshape(list(images.shape))
        request = core.compile_model(model, "CPU", options).create_infer_request()
        request.infer([images])
    return lambda: request.infer([images])


@contextmanager
def _fenced(name: str, path: Path) -> Iterator[None]:
    def error(reason: str) -> NestifyError:
        return SetupError(f"{name} does not run {path.name} of the full level ({reason})")

    with foreign_code(error):
        yield


RUNTIMES: dict[str, Callable[[Path, Images, int], Call]] = {
    "onnxruntime": on_onnxruntime,
    "openvino": on_openvino,
}
"""How each package loads an ONNX model for a batch of images and a number of threads."""
