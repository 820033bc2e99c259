"""A link of a given bandwidth on one machine: two network namespaces, a pair of virtual interfaces between them, a token bucket on the way out, and the kernel's count of what went over it.

A link that is faster than what this machine's processors carry between two namespaces cannot be shaped: it is left as it is, and says so. Needs root, iproute2 and util-linux.
"""

import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from .harness import die_with_parent, stop
from .migration_guest import Missing

_NAME = "move0"
"""The interface's name, in both namespaces."""
_ADDRESSES = ("10.97.0.1", "10.97.0.2")
"""Source and target: nobody outside the two namespaces sees them."""
BURST_S = 0.0005
"""What the token bucket lets through at once, as time of the link: a few of the 64 KiB packets that virtual interfaces pass at 10 Gbit/s."""
QUEUE_S = 0.02
"""What waits before the bucket at the most, as time of the link: more is dropped, as by a switch with deep buffers."""
SHAPED_BELOW = 0.8
"""A link is shaped where it has at most this share of what the machine carries without: nearer, the processors hold a move up and not the link."""
PROBES = 3
"""How often the machine is asked what it carries; the most counts."""
PROBE_S = 0.5
"""Seconds of sending from which what a link carries is known."""
_LISTEN_S = 60.0
"""A server listens within that, and ends within that once it is done: a bound for a machine that does much else."""

_SINK = """
import socket
listener = socket.create_server(("", 0))
print(listener.getsockname()[1], flush=True)
connection, _ = listener.accept()
room = bytearray(1 << 20)
while connection.recv_into(room):
    pass
"""
_SOURCE = """
import socket, sys, time
connection, data = socket.create_connection((sys.argv[1], int(sys.argv[2]))), bytes(1 << 20)
end = time.monotonic() + float(sys.argv[3])
while time.monotonic() < end:
    connection.sendall(data)
"""


def _ip(*words: str) -> None:
    done = subprocess.run(words, capture_output=True, text=True)
    if done.returncode:
        raise Missing(f"{' '.join(words)} failed: {done.stderr.strip()[-300:]}; links need root, iproute2 and a kernel with veth and tbf")


def inside(pid: int) -> tuple[str, ...]:
    """What a command in that process's network namespace begins with."""
    return ("nsenter", "-t", str(pid), "-n")


@contextmanager
def namespace() -> Iterator[int]:
    """A network namespace with loopback up; the pid of what holds it."""
    holder = subprocess.Popen(
        ["unshare", "-n", "sh", "-c", "ip link set lo up && echo up && exec sleep 100000"], preexec_fn=die_with_parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    try:
        assert holder.stdout is not None
        if holder.stdout.readline().strip() != "up":
            raise Missing("no network namespace can be made: run it as root, with iproute2 and util-linux installed")
        yield holder.pid
    finally:
        stop(holder)


def passed(pid: int, interface: str = "lo") -> int:
    """Bytes that went over an interface in the namespace of a process: over loopback, once; over another, both ways."""
    for line in Path(f"/proc/{pid}/net/dev").read_text().splitlines():
        name, _, rest = line.partition(":")
        if name.strip() == interface:
            counts = rest.split()
            return int(counts[0]) + (int(counts[8]) if interface != "lo" else 0)
    return 0


@dataclass(frozen=True, slots=True)
class Carried:
    """What a link is asked for and what it carries, Gbit/s."""

    gbit: float
    shaped: bool
    probe_gbit: float
    """Of bytes without any work, as the interface counts them."""
    why: str


class Link:
    """Between two namespaces, by the pids that hold them; `address` is the target's."""

    def __init__(self, source: int, target: int) -> None:
        self.source, self.target, self.address = source, target, _ADDRESSES[1]
        _ip("ip", "link", "add", _NAME, "netns", str(source), "type", "veth", "peer", "name", _NAME, "netns", str(target))
        for pid, address in zip((source, target), _ADDRESSES, strict=True):
            _ip(*inside(pid), "ip", "address", "add", f"{address}/30", "dev", _NAME)
            _ip(*inside(pid), "ip", "link", "set", _NAME, "up")
        self._shaped = False
        self._free = max(self.probe() for _ in range(PROBES))  # of a machine that does something else meanwhile, what it can

    def passed(self) -> int:
        """Bytes since it was made, both ways, headers and acknowledgements too."""
        return passed(self.source, _NAME)

    def probe(self) -> float:
        """Gbit/s that it carries now."""
        with server(self.target, [sys.executable, "-S", "-c", _SINK]) as port:
            before, began = self.passed(), time.monotonic()
            subprocess.run([*inside(self.source), sys.executable, "-S", "-c", _SOURCE, self.address, str(port), str(PROBE_S)], check=True, timeout=_LISTEN_S)
            # The interpreter's start is in it: a little less than it carries, which is the safe side for SHAPED_BELOW.
            return (self.passed() - before) * 8 / (time.monotonic() - began) / 1e9

    def set(self, gbit: float) -> Carried:
        """Make it a link of that bandwidth, as far as this machine can."""
        if self._shaped:
            _ip(*inside(self.source), "tc", "qdisc", "del", "dev", _NAME, "root")
            self._shaped = False
        if gbit > SHAPED_BELOW * self._free:
            why = f"this machine carries {self._free:.1f} Gbit/s between two namespaces: its processors hold a move up before a link of {gbit:g} would, so that it is left as it is"
            return Carried(gbit, False, round(self._free, 2), why)
        size = gbit * 1e9 / 8
        _ip(
            *inside(self.source), "tc", "qdisc", "add", "dev", _NAME, "root", "tbf", "rate", f"{int(gbit * 1000)}mbit", "burst", str(int(max(size * BURST_S, 128 << 10))),
            "limit", str(int(size * QUEUE_S)),
        )
        self._shaped = True
        return Carried(gbit, True, round(self.probe(), 2), "")


@contextmanager
def link() -> Iterator[Link]:
    """Raises Missing where there can be none."""
    with namespace() as source, namespace() as target:
        yield Link(source, target)


@contextmanager
def server(pid: int, command: list[str]) -> Iterator[int]:
    """A server in a namespace that says on its first line at which port it listens; awaited at the end, which raises Missing where it failed."""
    process = subprocess.Popen([*inside(pid), *command], preexec_fn=die_with_parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    late = threading.Timer(_LISTEN_S, process.kill)
    late.start()
    try:
        assert process.stdout is not None
        line = process.stdout.readline()
        late.cancel()
        if not line.strip().isdigit():
            raise Missing(f"{command[0]} does not listen: {(process.stderr.read() if process.stderr else '').strip()[-300:]}")
        yield int(line)
        if process.wait(_LISTEN_S):
            raise Missing(f"{command[0]} failed: {(process.stderr.read() if process.stderr else '').strip()[-300:]}")
    finally:
        late.cancel()
        stop(process)


def wait_until_it_listens(pid: int, port: int) -> None:
    """For a server that says nothing: the kernel's table of the namespace does. Raises TimeoutError."""
    end = time.monotonic() + _LISTEN_S
    while time.monotonic() < end:
        for table in ("tcp", "tcp6"):
            rows = [line.split() for line in Path(f"/proc/{pid}/net/{table}").read_text().splitlines()[1:]]
            if any(row[1].endswith(f":{port:04X}") and row[3] == "0A" for row in rows):
                return
        time.sleep(0.02)
    raise TimeoutError(f"nothing listens on port {port}")
