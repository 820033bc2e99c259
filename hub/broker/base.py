"""What a broker is to the hub: an address, what it can do, an end."""

from dataclasses import dataclass
from typing import Protocol


class BrokerError(RuntimeError):
    """A broker that cannot be had: `field`, `problem`, `remedy`."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field = field
        self.problem = problem
        self.remedy = remedy


@dataclass(frozen=True, slots=True)
class Door:
    """What stands at the door of a broker of ours that edges reach over a network. Names of files.

    Attributes:
        password_file: mosquitto's: who may come in by name and password.
        cert_file, key_file: what it shows (PEM); empty: it speaks without TLS.
        client_ca_file: by whose certificates edges come in (PEM); the common name is the edge's, and it has that edge's topics alone. Instead of passwords.
    """

    password_file: str = ""
    cert_file: str = ""
    key_file: str = ""
    client_ca_file: str = ""

    @property
    def guards(self) -> bool:
        """Whether it is known who comes in."""
        return bool(self.password_file or self.client_ca_file)


class Broker(Protocol):
    """A running broker. `host`, `port`: where edges reach it; `inside`: where the hub does, which there speaks TLS where `tls` is, and trusts `ca_file` (empty: the system's authorities)."""

    kind: str
    host: str
    port: int
    tls: bool
    ca_file: str
    username: str
    password: str
    mqtt5: bool
    restarts: int

    @property
    def inside(self) -> tuple[str, int]:
        """Host and port at which the hub reaches it."""

    async def close(self) -> None:
        """End it, where it is ours."""


def authority(host: str, port: int) -> str:
    """As it stands in a URL: an IPv6 address in brackets (RFC 3986, 3.2.2)."""
    return f"[{host}]:{port}" if ":" in host else f"{host}:{port}"


def is_loopback(host: str) -> bool:
    """Whether only this machine can reach `host`."""
    return host in ("localhost", "::1") or host.startswith("127.")
