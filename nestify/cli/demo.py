"""`nestify demo`: write a page that runs the levels of a nested file in a browser."""

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from nestify.cli.arguments import AsJson
from nestify.errors import RecipeError

if TYPE_CHECKING:
    from nestify.demo.write import Demo

SCHEMA_VERSION = 1


def demo(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE_OR_FOLDER",
            help="Nested file (a path or an address); with --serve also a folder that was written before.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path | None, typer.Option("-o", "--output", help="New folder to write.", show_default=False)
    ] = None,
    picture: Annotated[
        list[Path] | None,
        typer.Option("--picture", help="Picture that the page offers as an example; may be repeated."),
    ] = None,
    runtime: Annotated[
        Path | None,
        typer.Option(
            "--runtime",
            metavar="FOLDER",
            help="Folder with the files of onnxruntime-web, for machines without network.",
            show_default="downloaded once from the npm registry",
        ),
    ] = None,
    serve: Annotated[
        str | None,
        typer.Option(
            "--serve", metavar="[HOST:]PORT", help="Serve the page until Ctrl-C.", show_default=False
        ),
    ] = None,
    as_json: AsJson = False,
) -> None:
    """Write a static page that runs the levels of a nested file in a browser.

    The page fetches the header and the bytes of the level that is chosen, and nothing else of the file, by
    range requests. It runs the level with ONNX Runtime Web on a picture that is dropped on it, which stays on
    the device, and shows the classes, the time and the bytes. Any web server that supports range requests can
    host the folder; --serve is one. Needs pip install 'nestify\\[onnx]'.
    """
    from nestify.cli.output import Verbosity, json_text, verbosity, write_result
    from nestify.demo.serve import make_server, parse_address
    from nestify.demo.write import check_demo_folder, write_demo
    from nestify.report.results import demo_lines
    from nestify.terminal import print_stderr, progress_bar
    from nestify.text import printable

    address = parse_address(serve) if serve is not None else None
    if Path(file).is_dir():
        folder = check_demo_folder(Path(file))
        if address is None or output is not None or picture or runtime is not None:
            raise RecipeError(
                f"{file}: is a folder, which --serve PORT serves; no other option applies to it"
            )
    else:
        if output is None:
            raise RecipeError("the folder of the page is not given; add -o folder/")
        with progress_bar("bytes", hidden=verbosity() is Verbosity.quiet) as progress:
            done = write_demo(file, output, pictures=picture or (), runtime=runtime, progress=progress)
        text = "\n".join(map(printable, demo_lines(done))) + "\n"
        write_result(json_text(_document(done)) if as_json else text, None)
        folder = done.folder
    if address is None:
        return
    with make_server(folder, *address) as server:
        print_stderr(f"Serving {folder} at http://{address[0]}:{server.server_port}/ (Ctrl-C ends)")
        try:
            server.serve_forever()
        except KeyboardInterrupt:
            sys.stderr.flush()


def _document(done: "Demo") -> dict[str, Any]:
    levels = zip(done.levels, done.level_bytes, done.embedded, strict=True)
    return {
        "schema_version": SCHEMA_VERSION,
        "source": done.source,
        "folder": str(done.folder),
        "bytes": done.bytes,
        "levels": [
            {"level": number, "name": name, "fetched_bytes": fetched, "graph_bytes": graph}
            for number, (name, fetched, graph) in enumerate(levels, start=1)
        ],
    }
