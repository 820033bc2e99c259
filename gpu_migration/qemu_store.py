"""The receiving end of a guest's disks: a QEMU without a machine makes them and writes what comes, until the guest's own QEMU opens them. Its server of disks (NBD) listens on a socket in the guest's folder, for its
owner alone, and what comes there has come by authenticated streams (`tunnel`). Disks are made new, and nothing that comes is read as the header of one.
"""

import contextlib
import os
import socket
import stat
import subprocess
from collections.abc import Callable, Sequence
from pathlib import Path

from .errors import DestinationError
from .guest_disks import Disk, fits, same_size
from .qemu_qmp import QemuError, Qmp
from .tunnel import Tunnel
from .wire import Stream

CONNECT_S = 10.0
"""Seconds for the server of disks, which is on this machine."""
_MACHINE = ("-machine", "none", "-nodefaults", "-no-user-config", "-display", "none", "-S")


def place(folder: Path, disk: Disk) -> Path:
    """Where a disk is, or is to be."""
    return folder / disk.name


def prepare(folder: Path, disks: Sequence[Disk], made: Callable[[Path], None]) -> None:
    """See that all can be taken, and make files for those that are not there, empty; `made` is told each before. Raises DestinationError, and nothing was begun."""
    try:
        folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        if "," in str(folder):
            raise DestinationError(f"disks {folder}: QEMU cannot take a comma in a path; give another folder (--disks)")
        absent = [disk for disk in disks if not _there(place(folder, disk), disk)]
        room = os.statvfs(folder)
        fits(absent, room.f_bavail * room.f_frsize, str(folder))
        for disk in absent:
            made(place(folder, disk))
            with open(place(folder, disk), "xb") as file:
                if disk.format == "raw":
                    file.truncate(disk.size)
    except OSError as error:
        raise DestinationError(f"disks {folder}: {error.strerror or error}; give a folder for them that can be written to (--disks)") from None


def _there(path: Path, disk: Disk) -> bool:
    """Whether it was made by whoever runs this, and can be taken: a volume, or a file with nothing in it. Raises DestinationError, OSError."""
    if not path.exists():
        return False
    about = path.stat()
    if not stat.S_ISREG(about.st_mode) and not stat.S_ISBLK(about.st_mode):
        raise DestinationError(f"disk {disk.name}: {path} is neither a file nor a volume; remove it")
    if disk.format != "raw":
        raise DestinationError(f"disk {disk.name}: {path} is there, and the source's is {disk.format}; remove it, so that one is made")
    with path.open("rb") as file:
        same_size(disk, file.seek(0, os.SEEK_END), str(path))
    if stat.S_ISREG(about.st_mode) and about.st_blocks:
        raise DestinationError(f"disk {disk.name}: {path} has something in it, which would be lost; remove it, or give another folder for the disks (--disks)")
    return True


class Store:
    """Writes a guest's disks. On one thread, but for the tunnels."""

    def __init__(self, program: str, control: Path, log: Path, started: Callable[[int], None]) -> None:
        """`program`: QEMU's. `started` is told its pid. Raises QemuError."""
        self._path, self._nodes, self._tunnels = control.with_name(control.name + ".nbd"), list[str](), list[Tunnel]()
        control.unlink(missing_ok=True)
        self._path.unlink(missing_ok=True)
        try:
            with log.open("wb") as file:
                self._process = subprocess.Popen(
                    [program, *_MACHINE, "-qmp", f"unix:{control},server=on,wait=off"], stdin=subprocess.DEVNULL, stdout=file, stderr=file, start_new_session=True, umask=0o077
                )
        except OSError as error:
            raise QemuError(f"{program}: {error.strerror or error}") from None
        started(self._process.pid)
        process = self._process
        try:
            self._qmp: Qmp | None = Qmp(control, alive=lambda: process.poll() is None)
        except QemuError as error:
            self._qmp = None
            self.close()
            said = " ".join(log.read_text(errors="replace")[-500:].split())
            raise QemuError(f"the QEMU that takes the disks: {error}; {said}; begin QEMU's command line with its program") from None

    def serve(self, folder: Path, disks: Sequence[Disk]) -> None:
        """Open those disks, which are there. Raises DestinationError."""
        qmp = self._qmp
        assert qmp is not None
        try:
            qmp("nbd-server-start", addr={"type": "unix", "data": {"path": str(self._path)}})
            for number, disk in enumerate(disks):
                path, file, node = place(folder, disk), f"file-{number}", f"disk-{number}"
                qmp("blockdev-add", **{"node-name": file, "driver": "host_device" if path.is_block_device() else "file", "filename": str(path), "discard": "unmap"})
                if disk.format == "qcow2":
                    self._make(qmp, file, disk)
                qmp("blockdev-add", **{"node-name": node, "driver": disk.format, "file": file, "discard": "unmap"})
                self._nodes += [file, node]
                qmp("block-export-add", **{"id": node, "type": "nbd", "node-name": node, "name": disk.name, "writable": True})
        except QemuError as error:
            raise DestinationError(f"disks {folder}: {error}") from None

    @staticmethod
    def _make(qmp: Qmp, file: str, disk: Disk) -> None:
        job = f"make-{file}"
        qmp("blockdev-create", **{"job-id": job, "options": {"driver": disk.format, "file": file, "size": disk.size}})
        qmp.until("JOB_STATUS_CHANGE", status=("concluded",), id=(job,))
        wrong = next((one.get("error") for one in qmp("query-jobs") if one["id"] == job), None)
        qmp("job-dismiss", id=job)
        if wrong:
            raise QemuError(f"disk {disk.name} cannot be made ({wrong})")

    def take(self, stream: Stream, patience: float) -> None:
        """What comes by that stream goes to the server; the client says there which disk it means. Raises DestinationError."""
        local = socket.socket(socket.AF_UNIX)
        try:
            local.settimeout(CONNECT_S)
            local.connect(str(self._path))
        except OSError as error:
            local.close()
            raise DestinationError(f"the QEMU that takes the disks is gone ({error.strerror or error})") from None
        self._tunnels.append(Tunnel(local, stream, patience))

    def finish(self) -> None:
        """All that came is in the disks, and on them for good; they are let go of. Raises DestinationError where that is not so."""
        assert self._qmp is not None
        try:
            self._qmp("nbd-server-stop")
            while self._nodes:
                self._qmp("blockdev-del", **{"node-name": self._nodes.pop()})
        except QemuError as error:
            raise DestinationError(f"the disks could not be closed: {error}") from None

    def close(self) -> None:
        """Whatever it is at."""
        for tunnel in self._tunnels:
            tunnel.close()
        self._tunnels.clear()
        if self._qmp is not None:
            self._qmp.close()
            self._qmp = None
        self._process.kill()
        with contextlib.suppress(OSError):
            self._process.wait()
        self._path.unlink(missing_ok=True)
