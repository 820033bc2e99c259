"""What stands between the agent and one virtual machine: a small process that outlives the agent, as `keeper` does for containers (see there: lock, first word, files of the folder; `keeping`: the server).

    python -I -S qemu_keeper.py SOCKET_DESCRIPTOR [CONTROL_GROUP_FOLDER...]

Beside the three descriptors of a container's keeper come those that `keeper.json` names in `descriptors`: a template's memory and state, and for a template itself the kernel and its initramfs.
With `template` in `keeper.json` it boots a guest, or goes on from another template where there is one (`base`) and mounts an image's disks, saves it into those, and ends. Else it makes a clone of it, has it
run what `document` says, and stays until its end. A clone that is given its template's descriptor of the image has the disks mounted already.
QEMU has a user of its own, no rights, no network, and dies with its keeper. An agent asks by lines of JSON over the socket `ask`, which only root can reach:

    {"do": "signal", "number": 15}   {"do": "kill"}   {"do": "pause"}   {"do": "resume"}   {"do": "exec", "args": [..], "timeout_s": 5}
"""

import binascii
import json
import os
import resource
import select
import selectors
import signal
import socket
import subprocess
import sys
import time

if __package__:
    from . import microvm_guest as guest
    from .keeping import DRAIN_S, LOOK_S, OOM_SCORE, SAID, Lapsed, Log, Taken, Trouble, check, for_memory, lease_s, libc, memory_kills, serve, started_ticks, tell, write, write_end
    from .qemu_qmp import Qmp, QmpError
else:  # run as a script: its neighbours, without the package, which would load the agent
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    import microvm_guest as guest  # type: ignore[import-not-found,no-redef]
    from keeping import DRAIN_S, LOOK_S, OOM_SCORE, SAID, Lapsed, Log, Taken, Trouble, check, for_memory, lease_s, libc, memory_kills, serve, started_ticks, tell, write, write_end  # type: ignore[import-not-found,no-redef]
    from qemu_qmp import Qmp, QmpError  # type: ignore[import-not-found,no-redef]

CLONE_NEWNS, CLONE_NEWNET, CLONE_NEWIPC = 0x0002_0000, 0x4000_0000, 0x0800_0000
MS_BIND, MS_REC, MS_PRIVATE = 0x1000, 0x4000, 0x4_0000
PR_SET_PDEATHSIG, PR_SET_NO_NEW_PRIVS, PR_SET_THP_DISABLE = 1, 38, 41

QMP_S = 20.0
"""A QEMU that does not answer within this hangs."""

CHUNK = 65_536
"""Bytes that are read at a time."""

MAX_SAID = 4096
"""Bytes of one answer of a guest, and of one question of an agent beside the arguments of a command."""

MAX_ASKED = 1 << 20
"""Bytes of one question: the arguments of a command."""

MAX_ASKING = 8
"""Agents that ask at a time."""

MAX_OUTPUT = 1 << 20
"""Bytes kept of each stream of a command."""

MORE_DESCRIPTORS = 5
"""That a keeper gets at most beside its own: what `descriptors` of `keeper.json` names."""

OPEN_FILES = 256
"""Of a QEMU; it has about fifty."""


def bind(source: str, target: str) -> None:
    """Lay a file over another one, in a mount namespace of this process."""
    check(libc.unshare(CLONE_NEWNS), "a mount namespace")
    check(libc.mount(b"none", b"/", None, MS_REC | MS_PRIVATE, None), "mounts of its own")
    check(libc.mount(os.fsencode(source), os.fsencode(target), None, MS_BIND, None), f"laying a file over {target}")


class Unusable(Trouble):
    """A clone could not be made of its template."""


class Machine:
    """A running QEMU, its channels, and what it says when it fails."""

    def __init__(self, told: dict, descriptors: dict) -> None:  # type: ignore[type-arg]
        ours, its = {}, dict(descriptors)
        ports = told.get("ports", guest.PORTS)
        for name in ("qmp", *ports):
            ours[name], end = socket.socketpair()
            its[name] = end.detach()
        for path, value in told["groups"]:
            os.makedirs(os.path.dirname(path), exist_ok=True)
            if value is not None:
                with open(path, "w") as handle:
                    handle.write(str(value))
        line = [word.format(**its) for word in told["command"]]
        parent = os.getpid()

        def become() -> None:
            for path, value in told["groups"]:
                if value is None:
                    with open(path, "w") as handle:
                        handle.write(str(os.getpid()))
            check(libc.unshare(CLONE_NEWNET | CLONE_NEWIPC), "a network namespace")
            for source, target in told.get("binds", ()):
                bind(source, target)
            with open("/proc/self/oom_score_adj", "w") as handle:
                handle.write(str(OOM_SCORE))
            os.nice(told.get("nice", 0))
            resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
            resource.setrlimit(resource.RLIMIT_NOFILE, (OPEN_FILES, OPEN_FILES))
            os.setgroups(told["more_groups"])
            os.setgid(told["uid"])
            os.setuid(told["uid"])
            libc.prctl(PR_SET_THP_DISABLE, 1, 0, 0, 0)  # else what is touched a little of takes two megabytes each time; a kernel without it wastes them
            check(libc.prctl(PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "no new privileges")
            check(libc.prctl(PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "dying with the keeper")
            if os.getppid() != parent:
                os._exit(1)

        def become_or_say() -> None:
            try:
                become()
            except Exception as error:
                os.write(2, str(error).encode())  # all that the parent hears of it is that there was one
                raise

        self._told, self._before = told, memory_kills(told)
        self.errors = os.path.join(told["folder"], "qemu.err")
        with open(self.errors, "wb") as errors:
            try:
                self.process = subprocess.Popen(
                    line, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=errors, cwd="/", env={"PATH": os.defpath, "LC_ALL": "C.UTF-8"}, preexec_fn=become_or_say, pass_fds=tuple(its.values()),
                    start_new_session=True,
                )
            except subprocess.SubprocessError:
                raise self.trouble("QEMU's process could not be made ready") from None
        for name in ours:
            os.close(its[name])
        self.ports = {name: ours[name] for name in ports}
        self.qmp = Qmp(ours["qmp"], QMP_S)
        self.qmp_line = ours["qmp"]

    def trouble(self, problem: str) -> Trouble:
        """With QEMU's own words."""
        try:
            with open(self.errors, "rb") as handle:
                said = handle.read(SAID).decode("utf-8", "replace").strip()
        except OSError:
            said = ""
        return Trouble(f"{problem}{': ' * bool(said)}{said}")

    @property
    def starved(self) -> bool:
        """Whether the kernel killed it for want of memory."""
        return for_memory(128 - (self.process.returncode or 0), memory_kills(self._told) - self._before)

    def end(self) -> None:
        """Kill it and wait for it."""
        self.process.kill()
        self.process.wait()

    def say(self, script: str) -> None:
        """Send the guest a script. Raises `Trouble` where it takes nothing any more."""
        self.send(guest.framed(script))

    def send(self, order: bytes) -> None:
        """Send the guest what it reads as an order. Raises `Trouble` where it takes nothing any more."""
        line = self.ports["control"]
        line.settimeout(QMP_S)
        try:
            line.sendall(order)
        except OSError:
            raise Trouble("the guest takes no orders any more") from None


class Lines:
    """A guest's answers, as lines; nobody vouches for them."""

    def __init__(self) -> None:
        self._waits = b""

    def take(self, data: bytes) -> list:  # type: ignore[type-arg]
        """The whole lines, as lists of words. Raises `Trouble` where one has no end."""
        *lines, self._waits = (self._waits + data).split(b"\n")
        if len(self._waits) > MAX_SAID:
            raise Trouble("the guest says what is no answer")
        return [found for line in lines if (found := line[:MAX_SAID].decode("ascii", "replace").split())]


class Stream:
    """A port's data up to the mark."""

    def __init__(self, token: str, take: object) -> None:
        self._mark, self._take, self._waits, self.ended = guest.mark(token), take, b"", False

    def feed(self, data: bytes) -> None:
        """What came; what may be the mark's beginning waits."""
        if self.ended:
            return
        data = self._waits + data
        before, found, _ = data.partition(self._mark)
        if found:
            self.ended, self._waits = True, b""
        else:
            keep = next((size for size in range(min(len(self._mark) - 1, len(data)), 0, -1) if data.endswith(self._mark[:size])), 0)
            before, self._waits = data[: len(data) - keep], data[len(data) - keep:]
        if before:
            self._take(before)  # type: ignore[operator]


class Kept:
    """The first bytes of a command's stream."""

    def __init__(self) -> None:
        self.data, self.cut = bytearray(), False

    def take(self, data: bytes) -> None:
        """Append what there is room for."""
        room = MAX_OUTPUT - len(self.data)
        self.cut = self.cut or len(data) > room
        self.data += data[:room]


def save(machine: Machine, state: int) -> None:
    """Stop a guest and write its state; its memory stays where it is. Raises `Trouble` and `QmpError`."""
    machine.qmp.ask("stop")
    machine.qmp.events = []  # of an earlier load
    machine.qmp.ask("migrate-set-capabilities", capabilities=[{"capability": name, "state": True} for name in ("x-ignore-shared", "events")])
    machine.qmp.ask_with(state, "getfd", fdname="state")
    machine.qmp.ask("migrate", uri="fd:state")
    if machine.qmp.until("MIGRATION", "status", ("completed", "failed")) != "completed":
        raise machine.trouble("the guest's state could not be saved")


def load(machine: Machine, state: int, with_memory: bool = False, seconds: float = 0.0) -> None:
    """Give a machine that waits for it the state of a template, or (`with_memory`) all of a machine that was taken. Raises `Trouble` and `QmpError`. `seconds` that it may take."""
    machine.qmp.ask("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": not with_memory}, {"capability": "events", "state": True}])
    machine.qmp.ask("migrate-incoming", uri=f"fd:{state}")
    try:
        if machine.qmp.until("MIGRATION", "status", ("completed", "failed"), seconds) == "completed":
            return
    except QmpError:  # QEMU itself has given up
        pass
    raise Unusable(str(machine.trouble(f"the {'state' if with_memory else 'template'} cannot be loaded")))


def _text(data: bytearray) -> str:
    """Bytes as base64. Not by the module of that name, nor random ones by `secrets`: each keeper would have a megabyte more."""
    return binascii.b2a_base64(data, newline=False).decode()


def make_template(told: dict, descriptors: dict) -> dict:  # type: ignore[type-arg]
    """Boot a guest, or go on from another template, and save it. Returns what it took."""
    began = time.monotonic()
    machine = Machine(told, descriptors)
    try:
        machine.qmp.begin()
        if "base" in descriptors:
            load(machine, descriptors["base"])
        machine.qmp.ask("cont")
        if "base" in descriptors:
            machine.say(guest.hold(told["document"], guest.warm(told["document"], told["everything"])))
        line, lines, word = machine.ports["control"], Lines(), ["held" if "base" in descriptors else "ready"]
        line.setblocking(True)
        poll, end = select.poll(), began + told["boot_s"]
        poll.register(line, select.POLLIN)
        poll.register(1, 0)  # its other end is closed where nobody waits for the template any more
        while True:
            ready = dict(poll.poll(max(0, round((end - time.monotonic()) * 1000))))
            if 1 in ready:
                raise Trouble("nobody waits for it any more")
            if not ready:
                raise machine.trouble(f"the guest did not boot within {told['boot_s']:g} s")
            data = line.recv(CHUNK)
            if not data:
                raise machine.trouble("QEMU or the guest's kernel ended before it had booted")
            said = lines.take(data)
            if word in said:
                break
            if said:
                raise machine.trouble(f"the guest says: {' '.join(said[0])[:SAID]}")
        booted = time.monotonic() - began
        save(machine, descriptors["state"])
        return {"template": True, "booted_s": round(booted, 3), "saved_s": round(time.monotonic() - began - booted, 3), "at_ms": int(time.time() * 1000)}
    except QmpError as error:
        raise machine.trouble(str(error)) from None
    finally:
        machine.end()


class Keeper:
    """The life of one instance."""

    def __init__(self, told: dict, descriptors: dict) -> None:  # type: ignore[type-arg]
        self.told, self.folder = told, told["folder"]
        token = os.urandom(8).hex()
        self.lines, self.token = Lines(), token
        logs = {name: Log(os.path.join(self.folder, f"std{name}.log"), told["log_bytes"]) for name in ("out", "err")}
        self.streams = {name: Stream(token, log.take) for name, log in logs.items()}
        self.result: dict | None = None  # type: ignore[type-arg]
        self.wish = ""
        """`kill` or `lapsed`, where we have ended it."""
        self.started = False
        self.asking: dict = {}  # type: ignore[type-arg]
        self.exec: dict | None = None  # type: ignore[type-arg]
        self.machine = Machine(told, descriptors)
        self.selector = selectors.DefaultSelector()

    def keep(self) -> dict:  # type: ignore[type-arg]
        """From its beginning to its end; returns how that was."""
        machine, told = self.machine, self.told
        try:
            with open("/proc/sys/kernel/random/boot_id") as handle:
                boot = handle.read().strip()
            pid = machine.process.pid
            write(os.path.join(self.folder, "running.json"), {"pid": pid, "started": started_ticks(pid), "boot": boot, "keeper": os.getpid(), "at_ms": int(time.time() * 1000)})
            if told["lease"] and lease_s(told["lease"]) <= 0:
                raise Lapsed("its lease was over before it began")
            machine.qmp.begin()
            load(machine, told["state_descriptor"])
            machine.qmp.ask("cont")
            machine.say(guest.start(told["document"], self.token, os.urandom(64).hex(), time.time_ns(), "root" in told["given"]))
            self.watch()
        except QmpError as error:
            raise machine.trouble(str(error)) from None
        finally:
            machine.end()
            self.drain()
        for one in self.asking:
            one.close()
        return self.ending()

    def ending(self) -> dict:  # type: ignore[type-arg]
        """What is written down."""
        now = int(time.time() * 1000)
        if self.result is not None:
            return {**self.result, "at_ms": now, "lapsed": False}
        if self.wish:
            return {"code": 137, "signal": 9, "out_of_memory": False, "at_ms": now, "lapsed": self.wish == "lapsed"}
        if self.machine.starved:
            return {"code": 137, "signal": 9, "out_of_memory": True, "at_ms": now, "lapsed": False}
        raise self.machine.trouble("the guest ended before its program did")

    def watch(self) -> None:
        """Until it has ended."""
        register, ports = self.selector.register, self.machine.ports
        ended = os.pidfd_open(self.machine.process.pid)
        register(ended, selectors.EVENT_READ, lambda: None)
        register(self.machine.qmp_line, selectors.EVENT_READ, self.machine.qmp.drain)
        listener = self.listen()
        register(listener, selectors.EVENT_READ, lambda: self.accept(listener))
        for name, port in ports.items():
            port.setblocking(False)
            register(port, selectors.EVENT_READ, lambda name=name: self.read(name))
        deadline = time.monotonic() + self.told["boot_s"]
        while self.machine.process.poll() is None and (self.result is None or not all(stream.ended for stream in self.streams.values())):
            now, lease = time.monotonic(), self.told["lease"]
            if self.result is not None and now >= deadline:
                return
            if not self.started and now >= deadline:
                raise self.machine.trouble(f"the guest did not start the program within {self.told['boot_s']:g} s")
            if lease and not self.wish and lease_s(lease) <= 0:
                self.wish = "lapsed"
                return
            if self.exec is not None and now >= self.exec["end"]:
                self.exec["late"] = True
                self.exec["end"] = now + QMP_S
                self.machine.say(guest.end_run())
            waits = [deadline - now] if not self.started or self.result is not None else []
            waits += [LOOK_S] * bool(lease) + ([self.exec["end"] - now] if self.exec is not None else [])
            was = self.result
            for key, _ in self.selector.select(max(0.0, min(waits)) if waits else None):
                key.data()
                if self.wish:
                    return
            if was is None and self.result is not None:
                deadline = time.monotonic() + DRAIN_S

    def read(self, name: str) -> None:
        """What a port of the guest has."""
        try:
            data = self.machine.ports[name].recv(CHUNK)
        except (BlockingIOError, ConnectionError):
            return
        if not data:
            self.selector.unregister(self.machine.ports[name])
        elif name == "control":
            for words in self.lines.take(data):
                self.heard(words)
        elif name in self.streams:
            self.streams[name].feed(data)
        elif self.exec is not None:
            self.exec[name].feed(data)
            self.executed()

    def heard(self, words: list) -> None:  # type: ignore[type-arg]
        """An answer of the guest."""
        if words == ["running"] and not self.started:
            self.started = True
            tell("running")
        elif words[0] == "trouble":
            raise self.machine.trouble(f"the guest says: {' '.join(words[1:])[:SAID]}")
        elif words[0] == "exit" and self.result is None and len(words) > 1 and words[1].isdigit():
            code = int(words[1]) & 0xFF
            kills = int(words[2]) if len(words) > 2 and words[2].isdigit() else 0
            self.result = {"code": code, "signal": code - 128 if 128 < code <= 192 else 0, "out_of_memory": for_memory(code, kills), "memory_kills": kills}
        elif words[0] == "done" and self.exec is not None and len(words) > 1 and words[1].isdigit():
            self.exec["code"] = int(words[1]) & 0xFF
            self.executed()

    def drain(self) -> None:
        """What it had written, after its end."""
        for name, port in self.machine.ports.items():
            port.setblocking(False)
            while name in self.streams:
                try:
                    data = port.recv(CHUNK)
                except OSError:
                    break
                if not data:
                    break
                self.streams[name].feed(data)

    # -- what an agent asks ----------------------------------------------------------------------------------------------------

    def listen(self) -> socket.socket:
        """The socket for agents."""
        path = self.told["ask"]
        os.makedirs(os.path.dirname(path), exist_ok=True, mode=0o700)
        try:
            os.unlink(path)
        except FileNotFoundError:
            pass
        listener = socket.socket(socket.AF_UNIX)
        listener.bind(path)
        listener.listen(MAX_ASKING)
        listener.setblocking(False)
        return listener

    def accept(self, listener: socket.socket) -> None:
        """Another agent's question."""
        try:
            line, _ = listener.accept()
        except OSError:
            return
        if len(self.asking) >= MAX_ASKING:
            line.close()
            return
        line.setblocking(False)
        self.asking[line] = b""
        self.selector.register(line, selectors.EVENT_READ, lambda: self.asked(line))

    def leave(self, line: socket.socket) -> None:
        """An agent that is done, or gone."""
        if self.asking.pop(line, None) is None:
            return  # it was answered while it hung up
        self.selector.unregister(line)
        line.close()
        if self.exec is not None and self.exec["line"] is line:
            self.exec["line"] = None

    def asked(self, line: socket.socket) -> None:
        """A question, or a part of it."""
        if line not in self.asking:
            return  # it was answered in the same turn
        try:
            data = line.recv(CHUNK)
        except OSError:
            data = b""
        if not data or len(self.asking[line]) + len(data) > MAX_ASKED:
            self.leave(line)
            return
        self.asking[line] += data
        if not data.endswith(b"\n"):
            return
        try:
            request = json.loads(self.asking[line])
            self.asking[line] = b""
            answer = self.do(request, line)
        except (ValueError, KeyError, TypeError) as error:
            answer = {"failed": f"that is no question: {error!r}"[:SAID]}
        except OSError as error:  # what was to be written to has gone, or is full: no reason to end what runs
            answer = {"failed": str(error)[:SAID]}
        except QmpError as error:
            answer = {"failed": str(error)[:SAID]}
        if answer is not None:
            self.answer(line, answer)

    def answer(self, line: socket.socket, answer: dict) -> None:  # type: ignore[type-arg]
        """One line of JSON, and the end."""
        line.settimeout(QMP_S)
        try:
            line.sendall(json.dumps(answer).encode() + b"\n")
        except OSError:
            pass
        self.leave(line)

    def do(self, request: dict, line: socket.socket) -> dict | None:  # type: ignore[type-arg]
        """What is asked; None where the answer comes later."""
        paused = os.path.join(self.folder, "paused")
        if request["do"] == "signal":
            self.machine.say(guest.kill(int(request["number"])))
        elif request["do"] == "kill":
            self.wish = "kill"
        elif request["do"] == "pause":
            self.machine.qmp.ask("stop")
            try:
                write(paused, {"at_ms": int(time.time() * 1000)})
            except OSError as error:  # a disk that is full
                self.machine.qmp.ask("cont")
                return {"failed": f"that it stands still could not be written down: {error.strerror}"}
        elif request["do"] == "resume":
            self.machine.qmp.ask("cont")
            self.machine.say(guest.clock(time.time_ns()))
            if os.path.exists(paused):
                os.unlink(paused)
        elif request["do"] == "exec":
            if self.exec is not None:
                return {"failed": "another command runs in it"}
            token, out, err = os.urandom(8).hex(), Kept(), Kept()
            script = guest.run(self.told["document"], [str(word) for word in request["args"]], token)
            self.exec = {
                "line": line, "code": None, "late": False, "end": time.monotonic() + float(request["timeout_s"]), "out": out, "err": err, "exec_out": Stream(token, out.take), "exec_err": Stream(token, err.take),
            }
            self.machine.say(script)
            return None
        else:
            return {"failed": "that is not known here"}
        return {"done": True}

    def executed(self) -> None:
        """Answer when a command has ended and all that it wrote is here."""
        run = self.exec
        if run is None or run["code"] is None or not (run["exec_out"].ended and run["exec_err"].ended):
            return
        self.exec = None
        if run["line"] is not None:
            self.answer(run["line"], {
                "code": run["code"], "late": run["late"], "cut": run["out"].cut or run["err"].cut, "out": _text(run["out"].data), "err": _text(run["err"].data),
            })


def live(folder: str, descriptors: list, keeper: type = Keeper, template: object = make_template) -> None:  # type: ignore[type-arg]
    """A keeper's life. `keeper`, `template`: what keeps an instance, and what makes a template."""
    with open(os.path.join(folder, "keeper.json")) as handle:
        told = json.load(handle)
    names = dict(zip(told["descriptors"], descriptors, strict=False))  # the last ones need not be given
    told["given"] = list(names)
    try:
        for name in ("base",) if told["template"] else ("state",):
            if name in names:  # a description of its own: clones read at the same time
                names[name] = os.open(f"/proc/self/fd/{names[name]}", os.O_RDONLY)
                told["state_descriptor"] = names[name]
        for name, path, writable in told["files"]:
            if name not in names:
                names[name] = os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC)
        result = template(told, names) if told["template"] else keeper(told, names).keep()  # type: ignore[operator]
    except (Trouble, OSError, ValueError, subprocess.SubprocessError) as error:
        result = {"failed": str(error)[:SAID], "at_ms": int(time.time() * 1000), "lapsed": isinstance(error, Lapsed), "taken": isinstance(error, Taken), "unusable": isinstance(error, Unusable)}
    write_end(folder, result)
    for path, value in told["groups"]:
        if value is None:
            try:
                os.rmdir(os.path.dirname(path))
            except OSError:
                pass
    if told["ask"]:
        try:
            os.unlink(told["ask"])
        except OSError:
            pass
    tell("ended")


if __name__ == "__main__":
    sys.exit(serve(live, int(sys.argv[1]), sys.argv[2:], MORE_DESCRIPTORS))
