"""The guest whose move `move --kind vm` measures: 256 MiB of memory, a quarter of it random, so that no codec makes less of it.

It says numbers on its serial console, some fifty in a second. A thread stamps what comes by this machine's clock, since a guest's own stands still while it moves. Its console is at its node, one file for each: all of
them, in the order of epochs, must be one sequence without a byte missing. Beside that it hashes its random quarter again and again, and says that too. With a disk (`--disk MIB`) it has written so much to that before, random
too, hashes the first 16 MiB of it along, past its cache, and writes on beyond those, some megabyte in a second.
"""

import os
import threading
import time
from bisect import bisect_right
from pathlib import Path
from typing import Any

from tools.novactl import samples

from .move import Witness, until

MEMORY = 256 << 20
"""Bytes of the guest."""

FILLED_MB = 64
"""MiB of them that are random."""

LOOK_S = 0.002
"""Between two looks at what it has said: so far a figure may be off."""

FIRST_MB, HASHED_MB = 64, 16
"""Where on the disk what it writes begins, beyond the sample's own; how much of that is hashed."""


def script(disk_mb: int) -> str:
    """What the guest does."""
    lines = ["#!/bin/sh", f"head -c {FILLED_MB << 20} /dev/urandom > /run/blob"]
    blob = "cat /run/blob"
    if disk_mb:
        blob = f"{{ cat /run/blob; echo 1 > /proc/sys/vm/drop_caches; dd if=/dev/vda bs=1M skip={FIRST_MB} count={HASHED_MB} 2>/dev/null; }}"
        lines += [
            f"dd if=/dev/urandom of=/dev/vda bs=1M seek={FIRST_MB} count={disk_mb} 2>/dev/null; sync",
            f"j=0; while :; do dd if=/dev/urandom of=/dev/vda bs=64k count=1 seek=$(({(FIRST_MB + HASHED_MB) * 16} + j)) 2>/dev/null; sync; j=$(((j + 7) % {(disk_mb - HASHED_MB) * 16})); sleep 0.06; done &",
        ]
    return "\n".join([*lines, f"while :; do echo hash $({blob} | md5sum); sleep 0.5; done &", "i=0; while :; do echo $i; i=$((i+1)); sleep 0.01; done", ""])



class _File:
    """One epoch's console: what came, and when."""

    def __init__(self, path: Path) -> None:
        self.descriptor = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
        self.data = b""
        self.ends: list[int] = []
        self.times: list[int] = []

    def look(self) -> None:
        """Read what is new."""
        if new := os.pread(self.descriptor, 1 << 20, len(self.data)):
            self.data += new
            self.ends.append(len(self.data))
            self.times.append(time.time_ns())


class Guest(Witness):
    """See the module."""

    KIND = "vm"
    WHAT = "a virtual machine of 256 MiB"

    def __init__(self, folder: Path, disk_mb: int = 0) -> None:
        self.top, self.forgotten, self.disk_mb = folder, 0, disk_mb
        self.INPUTS = {"bytes": MEMORY, "random_bytes": FILLED_MB << 20, "disk_bytes": disk_mb << 20}
        self._files: dict[int, _File] = {}
        self._over = threading.Event()
        self._thread = threading.Thread(target=self._watch, daemon=True)
        self._thread.start()

    def _watch(self) -> None:
        looked = 0.0
        while not self._over.wait(LOOK_S):
            if (now := time.monotonic()) > looked + 10 * LOOK_S:
                looked = now
                for path in self.top.glob("*/data/workloads/vms/w.*/stdout.log"):
                    epoch = int(path.parent.name.rpartition(".")[2])
                    if epoch not in self._files:
                        try:
                            self._files[epoch] = _File(path)
                        except OSError:  # it has just gone
                            continue
            for file in list(self._files.values()):
                file.look()

    def close(self) -> None:
        """Nothing more will be asked."""
        self._over.set()
        self._thread.join()

    def give_image(self, data: Path, scratch: Path) -> None:
        """The sample."""
        samples.make("vm", data / "workloads/archives", str(samples.GUEST_KERNEL) if samples.GUEST_KERNEL.is_dir() else "")

    def workloads(self) -> dict[str, Any]:
        """Of a node's configuration."""
        return {"runtimes": [], "vms": True, "guest_kernel": str(samples.GUEST_KERNEL) if samples.GUEST_KERNEL.is_dir() else ""}

    def document(self) -> dict[str, Any]:
        """The workload."""
        return {"id": "w", "kind": "vm", "image": samples.NAMES["vm"], "requests": {"cpu": "500m", "memory": MEMORY, **({"disk": (FIRST_MB + self.disk_mb) << 20} if self.disk_mb else {})}, "spec": {"boot_s": 120, "cloud_init": {"user_data": script(self.disk_mb)}}}

    def _said(self) -> list[tuple[bytes, int]]:
        """Whole lines of those epochs that count, and when their last byte came."""
        data, found = b"", []
        for epoch, file in sorted(self._files.items()):
            if epoch <= self.forgotten:
                continue
            ends, times, have = list(file.ends), list(file.times), file.data
            at = 0
            while (end := have.find(b"\n", at)) >= 0 and end < (ends[-1] if ends else 0):
                found.append(((data + have[at:end]).strip(), times[min(bisect_right(ends, end), len(times) - 1)]))
                data, at = b"", end + 1
            data += have[at:]
        return found

    def lines(self) -> list[tuple[int, int]]:
        """Number and clock (ns) of each whole line that is a number."""
        return [(int(line), at) for line, at in self._said() if line.isdigit()]

    async def digest(self) -> str:
        """The hash over its random quarter, of which it has read all since it was asked: the second one that comes."""
        def hashes() -> list[bytes]:
            return [line for line, _ in self._said() if line.startswith(b"hash ") and len(line.split()) == 3]

        before = len(hashes())
        await until(lambda: len(hashes()) > before + 1, "the hash over its memory")
        return hashes()[-1].decode()

    def forget(self) -> None:
        """What it has said up to the epoch before the newest one."""
        self.forgotten = max(self._files) - 1
