"""What stands beside a container that containerd's shim owns: keeps what it writes, connects it to the network, watches its lease. Run as a script, as `keeper` is.

    python -I -S containerd_keeper.py SOCKET_DESCRIPTOR [CONTROL_GROUP_FOLDER...]

The shim is the parent of the container and knows how it ends; the keeper reads the named pipes that the shim writes to, so one that is killed loses nothing but the network: the agent starts it again, and
the container has waited at most where it wrote more than a pipe holds. For a container that does not run yet it mounts the layers, with their owners mapped, until containerd has put them together: the layers of
an overlay need no mount of their own once that is mounted, so no mount of ours is left.

With the folder comes a socket. The keeper says `laid` when layers and pipes are there; it is told the container's first process, writes `running.json` (nothing of the container has run before that), connects
the network and answers `{}`, or what was the matter. Where the socket is closed instead, all is undone. `lapsed.json` is there where the lease has ended the container.
"""

import json
import os
import signal
import socket
import sys
import time

if __package__:
    from .keeper import mount_layers, watch
    from .keeper_network import Network
    from .keeping import SAID, Lapsed, Log, Taken, Trouble, lease_s, libc, memory_kills, serve, started_ticks, tell, write
else:  # run as a script: its neighbours, without the package, which would load the agent
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from keeper import mount_layers, watch  # type: ignore[import-not-found,no-redef]
    from keeper_network import Network  # type: ignore[import-not-found,no-redef]
    from keeping import SAID, Lapsed, Log, Taken, Trouble, lease_s, libc, memory_kills, serve, started_ticks, tell, write  # type: ignore[import-not-found,no-redef]

MOUNT_ATTR_RDONLY = 1
MNT_DETACH = 2

STREAMS = ("stdout", "stderr")

TOLD = 1024
"""Bytes of what the agent says."""


def unmount_layers(top: str) -> None:
    """Take the layers' mounts away, and their folder; what is not there is away already."""
    try:
        names = os.listdir(top)
    except OSError:
        return
    for name in names:
        path = os.path.join(top, name)
        while libc.umount2(os.fsencode(path), MNT_DETACH) == 0:
            pass  # a try that was killed may have left one below another
        try:
            os.rmdir(path)
        except OSError:
            pass  # a mount still: the folder stays with it
    try:
        os.rmdir(top)
    except OSError:
        pass


def pipe_of(folder: str, stream: str) -> str:
    """The named pipe of a stream, in an instance's folder."""
    return os.path.join(folder, f"{stream}.pipe")


def opened(folder: str) -> dict:  # type: ignore[type-arg]
    """The reading ends, without waiting for the other one, by stream."""
    found = {}
    for stream in STREAMS:
        found[stream] = os.open(pipe_of(folder, stream), os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
        os.set_blocking(found[stream], True)
    return found


def keep(told: dict, line: socket.socket) -> None:  # type: ignore[type-arg]
    """From before the container is made, or from wherever another keeper was killed, until its end."""
    folder, runs = told["folder"], os.path.join(told["folder"], "running.json")
    again = os.path.exists(runs)
    try:
        if not again:
            unmount_layers(told["layers"])
            mount_layers(told, told["layers"], MOUNT_ATTR_RDONLY)
        pipes = opened(folder)
        tell("laid")
        heard = line.recv(TOLD)
    finally:
        if not again:
            unmount_layers(told["layers"])
    if not heard:
        return  # the agent could not make it, or was killed
    pid = int(json.loads(heard)["pid"])
    ended = os.pidfd_open(pid)
    with open("/proc/sys/kernel/random/boot_id") as handle:
        boot = handle.read().strip()
    if again:
        with open(runs) as handle:
            before = json.load(handle)
        if (before["pid"], before["started"], before["boot"]) != (pid, started_ticks(pid), boot):
            raise Trouble("its first process is another one now")
        write(runs, before | {"keeper": os.getpid()})
    else:
        write(runs, {"pid": pid, "started": started_ticks(pid), "boot": boot, "keeper": os.getpid(), "at_ms": int(time.time() * 1000), "memory_kills": memory_kills(told)})
    if told["lease"] and lease_s(told["lease"]) <= 0:
        if again:
            write(os.path.join(folder, "lapsed.json"), {})
            signal.pidfd_send_signal(ended, signal.SIGKILL)
        raise Lapsed("its lease was over before it began")
    network = Network(told["network"], pid, folder) if told.get("network") else None
    if network is not None:
        network.start()
    line.send(b"{}")
    logs = {pipes[stream]: Log(os.path.join(folder, f"{stream}.log"), told["log_bytes"]) for stream in STREAMS}
    if watch(ended, logs, told["lease"], network, lambda: None):
        write(os.path.join(folder, "lapsed.json"), {})
    if network is not None:
        network.stop()


def live(folder: str, more: list) -> None:  # type: ignore[type-arg]
    """A keeper's life."""
    with open(os.path.join(folder, "keeper.json")) as handle:
        told = json.load(handle)
    line = socket.socket(fileno=more[0])
    try:
        keep(told, line)
    except (Trouble, OSError, ValueError, KeyError) as error:
        print(str(error)[:SAID], file=sys.stderr)
        try:
            line.send(json.dumps({"failed": str(error)[:SAID], "taken": isinstance(error, Taken), "lapsed": isinstance(error, Lapsed)}).encode())
        except OSError:
            pass  # the agent has gone


if __name__ == "__main__":
    sys.exit(serve(live, int(sys.argv[1]), sys.argv[2:], more=1))
