"""`nestify export`: write one level as a plain model that runs without nestify."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestify.cli.arguments import AsJson, NestedFileOrAddress, ReduceRange, TrainSplit, choice_option
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
            help="timm: weights for timm; onnx: an ONNX model; pt2: a program of torch.export; openvino: a "
            "model for Intel's runtime; coreml: a package for Apple's devices; executorch: a program for "
            "phones.",
            show_default="by the suffix of --output",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write (.safetensors, .onnx, .pt2, .pte), or a new folder: .mlpackage, .openvino, "
            "or any folder/ for local-dir: of timm.",
            show_default="next to FILE, as in digits.level1.onnx",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option(
            "--batch", min=1, help="Images per call, not for timm.", show_default="any number, coreml 1"
        ),
    ] = None,
    opset: Annotated[
        int | None,
        typer.Option("--opset", min=1, help="Version of the ONNX operator set.", show_default="18"),
    ] = None,
    dtype: Annotated[
        str | None,
        typer.Option(
            "--dtype",
            help="Type that weights are stored as: float32 or float16 for openvino and --sparse; float16, "
            "float32 or int8 for coreml.",
            show_default="the first of these",
        ),
    ] = None,
    sparse: Annotated[
        bool,
        typer.Option(
            "--sparse",
            help="For onnx: pack sparse layers for the engine, which runs them faster; also with --int8.",
        ),
    ] = False,
    int8: Annotated[
        bool,
        typer.Option(
            "--int8", help="For onnx and openvino: quantise to int8, calibrated and evaluated on --data."
        ),
    ] = False,
    data: Annotated[
        str | None,
        typer.Option("--data", help="Images for --int8, as for compress: training and validation images."),
    ] = None,
    data_root: Annotated[
        str | None, typer.Option("--data-root", help="Folder of an hfds/..., wds/... or torch/... dataset.")
    ] = None,
    labels: Annotated[
        str | None,
        typer.Option(
            "--labels",
            metavar="CSV",
            help="Table of the labels of each image for --int8, of levels that predict several.",
        ),
    ] = None,
    train_split: TrainSplit = None,
    split: Annotated[
        str | None,
        typer.Option(
            "--split",
            "--val-split",
            help="Split to evaluate --int8 on.",
            show_default="validation, or else the one that the file was validated on",
        ),
    ] = None,
    calibrate_images: Annotated[
        int | None,
        typer.Option(
            "--calibrate-images", min=1, help="Training images to calibrate --int8 on.", show_default="100"
        ),
    ] = None,
    max_drop: Annotated[
        float | None,
        typer.Option(
            "--max-drop",
            min=0,
            metavar="POINTS",
            help="Exit with 1 if --int8 costs more points of top-1, or of what the levels are judged by, "
            "also with half of the layers in float32.",
            show_default="1.0",
        ),
    ] = None,
    max_images: Annotated[
        int | None,
        typer.Option("--max-images", min=1, help="Images to evaluate --int8 on.", show_default="all"),
    ] = None,
    reduce_range: ReduceRange = False,
    with_preprocessing: Annotated[
        bool,
        typer.Option(
            "--with-preprocessing",
            help="Take decoded pictures of any size, uint8, and resize, crop and normalise them; not for "
            "timm and coreml.",
        ),
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Write one level as a plain model that does not need nestify.

    The model takes images that are preprocessed as its metadata describes, and returns logits, without a
    softmax. The file is loaded again and compared with the level, and kept only if they agree. onnx needs
    pip install 'nestify\\[onnx]'. A model of --sparse needs the engine's library where it runs. One of --int8
    is evaluated on the validation images, and kept only if it loses at most --max-drop points.
    """
    from nestify.cli.output import Verbosity, json_text, verbosity, write_result
    from nestify.report.results import exported_notes
    from nestify.terminal import progress_bar
    from nestify.text import printable

    for_int8 = {
        "--data": data,
        "--data-root": data_root,
        "--labels": labels,
        "--train-split": train_split,
        "--split": split,
        "--calibrate-images": calibrate_images,
        "--max-drop": max_drop,
        "--max-images": max_images,
        "--reduce-range": reduce_range or None,
    }
    _check_options(format, sparse, int8, dtype, with_preprocessing, for_int8)
    if int8:
        from nestify.evaluation.int8 import MAX_DROP, export_int8
        from nestify.evaluation.on_engine import CALIBRATION_IMAGES

        with progress_bar("images", hidden=verbosity() is Verbosity.quiet) as progress:
            done = export_int8(
                file,
                level,
                data or "",
                format,
                output,
                calibrate_images=calibrate_images or CALIBRATION_IMAGES,
                max_drop=MAX_DROP if max_drop is None else max_drop,
                labels=labels,
                train_split=train_split,
                split=split,
                data_root=data_root,
                max_images=max_images,
                batch=batch,
                opset=opset,
                with_preprocessing=with_preprocessing,
                sparse=sparse,
                reduce_range=reduce_range,
                progress=progress,
            )
    elif sparse:
        from nestify.engine.export import export_sparse

        done = export_sparse(
            file, level, output, batch=batch, opset=opset, dtype=PackedType(dtype or "float32")
        )
    else:
        from nestify.exports.export import export as run

        done = run(
            file,
            level,
            format,
            output,
            batch=batch,
            opset=opset,
            dtype=dtype,
            with_preprocessing=with_preprocessing,
        )
    lines = [f"{file}: {done.facts.title}", *exported_notes(done), f"Written: {done.path}"]
    text = json_text(_document(file, done)) if as_json else "\n".join(map(printable, lines)) + "\n"
    write_result(text, None)


def _check_options(
    format: ExportFormat | None,
    sparse: bool,
    int8: bool,
    dtype: str | None,
    with_preprocessing: bool,
    for_int8: Mapping[str, object],
) -> None:
    """Refuse options that exclude each other, or have no use."""
    problems = []
    if sparse and format not in (None, ExportFormat.onnx):
        problems.append(f"--sparse applies to --format onnx, not to {format}; leave one of them out")
    if sparse and with_preprocessing:
        problems.append("--with-preprocessing does not combine with --sparse; leave one of them out")
    if dtype is not None and int8:
        problems.append(f"--dtype {dtype} has no use with --int8; leave it out")
    elif dtype is not None and sparse and dtype not in list(PackedType):
        problems.append(f"--dtype {dtype} is not a type of --sparse; give {' or '.join(PackedType)}")
    if int8 and for_int8["--data"] is None:
        problems.append("--int8 needs images to calibrate and evaluate on; give --data FOLDER")
    if not int8:
        unused = [option for option, value in for_int8.items() if value is not None]
        problems += [
            f"{option} has no use without --int8; add it, or leave the option out" for option in unused
        ]
    if problems:
        raise RecipeError(problems)


def _document(file: str, done: "Exported") -> dict[str, Any]:
    return {
        "schema_version": SCHEMA_VERSION,
        "file": file,
        "level": done.facts.level,
        "name": done.facts.level_name,
        "sparsity": done.facts.sparsity,
        "level_sha256": done.facts.level_sha256,
        "source_sha256": done.facts.source_sha256,
        "format": str(done.format),
        "output": str(done.path),
        "bytes": done.bytes,
        "dtype": done.dtype,
        "checked_by": done.checked_by,
        "max_logit_difference": done.max_difference if done.checked_by else None,
        "max_weight_difference": None if done.checked_by else done.max_difference,
        "tolerance": done.tolerance,
        "with_preprocessing": done.with_preprocessing,
        "dynamic_batch": done.batch is None,
        "batch": done.batch,
        "opset": done.opset,
        "load": done.load_line,
        **({} if done.int8 is None else {"int8": done.int8.document()}),
        **({} if done.packed_layers is None else {"packed_layers": done.packed_layers}),
    }
