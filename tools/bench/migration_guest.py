"""Real guest memory for the migration benchmarks: a Debian guest under QEMU (TCG) with its memory in a file, caught at three moments.

Needs Debian: qemu-system-x86, debootstrap, e2fsprogs, root (debootstrap makes device nodes) and its mirrors once; the pieces are kept in a folder and made
again only where they are missing. The guest boots the cloud kernel from a disk, fills a database, reads files into its page cache, holds a blob of random
bytes (what encrypted data looks like), then goes on updating rows. Its memory is copied while it is paused: at the first moment, then after 10 s and after
60 s of the guest's work.
"""

import ctypes
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from .harness import die_with_parent, note, stop

MEMORY_MIB = 1024
"""Of the guest: as in the published measurements that the bars come from."""

MOMENTS_S = (0, 10, 60)
"""Seconds of the guest's work after which its memory is copied."""

_NEW_MOUNTS = 0x20000
"""CLONE_NEWNS of unshare(2)."""

_KEEP_SIZE, _PUNCH_HOLE = 1, 2
"""FALLOC_FL_KEEP_SIZE and FALLOC_FL_PUNCH_HOLE."""

BOOT_S = 600
"""At most so long until the guest has done its first work; TCG takes 20 to 60 s, and ten times that where thirty others want the processors."""

MODULES = ("virtio_pci", "virtio_blk", "ext4")
"""What the initial file system loads to reach the disk."""

WORK = """import os, sqlite3, time
blob = os.urandom(24 << 20)
for folder, _, names in os.walk("/usr"):
    for name in names:
        try:
            with open(os.path.join(folder, name), "rb") as file:
                file.read()
        except OSError:
            pass
db = sqlite3.connect("/var/work.db")
db.execute("pragma journal_mode=wal")
db.execute("create table reading (id integer primary key, device text, value real, note text)")
words = open("/usr/share/dict/words").read().split() if os.path.exists("/usr/share/dict/words") else sorted(os.listdir("/usr/bin"))
with db:
    db.executemany("insert into reading values (?, ?, ?, ?)", ((i, f"device-{i % 997}", (i * 7919 % 10007) / 10, " ".join(words[(i + k * 31) % len(words)] for k in range(12))) for i in range(400000)))
index = {row[0]: row for row in db.execute("select * from reading where id % 2 = 0")}
print("GUEST-READY", flush=True)
at = 0
while True:
    with db:
        for _ in range(50):
            at = (at * 1103515245 + 12345) % 400000
            db.execute("update reading set value = value + 0.5, note = ? where id = ?", (f"seen {at} times {words[at % len(words)]}", at))
    index[at] = db.execute("select * from reading where id = ?", (at,)).fetchone()
    time.sleep(0.2)
"""
INIT = """#!/bin/sh
export PATH=/usr/sbin:/usr/bin:/sbin:/bin
mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs tmp /tmp; mount -t devtmpfs dev /dev 2>/dev/null
exec </dev/console >/dev/console 2>&1
python3 /work.py
echo GUEST-FAILED
exec sleep 1000000
"""
FIRST = """#!/bin/sh
/bin/busybox mount -t proc proc /proc
/bin/busybox mount -t devtmpfs dev /dev
for module in $(/bin/busybox cat /modules/order); do /bin/busybox insmod /modules/$module; done
/bin/busybox mount -t ext4 /dev/vda /root
exec /bin/busybox switch_root /root /sbin/init-work
"""


class Missing(Exception):
    """A program or a right that making the guest needs is not there; says what to install."""


def _run(*command: str, cwd: Path | None = None) -> str:
    done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{command[0]} failed: {(done.stderr or done.stdout).strip()[-400:]}")
    return done.stdout


def _need() -> None:
    for program, package in (("qemu-system-x86_64", "qemu-system-x86"), ("debootstrap", "debootstrap"), ("mkfs.ext4", "e2fsprogs"), ("dpkg-deb", "dpkg")):
        if not shutil.which(program):
            raise Missing(f"{program} is missing: apt-get install --no-install-recommends {package}")
    if os.getuid():
        raise Missing("making the guest needs root (debootstrap); give --images a folder with memory images instead")


def newc(files: list[tuple[str, int, bytes]]) -> bytes:
    """A cpio archive (newc) of name, mode and content."""
    out = bytearray()
    for number, (name, mode, data) in enumerate([*files, ("TRAILER!!!", 0, b"")], 1):
        fields = (number, mode, 0, 0, 1, 0, len(data), 0, 0, 0, 0, len(name) + 1, 0)
        out += b"070701" + b"".join(b"%08X" % field for field in fields) + name.encode() + b"\0"
        out += bytes(-len(out) % 4) + data
        out += bytes(-len(out) % 4)
    return bytes(out)


def _initial(kernel_tree: Path, busybox: Path, target: Path) -> None:
    """The initial file system: busybox, the modules that the disk needs in their order of loading, and what starts the real one."""
    modules = next((kernel_tree / "lib/modules").iterdir())
    if not (modules / "modules.dep").exists():
        _run(str(busybox), "depmod", "-b", str(kernel_tree), modules.name)
    needs = {line.partition(":")[0]: line.partition(":")[2].split() for line in (modules / "modules.dep").read_text().splitlines()}
    by_name = {Path(path).name.partition(".")[0].replace("-", "_"): path for path in needs}
    order: list[str] = []
    for name in MODULES:
        path = by_name.get(name)
        if path is None:
            continue  # built into the kernel
        order += [one for one in [*reversed(needs[path]), path] if one not in order]
    # ext4 asks for crc32c by name, not as a dependency.
    order = [path for path in (by_name.get("crc32c_generic"),) if path is not None and path not in order] + order
    files = [("bin", 0o040755, b""), ("dev", 0o040755, b""), ("proc", 0o040755, b""), ("root", 0o040755, b""), ("modules", 0o040755, b"")]
    files += [("bin/sh", 0o120777, b"busybox"), ("bin/busybox", 0o100755, busybox.read_bytes()), ("init", 0o100755, FIRST.encode())]
    files += [(f"modules/{Path(path).name}", 0o100644, (modules / path).read_bytes()) for path in order]
    files.append(("modules/order", 0o100644, " ".join(Path(path).name for path in order).encode()))
    target.write_bytes(newc(files))


def pieces(folder: Path, options: Any) -> tuple[Path, Path, Path]:
    """Kernel, initial file system and disk, made where they are missing."""
    kernel, initial, disk = folder / "vmlinuz", folder / "initial.cpio", folder / "root.ext4"
    if kernel.exists() and initial.exists() and disk.exists():
        return kernel, initial, disk
    _need()
    note(options, "making the guest's kernel and disk (once; a minute or two)")
    folder.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        tree = Path(scratch)
        wanted = next(word for word in _run("apt-cache", "depends", "linux-image-cloud-amd64").split() if word.startswith("linux-image-6"))
        # apt drops its rights for the download where it can, and says so where it cannot.
        _run("apt-get", "-o", "APT::Sandbox::User=root", "download", wanted, "busybox-static", cwd=tree)
        for package in tree.glob("*.deb"):
            _run("dpkg-deb", "-x", str(package), str(tree / "kernel"))
        _run("debootstrap", "--variant=minbase", "--include=python3", "bookworm", str(tree / "root"))
        (tree / "root/work.py").write_text(WORK)
        (tree / "root/sbin/init-work").write_text(INIT)
        (tree / "root/sbin/init-work").chmod(0o755)
        shutil.rmtree(tree / "root/var/cache/apt", ignore_errors=True)
        _run("mkfs.ext4", "-q", "-d", str(tree / "root"), str(tree / "disk"), "1200M")
        busybox = next(path for path in (tree / "kernel/bin/busybox", tree / "kernel/usr/bin/busybox") if path.exists())
        _initial(tree / "kernel", busybox, initial)
        shutil.copy(next((tree / "kernel/boot").glob("vmlinuz-*")), kernel)
        (tree / "disk").rename(disk)
    return kernel, initial, disk


class Qmp:
    """QEMU's control socket: one command, one answer; events are passed over."""

    def __init__(self, path: Path) -> None:
        self._socket = socket.socket(socket.AF_UNIX)
        self._socket.settimeout(60)
        self._socket.connect(str(path))
        self._file = self._socket.makefile("rwb")
        self._read()
        self("qmp_capabilities")

    def _read(self) -> dict[str, Any]:
        line = self._file.readline()
        if not line:
            raise Missing("QEMU closed its control socket")
        answer: dict[str, Any] = json.loads(line)
        return answer

    def __call__(self, command: str, **arguments: Any) -> Any:
        """Raises Missing with QEMU's own words where it refuses."""
        self._file.write(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        self._file.flush()
        while True:
            answer = self._read()
            if "error" in answer:
                raise Missing(f"QEMU refused {command}: {answer['error'].get('desc')}")
            if "return" in answer:
                return answer["return"]


def arguments(pieces: tuple[Path, Path, Path], memory: Path, control: Path, *more: str) -> list[str]:
    """QEMU's command line: the machine, its memory shared in that file, its control socket."""
    kernel, initial, disk = pieces
    return [
        "qemu-system-x86_64", "-machine", "q35,memory-backend=ram", "-accel", "tcg", "-cpu", "max", "-m", str(MEMORY_MIB), "-smp", "1", "-nodefaults", "-display", "none", "-no-user-config",
        "-object", f"memory-backend-file,id=ram,size={MEMORY_MIB}M,mem-path={memory},share=on", "-kernel", str(kernel), "-initrd", str(initial),
        "-append", "console=ttyS0 quiet panic=-1 no_timer_check", "-drive", f"file={disk},format=raw,if=virtio,snapshot=on", "-qmp", f"unix:{control},server=on,wait=off", *more,
    ]


@contextmanager
def memory_folder(huge: bool) -> Iterator[Path]:
    """A folder whose files are memory; `huge`: of pages of 2 MiB where a file is as large, as a host of guests has its memory. Raises Missing.

    It is in a mount namespace that this process and those it starts have for themselves, so that nothing is left of it however they end.
    """
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as folder:
        if huge:
            if ctypes.CDLL(None, use_errno=True).unshare(_NEW_MOUNTS):
                raise Missing(f"no mount namespace: {os.strerror(ctypes.get_errno())}; run it as root")
            _run("mount", "--make-rprivate", "/")
            _run("mount", "-t", "tmpfs", "-o", "huge=always", "memory", folder)
        try:
            yield Path(folder)
        finally:
            if huge:
                _run("umount", "-l", folder)


@contextmanager
def guest(folder: Path, memory: Path, options: Any, prefix: tuple[str, ...] = ()) -> Iterator[Qmp]:
    """A guest that runs and has done its first work; `prefix` is what QEMU is started by."""
    made = pieces(folder, options)
    with tempfile.TemporaryDirectory() as scratch:
        console, control = Path(scratch) / "console", Path(scratch) / "qmp"
        process = subprocess.Popen(
            [*prefix, *arguments(made, memory, control, "-serial", f"file:{console}")], preexec_fn=die_with_parent, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
        )
        try:
            end = time.monotonic() + BOOT_S
            while b"GUEST-READY" not in (said := console.read_bytes() if console.exists() else b""):
                if process.poll() is not None:
                    raise Missing(f"QEMU ended: {(process.stderr.read() if process.stderr else b'').decode(errors='replace')[-400:]}")
                if time.monotonic() > end or b"GUEST-FAILED" in said or b"Kernel panic" in said:
                    raise Missing(f"the guest did not come up: {said.decode(errors='replace')[-400:]}")
                time.sleep(0.1)
            yield Qmp(control)
        finally:
            stop(process)


def holes(memory: Path) -> list[tuple[int, int]]:
    """Where a guest's memory file has nothing, as it never touched it: start and end, bytes."""
    found, at = [], 0
    with open(memory, "rb") as file:
        length = os.fstat(file.fileno()).st_size
        while at < length:
            start = os.lseek(file.fileno(), at, os.SEEK_HOLE)
            try:
                at = os.lseek(file.fileno(), start, os.SEEK_DATA)
            except OSError:  # nothing but a hole to the end
                at = length
            if start < at:
                found.append((start, at))
    return found


def punch(memory: Path, where: list[tuple[int, int]]) -> None:
    """Make it holes there again, where a paused guest has zeros that somebody's reading has put there. Raises OSError."""
    libc = ctypes.CDLL(None, use_errno=True)
    with open(memory, "r+b") as file:
        for start, end in where:
            if libc.fallocate(file.fileno(), _KEEP_SIZE | _PUNCH_HOLE, ctypes.c_long(start), ctypes.c_long(end - start)):
                raise OSError(ctypes.get_errno(), "fallocate")


def images(folder: Path, options: Any) -> list[Path]:
    """Memory of a guest at the moments of MOMENTS_S, kept in the folder; raises Missing."""
    wanted = [folder / f"memory-{moment}s.raw" for moment in MOMENTS_S]
    if all(path.exists() for path in wanted):
        return wanted
    with tempfile.TemporaryDirectory(dir="/dev/shm" if os.path.isdir("/dev/shm") else None) as scratch:
        memory = Path(scratch) / "memory"
        with guest(folder, memory, options) as qmp:
            before = 0
            for moment, path in zip(MOMENTS_S, wanted, strict=True):
                time.sleep(moment - before)
                before = moment
                qmp("stop")
                part = path.with_suffix(".part")
                _run("cp", "--sparse=always", str(memory), str(part))
                part.rename(path)
                qmp("cont")
    return wanted
