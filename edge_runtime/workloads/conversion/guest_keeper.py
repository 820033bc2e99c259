"""What stands between the agent and the guest of one converted workload: a small process that outlives the agent, with QEMU as its child. Run as a script.

    python -I -S guest_keeper.py FOLDER LOCK       descriptors of the tap (`tap` in keeper.json), if any, are inherited

The guest boots before the workload stands still. Nothing of the workload runs in it before this keeper has written `running.json`, and nothing once `stopped` is there.
An agent asks by lines of JSON over the socket `ask`; each answer is one line:

    {"do": "state"}                    how far it is: booting, ready, restored, running, dumped, ended
    {"do": "restore", "told": {..}}    answers when all of it is here and stands still: {"processes": [[pid, threads, descriptors], ..]}
    {"do": "go"}                       it is let go, after `running.json` is on the disk; it goes on with the logs that are in the folder by then
    {"do": "dump", "devices": [[PATH, DEVICE], ..]}     it stands still, and its state is on the disk `work`
    {"do": "resume"}                   after a dump: it goes on
    {"do": "signal", "number": 15}   {"do": "kill"}
"""

import json
import os
import secrets
import selectors
import socket
import sys
import time

if __package__:
    from ..drivers.keeping import PR_SET_NAME, Log, Trouble, for_memory, leave_group, libc, ordinary_turns, started_ticks, tell, write
    from ..drivers.qemu_keeper import CHUNK, MAX_ASKED, MAX_ASKING, QMP_S, Lines, Machine, Stream
    from ..drivers.qemu_qmp import QmpError
    from . import guest
else:
    here = os.path.dirname(os.path.abspath(__file__))
    sys.path += [here, os.path.join(here, os.pardir, "drivers")]
    import guest  # type: ignore[import-not-found,no-redef]
    from keeping import PR_SET_NAME, Log, Trouble, for_memory, leave_group, libc, ordinary_turns, started_ticks, tell, write  # type: ignore[import-not-found,no-redef]
    from qemu_keeper import CHUNK, MAX_ASKED, MAX_ASKING, QMP_S, Lines, Machine, Stream  # type: ignore[import-not-found,no-redef]
    from qemu_qmp import QmpError  # type: ignore[import-not-found,no-redef]

SAID = 2000
"""Bytes of a guest's words in an error."""

DRAIN_S = 2.0
"""What a guest has written is read for as long after its end."""

STATES = ("booting", "ready", "restoring", "restored", "running", "dumping", "draining", "dumped", "ended")


class Keeper:
    """The life of one guest."""

    def __init__(self, told: dict) -> None:  # type: ignore[type-arg]
        self.told, self.folder, self.state = told, told["folder"], "booting"
        self.lines, self.processes, self.flags, self.problem = Lines(), [], [], ""  # type: ignore[var-annotated]
        self.result: dict | None = None  # type: ignore[type-arg]
        self.waiting: socket.socket | None = None
        """The agent whose order the guest is at."""
        self.asking: dict = {}  # type: ignore[type-arg]
        names = {name: os.open(path, (os.O_RDWR if writable else os.O_RDONLY) | os.O_CLOEXEC) for name, path, writable in told["files"]}
        if told["tap"] >= 0:
            names["tap"] = told["tap"]
        names["ram"] = os.memfd_create("novacron-guest", os.MFD_CLOEXEC)
        os.ftruncate(names["ram"], told["memory_mb"] << 20)
        self.logs = {name: Log(os.path.join(self.folder, f"std{name}.log"), told["log_bytes"]) for name in ("out", "err")}
        self.listened()
        self.machine = Machine(told, names)
        for descriptor in names.values():
            os.close(descriptor)
        self.selector = selectors.DefaultSelector()

    def listened(self) -> None:
        """From now on what it writes is read up to the next mark."""
        self.token = secrets.token_hex(8)
        self.streams = {name: Stream(self.token, log.take) for name, log in self.logs.items()}

    def keep(self) -> dict:  # type: ignore[type-arg]
        """From its boot to its end; returns how that was."""
        machine = self.machine
        try:
            with open("/proc/sys/kernel/random/boot_id") as handle:
                boot = handle.read().strip()
            write(os.path.join(self.folder, "machine.json"), {"pid": machine.process.pid, "started": started_ticks(machine.process.pid), "boot": boot, "keeper": os.getpid()})
            machine.qmp.begin()
            machine.qmp.ask("cont")
            self.watch()
        except QmpError as error:
            raise machine.trouble(str(error)) from None
        finally:
            machine.end()
            self.drain()
        if self.result is None:
            raise machine.trouble(self.problem or "the guest ended before its program did")
        return {**self.result, "at_ms": int(time.time() * 1000)}

    def watch(self) -> None:
        """Until it has ended."""
        register, ports = self.selector.register, self.machine.ports
        register(os.pidfd_open(self.machine.process.pid), selectors.EVENT_READ, lambda: None)
        register(self.machine.qmp_line, selectors.EVENT_READ, self.machine.qmp.drain)
        listener = self.listen()
        register(listener, selectors.EVENT_READ, lambda: self.accept(listener))
        for name, port in ports.items():
            port.setblocking(False)
            register(port, selectors.EVENT_READ, lambda name=name: self.read(name))
        tell("running")
        deadline = time.monotonic() + self.told["boot_s"]
        while self.machine.process.poll() is None and self.result is None:
            late = deadline - time.monotonic() if self.state == "booting" else None
            if late is not None and late <= 0:
                raise self.machine.trouble(f"the guest did not boot within {self.told['boot_s']:g} s")
            for key, _ in self.selector.select(late):
                key.data()

    def drain(self) -> None:
        """What it had written, after its end."""
        for name, stream in self.streams.items():
            port = self.machine.ports[name]
            port.setblocking(False)
            try:
                while data := port.recv(CHUNK):
                    stream.feed(data)
            except OSError:
                pass

    def read(self, name: str) -> None:
        """What a port of the guest has."""
        try:
            data = self.machine.ports[name].recv(CHUNK)
        except (BlockingIOError, ConnectionError):
            return
        if not data:
            self.selector.unregister(self.machine.ports[name])
        elif name in self.streams:
            self.streams[name].feed(data)
            self.taken()
        elif name == "control":
            for words in self.lines.take(data):
                self.heard(words)

    def heard(self, words: list) -> None:  # type: ignore[type-arg]
        """An answer of the guest."""
        if words == ["ready"] and self.state == "booting":
            self.state = "ready"
            self.done({"done": True})
        elif words[0] == "flags" and self.state == "booting":
            self.flags = words[1:]
        elif words[0] == "process" and self.state in ("restoring", "dumping") and len(words) == 4:
            self.processes.append([int(word) for word in words[1:]])
        elif words[0] == "restored" and self.state == "restoring":
            self.state = "restored"
            self.done({"done": True, "processes": self.processes})
        elif words == ["went"]:
            self.done({"done": True})
        elif words == ["dumped"] and self.state == "dumping":
            self.state = "draining"
            self.taken()
        elif words[0] == "undumped" and self.state == "dumping":
            self.listened()
            self.state = "dumped"  # it stands still: `resume` is what helps
            self.done({"failed": " ".join(words)[:SAID]})
        elif words[0] == "trouble":
            self.problem = f"the guest says: {' '.join(words[1:])[:SAID]}"
            self.done({"failed": self.problem})
            raise self.machine.trouble(self.problem)
        elif words[0] == "exit" and self.state in ("restored", "running", "dumping", "draining", "dumped") and len(words) > 1 and words[1].isdigit():
            code = int(words[1]) & 0xFF
            kills = int(words[2]) if len(words) > 2 and words[2].isdigit() else 0
            self.result = {"code": code, "signal": code - 128 if 128 < code <= 192 else 0, "out_of_memory": for_memory(code, kills), "memory_kills": kills}

    def taken(self) -> None:
        """A dump is there when all that was written before is."""
        if self.state == "draining" and all(stream.ended for stream in self.streams.values()):
            self.state = "dumped"
            self.listened()
            self.done({"done": True, "processes": self.processes})

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
        if line in self.asking:
            self.selector.unregister(line)
            del self.asking[line]
            line.close()
        if self.waiting is line:
            self.waiting = None

    def asked(self, line: socket.socket) -> None:
        """A question, or a part of it."""
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
            answer = self.do(json.loads(self.asking[line]), line)
        except (ValueError, KeyError, TypeError) as error:
            answer = {"failed": f"that is no question: {error!r}"[:SAID]}
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

    def done(self, answer: dict) -> None:  # type: ignore[type-arg]
        """The guest has done what an agent waits for, who may have gone."""
        if self.waiting is not None:
            self.answer(self.waiting, answer)

    def say(self, script: str) -> None:
        """Send the guest a script. Raises `Trouble` where it takes nothing any more."""
        self.machine.send(guest.framed(script))

    def do(self, request: dict, line: socket.socket) -> dict | None:  # type: ignore[type-arg]
        """What is asked; None where the answer comes later."""
        wish, say = request["do"], self.say
        needed = {"restore": ("ready",), "go": ("restored",), "dump": ("running",), "resume": ("dumped",)}.get(wish)
        if wish == "state":
            return {"state": self.state, "processes": self.processes, "flags": self.flags}
        if wish == "ready":
            if self.state != "booting":
                return {"done": True}
        elif wish == "kill":
            self.result = {"code": 137, "signal": 9, "out_of_memory": False}
            return {"done": True}
        elif wish == "signal":
            say(guest.kill(int(request["number"])))
            return {"done": True}
        elif needed is None:
            return {"failed": "that is not known here"}
        elif self.state not in needed:
            return {"failed": f"the guest is {self.state}"}
        elif wish == "restore":
            self.state = "restoring"
            say(guest.restore(**request["told"]))
        elif wish == "go":
            self.logs = {name: log.again() for name, log in self.logs.items()}
            self.listened()
            write(os.path.join(self.folder, "running.json"), {"at_ms": int(time.time() * 1000)})
            self.state = "running"
            say(guest.go())
        elif wish == "dump":
            self.state, self.processes = "dumping", []
            say(guest.dump(request["devices"], self.token))
        elif wish == "resume":
            self.state = "running"
            say(guest.resume())
        self.waiting = line
        return None


def main() -> int:
    """A keeper's life. The lock is held by being open."""
    ordinary_turns()
    folder = sys.argv[1]
    with open(os.path.join(folder, "keeper.json")) as handle:
        told = json.load(handle)
    told["tap"] = int(sys.argv[3])
    leave_group(told["keepers"])
    libc.prctl(PR_SET_NAME, b"novacron-keeper", 0, 0, 0)
    try:
        result = Keeper(told).keep()
    except (Trouble, OSError, ValueError) as error:
        result = {"failed": str(error)[:SAID], "at_ms": int(time.time() * 1000)}
    write(os.path.join(folder, "exit.json"), result)
    for path, value in told["groups"]:
        if value is None:
            try:
                os.rmdir(os.path.dirname(path))
            except OSError:
                pass
    try:
        os.unlink(told["ask"])
    except OSError:
        pass
    tell("ended")
    return 0


if __name__ == "__main__":
    sys.exit(main())
