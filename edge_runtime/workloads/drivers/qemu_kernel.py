"""The kernel that guests boot, and the first file system (initramfs) that is made for it: a static busybox, the modules that a guest needs, and a script of ours as its first process.

The kernel is Debian's (`linux-image-cloud-amd64` or another with virtio modules): of this machine's /boot and /lib/modules, or from a folder that has the same two (`tools/setup/guest_kernel.sh` makes
one without root). Nothing is installed, and no compiler is needed.
"""

import io
import lzma
import os
import re
import struct
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

MODULES = ("virtio_mmio", "virtio_console", "virtio_blk", "overlay")
"""What a micro-VM needs beyond what Debian's kernels have built in (ext4, devtmpfs, cgroup2)."""

MAX_MODULE, MAX_KERNEL = 16 << 20, 128 << 20
"""Bytes of one module's file, unpacked, and of a kernel: a Debian kernel has 14 MB, its largest module 6."""

MAX_NEEDED = 64
"""Modules in all, with those that they need."""

BUSYBOX = ("/bin/busybox", "/usr/bin/busybox", "/usr/lib/initramfs-tools/bin/busybox")

RESEED = bytes.fromhex("b81000000031ffbe07520000" "0f05" "89c7f7df" "b83c000000" "0f05")
"""x86_64: ioctl(0, RNDRESEEDCRNG); exit with its error. A kernel takes what is written to /dev/urandom into its numbers only by and by: two clones of one template would give the same ones till then."""

RENEW = bytes.fromhex(
    "31c0" "31ff" "488d7424e0" "ba10000000" "0f05"  # read(0, a struct timespec below the stack, 16)
    "b8e3000000" "31ff" "0f05"  # clock_settime(CLOCK_REALTIME, that)
    "b810000000" "bf03000000" "be07520000" "0f05"  # ioctl(3, RNDRESEEDCRNG)
    "85c0" "0f95c0" "0c30" "b40a" "66894424e0" "488d7424e0"  # "0\n" where that was done, else "1\n"
    "b801000000" "bf01000000" "ba02000000" "0f05"  # write(1, that, 2)
    "ebb0"  # once more
)
"""x86_64: waits for the time, sets the clock, makes the random numbers new as `RESEED` does, says whether that was done, and waits again. It runs before a template is saved: a clone need not start it, nor see it end."""

_BASE = 0x40_0000
"""Where the small program is loaded."""

_RELEASE = re.compile(r"vmlinuz-(\d[\w.+-]{0,120})\Z")
_DEPENDS = re.compile(rb"\0depends=([a-z0-9_,-]*)\0", re.IGNORECASE)


class NoKernel(Exception):
    """Guests cannot be booted; the text says why and what would help."""


@dataclass(frozen=True, slots=True)
class Kernel:
    """A kernel: its release, its image, the folder of its modules."""

    release: str
    image: Path
    modules: Path


def find(folder: str) -> Kernel:
    """The newest kernel in `folder` (empty: this machine's own) that has what a guest needs. Raises `NoKernel`."""
    top = Path(folder or "/")
    found: list[Kernel] = []
    lacking = ""
    for image in top.glob("boot/vmlinuz-*"):
        match = _RELEASE.match(image.name)
        if match is None:
            continue
        modules = next((path for path in (top / "lib/modules" / match[1], top / "usr/lib/modules" / match[1]) if path.is_dir()), None)
        if modules is None:
            lacking = f"{image} has no modules beside it"
            continue
        found.append(Kernel(match[1], image, modules))
    if not found:
        raise NoKernel(f"there is no kernel for guests in {top}{': ' * bool(lacking)}{lacking} (tools/setup/guest_kernel.sh FOLDER fetches Debian's, then set workloads.guest_kernel)")
    return max(found, key=lambda kernel: ("cloud" in kernel.release, _version(kernel.release)))  # those are made for guests, and a third of the size


def _version(release: str) -> tuple[int, ...]:
    return tuple(int(part) for part in re.findall(r"\d+", release)[:6])


def busybox() -> bytes:
    """A static busybox. Raises `NoKernel`."""
    for path in BUSYBOX:
        try:
            data = Path(path).read_bytes()
        except OSError:
            continue
        if data[:4] == b"\x7fELF" and not _interpreted(data):
            return data
    raise NoKernel("there is no static busybox, which guests start with (apt install busybox-static)")


def _interpreted(data: bytes) -> bool:
    """Whether an ELF program (64 bits) needs a loader, which a guest does not have."""
    at, size, count = struct.unpack_from("<Q", data, 32)[0], *struct.unpack_from("<HH", data, 54)
    return any(struct.unpack_from("<I", data, at + number * size)[0] == 3 for number in range(count))


def modules(kernel: Kernel, names: Sequence[str] = MODULES) -> dict[str, bytes]:
    """The modules of these names and what they need, by name, in the order in which they can be loaded; those that the kernel has built in are left out. Raises `NoKernel`."""
    files = {_plain(name.partition(".ko")[0]): Path(where, name) for where, _, those in os.walk(kernel.modules / "kernel") for name in those if ".ko" in name}
    try:
        built = {_plain(os.path.basename(line).partition(".ko")[0]) for line in (kernel.modules / "modules.builtin").read_text().splitlines()}
    except OSError:
        raise NoKernel(f"{kernel.modules}/modules.builtin cannot be read (install the kernel's package again)") from None
    ordered: dict[str, bytes] = {}

    def take(name: str, above: tuple[str, ...]) -> None:
        if name in ordered or name in built:
            return
        if name not in files or name in above or len(ordered) >= MAX_NEEDED:
            raise NoKernel(f"the kernel {kernel.release} lacks the module {name} (use Debian's linux-image-cloud-amd64)")
        data = _unpacked(files[name])
        match = _DEPENDS.search(data)
        for needed in match[1].decode().split(",") if match else ():
            if needed:
                take(_plain(needed), (*above, name))
        ordered[name] = data

    for name in names:
        take(name, ())
    return ordered


def _plain(name: str) -> str:
    return name.replace("-", "_")


def _unpacked(path: Path) -> bytes:
    try:
        if path.suffix == ".xz":
            with lzma.open(path) as handle:
                data = handle.read(MAX_MODULE + 1)
        else:
            with open(path, "rb") as plain:
                data = plain.read(MAX_MODULE + 1)
    except (OSError, lzma.LZMAError, EOFError) as error:
        raise NoKernel(f"{path} cannot be read: {error} (install the kernel's package again)") from None
    if len(data) > MAX_MODULE or data[:4] != b"\x7fELF":
        raise NoKernel(f"{path} is no module that can be read here (use a kernel whose modules are plain or .xz)")
    return data


def program(code: bytes) -> bytes:
    """A static ELF program for x86_64 of this machine code."""
    size = 64 + 56 + len(code)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, _BASE + 64 + 56, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    return header + struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000) + code


def initramfs(shell: bytes, loaded: Mapping[str, bytes], init: bytes) -> bytes:
    """A cpio archive (newc, not compressed: a guest's processor is slower than its disk). `init` is its first process; modules lie in /modules, `order` there names them."""
    entries: list[tuple[str, int, bytes]] = [(name, 0o040755, b"") for name in ("bin", "dev", "proc", "sys", "run", "modules", "image", "disk", "root", "devices", "system")]
    entries += [("dev/console", 0o020600, b""), ("dev/null", 0o020666, b""), ("bin/busybox", 0o100755, shell), ("bin/reseed", 0o100755, program(RESEED)), ("bin/renew", 0o100755, program(RENEW)), ("init", 0o100755, init)]
    entries += [(f"modules/{name}.ko", 0o100644, data) for name, data in loaded.items()]
    entries.append(("modules/order", 0o100644, "".join(f"{name}\n" for name in loaded).encode()))
    return cpio(entries)


_DEVICES = {"dev/console": (5, 1), "dev/null": (1, 3)}


def cpio(entries: Iterable[tuple[str, int, bytes]]) -> bytes:
    """An archive in the format `newc` (Documentation/driver-api/early-userspace/buffer-format.rst); entries are name, mode with type, content; all belong to root."""
    out = io.BytesIO()
    for number, (name, mode, data) in enumerate((*entries, ("TRAILER!!!", 0, b"")), 1):
        raw = name.encode() + b"\0"
        major, minor = _DEVICES.get(name, (0, 0))
        fields = (number, mode, 0, 0, 2 if mode & 0o040000 else 1, 0, len(data), 0, 0, major, minor, len(raw), 0)
        out.write(b"070701" + b"".join(b"%08x" % field for field in fields))
        for part in (raw, data):
            out.write(part)
            out.write(bytes(-out.tell() % 4))
    return out.getvalue()
