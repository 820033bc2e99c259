"""Where a bundle comes from: a file, or a server that takes ranges (RFC 9110, 14), from any byte on."""

import http.client
import os
import re
import ssl
import stat
import urllib.error
import urllib.request
from pathlib import Path
from typing import IO, Any, Protocol

from .bundle import Refused

TIMEOUT_S = 60
"""A server that says nothing for so long is gone; the download goes on later from where it was."""

_RANGE = re.compile(r"bytes (\d+)-(\d+)/(\d+)\Z")


class Interrupted(Exception):
    """The bytes did not come, or their check did not end, in time; the same again may work later."""


class Source(Protocol):
    """Bytes by position, best asked for one after the other."""

    size: int

    def read(self, offset: int, size: int) -> bytes:
        """Exactly so many bytes. Raises Interrupted, or Refused where the bundle ends before."""

    def close(self) -> None:
        """Let go of it."""


class FileSource:
    """A bundle in a file. Raises Refused where it cannot be read."""

    def __init__(self, path: Path) -> None:
        try:
            # Not through a link, and not a pipe that nobody writes to: the agent names the path, root reads it.
            handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
        except OSError as error:
            raise Refused("source", f"cannot be read ({error.strerror})", "put the bundle where the order says", "source") from None
        told = os.fstat(handle)
        if not stat.S_ISREG(told.st_mode):
            os.close(handle)
            raise Refused("source", "is no plain file", "put the bundle where the order says", "source")
        self._file: IO[bytes] = os.fdopen(handle, "rb")
        self.size = told.st_size

    def read(self, offset: int, size: int) -> bytes:
        """See Source."""
        self._file.seek(offset)
        return _whole(self._file.read(size), size)

    def close(self) -> None:
        """See Source."""
        self._file.close()


class _Stay(urllib.request.HTTPRedirectHandler):
    """No redirect is followed: the token is for the server that the order names, and for nobody that it points to."""

    def redirect_request(self, *_: Any) -> None:
        """None: the answer is taken as it is."""


def _opener(ca_file: str) -> urllib.request.OpenerDirector:
    """Raises Refused where the authorities cannot be read."""
    if not ca_file:
        return urllib.request.build_opener(_Stay)
    try:
        return urllib.request.build_opener(_Stay, urllib.request.HTTPSHandler(context=ssl.create_default_context(cafile=ca_file)))
    except OSError as error:
        raise Refused("updates.ca_file", f"{ca_file} cannot be used ({getattr(error, 'reason', None) or error.strerror or error})", "give a file of certificates (PEM)", "source") from None


class WebSource:
    """A bundle of a web server; `token` goes with each request. Raises Interrupted, or Refused where the server will never give it.

    Args:
        ca_file: authorities by which the server is trusted; empty for the system's.
    """

    def __init__(self, url: str, token: str = "", ca_file: str = "") -> None:
        self._url, self._token = url, token
        self._opener = _opener(ca_file)
        self._at = 0
        self._answer: Any = None
        self.size = 0
        self._ask(0)

    def _ask(self, offset: int) -> None:
        self.close()
        headers = {"Range": f"bytes={offset}-"}
        if self._token:
            headers["Authorization"] = f"Bearer {self._token}"
        try:
            self._answer = self._opener.open(urllib.request.Request(self._url, headers=headers), timeout=TIMEOUT_S)
        except urllib.error.HTTPError as error:
            if error.code in (408, 429) or error.code >= 500:
                raise Interrupted(f"the server answers {error.code}") from None
            raise Refused("source", f"the server answers {error.code}", "look at the order's address and token", "source") from None
        except (OSError, http.client.HTTPException) as error:
            raise Interrupted(f"no answer ({error})") from None
        except ValueError as error:
            raise Refused("source", f"is no address ({error})", "give http:// or https://", "source") from None
        told = _RANGE.match(self._answer.headers.get("Content-Range", ""))
        if self._answer.status != 206 or told is None or int(told[1]) != offset:
            raise Refused("source", "the server does not take ranges", "serve the bundle from the hub, or any server that does", "source")
        self.size, self._at = int(told[3]), offset

    def read(self, offset: int, size: int) -> bytes:
        """See Source."""
        if self._answer is None or offset != self._at:
            self._ask(offset)
        data = bytearray()
        try:
            while len(data) < size and (more := self._answer.read(size - len(data))):
                data += more
        except (OSError, http.client.HTTPException) as error:
            self.close()
            raise Interrupted(f"the download was cut ({error})") from None
        if len(data) < size and offset + len(data) < self.size:
            self.close()
            raise Interrupted("the download was cut")
        self._at += len(data)
        return _whole(bytes(data), size)

    def close(self) -> None:
        """See Source."""
        if self._answer is not None:
            self._answer.close()
            self._answer = None


def _whole(data: bytes, size: int) -> bytes:
    if len(data) < size:
        raise Refused("bundle", f"ends {size - len(data)} bytes too early", "download or build it again", "truncated")
    return data


def open_source(order: dict[str, Any]) -> Source:
    """What an order names: `url` (with `token`), or `path`. Raises Interrupted, Refused."""
    if url := order.get("url"):
        if not isinstance(url, str) or not url.startswith(("http://", "https://")):
            raise Refused("url", "is no address of a web server", "give http:// or https://", "source")
        return WebSource(url, str(order.get("token") or ""), str(order.get("ca_file") or ""))
    return FileSource(Path(str(order.get("path") or "")))
