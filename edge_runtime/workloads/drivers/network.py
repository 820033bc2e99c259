"""The network of a container: loopback alone, or, where `spec.network` is there, the node's by slirp4netns: a process for each container that carries its connections as its own.

Nothing of the host changes: no bridge, no address translation, no rule of a firewall, no forwarding. What a container sends leaves the node as if a program of the node's had sent it. Pure.
(pasta as Debian 12 has it sends data twice where a connection is half closed, and takes twenty times the memory.)

    network    {"ports": [{"port": 80, "host_port": 8080, "address": "127.0.0.1", "protocol": "tcp"}]}, all but port optional; {} is a network without published ports
"""

import ipaddress
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from .face import Refused

PROGRAM = "slirp4netns"

ADDRESS, GATEWAY, RESOLVER = "10.0.2.100", "10.0.2.2", "10.0.2.3"
"""What each container sees: its own address, its gateway, the resolver. The program's own defaults, the same in all containers: nobody else sees these."""

MTU = 65_520
"""Bytes of a packet between container and program: the most it takes, as each costs it a system call."""

MAX_PORTS = 32
"""Published ports of a container: each is a socket that is open on the node."""


@dataclass(frozen=True, slots=True)
class Port:
    """Where on the node connections to a port of the container are taken."""

    address: str
    host_port: int
    port: int
    protocol: str


@dataclass(frozen=True, slots=True)
class Network:
    """What `spec.network` says."""

    ports: tuple[Port, ...]


def network(told: Any, publish: Sequence[str]) -> Network | None:
    """`spec.network`, None where it is not there. `publish`: addresses of the node on which ports may be published; the first one where nothing is said. Raises `Refused`."""
    if told is None:
        return None
    field = "spec.network"
    if not isinstance(told, Mapping) or (odd := sorted(map(str, set(told) - {"ports"}))):
        raise Refused(field if not isinstance(told, Mapping) else f"{field}.{odd[0][:40]}", "is not known", "give {} or {\"ports\": [{\"port\": 80, \"host_port\": 8080}]}")
    listed = told.get("ports", [])
    if not isinstance(listed, list) or len(listed) > MAX_PORTS:
        raise Refused(f"{field}.ports", f"is not a list of up to {MAX_PORTS} ports", "publish fewer")
    ports = tuple(_port(one, f"{field}.ports[{at}]", publish) for at, one in enumerate(listed))
    for at, one in enumerate(ports):
        for before in ports[:at]:
            if (one.protocol, one.host_port) == (before.protocol, before.host_port) and (one.address == before.address or "0.0.0.0" in (one.address, before.address)):
                raise Refused(f"{field}.ports[{at}].host_port", f"{one.host_port} is published twice", "give each one of its own")
    return Network(ports)


def _port(told: Any, field: str, publish: Sequence[str]) -> Port:
    known = ("address", "host_port", "port", "protocol")
    if not isinstance(told, Mapping) or not set(told) <= set(known):
        raise Refused(field, f"is no object of {', '.join(known)}", "see what a container's spec has")
    protocol = told.get("protocol", "tcp")
    if protocol not in ("tcp", "udp"):
        raise Refused(f"{field}.protocol", f"{str(protocol)[:40]!r} is neither tcp nor udp", "say tcp or udp")
    port = _number(told.get("port"), f"{field}.port")
    if not publish:
        raise Refused(f"{field}", "this node lets no container publish a port", "have the node's operator name an address in workloads.publish, or place it elsewhere")
    address = told.get("address", publish[0])
    if not isinstance(address, str) or not _allowed(address, publish):
        raise Refused(f"{field}.address", f"{str(address)[:60]!r} is none of those on which this node publishes: {', '.join(publish)}", "use one of these, or have the node's operator allow it")
    return Port(address, _number(told.get("host_port", port), f"{field}.host_port"), port, protocol)


def _number(value: Any, field: str) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or not 1 <= value <= 65_535:
        raise Refused(field, f"{str(value)[:40]!r} is no port", "give a number from 1 to 65535")
    return value


def _allowed(address: str, publish: Sequence[str]) -> bool:
    """An IPv4 address as it is listed, or any where 0.0.0.0 is."""
    try:
        return str(ipaddress.IPv4Address(address)) == address and (address in publish or "0.0.0.0" in publish)
    except ValueError:
        return False


def connection(program: str, wanted: Network, userns: bool) -> dict[str, Any]:
    """What a keeper has to know to connect a container: a command with places for the container's pid and three of the keeper's own (see `keeper`), and requests for ports.

    The program drops all rights but that to low ports, and goes into an empty folder and a seccomp filter of its own. Programs on the node's loopback are out of its reach.
    """
    words = [program, "--configure", f"--mtu={MTU}", "--disable-host-loopback", "--enable-sandbox", "--enable-seccomp", "--ready-fd=READY", "--exit-fd=EXIT", "--api-socket=SOCKET", "--netns-type=path"]
    ports = [
        {"execute": "add_hostfwd", "arguments": {"proto": one.protocol, "host_addr": one.address, "host_port": one.host_port, "guest_addr": ADDRESS, "guest_port": one.port}} for one in wanted.ports
    ]
    return {"command": [*words, *(["--userns-path=/proc/PID/ns/user"] if userns else []), "/proc/PID/ns/net", "eth0"], "ports": ports}


def resolv_conf() -> str:
    """/etc/resolv.conf of a container."""
    return f"nameserver {RESOLVER}\n"


def hosts(hostname: str) -> str:
    """/etc/hosts of a container."""
    return f"127.0.0.1 localhost\n::1 localhost\n{ADDRESS} {hostname}\n"
