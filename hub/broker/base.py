"""What a broker is to the hub: an address, what it can do, an end."""

from typing import Protocol


class BrokerError(RuntimeError):
    """A broker that cannot be had: `field`, `problem`, `remedy`."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy


class Broker(Protocol):
    """A running broker."""

    kind: str
    host: str
    port: int
    tls: bool
    username: str
    password: str
    mqtt5: bool
    restarts: int

    async def close(self) -> None:
        """End it, where it is ours."""


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")
