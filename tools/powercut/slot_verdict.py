"""What a device would start from a disk, told from its bytes alone: systemd-boot's choice, and whether kernel, initrd and root of that choice are whole."""

import hashlib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from edge_runtime.updates import slots
from edge_runtime.updates.fat import Fat
from edge_runtime.updates.verity import BLOCK, hash_tree
from firmware_images.layout import ESP_NAME


@dataclass(frozen=True, slots=True)
class Known:
    """An image that may stand on the disk: what its files must be."""

    sequence: int
    root_hash: str
    salt: str
    blocks: int
    linux: str
    initrd: str


class Verdict:
    """Reads disks of one layout. `partitions` maps names to start and size, as a build's manifest has them."""

    def __init__(self, partitions: Mapping[str, Mapping[str, int]], images: list[Known]) -> None:
        self._partitions = partitions
        self._images = {image.root_hash: image for image in images}
        self._whole: dict[tuple[Any, ...], bool] = {}

    def choice(self, disk: Any) -> tuple[slots.Entry, dict[str, str], Fat]:
        """The entry that systemd-boot starts, its fields, the boot partition. Raises ValueError where there is none."""
        esp = self._partitions[ESP_NAME]
        fat = Fat(lambda offset, size: disk[esp["start"] + offset : esp["start"] + offset + size])
        there: dict[slots.Entry, dict[str, str]] = {}
        for found in fat.names(slots.ENTRIES):
            entry = slots.parse_name(found.name)
            if entry is None or found.folder:
                continue
            try:
                words = dict(line.partition(" ")[::2] for line in fat.file(f"{slots.ENTRIES}/{found.name}").decode(errors="replace").splitlines())
                fat.file(words["linux"])
            except (KeyError, ValueError, FileNotFoundError):
                continue  # systemd-boot passes over an entry without a kernel that is there
            there[entry] = words
        if not there:
            raise ValueError("no entry can be started")
        taken = slots.order(there)[0]
        return taken, there[taken], fat

    def sequence(self, disk: Any, slot_version: Mapping[str, Any]) -> int:
        """The sequence of the image that would run. `slot_version` changes with each write to a slot (its hash is not computed anew otherwise). Raises ValueError: nothing whole would start."""
        entry, words, fat = self.choice(disk)
        slot, root_hash = slots.running(words.get("options", ""))
        image = self._images.get(root_hash)
        if image is None:
            raise ValueError(f"{entry.name} names a root that nobody made")
        for name in ("linux", "initrd"):
            if hashlib.sha256(fat.file(words.get(name, "/nothing"))).hexdigest() != getattr(image, name):
                raise ValueError(f"{entry.name}: its {name} is not whole")
        key = (slot, root_hash, slot_version[slot])
        if key not in self._whole:
            start = self._partitions[slot]["start"]
            data = disk[start : start + image.blocks * BLOCK]
            tree = hash_tree(data, bytes.fromhex(image.salt))
            behind = start + len(data)
            self._whole[key] = tree.root.hex() == root_hash and disk[behind : behind + len(tree.tree)] == tree.tree
        if not self._whole[key]:
            raise ValueError(f"{entry.name}: its root is not whole")
        return image.sequence
