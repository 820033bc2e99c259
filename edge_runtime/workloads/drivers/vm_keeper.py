"""What stands between the agent and one virtual machine that boots a disk of its own: as `qemu_keeper`, but for what is known of the guest, which is nothing.

    python -I -S vm_keeper.py SOCKET_DESCRIPTOR [CONTROL_GROUP_FOLDER...]

Its serial console is its output. It is believed to boot when that has the first byte. A guest that knows of us may open the port `novacron.0` and write `ready`; it is answered

    go SECONDS SEED HOSTNAME

by which it sets its clock and its random numbers. A template is a guest that is stopped between the two; its clones get the answer, each its own. An agent asks as a micro-VM's keeper is asked:

    {"do": "powerdown"}   {"do": "kill"}   {"do": "pause"}   {"do": "resume"}   {"do": "copy", "path": "/where/an/empty/disk.qcow2"}
    {"do": "version"}     {"do": "save", "path": "/a/pipe/that/is/read"}
    {"do": "ahead", "path": "/where/an/empty/disk.qcow2", "name": NAME, "speed": BYTES_IN_A_SECOND}
    {"do": "since", "path": "/where/an/empty/disk.qcow2", "name": NAME}

    {"do": "leave", "folder": "/with/sockets", "speed": BYTES_IN_A_SECOND}   {"do": "stay"}   {"do": "go"}   {"do": "drop"}     a move while it runs: see `vm_live_keeper`

With `came` in `keeper.json` it does not boot: it goes on from what `save` has written of another one. Nothing of it has run before `running.json` is there. Where its disk went ahead of the rest, the rest lies over
it (`upper`, as long as that file is there) and is written into it first. With `arrives` it waits for what comes through the sockets of that folder.
"""

import fcntl
import os
import selectors
import socket
import struct
import sys
import time

if __package__:
    from .keeper_network import Network
    from .keeping import LOOK_S, Lapsed, Log, Trouble, lease_s, serve, started_ticks, tell, write
    from .qemu_keeper import CHUNK, MORE_DESCRIPTORS, Keeper, Lines, Machine, live, load, save
    from .qemu_qmp import QmpError
    from .vm_arriving import Arriving
    from .vm_leaving import Leaving
    from .vm_live_keeper import LEFT
else:  # run as a script: its neighbours, without the package, which would load the agent
    sys.path.append(os.path.dirname(os.path.abspath(__file__)))
    from keeper_network import Network  # type: ignore[import-not-found,no-redef]
    from keeping import LOOK_S, Lapsed, Log, Trouble, lease_s, serve, started_ticks, tell, write  # type: ignore[import-not-found,no-redef]
    from qemu_keeper import CHUNK, MORE_DESCRIPTORS, Keeper, Lines, Machine, live, load, save  # type: ignore[import-not-found,no-redef]
    from qemu_qmp import QmpError  # type: ignore[import-not-found,no-redef]
    from vm_arriving import Arriving  # type: ignore[import-not-found,no-redef]
    from vm_leaving import Leaving  # type: ignore[import-not-found,no-redef]
    from vm_live_keeper import LEFT  # type: ignore[import-not-found,no-redef]

READY = ["ready"]
"""What a guest says on its port when it may be copied."""

SEED_BYTES = 32
"""Random bytes that a guest is given."""


COPY, COPY_SET = "copy", 100
"""What a copy of a disk, and its job, are called in QEMU; the number of its descriptor set."""

COPY_EVENTS = ("BLOCK_JOB_COMPLETED", "BLOCK_JOB_CANCELLED")
"""How a copy ends."""

UPPER = "rest"
"""What lies over the disk of a machine that came, and the job that writes it into that, are called so in QEMU."""

FOLD_S = 600.0
"""Writing that takes longer hangs: it is what the guest wrote in the minutes in which its disk was carried."""

SAVED = "saved"
"""What the pipe that a machine is saved to is called in QEMU."""

FASTEST = 1 << 40
"""Bytes in a second with which a machine is saved: no bound, as it stands still. QEMU's own is 128 MiB."""


TUNSETIFF, SIOCGIFINDEX, SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCBRADDIF = 0x4004_54CA, 0x8933, 0x8913, 0x8914, 0x89A2
IFF_UP, IFF_TAP, IFF_NO_PI, IFF_VNET_HDR = 1, 2, 0x1000, 0x4000
"""Linux's numbers: linux/if_tun.h, linux/sockios.h, linux/if.h."""


def bridged(name: str, bridge: str) -> int:
    """A new port of a bridge of this node; goes with its descriptor. Raises `Trouble`."""
    tap = os.open("/dev/net/tun", os.O_RDWR | os.O_CLOEXEC)
    try:
        fcntl.ioctl(tap, TUNSETIFF, struct.pack("16sH22x", name.encode(), IFF_TAP | IFF_NO_PI | IFF_VNET_HDR))
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as line:
            index, = struct.unpack_from("16xi", fcntl.ioctl(line, SIOCGIFINDEX, struct.pack("16s24x", name.encode())))
            fcntl.ioctl(line, SIOCBRADDIF, struct.pack("16si20x", bridge.encode(), index))
            flags, = struct.unpack_from("16xH", fcntl.ioctl(line, SIOCGIFFLAGS, struct.pack("16s24x", name.encode())))
            fcntl.ioctl(line, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), flags | IFF_UP))
        return tap
    except OSError as error:
        os.close(tap)
        raise Trouble(f"it cannot be connected to the bridge {bridge}: {error.strerror}") from None


def go(hostname: str) -> bytes:
    """The answer to a guest that is ready."""
    return f"go {int(time.time())} {os.urandom(SEED_BYTES).hex()} {hostname}\n".encode()


def make_template(told: dict, descriptors: dict) -> dict:  # type: ignore[type-arg]
    """Boot a guest until it is ready, and save it. Returns what it took."""
    began = time.monotonic()
    machine, lines, said = Machine(told, descriptors), Lines(), b""
    selector = selectors.DefaultSelector()
    try:
        machine.qmp.begin()
        machine.qmp.ask("cont")
        for name, port in machine.ports.items():
            port.setblocking(False)
            selector.register(port, selectors.EVENT_READ, name)
        end, ready = began + told["boot_s"], False
        while not ready:
            found = selector.select(max(0.0, end - time.monotonic()))
            if time.monotonic() >= end:
                raise machine.trouble(f"the guest was not ready within {told['boot_s']:g} s; its console said last: {said.decode('utf-8', 'replace').strip()[-300:] or 'nothing'}")
            for key, _ in found:
                data = _received(key.fileobj)  # type: ignore[arg-type]
                if data == b"":
                    raise machine.trouble(f"the guest ended before it was ready; its console said last: {said.decode('utf-8', 'replace').strip()[-300:] or 'nothing'}")
                if key.data == "console":
                    said = (said + (data or b""))[-CHUNK:]
                else:
                    ready = ready or READY in lines.take(data or b"")
        booted = time.monotonic() - began
        save(machine, descriptors["state"])
        return {"template": True, "booted_s": round(booted, 3), "saved_s": round(time.monotonic() - began - booted, 3), "at_ms": int(time.time() * 1000)}
    except QmpError as error:
        raise machine.trouble(str(error)) from None
    finally:
        machine.end()


def _received(port: socket.socket) -> bytes | None:
    """What has come, empty at the end, None where nothing has."""
    try:
        return port.recv(CHUNK)
    except BlockingIOError:
        return None
    except ConnectionError:
        return b""


class VmKeeper(Keeper):
    """The life of one machine."""

    def __init__(self, told: dict, descriptors: dict) -> None:  # type: ignore[type-arg]
        self.told, self.folder, self.lines = told, told["folder"], Lines()
        self.console = Log(os.path.join(self.folder, "stdout.log"), told["log_bytes"])
        self.wish, self.started, self.asking, self.exec = "", False, {}, None
        self.copying: list = []  # type: ignore[type-arg]
        """The agent that waits for a copy."""
        self.since = ""
        """The name under which a copy of the disk went ahead: QEMU has a bitmap of it, of what was written since."""
        self.saving: list = []  # type: ignore[type-arg]
        """The agent that waits until it is saved."""
        self.leaving: Leaving | None = None
        self.arriving: Arriving | None = None
        self.listener: socket.socket | None = None
        self.state = descriptors.get("came", -1)
        self.upper = told["upper"]["path"] if told.get("upper") and os.path.exists(told["upper"]["path"]) else ""
        if self.upper:
            told["command"] = told["upper"]["command"]
            descriptors = {**descriptors, UPPER: os.open(self.upper, os.O_RDWR | os.O_CLOEXEC)}
        if told.get("tap"):
            descriptors = {**descriptors, "tap": bridged(told["tap"]["name"], told["tap"]["bridge"])}
        self.machine = Machine(told, descriptors)
        self.network = Network(told["network"], self.machine.process.pid, self.folder) if told["network"] else None
        self.selector = selectors.DefaultSelector()

    def keep(self) -> dict:  # type: ignore[type-arg]
        """From its beginning to its end; returns how that was."""
        machine, told = self.machine, self.told
        try:
            with open("/proc/sys/kernel/random/boot_id") as handle:
                boot = handle.read().strip()
            pid, came = machine.process.pid, told.get("came")
            running = {"pid": pid, "started": started_ticks(pid), "boot": boot, "keeper": os.getpid()}
            if not came:
                write(os.path.join(self.folder, "running.json"), {**running, "at_ms": int(time.time() * 1000)})
            if told["lease"] and lease_s(told["lease"]) <= 0:
                raise Lapsed("its lease was over before it began")
            machine.qmp.begin()
            if self.network is not None:
                self.network.start()
            if came:
                if told.get("arrives"):
                    self.arriving = Arriving(self, told["arrives"])
                    if not self.arriving.wait():
                        return self.ending()
                else:
                    load(machine, self.state, True, told["boot_s"])
                if self.upper:
                    self.fold()
                write(os.path.join(self.folder, "running.json"), {**running, "at_ms": int(time.time() * 1000)})
            elif "state_descriptor" in told:
                load(machine, told["state_descriptor"])
            for port in machine.ports.values():
                port.setblocking(False)
            machine.qmp.ask("cont")
            if came:
                if told.get("tap"):
                    machine.qmp.ask("announce-self", initial=50, max=500, rounds=5, step=100)
                self.begun()
                if self.arriving is not None:
                    self.arriving.begun()
            elif "state_descriptor" in told:
                self.answer_guest()
            self.watch()
        except QmpError as error:
            raise machine.trouble(str(error)) from None
        finally:
            machine.qmp.drain()
            machine.end()
            self.drain()
            if self.network is not None:
                self.network.stop()
        for one in self.asking:
            one.close()
        return self.ending()

    def ending(self) -> dict:  # type: ignore[type-arg]
        """What is written down: a guest that switched its machine off has ended well."""
        now = int(time.time() * 1000)
        shutdown = next((data for name, data in self.machine.qmp.events if name == "SHUTDOWN" and data.get("guest")), None)
        if shutdown is not None and shutdown.get("reason") == "guest-reset":
            raise Trouble("the guest restarted, which a clone that was given a kernel cannot: start it anew")
        if shutdown is not None:
            return {"code": 0, "signal": 0, "out_of_memory": False, "at_ms": now, "lapsed": False}
        if self.wish:
            return {"code": 137, "signal": 9, "out_of_memory": False, "at_ms": now, "lapsed": self.wish == "lapsed"}
        if self.machine.starved:
            return {"code": 137, "signal": 9, "out_of_memory": True, "at_ms": now, "lapsed": False}
        raise self.machine.trouble(f"QEMU ended by itself ({self.machine.process.returncode})")

    def watch(self) -> None:
        """Until it has ended."""
        register, told = self.selector.register, self.told
        ended = os.pidfd_open(self.machine.process.pid)
        register(ended, selectors.EVENT_READ, lambda: None)
        register(self.machine.qmp_line, selectors.EVENT_READ, self.heard_qemu)
        self.attend()
        for name, port in self.machine.ports.items():
            register(port, selectors.EVENT_READ, lambda name=name: self.read(name))
        retry = 0.0
        if self.network is not None:
            register(self.network.ended, selectors.EVENT_READ, self.network)
        deadline = time.monotonic() + told["boot_s"]
        if not told["boot_s"]:
            self.begun()
        while self.machine.process.poll() is None and not self.wish:
            now, lease = time.monotonic(), told["lease"]
            if lease and lease_s(lease) <= 0:
                self.wish = "lapsed"
                return
            if not self.started and now >= deadline:
                raise self.machine.trouble(f"the guest wrote nothing to its serial console within {told['boot_s']:g} s: it does not boot")
            if self.network is not None and retry:
                retry = self.network.tend(self.selector)
            live = self.leaving.wait_s if self.leaving is not None else None
            waits = [live] * (live is not None) + [LOOK_S] * bool(lease) + [deadline - now] * (not self.started) + [retry] * (retry > 0)
            for key, _ in self.selector.select(max(0.0, min(waits)) if waits else None):
                if isinstance(key.data, Network):
                    retry = key.data.tend(self.selector)
                else:
                    key.data()
            self.copied()
            self.saved()
            if self.leaving is not None:
                self.leaving.look()

    def attend(self) -> None:
        """Agents may ask."""
        if self.listener is None:
            listener = self.listener = self.listen()
            self.selector.register(listener, selectors.EVENT_READ, lambda: self.accept(listener))

    def heard_qemu(self) -> None:
        """Events; where QEMU has closed the line, it ends."""
        if not self.machine.qmp.drain():
            self.selector.unregister(self.machine.qmp_line)

    def begun(self) -> None:
        """It is seen to run."""
        if not self.started:
            self.started = True
            tell("running")

    def read(self, name: str) -> None:
        """What a port of the guest has: no more than one part, as a guest that writes without end has no more of its keeper than its turn."""
        data = _received(self.machine.ports[name])
        if data == b"":
            self.selector.unregister(self.machine.ports[name])
        elif data and name == "console":
            self.console.take(data)
            self.begun()
        elif data and READY in self.lines.take(data):
            self.answer_guest()

    def drain(self) -> None:
        """What it had written, after its end."""
        while data := _received(self.machine.ports["console"]):
            self.console.take(data)

    def answer_guest(self) -> None:
        """That it may go on. One that does not read has no room for more, and gets none: what it says must not hold up its keeper."""
        try:
            self.machine.ports["control"].send(go(self.told["hostname"]))
        except OSError:
            pass

    def fold(self) -> None:
        """Have QEMU write what lies over the disk into it, and go on without that. The guest stands still, so that a keeper which is killed at it can be followed by another one that does it again; the file goes when all
        of it is in the disk."""
        qmp, jobs = self.machine.qmp, ("BLOCK_JOB_READY", *COPY_EVENTS)
        try:
            qmp.ask("blockdev-set-active", active=True)  # QEMU 10 has them inactive until the guest goes on, and commits nothing then
        except QmpError as error:
            if "CommandNotFound" not in str(error):
                raise
        qmp.ask("block-commit", **{"job-id": UPPER, "device": UPPER, "base-node": "disk"})
        if qmp.until_one(jobs, "device", UPPER, FOLD_S)[0] == "BLOCK_JOB_READY":
            qmp.events = [(name, data) for name, data in qmp.events if name != "BLOCK_JOB_READY"]
            qmp.ask("block-job-complete", device=UPPER)
        name, data = qmp.until_one(COPY_EVENTS, "device", UPPER, FOLD_S)
        if name != "BLOCK_JOB_COMPLETED" or "error" in data:
            raise self.machine.trouble(f"what was written since its disk was carried could not be written into that: {data.get('error', name)}")
        qmp.ask("blockdev-del", **{"node-name": UPPER})
        qmp.events = [(name, data) for name, data in qmp.events if not name.startswith("BLOCK_JOB")]
        os.unlink(self.upper)
        folder = os.open(self.folder, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        try:
            os.fsync(folder)
        finally:
            os.close(folder)
        self.upper = ""

    def copy(self, path: str, line: socket.socket, ahead: str = "", since: str = "", speed: int = 0) -> dict | None:  # type: ignore[type-arg]
        """Have QEMU write the disk, as it is now, into an empty one, while the guest goes on: it has no rights to do harm, other than a program that would read what a guest wrote as root.

        Args:
            ahead: the copy has only what lies over the disks below, and from then on it is remembered under this name what is written.
            since: the copy has only what was written since then; the guest stands still.
            speed: bytes in a second at most, 0 for no bound.
        """
        if self.copying and self.copying[0] in self.asking:
            return {"failed": "another copy is being made"}
        if self.copying:  # for an agent that has gone
            self.stop_copy()
        if since and (since != self.since or not os.path.exists(os.path.join(self.folder, "paused"))):
            return {"failed": f"nothing is known of {since[:80]!r}, or it does not stand still"}
        qmp, target = self.machine.qmp, os.open(path, os.O_RDWR | os.O_CLOEXEC)
        try:
            qmp.ask_with(target, "add-fd", **{"fdset-id": COPY_SET})
        finally:
            os.close(target)
        try:
            qmp.ask("blockdev-add", **{"driver": "qcow2", "node-name": COPY, "file": {"driver": "file", "filename": f"/dev/fdset/{COPY_SET}", "locking": "off"}})
            job = {"job-id": COPY, "device": "disk", "target": COPY, "speed": speed}
            if ahead:
                if self.since:
                    qmp.ask("block-dirty-bitmap-remove", node="disk", name=self.since)
                    self.since = ""
                # In one step, so that nothing is written between the two.
                qmp.ask("transaction", actions=[{"type": "block-dirty-bitmap-add", "data": {"node": "disk", "name": ahead}}, {"type": "blockdev-backup", "data": {**job, "sync": "top"}}])
                self.since = ahead
            elif since:  # the bitmap stays as it is: where this comes to nothing, it is done again
                qmp.ask("blockdev-backup", **job, sync="bitmap", bitmap=since, **{"bitmap-mode": "never"})
            else:
                qmp.ask("blockdev-backup", **job, sync="full")
        except QmpError:
            self.forget_copy()
            raise
        self.copying = [line]
        return None

    def copied(self) -> None:
        """Answer whoever waits for a copy that is over."""
        if not self.copying:
            return
        qmp = self.machine.qmp
        qmp.drain()  # the end may have come together with an answer
        over = [data for name, data in qmp.events if name in COPY_EVENTS and data.get("device") == COPY]
        if over:
            qmp.events = [(name, data) for name, data in qmp.events if not name.startswith("BLOCK_JOB")]
            line, self.copying = self.copying[0], []
            self.forget_copy()
            if line in self.asking:
                self.answer(line, {"failed": f"the copy was not made: {over[-1]['error']}"} if "error" in over[-1] else {"done": True})

    def stop_copy(self) -> None:
        """No more of it."""
        qmp = self.machine.qmp
        try:
            qmp.ask("block-job-cancel", device=COPY, force=True)
        except QmpError:
            pass  # it has just ended by itself
        qmp.until_one(COPY_EVENTS, "device", COPY)
        qmp.events = [(name, data) for name, data in qmp.events if not name.startswith("BLOCK_JOB")]
        self.copying = []
        self.forget_copy()

    def forget_copy(self) -> None:
        """Close what it was written to."""
        for command, arguments in (("blockdev-del", {"node-name": COPY}), ("remove-fd", {"fdset-id": COPY_SET})):
            try:
                self.machine.qmp.ask(command, **arguments)
            except QmpError:
                pass  # it had not come that far

    def save(self, path: str, line: socket.socket) -> dict | None:  # type: ignore[type-arg]
        """Have QEMU write all of a machine that stands still, but for its disks, into a pipe that the agent reads: what QEMU wrote to a file would count as its own memory. Its disks are whole then."""
        if self.copying and self.copying[0] not in self.asking:
            self.stop_copy()
        if self.copying or self.saving or not self.started or not os.path.exists(os.path.join(self.folder, "paused")):
            return {"failed": "it is being copied or saved, has not booted yet, or does not stand still"}
        qmp, target = self.machine.qmp, os.open(path, os.O_WRONLY | os.O_NONBLOCK | os.O_CLOEXEC)  # without a reader it fails
        try:
            os.set_blocking(target, True)
            qmp.ask("migrate-set-capabilities", capabilities=[{"capability": "x-ignore-shared", "state": False}, {"capability": "events", "state": True}])
            qmp.ask("migrate-set-parameters", **{"max-bandwidth": FASTEST})
            qmp.ask_with(target, "getfd", fdname=SAVED)
        finally:
            os.close(target)
        qmp.events = [(name, data) for name, data in qmp.events if name != "MIGRATION"]  # of when it was loaded
        qmp.ask("migrate", uri=f"fd:{SAVED}")
        self.saving = [line]
        return None

    def saved(self) -> None:
        """Answer whoever waits until it is saved."""
        if not self.saving:
            return
        self.machine.qmp.drain()
        over = next((data.get("status") for name, data in self.machine.qmp.events if name == "MIGRATION" and data.get("status") in ("completed", "failed")), None)
        if over is not None:
            line, self.saving = self.saving[0], []
            if line in self.asking:
                self.answer(line, {"done": True} if over == "completed" else {"failed": str(self.machine.trouble("QEMU could not save it"))})

    def unsave(self) -> None:
        """No more of it: what goes on while it is saved would be stopped when that is over."""
        if self.saving:
            self.machine.qmp.ask("migrate_cancel")
            self.machine.qmp.until("MIGRATION", "status", ("completed", "failed", "cancelled"))
            line, self.saving = self.saving[0], []
            if line in self.asking:
                self.answer(line, {"failed": "it goes on"})

    def do(self, request: dict, line: socket.socket) -> dict | None:  # type: ignore[type-arg]
        """What is asked."""
        paused, left = os.path.join(self.folder, "paused"), os.path.join(self.folder, LEFT)
        if request["do"] in ("go", "drop", "leave", "stay"):
            return self.live(request, line, paused, left)
        if self.arriving is not None and not self.started and request["do"] not in ("kill", "version"):
            return {"failed": "it has not come yet"}
        if self.leaving is not None and self.leaving.going and request["do"] not in ("kill", "version", "powerdown"):
            if self.leaving.may:
                return {"failed": "it is leaving for another node"}
            self.leaving.end("something else is done with it")
        if request["do"] == "resume" and os.path.exists(left):
            return {"failed": "it has left for another node, which may be running it"}
        if request["do"] == "powerdown":
            self.machine.qmp.ask("system_powerdown")
        elif request["do"] == "version":
            found = self.machine.qmp.ask("query-version")["qemu"]  # type: ignore[index]
            return {"version": f"{found['major']}.{found['minor']}.{found['micro']}"}
        elif request["do"] == "save":
            return self.save(str(request["path"]), line)
        elif request["do"] == "resume":
            self.unsave()
            self.machine.qmp.ask("cont")
            if os.path.exists(paused):
                os.unlink(paused)
        elif request["do"] == "copy":
            return self.copy(str(request["path"]), line)
        elif request["do"] in ("ahead", "since"):
            return self.copy(str(request["path"]), line, speed=int(request.get("speed", 0)), **{request["do"]: str(request["name"])})
        elif request["do"] in ("kill", "pause"):
            return super().do(request, line)
        else:
            return {"failed": "that is not known here"}
        return {"done": True}

    def live(self, request: dict, line: socket.socket, paused: str, left: str) -> dict | None:  # type: ignore[type-arg]
        """What is asked of a move while it runs: see `vm_live_keeper`."""
        if request["do"] == "go":
            if self.arriving is None:
                return {"failed": "it does not come from another node"}
            if self.started:
                return {"done": True}
            self.arriving.go(line)
            return None
        if request["do"] == "drop":
            if self.arriving is None or self.started or self.arriving.begins:
                return {"failed": "it begins, or has begun"}
            self.wish = "kill"
            return {"done": True}
        if request["do"] == "stay":
            if self.leaving is not None:
                self.leaving.stay()
            if os.path.exists(paused) and os.path.exists(left):
                os.unlink(paused)
            return {"done": True}  # that it had left the agent forgets
        if self.copying and self.copying[0] not in self.asking:
            self.stop_copy()
        if self.copying or self.saving or not self.started or os.path.exists(paused) or (self.leaving is not None and self.leaving.stage != "ended"):
            return {"failed": "it is being copied or saved, leaves already, has not booted yet, or stands still"}
        try:
            self.leaving = Leaving(self, request, line)
        except OSError as error:
            return {"failed": f"what carries it does not answer: {error.strerror}"}
        return None


if __name__ == "__main__":
    sys.exit(serve(lambda folder, descriptors: live(folder, descriptors, VmKeeper, make_template), int(sys.argv[1]), sys.argv[2:], MORE_DESCRIPTORS))
