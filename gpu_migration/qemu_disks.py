"""The sending end of a guest's disks: QEMU itself copies each to the target while the guest runs (`blockdev-mirror`), over NBD, which goes through an authenticated stream (`tunnel`).

At first only what has been copied is kept the same; near the end every write of the guest goes to both (`write-blocking`), so that when it stands still nothing is left to copy. The mirrors end then, before QEMU
leaves its state. Until the target is asked to take the guest over, each disk here is what it was; a mirror that fails, fails alone.
"""

import contextlib
import socket
import struct
import threading
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .convergence import Reason
from .errors import NotConverged, SourceError
from .guest_disks import DISKS_MOST, FORMATS, Disk, named
from .qemu_qmp import QemuError, Qmp
from .tunnel import Tunnel
from .wire import Stream

SYNC = "full"
"""What is copied: all that is there, not only what is written from now on."""
END_S = 30.0
"""Seconds for a mirror to end that is given up."""
STILL_S = 5.0
"""Seconds for mirrors to end that have nothing left to copy, while the guest stands still: the target syncs its disks meanwhile, which takes milliseconds as a rule. After that the guest runs on here."""
LOOK_S = 0.02
"""Seconds between two looks at mirrors that are nearly done, where QEMU says nothing."""
_OURS = "novacron-disk-"
"""How the names of our jobs and nodes begin."""
_OVER = ("concluded", "null")


def disks_of(qmp: Qmp) -> list[Disk]:
    """Those that are written to and whose node has a name of its own."""
    found = {disk.name: disk for disk in (disk_of(device) for device in qmp("query-block")) if disk is not None}
    if len(found) > DISKS_MOST:
        raise SourceError(f"the guest has {len(found)} disks; at most {DISKS_MOST} can be offered")
    return list(found.values())


def disk_of(device: dict[str, Any]) -> Disk | None:
    """One of `query-block`; None where it is none that can be moved."""
    node = device.get("inserted")
    if not node or node["ro"] or not named(str(node.get("node-name", ""))):
        return None
    image = node["image"]
    kind = FORMATS[0] if image.get("encrypted") else str(node["drv"])
    return Disk(str(node["node-name"]), kind if kind in FORMATS else FORMATS[0], int(image["virtual-size"]), int(image.get("actual-size", 0)))


def release(qmp: Qmp) -> None:
    """End what a run that was killed left in QEMU: mirrors that go nowhere. Raises QemuError."""
    _end_jobs(qmp, [job["id"] for job in qmp("query-jobs") if str(job["id"]).startswith(_OURS)])
    for node in qmp("query-named-block-nodes"):
        if str(node.get("node-name", "")).startswith(_OURS):
            with contextlib.suppress(QemuError):
                qmp("blockdev-del", **{"node-name": node["node-name"]})


def _states(qmp: Qmp, names: Sequence[str]) -> dict[str, dict[str, Any]]:
    return {job["id"]: job for job in qmp("query-jobs") if job["id"] in names}


def _end_jobs(qmp: Qmp, names: Sequence[str]) -> None:
    """Whatever they are at."""
    for name in names:
        with contextlib.suppress(QemuError):
            qmp("block-job-cancel", device=name, force=True)
    _wait_over(qmp, names, END_S)
    for name in names:
        with contextlib.suppress(QemuError):
            qmp("job-dismiss", id=name)


def _wait_over(qmp: Qmp, names: Sequence[str], seconds: float) -> dict[str, dict[str, Any]]:
    """Until all have ended; what they say. Raises QemuError."""
    end = time.monotonic() + seconds
    while True:
        states = _states(qmp, names)
        if all(job["status"] in _OVER for job in states.values()):
            return states
        if time.monotonic() > end:
            raise QemuError(f"a disk's mirror did not end within {seconds:g} s")
        qmp.pause(LOOK_S)


class Mirrors:
    """All disks of a guest that move. Used by the one thread that has the control socket."""

    def __init__(self, qmp: Qmp, control: Path, disks: Sequence[Disk], patience: float, limit: float = 0.0) -> None:
        """`limit`: bytes a second of all together; 0: none."""
        self._qmp, self._control, self._disks, self._patience = qmp, control, list(disks), patience
        self._limit = int(limit / max(1, len(disks)))
        self._jobs: dict[str, Disk] = {}
        self._nodes: list[str] = []
        self._tunnels: list[Tunnel] = []
        self._late = bool(disks) and any(one["name"] == "block-job-change" for one in qmp("query-commands"))
        """Whether a mirror can be made synchronous later (QEMU 8.2); else it is from the beginning."""

    def start(self, streams: Sequence[Stream]) -> None:
        """Begin to copy; `streams` in the order of the disks, and ours from here on. Raises SourceError, QemuError."""
        waiting = list(streams)
        try:
            for number, disk in enumerate(self._disks):
                self._start(f"{_OURS}{number}", disk, waiting)
        finally:
            for stream in waiting:
                stream.close()

    def _start(self, name: str, disk: Disk, waiting: list[Stream]) -> None:
        way = _Way(self._control.with_name(f"{self._control.name}.{name}"), self._qmp.pid, waiting, self._patience)
        try:
            self._qmp("blockdev-add", **{"node-name": name, "driver": "nbd", "server": {"type": "unix", "path": str(way.path)}, "export": disk.name, "discard": "unmap"})
            self._nodes.append(name)
            mode = "background" if self._late else "write-blocking"
            self._qmp("blockdev-mirror", **{"job-id": name, "device": disk.name, "target": name, "sync": SYNC, "copy-mode": mode, "auto-dismiss": False, "speed": self._limit})
            self._jobs[name] = disk
        except QemuError as error:
            raise SourceError(f"disk {disk.name}: QEMU does not copy it to the target ({error})") from None
        finally:
            tunnel = way.close()
            if tunnel is not None:
                self._tunnels.append(tunnel)

    @property
    def sent(self) -> int:
        """Bytes to the target, of the protocol for disks."""
        return sum(tunnel.sent for tunnel in self._tunnels)

    def check(self) -> None:
        """Raises SourceError where one has failed."""
        states = _states(self._qmp, list(self._jobs))
        for name, disk in self._jobs.items():
            job = states.get(name)
            if job is None or job["status"] in ("aborting", *_OVER):
                raise SourceError(f"disk {disk.name}: it could not be copied to the target ({(job or {}).get('error', 'its mirror has ended')}); see that there is room and that the target is there, then start both again")

    def same(self, stall: float) -> None:
        """Until all that is written goes to both. Raises SourceError, and NotConverged where there is no progress for so many seconds."""
        if self._late:
            for name in self._jobs:
                with contextlib.suppress(QemuError):  # it has failed, which the look below says
                    self._qmp("block-job-change", id=name, type="mirror", **{"copy-mode": "write-blocking"})
        best, since = -1, time.monotonic()
        while True:
            self.check()
            jobs = [job for job in self._qmp("query-block-jobs") if job["device"] in self._jobs]
            if len(jobs) == len(self._jobs) and all(job["ready"] and job.get("actively-synced", True) for job in jobs):
                return
            copied = sum(int(job["offset"]) for job in jobs)
            if copied > best:
                best, since = copied, time.monotonic()
            elif time.monotonic() - since > stall:
                raise NotConverged(f"the guest's disks are not copied: no progress for {stall:g} s ({sum(int(job['len']) - int(job['offset']) for job in jobs)} bytes remain)", Reason.STALLED)
            self._qmp.pause(LOOK_S)

    def end(self) -> None:
        """The guest stands still: see that the target's disks are what these are, and let go of them. Raises SourceError, QemuError."""
        self.check()
        for name in self._jobs:
            self._qmp("block-job-cancel", device=name)  # of a mirror that is ready: end it where both are the same
        states = _wait_over(self._qmp, list(self._jobs), STILL_S)
        for name, disk in self._jobs.items():
            if "error" in states.get(name, {"error": ""}):
                raise SourceError(f"disk {disk.name}: it could not be copied to its end ({states.get(name, {}).get('error')})")
            self._qmp("job-dismiss", id=name)
        self._jobs.clear()
        self._forget()

    def close(self) -> None:
        """Whatever they are at; the guest goes on with what it has here."""
        for tunnel in self._tunnels:
            tunnel.hang_up()  # so that QEMU does not wait for a target that says nothing
        with contextlib.suppress(QemuError):
            if self._jobs:
                _end_jobs(self._qmp, list(self._jobs))
            self._forget()
        for tunnel in self._tunnels:
            tunnel.close()

    def _forget(self) -> None:
        while self._nodes:
            self._qmp("blockdev-del", **{"node-name": self._nodes.pop()})


class _Way:
    """A socket beside QEMU's, at which it, and no other process, is connected with a stream to the target."""

    def __init__(self, path: Path, pid: int, waiting: list[Stream], patience: float) -> None:
        """Takes the first stream that waits, once QEMU has come. Raises SourceError."""
        self.path, self._pid, self._waiting, self._patience = path, pid, waiting, patience
        self._tunnel: Tunnel | None = None
        self._listener = socket.socket(socket.AF_UNIX)
        try:
            path.unlink(missing_ok=True)
            self._listener.bind(str(path))
            path.chmod(0o666)  # QEMU may be another user's; who it is that comes is looked at below
            self._listener.listen()
        except OSError as error:
            self._listener.close()
            raise SourceError(f"socket {path}: {error.strerror or error}; QEMU's control socket must be in a folder that this program may write to") from None
        self._thread = threading.Thread(target=self._accept, daemon=True, name="disk")
        self._thread.start()

    def _accept(self) -> None:
        with contextlib.suppress(OSError):
            while self._tunnel is None:
                local, _ = self._listener.accept()
                if struct.unpack("3i", local.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0] == self._pid:
                    self._tunnel = Tunnel(local, self._waiting.pop(0), self._patience)
                else:
                    local.close()

    def close(self) -> Tunnel | None:
        """Nobody else may come; what was made for QEMU."""
        with contextlib.suppress(OSError):
            self._listener.shutdown(socket.SHUT_RDWR)
        self._thread.join()
        self._listener.close()
        self.path.unlink(missing_ok=True)
        return self._tunnel
