"""Writes an image: an OCI layout in one tar file, as `source` reads it, and `podman load`, `skopeo copy oci-archive:FILE` and Docker (25 and later) do. Blocks.

    blobs/sha256/...    layers (tar, gzip), config, manifest, in this order
    oci-layout, index.json

A layer is written where it stays: its name is its digest, which is known at its end, so the file has to be one in which one can go back.
The same content gives the same digests, wherever it is written: nothing in it tells of the time or the host.
"""

import json
import tarfile
import zlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from hashlib import sha256
from typing import Any, BinaryIO

from .manifest import REF_NAME, Config, Platform

LAYER, CONFIG, MANIFEST = "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.config.v1+json", "application/vnd.oci.image.manifest.v1+json"

LEVEL = 1
"""Of the compression: the others take twice as long and more, for a tenth less of a system's files."""

_GZIP = 31
"""zlib's word for gzip with the largest window; its header has no time."""


class LayerWriter:
    """The plain bytes of one layer, by `write`."""

    def __init__(self, target: BinaryIO, going: Callable[[], None]) -> None:
        self._target, self._going, self._plain, self._packed = target, going, sha256(), sha256()
        self._compress = zlib.compressobj(LEVEL, zlib.DEFLATED, _GZIP)
        self.size = 0

    def write(self, data: bytes) -> int:
        """Append."""
        self._going()
        self._plain.update(data)
        self._put(self._compress.compress(data))
        return len(data)

    def _put(self, data: bytes) -> None:
        self._packed.update(data)
        self.size += len(data)
        self._target.write(data)

    def end(self) -> tuple[str, str]:
        """Its digest, and the one of what it unpacks to."""
        self._put(self._compress.flush())
        return self._packed.hexdigest(), self._plain.hexdigest()


class ArchiveWriter:
    """One image; its layers from the lowest up, then `finish`.

    Args:
        target: an empty file, open for writing.
        going: called with each piece of a layer; what it raises ends the writing.
    """

    def __init__(self, target: BinaryIO, going: Callable[[], None] = lambda: None) -> None:
        self._target, self._going = target, going
        self._layers: list[dict[str, Any]] = []
        self._diff_ids: list[str] = []

    @contextmanager
    def layer(self) -> Iterator[LayerWriter]:
        """One more layer; whole when the block ends."""
        begin = self._target.tell()
        self._target.write(bytes(tarfile.BLOCKSIZE))
        writer = LayerWriter(self._target, self._going)
        yield writer
        digest, diff_id = writer.end()
        again = any(one["digest"] == f"sha256:{digest}" for one in self._layers)
        self._layers.append({"mediaType": LAYER, "digest": f"sha256:{digest}", "size": writer.size})
        self._diff_ids.append(f"sha256:{diff_id}")
        if again:  # two layers of the same content are one blob
            self._target.seek(begin)
            self._target.truncate()
            return
        self._pad(writer.size)
        end = self._target.tell()
        self._target.seek(begin)
        self._target.write(_header(f"blobs/sha256/{digest}", writer.size))
        self._target.seek(end)

    def finish(self, config: Config, platform: Platform, reference: str) -> str:
        """Config, manifest and index; the digest of the manifest. `reference`: the name that the image goes by."""
        run: dict[str, Any] = {
            "Cmd": list(config.args), "Entrypoint": list(config.entrypoint), "Env": list(config.env), "WorkingDir": config.cwd, "User": config.user, "StopSignal": config.stop_signal,
        }
        told = {
            "os": platform.os, "architecture": platform.arch, **({"variant": platform.variant} if platform.variant else {}), "config": {key: value for key, value in run.items() if value},
            "rootfs": {"type": "layers", "diff_ids": self._diff_ids},
        }
        pointer = self._blob(CONFIG, told)
        manifest = self._blob(MANIFEST, {"schemaVersion": 2, "mediaType": MANIFEST, "config": pointer, "layers": self._layers})
        self._file("oci-layout", _json({"imageLayoutVersion": "1.0.0"}))
        self._file("index.json", _json({"schemaVersion": 2, "manifests": [{**manifest, "annotations": {REF_NAME: reference}}]}))
        self._target.write(bytes(2 * tarfile.BLOCKSIZE))
        return str(manifest["digest"]).removeprefix("sha256:")

    def _blob(self, media: str, value: Mapping[str, Any]) -> dict[str, Any]:
        data = _json(value)
        digest = sha256(data).hexdigest()
        self._file(f"blobs/sha256/{digest}", data)
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}

    def _file(self, name: str, data: bytes) -> None:
        self._target.write(_header(name, len(data)) + data)
        self._pad(len(data))

    def _pad(self, size: int) -> None:
        self._target.write(bytes(-size % tarfile.BLOCKSIZE))


def _json(value: Mapping[str, Any]) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _header(name: str, size: int) -> bytes:
    """One block: the names here fit into it, and a size of 8 GiB and more does in GNU's way."""
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = size, 0o644
    return entry.tobuf(tarfile.GNU_FORMAT)
