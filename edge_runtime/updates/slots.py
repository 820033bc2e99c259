"""Slots and the boot loader's entries: their names, their text, and which one systemd-boot takes. Pure.

The boot loader counts (systemd's automatic boot assessment, https://systemd.io/AUTOMATIC_BOOT_ASSESSMENT): `novacron-0000000002-b+3.conf` has three starts left. systemd-boot renames it to `+2-1` before it starts the
entry, and puts one with none left behind all others. An entry that has proven itself has no counter. So the old slot's entry is never touched by an update, and whatever becomes of the new one, the old one is there.
"""

import re
from collections.abc import Iterable
from dataclasses import dataclass

SLOTS = ("novacron-a", "novacron-b")
"""Names of the partitions."""

SORT_KEY = "novacron"

ENTRIES = "loader/entries"
"""Folder of the entries in the boot partition."""

DAMAGED = "novacron/damaged"
"""File of the boot partition in which a start that ends early leaves which slot it is, the root hash and why: a line with a space between them. The initrd does that of a kept image that is damaged, an image on trial where it has no data partition."""

COUNTED_VARIABLE = "LoaderBootCountPath-4a67b082-0a4c-41cf-b6c7-440b29bb8c4f"
"""The firmware's variable that systemd-boot sets where it has counted the start (https://systemd.io/BOOT_LOADER_INTERFACE)."""

STARTS_WORD = "novacron-starts"
"""Begins the last block of a slot's partition: `novacron-starts ROOT N`, N starts of that root in a row have not lasted. No image reaches as far."""

FACTORY_STARTS = 1
"""The entry that an image is built with has this many starts left: whether the boot loader has counted the first one shows whether the firmware lets it (it renames a file)."""

_NAME = re.compile(r"novacron-(?P<sequence>\d{10})-(?P<slot>[ab])(?:\+(?P<left>\d{1,2})(?:-(?P<done>\d{1,2}))?)?\.conf\Z", re.IGNORECASE)


@dataclass(frozen=True, slots=True)
class Entry:
    """One entry: the image's `sequence`, its slot, starts left (None: it has proven itself) and starts used."""

    sequence: int
    slot: str
    left: int | None = None
    done: int = 0

    @property
    def name(self) -> str:
        """Its file's name."""
        counter = "" if self.left is None else f"+{self.left}" + (f"-{self.done}" if self.done else "")
        return f"novacron-{self.sequence:010d}-{self.slot[-1]}{counter}.conf"


def parse_name(name: str) -> Entry | None:
    """An entry from its file's name; None for any other file."""
    found = _NAME.match(name)
    if found is None:
        return None
    return Entry(int(found["sequence"]), f"novacron-{found['slot'].lower()}", None if found["left"] is None else int(found["left"]), int(found["done"] or 0))


def folder(root_hash: str) -> str:
    """The folder of kernel and initrd in the boot partition."""
    return f"novacron-{root_hash[:16]}"


def slot_words(slot: str, blocks: int, root_hash: str, salt: str) -> str:
    """What the kernel's command line says of the slot; the initrd reads it."""
    return f"novacron.slot={slot} novacron.verity={blocks}:{root_hash}:{salt}"


def entry_text(title: str, version: str, sequence: int, root_hash: str, options: str) -> str:
    """An entry's file (UAPI.1 Boot Loader Specification). `version` orders: it is the sequence; what people call the image stands in the title."""
    where = folder(root_hash)
    return f"title {title} {version}\nsort-key {SORT_KEY}\nversion {sequence}\nlinux /{where}/linux\ninitrd /{where}/initrd\noptions {options}\n"


def running(command_line: str) -> tuple[str, str]:
    """Slot and root hash that the kernel was started with; raises ValueError where it was started otherwise."""
    words = dict(word.partition("=")[::2] for word in command_line.split())
    slot, table = words.get("novacron.slot", ""), words.get("novacron.verity", "").split(":")
    if slot not in SLOTS or len(table) != 3:
        raise ValueError("the command line names no slot")
    return slot, table[1]


def other(slot: str) -> str:
    """The slot that does not run."""
    return SLOTS[1 - SLOTS.index(slot)]


def order(entries: Iterable[Entry]) -> list[Entry]:
    """As systemd-boot sorts them (`boot_entry_compare`): those without a start left last, then the newest, then (the same sequence twice: a cut while one was marked good) any; the first is started."""
    return sorted(entries, key=lambda entry: (entry.left == 0, -entry.sequence, -1 if entry.left is None else -entry.left, entry.done))
