"""A machine in QEMU with an image's disk: its console, its ports, and its power switch.

Emulated (TCG) unless told otherwise: that /dev/kvm can be opened says nothing, there are hosts where it boots no stock kernel.
"""

import os
import platform
import re
import shutil
import socket
import subprocess
import threading
import time
from collections import deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Self

from . import recipes, room, tools
from .errors import FirmwareError
from .recipes import Architecture

CONSOLE_LINES_MAX = 20_000
"""Lines of the console that are kept; a boot has some hundreds, a report some dozens."""

LINE_MAX_BYTES = 4096
"""A longer line is cut: a guest may write anything."""

HERE = "10.0.2.2"
"""This machine's loopback, as a guest of QEMU's own network sees it."""

CORES = 1
"""QEMU 7.2 emulating several processors in threads lets one see another's half-written kernel text (`Oops: int3` in `sched_clock_cpu`, seen here): one it is."""

COLD = "reboot=shutdown"
"""QEMU ends where the guest would start again, and we start it anew. Emulated, a warm start costs three times as much of the processor (13 s and 4 s until the boot loader, with QEMU 7.2): what the firmware writes falls on pages
that hold code of the last run, which QEMU has translated and looks through at each write."""

BOOT_LOADER_TAKES = "io.systemd.boot.kernel-cmdline-extra="
"""What systemd-boot (256 or later) reads of the machine's own description (SMBIOS strings) and adds to the command line that stands in its entry."""

HASHES = (8, 2)
"""Versions of QEMU from this one on emulate x86's instructions for SHA-256, which boards with that processor have had for years: without them an emulated start spends a fifth of its time on the hashes of the root's blocks (the
agent's own, QEMU 10: 5.2 s for 6.4, 2026-11-29)."""

AS_LONG_AS_WE = ("setpriv", "--pdeathsig", "KILL")
"""Ends a machine with the thread that started it, also where that is killed: nobody would take its power away. Of util-linux, which every Debian has."""

_ESCAPES = re.compile(r"\x1b(\[[0-9;?]*[ -/]*[@-~]|\][^\x07\x1b]*(\x07|\x1b\\)|[@-Z\\-_=>78c])")
"""Terminal sequences; a guest's console must not move the cursor of ours."""


@dataclass(frozen=True, slots=True)
class Wiring:
    """What a machine gets: `forwards` maps ports of this machine's loopback to the guest's, `credentials` are files by name, `online` lets the guest reach the network. `log` is a file that each write to the disk
    is noted in (QEMU's blklogwrites)."""

    memory_mib: int
    forwards: Mapping[int, int] = field(default_factory=dict)
    credentials: Mapping[str, Path] = field(default_factory=dict)
    online: bool = False
    clock: str = ""
    accelerator: str = "tcg"
    direct: tuple[Path, Path, str] | None = None
    log: Path | None = None


def command(arch: Architecture, disk: Path, flash: Path, wiring: Wiring) -> list[str]:
    """QEMU's command line. Pure. `flash` holds the firmware's variables; with `direct` (kernel, initrd, command line) there is no firmware."""
    for name, path in wiring.credentials.items():
        if "," in str(path) or "," in name:
            raise FirmwareError("credential", f"{name}: {path} has a comma", "give a path without one")
    forwards = "".join(f",hostfwd=tcp:127.0.0.1:{here}-:{there}" for here, there in wiring.forwards.items())
    drive = ["-drive", f"if=none,id=disk,file={disk},format=raw,cache=writeback,discard=unmap"]
    if wiring.log:
        drive = ["-blockdev", f"driver=file,node-name=below,filename={disk}", "-blockdev", f"driver=file,node-name=log,filename={wiring.log}", "-blockdev", "driver=blklogwrites,node-name=disk,file=below,log=log,log-sector-size=512"]
    words = [
        arch.qemu, *arch.machine, "-accel", wiring.accelerator, "-smp", str(CORES), "-m", f"{wiring.memory_mib}M", "-nodefaults", "-no-user-config", "-display", "none",
        "-serial", "stdio", "-monitor", "none", *drive, "-device", "virtio-blk-pci,drive=disk", "-device", "virtio-rng-pci",
        "-netdev", f"user,id=net{'' if wiring.online else ',restrict=on'}{forwards}", "-device", "virtio-net-pci,netdev=net,romfile=",
    ]
    if wiring.accelerator == "tcg" and not wiring.log and not wiring.direct:  # a log would begin anew
        words += ["-action", COLD]
    if arch.name == "amd64":
        words += ["-global", "ICH9-LPC.noreboot=false", "-action", "watchdog=reset"]
    if wiring.clock:
        words += ["-rtc", f"base={wiring.clock}"]
    for name, path in sorted(wiring.credentials.items()):
        words += ["-fw_cfg", f"name=opt/io.systemd.credentials/{name},file={path}"]
    if wiring.direct:
        kernel, early, line = wiring.direct
        return [*words, "-kernel", str(kernel), "-initrd", str(early), "-append", f"{line} {arch.emulated}".rstrip()]
    if arch.emulated:
        words += ["-smbios", f"type=11,value={BOOT_LOADER_TAKES}{arch.emulated}"]
    if not arch.firmware[1]:
        return [*words, "-kernel", arch.firmware[0]]
    return [*words, "-drive", f"if=pflash,unit=0,readonly=on,format=raw,file={arch.firmware[0]}", "-drive", f"if=pflash,unit=1,format=raw,file={flash}"]


PROBE_S = 20.0
"""Longest wait for a kernel under KVM to reach its initrd: two seconds where it works, beside others."""

PROBE_MIB = 256

INITRD_SPEAKS = "novacron: the command line names no slot"
"""What our initrd says that is given no slot: kernel and programs ran."""


def comes_up(arch: Architecture, kernel: Path, early: Path, accelerator: str, seconds: float = PROBE_S) -> bool:
    """Whether a kernel of ours reaches its initrd in that time."""
    line = f"console={arch.console} panic=-1 {arch.emulated}".rstrip()
    with Machine([arch.qemu, *arch.machine, "-accel", accelerator, "-m", f"{PROBE_MIB}M", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(early), "-append", line]) as machine:
        try:
            machine.wait_for(re.escape(INITRD_SPEAKS), seconds)
        except (TimeoutError, EOFError):
            return False
    return True


def kvm_boots(arch: Architecture, kernel: Path, early: Path) -> str:
    """Why this image's own kernel does not come up under KVM; empty where it does. That /dev/kvm opens is no answer: see above."""
    if not os.access("/dev/kvm", os.R_OK | os.W_OK):
        return "/dev/kvm is not there, or not ours"
    if not arch.qemu.endswith(platform.machine()):
        return f"this machine is no {arch.name}"
    return "" if comes_up(arch, kernel, early, "kvm") else f"the kernel does not come up under KVM within {PROBE_S:g} s"


def require(arch: Architecture) -> None:
    """Raises FirmwareError naming what of a machine's programs and firmware is not installed, and how to get it."""
    tools.require([arch.qemu, "cp", AS_LONG_AS_WE[0]])
    for path in arch.firmware:
        if path and not Path(path).exists():
            raise FirmwareError("tools", f"no {path}", f"as root, apt install --no-install-recommends {arch.firmware_package}")


DISK_MOST_MIB = 8 << 20
"""8 TiB: half of what ext4, on which a machine's disk usually lies, takes for one file."""


def prepare(arch: Architecture, image: Path, state: Path, disk_mib: int = 0) -> tuple[Path, Path]:
    """A machine's own disk (a copy of the image, where there is none yet) and firmware variables, in the folder `state`. `disk_mib`: MiB that the disk has from now on, where it has less; it takes no room here. Raises FirmwareError."""
    if not 0 <= disk_mib <= DISK_MOST_MIB:
        raise FirmwareError("disk", f"{disk_mib} MiB", f"give at most {DISK_MOST_MIB}")
    require(arch)
    disk, flash = state / "disk.img", state / "variables.fd"
    room.ready(state, "state", "--state", 0 if disk.exists() else 512 * image.stat().st_blocks)
    if not disk.exists():
        tools.run(["cp", "--sparse=always", "--reflink=auto", str(image), str(disk) + ".new"], field="state", remedy="is there room?")
        Path(str(disk) + ".new").replace(disk)
    if disk_mib:
        has = disk.stat().st_size
        if has > disk_mib * recipes.MIB:
            raise FirmwareError("disk", f"{disk_mib} MiB, and the disk of {state} has {-(-has // recipes.MIB)}", "give more, or leave --disk out")
        os.truncate(disk, disk_mib * recipes.MIB)
    if arch.firmware[1] and not flash.exists():
        shutil.copyfile(arch.firmware[1], flash)
    return disk, flash


def free_port() -> int:
    """A port of loopback that was free a moment ago."""
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        port: int = sock.getsockname()[1]
        return port


def with_hashing(words: Sequence[str], version: Callable[[], tuple[int, int]]) -> list[str]:
    """QEMU's arguments, with the processor's instructions for SHA-256 where this QEMU emulates them; `version` is asked where that matters."""
    return [f"{word},+sha-ni" if word.startswith("qemu64,") and "tcg" in words and version() >= HASHES else word for word in words]


class Machine:
    """A running machine; leaving the block takes its power away.

    Args:
        line: QEMU's command line.
        show: called with each line of the console.
    """

    def __init__(self, line: Sequence[str], show: Callable[[str], None] | None = None) -> None:
        self.lines: deque[tuple[float, str]] = deque(maxlen=CONSOLE_LINES_MAX)
        self._show = show
        self._news = threading.Condition()
        self._ended = False
        self.started_s = time.monotonic()
        program = tools.find(line[0]) or line[0]
        self._line = [*AS_LONG_AS_WE, program, *with_hashing(line[1:], lambda: tools.qemu_version(program))]
        self._off = False
        self.process = self._start()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _start(self) -> "subprocess.Popen[bytes]":
        return subprocess.Popen(self._line, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, value: BaseException | None, trace: TracebackType | None) -> None:
        self.cut_power()

    def _read(self) -> None:
        self._read_one()
        while COLD in self._line and self.process.wait() == 0:
            with self._news:
                if self._off:
                    break
                self.process = self._start()
            self._read_one()
        with self._news:
            self._ended = True
            self._news.notify_all()

    def _read_one(self) -> None:
        """The console of one process to its end."""
        stream = self.process.stdout
        assert stream is not None
        while raw := stream.readline(LINE_MAX_BYTES):
            text = "".join(letter for letter in _ESCAPES.sub("", raw.decode(errors="replace")).replace("\r", "") if letter.isprintable() or letter == "\t").rstrip()
            if not text:
                continue
            with self._news:
                self.lines.append((time.monotonic() - self.started_s, text))
                self._news.notify_all()
            if self._show is not None:
                self._show(text)
        stream.close()

    def wait_for(self, pattern: str, seconds: float) -> float:
        """Until a line of the console has the pattern; seconds after power-on.

        Raises:
            TimeoutError: it did not come in time; the message has the console's last lines.
            EOFError: the machine ended first.
        """
        found = re.compile(pattern)
        end = time.monotonic() + seconds
        with self._news:
            while True:
                for at, text in self.lines:
                    if found.search(text):
                        return at
                if self._ended:
                    raise EOFError(f"the machine ended before {pattern!r} came: {self.tail()}")
                if not self._news.wait(max(0.0, end - time.monotonic())):
                    raise TimeoutError(f"{pattern!r} did not come within {seconds} s: {self.tail()}")

    def tail(self, count: int = 25) -> str:
        """The last lines of the console."""
        return "\n".join(text for _, text in list(self.lines)[-count:])

    def between(self, first: str, last: str) -> list[str]:
        """Lines after the line that has `first` up to the one that has `last`; empty where one is missing."""
        texts = [text for _, text in self.lines]
        begin = next((number for number, text in enumerate(texts) if first in text), None)
        end = next((number for number, text in enumerate(texts) if last in text), None)
        return texts[begin + 1 : end] if begin is not None and end is not None else []

    def cut_power(self) -> None:
        """As pulling the plug: nothing is flushed that the guest had not flushed."""
        with self._news:
            self._off = True
            if self.process.poll() is None:
                self.process.kill()
        self.process.wait()
        self._reader.join()

    @property
    def ended(self) -> bool:
        """It has ended, by itself or not."""
        return self._ended

    def wait(self) -> int:
        """Until it has ended by itself; QEMU's exit status, which is not 0 where it could not start."""
        self._reader.join()
        return self.process.wait()
