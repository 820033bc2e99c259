"""Real containers for tests: an image around Debian's static busybox, and a driver over it. Skips where root, a runtime or busybox are missing."""

import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_laying import Settings
from edge_runtime.workloads.drivers.face import Key, Order, Status
from edge_runtime.workloads.drivers.outside import short_of_root
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.images import ImageStore, Limits
from tests.unit.workloads.image_side import Entry, layer, layout

BUSYBOX = Path("/bin/busybox")
APPLETS = ["cat", "dd", "echo", "false", "grep", "head", "id", "ls", "mkdir", "mount", "nproc", "ping", "ps", "sh", "sleep", "stat", "touch", "true", "tr", "unshare", "wc", "yes"]
LIMITS = Limits(keep_free=0)


def reason_against() -> str:
    """Why containers cannot be tested here; empty where they can."""
    if short := short_of_root():
        return f"containers: {short}"
    if searched("runc") is None:
        return "no runc (as root: apt install runc)"
    if not BUSYBOX.exists() or (searched("file") is not None and b"statically linked" not in subprocess.run(["file", "-b", str(BUSYBOX)], capture_output=True).stdout):
        return "no static busybox (as root: apt install busybox-static)"
    return ""


def base() -> bytes:
    """A layer with busybox, two users and some files."""
    entries: list[Entry] = [("folder", "tmp", b""), ("folder", "srv", b""), ("file", "bin/busybox", BUSYBOX.read_bytes()), *(("symlink", f"bin/{name}", b"busybox") for name in APPLETS)]
    entries += [("file", "etc/passwd", b"root:x:0:0::/:/bin/sh\napp:x:1000:1001::/:/bin/sh\n"), ("file", "etc/group", b"root:x:0:\nstaff:x:50:\n"), ("file", "srv/old/a", b"a"), ("file", "srv/old/b", b"b"), ("file", "srv/gone", b"g")]
    return layer(entries)


def made_store(folder: Path, more: Sequence[bytes] = (), name: str = "box:1", run: dict[str, Any] | None = None) -> ImageStore:
    """A store with one image."""
    store = ImageStore(folder / "images", limits=LIMITS)
    store.add(layout(folder / "in", [base(), *more], name=name, run=run or {"Cmd": ["sh", "-c", "echo hello; echo trouble >&2; exit 3"]}))
    return store


def made_driver(folder: Path, store: ImageStore, **settings: Any) -> ContainerDriver:
    return ContainerDriver(folder, store, Settings(**settings))


async def started(driver: ContainerDriver, name: str, script: str, *, requests: dict[str, int] | None = None, image: str = "box:1", **spec: Any) -> Key:
    """A container that runs a shell script."""
    key = Key(name, 1)
    await driver.prepare(Order(key, image, requests or {}, {"command": ["sh", "-c", script], **spec}))
    await driver.start(key)
    return key


async def output(driver: ContainerDriver, name: str, script: str, **more: Any) -> tuple[Status, str, str]:
    """How a script ended, and what it wrote."""
    key = await started(driver, name, script, **more)
    status = await driver.wait(key)
    told = await driver.logs(key, 1 << 20)
    await driver.delete(key)
    return status, told.stdout.decode(), told.stderr.decode()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One driver for a module's tests; what they leave running is ended."""
    if reason := reason_against():
        pytest.skip(reason)
    folder = tmp_path_factory.mktemp("containers")
    (folder / "allowed").mkdir()
    (folder / "allowed/file").write_text("from the node")
    (folder / "allowed/way-out").symlink_to("/etc")
    store = made_store(folder, [layer([("file", "srv/.wh.gone", b""), ("file", "srv/old/.wh..wh..opq", b""), ("file", "srv/old/c", b"c")])])
    made = made_driver(folder, store, allowed_mounts=(str(folder / "allowed"),), log_bytes=65_536)
    yield made
    end_all(made)
    store.close()


def end_all(driver: ContainerDriver) -> None:
    """Delete all that is there."""
    import asyncio

    async def do() -> None:
        for status in await driver.instances():
            await driver.delete(status.key)

    asyncio.run(do())
    driver.close()
