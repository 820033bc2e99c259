"""Guests that converted workloads run in, as the agent has them: laid out in a folder, booted by a keeper of their own (`guest_keeper`), asked over its socket.

    <dir>/guests/<name>/     keeper.json, lock, work.ext4 (what is written in it), travel (what came with the workload), and what the keeper writes
    <dir>/boot-<hash>/       the kernel and its first file system, made once for a kernel and a CRIU
"""

import asyncio
import fcntl
import hashlib
import json
import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ...contract.workloads import QEMU_OWN
from ..drivers import cgroups, qemu_kernel
from ..drivers.criu import Criu
from ..drivers.face import Failed
from ..drivers.instance import LOOK_S, alive, held, line, read, readable, sync_folder, unheld, write
from ..drivers.microvm_disks import Disks
from ..drivers.microvm_templates import UID, tsc_khz
from ..drivers.qemu_machine import Machine, boot, command
from . import guest, segment

BOOT_S = (75.0, 300.0)
"""A guest that has not booted by then is ended; the second number is for the second try. Under emulation it takes 4 s, on a busy machine ten times as long, and about one in sixty does not boot at all."""

ASK_S = 120.0
"""A guest that is not through with a restore or dump by then hangs: under emulation it takes a second for each 20 MB."""

MAX_GUESTS = 64
"""Workloads that may be converted, on one node."""

USERS = UID + 0x1000
"""First of the users of these QEMUs; above those of micro-VMs."""

TRANSLATED_MB = 96
"""QEMU's room for translated code (TCG): CRIU's code shall still be there when it counts."""

LOAD_S = 10.0
"""The loader tells a program's libraries at once."""

_KEEPER = Path(__file__).with_name("guest_keeper.py")


@dataclass(frozen=True, slots=True)
class Boot:
    """What guests boot: kernel and initramfs, readable by all, and the kernel's release."""

    kernel: Path
    initramfs: Path
    release: str


def programs(criu: Criu) -> dict[str, bytes]:
    """CRIU as a guest needs it: `criu`, `loader`, and libraries by their names. Raises `Failed`."""
    laid = Path(criu.folder, "usr/sbin/criu")
    program = laid if laid.exists() else Path(criu.folder, "criu")
    libraries = Path(criu.folder, "usr/lib/x86_64-linux-gnu")
    loader = libraries / "ld-linux-x86-64.so.2" if laid.exists() else Path("/lib64/ld-linux-x86-64.so.2")
    words = [str(loader), *(("--library-path", str(libraries)) if laid.exists() else ()), "--list", str(program)]
    try:
        said = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=LOAD_S, check=True).stdout
        found = {"criu": program.read_bytes(), "loader": loader.read_bytes()}
        for entry in said.splitlines():
            name, _, path = entry.partition(" => ")
            if path:
                found[os.path.basename(name.strip())] = Path(path.rsplit(" (", 1)[0].strip()).read_bytes()
    except (OSError, subprocess.SubprocessError) as error:
        raise Failed("criu", f"its libraries cannot be found for a guest: {error}", "lay CRIU out by tools/setup/criu.sh") from None
    return found


def made(folder: Path, kernel: qemu_kernel.Kernel, criu: Criu) -> Boot:
    """What guests boot; made where it is not there. Blocks. Raises `Failed` and `NoKernel`."""
    parts = [*qemu_kernel.modules(kernel, guest.MODULES).items()], programs(criu)
    shell = qemu_kernel.busybox()
    archive = qemu_kernel.initramfs(shell, dict(parts[0]), guest.INIT) + qemu_kernel.cpio(guest.files(parts[1], segment.address()))
    name = folder / f"boot-{hashlib.sha256(archive + kernel.release.encode()).hexdigest()[:16]}"
    if not name.exists():
        new = folder / f".{name.name}.new"
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir()
        for file, data in (("kernel", kernel.image.read_bytes()), ("initramfs", archive)):
            (new / file).write_bytes(data)
            os.chmod(new / file, 0o644)  # QEMU has a user of its own
        os.rename(new, name)
    return Boot(name / "kernel", name / "initramfs", kernel.release)


class Guest:
    """One guest.

    Args:
        folder: its own; there or not.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.ask_path = f"/run/novacron/guests/{hashlib.blake2b(str(folder).encode(), digest_size=12).hexdigest()}"

    def lay_out(
        self, qemu: str, boots: Boot, disks: Disks, image: Path, *, memory: int, disk: int, cpus: int, accelerator: str, slot: int, connected: bool, log_bytes: int, keepers: Sequence[str], groups: cgroups.Groups,
    ) -> None:
        """Write its folder; blocks. `image`: the file system of the workload's image. `memory`: bytes of the guest; `disk`: bytes that the workload may write."""
        new = self.folder.with_name(f".{self.folder.name}.new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True, mode=0o700)
        disks.blank(disk, new / "work.ext4")
        (new / "travel").touch(mode=0o600)
        os.truncate(new / "travel", memory + disk)  # a hole, until something travels
        machine = Machine(memory >> 20, cpus, accelerator)
        words = command(qemu, machine, "/proc/self/fd/{ram}", True, ())
        if accelerator == "tcg":
            words[words.index("-accel") + 1] = f"tcg,tb-size={TRANSLATED_MB}"
        for at, (name, writable) in enumerate(((guest.IMAGE, False), (guest.WORK, True), (guest.TRAVEL, False)), 1):
            words += ["-add-fd", f"fd={{{name}}},set={at}", "-blockdev", f"driver=raw,node-name={name},read-only={'off' if writable else 'on'},cache.no-flush=on,file.driver=file,file.locking=off,file.filename=/dev/fdset/{at}"]
            words += ["-device", f"virtio-blk-device,drive={name},serial={name}"]
        if connected:
            words += ["-netdev", "tap,id=net,fd={tap}", "-device", f"virtio-net-device,netdev=net,mac={segment.HARDWARE}"]
        files = [[guest.IMAGE, str(image), False], [guest.WORK, str(self.folder / "work.ext4"), True], [guest.TRAVEL, str(self.folder / "travel"), False]]
        files += [["kernel", str(boots.kernel), False], ["initramfs", str(boots.initramfs), False]]
        told = {
            "folder": str(self.folder), "template": False, "boot_s": BOOT_S[-1], "uid": USERS + slot, "more_groups": [os.stat("/dev/kvm").st_gid] if accelerator == "kvm" else [], "groups": groups.of_machine(self.group, memory + QEMU_OWN, 0), "files": files,
            "command": [*words, *boot("/proc/self/fd/{kernel}", "/proc/self/fd/{initramfs}", tsc_khz())], "memory_mb": machine.memory_mb, "log_bytes": log_bytes, "ask": self.ask_path, "keepers": list(keepers),
        }
        write(new / "keeper.json", told)
        (new / "lock").touch(mode=0o600)
        shutil.rmtree(self.folder, ignore_errors=True)
        os.rename(new, self.folder)
        sync_folder(self.folder.parent)

    @property
    def group(self) -> str:
        """Its QEMU's control group: no instance of a driver is called like it, and agents of one machine (as in tests) have their own."""
        return f"{cgroups.PARENT}/guest-{os.path.basename(self.ask_path)}"

    def start(self, tap: int = -1) -> None:
        """Boot it; returns when QEMU runs. Blocks. Raises `Failed`."""
        lock = os.open(self.folder / "lock", os.O_RDWR | os.O_CLOEXEC)
        said, its_end = os.pipe()
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
            with open(self.folder / "keeper.err", "wb") as errors:
                subprocess.Popen(
                    [sys.executable, "-I", "-S", str(_KEEPER), str(self.folder), str(lock), str(tap)], stdin=subprocess.DEVNULL, stdout=its_end, stderr=errors, cwd="/", start_new_session=True,
                    pass_fds=(lock, *((tap,) if tap >= 0 else ())), env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
                )
            os.close(its_end)
            its_end = -1
            word = line(said, BOOT_S[-1])
        except OSError as error:
            raise Failed("guest", f"its keeper cannot be started: {error.strerror}", "look at the node") from None
        finally:
            for descriptor in (lock, said, its_end):
                if descriptor >= 0:
                    os.close(descriptor)
        if word != "running":
            raise Failed("guest", self.problem() or "its keeper ended without a word", "see the reason")

    def problem(self) -> str:
        """Why it ended, where it has written that down."""
        said = (read(self.folder / "exit.json") or {}).get("failed", "")
        if not said:
            try:
                said = (self.folder / "keeper.err").read_text(errors="replace")[-1000:].strip()
            except OSError:
                said = ""
        return str(said)

    @property
    def lives(self) -> bool:
        """Whether its keeper does, and QEMU with it."""
        return held(self.folder)

    async def ask(self, wish: str, *, within_s: float = ASK_S, **more: Any) -> dict[str, Any]:
        """A question to its keeper. Raises `Failed`."""
        writer = None
        try:
            async with asyncio.timeout(within_s):
                reader, writer = await asyncio.open_unix_connection(self.ask_path, limit=4 << 20)
                writer.write(json.dumps({"do": wish, **more}).encode() + b"\n")
                await writer.drain()
                answer: Any = json.loads(await reader.readline() or b"{}")
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            raise Failed(wish, f"the guest's keeper does not answer ({str(error) or 'in time'})", "look at whether it still runs") from None
        finally:
            if writer is not None:
                writer.close()
        if not isinstance(answer, dict) or not answer or "failed" in answer:
            raise Failed(wish, str(answer.get("failed") or self.problem() or "it ended meanwhile") if isinstance(answer, dict) else "its keeper answers nonsense", "see the reason")
        return answer

    async def boot(self, lay: Callable[[], None], tap: Callable[[], int] | None = None) -> None:
        """Lay it out, and return when it has booted. Raises `Failed`; what is left of it is to be ended.

        Args:
            lay: writes its folder.
            tap: makes its port.
        """
        for at, seconds in enumerate(BOOT_S):
            await asyncio.to_thread(lay)
            port = await asyncio.to_thread(tap) if tap is not None else -1
            try:
                await asyncio.to_thread(self.start, port)
            finally:
                if port >= 0:
                    os.close(port)
            try:
                await self.ask("ready", within_s=seconds)
                return
            except Failed:
                if at == len(BOOT_S) - 1:
                    raise
                await self.end()

    def cpu_ns(self) -> int:
        """What its QEMU has had of the processor; -1 where that cannot be seen."""
        try:
            fields = Path(f"/proc/{(read(self.folder / 'machine.json') or {})['pid']}/stat").read_bytes().rpartition(b")")[2].split()
            return (int(fields[11]) + int(fields[12])) * (1_000_000_000 // os.sysconf("SC_CLK_TCK"))
        except (OSError, KeyError, IndexError, ValueError):
            return -1

    async def over(self) -> None:
        """Until it has ended."""
        while self.lives:
            machine = read(self.folder / "machine.json")
            try:
                descriptor = os.pidfd_open(int((machine or {})["keeper"]))
            except (KeyError, OSError):
                await asyncio.sleep(LOOK_S)  # it has just begun, or ended
                continue
            try:
                if self.lives:  # asked again: then it is of the process that was meant
                    await readable(descriptor)
            finally:
                os.close(descriptor)

    async def end(self) -> None:
        """End it, and its keeper; what is in its folder stays."""
        if self.lives:
            with suppress(Failed):
                await self.ask("kill")
            machine = read(self.folder / "machine.json")
            if machine is not None and alive(machine):
                with suppress(OSError):
                    os.kill(int(machine["pid"]), signal.SIGKILL)
            try:
                await asyncio.wait_for(unheld(self.folder), ASK_S)
            except TimeoutError:
                raise Failed("guest", "it does not end though it was killed", "look at the node") from None
