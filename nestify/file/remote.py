"""Nested files on a server: range requests through fsspec, every answer checked before its body is read.

fsspec's file system for HTTP reads whatever a server answers, a whole file in place of a range too. So
the session that it uses checks each answer's head first: status, range, length, version. An address
`hf://` is turned into the hub's own address of the file, so that one path serves both.
"""

import os
import re
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any
from urllib.parse import unquote, urlsplit

from nestify.errors import BadFileError
from nestify.file.source import LocalFile, Source, piece_ranges

if TYPE_CHECKING:
    from aiohttp import ClientHandlerType, ClientRequest, ClientResponse

SCHEMES = ("https", "http", "hf")

START_BYTES = 8
"""Bytes of the first request: the length of the header, and with it the size of the file."""

CHECK = "check the address"
CHECK_BOTH = "check the address and the network"
TRY_AGAIN = "check the network and try again"
DOWNLOAD = "download it whole and use the local copy"


@dataclass(frozen=True)
class Patience:
    """How long a server is waited for.

    Attributes:
        attempts: for each piece.
        pause: seconds before the second attempt; twice as long before each that follows.
        connect: seconds until the name is known and a connection stands.
        silence: seconds without a byte.
        piece: seconds for one piece, however steadily its bytes drip.
    """

    attempts: int = 4
    pause: float = 1.0
    connect: float = 15.0
    silence: float = 30.0
    piece: float = 600.0


PATIENCE = Patience()


def open_source(path: str | os.PathLike[str]) -> Source:
    """The bytes of a local path, or of an address `https://`, `http://`, `hf://owner/repo/file`.

    Raises:
        BadFileError: if there is no such file, or the address is of another kind.
    """
    text = os.fspath(path)
    kind, separator, _ = text.partition("://")
    if not separator or not re.fullmatch("[A-Za-z][A-Za-z0-9+.:-]*", kind):
        return LocalFile(path)
    if kind.lower() in SCHEMES:
        return RemoteFile(text)
    raise BadFileError(
        f"{shown(text)}: addresses that begin with {kind}:// are not read; give a local path, or an address "
        "that begins with https://, http:// or hf://"
    )


def shown(address: str) -> str:
    """An address as messages may show it: without user, password, query and fragment, where secrets are."""
    plain = re.split("[?#]", address, maxsplit=1)[0]
    kind, _, rest = plain.partition("://")
    if kind.lower() == "hf":  # owner/repo@revision holds none
        return plain
    place, slash, path = rest.partition("/")
    host = place.rpartition("@")[2]
    if not re.fullmatch(r"([^:]*|\[[0-9A-Fa-f:.]*\])(:[0-9]*)?", host):  # a password with a / or ? in it
        return f"{kind}://..."
    return f"{kind}://{host}{slash}{path}"


class RemoteFile:
    """A file on a server. What a cut connection loses is asked for again, piece by piece.

    Args:
        address: `https://...`, `http://...` or `hf://owner/repo[@revision]/file`.

    Raises:
        BadFileError: on construction, if it cannot be had in ranges.
    """

    def __init__(self, address: str) -> None:
        self.name = shown(address)
        self._patience = PATIENCE
        hub = address.lower().startswith("hf://")
        self._url, headers = _on_the_hub(address, self.name) if hub else (address, {})
        self._answers = _Answers(self.name, hub)
        self._files = self._file_system(headers)
        self._start = self._piece(0, START_BYTES)
        assert self._answers.version is not None, "an answer that was not refused"
        self.size = self._answers.version.size

    def read(self, offset: int, length: int) -> bytearray:
        """See `Source.read`."""
        if (offset, length) == (0, len(self._start)):
            return bytearray(self._start)
        data = bytearray()
        for begin, size in piece_ranges(offset, length):
            data += self._piece(begin, begin + size)
        return data

    def _file_system(self, headers: dict[str, str]) -> Any:
        try:
            import aiohttp
            from fsspec.implementations.http import HTTPFileSystem
        except ImportError:
            raise BadFileError(
                f"{self.name}: reading from a server needs aiohttp; pip install 'nestify[remote]'"
            ) from None
        patience = self._patience
        limits = aiohttp.ClientTimeout(
            total=patience.piece, connect=patience.connect, sock_read=patience.silence
        )
        guards = () if urlsplit(self._url).scheme.lower() == "http" else (self._answers.stay_encrypted,)
        session = {
            "headers": {**headers, "Accept-Encoding": "identity"},
            "timeout": limits,
            "trust_env": True,  # proxies
            "auto_decompress": False,
            "raise_for_status": self._answers.check,
            "middlewares": guards,
        }
        return HTTPFileSystem(client_kwargs=session, skip_instance_cache=True)

    def _piece(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of the file, or those there are; tries again after what may pass."""
        for attempt in range(1, self._patience.attempts + 1):
            try:
                return self._request(begin, end)
            except _Passing as error:
                # Where nothing ever answered, waiting for it helps nobody.
                if attempt == self._patience.attempts or (error.unreached and not self._answers.version):
                    raise BadFileError(str(error)) from None
            time.sleep(self._patience.pause * 2 ** (attempt - 1))
        raise AssertionError("the last attempt returns or raises")

    def _request(self, begin: int, end: int) -> bytes:
        import aiohttp
        from fsspec.exceptions import FSTimeoutError

        try:
            data: bytes = self._files.cat_file(self._url, begin, end)
        except (aiohttp.ClientError, TimeoutError, ValueError, OSError) as error:
            own = error.__cause__ if isinstance(error, FSTimeoutError) else None
            # Nothing of the library's text is shown: it may hold the address with its secrets.
            raise self._failure(own or error) from None
        return data

    def _failure(self, error: BaseException) -> BadFileError:
        """What the library raised, in a sentence; the first kind that fits."""
        import aiohttp

        patience = self._patience
        kinds: list[tuple[type[BaseException], str, bool]] = [
            (aiohttp.ClientConnectorDNSError, f"the server's name is not known; {CHECK_BOTH}", True),
            (aiohttp.ClientConnectorCertificateError, f"its server does not prove who it is; {CHECK}", False),
            (aiohttp.ClientSSLError, f"its server does not speak TLS as it should; {CHECK}", False),
            (aiohttp.ClientConnectorError, f"no server answers there; {CHECK_BOTH}", True),
            (
                aiohttp.ConnectionTimeoutError,
                f"no connection within {patience.connect:g} seconds; {CHECK_BOTH}",
                True,
            ),
            (
                aiohttp.ServerTimeoutError,
                f"the server was silent for {patience.silence:g} seconds; {TRY_AGAIN}",
                True,
            ),
            (
                TimeoutError,
                f"the server took over {patience.piece:g} seconds for one piece; {TRY_AGAIN}",
                False,
            ),
            (aiohttp.TooManyRedirects, f"the server redirects in circles; {CHECK}", False),
            (
                aiohttp.ClientHttpProxyError,
                "the proxy refuses to fetch it; check the proxy's settings",
                False,
            ),
            (aiohttp.ClientResponseError, f"the server's answer is no HTTP; {CHECK}", False),
            (ValueError, f"is no valid address, or redirects to none; {CHECK}", False),
            (aiohttp.NonHttpUrlClientError, f"redirects to an address of another kind; {CHECK}", False),
            (BaseException, f"the connection was cut again and again; {TRY_AGAIN}", True),
        ]
        sentence, passes = next((told, passes) for kind, told, passes in kinds if isinstance(error, kind))
        if not passes:
            return BadFileError(f"{self.name}: {sentence}")
        unreached = isinstance(error, aiohttp.ClientConnectorError | aiohttp.ConnectionTimeoutError)
        return _Passing(f"{self.name}: {sentence}", unreached)


class _Passing(BadFileError):
    """A failure that the next attempt may not meet.

    Args:
        unreached: whether no server was reached.
    """

    def __init__(self, sentence: str, unreached: bool = False) -> None:
        super().__init__(sentence)
        self.unreached = unreached


@dataclass(frozen=True)
class _Version:
    """What must stay the same from answer to answer: the size in bytes, and what names the content."""

    size: int
    tag: str | None


class _Answers:
    """Checks the head of every answer, before a byte of its body is read.

    Attributes:
        version: of the file, as the first good answer tells it.
    """

    def __init__(self, name: str, hub: bool) -> None:
        self.name = name
        self.version: _Version | None = None
        self._hub = hub

    async def stay_encrypted(self, request: "ClientRequest", send: "ClientHandlerType") -> "ClientResponse":
        """Send a request, unless a redirect leads from https to http.

        Raises:
            BadFileError: if it does.
        """
        if request.url.scheme != "https":
            raise self._refusal("is redirected to an address without encryption", CHECK)
        return await send(request)

    async def check(self, answer: "ClientResponse") -> None:
        """Accept the bytes that were asked for, of the file that was asked before.

        Raises:
            BadFileError: if it is anything else.
        """
        if answer.status != 206:
            raise self._status_refusal(answer)
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise self._refusal("comes compressed from this server, which fits no range", DOWNLOAD)
        size = self._check_range(answer)
        version = _Version(size, answer.headers.get("ETag") or answer.headers.get("Last-Modified"))
        if self.version is None:
            self.version = version
        elif self.version != version:
            raise self._refusal("was changed on the server while it was read", "read it again")

    def _check_range(self, answer: "ClientResponse") -> int:
        """Size of the file, from an answer whose range and length are right."""
        asked = re.fullmatch(r"bytes=(\d+)-(\d+)", answer.request_info.headers["Range"])
        assert asked is not None
        begin, last = map(int, asked.groups())
        told = answer.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes (\d{1,19})-(\d{1,19})/(\d{1,19})", told)
        if found is None:
            raise self._refusal(
                "comes from a server that does not tell which bytes it sends, and of how many", DOWNLOAD
            )
        size = int(found[3])
        last = min(last, size - 1)
        if (int(found[1]), int(found[2])) != (begin, last):
            raise self._refusal("comes from a server that sends other bytes than it was asked for", DOWNLOAD)
        if answer.headers.get("Content-Length") != str(last + 1 - begin):
            raise self._refusal(
                "comes from a server that sends another number of bytes than it was asked for", DOWNLOAD
            )
        return size

    def _status_refusal(self, answer: "ClientResponse") -> BadFileError:
        status = answer.status
        if status == 200:
            if answer.headers.get("Content-Type", "").lower().startswith("text/html"):
                return self._refusal("is a web page", "give the address of the nested file itself")
            return self._refusal("comes from a server that sends no parts of files", DOWNLOAD)
        if status in (401, 403, 404, 410):
            problem = "is refused by the server" if status in (401, 403) else "is not on the server"
            remedy = f"{CHECK}, and that it needs no log-in"
            if self._hub:
                remedy = "check owner, repository, revision and file; private ones need `hf auth login`"
            return self._refusal(f"{problem} (HTTP {status})", remedy)
        if status == 416:
            return self._refusal("is empty, or shorter than it was (HTTP 416)", "get an intact copy")
        if status in (408, 425, 429) or status >= 500:
            return _Passing(f"{self.name}: the server cannot answer now (HTTP {status}); try again later")
        return self._refusal(f"gets an answer of no use from its server (HTTP {status})", CHECK)

    def _refusal(self, problem: str, remedy: str) -> BadFileError:
        return BadFileError(f"{self.name}: {problem}; {remedy}")


HUB_ADDRESS = re.compile(
    r"hf://(?:(?P<kind>models|datasets|spaces)/)?(?P<repo>[^/@?#]+/[^/@?#]+)(?:@(?P<revision>[^/?#]+))?/(?P<file>[^?#]+)",
    re.IGNORECASE,
)


def _on_the_hub(address: str, name: str) -> tuple[str, dict[str, str]]:
    """The hub's own address of a file, and the headers that it wants: who asks, and a token if there is one.

    Raises:
        BadFileError: if the address names no file, or huggingface_hub is told to stay offline.
    """
    from huggingface_hub import constants, hf_hub_url
    from huggingface_hub.utils import build_hf_headers

    found = HUB_ADDRESS.fullmatch(address)
    if found is None:
        raise BadFileError(f"{name}: names no file on the hub; give hf://owner/repo/file")
    if constants.HF_HUB_OFFLINE:
        raise BadFileError(f"{name}: the hub is switched off by HF_HUB_OFFLINE; unset it")
    kind = (found["kind"] or "models").removesuffix("s")
    revision = unquote(found["revision"]) if found["revision"] else None
    try:
        url = hf_hub_url(found["repo"], found["file"], repo_type=kind, revision=revision)
    except ValueError:
        raise BadFileError(f"{name}: is no name of a repository; give hf://owner/repo/file") from None
    return url, build_hf_headers()
