"""The format of an update bundle, and every reason to refuse one. Pure.

A file: MAGIC, the manifest's length (4 bytes, big endian), an Ed25519 signature (64 bytes) over MAGIC and manifest, the manifest (JSON), and then the bytes of all pieces whose source is `data`, in order.
The manifest carries the SHA-256 of each piece, so the signature covers all. A piece with source `base` is read from the slot that runs: that is what a delta leaves out.
"""

import re
import struct
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

from ..contract import jsoncodec
from ..contract.errors import ContractError
from ..contract.schema import Field, check_fields
from .verity import BLOCK

MAGIC = b"NOVACRON BUNDLE 1\n"
SIGNATURE_BYTES = 64
_HEAD = struct.Struct(f">{len(MAGIC)}sI{SIGNATURE_BYTES}s")
HEAD_BYTES = _HEAD.size

MANIFEST_MAX_BYTES = 4 << 20
"""A host's image of 700 MiB in pieces of 256 KiB has a manifest of 300 KB; a delta has more pieces."""

PIECE_MAX_BYTES = 256 << 10
"""What a device holds in memory of an update, and what it fetches anew after a cut at most."""

PIECES_MAX = 40_000
"""Of one artifact: 10 GiB of whole pieces."""

COMMAND_LINE_MAX = 1024
"""The kernel of amd64 takes 2047 bytes in all; the slot's words come behind this."""

GATE_LEAST_S, GATE_MOST_S = 30, 86_400
TRIES_MOST = 9
"""systemd-boot's counter is read as a number; more than this is no trial any more."""

ARTIFACTS = ("root", "linux", "initrd")
"""In the order of their bytes in the bundle."""

_RESERVED = ("novacron.slot=", "novacron.verity=")
_LINE = re.compile(r"[\x20-\x7e]*\Z")
_SHA256 = re.compile(r"[0-9a-f]{64}\Z")
_VERSION = re.compile(r"[A-Za-z0-9][A-Za-z0-9.+~-]{0,63}\Z")

_ARTIFACT = (
    Field("bytes", "integer", "its size", minimum=1, maximum=1 << 40),
    Field("pieces", "array", "its pieces in order: [source, bytes, offset in the base, SHA-256]", max_items=PIECES_MAX),
)
MANIFEST_FIELDS = (
    Field("v", "integer", "the format's version, 1", minimum=1, maximum=1),
    Field("arch", "id", "the architecture it is for"),
    Field("profile", "id", "the profile it is for"),
    Field("version", "string", "what people call it", max_items=64),
    Field("sequence", "integer", "grows with each release; an older one is refused", minimum=0, maximum=9_999_999_999),
    Field("base", "hex", "root hash of the slot that its pieces with source base are read from; empty: it is whole", required=False, default=""),
    Field("command_line", "string", "the kernel's command line without what names the slot", max_items=COMMAND_LINE_MAX),
    Field("root_hash", "hex", "dm-verity's root hash of the root"),
    Field("salt", "hex", "its salt"),
    Field("tries", "integer", "starts it gets to prove itself", minimum=1, maximum=TRIES_MOST),
    Field("gate_s", "integer", "seconds after a start within which the agent must have proven itself", minimum=GATE_LEAST_S, maximum=GATE_MOST_S),
    Field("root", "object", "the root file system, without its hash tree", items=_ARTIFACT),
    Field("linux", "object", "the kernel", items=_ARTIFACT),
    Field("initrd", "object", "the initrd", items=_ARTIFACT),
)


class Refused(ContractError):
    """A bundle that is not installed; `reason` is one of signature, format, digest, truncated, board, downgrade, base, size, verity, firmware."""


@dataclass(frozen=True, slots=True)
class Piece:
    """`size` bytes with the digest `sha256`, from the bundle (`data`) or at `offset` of the running slot's artifact (`base`)."""

    source: str
    size: int
    offset: int
    sha256: str


@dataclass(frozen=True, slots=True)
class Artifact:
    """Root, kernel or initrd: `size` bytes in pieces."""

    name: str
    size: int
    pieces: tuple[Piece, ...]

    @property
    def carried(self) -> int:
        """Bytes of it that are in the bundle."""
        return sum(piece.size for piece in self.pieces if piece.source == "data")


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle holds and whom it is for."""

    arch: str
    profile: str
    version: str
    sequence: int
    base: str
    command_line: str
    root_hash: str
    salt: str
    tries: int
    gate_s: int
    artifacts: tuple[Artifact, ...]

    @property
    def root(self) -> Artifact:
        """The root file system."""
        return self.artifacts[0]

    @property
    def blocks(self) -> int:
        """Blocks of the root, without its hash tree."""
        return self.root.size // BLOCK

    @property
    def carried(self) -> int:
        """Bytes behind the manifest."""
        return sum(artifact.carried for artifact in self.artifacts)

    def to_json(self) -> dict[str, Any]:
        """As it is signed."""
        return {
            "v": 1, "arch": self.arch, "profile": self.profile, "version": self.version, "sequence": self.sequence, "base": self.base, "command_line": self.command_line,
            "root_hash": self.root_hash, "salt": self.salt, "tries": self.tries, "gate_s": self.gate_s,
            **{part.name: {"bytes": part.size, "pieces": [[piece.source, piece.size, piece.offset, piece.sha256] for piece in part.pieces]} for part in self.artifacts},
        }


@dataclass(frozen=True, slots=True)
class Running:
    """The image that runs: `slot_bytes` is the room of the slot that an update goes to."""

    arch: str
    profile: str
    sequence: int
    root_hash: str
    slot_bytes: int


def _pieces(name: str, given: dict[str, Any]) -> Artifact:
    pieces: list[Piece] = []
    for index, entry in enumerate(given["pieces"]):
        where = f"{name}.pieces[{index}]"
        if not isinstance(entry, list) or len(entry) != 4:
            raise Refused(where, "is not [source, bytes, offset, SHA-256]", "build the bundle anew", "format")
        source, size, offset, digest = entry
        numbers = all(isinstance(number, int) and not isinstance(number, bool) for number in (size, offset))
        if source not in ("data", "base") or not numbers or not 0 < size <= PIECE_MAX_BYTES or not 0 <= offset < 1 << 40 or not isinstance(digest, str) or not _SHA256.match(digest):
            raise Refused(where, "has a source, size, offset or digest that cannot be", "build the bundle anew", "format")
        pieces.append(Piece(source, size, offset, digest))
    if sum(piece.size for piece in pieces) != given["bytes"]:
        raise Refused(f"{name}.bytes", f"{given['bytes']} is not what its pieces come to", "build the bundle anew", "format")
    return Artifact(name, given["bytes"], tuple(pieces))


def parse_head(head: bytes) -> tuple[int, bytes]:
    """Length of the manifest and signature, from the first HEAD_BYTES of a bundle. Raises Refused."""
    if len(head) < HEAD_BYTES:
        raise Refused("bundle", f"ends after {len(head)} bytes", "download it again", "truncated")
    magic, length, signature = _HEAD.unpack(head[:HEAD_BYTES])
    if magic != MAGIC:
        raise Refused("bundle", "is no bundle of this format", "build it with `python -m firmware_images bundle`", "format")
    if not 0 < length <= MANIFEST_MAX_BYTES:
        raise Refused("manifest", f"{length} bytes are outside 1..{MANIFEST_MAX_BYTES}", "build the bundle anew", "format")
    return length, signature


def parse_manifest(raw: bytes) -> Manifest:
    """A manifest whose signature holds. Raises Refused naming the field."""
    try:
        found = check_fields(MANIFEST_FIELDS, jsoncodec.decode(raw, MANIFEST_MAX_BYTES), "manifest")
    except Refused:
        raise
    except ContractError as error:
        raise Refused(error.field, error.problem, error.remedy, "format") from None
    for name in ("root_hash", "salt"):
        if not _SHA256.match(found[name]):
            raise Refused(f"manifest.{name}", "is not 64 hexadecimal digits", "build the bundle anew", "format")
    if found["base"] and not _SHA256.match(found["base"]):
        raise Refused("manifest.base", "is not 64 hexadecimal digits", "build the bundle anew", "format")
    line = found["command_line"]
    if not _LINE.match(line) or any(word.startswith(_RESERVED) for word in line.split()):
        raise Refused("manifest.command_line", "has a character or a word that it may not have", "leave out what names the slot; printable ASCII only", "format")
    if not _VERSION.match(found["version"]):
        raise Refused("manifest.version", f"{found['version'][:64]!r} is no version", "use letters, digits and . + ~ -", "format")
    artifacts = tuple(_pieces(name, found[name]) for name in ARTIFACTS)
    if artifacts[0].size % BLOCK:
        raise Refused("root.bytes", f"{artifacts[0].size} is no whole number of blocks of {BLOCK}", "build the bundle anew", "format")
    if not found["base"] and any(piece.source == "base" for artifact in artifacts for piece in artifact.pieces):
        raise Refused("manifest.base", "is empty, and there are pieces from it", "build the bundle anew", "format")
    return Manifest(
        found["arch"], found["profile"], found["version"], found["sequence"], found["base"], line, found["root_hash"], found["salt"], found["tries"], found["gate_s"], artifacts,
    )


def signed_part(manifest: bytes) -> bytes:
    """What the signature is over."""
    return MAGIC + manifest


def open_manifest(head: bytes, manifest: bytes, verified: Callable[[bytes, bytes], bool]) -> Manifest:
    """The manifest of a bundle, believed. `verified` says whether a key that is trusted here made the signature over a message. Raises Refused."""
    length, signature = parse_head(head)
    if len(manifest) != length:
        raise Refused("manifest", f"ends after {len(manifest)} of {length} bytes", "download the bundle again", "truncated")
    if not verified(signed_part(manifest), signature):
        raise Refused("signature", "no key that this image trusts made it", "sign the bundle with the key that the image was built with", "signature")
    return parse_manifest(manifest)


def tree_bytes(blocks: int) -> int:
    """Bytes of the hash tree over so many blocks."""
    total, level = 0, blocks
    while level > 1:
        level = -(-level // (BLOCK // 32))
        total += level
    return total * BLOCK


def check_for(manifest: Manifest, running: Running) -> None:
    """Whether it may be installed on the device that runs `running`. Raises Refused."""
    for name, wanted, here in (("arch", manifest.arch, running.arch), ("profile", manifest.profile, running.profile)):
        if wanted != here:
            raise Refused(name, f"the bundle is for {wanted}, this device is {here}", f"take the bundle for {running.arch} {running.profile}", "board")
    if manifest.sequence <= running.sequence:
        raise Refused("sequence", f"{manifest.sequence} is not newer than {running.sequence}, which runs", "build what shall run with a higher --sequence", "downgrade")
    if manifest.root_hash == running.root_hash:
        raise Refused("root_hash", "is that of the root that runs", "there is nothing to update", "downgrade")
    if manifest.base and manifest.base != running.root_hash:
        raise Refused("base", f"the delta is against {manifest.base[:16]}, {running.root_hash[:16]} runs", "take the whole bundle, or the delta against what runs", "base")
    if manifest.root.size + tree_bytes(manifest.blocks) > running.slot_bytes:
        raise Refused("root.bytes", f"{manifest.root.size} and the hash tree do not fit the slot of {running.slot_bytes}", "build a smaller image, or write the disk anew", "size")


def layout(manifest: Manifest) -> Iterator[tuple[Artifact, Piece, int, int]]:
    """Every piece with its artifact, where it goes in that, and where its bytes begin behind the manifest (those of a `base` piece are nowhere: where the next would be)."""
    carried = 0
    for artifact in manifest.artifacts:
        at = 0
        for piece in artifact.pieces:
            yield artifact, piece, at, carried
            at += piece.size
            if piece.source == "data":
                carried += piece.size


def head(manifest: bytes, signature: bytes) -> bytes:
    """What stands before the manifest."""
    return _HEAD.pack(MAGIC, len(manifest), signature)
