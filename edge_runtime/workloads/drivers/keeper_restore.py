"""How a container's keeper brings it back from a checkpoint, and what it looks at of processes. Nothing of ours is imported but what stands beside it. As a script:

    python -I -S keeper_restore.py loopback               the hook of a restore: the state of a container on stdin
    python -I -S keeper_restore.py remount PID ro|rw      makes the root of a container's mount namespace read-only, or not
"""

import fcntl
import json
import os
import signal
import socket
import struct
import sys
from collections.abc import Callable

if __package__:
    from .keeping import SAID, Trouble, check, libc
else:  # as a script, or of one: its neighbours, without the package, which would load the agent
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from keeping import SAID, Trouble, check, libc  # type: ignore[import-not-found,no-redef]

CLONE_NEWNS, CLONE_NEWNET = 0x0002_0000, 0x4000_0000
SIOCGIFFLAGS, SIOCSIFFLAGS, IFF_UP = 0x8913, 0x8914, 1
MS_BIND = 0x1000
AT_FDCWD = -100
MOUNT_SETATTR = 442
"""Number of the call: the same on all architectures."""
MOUNT_ATTR_RDONLY = 1


def processes(group: str) -> dict:  # type: ignore[type-arg]
    """By pid on the host, what a control group has (the file of its processes): pid in the innermost namespace, name, threads, descriptors, whether a signal has stopped it. Without those that have ended."""
    found = {}
    with open(group) as handle:
        pids = [int(line) for line in handle]
    for pid in pids:
        try:
            told = status(pid)
            state = told["State"][:1]
            if state not in ("Z", "X"):
                found[pid] = {"pid": int(told["NSpid"].split()[-1]), "name": told["Name"], "threads": int(told["Threads"]), "descriptors": len(os.listdir(f"/proc/{pid}/fd")), "stopped": state in ("T", "t")}
        except (FileNotFoundError, ProcessLookupError):
            continue
    return found


def status(pid: int) -> dict:  # type: ignore[type-arg]
    """What /proc/PID/status says."""
    with open(f"/proc/{pid}/status", errors="replace") as handle:
        return {key: value.strip() for key, _, value in (line.partition(":") for line in handle)}


def parent(pid: int) -> int:
    """The parent's pid; 0 where the process is gone."""
    try:
        return int(status(pid)["PPid"])
    except (OSError, KeyError):
        return 0


def switches(pid: int) -> int:
    """How often the first thread of a process has left the processor: this grows only where it got it."""
    told = status(pid)
    return int(told["voluntary_ctxt_switches"]) + int(told["nonvoluntary_ctxt_switches"])


def restore(runtime: Callable[..., None], told: dict, again: dict, out: int, err: int, seconds: float) -> None:  # type: ignore[type-arg]
    """Bring back what a checkpoint has, by a command of the runtime that may take `seconds` and what the state's size adds; all of it is stopped when this returns.

    CRIU mounts a folder of the node as the container's root user, who may not be allowed to go through the folders above it: so they are mounted where he may, in our own mount namespace, first.
    """
    for source, place in again["binds"]:
        if os.path.isdir(source):
            os.makedirs(place, exist_ok=True)
        else:
            os.makedirs(os.path.dirname(place), exist_ok=True)
            os.close(os.open(place, os.O_CREAT | os.O_RDONLY | os.O_CLOEXEC, 0o644))
        above = os.path.dirname(place)
        for folder in (above, os.path.dirname(above)):
            os.chmod(folder, os.stat(folder).st_mode & 0o7777 | 0o111)  # whatever the umask of who made it
        check(libc.mount(os.fsencode(source), os.fsencode(place), None, MS_BIND, None), f"mounting {source}")
    path = os.pathsep.join((again["criu"], os.environ.get("PATH", os.defpath)))
    try:
        runtime(
            told, "restore", "--detach", "--tcp-established", "--file-locks", "--image-path", again["images"], "--work-path", again["work"], "--bundle", told["folder"], "--pid-file", os.path.join(told["folder"], "pid"), told["name"],
            out=out, err=err, more={"PATH": path, "CRIU_CONFIG_FILE": again["config"]}, seconds=seconds + again["more_s"],
        )
    except Trouble as error:
        raise Trouble(f"{error}{complaint(os.path.join(again['work'], 'restore.log'))}") from None


def complaint(log: str) -> str:
    """What CRIU says of a failure, to be put behind something."""
    try:
        with open(log, "rb") as handle:
            handle.seek(max(0, os.fstat(handle.fileno()).st_size - (1 << 18)))
            lines = [line.decode("utf-8", "replace") for line in handle.read().splitlines() if b"Error (" in line and b"RLIMIT_NOFILE" not in line]
    except OSError:
        return ""
    return f"; CRIU says: {' | '.join(lines[:4])}"[:SAID // 2] if lines else ""


def compare(again: dict, first: int) -> list:  # type: ignore[type-arg]
    """Hold what was restored, and stands still, against what the checkpoint had; returns the pids on the host. Ends all of it where they differ, or its root cannot be as it was."""
    found = processes(again["group"])
    keys = ("pid", "threads", "descriptors")
    have, want = (sorted(tuple(one[key] for key in keys) for one in those) for those in (found.values(), again["processes"]))
    if have != want:
        os.kill(first, signal.SIGKILL)
        raise Trouble(f"what was restored is not what was there: of (pid, threads, descriptors) it has {[one for one in have if one not in want]} in place of {[one for one in want if one not in have]}"[:SAID])
    if again["read_only"]:
        try:
            remount(first, True)
        except Trouble:
            os.kill(first, signal.SIGKILL)
            raise
    return list(found)


def remount(pid: int, read_only: bool) -> None:
    """Make the root of a process' mount namespace read-only, or not: CRIU makes a folder in it for a moment, so a state is taken of one that can be written. In a process of its own."""
    child = os.fork()
    if child == 0:
        code = 1
        try:
            check(libc.setns(os.open(f"/proc/{pid}/ns/mnt", os.O_RDONLY | os.O_CLOEXEC), CLONE_NEWNS), "entering the mount namespace")
            attributes = struct.pack("QQQQ", MOUNT_ATTR_RDONLY * read_only, MOUNT_ATTR_RDONLY * (not read_only), 0, 0)
            check(libc.syscall(MOUNT_SETATTR, AT_FDCWD, b"/", 0, attributes, len(attributes)), "mounting the root again")
            code = 0
        finally:
            os._exit(code)
    if os.waitpid(child, 0)[1]:
        raise Trouble(f"its root could not be made {'read-only' if read_only else 'writable'}")


def loopback() -> int:
    """Bring up the loopback interface in the network namespace of the container whose state comes on stdin: a runtime does that at a start only."""
    pid = int(json.load(sys.stdin)["pid"])
    namespace = os.open(f"/proc/{pid}/ns/net", os.O_RDONLY | os.O_CLOEXEC)
    check(libc.setns(namespace, CLONE_NEWNET), "entering the network namespace")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
        asked = struct.pack("16sH14x", b"lo", 0)
        flags = struct.unpack("16sH14x", fcntl.ioctl(line, SIOCGIFFLAGS, asked))[1]
        fcntl.ioctl(line, SIOCSIFFLAGS, struct.pack("16sH14x", b"lo", flags | IFF_UP))
    return 0


def main() -> int:
    """A hook, or what the agent asks."""
    if sys.argv[1:] == ["loopback"]:
        return loopback()
    remount(int(sys.argv[2]), sys.argv[3] == "ro")
    return 0


if __name__ == "__main__":
    sys.exit(main())
