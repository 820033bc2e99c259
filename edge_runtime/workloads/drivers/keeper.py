"""What stands between the agent and one container: a small process of its own that outlives the agent. Run as a script, with nothing of ours imported.

    python -I -S keeper.py SOCKET_DESCRIPTOR [CONTROL_GROUP_FOLDER...]

That is the server, which forks a keeper for each folder that comes through the socket, with three descriptors: the folder's lock, where to say the first word, where errors go. It ends
when the socket's other end is closed; the keepers do not.

A keeper mounts the container's root in a mount namespace of its own, has the runtime start it, keeps what it writes, waits for its end and writes that down. Its mounts go with it, whoever is
killed. It holds a lock on `FOLDER/lock` for as long as it lives: that is how the agent, this one or the next, knows that it is there. What it is told stands in `FOLDER/keeper.json`, what
it did in (where `keeper.json` names a lease, it ends the container when that is over, whether or not there is an agent):

    running.json    pid, start and boot of the container's first process, pid of the keeper: written before the container's program starts
    exit.json       how it ended (or that it could not be started, and what the runtime said)
    stdout.log, stdout.log.1, stderr.log, stderr.log.1    the end of what it wrote, each pair within `log_bytes`

The first word that it says is `running` or `ended`: then the file is there.
"""

import ctypes
import errno
import gc
import json
import os
import select
import selectors
import signal
import socket
import struct
import subprocess
import sys
import time

CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
MS_REC, MS_PRIVATE = 0x4000, 0x4_0000
MS_NOSUID, MS_NODEV = 2, 4
PR_SET_NAME, PR_SET_CHILD_SUBREAPER = 15, 36
AT_FDCWD, AT_EMPTY_PATH = -100, 0x1000
OPEN_TREE, MOVE_MOUNT, MOUNT_SETATTR = 428, 429, 442
"""Numbers of the calls: the same on all architectures."""
OPEN_TREE_CLONE, OPEN_TREE_CLOEXEC = 1, 0o2000000
MOVE_MOUNT_F_EMPTY_PATH = 4
MOUNT_ATTR_IDMAP = 0x0010_0000

SCHED_SETATTR = {"x86_64": 314, "aarch64": 274, "riscv64": 274, "armv7l": 380}
"""Numbers of the system call; the agent has them as well (`system.process`), but nothing of ours is imported here."""

PATH_MAX = 4096
"""Bytes of a path, at most (Linux)."""

CHUNK = 65_536
"""Bytes that are read of the container's output at a time: what a pipe holds."""

DRAIN_S = 2.0
"""What a container has written is read for as long after its end; all who could write are dead then."""

RUNTIME_S = 60.0
"""A runtime that takes longer for one command hangs."""

LOOK_S = 1.0
"""Between two looks at the lease: so late a container may be ended."""

RUN = "/run/novacron"
"""For what needs a short path for a moment."""

CONNECT_S = 5.0
"""What connects a container has done so within milliseconds; more means that it hangs."""

RECONNECT_S = 1.0
"""Pause before what connects a container is started again where it ended."""

SAID = 4096
"""Bytes kept of what a runtime says when it fails."""

libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long


class Trouble(Exception):
    """It could not be started; the text is for people."""


class Taken(Trouble):
    """A port that it publishes cannot be had here; it may be had on another node."""


class Lapsed(Trouble):
    """Its lease was over before it began."""


def lease_s(path: str) -> float:
    """Seconds that are left of a lease; none where it is not there."""
    try:
        with open(path) as handle:
            return (int(handle.read()) - time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000) / 1000
    except (OSError, ValueError):
        return 0.0


def check(result: int, what: str) -> int:
    """Raises `Trouble` where a call of the C library failed."""
    if result < 0:
        raise Trouble(f"{what}: {os.strerror(ctypes.get_errno())}")
    return result


def write(path: str, value: dict) -> None:  # type: ignore[type-arg]
    """A document, whole or not at all, on the disk when this returns. A disk that is full is told apart from nothing: the agent then sees that the end is not known."""
    temporary = path + ".new"
    with open(temporary, "w") as handle:
        json.dump(value, handle)
        handle.flush()
        os.fsync(handle.fileno())
    os.replace(temporary, path)
    descriptor = os.open(os.path.dirname(path), os.O_RDONLY | os.O_DIRECTORY)
    os.fsync(descriptor)
    os.close(descriptor)


def leave_group(folders: list) -> None:  # type: ignore[type-arg]
    """Out of the agent's control groups: a service manager ends all that is in them, and their limits are the agent's. What cannot be left is not."""
    for folder in folders:
        try:
            os.makedirs(folder, exist_ok=True)
            with open(os.path.join(folder, "cgroup.procs"), "w") as handle:
                handle.write(str(os.getpid()))
        except OSError:
            continue


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


def mount_root(told: dict) -> None:  # type: ignore[type-arg]
    """The layers, with their owners mapped where there is a user namespace, and over them the container's own changes; at `root`, in this process's mount namespace."""
    check(libc.unshare(CLONE_NEWNS), "a mount namespace")
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "private mounts")
    os.makedirs(told["root"], exist_ok=True)
    users = user_namespace(told["id_base"], told["id_range"]) if told["id_base"] is not None else -1
    names = []
    for at, layer in enumerate(told["lower"]):
        name = str(at)
        os.makedirs(os.path.join(told["folder"], "lower", name), exist_ok=True)
        tree = check(libc.syscall(OPEN_TREE, AT_FDCWD, os.fsencode(layer), OPEN_TREE_CLONE | OPEN_TREE_CLOEXEC), "open_tree of a layer")
        if users >= 0:
            attributes = struct.pack("QQQQ", MOUNT_ATTR_IDMAP, 0, 0, users)
            check(libc.syscall(MOUNT_SETATTR, tree, b"", AT_EMPTY_PATH, attributes, len(attributes)), "mapping a layer's owners (idmapped mount)")
        target = os.fsencode(os.path.join(told["folder"], "lower", name))
        check(libc.syscall(MOVE_MOUNT, tree, b"", AT_FDCWD, target, MOVE_MOUNT_F_EMPTY_PATH), "mounting a layer")
        os.close(tree)
        names.append(name)
    os.chdir(os.path.join(told["folder"], "lower"))  # so that the option stays short: the kernel takes a page of it
    options = f"lowerdir={':'.join(names)},upperdir={told['folder']}/disk/upper,workdir={told['folder']}/disk/work"
    check(libc.mount(b"overlay", os.fsencode(told["root"]), b"overlay", MS_NODEV | MS_NOSUID, os.fsencode(options)), "mounting the root (overlayfs)")
    os.chdir("/")
    if users >= 0:
        os.close(users)


def runtime(told: dict, *words: str, out: int = subprocess.DEVNULL, err: int = subprocess.DEVNULL) -> None:  # type: ignore[type-arg]
    """One command of the runtime; what it says about a failure is in its log."""
    log = os.path.join(told["folder"], "runtime.log")
    try:
        os.unlink(log)
    except FileNotFoundError:
        pass
    try:
        done = subprocess.run([*told["runtime"], "--log", log, "--log-format", "json", *words], stdin=subprocess.DEVNULL, stdout=out, stderr=err, timeout=RUNTIME_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Trouble(f"{told['runtime'][0]} {words[0]}: {error}") from None
    if done.returncode != 0:
        raise Trouble(f"{os.path.basename(told['runtime'][0])} {words[0]}: {said(log) or f'failed with {done.returncode}'}")


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


def started_ticks(pid: int) -> int:
    """When a process began, in ticks since boot: with the pid and the boot it names a process for good."""
    with open(f"/proc/{pid}/stat", "rb") as handle:
        return int(handle.read().rpartition(b")")[2].split()[19])


class Log:
    """The end of a stream in two files that together stay within `most` bytes. What the disk does not take is dropped: the container must not wait for it."""

    def __init__(self, path: str, most: int) -> None:
        self._path, self._half = path, max(1, most // 2)
        self._file = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = os.fstat(self._file).st_size

    def take(self, data: bytes) -> None:
        """Append."""
        while data:
            if self._size >= self._half:
                self._turn()
            piece = data[:self._half - self._size] or data[:1]
            try:
                done = os.write(self._file, piece)
            except OSError:
                return
            self._size += done
            data = data[done:]

    def _turn(self) -> None:
        os.rename(self._path, self._path + ".1")
        os.close(self._file)
        self._file = os.open(self._path, os.O_WRONLY | os.O_CREAT | os.O_TRUNC | os.O_APPEND | os.O_CLOEXEC, 0o600)
        self._size = 0


def tell(word: str) -> None:
    """One line to the agent; it may be dead."""
    try:
        os.write(1, word.encode() + b"\n")
        null = os.open("/dev/null", os.O_WRONLY)
        os.dup2(null, 1)
        os.close(null)
    except OSError:
        pass


def out_of_memory(told: dict) -> bool:  # type: ignore[type-arg]
    """Whether the kernel killed in the container's control group for want of memory."""
    for path in told["oom"]:
        try:
            with open(path) as handle:
                for line in handle:
                    if line.startswith("oom_kill ") and int(line.split()[1]) > 0:
                        return True
        except (OSError, ValueError, IndexError):
            continue
    return False


def keep(told: dict) -> dict:  # type: ignore[type-arg]
    """Start the container and stay with it until its end; returns how that was."""
    folder, name = told["folder"], told["name"]
    mount_root(told)
    check(libc.prctl(PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0), "becoming the parent of the container")
    (out, out_end), (err, err_end) = os.pipe(), os.pipe()
    runtime(told, "create", "--bundle", folder, "--pid-file", os.path.join(folder, "pid"), name, out=out_end, err=err_end)
    os.close(out_end)
    os.close(err_end)
    with open(os.path.join(folder, "pid")) as handle:
        pid = int(handle.read())
    with open("/proc/sys/kernel/random/boot_id") as handle:
        boot = handle.read().strip()
    ended = os.pidfd_open(pid)
    write(os.path.join(folder, "running.json"), {"pid": pid, "started": started_ticks(pid), "boot": boot, "keeper": os.getpid(), "at_ms": int(time.time() * 1000)})
    lease = told.get("lease", "")
    if lease and lease_s(lease) <= 0:
        os.kill(pid, signal.SIGKILL)
        raise Lapsed("its lease was over before it began")
    network = Network(told["network"], pid, folder) if told.get("network") else None
    if network is not None:
        network.start()
    runtime(told, "start", name)
    tell("running")
    status, lapsed = watch(ended, {out: Log(os.path.join(folder, "stdout.log"), told["log_bytes"]), err: Log(os.path.join(folder, "stderr.log"), told["log_bytes"])}, pid, lease, network)
    if network is not None:
        network.stop()
    code, by = (os.WEXITSTATUS(status), 0) if os.WIFEXITED(status) else (128 + os.WTERMSIG(status), os.WTERMSIG(status))
    return {"code": code, "signal": by, "out_of_memory": out_of_memory(told), "at_ms": int(time.time() * 1000), "lapsed": lapsed and by == signal.SIGKILL}


class Network:
    """What connects the container to the node's network: a process that ends with this one. Started again where it ends by itself.

    In its command stand PID (the container's first process), READY and EXIT (descriptors: it writes when it is ready, and ends when the other end of EXIT is closed), and SOCKET, where it takes
    requests for ports.
    """

    def __init__(self, told: dict, pid: int, folder: str) -> None:  # type: ignore[type-arg]
        self._told, self._pid, self._errors = told, pid, os.path.join(folder, "network.err")
        self._socket = f"{RUN}/network-{os.getpid()}"  # not in the folder, whose path may be longer than a socket's name can be
        self._process: subprocess.Popen | None = None  # type: ignore[type-arg]
        self._line = -1
        self.ended = -1
        """Readable when it has ended; -1 where it does not run."""
        self.again_at = 0.0

    def start(self) -> None:
        """Returns when the container is connected and its ports are open; raises `Trouble`."""
        (ready, its_ready), (its_end, self._line) = os.pipe(), os.pipe()
        places = {"PID": str(self._pid), "READY": str(its_ready), "EXIT": str(its_end), "SOCKET": self._socket}
        words = []
        for word in self._told["command"]:
            for place, value in places.items():
                word = word.replace(place, value)
            words.append(word)
        os.makedirs(RUN, mode=0o700, exist_ok=True)
        try:
            with open(self._errors, "wb") as errors:
                self._process = subprocess.Popen(words, stdin=subprocess.DEVNULL, stdout=errors, stderr=errors, cwd="/", pass_fds=(its_ready, its_end))
            os.close(its_ready)
            its_ready = -1
            self.ended = os.pidfd_open(self._process.pid)
            if not select.select([ready], [], [], CONNECT_S)[0] or not os.read(ready, 1):
                with open(self._errors, "rb") as said:
                    lines = said.read(SAID).decode("utf-8", "replace").splitlines()
                raise Trouble(f"spec.network: {lines[-1] if lines else 'the container was not connected'}")
            for request in self._told["ports"]:
                self._ask(request)
        except BaseException:
            self.stop()
            raise
        finally:
            for descriptor in (ready, its_ready, its_end):
                if descriptor >= 0:
                    os.close(descriptor)
            try:
                os.unlink(self._socket)  # nobody shall ask for more
            except FileNotFoundError:
                pass

    def _ask(self, request: dict) -> None:  # type: ignore[type-arg]
        with socket.socket(socket.AF_UNIX) as line:
            line.settimeout(CONNECT_S)
            try:
                line.connect(self._socket)
                line.sendall(json.dumps(request).encode())
                line.shutdown(socket.SHUT_WR)
                answer = json.loads(line.recv(CHUNK))
            except (OSError, ValueError) as error:
                answer = {"error": {"desc": str(error)}}
        if "error" in answer:
            told = request["arguments"]
            raise Taken(f"port {told['host_port']} ({told['proto']}) of {told['host_addr']} cannot be had on this node: it is taken, or the address is not here")

    def stop(self) -> None:
        """End it."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None
        for descriptor in (self.ended, self._line):
            if descriptor >= 0:
                os.close(descriptor)
        self.ended = self._line = -1

    def tend(self, selector: selectors.BaseSelector) -> float:
        """It has ended: start it again when its pause is over. Seconds until it wants to be tended, 0: it runs."""
        now = time.monotonic()
        if self.ended >= 0:
            selector.unregister(self.ended)
            self.stop()
            self.again_at = now + RECONNECT_S
        if now < self.again_at:
            return self.again_at - now
        try:
            self.start()
        except (Trouble, OSError):
            self.again_at = time.monotonic() + RECONNECT_S
            return RECONNECT_S
        selector.register(self.ended, selectors.EVENT_READ, self)
        return 0.0


def watch(ended: int, streams: dict, pid: int, lease: str, network: "Network | None" = None) -> tuple:  # type: ignore[type-arg]
    """Write down what comes until the process has ended and all was read; returns its wait status, and whether its lease ended it."""
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
        reap(pid)
    return os.waitpid(pid, 0)[1], lapsed


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


def ordinary_turns() -> None:
    """The priority and the turns at the processor that any process has: the agent's own are better than what it starts may have."""
    os.setpriority(os.PRIO_PROCESS, 0, max(0, os.getpriority(os.PRIO_PROCESS, 0)))
    number = SCHED_SETATTR.get(os.uname().machine)
    if number is not None and os.sched_getscheduler(0) == os.SCHED_OTHER:
        attributes = struct.pack("=IIQiIQQQ", 48, os.SCHED_OTHER, 0, os.getpriority(os.PRIO_PROCESS, 0), 0, 0, 0, 0)  # no length of turns: the kernel's own
        libc.syscall(number, 0, attributes, 0)


def live(folder: str) -> None:
    """A keeper's life."""
    with open(os.path.join(folder, "keeper.json")) as handle:
        told = json.load(handle)
    libc.prctl(PR_SET_NAME, b"novacron-keeper", 0, 0, 0)
    try:
        result = keep(told)
    except (Trouble, OSError, ValueError) as error:
        result = {"failed": str(error)[:SAID], "at_ms": int(time.time() * 1000), "lapsed": isinstance(error, Lapsed), "taken": isinstance(error, Taken)}
    for _ in range(2):
        try:
            write(os.path.join(folder, "exit.json"), result)
            break
        except OSError as error:
            if error.errno != errno.ENOSPC:
                break
            for stale in ("stdout.log.1", "stderr.log.1"):  # how it ended is worth more than what it said before
                try:
                    os.unlink(os.path.join(folder, stale))
                except OSError:
                    pass
    try:
        runtime(told, "delete", "--force", told["name"])
    except Trouble:
        pass
    tell("ended")


def fork(folder: str, descriptors: list, line: socket.socket) -> None:  # type: ignore[type-arg]
    """A keeper; returns in the server."""
    if os.fork() != 0:
        return
    code = 1
    try:
        os.setsid()
        signal.signal(signal.SIGCHLD, signal.SIG_DFL)
        line.close()
        _lock, said, errors = descriptors  # the lock is held by being open
        for source, target in ((said, 1), (errors, 2)):
            os.dup2(source, target)
            os.close(source)
        live(folder)
        code = 0
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        sys.stderr.flush()
        os._exit(code)


def main() -> int:
    """The server."""
    ordinary_turns()
    leave_group(sys.argv[2:])
    libc.prctl(PR_SET_NAME, b"novacron-keepers", 0, 0, 0)
    signal.signal(signal.SIGCHLD, signal.SIG_IGN)  # keepers that end leave nothing behind
    gc.freeze()  # what is here is shared with all that are forked, and a collection would write to it
    line = socket.socket(fileno=int(sys.argv[1]))
    line.set_inheritable(False)
    while True:
        try:
            data, descriptors, _, _ = socket.recv_fds(line, PATH_MAX, 3, socket.MSG_CMSG_CLOEXEC)
        except ConnectionError:
            return 0
        if not data:
            return 0
        if len(descriptors) == 3:
            fork(os.fsdecode(data), descriptors, line)
        for descriptor in descriptors:
            os.close(descriptor)


if __name__ == "__main__":
    sys.exit(main())
