"""Real micro-VMs for tests. Skips where root, QEMU, busybox or a kernel for guests are missing."""

import os
import platform
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import qemu_kernel
from edge_runtime.workloads.drivers.face import Key, Order, Status
from edge_runtime.workloads.drivers.microvm import MicrovmDriver, Settings
from edge_runtime.workloads.drivers.outside import short_of_root
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.images import ImageStore

from .container_side import made_store

KERNEL = os.environ.get("NOVACRON_GUEST_KERNEL", str(Path(__file__).parents[2] / ".novacron/guest-kernel"))


def kernel_folder() -> str:
    """Where the guests' kernel is: what the set-up fetched, else this machine's own."""
    return KERNEL if Path(KERNEL).is_dir() else ""


def reason_against() -> str:
    """Why micro-VMs cannot be tested here; empty where they can."""
    if short := short_of_root():
        return f"micro-VMs: {short}"
    if platform.machine() != "x86_64" or searched("qemu-system-x86_64") is None:
        return "no qemu-system-x86_64 (as root: apt install qemu-system-x86)"
    if searched("mke2fs") is None:
        return "no mke2fs (as root: apt install e2fsprogs)"
    try:
        qemu_kernel.busybox()
        qemu_kernel.modules(qemu_kernel.find(kernel_folder()))
    except qemu_kernel.NoKernel as error:
        return str(error)
    return ""


def made_microvms(folder: Path, store: ImageStore, **settings: Any) -> MicrovmDriver:
    return MicrovmDriver(folder, store, Settings(**{"kernel": kernel_folder(), "log_bytes": 65_536, **settings}))


async def started(driver: MicrovmDriver, name: str, script: str, *, requests: dict[str, int] | None = None, leased: bool = False, **spec: Any) -> Key:
    """A micro-VM that runs a shell script."""
    key = Key(name, 1)
    await driver.prepare(Order(key, "box:1", requests or {}, {"command": ["sh", "-c", script], "limits": {"memory": "64Mi"}, **spec}, leased=leased))
    await driver.start(key)
    return key


async def output(driver: MicrovmDriver, name: str, script: str, **more: Any) -> tuple[Status, str, str]:
    """How a script ended, and what it wrote."""
    key = await started(driver, name, script, **more)
    status = await driver.wait(key)
    told = await driver.logs(key, 1 << 20)
    await driver.delete(key)
    return status, told.stdout.decode(), told.stderr.decode()


def end_all(driver: MicrovmDriver) -> None:
    """Delete all that is there."""
    import asyncio

    async def do() -> None:
        for status in await driver.instances():
            await driver.delete(status.key)

    asyncio.run(do())
    driver.close()


@pytest.fixture(scope="module")
def microvms(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One driver for a module's tests, and so one template; what they leave running is ended."""
    if reason := reason_against():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("microvms")
    store = made_store(folder)
    made = made_microvms(folder, store)
    yield made
    end_all(made)
    store.close()
