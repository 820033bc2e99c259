"""A device on plain files, for tests of its updater: boot partition, two slots, the folder of its state; what systemd-boot would start, and whether that is whole."""

import functools
import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from edge_runtime.updates import slots
from edge_runtime.updates.bundle import ARTIFACTS, Artifact, Manifest
from edge_runtime.updates.bundle import head as bundle_head
from edge_runtime.updates.install import Installer, Places
from edge_runtime.updates.verity import BLOCK, Verity, hash_tree
from firmware_images.bundles import pieces

SLOT_BYTES = 4 << 20
SALT = bytes(range(32))
SIGNED = b"s" * 64
"""What the tests' own signer writes; signatures themselves are tested with openssl."""


@dataclass(frozen=True)
class Image:
    """An image's content, as small as can be."""

    sequence: int
    content: dict[str, bytes]

    @functools.cached_property
    def tree(self) -> Verity:
        """The hash tree of its root."""
        return hash_tree(self.content["root"], SALT)

    @property
    def root_hash(self) -> str:
        """Of its root."""
        return self.tree.root.hex()

    def manifest(self, base: "Image | None" = None, **changed: Any) -> Manifest:
        """As a bundle's; a delta where there is a base."""
        artifacts = tuple(Artifact(name, len(self.content[name]), tuple(pieces(self.content[name], base.content[name] if base else None))) for name in ARTIFACTS)
        made = Manifest("amd64", "device", f"1.{self.sequence}", self.sequence, base.root_hash if base else "", "quiet", self.root_hash, SALT.hex(), 3, 60, artifacts)
        return replace(made, **changed)


def image(sequence: int, like: Image | None = None, blocks: int = 60) -> Image:
    """An image that no other one is like, or one a few bytes away from `like`."""
    if like is not None:
        root = bytearray(like.content["root"])
        root[70_000:70_016] = sequence.to_bytes(16, "big")
        return Image(sequence, {**like.content, "root": bytes(root)})
    noise = b"".join(hashlib.sha512(f"{sequence} {number}".encode()).digest() for number in range(blocks * BLOCK // 64))
    return Image(sequence, {"root": noise, "linux": noise[500 : len(noise) // 3], "initrd": noise[700 : len(noise) // 6]})


def packed(manifest: Manifest, content: dict[str, bytes], signature: bytes = SIGNED) -> bytes:
    """A bundle's bytes."""
    raw = json.dumps(manifest.to_json()).encode()
    out = bytearray(bundle_head(raw, signature) + raw)
    for artifact in manifest.artifacts:
        at = 0
        for piece in artifact.pieces:
            if piece.source == "data":
                out += content[artifact.name][at : at + piece.size]
            at += piece.size
    return bytes(out)


@dataclass
class Device:
    """One device with `first` in slot a. `boot` says what starts, and counts as systemd-boot does."""

    folder: Path
    first: Image
    running: tuple[str, str] = ("", "")
    image: dict[str, Any] = field(default_factory=dict)
    known: dict[str, Image] = field(default_factory=dict)
    factory: int | None = None
    renames: bool = True
    """Starts that the first image's entry has left; whether the firmware can rename a file."""

    def __post_init__(self) -> None:
        self.esp, self.state = self.folder / "esp", self.folder / "state"
        for made in (self.esp / slots.ENTRIES, self.state, self.esp / slots.folder(self.first.root_hash)):
            made.mkdir(parents=True)
        self.slots = {name: self.folder / name for name in slots.SLOTS}
        for path in self.slots.values():
            path.write_bytes(bytes(SLOT_BYTES))
        root = self.first.content["root"]
        self.slots["novacron-a"].write_bytes((root + self.first.tree.tree).ljust(SLOT_BYTES, b"\0"))
        for name in ("linux", "initrd"):
            (self.esp / slots.folder(self.first.root_hash) / name).write_bytes(self.first.content[name])
        self.know(self.first)
        options = "quiet " + slots.slot_words("novacron-a", len(root) // BLOCK, self.first.root_hash, SALT.hex())
        (self.esp / slots.ENTRIES / slots.Entry(self.first.sequence, "novacron-a", self.factory).name).write_text(slots.entry_text("NovaCron device", "1", self.first.sequence, self.first.root_hash, options))
        self.boot()

    def know(self, made: Image) -> None:
        """An image that may come to run here."""
        self.known[made.root_hash] = made

    def boot(self) -> Image:
        """Start as the boot loader would; the image that runs then. AssertionError where nothing whole would start."""
        entries = [found for path in (self.esp / slots.ENTRIES).iterdir() if (found := slots.parse_name(path.name))]
        assert entries, "there is no entry"
        taken = slots.order(entries)[0]
        path = self.esp / slots.ENTRIES / taken.name
        words = dict(line.split(" ", 1) for line in path.read_text().splitlines())
        if taken.left is not None and self.renames:
            path.rename(path.with_name(replace(taken, left=max(0, taken.left - 1), done=taken.done + 1).name))
        self.command_line = words["options"]
        self.running = slots.running(self.command_line)
        made = self.known[self.running[1]]
        data = self.slots[self.running[0]].read_bytes()
        assert data.startswith(made.content["root"] + made.tree.tree), "the slot is not whole"
        for name in ("linux", "initrd"):
            assert (self.esp / words[name].lstrip("/")).read_bytes() == made.content[name], f"{name} is not whole"
        self.image = {"arch": "amd64", "profile": "device", "sequence": made.sequence}
        return made

    def installer(self, verified: Callable[[bytes, bytes], bool] = lambda message, signature: signature == SIGNED) -> Installer:
        """The updater of what runs."""
        return Installer(Places(self.esp, self.slots, self.state, self.command_line, self.image, verified), lambda text: None)


FIRST, SECOND = image(1), image(2)
SMALL, SMALL_NEXT = image(1, blocks=8), image(2, blocks=8)
LARGE = image(2, blocks=300)
TOLD = SECOND.manifest().to_json()
ORDER = {"id": "u-1", "action": "install"}


def device(folder: Path, *known: Image) -> Device:
    """One that runs `FIRST`, and can start what else it knows."""
    made = Device(folder, FIRST)
    for one in known:
        made.know(one)
    return made


def placed(folder: Path, data: bytes) -> dict[str, Any]:
    """An order for a bundle with these bytes."""
    (folder / "bundle").write_bytes(data)
    return {**ORDER, "path": str(folder / "bundle")}
