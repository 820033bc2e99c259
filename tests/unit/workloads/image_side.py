"""Images for tests: layers from a few entries, OCI layouts and docker-save archives around them, each written by the standard library, which shares no code with the reader."""

import gzip
import hashlib
import io
import json
import os
import tarfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from edge_runtime.workloads.drivers.outside import short_of_root
from edge_runtime.workloads.images.manifest import Platform

HERE = Platform.here()
AS_ROOT = not short_of_root()

Entry = tuple[str, str, bytes]
"""Kind (`file`, `folder`, `symlink`, `hard`, `fifo`, `char`), name, content or target."""

_KINDS = {"file": tarfile.REGTYPE, "folder": tarfile.DIRTYPE, "symlink": tarfile.SYMTYPE, "hard": tarfile.LNKTYPE, "fifo": tarfile.FIFOTYPE, "char": tarfile.CHRTYPE}


def layer(entries: Sequence[Entry], *, mode: int = 0o755, uid: int = 0, form: int = tarfile.PAX_FORMAT) -> bytes:
    """A plain tar."""
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w", format=form, encoding="utf-8", errors="surrogateescape") as archive:
        for kind, name, content in entries:
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.uid, member.gid, member.mtime = _KINDS[kind], mode, uid, uid, 1_700_000_000
            if kind in ("symlink", "hard"):
                member.linkname = content.decode("utf-8", "surrogateescape")
                archive.addfile(member)
            else:
                member.size = len(content) if kind == "file" else 0
                archive.addfile(member, io.BytesIO(content))
    return target.getvalue()


def sha(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def config(layers: Sequence[bytes], run: Mapping[str, Any] | None = None, **more: Any) -> bytes:
    platform = {"os": HERE.os, "architecture": HERE.arch} | ({"variant": HERE.variant} if HERE.variant else {})
    return json.dumps({**platform, "config": run or {}, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha(one)}" for one in layers]}, **more}).encode()


def layout(folder: Path, layers: Sequence[bytes], *, name: str = "app:1", run: Mapping[str, Any] | None = None, packed: bool = True, media: str = "", platform: Mapping[str, Any] | None = None) -> Path:
    """An OCI layout with one image; a folder that has one already gets one more."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        (blobs / sha(data)).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{sha(data)}", "size": len(data)}

    listed = [put(gzip.compress(one, mtime=0) if packed else one, media or "application/vnd.oci.image.layer.v1.tar" + ("+gzip" if packed else "")) for one in layers]
    manifest = {"schemaVersion": 2, "config": put(config(layers, run), "application/vnd.oci.image.config.v1+json"), "layers": listed}
    entry = put(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json") | {"annotations": {"org.opencontainers.image.ref.name": name}}
    if platform is not None:
        entry["platform"] = dict(platform)
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    before = json.loads((folder / "index.json").read_text())["manifests"] if (folder / "index.json").exists() else []
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [*before, entry]}))
    return folder


def archive(folder: Path, path: Path) -> Path:
    """A folder as a tar."""
    with tarfile.open(path, "w") as target:
        target.add(folder, arcname=".")
    return path


def docker_save(path: Path, layers: Sequence[bytes], *, name: str = "app:1", run: Mapping[str, Any] | None = None, linked: bool = False) -> Path:
    """What `docker save` wrote before version 25. `linked`: a layer that is there already is a symbolic link to it."""
    with tarfile.open(path, "w") as target:
        def put(where: str, data: bytes) -> str:
            member = tarfile.TarInfo(where)
            member.size = len(data)
            target.addfile(member, io.BytesIO(data))
            return where

        document, paths, first = config(layers, run), [], {}
        for at, one in enumerate(layers):
            where = f"{at:064x}/layer.tar"
            if linked and sha(one) in first:
                member = tarfile.TarInfo(where)
                member.type, member.linkname = tarfile.SYMTYPE, f"../{first[sha(one)]}"
                target.addfile(member)
            else:
                put(where, one)
                first[sha(one)] = where
            paths.append(where)
        put("manifest.json", json.dumps([{"Config": put(f"{sha(document)}.json", document), "RepoTags": [name], "Layers": paths}]).encode())
    return path


def tree(folder: Path) -> dict[str, tuple[str, Any]]:
    """All below a folder: by path its kind, and content or target."""
    found: dict[str, tuple[str, Any]] = {}
    for where, folders, names in os.walk(folder):
        for name in folders + names:
            path = os.path.join(where, name)
            relative = os.path.relpath(path, folder)
            if os.path.islink(path):
                found[relative] = ("symlink", os.readlink(path))
            elif os.path.isdir(path):
                found[relative] = ("folder", None)
            elif os.path.isfile(path):
                found[relative] = ("file", Path(path).read_bytes())
            elif os.path.lexists(path):  # overlayfs lists a mark that takes away what was not there, and then says that it does not exist
                found[relative] = ("other", None)
    return found
