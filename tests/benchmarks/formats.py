"""In which formats can the core level of each kind of schedule be exported, and how near are its logits?

    OMP_NUM_THREADS=1 python tests/benchmarks/formats.py                  # a quarter of an hour on one core
    OMP_NUM_THREADS=1 python tests/benchmarks/formats.py --models test_resnet --schedules channel,layer

Uses nestify's Python API alone, as a user would. Models have random weights without constant tensors, images
are noise of 64 pixels, and levels are not trained, so nothing is said about accuracy. Each cell is the size
of the export and the largest difference of a logit, relative to the largest (`w`: of a stored weight, where
nothing on this machine runs the format). A refused export is a number that refers to nestify's own sentence.
The lines below the table sum up each format; for int8 with the lowest share of images for which it predicts
the class of the level.
"""

import argparse
import json
import sys
import tempfile
import warnings
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

with warnings.catch_warnings():
    warnings.simplefilter("ignore")  # torch's own deprecation warnings on import
    import numpy as np
    import timm
    import torch
    from PIL import Image
    from safetensors.torch import save_file

sys.path.insert(0, str(Path(__file__).parents[2]))
import nestify
from nestify.engine import export_sparse
from nestify.evaluation.int8 import export_int8

SIDE, CLASSES = 64, 10
MODELS: Mapping[str, Mapping[str, Any]] = {
    "test_resnet": {},
    "tf_efficientnet_lite0": {},
    "vit_tiny_patch16_224": {"img_size": SIDE, "embed_dim": 96, "depth": 4},
    "test_convnext": {},
}
SCHEDULES: Mapping[str, Mapping[str, Any]] = {
    "weight": {"levels": "0.9,0"},
    "channel": {"levels": "0.5,1"},
    "layer": {"levels": "0.5,1"},
    "combined": {
        "level": [
            {"width": 0.5, "depth": 0.5, "sparsity": 0.7},
            {"width": 1.0, "depth": 1.0, "sparsity": 0.0},
        ]
    },
    "hierarchy": {"levels": "0.9,0", "data.hierarchy": "classes.csv"},
}
"""Options of each kind of levels; the last are sparse levels of which the core predicts coarser classes."""

Export = Callable[[Path, Path, Path], Any]


def plain_export(format: str, **options: Any) -> Export:
    """Return a function of a nested file, an output and a folder of images that exports the core level."""
    return lambda file, output, _: nestify.export(file, 1, format, output, **options)


def int8_export(format: str) -> Export:
    """Return the same for an int8 export, which is kept whatever it predicts."""
    return lambda file, output, images: export_int8(
        file, 1, images, format, output, calibrate_images=CLASSES, max_drop=100
    )


FORMATS: Mapping[str, tuple[str, Export]] = {
    "timm": ("timm.safetensors", plain_export("timm")),
    "onnx": ("level.onnx", plain_export("onnx")),
    "pt2": ("level.pt2", plain_export("pt2")),
    "openvino": ("level.openvino", plain_export("openvino")),
    "openvino float16": ("half.openvino", plain_export("openvino", dtype="float16")),
    "coreml": ("level.mlpackage", plain_export("coreml")),
    "coreml int8": ("int8.mlpackage", plain_export("coreml", dtype="int8")),
    "executorch": ("level.pte", plain_export("executorch")),
    "onnx int8": ("int8.onnx", int8_export("onnx")),
    "openvino int8": ("int8.openvino", int8_export("openvino")),
    "onnx sparse": ("sparse.onnx", lambda file, output, _: export_sparse(file, 1, output)),
}
"""Name of the output and the export of each column."""


@dataclass(frozen=True)
class Cell:
    """Outcome of one export.

    Attributes:
        format: name of the column.
        size: bytes of the export; 0 if there is none.
        difference: largest difference of a logit or weight; NaN if there is no export.
        checked_by: what ran it; None if only its weights were compared.
        agreement: share of images with the level's class in percent, for int8 of ONNX and OpenVINO.
        refusal: nestify's sentence, or an exception that nestify did not expect, which starts with FAILS.
    """

    format: str
    size: int = 0
    difference: float = float("nan")
    checked_by: str | None = None
    agreement: float | None = None
    refusal: str = ""


def main() -> int:
    """Print the table; return exit code 1 if an export fails without being refused."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("--models", default=",".join(MODELS), metavar="A,B")
    parser.add_argument("--schedules", default=",".join(SCHEDULES), metavar="A,B")
    parser.add_argument("--formats", default=",".join(FORMATS), metavar="A,B")
    options = parser.parse_args()
    formats = options.formats.split(",")
    refusals: list[str] = []
    cells: list[Cell] = []
    print("| model | levels |", " | ".join(formats), "|")
    print("|---|---|" + "---|" * len(formats))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_images(folder / "images")
        for model in options.models.split(","):
            for schedule in options.schedules.split(","):
                row = measure(model, schedule, formats, folder)
                refusals += [cell.refusal for cell in row if cell.refusal and cell.refusal not in refusals]
                print(
                    f"| {model} | {schedule} |",
                    " | ".join(shown(cell, refusals) for cell in row),
                    "|",
                    flush=True,
                )
                cells += row
    print()
    for number, sentence in enumerate(refusals, start=1):
        print(f"{number}. {sentence}")
    for format in formats:
        print(summary(format, [cell for cell in cells if cell.format == format]))
    return int(any("FAILS" in sentence for sentence in refusals))


def write_images(folder: Path) -> None:
    """Write images of noise into class folders, and a table of coarser classes next to them."""
    rng = np.random.default_rng(0)
    names = [f"class{number}" for number in range(CLASSES)]
    for split, count in (("train", 4), ("val", 2)):
        for name in names:
            (place := folder / split / name).mkdir(parents=True)
            for number in range(count):
                coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8))
                coarse.resize((SIDE, SIDE), Image.Resampling.BICUBIC).save(place / f"{number}.png")
    rows = [f"{name},{'even' if number % 2 == 0 else 'odd'}" for number, name in enumerate(names)]
    (folder.parent / "classes.csv").write_text("\n".join(["fine,coarse", *rows]) + "\n")


def measure(model: str, schedule: str, formats: list[str], folder: Path) -> list[Cell]:
    """Nest a model and export its core level in each format."""
    with tempfile.TemporaryDirectory(dir=folder) as name:
        place = Path(name)
        try:
            nested = nest(model, schedule, place, folder)
        except nestify.NestifyError as error:  # the model has no such levels
            return [Cell(format, refusal=str(error)) for format in formats]
        return [export_core(nested, format, place, folder / "images") for format in formats]


def nest(model: str, schedule: str, place: Path, folder: Path) -> Path:
    """Return a nested file of a model without training."""
    torch.manual_seed(0)
    network = timm.create_model(model, num_classes=CLASSES, **MODELS[model])
    with torch.no_grad():
        for parameter in network.parameters():
            parameter.add_(0.02 * torch.randn_like(parameter))
    save_file(network.state_dict(), place / "model.safetensors")
    kinds = {"hierarchy": "weight"}
    overrides = {
        "schedule.kind": kinds.get(schedule, schedule),
        "schedule.fit": False,
        "model.checkpoint": str(place / "model.safetensors"),
        "model.kwargs": dict(MODELS[model]) or None,
        "data.path": str(folder / "images"),
        "model.input_size": SIDE,
        "data.workers": 0,
        "train.epochs": 0,
        "output": str(place / "nested.safetensors"),
        **SCHEDULES[schedule],
    }
    if "data.hierarchy" in overrides:
        overrides["data.hierarchy"] = str(folder / overrides["data.hierarchy"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return nestify.compress(model, overrides, observer=nestify.Observer()).path


def export_core(nested: Path, format: str, place: Path, images: Path) -> Cell:
    """Export the core level in one format."""
    output, export = FORMATS[format]
    try:
        done = export(nested, place / output, images)
    except nestify.NestifyError as error:
        return Cell(format, refusal=str(error).replace(str(place), "."))
    except Exception as error:  # any exception is a result
        return Cell(format, refusal=f"FAILS: {type(error).__name__}: {error}")
    agreement = None if done.int8 is None else done.int8.agreement
    return Cell(format, done.bytes, done.max_difference, done.checked_by, agreement)


def shown(cell: Cell, refusals: list[str]) -> str:
    """Return the text of a cell."""
    if cell.refusal:
        return f"refused ({refusals.index(cell.refusal) + 1})"
    weight = "" if cell.checked_by else "w "
    return f"{cell.size / 1024:.0f} KiB, {weight}{cell.difference:.0e}"


def summary(format: str, cells: list[Cell]) -> str:
    """Return one line about all exports of a format, as JSON."""
    made = [cell for cell in cells if not cell.refusal]
    return json.dumps(
        {
            "format": format,
            "converted": f"{len(made)}/{len(cells)}",
            "largest_difference": max((cell.difference for cell in made), default=None),
            "checked_by": sorted({cell.checked_by or "stored weights" for cell in made}),
            "lowest_agreement": min(
                (cell.agreement for cell in made if cell.agreement is not None), default=None
            ),
        }
    )


if __name__ == "__main__":
    sys.exit(main())
