"""systemd: readiness, status and watchdog over NOTIFY_SOCKET (sd_notify(3)); nothing where it is not set."""

import os
import socket
from collections.abc import Mapping

STARTING_TIMES = 10
"""While it comes up a program may be silent for so many times as long: the modules of the interface hold the interpreter on a slow machine, and a start that is cut off in the middle begins again, for ever."""


class ServiceManager:
    """The manager that started us, if any.

    Args:
        environment: where NOTIFY_SOCKET and WATCHDOG_USEC are looked up.
    """

    def __init__(self, environment: Mapping[str, str] = os.environ) -> None:
        self._address = environment.get("NOTIFY_SOCKET", "")
        pid = environment.get("WATCHDOG_PID", "")
        microseconds = environment.get("WATCHDOG_USEC", "")
        ours = not pid or pid == str(os.getpid())
        self.watchdog_s = int(microseconds) / 1e6 if ours and microseconds.isdecimal() else 0.0
        """Seconds within which a sign of life is expected, 0 for none."""

    def ready(self, status: str) -> None:
        """It does its work; what is loaded beside that may take long."""
        self.notify(READY="1", STATUS=status, **self._silence(STARTING_TIMES))

    def settled(self) -> None:
        """All is up: the watchdog is as it was set."""
        if self.watchdog_s:
            self.notify(WATCHDOG="1", **self._silence(1))

    def _silence(self, times: int) -> dict[str, str]:
        return {"WATCHDOG_USEC": str(int(self.watchdog_s * 1e6) * times)} if self.watchdog_s else {}

    def notify(self, **fields: str) -> bool:
        """Send `READY=1`, `STATUS=...`, `WATCHDOG=1`, `STOPPING=1`; False where nobody listens."""
        if not self._address:
            return False
        address = "\0" + self._address[1:] if self._address.startswith("@") else self._address
        # A value may hold words from outside (a refused document): one line each, and always encodable.
        message = "\n".join(f"{name}={' '.join(value.splitlines())}" for name, value in fields.items())
        try:
            with socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM | socket.SOCK_CLOEXEC) as sock:
                sock.settimeout(1)
                sock.sendto(message.encode(errors="replace"), address)
        except OSError:
            return False
        return True
