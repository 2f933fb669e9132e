"""Other runtimes for an ONNX model on the CPU, in float32 and in int8, as fast as each of them is."""

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import cache
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
    path: Path,
    output: Path,
    images: Images,
    float_nodes: Sequence[str] = (),
    batch: int = 1,
    reduce_range: bool = False,
) -> None:
    """Quantise a model that `optimise` wrote.

    The products and the softmax of attention, and sums that a layer norm reads, stay in float32 always: in 8
    bits they lose accuracy, and the products take more time.

    Args:
        path: the float32 model.
        output: path of the int8 model.
        images: calibration images (B, C, H, W).
        float_nodes: names of further nodes that stay in float32.
        batch: number of images per call that the model takes; a model for any number takes 1.
        reduce_range: whether weights have 7 bits, with which sums saturate on no processor.

    Raises:
        SetupError: if onnxruntime cannot do it.
    """
    with _quantisation():
        onnx, quantization = (import_module(name) for name in ("onnx", "onnxruntime.quantization"))
        float_nodes = [*float_nodes, *_attention(onnx.load(path, load_external_data=False).graph)]
        quantization.quantize_static(
            str(path),
            str(output),
            _Reader(images, batch),
            quant_format=quantization.QuantFormat.QDQ,
            per_channel=True,
            activation_type=quantization.QuantType.QUInt8,
            weight_type=quantization.QuantType.QInt8,
            nodes_to_exclude=float_nodes,
            reduce_range=reduce_range,
        )
        if float_nodes:
            model = onnx.load(output)
            _leave_outputs(model.graph, set(float_nodes))
            onnx.save(model, output)


def _attention(graph: Any) -> list[str]:
    """Return the names of the nodes of a transformer that are not quantised.

    Additions of a bias, which has one dimension, are part of their layer.
    """
    constants = {tensor.name for tensor in graph.initializer}
    biases = {tensor.name for tensor in graph.initializer if len(tensor.dims) == 1}
    normalised = {node.input[0] for node in graph.node if node.op_type == "LayerNormalization"}
    return [
        node.name
        for node in graph.node
        if node.op_type == "Softmax"
        or (node.op_type == "MatMul" and constants.isdisjoint(node.input))
        or (node.op_type == "Add" and node.output[0] in normalised and biases.isdisjoint(node.input))
    ]


def _leave_outputs(graph: Any, names: set[str]) -> None:
    """Remove the quantisation of the outputs of nodes that stay in float32.

    When onnxruntime loads a model, it quantises the weights of any layer between a DequantizeLinear and a
    QuantizeLinear, with one scale for all channels.
    """
    readers: dict[str, list[Any]] = {}
    for node in graph.node:
        for name in set(node.input):
            readers.setdefault(name, []).append(node)
    outputs, removed = {value.name for value in graph.output}, []
    for node in [each for each in graph.node if each.name in names]:
        plain = readers.get(node.output[0], [])
        quantised = [each for each in plain if each.op_type == "QuantizeLinear"]
        restored = [reader for each in quantised for reader in readers.get(each.output[0], [])]
        same = {node.output[0], *(each.output[0] for each in restored)}  # tensors that become one
        [node.output[0]] = (same & outputs) or {node.output[0]}
        for reader in [each for name in same for each in readers.get(name, [])]:
            for place, name in enumerate(reader.input):
                if name in same:
                    reader.input[place] = node.output[0]
        removed += [*quantised, *restored]
    for node in removed:
        graph.node.remove(node)
    used = {name for node in graph.node for name in node.input}
    unused = {name for node in removed for name in node.input} - used  # scales and zero points
    for tensor in [each for each in graph.initializer if each.name in unused]:
        graph.initializer.remove(tensor)


SATURATES = (
    "Sums of dense int8 layers saturate on this processor, as on all x86 without VNNI: the model may predict "
    "better on others, and with --reduce-range as well on all."
)
"""What users are told on such a processor."""


@cache
def sums_saturate() -> bool:
    """Return whether sums of products saturate at 16 bits in onnxruntime's int8 models on this processor.

    They do on x86 without VNNI: the sum of two products of large numbers does not fit. With a reduced range
    it fits everywhere.
    """
    onnx = import_module("onnx")
    given = [
        onnx.helper.make_tensor_value_info("images", onnx.TensorProto.UINT8, [1, 4]),
        onnx.helper.make_tensor_value_info("sums", onnx.TensorProto.INT32, [1, 1]),
    ]
    weights = onnx.numpy_helper.from_array(np.full((4, 1), 127, np.int8), "weights")
    product = onnx.helper.make_node("MatMulInteger", ["images", "weights"], ["sums"])
    graph = onnx.helper.make_graph([product], "sums", given[:1], given[1:], [weights])
    opset = onnx.helper.make_opsetid("", 18)
    model = onnx.helper.make_model(graph, opset_imports=[opset], ir_version=9)
    session = import_module("onnxruntime").InferenceSession(
        model.SerializeToString(), providers=["CPUExecutionProvider"]
    )
    [sums] = session.run(None, {"images": np.full((1, 4), 255, np.uint8)})
    return int(sums[0, 0]) != 4 * 255 * 127


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
