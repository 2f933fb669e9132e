"""Opening a level for the engine. Does not import torch for a model that is packed already."""

import os

from nestify.engine.session import Session
from nestify.errors import RecipeError


def open(
    source: str | os.PathLike[str],
    *,
    level: int | str | None = None,
    threads: int | None = None,
    cache: str | os.PathLike[str] | None = None,
    dtype: str = "float32",
) -> Session:
    """Open a level for the engine: an object that maps NumPy images (B, C, H, W) to logits (B, classes).

    A packed .onnx file needs numpy, onnxruntime and the engine's library alone. From a nested file the level
    is traced once, which needs torch, timm and the packages of `nestify[onnx]`, and the packed model is kept
    in a cache folder.

    Args:
        source: an .onnx file, a nested file, or the address of a nested file.
        level: number or name of the level of a nested file.
        threads: number of threads; None for one per processor that this process may use.
        cache: folder for packed models; None for the user's cache folder.
        dtype: type in which the packed weights of a nested file's level are stored, float32 or float16.

    Raises:
        NestifyError: if a file, option or package is not right; the message says what helps.
    """
    if os.fspath(source).endswith(".onnx"):
        if level is not None:
            raise RecipeError(f"{os.fspath(source)} holds one level; leave level={level!r} out")
        if dtype != "float32":
            raise RecipeError(f"{os.fspath(source)} is packed already; leave dtype={dtype!r} out")
        return Session(source, threads)
    if level is None:
        raise RecipeError(f"{os.fspath(source)}: which level is to be opened? give level=1, or a name")
    # Imported here, so that a packed model needs none of their packages.
    from nestify.engine.export import packed_model, packed_type
    from nestify.file.reader import open_nested_file

    stored = packed_type(dtype)
    file = open_nested_file(source, truncated=True)
    file.check_whole(number := file.level_index(str(level)))
    return Session(packed_model(file, number, cache, stored), threads)
