"""A containerd of our own for tests: its own root, state and socket, no CRI, started and ended by hand. Skips where it is missing."""

import asyncio
import os
import shutil
import signal
import subprocess
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers.container import Settings, searched
from edge_runtime.workloads.images import ImageStore
from tests.unit.workloads.image_side import layer

from .container_side import made_store
from .container_side import reason_against as against_containers
from .waiting import until

CONFIG = """version = 2
root = "{top}/root"
state = "{top}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
address = "{top}/containerd.sock"
[ttrpc]
address = "{top}/containerd.sock.ttrpc"
"""


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


class Containerd:
    """One, below a short path: names of sockets have 107 characters.

    Args:
        path: folders in which it looks for shims before all others.
    """

    def __init__(self, path: str = "") -> None:
        self.top = Path(tempfile.mkdtemp(prefix="ctrd-", dir="/run"))
        os.chmod(self.top, 0o711)
        (self.top / "config.toml").write_text(CONFIG.format(top=self.top))
        self.socket = str(self.top / "containerd.sock")
        self._path = os.pathsep.join(one for one in (path, os.environ.get("PATH", os.defpath), "/usr/sbin:/sbin") if one)
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        with open(self.top / "log", "ab") as said:
            self.process = subprocess.Popen(
                [str(searched("containerd")), "--config", str(self.top / "config.toml")], stdin=subprocess.DEVNULL, stdout=said, stderr=said, start_new_session=True, env={**os.environ, "PATH": self._path},
            )

    def end(self, number: int = signal.SIGTERM) -> None:
        """End it; shims and containers go on."""
        if self.process is not None:
            self.process.send_signal(number)
            self.process.wait()
            self.process = None

    def shims(self) -> list[int]:
        """Those that it started."""
        found = []
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and self.socket.encode() in (words := (entry / "cmdline").read_bytes()) and b"containerd-shim" in words:
                    found.append(int(entry.name))
        return found

    def remove(self) -> None:
        """End all of it."""
        shims = self.shims()
        for pid in (*children(shims), *shims):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        self.end()
        for line in reversed(Path("/proc/self/mounts").read_text().splitlines()):
            if line.split()[1].startswith(f"{self.top}/"):
                subprocess.run(["umount", "-l", line.split()[1]], capture_output=True)
        shutil.rmtree(self.top, ignore_errors=True)


def children(parents: list[int]) -> list[int]:
    """Processes that these have started."""
    found = []
    for entry in Path("/proc").iterdir():
        with suppress(OSError):
            if entry.name.isdigit() and int((entry / "stat").read_text().rpartition(")")[2].split()[1]) in parents:
                found.append(int(entry.name))
    return found


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
        await until(does, 60.0, what=f"an answer of containerd (see {one.top}/log)")
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
