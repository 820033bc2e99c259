"""Where one guest lives at a target, and the record there that decides whose it is."""

import contextlib
import fcntl
import json
import os
import select
import signal
from dataclasses import dataclass
from pathlib import Path

from .errors import DestinationError

KILLED_S = 10.0
"""Seconds for a QEMU that was killed to be gone."""
LOG_MOST = 2000
"""Characters of what QEMU said that are shown."""


@dataclass(frozen=True, slots=True)
class Decision:
    """The guest of that session is this end's."""

    session: bytes
    running_at: float


class Folder:
    """Where one guest lives."""

    def __init__(self, path: Path, disks: Path) -> None:
        """`disks`: the folder of those that come with it. Raises DestinationError."""
        self.disks, self.store, self.store_log = disks, path / "store", path / "store.log"
        self._made, self._store_pid = path / "disks-made", path / "store-pid"
        self.path, self.memory, self.control, self.log = path, path / "memory", path / "qmp", path / "qemu.log"
        self._decision, self._pid = path / "decision", path / "pid"
        self._lock = -1
        try:
            path.mkdir(mode=0o700, parents=True, exist_ok=True)
            self._lock = os.open(path / "lock", os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            os.close(self._lock)
            raise DestinationError(f"folder {path}: another program serves it; give another folder") from None
        except OSError as error:
            raise DestinationError(f"folder {path}: {error.strerror or error}") from None

    def decision(self) -> Decision | None:
        """Raises DestinationError where it cannot be read."""
        try:
            found = json.loads(self._decision.read_text())
            return Decision(bytes.fromhex(found["session"]), float(found["running_at"]))
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise DestinationError(f"folder {self.path}: its decision cannot be read ({error}); find out whether the source runs the guest") from None

    def decide(self, decision: Decision) -> None:
        """From here on it is this end's, whatever happens. Raises DestinationError, and it is not."""
        part = self._decision.with_name("decision.part")
        try:
            with part.open("w") as file:
                json.dump({"session": decision.session.hex(), "running_at": decision.running_at}, file)
                file.flush()
                os.fsync(file.fileno())
            part.rename(self._decision)
        except OSError as error:
            raise DestinationError(f"folder {self.path}: {error.strerror or error}") from None
        folder = os.open(self.path, os.O_RDONLY)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)

    def started(self, pid: int) -> None:
        """A QEMU of this folder."""
        self._pid.write_text(str(pid))

    def storing(self, pid: int) -> None:
        """A QEMU that writes the guest's disks."""
        self._store_pid.write_text(str(pid))

    def made(self, disk: Path) -> None:
        """A disk that is to be made for this move. Raises DestinationError."""
        try:
            with self._made.open("a") as file:
                file.write(json.dumps(str(disk)) + "\n")
                file.flush()
                os.fsync(file.fileno())
        except OSError as error:
            raise DestinationError(f"folder {self.path}: {error.strerror or error}") from None

    def clear(self) -> None:
        """End what an undecided move left: its QEMU, which never ran, the memory and the disks that were made for it."""
        self._kill(self._pid, self.control)
        self.stored()
        with contextlib.suppress(FileNotFoundError, ValueError):
            for line in self._made.read_text().splitlines():
                Path(json.loads(line)).unlink(missing_ok=True)
        for path in (self.control, self.memory, self._made):
            path.unlink(missing_ok=True)

    def stored(self) -> None:
        """End what writes the disks."""
        self._kill(self._store_pid, self.store)
        self.store.unlink(missing_ok=True)

    @staticmethod
    def _kill(record: Path, control: Path) -> None:
        """A QEMU with that control socket, and no process that has got its number since."""
        with contextlib.suppress(OSError, ValueError):
            pid = int(record.read_text())
            handle = os.pidfd_open(pid)
            try:
                if f"unix:{control},".encode() in Path(f"/proc/{pid}/cmdline").read_bytes():
                    signal.pidfd_send_signal(handle, signal.SIGKILL)
                    select.select([handle], [], [], KILLED_S)
            finally:
                os.close(handle)
        record.unlink(missing_ok=True)

    def said(self) -> str:
        """QEMU's last words."""
        with contextlib.suppress(OSError):
            return " ".join(self.log.read_text(errors="replace")[-LOG_MOST:].split())
        return ""

    def close(self) -> None:
        if self._lock >= 0:
            os.close(self._lock)
            self._lock = -1
