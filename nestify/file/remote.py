"""Nested files on a server, read with range requests.

An address `hf://` is turned into the hub's own https address of the file, so that one path serves both.
`remote_client` sends the requests, and `remote_answers` checks each answer before its body is read.
"""

import os
import re
import time
from urllib.parse import unquote

from nestify.addresses import HUB_ADDRESS, hide_secrets
from nestify.errors import BadFileError
from nestify.file.remote_answers import AnswerChecks, TransientError
from nestify.file.remote_client import Patience, RangeClient
from nestify.file.source import ByteSource, LocalFile, piece_ranges

SCHEMES = ("https", "http", "hf")

START_BYTES = 8
"""Bytes of the first request: they state the header's length, and the answer states the file's size."""

PATIENCE = Patience()


def open_source(path: str | os.PathLike[str]) -> ByteSource:
    """Open a local path, or an address `https://`, `http://` or `hf://owner/repo/file`.

    Raises:
        BadFileError: if there is no such file, or the address is of another kind.
    """
    text = os.fspath(path)
    kind, separator, _ = text.partition("://")
    if not separator or not re.fullmatch("[A-Za-z][A-Za-z0-9+.:-]*", kind):
        scheme = text.partition(":")[0]
        if scheme.lower() in SCHEMES and text != scheme and not os.path.lexists(text):
            raise BadFileError(f"{scheme}:...: there is no such file; begin an address with {scheme}://")
        return LocalFile(path)
    if kind.lower() in SCHEMES:
        return RemoteFile(text)
    raise BadFileError(
        f"{hide_secrets(text)}: addresses that begin with {kind}:// are not read; give a local path, or an "
        "address that begins with https://, http:// or hf://"
    )


class RemoteFile:
    """A file on a server. After a lost connection, only the piece that was being read is requested again.

    Args:
        address: `https://...`, `http://...` or `hf://owner/repo[@revision]/file`.

    Attributes:
        name: the address without secrets.
        size: bytes of the file.

    Raises:
        BadFileError: on construction, if the file cannot be read in ranges.
    """

    def __init__(self, address: str) -> None:
        self.name = hide_secrets(address)
        self._patience = PATIENCE
        on_hub = address.lower().startswith("hf://")
        url, headers = _resolve_hub_address(address, self.name) if on_hub else (address, {})
        self._checks = AnswerChecks(self.name, on_hub)
        self._client = RangeClient(url, headers, self.name, self._checks, self._patience)
        self._start = self._read_piece(0, START_BYTES)
        assert self._checks.version is not None, "every answer that passed the checks has a version"
        self.size = self._checks.version.size

    def read(self, offset: int, length: int) -> bytearray:
        """See `ByteSource.read`."""
        if (offset, length) == (0, len(self._start)):
            return bytearray(self._start)
        data = bytearray()
        for begin, size in piece_ranges(offset, length):
            data += self._read_piece(begin, begin + size)
        return data

    def _read_piece(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of the file, or those of them that exist. Transient failures are tried again."""
        for attempt in range(1, self._patience.attempts + 1):
            try:
                return self._client.fetch(begin, end)
            except TransientError as error:
                # A server that never answered is likely not to exist, so there is no second attempt.
                if attempt == self._patience.attempts or (error.unreached and not self._checks.version):
                    raise
            time.sleep(self._patience.pause * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")


def _resolve_hub_address(address: str, name: str) -> tuple[str, dict[str, str]]:
    """Return the hub's https address of a file, and the headers for it: a user agent, and the token if any.

    Raises:
        BadFileError: if the address names no file, or huggingface_hub is set to stay offline.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    found = HUB_ADDRESS.fullmatch(address)
    if found is None:
        raise BadFileError(f"{name}: this does not name a file on the hub; give hf://owner/repo/file")
    if constants.HF_HUB_OFFLINE:
        raise BadFileError(f"{name}: HF_HUB_OFFLINE forbids access to the hub; unset it")
    kind = (found["kind"] or "models").lower().removesuffix("s")
    revision = unquote(found["revision"]) if found["revision"] else None
    try:
        return hf_hub_url(found["repo"], found["file"], repo_type=kind, revision=revision), build_hf_headers()
    except ValueError:
        problem = "this is not the name of a repository on the hub; give hf://owner/repo/file"
    raise BadFileError(f"{name}: {problem}")
