"""QEMU's control protocol (QMP) over a Unix socket: one command at a time, events kept with QEMU's own time."""

import json
import select
import socket
import struct
import time
from collections import deque
from collections.abc import Callable
from pathlib import Path
from typing import Any

from .errors import MigrationError

ANSWER_S = 30.0
"""Seconds for an answer: stopping a guest waits for its disks."""
MEANWHILE_S = 0.001
"""Seconds for QEMU to say something before something else is done: it needs a processor too."""
LINE_MOST = 1 << 20
"""Bytes of one line that QEMU says."""
EVENTS_MOST = 200


class QemuError(MigrationError):
    """QEMU refused, ended, or said nothing in time."""


class QemuRefused(QemuError):
    """QEMU is there and does not do what it was told, now."""


class Qmp:
    """One connection. Not to be shared between threads."""

    def __init__(self, path: Path, seconds: float = ANSWER_S, alive: Callable[[], bool] = lambda: True) -> None:
        """Waits as long for a socket that is not there yet, while QEMU is `alive`. Raises QemuError."""
        self.path, self._seconds, self._waits = path, seconds, b""
        self.events: deque[dict[str, Any]] = deque(maxlen=EVENTS_MOST)
        self._socket = self._connect(time.monotonic() + seconds, alive)
        try:
            self._message(time.monotonic() + seconds)  # its greeting
            self("qmp_capabilities")
        except BaseException:
            self._socket.close()
            raise

    def _connect(self, end: float, alive: Callable[[], bool]) -> socket.socket:
        while True:
            line = socket.socket(socket.AF_UNIX)
            try:
                line.connect(str(self.path))
                return line
            except OSError as error:
                line.close()
                if time.monotonic() > end or not alive():
                    raise QemuError(f"QEMU's control socket {self.path}: {error.strerror or error}") from None
            select.select([], [], [], 0.01)

    @property
    def pid(self) -> int:
        """Of QEMU."""
        pid: int = struct.unpack("3i", self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12))[0]
        return pid

    def __call__(self, command: str, **arguments: Any) -> Any:
        """One command's answer. Raises QemuError."""
        self.say(command, **arguments)
        return self.answer(command)

    def say(self, command: str, **arguments: Any) -> None:
        """A command whose answer is waited for later: `answer`, before the next one. Raises QemuError."""
        try:
            self._socket.sendall(json.dumps({"execute": command, "arguments": arguments}).encode() + b"\n")
        except OSError as error:
            raise QemuError(f"{command}: QEMU has ended ({error.strerror or error})") from None

    def give(self, name: str, descriptor: int) -> None:
        """Hand QEMU a descriptor under a name (`fd:NAME`)."""
        try:
            socket.send_fds(self._socket, [json.dumps({"execute": "getfd", "arguments": {"fdname": name}}).encode() + b"\n"], [descriptor])
        except OSError as error:
            raise QemuError(f"getfd: QEMU has ended ({error.strerror or error})") from None
        self.answer("getfd")

    def answer(self, command: str) -> Any:
        """Of what was said. Raises QemuError."""
        end = time.monotonic() + self._seconds
        while True:
            message = self._message(end)
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QemuRefused(f"QEMU refuses {command}: {str(message['error'].get('desc', ''))[:500]}")

    def until(self, event: str, **data: tuple[Any, ...]) -> dict[str, Any]:
        """Wait for an event whose data have one of these values; events before it are forgotten. Raises QemuError."""
        return self.first(lambda found: found["event"] == event and all(found.get("data", {}).get(key) in values for key, values in data.items()))

    def first(self, wanted: Callable[[dict[str, Any]], bool], meanwhile: Callable[[], None] | None = None) -> dict[str, Any]:
        """Wait for such an event; events before it are forgotten. `meanwhile` is called again and again as long as QEMU says nothing. Raises QemuError."""
        end = time.monotonic() + self._seconds
        while True:
            while self.events:
                found = self.events.popleft()
                if wanted(found):
                    return found
            while meanwhile is not None and time.monotonic() < end and not self._speaks(MEANWHILE_S):
                meanwhile()
            self._message(end)

    def pause(self, seconds: float) -> None:
        """Until QEMU says something, at most so long. Raises QemuError where it has ended."""
        if self._speaks(seconds):
            self._message(time.monotonic() + self._seconds)

    def _speaks(self, seconds: float) -> bool:
        return b"\n" in self._waits or bool(select.select([self._socket], [], [], seconds)[0])

    def _message(self, end: float) -> dict[str, Any]:
        while b"\n" not in self._waits:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._socket], [], [], left)[0]:
                raise QemuError(f"QEMU said nothing for {self._seconds:g} s")
            try:
                data = self._socket.recv(1 << 16)
            except OSError as error:
                raise QemuError(f"QEMU has ended ({error.strerror or error})") from None
            if not data or len(self._waits) + len(data) > LINE_MOST:
                raise QemuError("QEMU has ended" if not data else "QEMU says too much")
            self._waits += data
        raw, _, self._waits = self._waits.partition(b"\n")
        try:
            message = json.loads(raw)
        except ValueError:
            raise QemuError("QEMU says what is no JSON") from None
        if not isinstance(message, dict):
            raise QemuError("QEMU says what is no object")
        if "event" in message:
            self.events.append(message)
        return message

    def close(self) -> None:
        """QEMU stays."""
        self._socket.close()


def at(event: dict[str, Any]) -> float:
    """When an event was, seconds since 1970 by QEMU's clock."""
    stamp = event["timestamp"]
    return float(stamp["seconds"]) + float(stamp["microseconds"]) / 1e6
