"""Real virtual machines for tests: the sample disk, in the forms in which images come. Skips where root, QEMU, busybox or a kernel for guests are missing."""

import asyncio
import platform
import re
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import qemu_kernel
from edge_runtime.workloads.drivers.face import Key, Order, Phase
from edge_runtime.workloads.drivers.outside import short_of_root
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.drivers.vm import Settings, VmDriver
from edge_runtime.workloads.images import ImageStore
from tests.unit.workloads.image_side import layer, layout
from tools.novactl import vm_sample

from . import counting_guest
from .container_side import LIMITS
from .microvm_side import kernel_folder
from .waiting import until

MEMORY = 128 << 20
"""Of a sample's guest."""

BOOT_S = 110.0
"""Given to a boot: two busy processors that many share take twenty times as long as an idle one."""

COUNTS = "i=0; while :; do echo $i > /data/n; sync; echo 3 > /proc/sys/vm/drop_caches; read -r n < /data/n; [ $n = $i ] || echo differs $n; echo $i; i=$((i+1)); sleep 0.05; done"
"""A script for a guest: it says 0, 1, 2.. on its console, as `counting_guest` does."""

HELLO = re.compile(rb"hello from ([a-z0-9-]+), a virtual machine on Linux [^,]+, start (\d+)\r?\n")


def reason_against() -> str:
    """Why virtual machines cannot be tested here; empty where they can."""
    if short := short_of_root():
        return f"virtual machines: {short}"
    if platform.machine() != "x86_64" or searched("qemu-system-x86_64") is None:
        return "no qemu-system-x86_64 (as root: apt install qemu-system-x86)"
    try:
        qemu_kernel.busybox()
        qemu_kernel.modules(qemu_kernel.find(kernel_folder()), vm_sample.MODULES)
    except qemu_kernel.NoKernel as error:
        return str(error)
    return ""


def kernel_store(folder: Path) -> ImageStore:
    """A store with the sample `kernel:1`, which is given a kernel."""
    store = ImageStore(folder / "images", limits=LIMITS)
    kernel = qemu_kernel.find(kernel_folder())
    first = qemu_kernel.initramfs(qemu_kernel.busybox(), qemu_kernel.modules(kernel, vm_sample.MODULES), vm_sample.INIT)
    entries = [("file", "disk/a.raw", vm_sample.disk(kernel_folder())), ("file", "boot/vmlinuz", kernel.image.read_bytes()), ("file", "boot/initrd", first), ("file", "boot/cmdline", vm_sample.ARGUMENTS.encode())]
    store.add(layout(folder / "kernel", [layer(entries, mode=0o644)], name="kernel:1", packed=False))
    return store


def sample_store(folder: Path) -> ImageStore:
    """A store with the sample in three forms: `raw:1`, `kernel:1` (beside the disk, a kernel that is given to the machine), and where qemu-img is, `qcow2:1`; and `blank:1`, which boots nothing; `counter:1`, see `counting_guest`."""
    store, disk = kernel_store(folder), vm_sample.disk(kernel_folder())
    store.add(layout(folder / "raw", [layer([("file", "disk/a.raw", disk)], mode=0o644)], name="raw:1", packed=False))
    store.add(layout(folder / "blank", [layer([("file", "disk/a.img", bytes(1 << 20))], mode=0o644)], name="blank:1"))
    store.add(layout(folder / "counter", [layer([("file", "disk/a.raw", counting_guest.DISK)], mode=0o644)], name=counting_guest.IMAGE))
    if (program := shutil.which("qemu-img")) is not None:
        (folder / "a.raw").write_bytes(disk)
        subprocess.run([program, "convert", "-f", "raw", "-O", "qcow2", "a.raw", "a.qcow2"], cwd=folder, check=True, timeout=60)
        store.add(layout(folder / "qcow2", [layer([("file", "disk/a.qcow2", (folder / "a.qcow2").read_bytes())], mode=0o644)], name="qcow2:1", packed=False))
    return store


def made_vms(folder: Path, store: ImageStore, **settings: Any) -> VmDriver:
    return VmDriver(folder, store, Settings(**{"kernel": kernel_folder(), "log_bytes": 65_536, **settings}))


async def started(driver: VmDriver, name: str, image: str = "raw:1", script: str = "", *, leased: bool = False, **spec: Any) -> Key:
    """A machine that boots; `script` is its user data."""
    key = Key(name, 1)
    cloud = {"cloud_init": {"user_data": "#!/bin/sh\n" + script}} if script else {}
    await driver.prepare(Order(key, image, {"memory": MEMORY}, {"boot_s": BOOT_S, **cloud, **spec}, leased=leased))
    await driver.start(key)
    return key


async def console(driver: VmDriver, key: Key, text: bytes, seconds: float = 60.0) -> bytes:
    """The lines of its console, once one of them has `text`; a line that is still being written does not count."""
    async def said() -> bytes | None:
        found = (await driver.logs(key, 65_536)).stdout.rpartition(b"\n")[0] + b"\n"
        if text in found:
            return found
        status = await driver.status(key)
        assert status.phase in (Phase.RUNNING, Phase.PAUSED), (text, found, status)
        return None

    lines: bytes = await until(said, seconds, f"{text!r} on the console")
    return lines


def end_all(driver: VmDriver) -> None:
    """Delete all that is there."""

    async def do() -> None:
        for status in await driver.instances():
            await driver.delete(status.key)

    asyncio.run(do())
    driver.close()


@pytest.fixture(scope="module")
def vms(tmp_path_factory: pytest.TempPathFactory) -> Iterator[VmDriver]:
    """One driver for a module's tests; what they leave running is ended."""
    if reason := reason_against():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("vms")
    store = sample_store(folder)
    made = made_vms(folder, store)
    yield made
    end_all(made)
    store.close()
