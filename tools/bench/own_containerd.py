"""A containerd of our own, for tests and benchmarks: its own root, state and socket, no CRI, started and ended by hand."""

import os
import shutil
import signal
import subprocess
import tempfile
from contextlib import suppress
from pathlib import Path

from edge_runtime.workloads.drivers.programs import searched

from .harness import die_with_parent

CONFIG = """version = 2
root = "{top}/root"
state = "{top}/state"
disabled_plugins = ["io.containerd.grpc.v1.cri", "io.containerd.snapshotter.v1.btrfs", "io.containerd.snapshotter.v1.zfs", "io.containerd.snapshotter.v1.aufs", "io.containerd.snapshotter.v1.devmapper"]
[grpc]
address = "{top}/containerd.sock"
[ttrpc]
address = "{top}/containerd.sock.ttrpc"
"""


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
                preexec_fn=die_with_parent,
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
