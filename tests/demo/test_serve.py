"""The web server of the page: whole files and ranges of one folder, and nothing outside of it."""

import socket
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from nestify.demo.serve import make_server, parse_address
from nestify.errors import OutputError, RecipeError
from tests.demo.serving import serving

CONTENT = bytes(range(256)) * 1000


@pytest.fixture
def address(tmp_path: Path) -> Iterator[str]:
    (tmp_path / "page").mkdir()
    (tmp_path / "page" / "file.wasm").write_bytes(CONTENT)
    (tmp_path / "page" / "index.html").write_text("<p>page")
    (tmp_path / "secret.txt").write_text("secret")
    with serving(tmp_path / "page") as running:
        yield running


def get(address: str, range: str | None = None) -> httpx2.Response:
    headers = {"Accept-Encoding": "identity"} | ({"Range": range} if range else {})
    return httpx2.get(address, headers=headers, trust_env=False)


@pytest.mark.parametrize(
    ("range", "begin", "end"),
    [("bytes=0-7", 0, 8), ("bytes=1000-99999", 1000, 100_000), ("bytes=255990-", 255_990, 256_000)],
)
def test_a_range(range: str, begin: int, end: int, address: str) -> None:
    answer = get(f"{address}/file.wasm", range)
    assert answer.status_code == 206
    assert answer.content == CONTENT[begin:end]
    assert answer.headers["Content-Range"] == f"bytes {begin}-{end - 1}/256000"


def test_a_range_beyond_the_end_is_cut_or_refused(address: str) -> None:
    cut = get(f"{address}/file.wasm", "bytes=255999-300000")
    assert (cut.status_code, cut.content) == (206, CONTENT[-1:])
    refused = get(f"{address}/file.wasm", "bytes=256000-256001")
    assert (refused.status_code, refused.headers["Content-Range"]) == (416, "bytes */256000")


def test_whole_files_and_their_types(address: str) -> None:
    answer = get(f"{address}/file.wasm")
    assert (answer.status_code, answer.content) == (200, CONTENT)
    assert answer.headers["Content-Type"] == "application/wasm"
    assert get(f"{address}/file.wasm", "bytes=oops").content == CONTENT
    page = get(f"{address}/")
    assert page.text == "<p>page"
    assert page.headers["Cross-Origin-Embedder-Policy"] == "require-corp"
    assert page.headers["Cross-Origin-Opener-Policy"] == "same-origin"


@pytest.mark.parametrize("path", ["../secret.txt", "%2e%2e/secret.txt", "..%2fsecret.txt", "no.txt"])
@pytest.mark.parametrize("range", ["", "Range: bytes=0-3\r\n"])
def test_nothing_outside_of_the_folder(path: str, range: str, address: str) -> None:
    host, _, port = address.removeprefix("http://").partition(":")
    with socket.create_connection((host, int(port))) as connection:
        connection.sendall(f"GET /{path} HTTP/1.1\r\nHost: x\r\n{range}Connection: close\r\n\r\n".encode())
        answer = connection.makefile("rb").read()
    assert answer.startswith(b"HTTP/1.1 404 ")
    assert b"secret" not in answer.partition(b"\r\n\r\n")[2].replace(b"secret.txt", b"")


def test_where_a_server_listens() -> None:
    assert parse_address("8000") == ("127.0.0.1", 8000)
    assert parse_address("0.0.0.0:80") == ("0.0.0.0", 80)
    for text in ("", "x", "70000", "a b:80", ":x", "-1"):
        with pytest.raises(RecipeError, match="--serve"):
            parse_address(text)


def test_a_port_that_is_taken(address: str, tmp_path: Path) -> None:
    port = int(address.rpartition(":")[2])
    with pytest.raises(OutputError, match="another port"):
        make_server(tmp_path, "127.0.0.1", port)
