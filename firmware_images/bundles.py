"""Making update bundles of built images: whole, or a delta against the image that a device runs; and the keys they are signed with. The format is `edge_runtime.updates.bundle`."""

import hashlib
import json
import mmap
import os
import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.errors import ContractError
from edge_runtime.updates.bundle import ARTIFACTS, GATE_LEAST_S, GATE_MOST_S, PIECE_MAX_BYTES, TRIES_MOST, Artifact, Manifest, Piece, head, parse_manifest, signed_part
from edge_runtime.updates.verity import BLOCK

from . import room, tools
from .errors import FirmwareError

ANCHOR_BYTES = 64
"""What two places must have in common to be looked at as the same: long enough that chance has no part in it."""

ANCHOR_STEP = 4096
"""A stretch of this and ANCHOR_BYTES that is in both is always found; smaller ones are carried."""

MATCH_LEAST_BYTES = 1024
"""A shorter match costs as much in the manifest as it saves."""

TRUSTED = "keys/trusted"
"""Below a home: the public keys that its images trust."""

TRIES = 3
GATE_S = 300
"""Starts that a new image gets, and seconds after a start within which its agent must have proven itself: a slow device needs a minute to be up and connected."""


@dataclass(frozen=True, slots=True)
class Bundled:
    """A finished bundle: its file, its size, and bytes of the image that it does not carry."""

    path: Path
    size: int
    saved: int


def trusted(home: Path) -> dict[str, bytes]:
    """Public keys (PEM) by name that images of this home trust: `keys/trusted/*.pem`. Where there is none yet, a pair of this home's own is made."""
    if not (home / TRUSTED).exists():
        make_key(home)
    return there(home)


def there(home: Path) -> dict[str, bytes]:
    """Those keys, none where there are none yet."""
    return {path.stem: path.read_bytes() for path in sorted((home / TRUSTED).glob("*.pem"))}


def make_key(home: Path) -> None:
    """A pair of keys: the private one in `keys/update.key` (nobody else may read it), the public one among the trusted. Raises FirmwareError."""
    tools.require(["openssl"])
    private, folder = home / "keys" / "update.key", home / TRUSTED
    private.parent.mkdir(parents=True, exist_ok=True)
    if not private.exists():
        with tempfile.TemporaryDirectory(dir=private.parent) as top:
            tools.run(["openssl", "genpkey", "-algorithm", "ed25519", "-out", f"{top}/key"], field="key", remedy="see openssl's words")
            os.chmod(f"{top}/key", 0o600)
            os.replace(f"{top}/key", private)
    new = folder.with_name("trusted.new")
    new.mkdir(exist_ok=True)
    tools.run(["openssl", "pkey", "-in", str(private), "-pubout", "-out", str(new / "update.pem")], field="key", remedy="see openssl's words")
    os.replace(new, folder)


def sign(key: Path, message: bytes) -> bytes:
    """An Ed25519 signature by the private key in a PEM file. Raises FirmwareError."""
    tools.require(["openssl"])
    if not key.is_file():
        raise FirmwareError("key", f"{key} is no file", "give an Ed25519 private key (PEM) with --key")
    with tempfile.TemporaryDirectory() as top:
        said, signed = Path(top) / "message", Path(top) / "signature"
        said.write_bytes(message)
        tools.run(["openssl", "pkeyutl", "-sign", "-rawin", "-inkey", str(key), "-in", str(said), "-out", str(signed)], field="key", remedy="give an Ed25519 private key (PEM) with --key")
        return signed.read_bytes()


def _common(first: Any, second: Any, one: int, two: int) -> int:
    """Length of what `first` from `one` on and `second` from `two` on have in common."""
    length, step = 0, 1 << 16
    most = min(len(first) - one, len(second) - two)
    while length < most:
        size = min(step, most - length)
        if first[one + length : one + length + size] == second[two + length : two + length + size]:
            length += size
            continue
        if size == 1:
            break
        step = max(1, size // 2)
    return length


def matches(base: Any, new: Any) -> Iterator[tuple[int, int, int]]:
    """Stretches of `new` that are also in `base`: (place in new, place in base, bytes), one behind the other. Both are bytes or a map of a file. Greedy: from an anchor on as far as it goes."""
    places: dict[bytes, int] = {}
    for at in range(0, len(base) - ANCHOR_BYTES + 1, ANCHOR_STEP):
        places.setdefault(base[at : at + ANCHOR_BYTES], at)
    at, shift, end = 0, 0, len(new) - ANCHOR_BYTES
    begun = 0
    while at <= end:
        found = at + shift if 0 <= at + shift <= len(base) - ANCHOR_BYTES and base[at + shift : at + shift + ANCHOR_BYTES] == new[at : at + ANCHOR_BYTES] else places.get(new[at : at + ANCHOR_BYTES])
        if found is None:
            at += 1
            continue
        back = 0
        while at - back > begun and found - back > 0 and new[at - back - 1] == base[found - back - 1]:
            back += 1
        length = back + _common(new, base, at, found)
        if length < MATCH_LEAST_BYTES:
            at += 1
            continue
        yield at - back, found - back, length
        at = begun = at - back + length
        shift = found + length - back - at


def pieces(data: Any, base: Any = None) -> list[Piece]:
    """What a manifest says of an artifact: pieces of at most PIECE_MAX_BYTES, those that `base` has too taken from there."""
    found: list[Piece] = []

    def cut(source: str, at: int, offset: int, size: int) -> None:
        while size:
            part = min(size, PIECE_MAX_BYTES)
            found.append(Piece(source, part, offset, hashlib.sha256(data[at : at + part]).hexdigest()))
            at, size = at + part, size - part
            offset += part if source == "base" else 0

    done = 0
    for at, offset, size in matches(base, data) if base is not None else ():
        cut("data", done, 0, at - done)
        cut("base", at, offset, size)
        done = at + size
    cut("data", done, 0, len(data) - done)
    return found


def write(target: Path, manifest: Manifest, contents: dict[str, Any], key: Path) -> Bundled:
    """Sign and write a bundle, whole or not at all; the pieces are read from `contents`. Raises FirmwareError."""
    raw = jsoncodec.encode(manifest.to_json()).encode()
    try:
        parse_manifest(raw)
    except ContractError as error:
        raise FirmwareError(error.field, error.problem, "see the image") from None
    signature = sign(key, signed_part(raw))
    new = target.with_name(target.name + ".new")
    with new.open("wb") as file:
        file.write(head(raw, signature) + raw)
        for artifact in manifest.artifacts:
            at = 0
            for piece in artifact.pieces:
                if piece.source == "data":
                    file.write(contents[artifact.name][at : at + piece.size])
                at += piece.size
        size = file.tell()
    os.replace(new, target)
    return Bundled(target, size, sum(part.size for part in manifest.artifacts) - manifest.carried)


def _contents(folder: Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """An image's manifest, and its root, kernel and initrd as maps of the files. Raises FirmwareError."""
    try:
        told = json.loads((folder / "manifest.json").read_text())
        found: dict[str, Any] = {}
        for name in ARTIFACTS:
            with (folder / name).open("rb") as file:
                found[name] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if not {"root_hash", "salt", "sequence", "command_line", "arch", "profile", "version"} <= set(told) or len(found["root"]) % BLOCK:
            raise ValueError("its manifest lacks something")
    except (OSError, ValueError) as error:
        raise FirmwareError("image", f"{folder} holds no image that can be bundled ({error})", "give the folder of a finished build (python -m firmware_images build)") from None
    return told, found


def bundle(image: Path, base: Path | None, key: Path, target: Path, *, tries: int = TRIES, gate_s: int = GATE_S, more: Sequence[str] = ()) -> Bundled:
    """Bundle the built image in the folder `image`; a delta where a `base` is given. `more`: words for the kernel's command line. Raises FirmwareError."""
    for name, value, least, most in (("tries", tries, 1, TRIES_MOST), ("gate", gate_s, GATE_LEAST_S, GATE_MOST_S)):
        if not least <= value <= most:
            raise FirmwareError(name, f"{value}", f"give {least} to {most} with --{name}")
    told, found = _contents(image)
    if target.is_dir():
        raise FirmwareError("output", f"{target} is a folder", "give the name of the bundle's file with --output")
    room.ready(target.parent, "output", "--output", sum(map(len, found.values())))
    before, old = _contents(base) if base is not None else ({}, {})
    if before and (before["arch"], before["profile"]) != (told["arch"], told["profile"]):
        raise FirmwareError("base", f"is for {before['arch']} {before['profile']}, the image for {told['arch']} {told['profile']}", "give the image that the devices run")
    if before and before["sequence"] >= told["sequence"]:
        raise FirmwareError("base", f"has sequence {before['sequence']}, the image {told['sequence']}: devices would refuse it", "build the image with a higher --sequence")
    sign(key, b"\0")  # a key that cannot sign is told before the images are compared, which takes a while; openssl 3.0 signs no empty message
    artifacts = tuple(Artifact(name, len(found[name]), tuple(pieces(found[name], old.get(name)))) for name in ARTIFACTS)
    manifest = Manifest(
        told["arch"], told["profile"], told["version"], told["sequence"], before.get("root_hash", ""), " ".join([told["command_line"], *more]), told["root_hash"], told["salt"], tries, gate_s, artifacts,
    )
    return write(target, manifest, found, key)
