"""Which options apply to which format of an export. Does not import torch."""

from nestify.errors import RecipeError
from nestify.exports.target import ExportFormat

_WITHOUT_PICTURES = {
    ExportFormat.timm: "timm has a transform of its own; leave it out, and use timm.data.create_transform",
    ExportFormat.coreml: "Core ML takes no arrays of uint8; leave it out, let Vision resize and crop, and "
    "normalise as the metadata says",
}
"""Why the preprocessing cannot be part of an export in a format, and what to do."""

MOST_IMAGES = 4096
"""Largest number of images per call that an export is fixed to: it is compared with the level on them."""

INT8_FORMATS = (ExportFormat.onnx, ExportFormat.openvino)
"""Formats with calibrated int8 models."""

_WITHOUT_INT8 = {
    ExportFormat.coreml: "its int8 weights need no images; give --dtype int8 instead",
}
"""What to do about int8 in other formats."""


def check_int8(format: ExportFormat) -> None:
    """Refuse calibrated int8 for the formats that do not have it.

    Raises:
        RecipeError: with the reason.
    """
    if format not in INT8_FORMATS:
        why = _WITHOUT_INT8.get(format, "leave one of them out")
        raise RecipeError(f"--int8 applies to --format onnx and openvino, not to {format}; {why}")


def check_options(
    format: ExportFormat,
    batch: int | None,
    opset: int | None,
    dtype: str | None = None,
    pictures: bool = False,
) -> None:
    """Refuse options that do not apply to a format.

    Args:
        format: the format.
        batch: number of images per call; None for the format's default.
        opset: version of ONNX's operators; None for the default.
        dtype: type that weights are stored as; None for the format's default.
        pictures: whether the preprocessing is part of the export.

    Raises:
        RecipeError: naming the option.
    """
    if dtype == "float16" and format is ExportFormat.onnx:
        raise RecipeError("--dtype float16 applies to packed layers in ONNX; add --sparse, or leave it out")
    if dtype is not None and dtype not in format.dtypes:
        if dtype == "int8" and format in INT8_FORMATS:
            raise RecipeError(
                f"--dtype int8 does not apply to --format {format}, whose int8 models are calibrated; give "
                "--int8 --data FOLDER"
            )
        raise RecipeError(
            f"--dtype {dtype} is not one of the types of --format {format}; give {' or '.join(format.dtypes)}"
        )
    if pictures and (reason := _WITHOUT_PICTURES.get(format)):
        raise RecipeError(f"--with-preprocessing does not apply to --format {format}: {reason}")
    if opset is not None and format is not ExportFormat.onnx:
        raise RecipeError(f"--opset {opset} applies to --format onnx, not to {format}; leave it out")
    if batch is not None and format is ExportFormat.timm:
        raise RecipeError(
            f"--batch {batch} does not apply to --format timm, which accepts any batch size; leave it out"
        )
    if batch is not None and not 1 <= batch <= MOST_IMAGES:
        raise RecipeError(
            f"--batch {batch} is not from 1 to {MOST_IMAGES} images; leave it out for any number"
        )
