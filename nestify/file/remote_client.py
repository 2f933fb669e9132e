"""An HTTP client for range requests: deadlines, redirects, credentials, and failures as plain sentences.

Addresses may hold secrets, so neither an address nor a library's text, which may quote one, gets into a
message, a log or a chained exception.
"""

import asyncio
import concurrent.futures
import contextlib
import http.cookiejar
import logging
import netrc
import os
import socket
import ssl
import threading
import weakref
from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nestify.errors import BadFileError
from nestify.file.remote_answers import CHECK, AnswerChecks, TransientError

if TYPE_CHECKING:
    import httpx2

CHECK_BOTH = "check the address and the network"
TRY_AGAIN = "check the network and try again"
CHECK_PROXY = "check http_proxy, https_proxy and all_proxy in the environment"

MAX_REQUESTS = 10
"""Requests for one piece: the first one, and those that follow redirects."""

REDIRECT_BODY_BYTES = 2**16
"""Most bytes of a redirect's body that are read in order to use its connection again."""

THREAD_NAME = "nestify-http"


@dataclass(frozen=True)
class Patience:
    """How long and how often a server is tried.

    Attributes:
        attempts: number of attempts for each piece.
        pause: seconds before the second attempt; doubles with each further attempt.
        connect: seconds to look up the name and connect, and again for the TLS handshake.
        silence: seconds without a byte.
        piece: seconds for all of one piece, from the name lookup to the last byte.
    """

    attempts: int = 4
    pause: float = 1.0
    connect: float = 15.0
    silence: float = 30.0
    piece: float = 600.0


class RangeClient:
    """Requests ranges of one file, in a thread that runs an event loop.

    A deadline or a signal therefore ends a request at once, whatever it waits for: a name, a connection
    or a byte. Connections are kept for the next range. Cookies are neither kept nor sent. The proxies of
    the environment are used. Credentials are those in the address, in `headers` or in .netrc, in this
    order; a redirect to another origin does not get them.

    Args:
        url: the address, http or https; it may hold a user and a password.
        headers: sent with every request.
        name: the file's name in messages, without secrets.
        checks: checks of the answers.
        patience: time limits.

    Raises:
        BadFileError: if the address is not valid, or the environment's settings cannot be used.
    """

    def __init__(
        self, url: str, headers: dict[str, str], name: str, checks: AnswerChecks, patience: Patience
    ) -> None:
        self._name, self._checks, self._patience = name, checks, patience
        parsed = _parse_url(url)
        if parsed is None:
            raise BadFileError(f"{name}: this is not a valid address; {CHECK}")
        self._url = parsed.copy_with(username=None, password=None)
        self._auth = _find_credentials(parsed, headers)
        client = self._open_client(headers)
        _hide_requests_from_logs()
        started: _Started = concurrent.futures.Future()
        thread = threading.Thread(
            target=asyncio.run, args=(_run_until_stopped(client, started),), name=THREAD_NAME, daemon=True
        )
        thread.start()
        self._client = client
        self._loop, stop = started.result()
        weakref.finalize(self, _stop_thread, thread, self._loop, stop)

    def fetch(self, begin: int, end: int) -> bytes:
        """Bytes [begin, end) of the file, or those of them that exist.

        Raises:
            TransientError: if another attempt may succeed.
            BadFileError: if not.
        """
        future = asyncio.run_coroutine_threadsafe(self._fetch_in_time(begin, end), self._loop)
        try:
            while not concurrent.futures.wait([future], timeout=1).done:
                pass  # not one long wait, which a signal does not interrupt on every system
            return future.result()
        finally:
            future.cancel()  # after a signal; a request that has ended is left as it is

    def _open_client(self, headers: dict[str, str]) -> "httpx2.AsyncClient":
        import httpx2

        patience = self._patience
        no_cookies = http.cookiejar.DefaultCookiePolicy(allowed_domains=[])
        try:
            return httpx2.AsyncClient(
                headers={**headers, "Accept-Encoding": "identity"},
                cookies=http.cookiejar.CookieJar(no_cookies),
                timeout=httpx2.Timeout(patience.silence, connect=patience.connect),
            )
        except UnicodeError:
            problem = "the access token has letters that HTTP does not allow; run `hf auth login` again"
        except ImportError as error:
            problem = "the package httpx2 does not work; pip install --force-reinstall httpx2"
            if "socks" in str(error).lower():
                problem = (
                    f"a SOCKS proxy needs another package; pip install 'httpx2[socks]', or {CHECK_PROXY}"
                )
        except OSError:  # also ssl.SSLError
            problem = "the certificates cannot be read; check SSL_CERT_FILE and SSL_CERT_DIR"
        except Exception:
            problem = f"the address of the proxy is not valid; {CHECK_PROXY}"
        raise BadFileError(f"{self._name}: {problem}")

    async def _fetch_in_time(self, begin: int, end: int) -> bytes:
        try:
            async with asyncio.timeout(self._patience.piece):
                return await self._request(begin, end)
        except BadFileError:
            raise
        except Exception as error:
            failure = self._explain(error)
        raise failure  # outside of the except block, so that it has no context that quotes the address

    async def _request(self, begin: int, end: int) -> bytes:
        import httpx2

        request = self._client.build_request("GET", self._url, headers={"Range": f"bytes={begin}-{end - 1}"})
        auth = self._auth
        for _ in range(MAX_REQUESTS):
            answer = await self._client.send(request, auth=auth, stream=True, follow_redirects=False)
            async with contextlib.aclosing(answer):
                if not answer.has_redirect_location:
                    self._checks.check(answer)
                    return b"".join([part async for part in answer.aiter_raw()])
                request = self._follow_redirect(answer)
                await _read_redirect_body(answer)
            auth = httpx2.Auth()  # none of its own: the request has those that it may have
        raise BadFileError(f"{self._name}: the server redirected too many times; {CHECK}")

    def _follow_redirect(self, answer: "httpx2.Response") -> "httpx2.Request":
        """Make the request that follows a redirect."""
        request = answer.next_request
        if request is None:
            raise BadFileError(f"{self._name}: the server redirected to an invalid address; {CHECK}")
        if answer.url.scheme == "https" and request.url.scheme != "https":
            raise BadFileError(f"{self._name}: the server redirected to an unencrypted address; {CHECK}")
        if _get_origin(request.url) != _get_origin(answer.url):
            request.headers.pop("Authorization", None)
        return request

    def _explain(self, error: Exception) -> BadFileError:
        """Say in a sentence what the library raised."""
        import httpx2

        patience, text = self._patience, str(error).lower()
        problem, transient, unreached = "", False, False
        match error:
            case TimeoutError():
                problem = f"one piece took more than {patience.piece:g} seconds; {TRY_AGAIN}"
            case httpx2.ConnectTimeout():
                problem = f"no connection within {patience.connect:g} seconds; {CHECK_BOTH}"
                transient = unreached = True
            case httpx2.TimeoutException():
                problem, transient = f"no byte for {patience.silence:g} seconds; {TRY_AGAIN}", True
            case httpx2.ConnectError():
                causes = list(_iterate_causes(error))
                if any(isinstance(cause, ssl.SSLCertVerificationError) for cause in causes):
                    problem = (
                        f"the server's certificate is not valid; {CHECK}, or name yours in SSL_CERT_FILE"
                    )
                elif any(isinstance(cause, ssl.SSLError) for cause in causes):
                    problem = f"no TLS connection with the server; {CHECK}"
                else:
                    unknown = any(isinstance(cause, socket.gaierror) for cause in causes)
                    problem = "the server's name is not known" if unknown else "no connection to the server"
                    problem, transient, unreached = f"{problem}; {CHECK_BOTH}", True, True
            case httpx2.ProxyError():
                problem = f"the proxy refused the connection; {CHECK_PROXY}"
            case httpx2.RemoteProtocolError() if "disconnected" not in text and "closed" not in text:
                problem = f"the server's answer is not valid HTTP; {CHECK}"
            case httpx2.NetworkError() | httpx2.RemoteProtocolError():
                problem, transient = f"the connection was lost; {TRY_AGAIN}", True
            case (
                httpx2.InvalidURL()
                | httpx2.UnsupportedProtocol()
                | httpx2.LocalProtocolError()
                | ValueError()
                | OverflowError()
            ):
                problem = f"the address, or one that it redirects to, is not valid; {CHECK}"
            case _:
                problem = f"the request failed ({type(error).__name__}); {CHECK_BOTH}"
        message = f"{self._name}: {problem}"
        return TransientError(message, unreached) if transient else BadFileError(message)


_Started = concurrent.futures.Future[tuple[asyncio.AbstractEventLoop, asyncio.Event]]


async def _run_until_stopped(client: "httpx2.AsyncClient", started: _Started) -> None:
    """Run in the client's thread: requests come as tasks from other threads."""
    stop = asyncio.Event()
    started.set_result((asyncio.get_running_loop(), stop))
    async with client:
        await stop.wait()


def _stop_thread(thread: threading.Thread, loop: asyncio.AbstractEventLoop, stop: asyncio.Event) -> None:
    """Close the connections and end the thread of a client that is no longer used."""
    if thread.is_alive():  # it is not in a forked process
        loop.call_soon_threadsafe(stop.set)
        if threading.current_thread() is not thread:  # the garbage collector runs in any thread
            thread.join(timeout=1)


def _parse_url(url: str) -> "httpx2.URL | None":
    """Parse an address of a file; None if it is not valid."""
    import httpx2

    try:
        parsed = httpx2.URL(url)
        valid = parsed.scheme in ("http", "https") and parsed.host and (parsed.port or 80) in range(1, 2**16)
    except Exception:  # InvalidURL, and what other libraries raise for strange names
        return None
    return parsed if valid else None


def _find_credentials(url: "httpx2.URL", headers: dict[str, str]) -> "httpx2.Auth":
    """Credentials for the first request: those in the address, or else in .netrc for the address's host.

    .netrc is read from where NETRC says, or else from the home directory. The host of a redirect is not
    looked up: only the user chooses which servers get a password.
    """
    import httpx2

    if url.username or url.password:
        return httpx2.BasicAuth(url.username, url.password)
    if "authorization" in {name.lower() for name in headers}:
        return httpx2.Auth()
    path = os.environ.get("NETRC") or os.path.expanduser("~/.netrc")
    try:
        return httpx2.NetRCAuth(path)
    except FileNotFoundError:
        return httpx2.Auth()
    except (OSError, UnicodeError, netrc.NetrcParseError):
        logging.getLogger(__name__).warning("%s cannot be read, so no password is taken from it", path)
        return httpx2.Auth()


class _HiddenInThread(logging.Filter):
    """Drops what is logged in the thread of a `RangeClient`."""

    def filter(self, record: logging.LogRecord) -> bool:
        return threading.current_thread().name != THREAD_NAME


_HIDDEN = _HiddenInThread()


def _hide_requests_from_logs() -> None:
    """Keep addresses out of the logs: the library logs every request with all of its address."""
    for name in list(logging.root.manager.loggerDict):
        if name.partition(".")[0] in ("httpx2", "httpcore2"):
            logging.getLogger(name).addFilter(_HIDDEN)


async def _read_redirect_body(answer: "httpx2.Response") -> None:
    """Read a short body to its end, so that the connection can be used again; leave a long one."""
    received = 0
    async for part in answer.aiter_raw():
        received += len(part)
        if received > REDIRECT_BODY_BYTES:
            return


def _get_origin(url: "httpx2.URL") -> tuple[str, str, int | None]:
    return url.scheme, url.host, url.port


def _iterate_causes(error: BaseException | None) -> Iterator[BaseException]:
    """Iterate over an exception, what it was raised from, and so on."""
    while error is not None:
        yield error
        error = error.__cause__ or error.__context__
