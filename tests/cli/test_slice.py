"""`nestify slice`: files and servers, new slices and upgraded ones, and interrupted runs."""

import signal
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestify.file import remote, source
from nestify.file.reader import open_nested_file
from nestify.file.remote_client import Patience
from tests.cli.conftest import Refused
from tests.cli.driver import at_terminal, finish, nestify, spawn
from tests.cli.test_start import loaded_by
from tests.file.loopback import Server, Visit, serve


@pytest.fixture
def server(digits_file: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr(remote, "PATIENCE", Patience(attempts=2, pause=0.01))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    with serve(digits_file.read_bytes()) as running:
        yield running


def scores(*words: str | Path) -> list[dict[str, object]]:
    """Return what `eval` measures, except for speed."""
    levels = nestify("eval", *words, "--data", "embedded/digits", "--max-images", "50", "--json").document[
        "levels"
    ]
    return [{key: value for key, value in level.items() if key != "images_per_second"} for level in levels]


def test_a_slice_is_a_nested_file_like_any_other(digits_file: Path) -> None:
    done = nestify("slice", digits_file, "--level", "2", "-o", "two.safetensors")
    assert (done.code, done.err) == (0, "")
    size = Path("two.safetensors").stat().st_size
    read = open_nested_file(digits_file).prefix_bytes(2)
    assert done.out.splitlines() == [
        "two.safetensors: levels 1 (level1), 2 (level2)",
        f"{size / 2**20:.2f} MiB written, {read / 2**20:.2f} MiB read from {digits_file}",
    ]
    assert scores("two.safetensors") == scores(digits_file)[:2]
    whole = nestify("report", digits_file, "--json").document["levels"]
    own = nestify("report", "two.safetensors", "--json").document["levels"]
    for level in (*whole, *own):
        del level["prefix_bytes"]  # the header of a slice is shorter
    assert own == whole[:2]


def test_json(digits_file: Path) -> None:
    new = nestify("slice", digits_file, "--level", "level1", "-o", "slice", "--json").document
    first = Path("slice").stat().st_size
    grown = nestify("slice", digits_file, "--level", "3", "--upgrade", "slice", "--json").document
    same = nestify("slice", digits_file, "--level", "3", "--upgrade", "slice", "--json").document
    file = open_nested_file(digits_file)
    levels = [{"level": number, "name": f"level{number}"} for number in (1, 2, 3)]
    common = {"schema_version": 1, "source": str(digits_file), "path": "slice"}
    assert new == {
        **common,
        "levels": levels[:1],
        "bytes_written": first,
        "bytes_read": file.prefix_bytes(1),
    }
    assert grown == {
        **common,
        "levels": levels,
        "bytes_written": digits_file.stat().st_size,
        "bytes_read": file.header_bytes + file.prefix_bytes(3) - file.prefix_bytes(1),
    }
    assert same == {**common, "levels": levels, "bytes_written": 0, "bytes_read": file.header_bytes}
    assert Path("slice").read_bytes() == digits_file.read_bytes()


def test_nothing_to_add(digits_file: Path) -> None:
    nestify("slice", digits_file, "--level", "1", "-o", "slice")
    before = Path("slice").stat()
    done = nestify("slice", digits_file, "--level", "1", "--upgrade", "slice")
    assert done.code == 0
    assert done.out.startswith("slice: already has levels 1 (level1), so nothing was written\n")
    assert (Path("slice").stat().st_ino, Path("slice").stat().st_mtime_ns) == (
        before.st_ino,
        before.st_mtime_ns,
    )


def test_a_truncated_file_is_rescued(digits_file: Path, refused: Refused) -> None:
    file = open_nested_file(digits_file)
    Path("cut").write_bytes(digits_file.read_bytes()[: file.prefix_bytes(2) + 5])
    assert "keep them with `nestify slice` and --level 2" in refused(3, "report", "cut")
    refused(3, "slice", "cut", "--level", "3", "-o", "slice")
    assert nestify("slice", "cut", "--level", "2", "-o", "slice").code == 0
    assert nestify("report", "slice").code == 0


def test_usage(digits_file: Path, refused: Refused) -> None:
    one = "give either --output, to write a new slice, or --upgrade, to add levels to an existing one"
    assert refused(2, "slice", digits_file, "--level", "1") == one
    assert refused(2, "slice", digits_file, "--level", "1", "-o", "a", "--upgrade", "b") == one
    assert "no level '9'" in refused(2, "slice", digits_file, "--level", "9", "-o", "a")
    assert nestify("slice", digits_file, "-o", "a").code == 2
    nestify("slice", digits_file, "--level", "2", "-o", "two")
    assert "slice to a new file" in refused(2, "slice", digits_file, "--level", "1", "--upgrade", "two")


def test_refusals(digits_file: Path, refused: Refused, tmp_path: Path) -> None:
    level = ("--level", "1")
    assert "there is no such file" in refused(3, "slice", "nowhere", *level, "-o", "a")
    assert "there is no such file" in refused(3, "slice", digits_file, *level, "--upgrade", "nowhere")
    assert "are not read" in refused(3, "slice", "s3://bucket/model", *level, "-o", "a")
    assert "choose another path" in refused(3, "slice", digits_file, *level, "-o", digits_file)
    assert "choose a folder that exists" in refused(3, "slice", digits_file, *level, "-o", "no/where")
    assert "is not a regular file" in refused(3, "slice", digits_file, *level, "-o", tmp_path)


# From a server


def test_from_a_server(server: Server, digits_file: Path) -> None:
    address = server.url.replace("://", "://me:secret@") + "?token=secret"
    done = nestify("slice", address, "--level", "1", "-o", "slice", "--json")
    assert (done.code, done.err) == (0, "")
    assert done.document["source"] == server.url
    assert done.document["bytes_read"] == server.sent == open_nested_file(digits_file).prefix_bytes(1)
    assert nestify("slice", server.url, "--level", "3", "--upgrade", "slice").code == 0
    assert Path("slice").read_bytes() == digits_file.read_bytes()


@pytest.mark.parametrize("status", [200, 404, 500])
def test_a_server_that_fails(status: int, server: Server, refused: Refused) -> None:
    server.behaviour = lambda visit: visit.number > 2 and visit.answer(status, b"")
    message = refused(3, "slice", server.url, "--level", "3", "-o", "digits.nested.safetensors")
    assert message.startswith(f"{server.url}: ")


@pytest.mark.parametrize(
    "address",
    [
        "http://[::1/x",
        "https://me:hid/hidden@host/x",
        "https://me:hidden@host:port/x",
        "https:/me:hidden@host/x",
        "hf://me:hidden@owner/repo/x",
    ],
)
def test_malformed_addresses(address: str, refused: Refused) -> None:
    assert "hid" not in refused(3, "slice", address, "--level", "1", "-o", "a")
    traced = nestify("slice", address, "--level", "1", "-o", "a", "--traceback")
    assert (traced.code, traced.out) == (3, "")
    assert "Traceback" in traced.err
    assert "hid" not in traced.err


def test_verbose_shows_no_secrets(server: Server) -> None:
    address = server.url.replace("://", "://me:hidden@") + "?token=hidden"
    done = finish(spawn("slice", address, "--level", "1", "-o", "a", "--verbose"))
    assert done.code == 0
    assert "hidden" not in done.out + done.err
    server.behaviour = lambda visit: visit.answer(302, b"", Location="http://[hidden")
    done = finish(spawn("slice", address, "--level", "1", "-o", "a", "--verbose", "--traceback"))
    assert done.code == 3
    assert "Traceback" in done.err
    assert "hidden" not in done.err


@pytest.mark.parametrize(
    ("moment", "number", "code", "word"),
    [
        ("head", signal.SIGINT, 130, "interrupted"),
        ("body", signal.SIGTERM, 143, "terminated"),
        pytest.param("head", signal.SIGTERM, 143, "terminated", marks=pytest.mark.long),
        pytest.param("body", signal.SIGINT, 130, "interrupted", marks=pytest.mark.long),
    ],
)
def test_signals_while_a_server_is_slow(
    number: int, code: int, word: str, moment: str, server: Server, tmp_path: Path
) -> None:
    output = tmp_path / "slice"
    output.write_bytes(b"an older file")
    process = None

    def stop(visit: Visit) -> bool:
        """Send the signal while the transfer makes no progress."""
        if visit.number < 3:
            return False
        if moment == "body":
            visit.answer(body=b"", Content_Length=str(len(visit.body)))
            visit.send(visit.body[:5000])
        assert process is not None
        process.send_signal(number)
        return visit.wait()

    server.behaviour = stop
    process = spawn("slice", server.url, "--level", "3", "-o", output)
    done = finish(process)
    assert (done.code, done.out) == (code, "")
    assert done.err == f"nestify: {word}; no output was written\n"
    assert output.read_bytes() == b"an older file"
    assert list(tmp_path.iterdir()) == [output]


def test_a_bar_at_a_terminal_only(server: Server, monkeypatch: pytest.MonkeyPatch) -> None:
    """The server delays the transfer until the bar has been drawn."""
    server.behaviour = lambda visit: visit.number == 3 and visit.wait(0.5)
    text = "\n".join(at_terminal(80, "slice", server.url, "--level", "3", "-o", "slice"))
    assert "━━━━" in text
    assert "slice: levels 1 (level1), 2 (level2), 3 (level3)" in text
    piped = finish(spawn("slice", server.url, "--level", "3", "-o", "slice"))
    assert (piped.code, piped.err) == (0, "")


def test_pieces_of_a_large_file(server: Server, monkeypatch: pytest.MonkeyPatch, digits_file: Path) -> None:
    monkeypatch.setattr(source, "PIECE_BYTES", 100_000)
    assert nestify("slice", server.url, "--level", "3", "-o", "slice").code == 0
    assert len(server.visits) > digits_file.stat().st_size / 100_000
    assert Path("slice").read_bytes() == digits_file.read_bytes()


def test_it_imports_no_torch(server: Server, digits_file: Path) -> None:
    assert loaded_by("slice", "--help") == "loaded: [] code: 0"
    assert loaded_by("slice", str(digits_file), "--level", "1", "-o", "a") == "loaded: [] code: 0"
    assert loaded_by("slice", server.url, "--level", "2", "--upgrade", "a") == "loaded: [] code: 0"
