"""A small web server for the page: files of one folder, whole or by range. Does not import torch."""

import os
import re
from functools import partial
from http import HTTPStatus
from http.server import SimpleHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import BinaryIO, cast

from nestify.errors import OutputError, RecipeError

LOOPBACK = "127.0.0.1"


class RangeHandler(SimpleHTTPRequestHandler):
    """Answers requests for files with the bytes that they ask for."""

    protocol_version = "HTTP/1.1"
    extensions_map = {  # noqa: RUF012  # as in the base class
        **SimpleHTTPRequestHandler.extensions_map,
        ".js": "text/javascript",
        ".mjs": "text/javascript",
        ".wasm": "application/wasm",
        ".onnx": "application/octet-stream",
        ".safetensors": "application/octet-stream",
    }

    def end_headers(self) -> None:
        """End the headers with those that let the page use several threads, and see new files at once."""
        self.send_header("Cross-Origin-Opener-Policy", "same-origin")
        self.send_header("Cross-Origin-Embedder-Policy", "require-corp")
        self.send_header("Cache-Control", "no-cache")
        super().end_headers()

    def send_head(self) -> "BinaryIO | None":
        """Send the headers of an answer; returns the file from which its bytes are copied."""
        path = Path(self.translate_path(self.path))
        asked = re.fullmatch(r"bytes=([0-9]{1,18})-([0-9]{0,18})", self.headers.get("Range", ""))
        if asked is None or not path.is_file():
            return super().send_head()
        file = path.open("rb")
        size = os.fstat(file.fileno()).st_size
        begin, last = int(asked[1]), min(int(asked[2] or size - 1), size - 1)
        if begin > last:
            file.close()
            self.send_response(HTTPStatus.REQUESTED_RANGE_NOT_SATISFIABLE)
            self.send_header("Content-Range", f"bytes */{size}")
            self.send_header("Content-Length", "0")
            self.end_headers()
            return None
        file.seek(begin)
        self.send_response(HTTPStatus.PARTIAL_CONTENT)
        self.send_header("Content-Type", self.guess_type(str(path)))
        self.send_header("Content-Range", f"bytes {begin}-{last}/{size}")
        self.send_header("Content-Length", str(last + 1 - begin))
        self.end_headers()
        return cast(BinaryIO, _Part(file, last + 1 - begin))

    def log_message(self, format: str, *arguments: object) -> None:
        """Print nothing."""


class _Part:
    """The next bytes of a file, up to a number of them."""

    def __init__(self, file: BinaryIO, left: int) -> None:
        self._file = file
        self._left = left

    def read(self, size: int) -> bytes:
        """Read up to `size` bytes; none are left at the end."""
        data = self._file.read(min(size, self._left))
        self._left -= len(data)
        return data

    def close(self) -> None:
        """Close the file."""
        self._file.close()


class _Server(ThreadingHTTPServer):
    daemon_threads = True

    def handle_error(self, request: object, client_address: object) -> None:
        """Print nothing: a browser that closes a connection is no error."""


def parse_address(text: str) -> tuple[str, int]:
    """Parse `8000` or `0.0.0.0:8000`: where a server listens; without a host, on this machine alone.

    Raises:
        RecipeError: if the text is anything else.
    """
    host, _, port = text.strip().rpartition(":")
    if (
        not re.fullmatch("[0-9]{1,5}", port)
        or int(port) > 65535
        or not re.fullmatch(r"[\w.-]*", host, re.ASCII)
    ):
        raise RecipeError(f"--serve {text!r} is not understood; give a port such as 8000, or 0.0.0.0:8000")
    return host or LOOPBACK, int(port)


def make_server(folder: Path, host: str, port: int) -> ThreadingHTTPServer:
    """Return a server of a folder's files, which `serve_forever` starts.

    Args:
        folder: the folder.
        host: address of this machine to listen at.
        port: its port; 0 for any that is free.

    Raises:
        OutputError: if it cannot listen there.
    """
    try:
        return _Server((host, port), partial(RangeHandler, directory=os.fspath(folder)))
    except OSError as error:
        raise OutputError(
            f"--serve {host}:{port}: cannot listen there ({error.strerror or error}); choose another port"
        ) from error
