"""`nestify export`: write one level as a plain model that runs without nestify."""

import json
from collections.abc import Sequence
from dataclasses import asdict
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestify.cli.arguments import AsJson, NestedFileOrAddress, choice_option
from nestify.errors import RecipeError
from nestify.exports.target import ExportFormat, PackedType

if TYPE_CHECKING:
    from nestify.exports.write import Exported

SCHEMA_VERSION = 1


def export(
    file: NestedFileOrAddress,
    level: Annotated[str, typer.Option("--level", help="Level by number or name.", show_default=False)],
    format: Annotated[
        ExportFormat | None,
        choice_option(
            ExportFormat,
            "--format",
            help="timm: weights for timm; onnx: an ONNX model; pt2: a program of torch.export.",
            show_default="by the suffix of --output",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write (.safetensors, .onnx, .pt2), or a new folder/ for local-dir: of timm.",
            show_default="next to FILE, as in digits.level1.onnx",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Images per call, for onnx and pt2.", show_default="any number"),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option("--opset", min=1, help="Version of the ONNX operator set.", show_default="18"),
    ] = None,
    sparse: Annotated[
        bool,
        typer.Option("--sparse", help="For onnx: pack sparse layers for the engine, which runs them faster."),
    ] = False,
    dtype: Annotated[
        PackedType | None,
        choice_option(
            PackedType,
            "--dtype",
            help="For --sparse: type in which packed weights are stored; float16 makes smaller files.",
            show_default="float32",
        ),
    ] = None,
    int8: Annotated[
        bool,
        typer.Option("--int8", help="With --sparse: quantise the level to int8; needs --data."),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="For --int8: images as for compress. Training images calibrate, validation images check.",
            show_default=False,
        ),
    ] = None,
    calibrate_images: Annotated[
        int | None,
        typer.Option(
            "--calibrate-images",
            min=1,
            help="For --int8: training images that activations are calibrated on.",
            show_default="100",
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option(
            "--max-images", min=1, help="For --int8: maximum number of validation images.", show_default="all"
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            min=0,
            help="For --int8: exit with 1 if top-1 is more points below float32.",
            show_default="1",
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one level as a plain model that does not need nestify.

    The model takes images that are preprocessed as its metadata describes, and returns logits, without a
    softmax. The file is loaded again and compared with the level, and kept only if they agree. onnx needs
    pip install 'nestify\\[onnx]'. A model of --sparse needs the engine's library where it runs. One of --int8
    is compared by its accuracy on the validation images, and kept if it loses at most --max-drop points.
    """
    from nestify.cli.output import write_result
    from nestify.report.results import exported_notes
    from nestify.text import printable

    only_int8 = {
        "--data": data,
        "--calibrate-images": calibrate_images,
        "--max-images": max_images,
        "--max-drop": max_drop,
    }
    _check_options(format, sparse, int8, [name for name, value in only_int8.items() if value is not None])
    if int8:
        from nestify.evaluation.int8 import Int8Options, export_int8

        options = Int8Options(
            data or "",
            calibrate_images or Int8Options.calibrate_images,
            Int8Options.max_drop if max_drop is None else max_drop,
            max_images,
        )
        done = export_int8(file, level, options, output, batch=batch, opset=opset)
    elif sparse:
        from nestify.engine.export import export_sparse

        done = export_sparse(file, level, output, batch=batch, opset=opset, dtype=dtype or PackedType.float32)
    elif dtype is not None:
        raise RecipeError(f"--dtype {dtype} applies to --sparse; add --sparse, or leave it out")
    else:
        from nestify.exports.export import export as run

        done = run(file, level, format, output, batch=batch, opset=opset)
    lines = [f"{file}: {done.facts.title}", *exported_notes(done), f"Written: {done.path}"]
    text = json.dumps(_document(file, done), indent=2) if as_json else "\n".join(map(printable, lines))
    write_result(text + "\n", None)


def _check_options(format: ExportFormat | None, sparse: bool, int8: bool, given: Sequence[str]) -> None:
    """Refuse options that do not go together.

    Args:
        given: the names of the given options that apply to int8 alone.
    """
    problems = []
    if sparse and format not in (None, ExportFormat.onnx):
        problems.append(f"--sparse applies to --format onnx, not to {format}; leave one of them out")
    if int8 and not sparse:
        problems.append("--int8 quantises models with packed layers; add --sparse")
    if int8 and "--data" not in given:
        problems.append("--int8 needs images that activations are calibrated on; add --data")
    if not int8:
        problems += [f"{name} applies to --int8; add --int8, or leave it out" for name in given]
    if problems:
        raise RecipeError(problems)


def _document(file: str, done: "Exported") -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "file": file,
        "level": done.facts.level,
        "name": done.facts.level_name,
        "sparsity": done.facts.sparsity,
        "format": str(done.format),
        "output": str(done.path),
        "bytes": done.bytes,
        "max_logit_difference": done.max_difference,
        "tolerance": done.tolerance,
        "dynamic_batch": done.batch is None,
        "batch": done.batch,
        "opset": done.opset,
        "load": done.load_line,
        **({} if done.int8 is None else {"int8": {**asdict(done.int8), "drop": done.int8.drop}}),
        **({} if done.packed_layers is None else {"packed_layers": done.packed_layers}),
    }
