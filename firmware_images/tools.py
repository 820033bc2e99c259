"""Programs of this machine that the builder and the boot need: found, or refused with the Debian package that has them."""

import os
import re
import shutil
import subprocess
from collections.abc import Iterable, Sequence
from functools import cache
from pathlib import Path
from typing import IO

from .errors import FirmwareError

PACKAGES = {
    "apt-get": "apt", "dpkg-deb": "dpkg", "mksquashfs": "squashfs-tools", "mke2fs": "e2fsprogs", "mkfs.vfat": "dosfstools", "mmd": "mtools", "mcopy": "mtools", "mdel": "mtools", "depmod": "kmod", "cp": "coreutils", "setpriv": "util-linux", "debugfs": "e2fsprogs", "veritysetup": "cryptsetup-bin", "sfdisk": "fdisk", "e2fsck": "e2fsprogs", "openssl": "openssl",
    "qemu-system-x86_64": "qemu-system-x86", "qemu-system-aarch64": "qemu-system-arm", "qemu-system-riscv64": "qemu-system-misc",  # in Debian 13: qemu-system-riscv
}
"""Program to Debian package."""

BUILD = ("apt-get", "dpkg-deb", "mksquashfs", "mke2fs", "mkfs.vfat", "mmd", "mcopy", "mdel", "depmod", "cp", "openssl")

SBIN = ("/usr/sbin", "/sbin")
"""Where ordinary users' PATH does not look."""

TOOL_TIMEOUT_S = 900
"""Longest run of one program; mksquashfs over a host image on a slow machine takes minutes."""

VERSION_TIMEOUT_S = 30
"""Longest wait for a program to say its version."""

OUTPUT_SHOWN = 2000
"""Characters of a failed program's last words that are shown."""


BESIDE = Path(__file__).resolve().parents[1] / ".novacron" / "qemu"
"""Where the set-up lays a newer QEMU out beside the project, if this machine's own is an old one (`tools/setup/qemu.sh`)."""


def find(program: str) -> str | None:
    """Its path; None where it is not installed."""
    return shutil.which(program, path=str(BESIDE)) or shutil.which(program) or shutil.which(program, path=os.pathsep.join(SBIN))


def missing(programs: Iterable[str]) -> list[str]:
    """Those that are not installed."""
    return [program for program in programs if find(program) is None]


def require(programs: Iterable[str]) -> None:
    """Raises FirmwareError naming every program that is missing and how to get them."""
    if absent := missing(programs):
        packages = " ".join(sorted({PACKAGES.get(program, program) for program in absent}))
        raise FirmwareError("tools", f"{', '.join(absent)} not found", f"as root, apt install --no-install-recommends {packages}")


def run(command: Sequence[str], *, field: str, remedy: str, env: dict[str, str] | None = None, stdin: IO[bytes] | None = None, allowed: Sequence[int] = (0,)) -> str:
    """Run one program to its end; its output. `allowed` are exit statuses that are no failure. Raises FirmwareError with its last words where it fails."""
    program = find(command[0]) or command[0]
    try:
        done = subprocess.run([program, *command[1:]], capture_output=True, stdin=stdin or subprocess.DEVNULL, env={**os.environ, "LC_ALL": "C", **(env or {})}, timeout=TOOL_TIMEOUT_S)
    except subprocess.TimeoutExpired:
        raise FirmwareError(field, f"{command[0]} did not end within {TOOL_TIMEOUT_S} s", remedy) from None
    except OSError as error:
        raise FirmwareError(field, f"{command[0]} cannot be run ({error})", remedy) from None
    if done.returncode not in allowed:
        words = (done.stderr or done.stdout).decode(errors="replace").strip()[-OUTPUT_SHOWN:]
        raise FirmwareError(field, f"{command[0]} failed: {words}", remedy)
    return done.stdout.decode(errors="replace")


@cache
def qemu_version(program: str) -> tuple[int, int]:
    """Major and minor version of a QEMU, by its path; (0, 0) where it does not say."""
    try:
        told = subprocess.run([program, "--version"], capture_output=True, text=True, timeout=VERSION_TIMEOUT_S).stdout
    except (OSError, subprocess.TimeoutExpired):
        return 0, 0
    found = re.search(r"version (\d+)\.(\d+)", told)
    return (int(found[1]), int(found[2])) if found else (0, 0)
