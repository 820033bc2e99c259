"""Registries for tests: Debian's docker-registry on loopback, pushed to by the standard library; one that lies as it is told; a proxy that cuts."""

import asyncio
import json
import shutil
import socket
import subprocess
import urllib.request
from collections.abc import Awaitable, Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from aiohttp import web

from edge_runtime.workloads.images import ImageStore, Limits
from edge_runtime.workloads.images.pull import Puller
from edge_runtime.workloads.images.reference import hosts
from tests.unit.workloads.image_side import AS_ROOT, layout, sha
from tools.faultproxy import FaultProxy

from .waiting import until_sync

PROGRAM = shutil.which("docker-registry")
MANIFEST, INDEX = "application/vnd.oci.image.manifest.v1+json", "application/vnd.oci.image.index.v1+json"


def reason_against() -> str:
    return "" if PROGRAM else "no docker-registry (as root: apt install docker-registry)"


def listens(port: int) -> bool:
    """Whether somebody takes connections there."""
    try:
        socket.create_connection(("127.0.0.1", port), 1).close()
    except OSError:
        return False
    return True


def free_port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@contextmanager
def registry(folder: Path, more: str = "", before: Callable[[Path], Any] = lambda folder: None) -> Iterator[str]:
    """A real one; yields host:port. `more`: more lines of its configuration, after those of `http`. `before`: fills its folder."""
    folder.mkdir(parents=True)
    before(folder)
    for _ in range(5):  # another may take the port meanwhile
        port = free_port()
        (folder / "config.yml").write_text(f"version: 0.1\nlog:\n  level: error\nstorage:\n  filesystem:\n    rootdirectory: {folder}/data\nhttp:\n  addr: 127.0.0.1:{port}\n{more}")
        process = subprocess.Popen([str(PROGRAM), "serve", str(folder / "config.yml")], stdout=subprocess.DEVNULL, stderr=(folder / "log").open("wb"))
        try:
            until_sync(lambda process=process, port=port: process.poll() is not None or listens(port), 20, "a registry that listens, or its end")
            if process.poll() is None:
                yield f"127.0.0.1:{port}"
                return
        finally:
            process.kill()
            process.wait()
    raise RuntimeError((folder / "log").read_text())


def send(method: str, url: str, data: bytes | None = None, headers: dict[str, str] | None = None) -> Any:
    request = urllib.request.Request(url, data, headers or {}, method=method)
    return urllib.request.build_opener(urllib.request.ProxyHandler({})).open(request, timeout=30)


def push(host: str, repository: str, tag: str, source: Path, headers: dict[str, str] | None = None) -> str:
    """What is in an OCI layout; returns the manifest's digest. Several manifests become an index."""
    listed = json.loads((source / "index.json").read_text())["manifests"]
    tops = {entry["digest"][7:] for entry in listed}
    for blob in sorted((source / "blobs/sha256").iterdir()):
        if blob.name not in tops:
            where = send("POST", f"http://{host}/v2/{repository}/blobs/uploads/", b"", headers).headers["Location"]
            where = where if where.startswith("http") else f"http://{host}{where}"
            send("PUT", f"{where}{'&' if '?' in where else '?'}digest=sha256:{blob.name}", blob.read_bytes(), {"Content-Type": "application/octet-stream", **(headers or {})})
    for entry in listed:
        send("PUT", f"http://{host}/v2/{repository}/manifests/{entry['digest'] if len(listed) > 1 else tag}", (source / "blobs/sha256" / entry["digest"][7:]).read_bytes(), {"Content-Type": entry["mediaType"], **(headers or {})})
    if len(listed) == 1:
        return str(listed[0]["digest"])
    index = json.dumps({"schemaVersion": 2, "mediaType": INDEX, "manifests": [{key: value for key, value in entry.items() if key != "annotations"} for entry in listed]}).encode()
    send("PUT", f"http://{host}/v2/{repository}/manifests/{tag}", index, {"Content-Type": INDEX, **(headers or {})})
    return f"sha256:{sha(index)}"


class Chops(FaultProxy):
    """Cuts each connection after so many bytes of one direction."""

    chop = 1 << 20

    async def _pump(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        left = self.chop
        try:
            while left > 0 and (data := await reader.read(min(left, 65_536))):
                left -= len(data)
                writer.write(data)
                await writer.drain()
        except (OSError, asyncio.CancelledError):
            return


Answer = Callable[[web.Request], Awaitable[web.StreamResponse]]


class Liar:
    """A registry that serves an OCI layout, but for what `lies` says: by the end of the path, what is answered instead. `seen`: the requests."""

    def __init__(self, source: Path) -> None:
        self.source, self.lies, self.seen = source, dict[str, Answer](), list[web.Request]()
        self.manifest = json.loads((source / "index.json").read_text())["manifests"][0]
        self.layers = [one["digest"] for one in json.loads((source / "blobs/sha256" / self.manifest["digest"][7:]).read_bytes())["layers"]]

    async def __aenter__(self) -> "Liar":
        app = web.Application()
        app.router.add_get("/{path:.*}", self.serve)
        self._runner = web.AppRunner(app)
        await self._runner.setup()
        site = web.TCPSite(self._runner, "127.0.0.1", 0)
        await site.start()
        self.host = f"127.0.0.1:{self._runner.addresses[0][1]}"
        return self

    async def __aexit__(self, *_: object) -> None:
        await self._runner.cleanup()

    async def serve(self, request: web.Request) -> web.StreamResponse:
        self.seen.append(request)
        for end, lie in self.lies.items():
            if request.path.endswith(end):
                return await lie(request)
        if "/manifests/" in request.path:
            return web.Response(body=(self.source / "blobs/sha256" / self.manifest["digest"][7:]).read_bytes(), content_type=MANIFEST)
        return web.FileResponse(self.source / "blobs/sha256" / request.path.rpartition(":")[2])


class Node:
    """A store and what fetches into it."""

    def __init__(self, folder: Path, *registries: dict[str, Any], credentials: str = "", budget: int = 1 << 40, limits: Limits = Limits(keep_free=0)) -> None:
        self.folder, self.said = folder, list[dict[str, Any]]()
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "pulls").mkdir(exist_ok=True)
        self.store = ImageStore(folder / "images", limits=limits, own=AS_ROOT)
        self.puller = Puller(folder / "pulls", self.store, hosts(registries), credentials, budget, self.said.append, pause_s=0.01)

    def left(self) -> list[str]:
        """Files of pulls that are there still."""
        return sorted(path.name for path in (self.folder / "pulls").rglob("*") if path.is_file())

    async def close(self) -> None:
        await self.puller.close()
        self.store.close()


__all__ = ["MANIFEST", "Chops", "Liar", "Node", "layout", "push", "reason_against", "registry", "send"]
