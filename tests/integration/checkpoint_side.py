"""Containers whose state can be taken: CRIU as the set-up lays it out, and a Python of the host in them. Skips where these are missing."""

import os
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import criu
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Key, Order
from edge_runtime.workloads.drivers.programs import searched

from ..unit.workloads.image_side import layer
from .container_side import end_all, made_driver, made_store, reason_against
from .waiting import until

LAID_OUT = Path(__file__).parents[2] / ".novacron/criu/criu"
"""By tools/setup/criu.sh."""

PYTHON = Path("/usr/bin/python3")
"""Debian's own: all of it is below /usr, which a container can mount."""

SLEEPY = "i=0; while true; do echo $i; i=$((i+1)); sleep 0.05; done"


def program() -> str:
    """The CRIU to test with."""
    return str(LAID_OUT) if LAID_OUT.exists() else searched("criu") or ""


def reason_against_checkpoints() -> str:
    """Why checkpoints cannot be tested here; empty where they can."""
    if reason := reason_against():
        return reason
    found = criu.find(program() or None)
    return found if isinstance(found, str) else ""


def made(folder: Path, **settings: Any) -> ContainerDriver:
    """A driver with CRIU; its containers may mount /usr and `folder/shared`."""
    (folder / "shared").mkdir(exist_ok=True)
    store = made_store(folder, [layer([("symlink", "lib", b"usr/lib"), ("symlink", "lib64", b"usr/lib64"), ("symlink", "sbin", b"usr/sbin")])])
    settings.setdefault("criu", program())
    return made_driver(folder, store, allowed_mounts=(str(folder / "shared"), "/usr"), **settings)


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One driver for a module's tests; what they leave running is ended."""
    if reason := reason_against_checkpoints():
        pytest.skip(reason)
    found = made(tmp_path_factory.mktemp("checkpoints"))
    yield found
    end_all(found)


def python(code: str, **spec: Any) -> dict[str, Any]:
    """The spec of a container that runs a Python program."""
    if not PYTHON.exists() or not os.path.realpath("/lib64").startswith("/usr"):
        pytest.skip("no Python of the system's own, all below /usr")
    return {"command": [str(PYTHON), "-u", "-c", code], "mounts": [{"target": "/usr", "source": "/usr"}], **spec}


async def begun(driver: ContainerDriver, name: str, spec: dict[str, Any], requests: dict[str, int] | None = None) -> Key:
    """A container that runs. Control groups are the machine's: no other test's container may have the name."""
    key = Key(name, 1)
    await driver.prepare(Order(key, "box:1", requests or {}, spec))
    await driver.start(key)
    return key


def next_of(key: Key, spec: dict[str, Any], requests: dict[str, int] | None = None) -> Order:
    """The same workload under the next epoch."""
    return Order(Key(key.id, key.epoch + 1), "box:1", requests or {}, spec)


async def out(driver: ContainerDriver, key: Key) -> str:
    """What it has written."""
    told = await driver.logs(key, 1 << 20)
    return told.stdout.decode() + told.stderr.decode()


async def says(driver: ContainerDriver, key: Key, word: str) -> None:
    """Until it has written something."""
    async def said() -> bool:
        return word in await out(driver, key)

    await until(said)
