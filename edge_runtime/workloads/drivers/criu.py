"""CRIU on this host: which one there is, how it is told what to do, and what its log says stood against a checkpoint."""

import os
import re
import subprocess
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from .face import Refused

LEAST = (4, 2)
"""Version from which on it runs with kernels from 6.13 on (criu#2532: the vDSO) and dumps TCP connections there (SO_PASSCRED)."""

VERSION_S = 10.0
"""A CRIU that does not tell its version within this is taken as absent."""

GHOST_LIMIT = 256 << 20
"""Bytes of a file that was deleted and is still open: it goes with the state. CRIU's own limit is 1 MiB."""

MOST_LOG = 4 << 20
"""Bytes that are read of a log, from its end."""

_OPTIONS = f"network-lock nftables\nghost-limit {GHOST_LIMIT}\n"
"""For both ways. nftables: iptables are not everywhere, and CRIU carries the library for these with it. What the runtime has an option for is given to it: it overrides what stands here."""


@dataclass(frozen=True, slots=True)
class Criu:
    """A CRIU that can be used.

    Attributes:
        folder: where it is; the runtime takes the first `criu` on its PATH.
        version: as it says.
    """

    folder: str
    version: str

    def environment(self, options: Path) -> dict[str, str]:
        """A runtime's environment, by which it uses this one, with our options."""
        return {**os.environ, "PATH": os.pathsep.join((self.folder, os.environ.get("PATH", os.defpath))), "CRIU_CONFIG_FILE": str(options)}


def find(path: str | None) -> Criu | str:
    """The CRIU at `path`, or why there is none that can be used. Blocks."""
    if path is None or os.path.basename(path) != "criu" or not os.access(path, os.X_OK):
        return "CRIU is not installed (version 4.2 or later; Debian unstable has it. A program called `criu` on PATH, or where workloads.criu says)"
    try:
        said = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=VERSION_S).stdout
    except (OSError, subprocess.SubprocessError) as error:
        return f"CRIU does not run: {error}"
    found = re.search(r"^Version: ([0-9]+(?:\.[0-9]+)*)", said, re.MULTILINE)
    if found is None:
        return f"{path} does not tell a version of CRIU"
    version = found.group(1)
    if tuple(int(one) for one in version.split(".")) < LEAST:
        return f"CRIU is {version}; 4.2 is the first that runs with this kernel and dumps TCP connections under it"
    return Criu(os.path.dirname(path), version)


def write_options(path: Path, *, stopped: bool, group: str = "") -> None:
    """The file of options.

    Args:
        stopped: what is restored does not run before somebody lets it.
        group: the control group of version 2 that it comes into. Of version 1 the runtime tells CRIU; of version 2 runc does not, and all would be put into the group that it was in when its state was taken.
    """
    path.write_text(_OPTIONS + ("leave-stopped\n" if stopped else "") + (f"cgroup-root {group}\n" if group else ""))


def log_of(path: Path) -> str:
    """The end of a log; empty where there is none."""
    try:
        with open(path, "rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - MOST_LOG))
            return handle.read().decode("utf-8", "replace")
    except OSError:
        return ""


def errors(log: str) -> list[str]:
    """What it says went wrong, in order, without what it says every time in a process that may not raise its own limits."""
    return [line.partition("): ")[2] or line for line in log.splitlines() if "Error (" in line and "RLIMIT_NOFILE" not in line]


_OFFENCES = (
    (r"Dangling connection|External socket is used|Can't dump half of stream unix connection|Unix socket \w+ without peer", "unix socket", "a Unix socket is connected to a process outside of the container", "close that connection, or have the other side run in the container"),
    (r"In-flight connection", "tcp", "a TCP connection is being set up", "take the checkpoint again"),
    (r"Unsupported proto (\d+) for socket", "socket", "a process has a socket of protocol {0}, which cannot be carried over", "have the program use TCP, UDP or Unix sockets"),
    (r"Unknown socket collected \(family (\d+)|Unsupported socket|Unsupported (.*) socket", "socket", "a process has a socket of a kind that cannot be carried over", "have the program use TCP, UDP or Unix sockets"),
    (r"Can't lookup mount=\d+ for fd=(-?\d+) path=(\S*)", "descriptor", "a process has descriptor {0} ({1}) on no file system of the container's own: a message queue, secret memory, or a file that was handed in from outside", "have the program close it"),
    (r"Can't dump file (\d+) of that type \[\d+\] \(([^)]*)\)", "descriptor", "a process has descriptor {0} ({1}), which cannot be carried over", "have the program close it"),
    (r"Can't dump ghost file (\S*) of (\d+) size", "deleted file", "the file {0} was deleted, is still open, and has {1} bytes", "have the program close it"),
    (r"Can't create link remap", "deleted file", "a process has a file open by a name that was deleted while the file has another name", "have the program close it"),
    (r"tty: .*", "terminal", "a process has a terminal whose other end is not in the container", "start the program without a terminal"),
    (r"mnt: .*", "mount", "a mount of the container cannot be carried over", "leave it out of spec.mounts"),
)
"""What CRIU says (a pattern), the field, the problem and the remedy; the first that fits counts."""


def offence(log: str, processes: Mapping[int, str]) -> Refused | None:
    """What in a container stood against its checkpoint, by CRIU's log; None where the log says nothing that is known.

    Args:
        processes: names by pid on the host.
    """
    said = errors(log)
    text = "\n".join(said)
    for pattern, field, problem, remedy in _OFFENCES:
        found = re.search(pattern, text)
        if found is None:
            continue
        return Refused(f"resource.{field}", f"{problem.format(*found.groups())}{_whose(log, processes)}; CRIU says: {found.group(0).strip()[:200]}", remedy)
    return None


def _whose(log: str, processes: Mapping[int, str]) -> str:
    """The process that was at hand at the first error, where the log tells: it names each before it looks at what it has."""
    at, last = log.find("Error ("), ""
    while at >= 0 and "RLIMIT_NOFILE" in log[at:log.find("\n", at) + 1]:
        at = log.find("Error (", at + 1)
    for found in re.finditer(r"Dumping task \(pid: (\d+)|Dumping opened files \(pid: (\d+)\)", log[:at]):
        last = found.group(1) or found.group(2)
    return f" (process {processes[int(last)]})" if last and int(last) in processes else ""
