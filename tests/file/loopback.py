"""A file server on loopback that misbehaves on request."""

import re
import ssl
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from email.message import Message
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

CERTIFICATE = Path(__file__).parent / "loopback.pem"
"""Of 127.0.0.1, with its key: nobody trusts it but a process that is told to by SSL_CERT_FILE."""

Range = tuple[int, int]
Behaviour = Callable[["Visit"], bool]
"""Answers a request in its own way, or returns False and leaves it to the good server."""


@dataclass
class Visit:
    """One request: what it asks for, and the means to answer it.

    `bytes` is (begin, end) of the range; `number` counts the requests from 1.
    """

    number: int
    path: str
    bytes: Range
    headers: Message
    server: "Server"
    handler: BaseHTTPRequestHandler

    @property
    def body(self) -> bytes:
        begin, end = self.bytes
        return self.server.content[begin:end]

    def answer(self, status: int = 206, body: bytes | None = None, **changes: str | None) -> bool:
        """The head of a good answer, with changes (`Content_Range=None` leaves it out), and a body."""
        body = self.body if body is None else body
        begin, size = self.bytes[0], len(self.server.content)
        headers: dict[str, str | None] = {
            "Content-Length": str(len(body)),
            "Content-Range": f"bytes {begin}-{begin + len(self.body) - 1}/{size}",
            "Content-Type": "application/octet-stream",
            "ETag": '"one"',
        }
        headers |= {name.replace("_", "-"): value for name, value in changes.items()}
        if status != 206:
            headers["Content-Range"] = changes.get("Content_Range")
        self.handler.send_response(status)
        for name, value in headers.items():
            if value is not None:
                self.handler.send_header(name, value)
        self.handler.end_headers()
        self.send(body)
        return True

    def send(self, data: bytes) -> None:
        for begin in range(0, len(data), 2**16):
            part = data[begin : begin + 2**16]
            self.handler.wfile.write(part)
            self.server.sent += len(part)

    def cut(self, after: int) -> bool:
        """Promise the whole body, send so many bytes of it, and hang up."""
        self.answer(body=b"", Content_Length=str(len(self.body)))
        self.send(self.body[:after])
        self.handler.close_connection = True
        return True

    def wait(self, seconds: float | None = None) -> bool:
        """Say nothing until the server closes, or for so long; whether it has closed."""
        return self.server.closing.wait(seconds)


@dataclass
class Server:
    """What it holds, how it behaves, and what it was asked.

    Attributes:
        ranges: (begin, end) of every request. `visits`: the requests. `sent`: bytes of bodies.
    """

    content: bytes
    address: str = ""
    behaviour: Behaviour = lambda visit: False
    visits: list[Visit] = field(default_factory=list)
    sent: int = 0
    closing: threading.Event = field(default_factory=threading.Event)

    @property
    def url(self) -> str:
        return f"{self.address}/model.safetensors"

    @property
    def ranges(self) -> list[Range]:
        return [visit.bytes for visit in self.visits]


@contextmanager
def serve(content: bytes, *, tls: bool = False) -> Iterator[Server]:
    """Serve one file under every path."""
    server = Server(content)

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_GET(self) -> None:
            asked = re.fullmatch(r"bytes=(\d+)-(\d+)", self.headers.get("Range", ""))
            assert asked is not None, "every request is for a range"
            visit = Visit(
                number=len(server.visits) + 1,
                path=self.path,
                bytes=(int(asked[1]), int(asked[2]) + 1),
                headers=self.headers,
                server=server,
                handler=self,
            )
            server.visits.append(visit)
            if not server.behaviour(visit):
                visit.answer()

        def log_message(self, *_: Any) -> None:
            pass

    class Quiet(ThreadingHTTPServer):
        def handle_error(self, *_: Any) -> None:
            """A client that hangs up is what many tests are about."""

    with Quiet(("127.0.0.1", 0), Handler) as http:
        server.address = f"http{'s' * tls}://127.0.0.1:{http.server_port}"
        if tls:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(CERTIFICATE)
            # The handshake is for the thread of the request: a client that refuses must not stop the rest.
            http.socket = context.wrap_socket(http.socket, server_side=True, do_handshake_on_connect=False)
        thread = threading.Thread(target=http.serve_forever, args=(0.01,))
        thread.start()
        try:
            yield server
        finally:
            server.closing.set()
            http.shutdown()
            thread.join()
