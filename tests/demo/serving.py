"""A folder on a web server on loopback."""

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from nestify.demo.serve import make_server


@contextmanager
def serving(folder: Path) -> Iterator[str]:
    """Serve a folder, and yield the server's address."""
    with make_server(folder, "127.0.0.1", 0) as server:
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield f"http://127.0.0.1:{server.server_port}"
        finally:
            server.shutdown()
            thread.join()
