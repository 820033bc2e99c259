"""This machine's own root in a guest: the same programs, packages and code, under Debian's kernel with control groups of version 2 alone, as Debian's own machines have it.

The root is shared read-only (virtiofs) under an overlay on a disk of the guest's own, so nothing that is done there is seen here. It has no network but its loopback. Systemd runs in it where that is asked for
(`systemd`), as far as what any service needs: the command is a service then.
"""

import os
import re
import select
import shlex
import shutil
import subprocess
import time
from dataclasses import dataclass
from pathlib import Path

from edge_runtime.workloads.drivers import qemu_kernel
from edge_runtime.workloads.drivers.outside import short_of_root
from firmware_images import tools
from firmware_images.errors import FirmwareError
from tests.integration.waiting import until_sync
from tools.bench.harness import ROOT, die_with_parent

VIRTIOFSD = ("/usr/lib/qemu/virtiofsd", "/usr/libexec/virtiofsd")
"""Of QEMU 7 (qemu-system-common), and a package of its own later (virtiofsd)."""

KERNEL = ROOT / ".novacron" / "guest-kernel"
MODULES = (
    "virtio_pci", "virtio_blk", "virtiofs", "overlay", "tun", "veth", "bridge", "nf_tables", "nf_conntrack_netlink", "loop", "unix_diag", "tcp_diag", "udp_diag", "inet_diag", "netlink_diag", "af_packet_diag",
)
"""Those that containers and CRIU ask for: nothing loads modules there when they are needed."""

QEMU = "qemu-system-x86_64"

DISK_MIB = 8192
"""Of the guest's own disk; the file here is sparse."""

SHARE_S = 20.0
"""Longest wait for the program that shares the root."""

END_S = 30.0
"""Longest wait for QEMU after the guest's power is off."""

_INIT = rb"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
while read -r module; do insmod /modules/$module.ko; done < /modules/order
mkdir -p /low /data /new
mount -t virtiofs -o ro host /low && mount -t ext4 /dev/vda /data && mkdir /data/up /data/work /data/tmp && mount -t overlay -o lowerdir=/low,upperdir=/data/up,workdir=/data/work root /new || echo own-root: no root
cd /new
mount -t proc proc proc; mount -t sysfs sys sys; mount -t devtmpfs dev dev; mkdir -p dev/pts dev/shm; mount -t devpts devpts dev/pts; mount -t tmpfs -o mode=1777 shm dev/shm
mount -t cgroup2 cgroup sys/fs/cgroup
mount -t tmpfs run run; mount -o bind /data/tmp tmp; chmod 1777 tmp
cp /command run/command
ip link set lo up; hostname own-root
export PATH=/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
if [ -e /unit ]; then rm -f .dockerenv; cp /unit etc/systemd/system/own-root.service; exec switch_root /new /lib/systemd/systemd --show-status=no --unit=own-root.service; fi
exec switch_root /new /bin/sh -c 'sh /run/command >/dev/console 2>&1; code=$?; echo; echo own-root: ended $code; sync; echo o >/proc/sysrq-trigger; sleep 1000'
"""


_UNIT = b"""[Unit]
Requires=basic.target
After=basic.target
[Service]
Type=oneshot
TimeoutStartSec=infinity
Environment=HOME=/root
ExecStart=/bin/sh -c 'sh /run/command >/dev/console 2>&1; code=$$?; echo >/dev/console; echo own-root: ended $$code >/dev/console; sync; echo o >/proc/sysrq-trigger'
"""


@dataclass(frozen=True, slots=True)
class Ended:
    """What came of a command."""

    code: int
    said: str
    """On its console, the kernel's words among them, without colours."""


def reason_against() -> str:
    """Why there can be no such guest; empty where there can."""
    if short := short_of_root():
        return f"a guest with this machine's root: {short}"
    if _shares() is None:
        return "no virtiofsd (as root: apt install qemu-system-common, or virtiofsd)"
    try:
        tools.require([QEMU, "mke2fs"])
        qemu_kernel.busybox()
        qemu_kernel.modules(qemu_kernel.find(str(KERNEL)), MODULES)
    except (FirmwareError, qemu_kernel.NoKernel) as error:
        return str(error)
    return ""


def _shares() -> str | None:
    return next((path for path in VIRTIOFSD if os.access(path, os.X_OK)), shutil.which("virtiofsd"))


def run(folder: Path, words: list[str], memory_mib: int, seconds: float, *, systemd: bool = False) -> Ended:
    """Run a command there, in this repository, and wait for its end; `folder` is for the guest's files. Raises TimeoutError with what it said. `systemd`: as a service of that."""
    initial, disk, shared = folder / "initrd", folder / "disk", folder / "share"
    initial.write_bytes(_initial(f"cd {shlex.quote(str(ROOT))} && exec {shlex.join(words)}", systemd))
    with disk.open("wb") as file:
        file.truncate(DISK_MIB << 20)
    subprocess.run(["mke2fs", "-q", "-F", "-t", "ext4", str(disk)], check=True, capture_output=True)
    with (folder / "share.log").open("wb") as log:
        sharing = subprocess.Popen([str(_shares()), f"--socket-path={shared}", "-o", "source=/", "-o", "cache=always", "-o", "sandbox=chroot"], stdin=subprocess.DEVNULL, stdout=log, stderr=log, preexec_fn=die_with_parent)
    try:
        until_sync(lambda: shared.exists() or sharing.poll() is not None, SHARE_S, "a root that is shared")
        with subprocess.Popen(
            [
                str(tools.find(QEMU)), "-machine", "q35,accel=tcg,memory-backend=mem", "-cpu", "max", "-smp", str(os.cpu_count() or 1), "-m", f"{memory_mib}M",
                "-object", f"memory-backend-memfd,id=mem,size={memory_mib}M,share=on", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-serial", "stdio",
                "-kernel", str(qemu_kernel.find(str(KERNEL)).image), "-initrd", str(initial), "-append", "console=ttyS0 quiet loglevel=4 panic=-1 mitigations=off cgroup_no_v1=all random.trust_cpu=on",
                "-chardev", f"socket,id=root,path={shared}", "-device", "vhost-user-fs-pci,chardev=root,tag=host", "-drive", f"file={disk},if=virtio,format=raw,cache=unsafe", "-device", "virtio-rng-pci",
            ],
            stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, preexec_fn=die_with_parent,
        ) as guest:
            try:
                said = _heard(guest, folder / "console.log", seconds)
                guest.wait(END_S)
            finally:
                guest.kill()
    finally:
        sharing.kill()
        sharing.wait()
        disk.unlink()
    ended = re.search(r"^own-root: ended (\d+)\r?$", said, re.MULTILINE)
    return Ended(int(ended[1]) if ended else -1, said)


def _heard(guest: "subprocess.Popen[bytes]", log: Path, seconds: float) -> str:
    """All that it says until it ends; in the file as it comes."""
    assert guest.stdout is not None
    end, said = time.monotonic() + seconds, b""
    with log.open("wb") as file:
        while True:
            if not select.select([guest.stdout], [], [], max(0.0, end - time.monotonic()))[0]:
                raise TimeoutError(f"the command did not end within {seconds:g} s; it said last: {said[-2000:].decode(errors='replace')}")
            data = os.read(guest.stdout.fileno(), 1 << 16)
            if not data:
                return re.sub(r"\x1b\[[0-9;]*m|\r", "", said.decode(errors="replace"))
            said += data
            file.write(data)
            file.flush()


def _initial(command: str, systemd: bool) -> bytes:
    """The guest's first file system."""
    loaded = qemu_kernel.modules(qemu_kernel.find(str(KERNEL)), MODULES)
    entries = [(name, 0o040755, b"") for name in ("bin", "dev", "proc", "sys", "modules")]
    entries += [("dev/console", 0o020600, b""), ("dev/null", 0o020666, b""), ("bin/busybox", 0o100755, qemu_kernel.busybox()), ("init", 0o100755, _INIT), ("command", 0o100755, f"{command}\n".encode())]
    entries += [("unit", 0o100644, _UNIT)] * systemd
    entries += [(f"modules/{name}.ko", 0o100644, data) for name, data in loaded.items()]
    return qemu_kernel.cpio([*entries, ("modules/order", 0o100644, "".join(f"{name}\n" for name in loaded).encode())])
