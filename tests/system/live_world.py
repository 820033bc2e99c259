"""A guest that is migrated in tests, the ends that it moves between, and those ends as threads and as processes."""

import contextlib
import json
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from gpu_migration import qemu_source, qemu_target
from gpu_migration.errors import MigrationError
from tools.bench import live_guest
from tools.bench.live_guest import Console, Guest, Machine
from tools.bench.migration_guest import Missing

ROOT = Path(__file__).resolve().parents[2]
KEY = bytes(range(32))
ENVIRONMENT = {**os.environ, "PYTHONPATH": str(ROOT), "NOVACRON_MIGRATION_KEY": KEY.hex()}
LONG = 120.0
"""Seconds for what takes a few on a machine of its own."""
ROOM = 1 << 30
"""Bytes of /dev/shm that a guest of 128 MiB is given: it is there twice while it moves, beside other tests' guests."""
REWRITES = 800
"""Pages a second: 3 MB of 48."""
STEP_OF_WORDS = 0x9E3779B97F4A7C15
"""By which the words of a page that the guest's program has filled differ."""


NODE = "root"
"""Name of the disk's node."""
DISK_MIB, DISK_CHECKED_MIB, DISK_CHECKS, DISK_WRITES = 8, 1, 1000, 50
"""Of a guest with a disk; blocks of it a second that are checked, and written."""


class World:
    """A guest, and the ends that it moves between. `disk`: the format of its disk, empty: it has none; `disk_writes`: blocks of it a second that are written."""

    def __init__(self, folder: Path, qemu: str, disk: str = "", disk_writes: int = DISK_WRITES) -> None:
        self.folder, self.disk = folder, disk
        self.machine = Machine(
            qemu, live_guest.kernel(), live_guest.initial(folder, bool(disk)), memory=128, checked=48, rewrites=REWRITES, disk=DISK_CHECKED_MIB * bool(disk), disk_checks=DISK_CHECKS, disk_writes=disk_writes,
        )
        self.number = 0
        self.boot()

    def boot(self) -> None:
        """A guest of its own, with a disk of its own."""
        folder = self.folder / f"boot-{self.number}"
        folder.mkdir()
        self.number += 1
        if self.disk:
            subprocess.run(["qemu-img", "create", "-q", "-f", self.disk, str(folder / "disk"), f"{DISK_MIB}M"], check=True)
        self.guest = live_guest.boot(self.machine, folder, *self.words(str(folder / "disk")))

    def words(self, path: str) -> list[str]:
        """Its disk on QEMU's command line."""
        return ["-blockdev", f"driver={self.disk},node-name={NODE},discard=unmap,file.driver=file,file.filename={path}", "-device", f"virtio-blk-pci,drive={NODE}"] if self.disk else []

    def next(self) -> Path:
        """A folder for the next end."""
        self.number += 1
        path = self.folder / str(self.number)
        path.mkdir()
        return path

    def command(self, folder: Path) -> list[str]:
        return self.machine.command(qemu_target.MEMORY, folder / "console", *self.words(f"{{disk:{NODE}}}"))

    def runs_here(self) -> None:
        """The guest runs on where it was, and all that it has is whole."""
        self.guest.console.wait_ticks(len(self.guest.console.ticks) + 20, LONG)
        assert self.guest.ask() == "running"
        self.right(1)

    def right(self, count: int) -> None:
        """So many checks of all its memory, and of its disk, from now on."""
        self.guest.sweeps(count, LONG)
        if self.disk:
            self.guest.disk_sweeps(count, LONG)

    def moved_to(self, folder: Path, pid: int) -> None:
        """The guest runs there now, all that it has is whole, and it does not run where it was."""
        assert self.guest.ask() != "running"
        new = Guest(folder / "qmp", Console(folder / "console"), pid=pid)
        old, self.guest = self.guest, new
        old.end()
        old.control.with_name("memory").unlink(missing_ok=True)  # it is in the machine's memory, and there is a move a test
        self.right(2)
        assert new.ask() == "running"

    def end(self) -> None:
        self.guest.end()
        for path in (*self.folder.glob("*/pid"), *self.folder.glob("*/store-pid")):
            with contextlib.suppress(OSError, ValueError):
                pid = int(path.read_text())
                if str(path.parent).encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    live_guest.kill(pid)


def make(qemu: str, disk: str = "", **more: int) -> World:
    """A guest in memory of its own. Skips where it cannot be made."""
    if (free := shutil.disk_usage("/dev/shm").free) < ROOM:
        pytest.skip(f"/dev/shm has {free >> 20} MiB free, and guests that move take {ROOM >> 20} (docker run --shm-size)")
    folder = Path(subprocess.run(["mktemp", "-d", "/dev/shm/live-XXXXXX"], check=True, capture_output=True, text=True).stdout.strip())
    try:
        return World(folder, qemu, disk, **more)
    except Missing as error:
        subprocess.run(["rm", "-rf", str(folder)], check=True)
        pytest.skip(str(error))


class Receiving:
    """A target on a thread."""

    def __init__(self, world: World, folder: Path, progress: Callable[[qemu_target.Step], None] = lambda step: None, command: list[str] | None = None, disks: Path | None = None) -> None:
        self.target = qemu_target.Target(folder, KEY, ("127.0.0.1", 0), command or world.command(folder), patience=LONG, progress=progress, disks=disks)
        self.address = self.target.address
        self.taken: qemu_target.Taken | None = None
        self.error: BaseException | None = None
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def _run(self) -> None:
        try:
            self.taken = self.target.serve()
        except MigrationError as error:
            self.error = error

    def done(self) -> qemu_target.Taken:
        self._thread.join(LONG)
        assert self.taken is not None, self.error
        return self.taken

    def failed(self) -> BaseException:
        self._thread.join(LONG)
        assert self.error is not None
        return self.error


def options(**more: object) -> qemu_source.Options:
    return qemu_source.Options(patience=LONG, first=0.3, ceiling=30.0, **more)  # type: ignore[arg-type]


@contextlib.contextmanager
def receiving(world: World, folder: Path, address: str = "127.0.0.1:0", step: str = "none") -> Iterator[tuple["subprocess.Popen[str]", str]]:
    """A target as a process; it kills itself at a step."""
    process = subprocess.Popen([sys.executable, str(ROOT / "tests/system/live_side.py"), "receive", str(folder), address, step, *world.command(folder)], env=ENVIRONMENT, stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout is not None
        yield process, process.stdout.readline().strip()
    finally:
        process.kill()
        process.communicate()


def taken(process: "subprocess.Popen[str]") -> int:
    """The pid of QEMU that a target says at its end."""
    said, _ = process.communicate(timeout=LONG)
    assert process.returncode == 0
    return int(json.loads(said)["pid"])


def sending(world: World, address: str, step: str) -> "subprocess.CompletedProcess[str]":
    return subprocess.run([sys.executable, str(ROOT / "tests/system/live_side.py"), "send", str(world.guest.control), address, step], env=ENVIRONMENT, capture_output=True, text=True, timeout=LONG)


def where(text: str) -> tuple[str, int]:
    host, _, port = text.rpartition(":")
    return host, int(port)


def gone(folder: Path) -> bool:
    """No QEMU of that folder is left."""
    return not (folder / "pid").exists() and not (folder / "memory").exists()
