"""An image of containers as an OCI layout (image-spec 1.1): one layer, its config, its manifest, an index that lists one image for each architecture. The same tree gives the same digests.

The layout's own index lists that index alone, by the image's name: tools that are given a layout take what a name stands for, and of several manifests under one name the first, or none. For `docker load`, which up to
Docker 28 reads no layout where it keeps images itself, `manifest.json` is beside it, as `docker save` writes it.
"""

import gzip
import hashlib
import io
import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from .errors import FirmwareError
from .tree import Entry, as_tar

INDEX_MEDIA = "application/vnd.oci.image.index.v1+json"
MANIFEST_MEDIA = "application/vnd.oci.image.manifest.v1+json"
CONFIG_MEDIA = "application/vnd.oci.image.config.v1+json"
LAYER_MEDIA = "application/vnd.oci.image.layer.v1.tar+gzip"

REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"
"""What containerd calls an image that it imports; without it the name would begin with the day of the import. A kubelet asks for it by this full name."""

LIBRARY = "docker.io/library/"
"""What Docker, containerd and kubelets take a name without a registry to mean."""

GZIP_LEVEL = 9
"""gzip and not zstd: every tool reads it. The highest level, because an image is built once and fetched often."""

VARIANTS = {"arm64": "v8"}
"""What tools expect beside the architecture."""


@dataclass(frozen=True, slots=True)
class Process:
    """How a container of it is started."""

    arguments: tuple[str, ...]
    environment: tuple[str, ...]
    user: str
    folder: str
    ports: tuple[int, ...] = ()
    volumes: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Image:
    """The blobs of one image by digest (64 hex digits), and the entry that an index has of it."""

    blobs: Mapping[str, bytes]
    entry: Mapping[str, Any]


def _document(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def image(entries: Iterable[tuple[str, Entry]], arch: str, process: Process, labels: Mapping[str, str], time_s: int) -> Image:
    """One image of one layer. Pure."""
    blobs: dict[str, bytes] = {}

    def put(data: bytes, media: str) -> dict[str, Any]:
        digest = hashlib.sha256(data).hexdigest()
        blobs[digest] = data
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data)}

    packed, plain = io.BytesIO(), hashlib.sha256()
    # No name, no time, and not this machine's in the header's byte for the system: the same bytes wherever it is built.
    with gzip.GzipFile(filename="", mode="wb", fileobj=packed, compresslevel=GZIP_LEVEL, mtime=0) as out:
        for piece in as_tar(entries, time_s):
            out.write(piece)
            plain.update(piece)
    platform = {"os": "linux", "architecture": arch} | ({"variant": VARIANTS[arch]} if arch in VARIANTS else {})
    made = datetime.fromtimestamp(time_s, UTC).strftime("%Y-%m-%dT%H:%M:%SZ")
    layer = put(packed.getvalue(), LAYER_MEDIA)
    config = put(_document({
        **platform, "created": made, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{plain.hexdigest()}"]}, "history": [{"created": made, "created_by": "python -m firmware_images containers"}],
        "config": {
            "Entrypoint": list(process.arguments), "Env": list(process.environment), "User": process.user, "WorkingDir": process.folder, "StopSignal": "SIGTERM", "Labels": dict(labels),
            "ExposedPorts": {f"{port}/tcp": {} for port in process.ports}, "Volumes": {name: {} for name in process.volumes},
        },
    }), CONFIG_MEDIA)
    manifest = put(_document({"schemaVersion": 2, "mediaType": MANIFEST_MEDIA, "config": config, "layers": [layer], "annotations": dict(labels)}), MANIFEST_MEDIA)
    return Image(blobs, {**manifest, "platform": platform})


def listed(layout: Path, name: str) -> list[dict[str, Any]]:
    """The images of the architectures that a layout has under the name, as an index lists them. Raises FirmwareError: it is no layout of ours."""
    index = layout / "index.json"
    if not index.exists():
        return []
    try:
        found = [one for one in json.loads(index.read_text())["manifests"] if one["annotations"][REF_NAME] == name]
        if [one["mediaType"] for one in found] == [INDEX_MEDIA]:
            found = json.loads((layout / "blobs" / "sha256" / found[0]["digest"].removeprefix("sha256:")).read_bytes())["manifests"]
        # Else as it was before there was an index between.
        return [{key: one[key] for key in ("mediaType", "digest", "size", "platform")} for one in found if one["platform"]["architecture"]]
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        raise FirmwareError("containers", f"{index} is not one of ours", f"remove {layout}, or give another folder with --home") from None


def _named(folder: Path, digest: str) -> Sequence[str]:
    """The blobs that a manifest names, itself included."""
    manifest = json.loads((folder / digest).read_bytes())
    return [digest, *(part["digest"].removeprefix("sha256:") for part in (manifest["config"], *manifest["layers"]))]


def add(layout: Path, name: str, new: Image, here: str) -> None:
    """Put an image into a layout under `name`, beside those of other architectures and in place of its own older one. Whoever reads meanwhile sees the old index or the new one, whole. `here`: the architecture that `docker load` takes of it where it is there, else the first.

    Raises:
        FirmwareError: there is an index that is not ours.
    """
    blobs = layout / "blobs" / "sha256"
    blobs.mkdir(parents=True, exist_ok=True)
    arch = new.entry["platform"]["architecture"]
    others = [entry for entry in listed(layout, name) if entry["platform"]["architecture"] != arch]
    for digest, data in new.blobs.items():
        _write(blobs / digest, data)
    entries = sorted([*others, dict(new.entry)], key=lambda entry: str(entry["platform"]["architecture"]))
    index = _document({"schemaVersion": 2, "mediaType": INDEX_MEDIA, "manifests": entries})
    digest = hashlib.sha256(index).hexdigest()
    _write(blobs / digest, index)
    _write(layout / "oci-layout", b'{"imageLayoutVersion": "1.0.0"}\n')
    _write(layout / "manifest.json", _document([_loaded(blobs, name, entries, here)]))
    top = {"mediaType": INDEX_MEDIA, "digest": f"sha256:{digest}", "size": len(index), "annotations": {REF_NAME: name, FULL_NAME: LIBRARY + name}}
    _write(layout / "index.json", _document({"schemaVersion": 2, "mediaType": INDEX_MEDIA, "manifests": [top]}))
    kept = {digest, *(blob for entry in entries for blob in _named(blobs, entry["digest"].removeprefix("sha256:")))}
    for path in blobs.iterdir():
        if path.name not in kept:
            path.unlink()


def _loaded(blobs: Path, name: str, entries: Sequence[Mapping[str, Any]], here: str) -> dict[str, Any]:
    """What `docker load` takes, which takes one architecture."""
    chosen = next((entry for entry in entries if entry["platform"]["architecture"] == here), entries[0])
    _, config, *layers = _named(blobs, chosen["digest"].removeprefix("sha256:"))
    return {"Config": f"blobs/sha256/{config}", "RepoTags": [name], "Layers": [f"blobs/sha256/{layer}" for layer in layers]}


def _write(path: Path, data: bytes) -> None:
    new = path.with_name(f".{path.name}.new")
    new.write_bytes(data)
    os.replace(new, path)
