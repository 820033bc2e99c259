"""Lets a stopped guest run again if the program that stopped it is killed.

    python -m gpu_migration.guard QMP-SOCKET JOURNAL

On its standard input come letters: `s`, the guest is about to be stopped; `d`, all is over, whatever came of it. At the end of the input without a `d` QEMU is told to forget what it was told for the move, and after
an `s` the guest is resumed; not where the journal is there: then the target was asked to commit, and only it knows whose the guest is.
"""

import os
import sys
from pathlib import Path

from .qemu_guest import forget, resume
from .qemu_qmp import QemuError, Qmp


def main() -> int:
    """Exit status 1 where the guest should run and could not be made to."""
    control, journal = Path(sys.argv[1]), Path(sys.argv[2])
    os.write(1, b"ready\n")
    last = b""
    while letter := os.read(0, 1):
        last = letter
    if last == b"d" or journal.exists():
        return 0
    try:
        qmp = Qmp(control)
        if last == b"s":
            resume(qmp)
        forget(qmp)
        qmp.close()
    except QemuError as error:
        sys.stderr.write(f"guard: the guest at {control} may stand still, or leave out its memory when it is migrated otherwise: {error}\n")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
