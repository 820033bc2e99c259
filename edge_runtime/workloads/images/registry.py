"""One registry, as the OCI distribution specification 1.1 has it: manifests and blobs by HTTP, every answer held against a digest and a size. Nothing is believed from headers.

Needs aiohttp; imported only when something is fetched.
"""

import asyncio
import json
import os
import ssl
import urllib.request
from base64 import b64encode
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Any
from urllib.parse import urlencode, urljoin, urlsplit

import aiohttp

from ...system.disk_pace import Pace
from . import manifest as documents
from .errors import ImageError
from .manifest import Descriptor
from .reference import Host, Reference, challenge, may_follow, same_origin

PIECE = 1 << 20
"""Bytes that are hashed and written at a time, in a thread: what a decision may have to wait for the interpreter's lock is a fraction of a millisecond."""

CONNECT_S, SILENCE_S = 10.0, 30.0
"""A connection that is not made, or says nothing for so long, is given up and tried again."""

SLOWEST_BYTES_S = 4096
"""A blob that comes slower than this on the whole is given up: a server that sends a byte now and then would hold a place for ever."""

MAX_REDIRECTS = 5
MAX_TOKEN_BYTES = 65_536
"""Of a token server's answer; real tokens have some kilobytes."""

AGAIN = frozenset((408, 425, 429, 500, 502, 503, 504))
"""Answers after which the same is asked again."""

MAX_RETRY_AFTER_S = 60.0
"""A registry that asks for patience gets this much."""

ACCEPT = ", ".join(sorted(documents.MANIFESTS | documents.INDEXES))


class Again(Exception):
    """It did not work this time; trying again may help, after `after_s` seconds at the earliest."""

    def __init__(self, problem: str, after_s: float = 0.0) -> None:
        super().__init__(problem)
        self.after_s = after_s


@dataclass(slots=True)
class Count:
    """What a pull cost: bytes and blobs over the network, bytes that an earlier try had left, connections that were cut."""

    bytes: int = 0
    blobs: int = 0
    resumed: int = 0
    cuts: int = 0


@dataclass(slots=True)
class Registry:
    """One registry or mirror for one repository, as long as one pull lasts."""

    host: Host
    reference: Reference
    session: aiohttp.ClientSession
    count: Count
    credentials: tuple[str, str] | None = None
    tls: ssl.SSLContext | None = None
    _authorization: str = ""
    _asking: asyncio.Lock = field(default_factory=asyncio.Lock)

    def _url(self, path: str) -> str:
        return f"{self.host.origin}/v2/{self.reference.repository}/{path}"

    async def manifest(self, wanted: str, size: int | None = None) -> tuple[bytes, str, str]:
        """A manifest or index: its bytes, their digest (64 hex digits) and what it says it is. `wanted`: a tag, or `sha256:...`, which it is held against. Raises `ImageError`, `Again`."""
        response = await self._get(self._url(f"manifests/{wanted}"), {"Accept": ACCEPT})
        try:
            self._expect(response, f"{self.reference.repository}:{wanted}" if ":" not in wanted else f"{self.reference.repository}@{wanted}")
            raw = await self._whole(response, documents.MAX_DOCUMENT, "manifest")
            media = response.headers.get("Content-Type", "").partition(";")[0].strip()
            claimed = response.headers.get("Docker-Content-Digest", "")
        finally:
            response.close()
        digest = sha256(raw).hexdigest()
        if (wanted.startswith("sha256:") and wanted != f"sha256:{digest}") or (size is not None and len(raw) != size) or (claimed.startswith("sha256:") and claimed != f"sha256:{digest}"):
            raise ImageError("manifest", f"{self.host.name} sent what has the digest sha256:{digest}, asked for was {wanted if ':' in wanted else claimed}", "push the image again; if it stays so, do not trust this registry")
        inner = documents.loads(raw, "manifest").get("mediaType")
        return raw, digest, inner if isinstance(inner, str) else media

    async def blob(self, pointer: Descriptor, part: "Part") -> None:
        """Bring a blob into `part`, going on from what is there, and hold it against its digest and size while it comes. Raises `ImageError`, `Again`."""
        async with asyncio.timeout(SILENCE_S + pointer.size / SLOWEST_BYTES_S):
            response = await self._get(self._url(f"blobs/sha256:{pointer.digest}"), {"Range": f"bytes={part.have}-"} if part.have else {})
            try:
                if response.status == 416 or (response.status == 206 and not response.headers.get("Content-Range", "").startswith(f"bytes {part.have}-")):
                    await asyncio.to_thread(part.restart)
                    raise Again("the registry cannot go on from where it was cut")
                self._expect(response, f"blob sha256:{pointer.digest}", 206 if part.have else 200)
                if response.status == 200 and part.have:
                    await asyncio.to_thread(part.restart)
                await self._stream(response, pointer, part)
            finally:
                response.close()

    async def _stream(self, response: aiohttp.ClientResponse, pointer: Descriptor, part: "Part") -> None:
        waiting = bytearray()
        try:
            async for data in response.content.iter_any():
                self.count.bytes += len(data)
                waiting += data
                if part.have + len(waiting) > pointer.size:
                    part.forget()
                    raise ImageError("blob", f"{self.host.name} sends more for sha256:{pointer.digest} than the {pointer.size} bytes that the manifest says", "do not trust this registry; push the image again")
                if len(waiting) >= PIECE:
                    await asyncio.to_thread(part.write, bytes(waiting))
                    waiting.clear()
        except (aiohttp.ClientError, TimeoutError, ConnectionError):
            await asyncio.to_thread(part.write, bytes(waiting))  # what came before the cut is not asked for again
            raise
        await asyncio.to_thread(part.write, bytes(waiting))
        if part.have < pointer.size:
            raise Again(f"the connection ended after {part.have} of {pointer.size} bytes")

    async def _get(self, url: str, headers: Mapping[str, str]) -> aiohttp.ClientResponse:
        """The answer after redirects and what it took to be let in. Raises `Again` where nobody answered, or said to come again."""
        asked, refused = url, ""
        for _ in range(MAX_REDIRECTS + 2):
            ours = same_origin(url, self.host.origin)
            sent = {**headers, "Accept-Encoding": "identity"}
            if ours and self._authorization:
                sent["Authorization"] = self._authorization
            response = await self._ask(url, sent, ours)
            if response.status == 401 and ours and (not refused or refused != sent.get("Authorization", "")):
                told = response.headers.getall("WWW-Authenticate", [])
                response.close()
                refused = sent.get("Authorization", "") or "none"
                await self._authorize(told, sent.get("Authorization", ""))
                continue
            if response.status in (301, 302, 303, 307, 308):
                target = response.headers.get("Location", "")
                response.close()
                with suppress(ValueError):  # what is no address is not followed
                    target = urljoin(url, target)
                if not may_follow(url, target):
                    raise ImageError("registry", f"{self.host.name} sends us from {_shown(asked)} to {_shown(target)}, which is neither https nor the same host", "let the registry serve its blobs itself, or by https")
                url = target
                continue
            if response.status in AGAIN:
                after = response.headers.get("Retry-After", "")
                response.close()
                raise Again(f"{self.host.name} answers {response.status}", min(float(after), MAX_RETRY_AFTER_S) if after.isdecimal() and len(after) < 9 else 0.0)
            return response
        raise ImageError("registry", f"{self.host.name} sends us in a circle", "look at the registry's redirects")

    async def _ask(self, url: str, headers: Mapping[str, str], ours: bool) -> aiohttp.ClientResponse:
        secure: ssl.SSLContext | bool = self.tls if ours and self.tls is not None else True
        try:
            return await self.session.get(url, headers=headers, allow_redirects=False, proxy=proxy_for(url), ssl=secure)
        except (aiohttp.ClientConnectorCertificateError, aiohttp.ClientConnectorSSLError) as error:
            raise ImageError("registry", f"{self.host.name} cannot be trusted: {_one_line(error)}", "set ca_file of this registry in workloads.registries; or insecure, where it speaks plain HTTP") from None
        except (aiohttp.InvalidURL, ValueError) as error:
            raise ImageError("registry", f"{_shown(url)} is no address: {_one_line(error)}", "look at the registry's name") from None
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Again(f"{self.host.name} cannot be reached: {_one_line(error) or 'no answer in time'}") from None

    async def _authorize(self, told: list[str], used: str) -> None:
        async with self._asking:
            if used != self._authorization:
                return  # another of our requests has a new one already
            scheme, said = challenge(told)
            remedy = "give credentials for it (workloads.registry_credentials), or make the image public"
            basic = "Basic " + b64encode(":".join(self.credentials).encode()).decode() if self.credentials else ""
            if scheme == "basic" and basic and used != basic:
                self._authorization = basic
                return
            if scheme != "bearer":
                raise ImageError("registry", f"{self.host.name} does not let us read {self.reference.repository}", remedy)
            realm = said.get("realm", "")
            if not may_follow(self.host.origin, realm):
                raise ImageError("registry", f"{self.host.name} wants tokens from {_shown(realm)}, which is neither https nor the same host", "let the registry name a token server by https")
            query = urlencode({key: value for key, value in (("service", said.get("service", "")), ("scope", said.get("scope") or f"repository:{self.reference.repository}:pull")) if value})
            response = await self._ask(f"{realm}{'&' if '?' in realm else '?'}{query}", {"Accept-Encoding": "identity", **({"Authorization": basic} if basic else {})}, same_origin(realm, self.host.origin))
            try:
                if response.status in AGAIN:
                    raise Again(f"the token server of {self.host.name} answers {response.status}")
                if response.status != 200:
                    raise ImageError("registry", f"the token server of {self.host.name} answers {response.status} for {self.reference.repository}", remedy)
                raw = await self._whole(response, MAX_TOKEN_BYTES, "token")
            finally:
                response.close()
            value = documents.loads(raw, "token")
            token = value.get("token") or value.get("access_token")
            if not isinstance(token, str) or not token.isascii() or not token.isprintable() or " " in token:
                raise ImageError("registry", f"the token server of {self.host.name} gives no token", remedy)
            if f"Bearer {token}" == used:
                raise ImageError("registry", f"{self.host.name} does not let us read {self.reference.repository}", remedy)
            self._authorization = f"Bearer {token}"

    async def _whole(self, response: aiohttp.ClientResponse, most: int, what: str) -> bytes:
        raw = bytearray()
        try:
            async with asyncio.timeout(SILENCE_S + most / SLOWEST_BYTES_S):
                async for data in response.content.iter_any():
                    raw += data
                    if len(raw) > most:
                        raise ImageError(what, f"{self.host.name} sends more than {most} bytes", "do not trust this registry; push the image again")
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise Again(f"{self.host.name}: the connection was cut: {_one_line(error)}") from None
        self.count.bytes += len(raw)
        return bytes(raw)

    def _expect(self, response: aiohttp.ClientResponse, what: str, status: int = 200) -> None:
        if response.status in (200, status):
            return
        if response.status == 404:
            raise ImageError("image", f"{self.host.name} has no {what}", "look at its name and tag; push it")
        if response.status in (401, 403):
            raise ImageError("registry", f"{self.host.name} does not let us read {self.reference.repository}", "give credentials for it (workloads.registry_credentials), or make the image public")
        raise ImageError("registry", f"{self.host.name} answers {response.status} when asked for {what}", "look at the registry")


class Part:
    """A blob that comes: a file that grows, and the hash of what is in it."""

    def __init__(self, path: Path, most: int) -> None:
        self.path, self.have = path, 0
        self._pace = Pace(os.fdatasync)
        self._hash = sha256()
        self._handle = open(path, "a+b")  # noqa: SIM115 - closed by close()
        if os.fstat(self._handle.fileno()).st_size > most:
            self.restart()
        self._handle.seek(0)
        while data := self._handle.read(PIECE):
            self._hash.update(data)
            self.have += len(data)
        self.resumed = self.have

    def write(self, data: bytes) -> None:
        """What came next."""
        self._handle.write(data)
        self._handle.flush()
        self._pace.wrote(self._handle.fileno(), len(data))
        self._hash.update(data)
        self.have += len(data)

    def restart(self) -> None:
        """Nothing of it counts."""
        self._handle.truncate(0)
        self._hash, self.have, self.resumed = sha256(), 0, 0

    def settle(self, digest: str, target: Path) -> bool:
        """Whether it is what the digest says; then it has its name, and is on the disk."""
        if self._hash.hexdigest() != digest:
            return False
        os.fsync(self._handle.fileno())
        os.rename(self.path, target)
        return True

    def forget(self) -> None:
        """Remove it."""
        with suppress(FileNotFoundError):
            self.path.unlink()

    def close(self) -> None:
        """No more is written."""
        self._handle.close()


def proxy_for(url: str) -> str | None:
    """The proxy that the environment names for this address (HTTP_PROXY, HTTPS_PROXY, NO_PROXY, as everywhere)."""
    parts = urlsplit(url)
    proxy = urllib.request.getproxies().get(parts.scheme)
    return None if not proxy or urllib.request.proxy_bypass(parts.hostname or "") else proxy


def session() -> aiohttp.ClientSession:
    """A session for one pull: no cookies, nothing unpacked, no netrc, no redirects by itself."""
    return aiohttp.ClientSession(
        auto_decompress=False, trust_env=False, cookie_jar=aiohttp.DummyCookieJar(), timeout=aiohttp.ClientTimeout(total=None, sock_connect=CONNECT_S, sock_read=SILENCE_S),
        headers={"User-Agent": "novacron-edge"},
    )


def layout(folder: Path, digest: str, media: str, raw: bytes) -> None:
    """Write what makes fetched blobs an OCI layout with one image."""
    (folder / "blobs/sha256" / digest).write_bytes(raw)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    entry: dict[str, Any] = {"mediaType": media, "digest": f"sha256:{digest}", "size": len(raw)}
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


def _shown(url: str) -> str:
    """An address without what may be secret in it."""
    try:
        parts = urlsplit(url)
        return f"{parts.scheme}://{parts.hostname or ''}{parts.path}"[:200]
    except ValueError:
        return repr(url[:80])


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())[:200]
