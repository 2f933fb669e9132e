"""What does int8 cost each level in accuracy, and what does it save in bytes and time?

    OMP_NUM_THREADS=1 python -m tests.benchmarks.int8 FILE --data IMAGES --split test

For each level and runtime: size and top-1 in float32 (of ONNX Runtime) and in int8, the difference on the
same images with its standard error, and the time of one image in int8 over that in float32 (medians of
processor time, calls in turns, one thread). `--per-tensor` adds models with one scale per layer,
`--sweep 1,2,4` models that keep the 1, 2 and 4 costliest layers in float32, both on ONNX Runtime.
"""

import argparse
import sys
import tempfile
import time
import warnings
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any
from unittest.mock import patch

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecation warnings on import
    import numpy as np
    import onnxruntime.quantization
    import torch
    from torch import Tensor

from nestify.data.loaders import eval_loader
from nestify.data.validation import open_calibration_images, open_evaluation_images
from nestify.evaluation.bench import Effort, interleave
from nestify.evaluation.int8 import CALIBRATION_IMAGES
from nestify.evaluation.quantiser import Kind, Quantised, Quantiser
from nestify.evaluation.runtimes import RUNTIMES
from nestify.exports.draft import Draft, Runner
from nestify.exports.export import OpenedLevel, open_level
from nestify.exports.onnx import reopen
from nestify.exports.target import ExportFormat
from nestify.file.loading import load_level
from nestify.file.reader import NestedFile, open_nested_file


@dataclass(frozen=True)
class Images:
    """Preprocessed images (B, C, H, W) to calibrate on and to evaluate on, and the classes of the latter."""

    calibration: Tensor
    evaluation: Tensor
    classes: Tensor

    @classmethod
    def read(cls, file: NestedFile, data: str, split: str, count: int | None) -> "Images":
        """Read all images into memory."""
        model = file.manifest.model
        same: dict[str, Any] = {"class_names": model.class_names, "num_classes": model.num_classes}
        training = open_calibration_images(
            data, file.manifest.held_out, CALIBRATION_IMAGES, data_root=None, **same
        )
        used, _ = open_evaluation_images(
            data, split, file.manifest.held_out, data_root=None, max_images=count, **same
        )
        load = partial(eval_loader, preprocessing=model.preprocessing.model_dump(), batch_size=100)
        batches = list(load(used))
        return cls(
            torch.cat([images for images, _ in load(training)])[:CALIBRATION_IMAGES],
            torch.cat([images for images, _ in batches]),
            torch.cat([classes for _, classes in batches]),
        )

    @torch.no_grad()
    def right(self, run: Runner) -> np.ndarray:
        """Return whether each image is classified correctly."""
        found = torch.cat([run(part).argmax(-1) for part in self.evaluation.split(100)])
        return (found == self.classes).numpy()


def main() -> int:
    """Print the tables."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("file", type=Path)
    parser.add_argument("--data", required=True)
    parser.add_argument("--split", default="validation")
    parser.add_argument("--max-images", type=int)
    parser.add_argument("--levels", help="numbers of levels", default="all", metavar="1,2")
    parser.add_argument("--seconds", type=float, default=3.0, help="duration of each comparison of times")
    parser.add_argument("--per-tensor", action="store_true")
    parser.add_argument("--sweep", default="", metavar="1,2,4")
    options = parser.parse_args()
    file = open_nested_file(options.file)
    images = Images.read(file, options.data, options.split, options.max_images)
    every = range(1, file.n_levels + 1)
    print(f"{len(images.classes)} images")
    print("| level | runtime | float KiB | int8 KiB | float top-1 % | int8 top-1 % | difference | time |")
    print("|---" * 8 + "|")
    for number in every if options.levels == "all" else map(int, options.levels.split(",")):
        measure(open_level(options.file, number), images, options)
    return 0


def measure(opened: OpenedLevel, images: Images, options: argparse.Namespace) -> None:
    """Print the rows of one level."""
    plain = load_level(opened.file, opened.number)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        make = partial(Quantiser, plain, opened.facts, images.calibration, folder)
        on_onnx = make(Kind(ExportFormat.onnx))  # writes the float32 model too
        exact = images.right(reopen(folder / "float32.onnx"))

        def row(name: str, made: Quantised, runtime: str) -> None:
            found = images.right(made.run)
            cells = [
                opened.facts.level_name,
                name,
                f"{(folder / 'float32.onnx').stat().st_size / 1024:.0f}",
                f"{written_bytes(made) / 1024:.0f}",
                *(f"{100 * right.mean():.2f}" for right in (exact, found)),
                difference(exact, found),
                f"{relative_time(folder, runtime, images.evaluation[:1].numpy(), options.seconds):.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)

        row("onnx", on_onnx.make([]), "onnxruntime")
        row("openvino", make(Kind(ExportFormat.openvino)).make([]), "openvino")
        if options.per_tensor:
            with one_scale_per_layer():
                row("onnx, per tensor", on_onnx.make([]), "onnxruntime")
        counts = [int(count) for count in options.sweep.split(",") if count]
        if counts:
            costliest = on_onnx.costliest(max(counts))
            print(f"costliest of {len(on_onnx.layers)} layers of {on_onnx.title}: {', '.join(costliest)}")
        for count in counts:
            found = images.right(on_onnx.make(costliest[:count]).run)
            print(f"{count} in float32: {difference(exact, found)}", flush=True)


def relative_time(folder: Path, runtime: str, image: np.ndarray, seconds: float) -> float:
    """Return the time of the int8 model over that of the float32 model, both in a folder."""
    paths = (folder / "float32.onnx", folder / "int8.onnx")
    calls = {number: RUNTIMES[runtime](path, image, 1) for number, path in enumerate(paths)}
    rounds = interleave(calls, Effort(seconds=seconds), time.process_time)
    plain, quantised = (np.median([each[number] for each in rounds]) for number in calls)
    return float(quantised / plain)


def difference(before: np.ndarray, after: np.ndarray) -> str:
    """Return the mean difference in points, and its standard error over the images."""
    points = 100 * (after.astype(float) - before)
    return f"{points.mean():+.2f} ± {points.std() / len(points) ** 0.5:.2f}"


def written_bytes(made: Quantised) -> int:
    """Return the size of the export."""
    with tempfile.TemporaryDirectory() as name:
        if isinstance(made.draft, Draft):
            with Path(name, "model").open("wb") as file:
                made.draft.write(file)
        else:
            made.draft.fill(Path(name))
        return sum(path.stat().st_size for path in Path(name).iterdir())


def one_scale_per_layer() -> Any:
    """Quantise with one scale per tensor in a block."""
    original = onnxruntime.quantization.quantize_static

    def quantize(*arguments: Any, per_channel: bool, **options: Any) -> None:
        original(*arguments, per_channel=False, **options)

    return patch.object(onnxruntime.quantization, "quantize_static", quantize)


if __name__ == "__main__":
    sys.exit(main())
