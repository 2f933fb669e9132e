"""`nestify engine`: the sparse engine's library, for other programs."""

from typing import Annotated

import typer

from nestify.cli.arguments import AsJson

SCHEMA_VERSION = 1


def engine(
    library: Annotated[
        bool, typer.Option("--library", help="Print the path of the library, and nothing else.")
    ] = False,
    build: Annotated[
        bool, typer.Option("--build", help="Compile the library first; needs a C++ compiler.")
    ] = False,
    as_json: AsJson = False,
) -> None:
    """Show the library of the sparse engine, which runs the levels that export --sparse writes.

    A program registers it with ONNX Runtime (RegisterCustomOpsLibrary) before it loads such a model. The
    variable NESTIFY_ENGINE_LIBRARY names another library, and NESTIFY_ENGINE_ISA (avx512, avx2, generic) an
    instruction set.
    """
    from nestify.cli.output import json_text, write_result
    from nestify.engine.library import build as compile_library
    from nestify.engine.library import find_library, load_library
    from nestify.errors import RecipeError

    if library and as_json:
        raise RecipeError("--library and --json exclude each other; leave one of them out")
    if build:
        compile_library()
    if library:
        write_result(f"{find_library()}\n", None)
        return
    loaded = load_library()
    if as_json:
        document = {"schema_version": SCHEMA_VERSION, "library": str(loaded.path), "isa": loaded.isa}
        write_result(json_text(document), None)
    else:
        write_result(f"{loaded.path}\ninstruction set: {loaded.isa}\n", None)
