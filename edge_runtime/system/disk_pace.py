"""Bulk writing that leaves the disk to the journal.

A disk has one queue. What is written without being synced gathers in memory, by the hundred megabytes, and goes out all at once; a commit of the journal then waits behind it, and with it each decision. While an image of
200 MB was unpacked on a disk that takes 20 MB/s (an SD card does), a decision took 0.4 s at the median and 1.9 s at the most; a journal of a file system of its own would not help, as the queue is the disk's.

So whoever writes much has it written out in pieces, each as large as the disk takes in `PIECE_S`, and rests after each as long as it took. On a fast disk the pieces are large and the rests are short.
"""

import ctypes
import os
import stat
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import BinaryIO

FIRST, LEAST, MOST = 1 << 20, 512 << 10, 4 << 20
"""Bytes of a piece: at first, and its bounds. Below the least a file system's own writing (its journal, its tables) is most of it; the most keeps what is waited for at once small also on a disk that has a large cache."""

PIECE_S = 0.02
"""So long the disk shall be busy with one piece: what a commit waits at the most, where nobody else writes."""

SURE = 4
"""Pieces one after the other that were quick before they get larger: a disk's own cache takes a few at once, and is slow again."""

REST_MOST_S = 0.25
"""A rest after a piece that took longer is as long: others keep the disk busy then, and resting gives it to them."""

HOGGED_S = 1.0
"""Where the smallest piece takes as long, others write, and writing out all of a file system is writing theirs too: then it is tried seldom, and becomes more often from there."""

ENTRY = 4096
"""Bytes that a file or folder counts beside what is in it: its inode, its name, and what the file system's journal has of both."""


def syncfs(descriptor: int) -> None:
    """Write out all of the file system on which an open file is: syncfs(2). Raises OSError."""
    if ctypes.CDLL(None, use_errno=True).syncfs(descriptor) != 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))


class Pace:
    """For one who writes at a time; blocks, in a thread.

    Args:
        flush: writes out what has been written: all of the file system, as a layer has thousands of files; or `os.fdatasync`, for one file or a block device.
        rest: False: no rests, where something stands still until all is written.
    """

    def __init__(self, flush: Callable[[int], None] = syncfs, *, rest: bool = True, clock: Callable[[], float] = time.monotonic, sleep: Callable[[float], None] = time.sleep) -> None:
        self._flush, self._rest, self._clock, self._sleep = flush, rest, clock, sleep
        self._waiting, self._quick = 0, 0
        self.piece = FIRST

    def wrote(self, descriptor: int, count: int) -> None:
        """So many bytes more were written; where they make a piece, it is on the disk when this returns. Raises OSError where the disk could not write it."""
        self._waiting += count
        if self._waiting < self.piece:
            return
        began = self._clock()
        self._flush(descriptor)
        took, pieces, self._waiting = self._clock() - began, self._waiting / self.piece, 0
        self._quick = self._quick + 1 if took < PIECE_S / 2 * pieces else 0
        if took > HOGGED_S and self.piece == LEAST:
            self.piece = MOST
        elif took > 2 * PIECE_S * pieces:
            self.piece = max(LEAST, self.piece // 2)
        elif self._quick == SURE:
            self.piece, self._quick = min(MOST, self.piece * 2), 0
        if self._rest:
            self._sleep(min(took, REST_MOST_S))


def remove(folder: str | Path, pace: Pace) -> None:
    """Remove a folder and all below it; what cannot be removed, or is not there, is passed over. No link is followed. Blocks.

    What 15,000 files leave behind in a file system's tables was 0.3 s for a disk that takes 20 MB/s, at once.
    """
    with suppress(OSError):
        for _, folders, names, descriptor in os.fwalk(folder, topdown=False):
            for name, is_folder in (*((name, False) for name in names), *((name, True) for name in folders)):
                with suppress(OSError):
                    os.rmdir(name, dir_fd=descriptor) if is_folder and not _is_link(name, descriptor) else os.unlink(name, dir_fd=descriptor)
                pace.wrote(descriptor, ENTRY)
        os.rmdir(folder)


def _is_link(name: str, beside: int) -> bool:
    return stat.S_ISLNK(os.stat(name, dir_fd=beside, follow_symlinks=False).st_mode)


class PacedFile:
    """A file that is written at a pace; what else there is of it is the file's own."""

    def __init__(self, file: BinaryIO, pace: Pace) -> None:
        self._file, self._pace = file, pace
        self.tell, self.seek, self.truncate = file.tell, file.seek, file.truncate

    def write(self, data: bytes) -> int:
        """Append, or write over what is there."""
        count = self._file.write(data)
        self._pace.wrote(self._file.fileno(), count)
        return count
