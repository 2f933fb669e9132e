"""How near are exports with their preprocessing to timm's own, on pictures of many sizes?

    python tests/benchmarks/pictures.py FILE --pictures photos/ --data images/

Each photograph, in its own size and resized to others by Pillow, is given to two exports of one level: to the
one made with `--with-preprocessing` as it is, and to the plain one after timm's own transform. Each cell is
the largest difference of a logit between the two, relative to the largest logit of the picture, and the share
of pictures for which both predict the same class. For int8, both exports are quantised alike, so that the
difference is that of the preprocessing alone.
"""

import argparse
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterable
from dataclasses import dataclass
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

SIZES = (None, (1, 1), (5, 7), (40, 1000), (64, 64), (427, 640), (1080, 1920), (2048, 2048), (3024, 4032))
"""Height and width in pixels; the last is a photograph of a phone, None the photograph's own size."""

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
    parser.add_argument("--split", help="its split of other images, if it is not validation")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="A,B")
    options = parser.parse_args()
    preprocessing = open_nested_file(options.file).manifest.model.preprocessing.model_dump()
    preprocessing.pop("exif_orientation")
    transform = timm.data.create_transform(**preprocessing)
    photographs = [path for path in sorted(options.pictures.iterdir()) if path.is_file()]
    formats = options.formats.split(",")
    with tempfile.TemporaryDirectory() as folder:
        pairs = [pair(each, options, Path(folder)) for each in formats]
        print(f"{len(photographs)} photographs")
        print("| pictures |", " | ".join(formats), "|")
        print("|---|" + "---|" * len(formats))
        for size in SIZES:
            title = f"{size[0]} x {size[1]}" if size else "own size"
            cells = compare(pairs, read(photographs, size), transform)
            print(f"| {title} |", " | ".join(cells), "|", flush=True)
    return 0


def read(photographs: Iterable[Path], size: tuple[int, int] | None) -> Iterable[Image.Image]:
    """Yield each photograph in RGB, resized to a height and width."""
    for path in photographs:
        picture = Image.open(path).convert("RGB")
        yield picture.resize(size[::-1], Image.Resampling.LANCZOS) if size else picture


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
                split=options.split,
                max_images=100,
                with_preprocessing=with_preprocessing,
            )
        else:
            nestify.export(options.file, options.level, format, output, with_preprocessing=with_preprocessing)
        runs.append(load(output))
    return runs[0], runs[1]


@dataclass
class Cell:
    """What the two exports of one format make of the same pictures.

    Attributes:
        largest: largest difference of a logit, relative to the largest logit of its picture.
        same: number of pictures for which both predict the same class.
        count: number of pictures.
        error: what the runtime said of the first picture that it refused; None if it refused none.
    """

    largest: float = 0.0
    same: int = 0
    count: int = 0
    error: str | None = None

    def __str__(self) -> str:
        return self.error or f"{self.largest:.0e}, {100 * self.same / self.count:.0f} %"


def compare(pairs: list[tuple[Run, Run]], pictures: Iterable[Image.Image], transform: Any) -> list[str]:
    """Return the text of each format's cell."""
    cells = [Cell() for _ in pairs]
    for picture in pictures:
        pixels, prepared = np.array(picture)[None], transform(picture)[None].numpy()
        for cell, (pictured, plain) in zip(cells, pairs, strict=True):
            if cell.error:
                continue
            try:
                found = pictured(pixels)
            except Exception as error:  # any exception of a runtime is a result
                cell.error = f"{type(error).__name__}: {str(error).strip()[:60]}"
                continue
            wanted = plain(prepared)
            cell.largest = max(cell.largest, float(np.abs(found - wanted).max() / np.abs(wanted).max()))
            cell.same += int(found.argmax() == wanted.argmax())
            cell.count += 1
    return [str(cell) for cell in cells]


if __name__ == "__main__":
    sys.exit(main())
