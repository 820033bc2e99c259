"""What stands between the agent and one container: a small process of its own that outlives the agent. Run as a script, with nothing of ours imported but what stands beside it.

    python -I -S keeper.py SOCKET_DESCRIPTOR [CONTROL_GROUP_FOLDER...]

That is the server (see `keeping`), which forks a keeper for each folder that it is sent.

A keeper mounts the container's root in a mount namespace of its own, has the runtime start it, keeps what it writes, waits for its end and writes that down. Its mounts go with it, whoever is
killed. It holds a lock on `FOLDER/lock` for as long as it lives: that is how the agent, this one or the next, knows that it is there. What it is told stands in `FOLDER/keeper.json`, what
it did in (where `keeper.json` names a lease, it ends the container when that is over, whether or not there is an agent):

    running.json    pid, start and boot of the container's first process, pid of the keeper: written before the container's program starts
    exit.json       how it ended (or that it could not be started, and what the runtime said)
    stdout.log, stdout.log.1, stderr.log, stderr.log.1    the end of what it wrote, each pair within `log_bytes`

Where `keeper.json` has `restore`, the container goes on from a checkpoint instead (`keeper_restore`). All of it stands still then until it was held against what the checkpoint had, and
`running.json` is there: as with a start, nothing of it has run where that file is not.

The first word that it says is `running` or `ended`: then the file is there.
"""

import json
import os
import select
import selectors
import signal
import struct
import subprocess
import sys
import time
from collections.abc import Callable

if __package__:
    from . import outside
    from .keeper_network import Network
    from .keeper_restore import compare, restore, switches
    from .keeping import DRAIN_S, LOOK_S, SAID, Lapsed, Log, Taken, Trouble, check, for_memory, lease_s, libc, memory_kills, serve, started_ticks, tell, write, write_end
else:  # run as a script: its neighbours, without the package, which would load the agent
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import outside  # type: ignore[import-not-found,no-redef]
    from keeper_network import Network  # type: ignore[import-not-found,no-redef]
    from keeper_restore import compare, restore, switches  # type: ignore[import-not-found,no-redef]
    from keeping import DRAIN_S, LOOK_S, SAID, Lapsed, Log, Taken, Trouble, check, for_memory, lease_s, libc, memory_kills, serve, started_ticks, tell, write, write_end  # type: ignore[import-not-found,no-redef]

CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
MS_REC, MS_PRIVATE = 0x4000, 0x4_0000
MS_NOSUID, MS_NODEV = 2, 4
PR_SET_CHILD_SUBREAPER = 36
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
"""Numbers of the calls: the same on all architectures."""
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, 0o2000000
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_IDMAP = 0x0010_0000

CHUNK = 65_536
"""Bytes that are read of the container's output at a time: what a pipe holds."""

RUNTIME_S = 60.0
"""A runtime that takes longer for one command hangs."""

BECOMES_S = 0.0002
"""Seconds between two looks at whether a runtime's process has become the program: it is mostly one, or none."""


def user_namespace(base: int, size: int) -> int:
    """A descriptor of a user namespace that maps 0.. to base..; it lives by the descriptor alone."""
    ready, go = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        result = libc.unshare(CLONE_NEWUSER)
        os.write(ready[1], b"y" if result == 0 else b"n")
        os.read(go[0], 1)
        os._exit(0)
    try:
        if os.read(ready[0], 1) != b"y":
            raise Trouble("no user namespace can be made (unshare failed)")
        for kind in ("uid_map", "gid_map"):
            with open(f"/proc/{child}/{kind}", "w") as handle:
                handle.write(f"0 {base} {size}")
        return os.open(f"/proc/{child}/ns/user", os.O_RDONLY | os.O_CLOEXEC)
    except OSError as error:
        raise Trouble(f"no user namespace can be made: {error.strerror}") from None
    finally:
        os.write(go[1], b"g")
        os.waitpid(child, 0)
        for descriptor in (*ready, *go):
            os.close(descriptor)


def mount_layers(told: dict, top: str, attributes: int = 0) -> list:  # type: ignore[type-arg]
    """Each layer at a short name below `top`, in this process's mount namespace, with its owners mapped where there is a user namespace; the names, the uppermost first. `attributes`: of the mounts."""
    users = user_namespace(told["id_base"], told["id_range"]) if told["id_base"] is not None else -1
    if users >= 0:
        attributes |= MOUNT_ATTR_IDMAP
    names = []
    for at, layer in enumerate(told["lower"]):
        name = str(at)
        os.makedirs(os.path.join(top, name), exist_ok=True)
        tree = check(libc.syscall(OPEN_TREE, AT_FDCWD, os.fsencode(layer), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC), "open_tree of a layer")
        if attributes:
            packed = struct.pack("QQQQ", attributes, 0, 0, max(0, users))
            check(libc.syscall(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, packed, len(packed)), "mapping a layer's owners (idmapped mount)")
        check(libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, os.fsencode(os.path.join(top, name)), MOVE_MOUNT_F_EMPTY_PATH), "mounting a layer")
        os.close(tree)
        names.append(name)
    if users >= 0:
        os.close(users)
    return names


def mount_root(told: dict) -> None:  # type: ignore[type-arg]
    """The layers, and over them the container's own changes; at `root`, in this process's mount namespace."""
    check(libc.unshare(CLONE_NEWNS), "a mount namespace")
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "private mounts")
    outside.made(told["root"])
    top = outside.made(f"{outside.RUN}/lower")  # all keepers' alike: what is mounted there is in this namespace alone
    names = mount_layers(told, top)
    os.chdir(top)  # so that the option stays short: the kernel takes a page of it
    options = f"lowerdir={':'.join(names)},upperdir={told['folder']}/disk/upper,workdir={told['folder']}/disk/work" + (",userxattr" if outside.UID is not None else "")  # trusted ones are the machine's root's
    check(libc.mount(b"overlay", os.fsencode(told["root"]), b"overlay", MS_NODEV | MS_NOSUID, os.fsencode(options)), "mounting the root (overlayfs)")
    os.chdir("/")


def runtime(told: dict, *words: str, out: int = subprocess.DEVNULL, err: int = subprocess.DEVNULL, more: dict | None = None, seconds: float = RUNTIME_S) -> None:  # type: ignore[type-arg]
    """One command of the runtime, with `more` in its environment; what it says about a failure is in its log."""
    log = os.path.join(told["folder"], "runtime.log")
    try:
        os.unlink(log)
    except FileNotFoundError:
        pass
    try:
        process = subprocess.Popen([*told["runtime"], "--log", log, "--log-format", "json", *words], stdin=subprocess.DEVNULL, stdout=out, stderr=err, env={**os.environ, **(more or {})})
    except OSError as error:
        raise Trouble(f"{told['runtime'][0]} {words[0]}: {error}") from None
    code = end_of(process, seconds)
    if code is None:
        raise Trouble(f"{told['runtime'][0]} {words[0]}: it had not ended after {seconds:.0f} s")
    if code != 0:
        raise Trouble(f"{os.path.basename(told['runtime'][0])} {words[0]}: {said(log) or f'failed with {code}'}")


def end_of(process: subprocess.Popen, seconds: float) -> int | None:  # type: ignore[type-arg]
    """Its exit status, as soon as it has ended; None where it was killed after so long. Popen's own wait with a limit looks at growing distances, 50 ms at the end: a runtime that took 32 ms was seen to have ended
    after 63."""
    ended = os.pidfd_open(process.pid)
    try:
        if select.select([ended], [], [], seconds)[0]:
            return process.wait()
        process.kill()
        process.wait()
        return None
    finally:
        os.close(ended)


def said(log: str) -> str:
    """The last error in a runtime's log."""
    found = ""
    try:
        with open(log, "rb") as handle:
            for line in handle.read(1 << 20).splitlines():
                try:
                    entry = json.loads(line)
                    found = str(entry["msg"]) if entry.get("level") in ("error", "fatal") else found
                except (ValueError, KeyError, TypeError, AttributeError):
                    found = line.decode("utf-8", "replace")
    except OSError:
        return ""
    return found[:SAID]


def keep(told: dict) -> dict:  # type: ignore[type-arg]
    """Start the container and stay with it until its end; returns how that was."""
    folder, name = told["folder"], told["name"]
    mount_root(told)
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "becoming the parent of the container")
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    again = told.get("restore")
    if again:
        restore(runtime, told, again, out_end, err_end, RUNTIME_S)
    else:
        runtime(told, "create", "--bundle", folder, "--pid-file", os.path.join(folder, "pid"), name, out=out_end, err=err_end)
    os.close(out_end)
    os.close(err_end)
    with open(os.path.join(folder, "pid")) as handle:
        pid = int(handle.read())
    with open("/proc/sys/kernel/random/boot_id") as handle:
        boot = handle.read().strip()
    ended, before = os.pidfd_open(pid), memory_kills(told)  # what made the container has run in its control group, and is not of it
    waiting = compare(again, pid) if again else []
    running = {"pid": pid, "started": started_ticks(pid), "boot": boot, "keeper": os.getpid(), "at_ms": int(time.time() * 1000)}
    write(os.path.join(folder, "running.json"), running | ({"switches": {str(one): switches(one) for one in waiting}} if again else {}))
    lease = told.get("lease", "")
    if lease and lease_s(lease) <= 0:
        os.kill(pid, signal.SIGKILL)
        raise Lapsed("its lease was over before it began")
    network = Network(told["network"], pid, folder) if told.get("network") else None
    if network is not None:
        network.start()
    if again:
        for one in waiting:
            os.kill(one, signal.SIGCONT)
    else:
        begin(told, pid, ended)
    tell("running")
    lapsed = watch(ended, {out: Log(os.path.join(folder, "stdout.log"), told["log_bytes"]), err: Log(os.path.join(folder, "stderr.log"), told["log_bytes"])}, lease, network, lambda: reap(pid))
    status = os.waitpid(pid, 0)[1]
    if network is not None:
        network.stop()
    code, by = (os.WEXITSTATUS(status), 0) if os.WIFEXITED(status) else (128 + os.WTERMSIG(status), os.WTERMSIG(status))
    kills = memory_kills(told) - before
    return {"code": code, "signal": by, "out_of_memory": for_memory(code, kills), "memory_kills": kills, "at_ms": int(time.time() * 1000), "lapsed": lapsed and by == signal.SIGKILL}


def program(pid: int) -> tuple | None:  # type: ignore[type-arg]
    """Which file a process runs, by device and inode; None where it has ended, or may not be looked at."""
    try:
        found = os.stat(f"/proc/{pid}/exe")
    except OSError:
        return None
    return found.st_dev, found.st_ino


def begin(told: dict, pid: int, ended: int) -> None:  # type: ignore[type-arg]
    """Have a created container's first process, whose end `ended` tells of, become the workload's program, and return once it has.

    runc's waits for somebody who opens a named pipe that lies beside its state, and `runc start` opens it, reads it and takes it away (libcontainer, container_linux.go): that is done here, for it takes a fifth of
    the time until a container runs to start a Go program for it. Other runtimes are asked."""
    stands, command = program(pid), told["runtime"]
    fifo = os.path.join(command[command.index("--root") + 1], told["name"], "exec.fifo")
    if os.path.basename(command[0]) != "runc" or not os.path.exists(fifo):
        runtime(told, "start", told["name"])
        begun(pid, stands)
        return
    opened = os.open(fifo, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    try:
        if not select.select([opened, ended], [], [], RUNTIME_S)[0]:
            raise Trouble(f"runc's process does not go on after {RUNTIME_S:.0f} s")
        os.unlink(fifo)
        begun(pid, stands)
    finally:
        os.close(opened)


def begun(pid: int, stands: tuple | None) -> None:  # type: ignore[type-arg]
    """Return once a container's first process has left what it stood in, the runtime's own code: a runtime has answered `start` a moment before it becomes the workload's program. A state that is taken
    in between would be the runtime's."""
    end = time.monotonic() + RUNTIME_S
    while stands is not None and program(pid) == stands:
        if time.monotonic() > end:
            raise Trouble(f"the runtime says that it started it, and its program does not run after {RUNTIME_S:.0f} s")
        time.sleep(BECOMES_S)  # nothing tells of an exec


def watch(ended: int, streams: dict, lease: str, network: Network | None, turn: Callable[[], None]) -> bool:  # type: ignore[type-arg]
    """Write down what comes until the process has ended and all was read; returns whether its lease ended it. `turn`: called after each event."""
    selector = selectors.DefaultSelector()
    selector.register(ended, selectors.EVENT_READ)
    for stream, log in streams.items():
        selector.register(stream, selectors.EVENT_READ, log)
    if network is not None:
        selector.register(network.ended, selectors.EVENT_READ, network)
    left, end, lapsed, retry = len(streams), None, False, 0.0
    while left or end is None:
        if lease and end is None and not lapsed and lease_s(lease) <= 0:
            lapsed = True
            try:
                signal.pidfd_send_signal(ended, signal.SIGKILL)
            except ProcessLookupError:
                pass  # it has just ended
        if network is not None and retry and end is None:
            retry = network.tend(selector)
        looks = [pause for pause, wanted in ((LOOK_S, bool(lease) and not lapsed), (retry, retry > 0)) if wanted]
        found = selector.select(max(0.0, end - time.monotonic()) if end is not None else min(looks, default=None))
        if end is not None and not found:
            break
        for key, _ in found:
            if isinstance(key.data, Network):
                if end is None:
                    retry = key.data.tend(selector)
                else:
                    selector.unregister(key.fd)
                continue
            if key.data is None:
                end = time.monotonic() + DRAIN_S
                selector.unregister(ended)
                continue
            data = os.read(key.fd, CHUNK)
            if data:
                key.data.take(data)
            else:
                selector.unregister(key.fd)
                left -= 1
        turn()
    return lapsed


def reap(pid: int) -> None:
    """Other children that came to us: those whose parents ended. The container's own first process is waited for elsewhere."""
    while True:
        try:
            found = os.waitid(os.P_ALL, 0, os.WEXITED | os.WNOHANG | os.WNOWAIT)
            if found is None or found.si_pid == pid:
                return
            os.waitpid(found.si_pid, 0)
        except ChildProcessError:
            return


def live(folder: str, _: list) -> None:  # type: ignore[type-arg]
    """A keeper's life."""
    with open(os.path.join(folder, "keeper.json")) as handle:
        told = json.load(handle)
    try:
        result = keep(told)
    except (Trouble, OSError, ValueError) as error:
        result = {"failed": str(error)[:SAID], "at_ms": int(time.time() * 1000), "lapsed": isinstance(error, Lapsed), "taken": isinstance(error, Taken)}
    write_end(folder, result)
    try:
        runtime(told, "delete", "--force", told["name"])
    except Trouble:
        pass
    tell("ended")


if __name__ == "__main__":
    sys.exit(serve(live, int(sys.argv[1]), sys.argv[2:]))
