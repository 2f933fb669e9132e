"""Checks of a server's answers to range requests, before the body of an answer is read."""

import re
from dataclasses import dataclass
from typing import TYPE_CHECKING

from nestify.errors import BadFileError

if TYPE_CHECKING:
    import httpx2

CHECK = "check the address"
DOWNLOAD = "download the file and use the local copy"


class TransientError(BadFileError):
    """A failure that may not happen again at the next attempt.

    Args:
        message: one sentence.
        unreached: whether no server was reached.
    """

    def __init__(self, message: str, unreached: bool = False) -> None:
        super().__init__(message)
        self.unreached = unreached


@dataclass(frozen=True)
class Version:
    """What must be the same in every answer about one file.

    Attributes:
        size: bytes of the whole file.
        tag: the `ETag`, or else the `Last-Modified`, of the answer; None if it has neither.
    """

    size: int
    tag: str | None


class AnswerChecks:
    """Checks each answer about one file: status, encoding, range, length and version.

    Args:
        name: the file's name in messages.
        on_hub: whether the file is on the Hugging Face hub, which has other remedies.

    Attributes:
        version: the file's version, from the first answer that passed; None before that.
    """

    def __init__(self, name: str, on_hub: bool) -> None:
        self.version: Version | None = None
        self._name = name
        self._on_hub = on_hub

    def check(self, answer: "httpx2.Response") -> None:
        """Check that an answer has the requested bytes of the same file as the answers before it.

        Raises:
            TransientError: if the server asks to try again later.
            BadFileError: if the answer is anything else.
        """
        if answer.status_code != 206:
            raise self._refuse_status(answer)
        if answer.headers.get("Content-Encoding", "identity").lower() != "identity":
            raise self._refuse("the server sent compressed data, which cannot be read in ranges", DOWNLOAD)
        size = self._check_range(answer)
        version = Version(size, answer.headers.get("ETag") or answer.headers.get("Last-Modified"))
        if self.version is None:
            self.version = version
        elif self.version != version:
            raise self._refuse("the file changed on the server while it was read", "read it again")

    def _check_range(self, answer: "httpx2.Response") -> int:
        """Check the range and the length of an answer, and return the size of the whole file in bytes."""
        requested = re.fullmatch(r"bytes=([0-9]+)-([0-9]+)", answer.request.headers["Range"])
        assert requested is not None
        begin, last = map(int, requested.groups())
        stated = answer.headers.get("Content-Range", "")
        found = re.fullmatch(r"bytes ([0-9]{1,19})-([0-9]{1,19})/([0-9]{1,19})", stated)
        if found is None:
            raise self._refuse("the server did not say which bytes it sent", DOWNLOAD)
        size = int(found[3])
        last = min(last, size - 1)
        if (int(found[1]), int(found[2])) != (begin, last):
            raise self._refuse("the server sent other bytes than requested", DOWNLOAD)
        # A chunked body would end where the server likes, whatever the length says.
        is_chunked = "Transfer-Encoding" in answer.headers
        if is_chunked or answer.headers.get("Content-Length") != str(last + 1 - begin):
            raise self._refuse("the server sent a different number of bytes than requested", DOWNLOAD)
        return size

    def _refuse_status(self, answer: "httpx2.Response") -> BadFileError:
        """Make the error for an answer without a part of the file."""
        status = answer.status_code
        if status == 200:
            if answer.headers.get("Content-Type", "").lower().startswith("text/html"):
                return self._refuse("this is a web page", "give the address of the nested file itself")
            return self._refuse("the server does not support range requests", DOWNLOAD)
        if status in (401, 403, 404, 410):
            refused = status in (401, 403)
            problem = "the server refused access" if refused else "there is no such file on the server"
            remedy = f"{CHECK}, and the user and password in it or in .netrc"
            if self._on_hub:
                remedy = "check owner, repository, revision and file; private ones need `hf auth login`"
            return self._refuse(f"{problem} (HTTP {status})", remedy)
        if status == 416:
            return self._refuse(
                "the file is empty, or shorter than it was before (HTTP 416)", "get an intact copy"
            )
        if status in (408, 425, 429) or status >= 500:
            return TransientError(
                f"{self._name}: the server cannot answer now (HTTP {status}); try again later"
            )
        return self._refuse(f"the server gave an unexpected answer (HTTP {status})", CHECK)

    def _refuse(self, problem: str, remedy: str) -> BadFileError:
        return BadFileError(f"{self._name}: {problem}; {remedy}")
