"""What the driver of virtual machines boots to see what it can do here, and what it knows of QEMU's versions."""

import shutil
from pathlib import Path

from . import qemu_kernel, vm_image, vm_seed
from .vm_machine import KERNEL, Shape

PROBE = Shape(128, 1, KERNEL)
"""What the probe boots."""

PROBE_MODULES = ("virtio_pci", "virtio_console")

PROBE_INIT = rb"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys
while read -r module; do insmod /modules/$module.ko; done < /modules/order
until (exec 8>/dev/vport2p1 || exec 8>/dev/vport1p1 || exec 8>/dev/vport0p1) 2>/dev/null; do sleep 0.02; done
for port in /dev/vport*p1; do echo ready > $port; done
sleep 1000
"""
"""The probe's guest: Linux with its devices."""

QUIET = "console=ttyS0 quiet loglevel=1 panic=-1 random.trust_cpu=on mitigations=off no_timer_check"
"""Arguments of the probe's kernel. `no_timer_check`: an emulated timer on a busy machine may miss the moment in which the kernel looks whether it ticks, and that is a panic."""

LIVE_TCG = 10
"""QEMU's version from which an emulated machine is sent whole while it runs: 7.2 damaged 6 of 30, 10.0 none of 50 (measured by a verifier in the guest). With KVM it is the kernel that sees the writes."""


def guest(folder: Path, kernel: qemu_kernel.Kernel) -> vm_image.Content:
    """Lay the probe's guest out. Raises `NoKernel`, OSError. Blocks."""
    (folder / "initramfs").write_bytes(qemu_kernel.initramfs(qemu_kernel.busybox(), qemu_kernel.modules(kernel, PROBE_MODULES), PROBE_INIT))
    shutil.copyfile(kernel.image, folder / "kernel")
    (folder / "base.raw").write_bytes(vm_seed.seed({}))
    for name in ("kernel", "initramfs"):
        (folder / name).chmod(0o644)
    return vm_image.Content(folder / "base.raw", "raw", 1 << 20, folder / "kernel", folder / "initramfs", QUIET)


def too_old(version: str) -> str:
    """Why an emulated machine of this version of QEMU cannot be sent while it runs; empty where it can."""
    major = int(version.partition(".")[0] or 0)
    return "" if major >= LIVE_TCG else f"QEMU {version}, emulating, loses writes to memory that is being sent while it runs (seen: 6 of 30 moves); QEMU {LIVE_TCG} does not"
