"""`nestify demo`: the folder, and the page in a real browser."""

import json
import signal
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import onnx
import pytest
import torch
from PIL import Image
from timm.data import create_transform

import nestify
from nestify.demo.runtime import runtime_files
from nestify.demo.serve import RangeHandler
from nestify.errors import SetupError
from nestify.file.reader import open_nested_file
from tests.cli.conftest import Refused
from tests.cli.driver import Outcome, finish, spawn
from tests.cli.driver import nestify as run
from tests.demo.browser import CHROMIUM, Tab, open_browser
from tests.demo.serving import serving

PAGE = {
    "index.html",
    "style.css",
    "demo.js",
    "nested.js",
    "pixels.js",
    "demo.json",
    "model.nested.safetensors",
}


@pytest.fixture(scope="module")
def runtime() -> Path:
    """Return the folder with ONNX Runtime Web: from the cache, or from the registry if there is a network."""
    try:
        return runtime_files()["ort.wasm.min.mjs"].parent
    except SetupError as error:
        pytest.skip(str(error))


@pytest.fixture(scope="module")
def picture(digits_folder: Path) -> Path:
    return sorted((digits_folder / "validation" / "3").iterdir())[0]


@pytest.fixture(scope="module")
def written(
    runtime: Path, digits_file: Path, picture: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Outcome]:
    """A folder of the page, and what the command printed."""
    folder = tmp_path_factory.mktemp("demo") / "page"
    words = ("--runtime", runtime, "--picture", picture, "--json")
    return folder, run("demo", digits_file, "-o", folder, *words)


def test_the_folder(written: tuple[Path, Outcome], digits_file: Path) -> None:
    folder, done = written
    assert (done.code, done.err) == (0, "")
    names = {path.name for path in folder.iterdir()}
    assert names >= PAGE
    assert (folder / "model.nested.safetensors").read_bytes() == digits_file.read_bytes()
    assert done.document["bytes"] == sum(path.stat().st_size for path in folder.iterdir())


def test_weights_are_in_the_nested_file_alone(written: tuple[Path, Outcome], digits_file: Path) -> None:
    folder, done = written
    file = open_nested_file(digits_file)
    about = json.loads((folder / "demo.json").read_text())
    for number, level in enumerate(about["levels"], start=1):
        graph = folder / level["graph"]
        assert graph.stat().st_size == level["bytes"] < 60_000
        inside = onnx.load(graph, load_external_data=False).graph.initializer
        outside = [tensor for tensor in inside if tensor.data_location == onnx.TensorProto.EXTERNAL]
        assert all(len(tensor.raw_data) < 64 for tensor in inside if tensor not in outside)
        weights = nestify.load(digits_file, level=number).state_dict().values()
        large = [weight.nbytes for weight in weights if weight.is_floating_point() and weight.nbytes >= 64]
        assert sum(int(tensor.external_data[2].value) for tensor in outside) == sum(large)
        assert all(tensor["offset"] % 64 == 0 for tensor in level["tensors"])
        fetched = done.document["levels"][number - 1]["fetched_bytes"]
        assert fetched == file.prefix_bytes(number) + level["bytes"]


def asked_ranges(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, str]]:
    """Return a list to which the server adds path and range of every request."""
    asked: list[tuple[str, str]] = []
    send_head = RangeHandler.send_head

    def record(handler: RangeHandler) -> Any:
        asked.append((handler.path, handler.headers.get("Range", "")))
        return send_head(handler)

    monkeypatch.setattr(RangeHandler, "send_head", record)
    return asked


@pytest.fixture
def tab() -> Iterator[Tab]:
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    with open_browser() as opened:
        yield opened


def shown(tab: Tab, level: int) -> dict[str, str]:
    """Return the classes that a level shows, with their shares."""
    find = f"document.querySelectorAll('.level')[{level - 1}].querySelectorAll('.classes li')"
    tab.wait(f"{find}.length && !document.querySelector('.running')")
    lines = tab.evaluate(
        f"[...{find}].map((line) => [...line.querySelectorAll('span')].map((s) => s.textContent))"
    )
    return dict(lines)


def predicted(file: Path, level: int, picture: Path) -> dict[str, str]:
    """Return the same from Python."""
    opened = open_nested_file(file)
    options = opened.manifest.model.preprocessing.model_dump()
    del options["exif_orientation"]
    prepare = create_transform(**options)
    with torch.no_grad():
        images = prepare(Image.open(picture).convert("RGB")).unsqueeze(0)
        shares = nestify.load(file, level=level)(images).softmax(-1)[0]
    names = opened.manifest.class_names(level)
    assert names is not None
    return {
        names[index]: f"{100 * shares[index]:.1f} %" for index in shares.argsort(descending=True)[:5].tolist()
    }


def agree(found: dict[str, str], expected: dict[str, str]) -> None:
    """Compare classes and shares, up to the last digit that is shown."""
    common = found.keys() & expected.keys()
    assert len(common) >= 4
    assert next(iter(found)) == next(iter(expected))
    for name in common:
        assert abs(float(found[name][:-2]) - float(expected[name][:-2])) < 0.15, (found, expected)


def test_a_browser_fetches_a_level_and_runs_it(
    written: tuple[Path, Outcome], digits_file: Path, picture: Path, tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, _ = written
    asked = asked_ranges(monkeypatch)
    file = open_nested_file(digits_file)
    ends = [file.prefix_bytes(level) for level in (1, 2, 3)]

    def of_the_file() -> list[str]:
        return [range for path, range in asked if path == "/model.nested.safetensors"]

    with serving(folder) as address:
        tab.open(f"{address}/")
        assert of_the_file() == ["bytes=0-7", f"bytes=8-{file.header_bytes - 1}"]
        tab.choose_file("#choose", picture)
        agree(shown(tab, 1), predicted(digits_file, 1, picture))
        assert of_the_file()[2:] == [f"bytes={file.header_bytes}-{ends[0] - 1}"]
        assert tab.evaluate("document.querySelectorAll('.level .time')[0].textContent").endswith(" ms")

        tab.evaluate("document.querySelectorAll('.level button')[2].click()")
        agree(shown(tab, 3), predicted(digits_file, 3, picture))
        assert of_the_file()[3:] == [f"bytes={ends[0]}-{ends[2] - 1}"]

        tab.evaluate("document.querySelectorAll('.level button')[1].click()")
        agree(shown(tab, 2), predicted(digits_file, 2, picture))
        assert len(of_the_file()) == 4
        assert "level2.onnx" in asked[-1][0]
    assert tab.errors == []
    assert tab.evaluate("document.getElementById('problem').hidden")


def test_an_example_and_a_file_that_is_no_picture(
    written: tuple[Path, Outcome], tab: Tab, tmp_path: Path
) -> None:
    (tmp_path / "no.png").write_text("no picture")
    with serving(written[0]) as address:
        tab.open(f"{address}/")
        tab.choose_file("#choose", tmp_path / "no.png")
        tab.wait("!document.getElementById('problem').hidden")
        assert "picture" in tab.evaluate("document.getElementById('problem').textContent")
        tab.evaluate("document.querySelector('#samples button').click()")
        assert len(shown(tab, 1)) == 5
        assert tab.evaluate("document.getElementById('problem').hidden")


def test_names_in_the_file_are_text(written: tuple[Path, Outcome], tab: Tab, tmp_path: Path) -> None:
    """The page shows hostile names, and does not run them."""
    folder = tmp_path / "hostile"
    folder.mkdir()
    for path in written[0].iterdir():
        (folder / path.name).write_bytes(path.read_bytes())
    data = (folder / "model.nested.safetensors").read_bytes()
    name = '<img src=x onerror="x=1">'
    length = int.from_bytes(data[:8], "little")
    header = json.loads(data[8 : 8 + length])
    manifest = json.loads(header["__metadata__"]["nestify.manifest"])
    manifest["model"]["class_names"] = [name] * 10
    manifest["model"]["architecture"] = manifest["levels"][0]["name"] = name
    header["__metadata__"]["nestify.manifest"] = json.dumps(manifest)
    text = json.dumps(header).encode()
    (folder / "model.nested.safetensors").write_bytes(
        len(text).to_bytes(8, "little") + text + data[8 + length :]
    )
    with serving(folder) as address:
        tab.open(f"{address}/")
        tab.evaluate("document.querySelector('#samples button').click()")
        assert list(shown(tab, 1)) == [name]
        assert tab.evaluate("document.querySelector('h3').textContent") == name
        assert tab.evaluate("document.querySelectorAll('img').length") == 1  # the example
        assert tab.evaluate("typeof x") == "undefined"


def test_a_server_without_ranges_is_named(
    written: tuple[Path, Outcome], tab: Tab, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(RangeHandler, "send_head", RangeHandler.__mro__[1].send_head)  # type: ignore[attr-defined]
    with serving(written[0]) as address:
        tab.open(f"{address}/")
        assert "--serve" in tab.evaluate("document.getElementById('problem').textContent")


def test_serving_ends_with_ctrl_c(written: tuple[Path, Outcome]) -> None:
    process = spawn("demo", written[0], "--serve", "0")
    assert process.stderr is not None
    line = process.stderr.readline()
    address = line.split(" at ")[1].split()[0]
    assert httpx2.get(f"{address}demo.json", trust_env=False).status_code == 200
    time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    done = finish(process)
    assert (done.code, done.out, done.err) == (0, "", "")


def test_refusals(refused: Refused, digits_file: Path, tmp_path: Path) -> None:
    (tmp_path / "x.txt").write_text("x")
    np.save(tmp_path / "x.npy", np.zeros(1))
    assert "-o folder/" in refused(2, "demo", digits_file)
    assert "--serve" in refused(2, "demo", digits_file, "-o", "page", "--serve", "x")
    assert "nestify demo" in refused(2, "demo", ".", "--serve", "8000")
    assert "new one" in refused(3, "demo", digits_file, "-o", ".")
    assert "check the path" in refused(3, "demo", digits_file, "-o", "page", "--picture", "no.png")
    assert ".jpg" in refused(3, "demo", digits_file, "-o", "page", "--picture", "x.txt")
    assert "--runtime" in refused(3, "demo", digits_file, "-o", "page", "--runtime", ".")
