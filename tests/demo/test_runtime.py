"""ONNX Runtime Web comes from the registry, the cache or a folder, and only in the version that was tried."""

import hashlib
import io
import tarfile
from base64 import b64encode
from collections.abc import Iterator
from pathlib import Path

import pytest

from nestify.demo import runtime
from nestify.demo.runtime import FILES, license_files, runtime_files
from nestify.errors import SetupError
from tests.demo.serving import serving

CONTENT = {name: f"content of {name}".encode() for name in FILES}


def archive(files: dict[str, bytes]) -> bytes:
    """Return an npm package with files in its folder `dist`."""
    packed = io.BytesIO()
    with tarfile.open(fileobj=packed, mode="w:gz") as tar:
        for name, content in files.items():
            member = tarfile.TarInfo(f"package/dist/{name}")
            member.size = len(content)
            tar.addfile(member, io.BytesIO(content))
    return packed.getvalue()


@pytest.fixture
def registry(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """Serve a registry whose package is the expected one; yields the path of its archive."""
    packed = archive({**CONTENT, "../../evil": b"x"})
    integrity = f"sha512-{b64encode(hashlib.sha512(packed).digest()).decode()}"
    monkeypatch.setattr(runtime, "INTEGRITY", integrity)
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in CONTENT.items()}
    monkeypatch.setattr(runtime, "FILES", hashes)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    place = tmp_path / "registry" / runtime.PACKAGE / "-" / f"{runtime.PACKAGE}-{runtime.VERSION}.tgz"
    place.parent.mkdir(parents=True)
    place.write_bytes(packed)
    with serving(tmp_path / "registry") as address:
        monkeypatch.setenv("npm_config_registry", f"{address}/")
        yield place


def test_files_are_downloaded_once(registry: Path) -> None:
    steps: list[tuple[int, int]] = []
    found = runtime_files(progress=lambda done, total: steps.append((done, total)))
    assert {name: path.read_bytes() for name, path in found.items()} == CONTENT
    assert steps[-1] == (registry.stat().st_size,) * 2
    assert {path.name for path in found[next(iter(FILES))].parent.iterdir()} == set(FILES)
    registry.unlink()
    assert runtime_files() == found


def test_a_cache_that_was_changed_is_not_used(registry: Path) -> None:
    path = runtime_files()["ort.wasm.min.mjs"]
    path.write_text("changed")
    assert runtime_files()["ort.wasm.min.mjs"].read_bytes() == CONTENT["ort.wasm.min.mjs"]


def test_another_archive_is_refused(registry: Path, tmp_path: Path) -> None:
    registry.write_bytes(archive(dict.fromkeys(FILES, b"evil")))
    with pytest.raises(SetupError, match="--runtime"):
        runtime_files()
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]


def test_without_a_registry(registry: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry.unlink()
    with pytest.raises(SetupError, match=r"404.*--runtime"):
        runtime_files()
    monkeypatch.setenv("npm_config_registry", "http://127.0.0.1:1")
    with pytest.raises(SetupError, match="--runtime"):
        runtime_files()


@pytest.mark.parametrize("place", [".", "dist", "node_modules/onnxruntime-web/dist", "package/dist"])
def test_files_in_a_folder(place: str, registry: Path, tmp_path: Path) -> None:
    folder = tmp_path / "own" / place
    folder.mkdir(parents=True)
    for name, content in CONTENT.items():
        (folder / name).write_bytes(content)
    registry.unlink()
    assert set(runtime_files(tmp_path / "own")) == set(FILES)
    (folder / "ort.wasm.min.mjs").write_text("another version")
    with pytest.raises(SetupError, match=runtime.VERSION):
        runtime_files(tmp_path / "own")
    (folder / "ort.wasm.min.mjs").unlink()
    with pytest.raises(SetupError, match=r"ort\.wasm\.min\.mjs"):
        runtime_files(tmp_path / "own")


def test_the_licence_goes_along() -> None:
    found = license_files()
    assert b"MIT License" in found["onnxruntime-LICENSE.txt"]
