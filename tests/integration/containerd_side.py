"""Containers under a containerd of our own, for tests. Skips where it is missing."""

import asyncio
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers.container_laying import Settings
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.images import ImageStore
from tests.unit.workloads.image_side import layer
from tools.bench.own_containerd import Containerd

from .container_side import made_store
from .container_side import reason_against as against_containers
from .waiting import until


def reason_against() -> str:
    """Why nothing can be tested here; empty where it can."""
    if reason := against_containers():
        return reason
    for program in ("containerd", "containerd-shim-runc-v2"):
        if searched(program) is None:
            return f"no {program} (as root: apt install containerd)"
    try:
        import grpc  # noqa: F401
    except ImportError:
        return "no grpcio (pip install 'novacron[containerd]')"
    return ""


@contextmanager
def running(path: str = "") -> Iterator[Containerd]:
    """One that runs."""
    one = Containerd(path)
    try:
        one.start()
        asyncio.run(answers(one))
        yield one
    finally:
        one.remove()


async def answers(one: Containerd) -> None:
    """Until it does."""
    from edge_runtime.workloads.drivers.containerd_client import Client
    from edge_runtime.workloads.drivers.containerd_wire import VERSION
    from edge_runtime.workloads.drivers.face import Failed

    client = Client(one.socket)

    async def does() -> bool:
        try:
            return bool((await client.call(VERSION, 30.0))["version"])
        except Failed:
            return False

    try:
        await until(does, 120.0, what="an answer of containerd")
    except AssertionError:
        raise AssertionError(f"containerd does not answer; it says:\n{(one.top / 'log').read_text()[-6000:]}") from None
    finally:
        client.close()


def made_driver(folder: Path, store: ImageStore, one: Containerd, **more: Any) -> Any:
    """A driver over it."""
    from edge_runtime.workloads.drivers.containerd import RUNC, ContainerdDriver

    handler = more.pop("handler", RUNC)
    return ContainerdDriver(folder, store, Settings(**more), path=one.socket, handler=handler)


@pytest.fixture(scope="module")
def containerd() -> Iterator[Containerd]:
    if reason := reason_against():
        pytest.skip(reason)
    with running() as one:
        yield one


@pytest.fixture(scope="module")
def driver(containerd: Containerd, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    """One driver for a module's tests; what they leave running is ended."""
    from .container_side import end_all

    folder = tmp_path_factory.mktemp("containerd")
    (folder / "allowed").mkdir()
    (folder / "allowed/file").write_text("from the node")
    (folder / "allowed/way-out").symlink_to("/etc")
    store = made_store(folder, [layer([("file", "srv/.wh.gone", b""), ("file", "srv/old/.wh..wh..opq", b""), ("file", "srv/old/c", b"c")])])
    made = made_driver(folder, store, containerd, allowed_mounts=(str(folder / "allowed"),), log_bytes=65_536)
    yield made
    end_all(made)
    store.close()
