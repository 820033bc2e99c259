"""A wall clock that a test sets under a running agent; all else of the agent is as it is deployed.

libfaketime cannot do that: it reads its file at each call without a lock, and asked by several threads it now and then shows the true time in between (0.9.10: 8 of 3,904 calls of one thread beside two others). What it
shows from the start on, it shows well (`test_cold_boot.clock`).
"""

import mmap
import struct
import time
from pathlib import Path
from types import TracebackType
from typing import Self

PROGRAM = """
import mmap, struct, sys, time
with open(sys.argv.pop(1), "rb") as file:
    offset = mmap.mmap(file.fileno(), 8, access=mmap.ACCESS_READ)
true = time.time
time.time = lambda: true() + struct.unpack_from("d", offset)[0]
from edge_runtime.cli import main
sys.exit(main())
"""
"""An agent (`Agent.program`) whose wall clock is off by the seconds in a file. It is mapped: a number of eight bytes is seen as it was or as it is, and a call costs no look at a disk."""


class SettableClock:
    """How far the clock of the agents of `program` is off."""

    def __init__(self, folder: Path) -> None:
        path = folder / "wall-offset"
        path.write_bytes(struct.pack("d", 0.0))
        with open(path, "r+b") as file:
            self._offset = mmap.mmap(file.fileno(), 8)
        self.program = ("-c", PROGRAM, str(path))

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._offset.close()

    def off_by(self, seconds: float) -> None:
        """From now on it shows the true time and so much."""
        struct.pack_into("d", self._offset, 0, seconds)

    def shows(self, unix_s: float) -> None:
        """It shows this now, and goes on from there."""
        self.off_by(unix_s - time.time())
