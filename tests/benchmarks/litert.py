"""What does int8 on LiteRT cost each level in accuracy, and what does it save in bytes and time?

    python -m tests.benchmarks.litert prepare FILE --data IMAGES --split test --output FOLDER
    litert/bin/python tests/benchmarks/litert.py measure FOLDER

The first command, in nestify's environment, exports the levels and saves the images; the second one, in the
environment of the guide's section on LiteRT, converts, quantises and runs them. Dynamic: int8 weights per
channel, activations quantised while the model runs. Static: activations in int8 too, with ranges of 100
training images: the average that ai-edge-quantizer makes of them by default, or their smallest and largest
value. Of each: size, top-1, difference of top-1 to the level's with its standard error, share of images with
the level's class, largest difference of a logit over the largest one, and time of an image over float32
(processor time of one thread, the models one after the other).
"""

import argparse
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np


def main() -> int:
    """Prepare or measure."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    commands = parser.add_subparsers(required=True)
    prepared = commands.add_parser("prepare")
    prepared.add_argument("file", type=Path)
    prepared.add_argument("--data", required=True)
    prepared.add_argument("--split", default="validation")
    prepared.add_argument("--max-images", type=int)
    prepared.add_argument("--levels", help="numbers of levels", metavar="1,2")
    prepared.add_argument("--output", type=Path, required=True, metavar="FOLDER")
    prepared.set_defaults(run=prepare)
    measured = commands.add_parser("measure")
    measured.add_argument("folder", type=Path)
    measured.set_defaults(run=measure)
    options = parser.parse_args()
    options.run(options)
    return 0


def prepare(options: argparse.Namespace) -> None:
    """Write each level as a `.pt2` with its logits, and the images, channels last."""
    import torch

    import nestify
    from nestify.file.loading import load_level
    from nestify.file.reader import open_nested_file
    from tests.benchmarks.int8 import Images

    file, folder = open_nested_file(options.file), options.output
    images = Images.read(file, options.data, options.split, options.max_images)
    folder.mkdir(parents=True)
    for name in ("calibration", "evaluation"):
        np.save(folder / f"{name}.npy", getattr(images, name).permute(0, 2, 3, 1).contiguous())
    np.save(folder / "classes.npy", images.classes)
    chosen = options.levels.split(",") if options.levels else range(1, file.n_levels + 1)
    for number in map(int, chosen):
        nestify.export(options.file, number, "pt2", folder / f"level{number}.pt2", batch=1)
        plain = load_level(file, number)
        with torch.no_grad():
            np.save(folder / f"level{number}.npy", plain(images.evaluation))


def measure(options: argparse.Namespace) -> None:
    """Print the table."""
    folder = options.folder
    images, classes = np.load(folder / "evaluation.npy"), np.load(folder / "classes.npy")
    print(f"{len(images)} images")
    print("| level | model | KiB | top-1 % | difference | same class | largest logit difference | time |")
    print("|---" * 8 + "|")
    for program in sorted(folder.glob("level*.pt2")):
        level, times = np.load(program.with_suffix(".npy")), []
        for name, make in MODELS.items():
            path = folder / f"{program.stem}.{name}.tflite"
            make(program, path)
            logits, seconds = run(path, images)
            times.append(seconds)
            right, before = (each.argmax(1) == classes for each in (logits, level))
            points = 100 * (right.astype(float) - before)
            cells = [
                program.stem.removeprefix("level"),
                name,
                f"{path.stat().st_size / 1024:.0f}",
                f"{100 * right.mean():.2f}",
                f"{points.mean():+.2f} ± {points.std() / len(points) ** 0.5:.2f}",
                f"{100 * (logits.argmax(1) == level.argmax(1)).mean():.1f} %",
                f"{np.abs(logits - level).max() / np.abs(level).max():.0e}",
                f"{seconds / times[0]:.2f}",
            ]
            print(f"| {' | '.join(cells)} |", flush=True)


def run(path: Path, images: np.ndarray) -> tuple[np.ndarray, float]:
    """Return the logits of images, and the processor time of all of them in seconds."""
    from ai_edge_litert.interpreter import Interpreter

    interpreter = Interpreter(str(path), num_threads=1)
    interpreter.allocate_tensors()
    (taken,), (given,) = interpreter.get_input_details(), interpreter.get_output_details()
    logits, start = [], time.process_time()
    for image in images:
        interpreter.set_tensor(taken["index"], image[None])
        interpreter.invoke()
        logits.append(interpreter.get_tensor(given["index"])[0])
    return np.stack(logits), time.process_time() - start


def float32(program: Path, path: Path) -> None:
    """Convert a level as it is."""
    import litert_torch
    import torch

    module = torch.export.load(program).module()
    images = torch.from_numpy(np.load(path.parent / "calibration.npy")[:1])
    litert_torch.convert(litert_torch.to_channel_last_io(module, args=[0]), (images,)).export(str(path))


def dynamic(program: Path, path: Path) -> None:
    """Quantise the weights."""
    from ai_edge_quantizer import quantizer, recipe

    made = quantizer.Quantizer(str(program.with_suffix(".float32.tflite")), recipe.dynamic_wi8_afp32())
    made.quantize(enable_progress_report=False).export_model(str(path), overwrite=True)


def static(program: Path, path: Path, *, average: bool) -> None:
    """Quantise weights and activations, with inputs and outputs in float32."""
    from ai_edge_quantizer import qtyping, quantizer, recipe

    made = quantizer.Quantizer(str(program.with_suffix(".float32.tflite")), recipe.static_wi8_ai8())
    for end in (qtyping.TFLOperationName.INPUT, qtyping.TFLOperationName.OUTPUT):
        made.update_quantization_recipe(".*", end, algorithm_key=quantizer.AlgorithmName.NO_QUANTIZE)
    images = [{"args_0": image[None]} for image in np.load(path.parent / "calibration.npy")]
    if average:
        ranges = made.calibrate({"serving_default": images}, num_threads=1)
    else:
        parts = [made.calibrate({"serving_default": [image]}, num_threads=1) for image in images]
        ranges = {
            tensor: {end: unite([part[tensor][end] for part in parts], 0) for end, unite in ENDS.items()}
            for tensor, found in parts[0].items()
            if found
        }
    made.quantize(ranges, enable_progress_report=False).export_model(str(path), overwrite=True)


ENDS: dict[str, Callable[..., Any]] = {"min": np.min, "max": np.max}
"""How the ranges of several images become one."""

MODELS: dict[str, Callable[[Path, Path], None]] = {
    "float32": float32,
    "dynamic": dynamic,
    "static, averaged ranges": lambda program, path: static(program, path, average=True),
    "static, whole ranges": lambda program, path: static(program, path, average=False),
}
"""The models that are measured, by name; each takes the program of a level and the path to write."""

if __name__ == "__main__":
    sys.exit(main())
