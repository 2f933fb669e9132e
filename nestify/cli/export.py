"""`nestify export`: one level as a plain model without nestify."""

import json
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestify.cli.arguments import AsJson, NestedFileOrAddress, choice_option
from nestify.exports.target import ExportFormat

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
            help="Weights for timm, an ONNX model, or a program of torch.export.",
            show_default="by the suffix of --output",
        ),
    ] = None,
    output: Annotated[
        str | None,
        typer.Option(
            "-o",
            "--output",
            help="File to write (.safetensors, .onnx, .pt2), or a new folder/ that timm loads as local-dir:.",
            show_default="beside FILE, as in digits.level1.onnx",
        ),
    ] = None,
    batch: Annotated[
        int | None,
        typer.Option("--batch", min=1, help="Images per call of onnx and pt2.", show_default="any number"),
    ] = None,
    opset: Annotated[
        int | None, typer.Option("--opset", min=1, help="Version of ONNX's operators.", show_default="18")
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write one level as a plain model that needs no nestify.

    It takes images prepared as its metadata says, and gives logits, without a softmax. It is loaded again
    and compared with the level before it is kept. onnx needs pip install 'nestify\\[onnx]'.
    """
    from nestify.cli.output import write_result
    from nestify.exports.write import export as run

    done = run(file, level, format, output, batch=batch, opset=opset)
    text = json.dumps(_document(file, done), indent=2) + "\n" if as_json else _sentences(file, done)
    write_result(text, None)


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
    }


def _sentences(file: str, done: "Exported") -> str:
    from nestify.report.table import mebibytes

    form = f"{done.format}, opset {done.opset}" if done.opset else str(done.format)
    batches = f"{done.batch} images per call" if done.batch else "any number of images per call"
    lines = [
        f"{file}: {done.facts.title}",
        f"as {form}, {mebibytes(done.bytes)} MiB, {batches}",
        f"Loaded again, its logits differ from the level's by {done.max_difference:.1e} of the largest.",
        f"Load it with: {done.load_line}",
    ]
    if done.facts.sparsity > 0:
        zeros = f"{done.facts.sparsity:.1%} of the maskable weights"
        lines.append(
            f"It stores and multiplies the zeros ({zeros}): it is as large and as slow as the full level; "
            "gzip shrinks it."
        )
    if done.format == "pt2":
        from torch import __version__ as version

        lines.append(f"It is for torch {version}; torch does not promise that other versions read it.")
    return "\n".join([*lines, f"Written: {done.path}"]) + "\n"
