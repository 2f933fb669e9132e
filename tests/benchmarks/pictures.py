"""How near are exports with their preprocessing to timm's own, on pictures of many sizes?

    python tests/benchmarks/pictures.py FILE --pictures photos/ --data images/

Each photograph is resized to each size by Pillow, and given to two exports of one level: to the one made with
`--with-preprocessing` as it is, and to the plain one after timm's own transform. Each cell is the largest
difference of a logit between the two, relative to the largest logit of the picture. For int8, both exports
are quantised alike, so that the difference is that of the preprocessing alone.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecation warnings on import
    import numpy as np
    import onnxruntime
    import timm
    import torch
    from PIL import Image

sys.path.insert(0, str(Path(__file__).parents[2]))
import nestify
from nestify.evaluation.int8 import export_int8
from nestify.file.reader import open_nested_file

SIZES = ((1, 1), (5, 7), (40, 1000), (64, 64), (427, 640), (1080, 1920), (2048, 2048), (3024, 4032))
"""Height and width in pixels; the last is a photograph of a phone."""

Run = Callable[[np.ndarray], Any]


def run_onnx(path: Path) -> Run:
    """Load an ONNX model."""
    session = onnxruntime.InferenceSession(str(path), providers=["CPUExecutionProvider"])
    name = session.get_inputs()[0].name
    return lambda values: session.run(["logits"], {name: values})[0]


def run_pt2(path: Path) -> Run:
    """Load a program of torch.export."""
    module = torch.export.load(path).module()
    return lambda values: module(torch.from_numpy(values)).detach().numpy()


def run_openvino(path: Path) -> Run:
    """Load an OpenVINO model, in float32."""
    import openvino

    options = {"INFERENCE_PRECISION_HINT": "f32"}
    compiled = openvino.Core().compile_model(path / "openvino_model.xml", "CPU", options)
    return lambda values: compiled(values)["logits"].copy()


def run_executorch(path: Path) -> Run:
    """Load an ExecuTorch program."""
    from executorch.runtime import Runtime

    method = Runtime.get().load_program(path).load_method("forward")
    return lambda values: method.execute([torch.from_numpy(values)])[0].numpy().copy()


FORMATS: dict[str, tuple[str, str, Callable[[Path], Run]]] = {
    "onnx": ("onnx", ".onnx", run_onnx),
    "pt2": ("pt2", ".pt2", run_pt2),
    "openvino": ("openvino", ".openvino", run_openvino),
    "executorch": ("executorch", ".pte", run_executorch),
    "onnx int8": ("onnx", ".onnx", run_onnx),
    "openvino int8": ("openvino", ".openvino", run_openvino),
}
"""Format, suffix and runtime of each column."""


def main() -> int:
    """Print the table."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--level", default="1")
    parser.add_argument("--pictures", type=Path, required=True, metavar="FOLDER")
    parser.add_argument("--data", help="images to calibrate int8 on", metavar="FOLDER")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="A,B")
    options = parser.parse_args()
    preprocessing = open_nested_file(options.file).manifest.model.preprocessing.model_dump()
    preprocessing.pop("exif_orientation")
    transform = timm.data.create_transform(**preprocessing)
    photographs = [
        Image.open(path).convert("RGB") for path in sorted(options.pictures.iterdir()) if path.is_file()
    ]
    formats = options.formats.split(",")
    with tempfile.TemporaryDirectory() as folder:
        pairs = [pair(each, options, Path(folder)) for each in formats]
        print("| pictures |", " | ".join(formats), "|")
        print("|---|" + "---|" * len(formats))
        for height, width in SIZES:
            shown = [each.resize((width, height), Image.Resampling.LANCZOS) for each in photographs]
            cells = [difference(*runs, shown, transform) for runs in pairs]
            print(f"| {height} x {width} |", " | ".join(cells), "|", flush=True)
    return 0


def pair(name: str, options: argparse.Namespace, folder: Path) -> tuple[Run, Run]:
    """Export the level twice: with its preprocessing, and without."""
    format, suffix, load = FORMATS[name]
    runs = []
    for with_preprocessing in (True, False):
        output = folder / f"{name.replace(' ', '-')}-{with_preprocessing}{suffix}"
        if name.endswith("int8"):
            export_int8(
                options.file,
                options.level,
                options.data,
                format,
                output,
                max_drop=100,
                max_images=100,
                with_preprocessing=with_preprocessing,
            )
        else:
            nestify.export(options.file, options.level, format, output, with_preprocessing=with_preprocessing)
        runs.append(load(output))
    return runs[0], runs[1]


def difference(pictured: Run, plain: Run, shown: Sequence[Image.Image], transform: Any) -> str:
    """Return the text of a cell."""
    worst = 0.0
    for picture in shown:
        try:
            found = pictured(np.asarray(picture)[None])
        except Exception as error:  # any exception of a runtime is a result
            return f"{type(error).__name__}: {str(error).strip()[:60]}"
        wanted = plain(transform(picture)[None].numpy())
        worst = max(worst, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
    return f"{worst:.0e}"


if __name__ == "__main__":
    sys.exit(main())
