"""ONNX Runtime Web: the files that the page needs, from the npm registry, a cache or a folder.

They are not part of nestify. The version is fixed, and the hash of every file is checked, wherever it comes
from.
"""

import hashlib
import os
import tarfile
from base64 import b64encode
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import BinaryIO

import httpx2

from nestify.engine.library import cache_folder
from nestify.errors import SetupError, foreign_reason
from nestify.files import atomic_file
from nestify.terminal import Progress

PACKAGE = "onnxruntime-web"
VERSION = "1.30.0"
INTEGRITY = "sha512-q0y+JrrtukXSzsBWEMccVfqX25LRmosXHF+CaRJmg8pZClzcV7svNc4rKY3jL02Vb7QmRMDs1SigqR4CXAfKYQ=="
"""What the registry states for the package's archive."""

FILES: Mapping[str, str] = {
    "ort.wasm.min.mjs": "219e6a1fc8a9938268d18efca3c91d310bd2f4a59bbd13744df5b2b7fc6cee3b",
    "ort-wasm-simd-threaded.mjs": "e13f7f94fc51b4ca72b12faeb1ee95f4ace6dfbc8939bc718aabdc0a27c4299b",
    "ort-wasm-simd-threaded.wasm": "3398c10d07d229bd91b364548e130e0e51a8e5704b88c7c083ebbeb78842dee2",
}
"""The files that the page needs, with their SHA-256 in hexadecimal."""

MAX_ARCHIVE_BYTES = 2**26
REGISTRY = "https://registry.npmjs.org"
REGISTRY_VARIABLE = "npm_config_registry"
"""Environment variable by which npm knows another registry."""

REMEDY = (
    f"give --runtime FOLDER with the files of {PACKAGE} {VERSION}, as npm pack {PACKAGE}@{VERSION} gets them"
)

LICENSES: Mapping[str, str] = {
    "LICENSE": "onnxruntime-LICENSE.txt",
    "ThirdPartyNotices.txt": "onnxruntime-ThirdPartyNotices.txt",
}
"""Files of the Python package onnxruntime, which is of the same project, and their names next to the page."""


def runtime_files(folder: Path | None = None, progress: Progress | None = None) -> dict[str, Path]:
    """Return the path of each file of ONNX Runtime Web, by its name; downloaded into the cache if necessary.

    Args:
        folder: where the files are; a folder of the npm package will do. None for the cache.
        progress: called with the bytes that were downloaded, and their total.

    Raises:
        SetupError: if a file is missing or of another version, or cannot be downloaded.
    """
    if folder is not None:
        return {name: _in_folder(folder, name) for name in FILES}
    cache = cache_folder().parent / f"{PACKAGE}-{VERSION}"
    found = {name: cache / name for name in FILES}
    if not all(_has_hash(path, FILES[name]) for name, path in found.items()):
        _download(cache, progress or (lambda done, total: None))
    return found


def license_files() -> dict[str, bytes]:
    """Return licence and notices of ONNX Runtime by their names next to the page."""
    spec = find_spec("onnxruntime")
    places = [Path(spec.origin).parent] if spec and spec.origin else []
    own = Path(__file__).parents[1] / "engine" / "native" / "onnxruntime"  # the same licence
    found = {}
    for name, target in LICENSES.items():
        path = next((place / name for place in (*places, own) if (place / name).is_file()), None)
        if path is not None:
            found[target] = path.read_bytes()
    return found


def _in_folder(folder: Path, name: str) -> Path:
    places = [
        folder,
        folder / "dist",
        folder / "package" / "dist",
        folder / "node_modules" / PACKAGE / "dist",
    ]
    path = next((place / name for place in places if (place / name).is_file()), None)
    if path is None:
        raise SetupError(f"{folder}: does not hold {name}; {REMEDY}")
    if not _has_hash(path, FILES[name]):
        raise SetupError(f"{path}: is not the file of {PACKAGE} {VERSION}; {REMEDY}")
    return path


def _has_hash(path: Path, sha256: str) -> bool:
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest() == sha256
    except OSError:
        return False


def _download(cache: Path, progress: Progress) -> None:
    """Download the package's archive, and put the files that the page needs into the cache.

    Raises:
        SetupError: if that is not possible.
    """
    registry = os.environ.get(REGISTRY_VARIABLE, REGISTRY).rstrip("/")
    address = f"{registry}/{PACKAGE}/-/{PACKAGE}-{VERSION}.tgz"
    with _errors(address):
        cache.mkdir(parents=True, exist_ok=True)
        with atomic_file(cache / "archive.tgz") as archive:
            _fetch(address, archive, progress)
        try:
            _unpack(cache)
        finally:
            (cache / "archive.tgz").unlink()


def _fetch(address: str, archive: BinaryIO, progress: Progress) -> None:
    """Write an archive to a file, and check its hash.

    Raises:
        SetupError: if the server does not have the file, or its contents differ.
    """
    digest = hashlib.sha512()
    done = 0
    with httpx2.stream("GET", address, follow_redirects=True, timeout=30) as answer:
        if answer.status_code != 200:
            raise SetupError(f"{address}: the registry answered with HTTP {answer.status_code}; {REMEDY}")
        total = int(answer.headers.get("Content-Length", 0))
        for part in answer.iter_bytes():
            done += len(part)
            if done > MAX_ARCHIVE_BYTES:
                break
            digest.update(part)
            archive.write(part)
            progress(done, total)
    if f"sha512-{b64encode(digest.digest()).decode()}" != INTEGRITY:
        raise SetupError(f"{address}: does not have the contents of {PACKAGE} {VERSION}; {REMEDY}")


def _unpack(cache: Path) -> None:
    with tarfile.open(cache / "archive.tgz", "r:gz") as archive:
        for name, sha256 in FILES.items():
            member = archive.extractfile(f"package/dist/{name}")
            assert member is not None, "the archive with this hash has the file"
            content = member.read()
            assert hashlib.sha256(content).hexdigest() == sha256
            with atomic_file(cache / name) as file:
                file.write(content)


@contextmanager
def _errors(address: str) -> Iterator[None]:
    """Turn failures of the network and of the file system into a SetupError.

    Raises:
        SetupError: with the remedy.
    """
    try:
        yield
    except (httpx2.HTTPError, httpx2.InvalidURL, OSError) as error:
        raise SetupError(f"{address}: cannot be downloaded ({foreign_reason(error)}); {REMEDY}") from error
