"""QEMU's own protocol (QMP) over a socket, blocking, one command at a time. For the keeper too, which imports nothing else of ours."""

import json
import select
import socket
import time

MAX_LINE = 1 << 20
"""Bytes of one answer; the longest that we ask for has a few hundred."""


class QmpError(Exception):
    """QEMU refused, or said nothing in time."""


class Qmp:
    """A connection; `seconds` is how long each answer may take."""

    def __init__(self, line: socket.socket, seconds: float) -> None:
        self._line, self._seconds, self._waits, self._asked = line, seconds, b"", 0
        self.events: list = []  # type: ignore[type-arg]
        """Names (and data) of what has happened meanwhile; the newest hundred."""

    def begin(self) -> None:
        """Wait for its greeting and leave the negotiation."""
        self._message(time.monotonic() + self._seconds)
        self.ask("qmp_capabilities")

    def ask(self, command: str, **arguments: object) -> object:
        """One command; returns its answer. Raises `QmpError`."""
        return self._answered(command, arguments, ())

    def ask_with(self, descriptor: int, command: str, **arguments: object) -> object:
        """The same, with a descriptor beside it."""
        return self._answered(command, arguments, (descriptor,))

    def _answered(self, command: str, arguments: dict, descriptors: tuple) -> object:  # type: ignore[type-arg]
        self._asked += 1
        request = json.dumps({"execute": command, "id": self._asked, **({"arguments": arguments} if arguments else {})}).encode() + b"\n"
        self._line.setblocking(True)
        try:
            if descriptors:
                socket.send_fds(self._line, [request], descriptors)
            else:
                self._line.sendall(request)
        except OSError as error:
            raise QmpError(f"{command}: QEMU has ended ({error.strerror})") from None
        end = time.monotonic() + self._seconds
        while True:
            message = self._message(end)
            if message.get("id") != self._asked and ("return" in message or "error" in message):
                continue  # of one that was not answered in time
            if "return" in message:
                return message["return"]
            if "error" in message:
                raise QmpError(f"{command}: {str(message['error'])[:500]}")

    def until(self, event: str, key: str, values: tuple, seconds: float = 0.0) -> str:  # type: ignore[type-arg]
        """Wait for an event whose datum `key` is one of `values`; returns which. `seconds`: longer than an answer may take."""
        end = time.monotonic() + max(self._seconds, seconds)
        while True:
            for name, data in self.events:
                if name == event and data.get(key) in values:
                    return str(data[key])
            self._message(end)

    def until_one(self, events: tuple, key: str, value: str, seconds: float = 0.0) -> tuple:  # type: ignore[type-arg]
        """Wait for the first of several events whose datum `key` is `value`; its name and data."""
        end = time.monotonic() + max(self._seconds, seconds)
        while True:
            for name, data in self.events:
                if name in events and data.get(key) == value:
                    return name, data
            self._message(end)

    def drain(self) -> bool:
        """Read what has come, also what came together with an answer; False where QEMU has closed it."""
        while b"\n" in self._waits or select.select([self._line], [], [], 0)[0]:
            try:
                self._message(time.monotonic() + self._seconds)
            except QmpError:
                return False
        return True

    def _message(self, end: float) -> dict:  # type: ignore[type-arg]
        while b"\n" not in self._waits:
            left = end - time.monotonic()
            if left <= 0 or not select.select([self._line], [], [], left)[0]:
                raise QmpError(f"QEMU said nothing for {self._seconds:g} s")
            try:
                data = self._line.recv(65_536)
            except OSError as error:
                raise QmpError(f"QEMU has ended ({error.strerror})") from None
            if not data or len(self._waits) + len(data) > MAX_LINE:
                raise QmpError("QEMU has ended" if not data else "QEMU says too much")
            self._waits += data
        raw, _, self._waits = self._waits.partition(b"\n")
        try:
            message = json.loads(raw)
        except ValueError:
            raise QmpError("QEMU says what is no JSON") from None
        if not isinstance(message, dict):
            raise QmpError("QEMU says what is no object")
        if "event" in message:
            self.events = [*self.events[-99:], (message["event"], message.get("data", {}))]
        return message
