"""What reached a disk, in order, and the content that a power cut after any of it leaves.

A disk may keep what it was told in a cache of its own: only a flush makes the writes before it durable. Sectors of `SECTOR` bytes are written
whole or not at all.
"""

import random
from collections.abc import Iterator
from dataclasses import dataclass, field

SECTOR = 512
"""Bytes that a disk writes whole."""

PAGE = 4096
"""The other size that media write at once."""

KEEP = (0.0, 0.5, 0.9)
"""Shares of the unflushed writes that survive a cut: none, half, nearly all; one of them is drawn for each cut."""


@dataclass(frozen=True, slots=True)
class Write:
    """`data` at byte `offset`."""

    offset: int
    data: bytes


@dataclass(frozen=True, slots=True)
class Flush:
    """Everything before it is durable."""


@dataclass(frozen=True, slots=True)
class Loss:
    """The power was really cut here during the recording: these patches are what was lost, the run went on from the result."""

    patches: tuple[Write, ...]


Entry = Write | Flush | Loss


@dataclass(slots=True)
class BlockLog:
    """The content at the start, and every entry since. A position is a number of entries."""

    base: bytes
    entries: list[Entry] = field(default_factory=list)

    @property
    def position(self) -> int:
        """Where the log ends now."""
        return len(self.entries)

    @property
    def writes(self) -> int:
        """Writes so far."""
        return sum(isinstance(entry, Write) for entry in self.entries)

    @property
    def flushes(self) -> int:
        """Flushes so far."""
        return sum(isinstance(entry, Flush) for entry in self.entries)

    def cuts(self) -> list[int]:
        """The positions right after each write: where a cut differs from the one before."""
        return [number + 1 for number, entry in enumerate(self.entries) if isinstance(entry, Write)]

    def unflushed(self, position: int) -> list[Write]:
        """The writes before `position` that no flush made durable."""
        pending: list[Write] = []
        for number in range(position - 1, -1, -1):
            entry = self.entries[number]
            if not isinstance(entry, Write):
                break
            pending.append(entry)
        return pending[::-1]


def apply(content: bytearray, entry: Entry) -> None:
    """Do one entry to `content`."""
    if isinstance(entry, Write):
        content[entry.offset : entry.offset + len(entry.data)] = entry.data
    elif isinstance(entry, Loss):
        for patch in entry.patches:
            content[patch.offset : patch.offset + len(patch.data)] = patch.data


class Player:
    """Goes through a log; `content` is that after the first `position` entries, `durable` that after the last flush among them."""

    def __init__(self, log: BlockLog) -> None:
        self._log = log
        self.position = 0
        self.content = bytearray(log.base)
        self.durable = bytearray(log.base)
        self._durable_position = 0

    def go(self, position: int) -> None:
        """On to `position`."""
        for number in range(self.position, position):
            entry = self._log.entries[number]
            apply(self.content, entry)
            if not isinstance(entry, Write):
                for late in range(self._durable_position, number + 1):
                    apply(self.durable, self._log.entries[late])
                self._durable_position = number + 1
        self.position = position

    def lossy(self, draw: random.Random) -> list[Write]:
        """A cut here on a disk that had not yet written all of its cache: what made it to the medium besides `durable`; never all of it."""
        pending = self._log.unflushed(self.position)
        left = list(survivors(pending, draw))
        return left if left != pending else pending[:-1]


def survivors(pending: list[Write], draw: random.Random) -> Iterator[Write]:
    """The parts of `pending` that made it to the medium."""
    keep = draw.choice(KEEP)
    last = len(pending) - 1
    for number, write in enumerate(pending):
        torn = number == last or draw.random() < 0.1
        if torn and len(write.data) > SECTOR and draw.random() < 0.5:
            unit = PAGE if len(write.data) > PAGE and draw.random() < 0.5 else SECTOR
            cut = draw.randrange(0, len(write.data), unit)
            if draw.random() < 0.5:
                yield Write(write.offset, write.data[:cut])
            else:
                yield Write(write.offset + cut, write.data[cut:])
        elif draw.random() < keep:
            yield write
