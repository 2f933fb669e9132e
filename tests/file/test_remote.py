"""Files on a server: every way in which it can fail, against a real one on loopback."""

import base64
import functools
import gc
import logging
import os
import socket
import subprocess
import sys
import threading
import traceback
from collections.abc import Iterator
from contextlib import ExitStack
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import pytest

from nestify.addresses import hide_secrets
from nestify.errors import BadFileError
from nestify.file import remote, remote_client, source
from nestify.file.reader import open_nested_file
from nestify.file.remote import RemoteFile
from nestify.file.remote_client import Patience
from tests.file.builders import assert_same_state, at_level, small_state
from tests.file.loopback import CERTIFICATE, Server, Visit, serve

PIECE = 1000


@pytest.fixture(scope="module", autouse=True)
def _quick_collection() -> Iterator[None]:
    """Keep what other modules have made out of the collections below, which take a second otherwise."""
    gc.collect()
    gc.freeze()
    yield
    gc.unfreeze()


@pytest.fixture(autouse=True)
def _small_and_quick(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Small pieces and short pauses; no proxy and no passwords that this machine may have."""
    monkeypatch.setattr(source, "PIECE_BYTES", PIECE)
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=3, pause=0.01))
    monkeypatch.setenv("NETRC", "/nowhere")
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    yield
    gc.collect()  # what a connection left behind must show as a warning in this test


@pytest.fixture
def server(small_file: Path) -> Iterator[Server]:
    with serve(small_file.read_bytes()) as running:
        yield running


def refused(address: str) -> str:
    """The problem and the remedy with which reading all of a file fails, in one line, after the address."""
    with pytest.raises(BadFileError) as caught:
        open_nested_file(address).state()
    message = str(caught.value)
    assert "\n" not in message
    assert message.startswith(f"{hide_secrets(address)}: ")
    told = message.removeprefix(f"{hide_secrets(address)}: ")
    problem, _, remedy = told.partition("; ")
    assert problem
    assert remedy
    return told


def read_all(server: Server) -> None:
    assert_same_state(open_nested_file(server.url).state(), at_level(small_state(), 3))


# What goes well


def test_only_the_bytes_of_a_level_are_fetched(server: Server) -> None:
    file = open_nested_file(server.url)
    header_bytes = int.from_bytes(server.content[:8], "little") + 8
    assert file.header_bytes == header_bytes
    assert server.ranges[0] == (0, 8)
    assert server.ranges[1][0] == 8
    assert server.ranges[-1][1] == header_bytes
    opened = len(server.ranges)
    assert_same_state(file.state(2), at_level(small_state(), 2))
    ranges = server.ranges
    assert ranges[opened][0] == header_bytes
    assert all(before[1] == after[0] for before, after in pairwise(ranges))
    assert ranges[-1][1] == file.prefix_bytes(2)
    assert max(end - begin for begin, end in ranges) == PIECE


def test_the_encoding_is_asked_to_be_none(server: Server) -> None:
    read_all(server)
    assert {visit.headers["Accept-Encoding"] for visit in server.visits} == {"identity"}


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_redirects_are_followed(status: int, server: Server) -> None:
    def moved(visit: Visit) -> bool:
        return visit.path != "/moved" and visit.answer(status, b"", Location="/moved")

    server.behaviour = moved
    read_all(server)


def test_user_and_password_are_used_and_not_passed_on(server: Server, small_file: Path) -> None:
    with serve(small_file.read_bytes()) as other:
        server.behaviour = lambda visit: visit.answer(302, b"", Location=other.url)
        open_nested_file(server.url.replace("://", "://me:secret@"))
        assert server.visits[0].headers["Authorization"] == "Basic bWU6c2VjcmV0"
        assert other.visits[0].headers["Authorization"] is None


def test_a_proxy_of_the_environment(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", server.address)
    open_nested_file("http://nowhere.invalid/model.safetensors")
    assert {visit.path for visit in server.visits} == {"http://nowhere.invalid/model.safetensors"}


# What is tried again


def test_a_cut_connection_costs_no_more_than_its_piece(server: Server) -> None:
    lost = (8 + PIECE, 8 + 2 * PIECE)

    def cut_once(visit: Visit) -> bool:
        return visit.bytes == lost and server.ranges.count(lost) == 1 and visit.cut(after=300)

    server.behaviour = cut_once
    read_all(server)
    assert server.ranges.count(lost) == 2
    assert len(server.ranges) == len(set(server.ranges)) + 1, "nothing else was asked for twice"


@pytest.mark.parametrize("after", [0, 1, PIECE - 1])
def test_cut_at_every_attempt(after: int, server: Server) -> None:
    server.behaviour = lambda visit: visit.number > 2 and visit.cut(after)
    assert "; check the network and try again" in refused(server.url)
    assert len(server.visits) == 2 + 3
    assert len(set(server.ranges[2:])) == 1


@pytest.mark.parametrize("status", [500, 502, 503, 429, 408])
def test_a_server_in_trouble(status: int, server: Server) -> None:
    server.behaviour = lambda visit: visit.number <= 2 and visit.answer(status, b"wait")
    read_all(server)
    server.visits.clear()
    server.behaviour = lambda visit: visit.answer(status, b"wait")
    assert refused(server.url).endswith(f"(HTTP {status}); try again later")
    assert server.ranges == [(0, 8)] * 3


def test_the_pauses_become_longer(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    pauses: list[float] = []
    monkeypatch.setattr(remote.time, "sleep", pauses.append)
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=4, pause=0.5))
    server.behaviour = lambda visit: visit.answer(500, b"")
    refused(server.url)
    assert pauses == [0.5, 1.0, 2.0]


def test_a_silent_server(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=2, pause=0.01, silence=0.2))
    server.behaviour = lambda visit: visit.wait()
    assert refused(server.url).endswith("for 0.2 seconds; check the network and try again")
    assert server.ranges == [(0, 8)] * 2


def test_a_server_that_falls_silent(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=2, pause=0.01, silence=0.5))

    def half(visit: Visit) -> bool:
        if visit.number == 1:
            return False
        visit.answer(body=b"", Content_Length=str(len(visit.body)))
        visit.send(visit.body[:100])
        return visit.wait()

    server.behaviour = half
    assert "for 0.5 seconds" in refused(server.url)


@pytest.mark.parametrize("part", ["head", "body"])
def test_a_server_that_drips(part: str, server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=3, pause=0.01, silence=20, piece=0.5))

    def drip(visit: Visit) -> bool:
        if part == "head":
            visit.send(b"HTTP/1.1 206 Partial Content\r\nX-Long: ")
        else:
            visit.answer(body=b"", Content_Length=str(len(visit.body)))
        while not visit.wait(0.1):
            visit.send(b"x")
        return True

    server.behaviour = drip
    assert refused(server.url).endswith("more than 0.5 seconds; check the network and try again")
    assert len(server.visits) == 1, "a slow server is not asked again"


# What is refused at once


def once(server: Server) -> str:
    """What is refused after a single request."""
    told = refused(server.url)
    assert len(server.visits) == 1
    return told


def test_a_server_without_ranges(server: Server) -> None:
    """It is noticed without downloading the file."""
    server.content = bytes(100 * 2**20)
    server.behaviour = lambda visit: visit.answer(200, server.content)
    assert "range requests; download the file and use the local copy" in once(server)
    assert server.sent < 50 * 2**20


def test_a_web_page(server: Server) -> None:
    server.behaviour = lambda visit: visit.answer(200, b"<html>", Content_Type="text/html; charset=utf-8")
    assert "web page; give the address of the nested file itself" in once(server)
    server.behaviour = lambda visit: visit.answer(body=b"<!doctype html>"[:8], Content_Type="text/html")
    assert "is a web page; download the file again" in refused(server.url)


@pytest.mark.parametrize(
    ("status", "told"),
    [
        (404, "; check the address"),
        (410, "; check the address"),
        (401, "; check the address, and the user and password"),
        (403, "; check the address, and the user and password"),
        (416, "; get an intact copy"),
        (418, "; check the address"),
        (302, "; check the address"),  # without the address to go to
        (204, "; check the address"),
    ],
)
def test_other_answers(status: int, told: str, server: Server) -> None:
    server.behaviour = lambda visit: visit.answer(status, b"" if status == 204 else b"sorry")
    assert f"(HTTP {status}){told}" in once(server)


@pytest.mark.parametrize(
    ("told", "changes"),
    [
        ("did not say which bytes", {"Content_Range": None}),
        ("did not say which bytes", {"Content_Range": "bytes 0-7/*"}),
        ("did not say which bytes", {"Content_Range": "bytes 0-7"}),
        ("did not say which bytes", {"Content_Range": f"bytes 0-7/{'9' * 5000}"}),
        ("other bytes than requested", {"Content_Range": "bytes 1-8/5000"}),
        ("other bytes than requested", {"Content_Range": "bytes 0-6/5000"}),
        ("other bytes than requested", {"Content_Range": "bytes 0-7/5"}),
        ("different number of bytes", {"Content_Length": "7", "body": b"1234567"}),
        ("different number of bytes", {"Content_Length": "4999"}),
        ("different number of bytes", {"Content_Length": None}),
        (
            "different number of bytes",
            {"Transfer_Encoding": "chunked", "Content_Length": "8", "body": b"9\r\n123456789\r\n0\r\n\r\n"},
        ),
        ("compressed", {"Content_Encoding": "gzip"}),
        ("compressed", {"Content_Encoding": "br"}),
    ],
)
def test_wrong_heads(told: str, changes: dict[str, Any], server: Server) -> None:
    server.behaviour = lambda visit: visit.answer(**changes)
    sentence = once(server)
    assert told in sentence
    assert sentence.endswith("; download the file and use the local copy")


def test_a_wrong_size(server: Server) -> None:
    size = len(server.content)

    def claim(total: int) -> None:
        server.behaviour = lambda visit: visit.answer(
            Content_Range=f"bytes {visit.bytes[0]}-{visit.bytes[1] - 1}/{total}"
        )

    claim(size - 1)
    assert "is truncated" in refused(server.url)
    claim(size + 8)
    assert "has 8 bytes after its last tensor" in refused(server.url)


@pytest.mark.parametrize("length", [0, 5, 8, 100])
def test_short_files(length: int, server: Server) -> None:
    server.content = server.content[:length]
    server.behaviour = lambda visit: not server.content and visit.answer(416, b"", Content_Range="bytes */0")
    refused(server.url)


@pytest.mark.parametrize(
    "changes",
    [
        {"ETag": '"two"'},
        {"ETag": None},
        {"ETag": None, "Last_Modified": "Mon, 23 Nov 2026 10:00:00 GMT"},
        {"Content_Range": "bytes {0}-{1}/99999"},
    ],
)
def test_a_file_that_changes(changes: dict[str, Any], server: Server) -> None:
    def change(visit: Visit) -> bool:
        places = (visit.bytes[0], visit.bytes[1] - 1)
        filled = {name: value and value.format(*places) for name, value in changes.items()}
        return visit.number > 3 and visit.answer(**filled)

    server.behaviour = change
    assert "changed on the server while it was read; read it again" in refused(server.url)
    assert len(server.visits) == 4


def test_content_that_changes_unnoticed_meets_its_hash(server: Server) -> None:
    file = open_nested_file(server.url)
    server.content = server.content[:-1] + bytes([server.content[-1] ^ 1])
    with pytest.raises(BadFileError, match=r"level 3 .* do not match their SHA-256"):
        file.state()


def test_a_redirect_in_circles(server: Server) -> None:
    server.behaviour = lambda visit: visit.answer(302, b"", Location="/again")
    assert refused(server.url).endswith("redirected too many times; check the address")
    assert len(server.visits) == 10


@pytest.mark.parametrize(
    "target", ["file:///etc/passwd", "ftp://127.0.0.1/x", "http://[", "http://127.0.0.1:99999/"]
)
def test_a_redirect_to_nowhere(target: str, server: Server) -> None:
    server.behaviour = lambda visit: visit.answer(302, b"", Location=target)
    assert "; check the address" in once(server)


def test_no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    """Told at once: no pause, no second attempt."""
    monkeypatch.delattr(remote.time, "sleep")
    with socket.socket() as taken:  # a port that nobody else gets, and that nobody listens on
        taken.bind(("127.0.0.1", 0))
        address = f"http://127.0.0.1:{taken.getsockname()[1]}/x"
        assert refused(address).endswith("; check the address and the network")


def test_a_connection_that_never_stands(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=2, pause=0.01, connect=0.3))
    with ExitStack() as sockets:
        listener = sockets.enter_context(socket.create_server(("127.0.0.1", 0), backlog=0))
        for _ in range(4):  # nobody accepts them, and the queue is full
            waiting = sockets.enter_context(socket.socket())
            waiting.setblocking(False)
            waiting.connect_ex(listener.getsockname())
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x"
        assert refused(address).endswith("within 0.3 seconds; check the address and the network")


def test_no_such_name() -> None:
    assert refused("http://nowhere.invalid/x").endswith(
        "name is not known; check the address and the network"
    )


def test_a_server_that_goes_away_is_waited_for(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is hopeless at the first request may pass later."""
    file = open_nested_file(server.url)
    assert isinstance(file.source, RemoteFile)
    client = file.source._client
    url = client._url
    client._url = url.copy_with(port=1)
    monkeypatch.setattr(remote.time, "sleep", lambda _: setattr(client, "_url", url))
    file.state()


def test_no_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        address = f"http://127.0.0.1:{listener.getsockname()[1]}/x"

        def babble() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(b"SSH-2.0-OpenSSH_9.6\r\n\r\n")

        thread = threading.Thread(target=babble)
        thread.start()
        assert refused(address).endswith("not valid HTTP; check the address")
        thread.join()


# Addresses


@pytest.mark.parametrize(
    "address",
    [
        "s3://bucket/model",
        "ftp://host/model",
        "file:///etc/passwd",
        "simplecache::https://host/model",
        "zip://inner::https://host/model.zip",
        "hf+x://owner/repo/file",
    ],
)
def test_other_kinds_of_addresses(address: str) -> None:
    assert "are not read; give a local path, or an address that begins with https://" in refused(address)


@pytest.mark.parametrize(
    "address", ["https://", "http://", "https:///x", "http://a b/x", "http://h:99999999/x", "http://a..b/x"]
)
def test_no_addresses(address: str) -> None:
    refused(address)


@pytest.mark.parametrize(
    "address", ["hf://", "hf://model", "hf://owner/repo", "hf://owner/repo/", "hf://-a-/b--c/x"]
)
def test_no_addresses_on_the_hub(address: str) -> None:
    assert "; give hf://owner/repo/file" in refused(address)


def test_local_paths_stay_local(small_file: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(small_file.parent)
    (small_file.parent / "https:").mkdir()
    small_file.rename("https:/model")
    assert open_nested_file(Path("https://model")).n_levels == 3
    assert open_nested_file("./https://model").n_levels == 3


@pytest.mark.parametrize(
    ("address", "told"),
    [
        ("https://me:secret@host/dir/x?token=secret#secret", "https://host/dir/x"),
        ("https://secret@host:8080/x", "https://host:8080/x"),
        ("https://[::1]:8080/x@v1", "https://[::1]:8080/x@v1"),
        ("https://host?secret", "https://host"),
        ("https://me:sec/ret@host/x", "https://..."),
        ("https://me:sec?ret@host/x", "https://..."),
        ("https://me@host:12/3@host/x", "https://..."),
        ("https://me:123/4@host/x", "https://..."),
        ("https://me:123?4@host/x", "https://..."),
        ("https://me:123#4@host/x", "https://..."),
        ("https://host:port/x", "https://..."),
        ("https://[::1/x", "https://..."),
        ("https://ho\nst/x", "https://..."),
        ("hf://owner/repo@main/dir/x", "hf://owner/repo@main/dir/x"),
        ("hf://owner/repo@main/dir/x?secret#secret", "hf://owner/repo@main/dir/x"),
        ("hf://owner/repo", "hf://owner/repo"),
        ("hf://me:secret@owner/repo/x", "hf://..."),
        ("hf://me:sec/ret@owner/repo/x", "hf://..."),
        ("hf://me:sec?ret@owner/repo/x", "hf://..."),
        ("hf://secret@owner/repo/x", "hf://..."),
        ("s3://key:secret@bucket/x", "s3://bucket/x"),
    ],
)
def test_secrets_are_not_shown(address: str, told: str) -> None:
    assert hide_secrets(address) == told


def refused_alone(address: str) -> str:
    """What is refused, by an error that carries no other one: the HTTP client's hold the request."""
    with pytest.raises(BadFileError, match="; ") as caught:
        open_nested_file(address)
    assert caught.value.__cause__ is None
    assert caught.value.__context__ is None
    return f"{caught.value}{caught.value!r}{''.join(traceback.format_exception(caught.value))}"


def test_secrets_are_in_no_message_and_no_log(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    secret = server.url.replace("://", "://me:hidden@") + "?token=hidden#hidden"
    encoded = base64.b64encode(b"me:hidden").decode()
    caplog.set_level(logging.DEBUG)
    for behave in (
        lambda visit: visit.answer(404, b""),
        lambda visit: visit.answer(302, b"", Location="/x?token=hidden"),
        lambda visit: visit.answer(302, b"", Location="gopher://hidden"),
        lambda visit: visit.answer(302, b"", Location="http://hidden:hidden/"),
        lambda visit: visit.answer(302, b"", Location="http://[hidden"),
        lambda visit: visit.answer(Content_Range="hidden"),
        lambda visit: visit.cut(1),
    ):
        server.behaviour = behave
        told = refused_alone(secret)
        assert "hidden" not in told
        assert encoded not in told
    server.behaviour = lambda visit: False
    assert "hidden" not in repr(vars(open_nested_file(secret).source))
    assert len(server.visits) > 20
    assert "hidden" not in caplog.text
    assert encoded not in caplog.text


def test_other_requests_are_still_logged(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
    open_nested_file(server.url)
    assert caplog.records == []
    httpx2.get(f"{server.address}/other", headers={"Range": "bytes=0-1"})
    assert "/other" in caplog.text


@pytest.mark.parametrize(
    "address",
    [
        "http://[::1/hidden",
        "https://me:hid/hidden@host/x",
        "https://me:hidden@host:port/x",
        "https://me:hidden@host:0x50/x",
        "https://me:hidden@host:-1/x",
        "https://me:hidden@host:65536/x",
        "https://me:hidden@[::g]/x",
        "https://me:hidden@/x",
        "https://me:hidden@ho\x00st/x",
        "https://me:hidden@xn--\u00e9/x",
        "http://me:hidden@host/" + 70_000 * "x",
        "hf://me:hidden@owner/repo/x",
        "hf://me:hidden@host",
        "hf://me:hid/hidden@owner/repo/x",
        "https:/me:hidden@host/x",
        "https:me:hidden@host/x",
        "hf:/me:hidden@host/x",
    ],
)
def test_malformed_addresses_with_secrets(address: str) -> None:
    told = refused_alone(address)
    assert "hid" not in told
    assert "network" not in told


@pytest.mark.parametrize("host", ["a..b", "xn--a", 70 * "a" + ".example", "nowhere.invalid"])
def test_names_that_cannot_exist(host: str) -> None:
    assert "hidden" not in refused_alone(f"https://me:hidden@{host}/x?hidden")


# Who is asked: cookies, credentials, proxies


def test_cookies_are_not_kept(server: Server) -> None:
    def moved(visit: Visit) -> bool:
        if visit.path != "/moved":
            return visit.answer(302, b"", Location="/moved", Set_Cookie="a=1; Path=/")
        return visit.answer(Set_Cookie="b=2; Path=/")

    server.behaviour = moved
    read_all(server)
    assert {visit.headers["Cookie"] for visit in server.visits} == {None}


def test_the_long_body_of_a_redirect_is_not_read(server: Server) -> None:
    body = bytes(100 * 2**20)
    server.behaviour = lambda visit: visit.path != "/moved" and visit.answer(302, body, Location="/moved")
    open_nested_file(server.url)
    assert server.sent < len(body)


def test_credentials_of_netrc(
    server: Server, small_file: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """They are for the host that the user named, and less than those in the address."""
    netrc = tmp_path / "netrc"
    netrc.write_text("machine 127.0.0.1 login me password secret\n")
    monkeypatch.setenv("NETRC", str(netrc))
    with serve(small_file.read_bytes()) as other:
        server.behaviour = lambda visit: visit.answer(302, b"", Location=other.url)
        open_nested_file(server.url)
        assert {visit.headers["Authorization"] for visit in server.visits} == {"Basic bWU6c2VjcmV0"}
        assert {visit.headers["Authorization"] for visit in other.visits} == {None}
        open_nested_file(other.url.replace("://", "://you:other@"))
        assert other.visits[-1].headers["Authorization"] == "Basic eW91Om90aGVy"


def test_a_netrc_that_cannot_be_read(
    server: Server, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    netrc = tmp_path / "netrc"
    netrc.write_text("hidden\n")
    monkeypatch.setenv("NETRC", str(netrc))
    read_all(server)
    assert str(netrc) in caplog.text
    assert "hidden" not in caplog.text
    monkeypatch.setenv("NETRC", str(tmp_path / "nowhere"))
    caplog.clear()
    read_all(server)
    assert caplog.records == []


def test_credentials_stay_when_only_the_path_changes(server: Server) -> None:
    server.behaviour = lambda visit: visit.path != "/moved" and visit.answer(302, b"", Location="/moved")
    open_nested_file(server.url.replace("://", "://me:secret@"))
    assert {visit.headers["Authorization"] for visit in server.visits} == {"Basic bWU6c2VjcmV0"}


@pytest.mark.parametrize(
    "target", ["https://example.org/x", "http://example.org:81/x", "http://www.example.org/x"]
)
def test_credentials_are_for_one_origin(target: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Here a transport answers in place of servers, which could not have these ports."""
    seen: dict[str, str | None] = {}

    def handle(request: httpx2.Request) -> httpx2.Response:
        seen[str(request.url)] = request.headers.get("Authorization")
        status, headers = (302, {"Location": target}) if len(seen) == 1 else (404, {})
        return httpx2.Response(status, headers=headers, stream=httpx2.ByteStream(b""))

    client = functools.partial(httpx2.AsyncClient, transport=httpx2.MockTransport(handle))
    monkeypatch.setattr(httpx2, "AsyncClient", client)
    refused("http://me:secret@example.org/x")
    assert seen == {"http://example.org/x": "Basic bWU6c2VjcmV0", target: None}


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("all_proxy", "socks5://me:hidden@127.0.0.1:1"),
        ("http_proxy", "http://me:hidden@127.0.0.1:port"),
        ("http_proxy", "gopher://me:hidden@127.0.0.1"),
    ],
)
def test_proxies_that_cannot_be_used(name: str, value: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "socksio", None)  # as if it were not installed
    monkeypatch.setenv(name, value)
    told = refused_alone("http://example.org/x")
    assert name in told
    assert ("pip install 'httpx2[socks]'" in told) == value.startswith("socks")
    assert "hidden" not in told


def test_no_proxy_for_some_hosts(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("http_proxy", "http://127.0.0.1:1")
    monkeypatch.setenv("no_proxy", "example.org,127.0.0.1")
    read_all(server)


def test_a_proxy_that_refuses(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    with socket.create_server(("127.0.0.1", 0)) as listener:
        monkeypatch.setenv("https_proxy", f"http://127.0.0.1:{listener.getsockname()[1]}")

        def refuse() -> None:
            connection, _ = listener.accept()
            with connection:
                connection.recv(2**16)
                connection.sendall(b"HTTP/1.1 403 hidden\r\nContent-Length: 0\r\n\r\n")

        thread = threading.Thread(target=refuse)
        thread.start()
        told = refused("https://example.org/x")
        assert "https_proxy" in told
        assert "hidden" not in told
        thread.join()


def test_certificates_that_cannot_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SSL_CERT_FILE", "/nowhere")
    assert "check SSL_CERT_FILE" in refused("https://example.org/x")


def test_threads_end_with_their_files(server: Server) -> None:
    before = threading.active_count()
    file = open_nested_file(server.url)
    assert threading.active_count() > before
    del file
    gc.collect()
    assert {thread.name for thread in threading.enumerate()}.isdisjoint({remote_client.THREAD_NAME})


# What it needs


def python(code: str, **changes: str) -> str:
    """What a fresh Python prints; a warning of it is an error."""
    environment = {**os.environ, **changes}
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", code],
        capture_output=True,
        text=True,
        env=environment,
        check=False,
        timeout=100,
    )
    assert done.stderr == ""
    return done.stdout


def opened(address: str, **changes: str) -> str:
    """What opening a file in a fresh Python prints: its number of levels, or the refusal."""
    code = (
        "from nestify.errors import BadFileError\n"
        "from nestify.file.reader import open_nested_file\n"
        f"try: print(open_nested_file({address!r}).n_levels)\n"
        "except BadFileError as error: print(error)"
    )
    return python(code, **changes)


def test_a_process_that_read_ends_quietly(server: Server) -> None:
    """It loads no torch, and no HTTP client before a server is asked; its thread ends without a word."""
    code = (
        "import sys; from nestify.file.reader import open_nested_file\n"
        "print('httpx2' in sys.modules)\n"
        f"file = open_nested_file({server.url!r}); print(file.n_levels, 'torch' in sys.modules)"
    )
    assert python(code) == "False\n3 False\n"


# Encryption: a certificate that only the test's own process trusts


def test_https(server: Server) -> None:
    with serve(server.content, tls=True) as safe:
        assert safe.url.startswith("https://127.0.0.1")
        assert opened(safe.url, SSL_CERT_FILE=str(CERTIFICATE)) == "3\n"
        told = opened(safe.url)
        assert told.startswith(f"{safe.url}: the server's certificate is not valid; check the address")
        assert "SSL_CERT_FILE" in told


def test_no_redirect_out_of_https(server: Server) -> None:
    with serve(server.content, tls=True) as safe:
        safe.behaviour = lambda visit: visit.answer(302, b"", Location=server.url)
        told = opened(safe.url, SSL_CERT_FILE=str(CERTIFICATE))
        assert told.startswith(f"{safe.url}: ")
        assert told.endswith("unencrypted address; check the address\n")
        assert server.visits == []


# The hub: a small one on loopback, which hands out its files through another server


def test_the_hub(server: Server, small_file: Path) -> None:
    with serve(small_file.read_bytes()) as store:
        store.behaviour = lambda visit: "Authorization" in visit.headers and visit.answer(400, b"")
        server.behaviour = lambda visit: visit.answer(302, b"", Location=f"{store.address}/blob?signed=yes")
        told = opened(
            "hf://owner/repo@v1.0/dir/model.safetensors",
            HF_ENDPOINT=server.address,
            HF_TOKEN="hf_secret",
            HF_HUB_OFFLINE="0",
        )
        assert told == "3\n"
        assert {visit.path for visit in server.visits} == {"/owner/repo/resolve/v1.0/dir/model.safetensors"}
        assert {visit.headers["Authorization"] for visit in server.visits} == {"Bearer hf_secret"}
        assert {visit.path for visit in store.visits} == {"/blob?signed=yes"}


@pytest.mark.parametrize("status", [401, 403, 404])
def test_unknown_on_the_hub(status: int, server: Server) -> None:
    server.behaviour = lambda visit: visit.answer(status, b"{}", X_Error_Code="RepoNotFound")
    told = opened("hf://owner/repo/x", HF_ENDPOINT=server.address, HF_HUB_OFFLINE="0")
    assert told.startswith("hf://owner/repo/x: ")
    assert told.endswith(
        f"(HTTP {status}); check owner, repository, revision and file; private ones need `hf auth login`\n"
    )


@pytest.mark.parametrize(
    ("address", "path"),
    [
        ("hf://owner/repo/x", "/owner/repo/resolve/main/x"),
        ("hf://models/owner/repo/a b", "/owner/repo/resolve/main/a%20b"),
        ("hf://datasets/owner/repo@refs%2Fpr%2F1/x", "/datasets/owner/repo/resolve/refs%2Fpr%2F1/x"),
    ],
)
def test_paths_on_the_hub(address: str, path: str, server: Server) -> None:
    assert opened(address, HF_ENDPOINT=server.address, HF_HUB_OFFLINE="0") == "3\n"
    assert {visit.path for visit in server.visits} == {path}


def test_the_hub_switched_off_or_away() -> None:
    told = opened("hf://owner/repo/x", HF_HUB_OFFLINE="1")
    assert told.startswith("hf://owner/repo/x: HF_HUB_OFFLINE ")
    assert told.endswith("; unset it\n")
    told = opened("hf://owner/repo/x", HF_HUB_OFFLINE="0", HF_ENDPOINT="http://nowhere.invalid")
    assert told.startswith("hf://owner/repo/x: ")
    assert told.endswith("; check the address and the network\n")
