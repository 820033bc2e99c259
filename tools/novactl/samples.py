"""Sample images, made on the spot: a container around this machine's static busybox, a WebAssembly function, and the disk of a virtual machine (`vm_sample`). Each is a tar archive of an OCI layout, as the archives folder of an edge takes it."""

import base64
import gzip
import io
import json
import os
import platform
import tarfile
from collections.abc import Mapping
from hashlib import sha256
from pathlib import Path
from typing import Any

from .client import CommandError

BUSYBOX = Path("/bin/busybox")
APPLETS = ("cat", "date", "echo", "env", "hostname", "id", "ls", "ps", "sh", "sleep", "true", "uname", "wc")

NAMES = {"container": "sample-box:1", "function": "sample-greet:1", "vm": "sample-vm:1"}
"""Names of the samples by kind."""

HELLO = 'trap "exit 0" TERM; echo "hello from $(hostname), a container on $(uname -s) $(uname -r) with $(ls /proc | wc -l) entries in /proc"; sleep 3600 & wait'
"""What the sample container does when nothing else is said: speaks, and stays."""

GREET = base64.b64decode(
    "AGFzbQEAAAABDAJgBH9/f38Bf2AAAAJEAhZ3YXNpX3NuYXBzaG90X3ByZXZpZXcxB2ZkX3JlYWQAABZ3YXNpX3NuYXBzaG90X3ByZXZpZXcxCGZkX3dyaXRlAAADAgEBBQMBAAIHEwIGbWVtb3J5AgAGX3N0YXJ0AAIKQAE+AEEAQesANgIA"
    "QQRBgIAENgIAQQBBAEEBQQgQABpBAEHkADYCAEEEQQdBCCgCAGo2AgBBAUEAQQFBCBABGgsLDgEAQeQACwdoZWxsbywgABUEbmFtZQEOAgAEcmVhZAEFd3JpdGU="
)
"""A WASI command of 227 bytes that answers `hello, ` and its input; made of `GREET_TEXT`, as a test proves."""

GREET_TEXT = """(module
  (import "wasi_snapshot_preview1" "fd_read" (func $read (param i32 i32 i32 i32) (result i32)))
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 2)
  (data (i32.const 100) "hello, ")
  (func (export "_start")
    (i32.store (i32.const 0) (i32.const 107)) (i32.store (i32.const 4) (i32.const 65536))
    (drop (call $read (i32.const 0) (i32.const 0) (i32.const 1) (i32.const 8)))
    (i32.store (i32.const 0) (i32.const 100)) (i32.store (i32.const 4) (i32.add (i32.const 7) (i32.load (i32.const 8))))
    (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))
"""

_GO = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "riscv64": "riscv64", "ppc64le": "ppc64le", "s390x": "s390x"}


GUEST_KERNEL = Path(__file__).parents[2] / ".novacron/guest-kernel"
"""Where the set-up puts a kernel for guests."""


def make(kind: str, folder: Path, kernel: str = "") -> Path:
    """Write the sample of a kind into a folder, which is made; returns the archive. Raises `CommandError` where it cannot be made here. `kernel`: folder of the kernel of a virtual machine."""
    parts = _container() if kind == "container" else _function() if kind == "function" else _vm(kernel)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{NAMES[kind].partition(':')[0]}.tar"
    # Whoever looks into the folder meanwhile sees nothing, or all of it.
    temporary = folder.parent / f".{path.name}.{os.getpid()}"
    with tarfile.open(temporary, "w") as archive:
        for name, data in parts.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            archive.addfile(member, io.BytesIO(data))
    os.replace(temporary, path)
    return path


def _container() -> dict[str, bytes]:
    try:
        program = BUSYBOX.read_bytes()
    except OSError as error:
        raise CommandError(f"image: {BUSYBOX} cannot be read ({error.strerror}); as root: apt install busybox-static") from None
    if b"/ld-linux" in program or b"/ld-musl" in program:
        raise CommandError(f"image: {BUSYBOX} needs libraries of this machine; as root: apt install busybox-static")
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        for folder in ("bin", "proc", "tmp"):
            member = tarfile.TarInfo(folder)
            member.type, member.mode = tarfile.DIRTYPE, 0o755
            archive.addfile(member)
        member = tarfile.TarInfo("bin/busybox")
        member.size, member.mode = len(program), 0o755
        archive.addfile(member, io.BytesIO(program))
        for name in APPLETS:
            member = tarfile.TarInfo(f"bin/{name}")
            member.type, member.linkname = tarfile.SYMTYPE, "busybox"
            archive.addfile(member)
    layer = target.getvalue()
    machine = platform.machine()
    config = {
        "os": "linux", "architecture": _GO.get(machine, machine), **({"variant": "v8"} if machine == "aarch64" else {}),
        "config": {"Cmd": ["sh", "-c", HELLO], "Env": ["PATH=/bin"]}, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(layer).hexdigest()}"]},
    }
    return _layout(NAMES["container"], json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json", gzip.compress(layer, 6, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip")


def _function() -> dict[str, bytes]:
    return _layout(NAMES["function"], b"{}", "application/vnd.wasm.config.v0+json", GREET, "application/wasm")


def _vm(kernel: str) -> dict[str, bytes]:
    from . import vm_sample

    disk = vm_sample.disk(kernel or (str(GUEST_KERNEL) if GUEST_KERNEL.is_dir() else ""))
    target = io.BytesIO()
    with tarfile.open(fileobj=target, mode="w") as archive:
        member = tarfile.TarInfo("disk/sample.raw")
        member.size, member.mode = len(disk), 0o644
        archive.addfile(member, io.BytesIO(disk))
    layer = target.getvalue()
    machine = platform.machine()
    config = {"os": "linux", "architecture": _GO.get(machine, machine), "config": {}, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{sha256(layer).hexdigest()}"]}}
    return _layout(NAMES["vm"], json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json", gzip.compress(layer, 1, mtime=0), "application/vnd.oci.image.layer.v1.tar+gzip")


def _layout(name: str, config: bytes, config_media: str, layer: bytes, layer_media: str) -> dict[str, bytes]:
    """An OCI layout with one image of one layer, as files by name."""
    files: dict[str, bytes] = {}

    def put(data: bytes, media: str, **more: Any) -> Mapping[str, Any]:
        digest = sha256(data).hexdigest()
        files[f"blobs/sha256/{digest}"] = data
        return {"mediaType": media, "digest": f"sha256:{digest}", "size": len(data), **more}

    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": put(config, config_media), "layers": [put(layer, layer_media)]}
    entry = put(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json", annotations={"org.opencontainers.image.ref.name": name})
    return {**files, "oci-layout": b'{"imageLayoutVersion": "1.0.0"}', "index.json": json.dumps({"schemaVersion": 2, "manifests": [entry]}).encode()}
