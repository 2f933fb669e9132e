"""`nestify export`: write one level as a plain model that runs without nestify."""

import json
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
    as_json: AsJson = False,
) -> None:
    """Write one level as a plain model that does not need nestify.

    The model takes images that are preprocessed as its metadata describes, and returns logits, without a
    softmax. The file is loaded again and compared with the level, and kept only if they agree. onnx needs
    pip install 'nestify\\[onnx]'. A model of --sparse needs the engine's library where it runs.
    """
    from nestify.cli.output import write_result
    from nestify.report.results import exported_notes
    from nestify.text import printable

    if sparse:
        from nestify.engine.export import export_sparse

        if format not in (None, ExportFormat.onnx):
            raise RecipeError(f"--sparse applies to --format onnx, not to {format}; leave one of them out")
        done = export_sparse(file, level, output, batch=batch, opset=opset, dtype=dtype or PackedType.float32)
    elif dtype is not None:
        raise RecipeError(f"--dtype {dtype} applies to --sparse; add --sparse, or leave it out")
    else:
        from nestify.exports.export import export as run

        done = run(file, level, format, output, batch=batch, opset=opset)
    lines = [f"{file}: {done.facts.title}", *exported_notes(done), f"Written: {done.path}"]
    text = json.dumps(_document(file, done), indent=2) if as_json else "\n".join(map(printable, lines))
    write_result(text + "\n", None)


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
        **({} if done.packed_layers is None else {"packed_layers": done.packed_layers}),
    }
