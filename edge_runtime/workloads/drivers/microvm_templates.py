"""Templates of micro-VMs: guests that were booted once, and saved while they wait for orders. Clones share a template's memory, and copy what they write.

There are two kinds. One for each size, which knows no disk: it boots when the driver is probed, or when it is first needed. And one for each image, size and size of disk, made from the first while there is
time: its disks are mounted, and the process that will become the program waits in its root (`microvm_guest.HOLD`). A clone of the second kind is three times as fast, and must have a disk that continues the
template's: so that is a part of it.

Both live in memory (memfd) that is sealed once it is whole: a QEMU that was taken over can change its own guest, never what others will start from, and what was not finished leaves nothing behind. They go
with the agent, whose next run boots them anew; clones that run keep what they have of them. So QEMU, kernel, driver and processor are the same for all that are here, but for a QEMU that was replaced
meanwhile: that is looked at. An image's template holds the file of its image open, as its guest has parts of that in memory: where another file has its name, the template is made anew.
"""

import fcntl
import json
import logging
import os
import shutil
import threading
import time
import uuid
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from . import microvm_guest, qemu_kernel
from .face import Failed
from .instance import read
from .keepers import Keepers
from .microvm_disks import MARGIN, copy_data
from .qemu_machine import DRIVE_FILES, DRIVES, LEFT_OUT, RAM, Machine, boot, command

log = logging.getLogger(__name__)

MAX_TEMPLATES = 4
"""Sizes that are kept; each takes some 130 MB of memory, which its clones share."""

MAX_HELD, HELD_SHARE = 4, 16
"""Templates of images that are kept: so many, but no more than fit into this part of the node's memory (one at least); each takes about what that of its size takes."""

HELD_BYTES = 128 << 20
"""What one is reckoned with."""

BOOT_S = 60.0
"""A guest that has not booted by then will not: under emulation, on two busy processors, it takes 2 to 6 s."""

UID = 0x6FFF_0000
"""User of a template's QEMU; those of instances come after it. Below the ranges of containers."""

SEALS = fcntl.F_SEAL_WRITE | fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL

PLACEHOLDERS = ("driver=null-co,node-name=disk0,size=1048576,read-only=on", "driver=null-co,node-name=disk1,size=1048576")
"""What stands for disks in the template of a size, which does not look at them."""

REST_S = 600.0
"""Between two times that the template of the same image is made: it takes a second of a processor, which more images in turn than there is room for must not cost at each start."""

IDLE_NICE = 10
"""Priority at which an image's template is made: nobody waits for it."""


@dataclass(frozen=True, slots=True)
class Template:
    """Descriptors of memory and state, and how long it took to boot and to save (seconds); of an image's template also those of the image's file and of the disk, else -1."""

    ram: int
    state: int
    booted_s: float
    saved_s: float
    image: int = -1
    disk: int = -1
    file: tuple[int, ...] = ()
    """Which file the image was in, and how it was (`file_of`)."""

    @property
    def descriptors(self) -> tuple[int, ...]:
        """What a clone's keeper is given."""
        return (self.ram, self.state) if self.image < 0 else (self.ram, self.state, self.image)

    def close(self) -> None:
        """Clones go on."""
        for one in (self.ram, self.state, self.image, self.disk):
            if one >= 0:
                os.close(one)

    def copy(self) -> "Template":
        """With descriptors of its own."""
        ram, state, image, disk = (os.dup(one) if one >= 0 else -1 for one in (self.ram, self.state, self.image, self.disk))
        return replace(self, ram=ram, state=state, image=image, disk=disk)


@dataclass(frozen=True, slots=True)
class Held:
    """What clones of an image's template have in common: the machine, the image, bytes of the disk."""

    machine: Machine
    image: str
    disk: int


class Templates:
    """Those of one agent. Used by several threads; blocks.

    Args:
        folder: for what is needed while one is made.
    """

    def __init__(self, qemu: str, kernel: qemu_kernel.Kernel, folder: Path, keepers: Keepers, boot_s: float = BOOT_S) -> None:
        self._qemu, self._folder, self._keepers, self._boot_s = qemu, folder, keepers, boot_s
        self._kernel = sealed("kernel", kernel.image.read_bytes())
        self._initramfs = sealed("initramfs", qemu_kernel.initramfs(qemu_kernel.busybox(), qemu_kernel.modules(kernel), microvm_guest.INIT))
        self._made: dict[Machine | Held, Template] = {}
        self._lock = threading.RLock()
        self._closed = False
        self._stop = os.eventfd(0)
        self._program = file_of(os.stat(qemu))
        self._most_held = max(1, min(MAX_HELD, os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE") // HELD_SHARE // HELD_BYTES))

    def stop(self) -> None:
        """Who waits for one does so no more; keepers that make one see that, and end."""
        os.eventfd_write(self._stop, 1)

    def close(self) -> None:
        """Clones go on. After `stop`, and when nobody uses it any more."""
        with self._lock:
            if not self._closed:
                self._closed = True
                self._forget(lambda _: True)
                for descriptor in (self._kernel, self._initramfs, self._stop):
                    os.close(descriptor)

    def get(self, machine: Machine) -> Template:
        """That of a size, made where it is not there; its descriptors are the caller's to close. Raises `Failed`."""
        with self._lock:
            self._look()
            made = self._made.pop(machine) if machine in self._made else self._boot(machine)
            return self._keep(machine, made).copy()

    def held(self, key: Held, image: Path) -> Template | None:
        """That of an image, where there is one; its descriptors are the caller's to close. `image`: the file that the image's file system is in now."""
        with self._lock:
            self._look()
            found = self._made.get(key)
            if found is None:
                return None
            try:
                same = found.file == file_of(os.stat(image))
            except OSError:
                same = False
            if not same:
                log.warning("the template of the image %s is not used: its file system was changed or removed since", key.image)
                self.drop(key)
                return None
            return self._keep(key, self._made.pop(key)).copy()

    def has(self, key: Machine | Held) -> bool:
        """Whether one is there."""
        with self._lock:
            return key in self._made

    def hold(self, key: Held, image: Path, empty: int, document: Mapping[str, Any]) -> None:
        """Make an image's template; what is there goes. `empty`: descriptor of an empty disk; `document`: what `microvm_guest.hold` wants. Raises `Failed` and OSError."""
        base = self.get(key.machine)
        opened, ram, disk = -1, memory("novacron-guest"), memory("novacron-disk")
        try:
            opened = os.open(image, os.O_RDONLY | os.O_CLOEXEC)
            before = file_of(os.fstat(opened))
            copy_data(base.ram, ram)
            copy_data(empty, disk)
            made = self._make(key.machine, ram, (opened, disk), DRIVES, (*DRIVE_FILES, "-incoming", "defer"), {"descriptors": ["ram", "state", "root", "disk", "base"], "document": dict(document), "everything": before[2] <= MARGIN + microvm_guest.WARM_BYTES, "nice": IDLE_NICE}, base.state)
            if file_of(os.fstat(opened)) != before:
                made.close()
                raise Failed("template", "the image's file system was changed meanwhile", "leave the node's folders alone")
        except BaseException:
            for descriptor in (opened, ram, disk):
                if descriptor >= 0:
                    os.close(descriptor)
            raise
        finally:
            base.close()
        with self._lock:
            if self._closed:
                made.close()
                return
            self.drop(key)
            self._keep(key, replace(made, file=before))

    def drop(self, key: Machine | Held) -> None:
        """One is not to be used any more."""
        with self._lock:
            self._forget(lambda one: one == key)

    def keep(self, images: Collection[str]) -> None:
        """Drop those of other images than these."""
        with self._lock:
            self._forget(lambda one: isinstance(one, Held) and one.image not in images)

    def images(self) -> set[str]:
        """Images that have one."""
        with self._lock:
            return {one.image for one in self._made if isinstance(one, Held)}

    def told(self) -> list[dict[str, Any]]:
        """What is kept: of what, bytes of memory that it has, seconds that it took to make."""
        with self._lock:
            return [
                {
                    "memory_mb": (key if isinstance(key, Machine) else key.machine).memory_mb, "image": "" if isinstance(key, Machine) else key.image,
                    "bytes": sum(os.fstat(one).st_blocks * 512 for one in (made.ram, made.state, made.disk) if one >= 0), "seconds": round(made.booted_s + made.saved_s, 3),
                } for key, made in self._made.items()
            ]

    def _look(self) -> None:
        """Another QEMU under the same name is another machine."""
        if self._closed:
            raise Failed("template", "the driver was closed", "start it again")
        try:
            program = file_of(os.stat(self._qemu))
        except OSError as error:
            raise Failed("qemu", f"{self._qemu}: {error.strerror}", "install it again") from None
        if program != self._program:
            log.warning("%s was replaced: templates are made anew", self._qemu)
            self._program = program
            self._forget(lambda _: True)

    def _keep(self, key: Machine | Held, made: Template) -> Template:
        """As the one that was used last; the oldest of its kind go."""
        self._made[key] = made
        kind, most = type(key), MAX_TEMPLATES if isinstance(key, Machine) else self._most_held
        for old in [one for one in self._made if type(one) is kind][:-most]:
            self.drop(old)
        return made

    def _forget(self, which: Callable[[Machine | Held], bool]) -> None:
        for one in [one for one in self._made if which(one)]:
            self._made.pop(one).close()

    def _boot(self, machine: Machine) -> Template:
        ram = memory("novacron-guest")
        try:
            os.ftruncate(ram, machine.memory_mb << 20)
            words = boot("/proc/self/fd/{kernel}", "/proc/self/fd/{initramfs}", tsc_khz(), LEFT_OUT)
            return self._make(machine, ram, (), PLACEHOLDERS, words, {"descriptors": ["ram", "state", "kernel", "initramfs"]}, self._kernel, self._initramfs)
        except BaseException:
            os.close(ram)
            raise

    def _make(self, machine: Machine, ram: int, root: tuple[int, int] | tuple[()], drives: Sequence[str], words: Sequence[str], told: Mapping[str, Any], *more: int) -> Template:
        """Have a keeper make one in `ram`, and in the disk of `root` (image, disk), which are the caller's where this fails."""
        folder = self._folder / f"template-{uuid.uuid4().hex[:12]}"
        folder.mkdir(mode=0o700)
        state = memory("novacron-state")
        try:
            document = {
                "folder": str(folder), "template": True, "boot_s": self._boot_s, "uid": UID, "more_groups": kvm_groups(machine), "groups": [], "files": [], "ask": "", "lease": "", "command": command(self._qemu, machine, RAM, True, drives, *words), **told,
            }
            (folder / "keeper.json").write_text(json.dumps(document))
            (folder / "lock").touch(mode=0o600)
            word = self._keepers.start(folder, self._boot_s + 30, (ram, state, *root, *more), self._stop)
            end: Mapping[str, Any] = read(folder / "exit.json") or {}
            if word != "ended" or not end.get("template"):
                raise Failed("template", str(end.get("failed") or "its keeper ended without a word"), "see the reason")
            for descriptor in (ram, state, *root[1:]):
                fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
            image, disk = root or (-1, -1)
            return Template(ram, state, float(end["booted_s"]), float(end["saved_s"]), image, disk)
        except BaseException:
            os.close(state)
            raise
        finally:
            shutil.rmtree(folder, ignore_errors=True)


class Background:
    """Work for which there is time later: one thing at a time, each at most once in a while. A thread of its own, not a loop's, whose end can be waited for.

    Args:
        most: that wait.
        rest_s: between two times that the same is done: what fails, or does not stay, must not be tried at each start.
    """

    def __init__(self, most: int, rest_s: float = REST_S) -> None:
        self._most, self._rest_s, self._lock, self._closed = most, rest_s, threading.Lock(), False
        self._done: dict[object, float] = {}
        self._waits: dict[object, Callable[[], None]] = {}
        self._thread: threading.Thread | None = None

    def add(self, key: object, work: Callable[[], None]) -> None:
        """It is done once those before it are; not where it waits already, or too much does: it will be asked for again."""
        with self._lock:
            now = time.monotonic()
            self._done = {one: at for one, at in self._done.items() if now - at < self._rest_s}
            if self._closed or key in self._waits or key in self._done or len(self._waits) >= self._most:
                return
            self._waits[key] = work
            if self._thread is None:
                self._thread = threading.Thread(target=self._run, name="templates", daemon=True)
                self._thread.start()

    def join(self) -> None:
        """Until nothing waits."""
        while (thread := self._thread) is not None:
            thread.join()

    def close(self) -> None:
        """Nothing more is begun; waits for what is under way."""
        with self._lock:
            self._closed = True
        self.join()

    def _run(self) -> None:
        while True:
            with self._lock:
                if self._closed or not self._waits:
                    self._waits.clear()
                    self._thread = None
                    return
                key, work = next(iter(self._waits.items()))
            try:
                work()
            except (Failed, OSError) as error:
                log.warning("no template was made: %s", error)
            except Exception:
                log.exception("no template was made")
            with self._lock:
                del self._waits[key]
                self._done[key] = time.monotonic()


def memory(name: str) -> int:
    return os.memfd_create(name, os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)


def file_of(told: os.stat_result) -> tuple[int, int, int, int]:
    """Which file it is, as it was last written."""
    return told.st_dev, told.st_ino, told.st_size, told.st_mtime_ns


def sealed(name: str, data: bytes) -> int:
    descriptor = memory(name)
    view = memoryview(data)
    while view:
        view = view[os.write(descriptor, view):]
    fcntl.fcntl(descriptor, fcntl.F_ADD_SEALS, SEALS)
    return descriptor


def tsc_khz() -> int:
    """How fast this machine's clock register counts; 0 where it is not told."""
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("cpu MHz"):
                return int(float(line.partition(":")[2]) * 1000)
    except (OSError, ValueError):
        pass
    return 0


def kvm_groups(machine: Machine) -> list[int]:
    """The group of /dev/kvm, where a machine needs it."""
    return [os.stat("/dev/kvm").st_gid] if machine.accelerator == "kvm" else []
