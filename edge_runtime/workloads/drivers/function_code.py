"""Native code of modules on this node's disk: kept with a keyed hash, loaded only where that is right.

    <folder>/<module's digest>-<engine's version>.code, .hash    native code, and the hash that this node gave it
    <folder>/key                                                  the hash's key, made at the first use
"""

import fcntl
import importlib.metadata
import logging
import os
import platform
import secrets
from hashlib import blake2b
from hmac import compare_digest
from pathlib import Path

from .face import Refused
from .instance import read, sync_folder, write

log = logging.getLogger(__name__)

MAX_MODULE = 64 << 20
"""Bytes of a module: a Python interpreter with its library has 25 MB."""

MAX_CODE = 64
"""Modules whose native code is kept; the ones that were not used longest go."""


def engine_version() -> str:
    """That of the installed engine, which is not loaded for it."""
    return importlib.metadata.version("wasmtime")


class NativeCode:
    """The code below `folder`; `new` is a folder for what is under way. Methods block."""

    def __init__(self, folder: Path, new: Path) -> None:
        self._folder, self._new = folder, new

    def keep(self, digest: str, target: Path, descriptor: int) -> None:
        """Sign and name what a compiler wrote to `target`, open as `descriptor`. The hash comes first: code without one is not loaded."""
        data = target.read_bytes()
        path = self.path(digest)
        write(path.with_suffix(".hash"), {"hash": self._hash(digest, data)})
        os.fsync(descriptor)
        os.replace(target, path)
        sync_folder(self._folder)
        kept = sorted(self._folder.glob("*.code"), key=lambda one: one.stat().st_mtime, reverse=True)
        for old in kept[MAX_CODE:]:
            old.unlink(missing_ok=True)
            old.with_suffix(".hash").unlink(missing_ok=True)

    def verified(self, digest: str) -> bytes | None:
        """Native code of a module, where it is there and ours."""
        path = self.path(digest)
        told = read(path.with_suffix(".hash"))
        try:
            data = path.read_bytes()
        except OSError:
            return None
        if told is None or not compare_digest(str(told.get("hash")), self._hash(digest, data)):
            log.warning("the native code of module %s is not what was compiled here: it is not loaded, and made anew", digest)
            path.unlink(missing_ok=True)
            return None
        os.utime(path)
        return data

    def _hash(self, digest: str, data: bytes) -> str:
        keyed = blake2b(key=self._secret(), digest_size=32)
        keyed.update(f"{digest} {engine_version()} {platform.machine()}\n".encode())
        keyed.update(data)
        return keyed.hexdigest()

    def _secret(self) -> bytes:
        path = self._folder / "key"
        try:
            secret = path.read_bytes()
            if len(secret) == 32:
                return secret
        except FileNotFoundError:
            pass
        secret = secrets.token_bytes(32)
        temporary = self._new / "key"
        with open(temporary, "wb", opener=lambda name, flags: os.open(name, flags, 0o600)) as handle:
            handle.write(secret)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)
        return secret

    def path(self, digest: str) -> Path:
        """Where a module's is, there or not."""
        return self._folder / f"{digest}-{engine_version()}.code"


def whole(path: Path) -> bytes:
    """A module's bytes. Raises `Refused` where they are too many."""
    with open(path, "rb") as handle:
        if os.fstat(handle.fileno()).st_size > MAX_MODULE:
            raise Refused("image", f"the module has more than {MAX_MODULE} bytes", "build a smaller one")
        return handle.read()


def memory_file(data: bytes) -> int:
    """A descriptor of these bytes, which nobody can change any more."""
    descriptor = os.memfd_create("code", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]
    os.lseek(descriptor, 0, os.SEEK_SET)
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW)
    return descriptor
