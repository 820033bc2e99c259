"""Guests that are migrated while they run, for tests and benchmarks: Debian's kernel, one process that checks all memory (live_verifier.c), QEMU with its memory in a shared file.

Needs a C compiler for x86-64, a QEMU (tools/setup/qemu.sh fetches version 10) and a kernel for guests (tools/setup/guest_kernel.sh).
"""

import os
import re
import select
import shutil
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.workloads.drivers import qemu_kernel
from gpu_migration.qemu_qmp import QemuError, Qmp

from .harness import ROOT
from .migration_guest import Missing, newc

SOURCE = Path(__file__).with_name("live_verifier.c")
BESIDE = ROOT / ".novacron/qemu/qemu-system-x86_64"
BOOT_S = 120.0
"""Seconds for a guest to boot and fill its memory: 3 s on a machine of its own, under emulation."""
CONSOLE_MOST = 8 << 20
"""Bytes of a console that are kept."""
DISK_MODULES = ("virtio_pci", "virtio_blk")
_COMPILE = ("-O2", "-static", "-nostdlib", "-ffreestanding", "-fno-pie", "-no-pie", "-fno-stack-protector", "-mno-sse")
_VERSION = re.compile(r"version (\d+)\.(\d+)")


def version(program: str) -> tuple[int, int]:
    """Of a QEMU; (0, 0) where it does not say."""
    try:
        found = _VERSION.search(subprocess.run([program, "--version"], capture_output=True, text=True, timeout=60).stdout)
    except OSError:
        return 0, 0
    return (int(found[1]), int(found[2])) if found else (0, 0)


def qemus() -> dict[str, str]:
    """The QEMUs of this machine by their version's first number: that of PATH, and one that was laid out beside the project."""
    found: dict[str, str] = {}
    for program in (shutil.which("qemu-system-x86_64"), str(BESIDE)):
        if program and os.access(program, os.X_OK) and version(program)[0]:
            found.setdefault(str(version(program)[0]), program)
    return found


def kernel() -> Path:
    """A kernel for guests. Raises Missing."""
    for folder in (ROOT / ".novacron/guest-kernel/boot", Path("/boot")):
        images = sorted(folder.glob("vmlinuz-*cloud*"))
        if images:
            return images[-1]
    raise Missing("there is no kernel for guests: tools/setup/guest_kernel.sh .novacron/guest-kernel")


def initial(folder: Path, disk: bool = False) -> Path:
    """The guest's initial file system: one program, and the modules for a disk where it has one. Raises Missing."""
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise Missing("there is no C compiler for the guest's program: apt install gcc")
    program, target = folder / "verifier", folder / "initial.cpio"
    done = subprocess.run([compiler, *_COMPILE, "-o", str(program), str(SOURCE)], capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"the guest's program could not be compiled: {done.stderr.strip()[-300:]}")
    files = [("init", 0o100755, program.read_bytes())]
    if disk:
        try:
            found = qemu_kernel.modules(qemu_kernel.find(str(kernel().parent.parent)), DISK_MODULES)
        except qemu_kernel.NoKernel as error:
            raise Missing(str(error)) from None
        files += [("modules", 0o040755, b""), *((f"modules/{number}", 0o100644, data) for number, data in enumerate(found.values()))]
    target.write_bytes(newc(files))
    return target


@dataclass(frozen=True, slots=True)
class Machine:
    """A guest as it is started at either end. MiB; pages a second that its program rewrites and checks."""

    qemu: str
    kernel: Path
    initial: Path
    memory: int = 192
    checked: int = 96
    rewrites: int = 0
    checks: int = 50_000
    accelerator: str = "tcg,tb-size=64"
    disk: int = 0
    """MiB of its disk that the program fills; 0: it has none."""
    disk_writes: int = 50
    disk_checks: int = 500
    """Blocks a second."""

    def command(self, memory: str, console: Path, *more: str) -> list[str]:
        """QEMU's command line, but for its control socket. `memory`: a path, or empty for memory of QEMU's own."""
        backend = f"memory-backend-file,id=ram,size={self.memory}M,mem-path={memory},share=on" if memory else f"memory-backend-ram,id=ram,size={self.memory}M"
        return [
            self.qemu, "-machine", "q35,memory-backend=ram", "-accel", self.accelerator, "-cpu", "max", "-m", str(self.memory), "-smp", "1", "-nodefaults", "-display", "none", "-no-user-config", "-no-reboot",
            "-object", backend, "-kernel", str(self.kernel), "-initrd", str(self.initial),
            "-append", f"console=ttyS0 quiet loglevel=1 panic=-1 mitigations=off random.trust_cpu=on no_timer_check -- {self.checked} {self.rewrites} {self.checks}" + f" {self.disk} {self.disk_writes} {self.disk_checks}" * bool(self.disk),
            "-chardev", f"socket,id=console,path={console},server=on,wait=off", "-serial", "chardev:console", *more,
        ]


class Console:
    """What a guest says, read as it comes, with the time at which it came."""

    def __init__(self, path: Path) -> None:
        """Waits for QEMU to open it."""
        end = time.monotonic() + BOOT_S
        while True:
            self._socket = socket.socket(socket.AF_UNIX)
            try:
                self._socket.connect(str(path))
                break
            except OSError:
                self._socket.close()
                if time.monotonic() > end:
                    raise Missing(f"no console at {path}") from None
                time.sleep(0.02)
        self._said = threading.Condition()
        self.text = ""
        self.ticks: list[float] = []
        """When dots came, seconds since 1970."""
        self.ended = False
        self._thread = threading.Thread(target=self._read, daemon=True)
        self._thread.start()

    def _read(self) -> None:
        while True:
            try:
                data = self._socket.recv(1 << 16)
            except OSError:
                data = b""
            now = time.time()
            with self._said:
                if data and len(self.text) < CONSOLE_MOST:
                    self.text += data.decode(errors="replace").replace("\r", "").replace(".", "")
                    if b"." in data:
                        self.ticks.append(now)
                self.ended = self.ended or not data
                self._said.notify_all()
            if not data:
                return

    def wait(self, pattern: str, seconds: float = BOOT_S, after: int = 0) -> re.Match[str]:
        """Until a line of that pattern was said, from that place of the text on. Raises Missing."""
        with self._said:
            found = None

            def there() -> bool:
                nonlocal found
                found = re.search(pattern, self.text[after:], re.MULTILINE)
                return found is not None or self.ended or "Kernel panic" in self.text

            self._said.wait_for(there, seconds)
            if found is None:
                raise Missing(f"the guest did not say {pattern}: {self.text[-600:]!r}")
            return found

    def wait_ticks(self, count: int, seconds: float = BOOT_S) -> None:
        """Until it has ticked so often. Raises Missing."""
        with self._said:
            self._said.wait_for(lambda: len(self.ticks) >= count or self.ended, seconds)
            if len(self.ticks) < count:
                raise Missing(f"the guest does not tick: {self.text[-600:]!r}")

    def close(self) -> None:
        self._socket.close()
        self._thread.join(1)


@dataclass(slots=True)
class Guest:
    """One that runs, or waits."""

    control: Path
    console: Console
    process: "subprocess.Popen[bytes] | None" = None
    pid: int = 0
    bad: list[str] = field(default_factory=list)

    def sweeps(self, count: int = 2, seconds: float = BOOT_S) -> None:
        """Until so many checks of all its memory are done from now on: of two, one began after this call. Raises Missing where it panics, ValueError where a page is wrong."""
        start = len(self.console.text)
        for _ in range(count):
            start += self.console.wait(r"^S \d+ \d+$", seconds, start).end()
        self.right()

    def disk_sweeps(self, count: int = 2, seconds: float = BOOT_S) -> None:
        """The same of its disk."""
        start = len(self.console.text)
        for _ in range(count):
            start += self.console.wait(r"^D \d+ \d+$", seconds, start).end()
        self.right()

    def right(self) -> None:
        """Raises ValueError where it has found a page or a block that is not what it should be."""
        wrong = re.findall(r"^BAD.*$", self.console.text, re.MULTILINE)
        if wrong or "Kernel panic" in self.console.text:
            raise ValueError(f"the guest's memory or disk is damaged: {wrong[:3]} {self.console.text[-300:]!r}")

    def ask(self) -> str:
        """Its status, as QEMU says; `gone`."""
        try:
            qmp = Qmp(self.control, 5.0)
        except QemuError:
            return "gone"
        try:
            return str(qmp("query-status")["status"])
        except QemuError:
            return "gone"
        finally:
            qmp.close()

    def end(self) -> None:
        """Kill QEMU."""
        self.console.close()
        if self.process is not None:
            self.process.kill()
            self.process.wait()
        elif self.pid:
            kill(self.pid)


def kill(pid: int) -> None:
    """End a process that is no child of ours, and wait until it is gone."""
    try:
        handle = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        signal.pidfd_send_signal(handle, signal.SIGKILL)
        select.select([handle], [], [], 30)
    except ProcessLookupError:
        pass
    finally:
        os.close(handle)


def boot(machine: Machine, folder: Path, *more: str, memory: bool = True) -> Guest:
    """Start one in a folder and wait until its program runs. Raises Missing."""
    folder.mkdir(parents=True, exist_ok=True)
    control, console = folder / "qmp", folder / "console"
    with (folder / "qemu.log").open("wb") as log:
        process = subprocess.Popen(
            [*machine.command(str(folder / "memory") if memory else "", console, *more), "-qmp", f"unix:{control},server=on,wait=off"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
    try:
        guest = Guest(control, Console(console), process, process.pid)
        guest.console.wait(r"^READY \d+ \d+ \d+$")
        return guest
    except BaseException:
        process.kill()
        process.wait()
        raise


@contextmanager
def booted(machine: Machine, folder: Path, *more: str) -> Iterator[Guest]:
    """One that is ended at the end."""
    guest = boot(machine, folder, *more)
    try:
        yield guest
    finally:
        guest.end()


def standstill(before: Sequence[float], after: Sequence[float]) -> float:
    """Seconds between the last tick at one console and the first at another."""
    return after[0] - before[-1]
