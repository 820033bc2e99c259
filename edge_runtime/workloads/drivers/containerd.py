"""Containers by containerd, over its gRPC API: the same documents, images, limits and boundaries as the direct driver's (`container`), which this one stands on.

    <dir>/<handler>/containers/<name>/    one instance, as the direct driver has it, and the named pipes of its output
    <dir>/<handler>/containers/.new/      what is being laid out or removed; emptied at start

containerd holds the container: its shim is the parent of the first process, outlives both containerd and the agent, and keeps the exit status until we have asked for it and written it down. Beside it stands a small
keeper of ours (`containerd_keeper`) for output, network and lease. Images stay in our store, verified and unpacked once: containerd is given the root's mount when the task is made, and no second copy of anything.
Our namespace there is `novacron`; labels say whose a container is, so what an agent left that lost its folder is found and removed.

containerd may end: what runs goes on, is seen, and its output is kept. What needs containerd says that it is away; an end that nobody but the shim knows is told when it is back.
"""

import asyncio
import hashlib
import json
import logging
import os
import signal
import socket
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ..images import Config, Image, ImageStore
from . import cgroups, containerd_wire, keeping
from .container import START_S, ContainerDriver
from .container_laying import CONTAINERD_FIRST_ID, Fill, Settings, Ways
from .container_runtime import LEFT_S
from .containerd_client import Absent, Away, Client
from .containerd_keeper import STREAMS, pipe_of, unmount_layers
from .face import Ability, Capabilities, Exit, Failed, Key, Order, Output, Phase, Ran, Refused, Status
from .instance import LOOK_S, SNAPSHOT, alive, bounded, held, read, readable, unheld
from .keepers import Keepers

log = logging.getLogger(__name__)

SOCKET = "/run/containerd/containerd.sock"
"""Where containerd listens, if nobody has said otherwise."""

LAYERS = "/run/novacron/layers"
"""Where a container's layers are mounted for the moment in which its root is put together: never in its folder, which is removed with all that is in it."""

KEEPER = Path(__file__).with_name("containerd_keeper.py")

AGAIN_S = 1.0
"""Before a keeper that could not be started is tried again, and between two looks at whether containerd is back."""

MAX_ASKED = 30
"""A shim that is asked so often and does not tell how its container ended is broken: it is lost then, not waited for without end."""

ANSWER = 8192
"""Bytes of a keeper's answer."""

AGENT, INSTANCE, WORKLOAD, EPOCH = "novacron/agent", "novacron/instance", "novacron/workload", "novacron/epoch"
"""Labels: which agent's folder, which instance in it; for people, which workload."""

UNTOLD = "it has ended; how is told when containerd is back"


@dataclass(frozen=True, slots=True)
class Handler:
    """One of containerd's runtime handlers.

    Attributes:
        name: the driver's, and its folder's.
        runtime: what containerd calls it.
        shim: the program that containerd looks for.
        own_kernel: its containers have a kernel of their own: then they have neither ids nor control groups of this one.
    """

    name: str
    runtime: str
    shim: str
    own_kernel: bool


RUNC = Handler("containerd", "io.containerd.runc.v2", "containerd-shim-runc-v2", False)
KATA = Handler("kata", "io.containerd.kata.v2", "containerd-shim-kata-v2", True)


class ContainerdDriver(ContainerDriver):
    """The driver of containers under containerd; see `face.Driver`. Needs root, and grpc.

    Args:
        directory: the agent's folder of workloads; absolute. The driver has one in it.
        store: where the images are.
        path: of containerd's socket.
        handler: what runs them.
    """

    parent = f"{cgroups.PARENT}-containerd"

    def __init__(self, directory: Path, store: ImageStore, settings: Settings = Settings(), *, path: str = SOCKET, handler: Handler = RUNC) -> None:
        super().__init__(directory / handler.name, store, replace(settings, first_id=CONTAINERD_FIRST_ID))
        self._handler, self._client = handler, Client(path)
        self._keepers = Keepers(self._groups, KEEPER)
        self._agent = _hash(str(self._folder))
        self._tending: dict[str, asyncio.Lock] = {}
        self._begun: set[str] = set()
        """Of whose tasks it has been seen that they are started."""
        self._asked: dict[str, int] = {}
        """How often containerd could not tell how one ended, though it answered."""

    @property
    def name(self) -> str:
        """Of the driver."""
        return self._handler.name

    def close(self) -> None:
        """What runs goes on."""
        super().close()
        self._client.close()

    # -- what can be done ----------------------------------------------------------------------------------------------------

    async def probe(self) -> Capabilities:
        """Run a container, with everything that can be had, and say what worked; then see to what an earlier agent left."""
        from .containerd_probe import find  # needs this module

        self._ways, self._capabilities = await find(self, self._settings, self._groups, self._handler, self._client)
        try:
            await self._sweep()
            for name, entry in (await asyncio.to_thread(self._present)).items():
                key = Key(entry["id"], entry["epoch"])
                await self._look_after(key)
                if (self._folder / name / SNAPSHOT).exists():
                    await self._go_on(key)
        except Away:
            pass  # told by the report; what is there is seen to when it is asked about
        except Failed as error:
            log.warning("what an earlier agent left to %s could not be seen to: %s", self._handler.name, error)
        return self._capabilities

    async def _sweep(self) -> None:
        """Remove containers of this agent of which it has no folder: it was killed while it removed them, or somebody has removed the folder."""
        told = await self._client.call(containerd_wire.LIST_CONTAINERS, filters=[f'labels."{AGENT}"=={self._agent}'])
        for one in told["containers"]:
            if not (self._folder / one["labels"].get(INSTANCE, "")).is_dir():
                log.warning("container %s of containerd is nobody's any more, and is removed", one["labels"].get(INSTANCE))
                await self._remove(one["id"])

    # -- prepare, start ------------------------------------------------------------------------------------------------------

    def lay_out(self, order: Order, config: Config, lower: Sequence[Path], ways: Ways, image: Image | None = None, fill: Fill | None = None, was: int = -1) -> None:
        def more(final: Path, laid: Path, document: dict[str, Any], told: dict[str, Any]) -> None:
            document["root"]["path"] = "rootfs"  # in the shim's own folder, where it mounts what it is given
            told["layers"] = f"{LAYERS}/{_hash(str(final))}"
            for stream in STREAMS:
                os.mkfifo(pipe_of(str(laid), stream), 0o600)
            if fill is not None:
                fill(final, laid, document, told)

        super().lay_out(order, config, lower, ways, image, more, was)

    def _leased(self, key: Key) -> Path:
        return self._folder.parent.parent / "containers" / self._path(key).name  # a site that renews it does not know by which driver it runs

    async def begin(self, key: Key) -> Status:
        status, folder = self._status(key), self._path(key)
        if status.phase is not Phase.PREPARED or held(folder):
            return status
        await self._forget(key)
        line = await self._keeper(key)
        if line is None:
            await self._failed(key, {"failed": self._keeper_said(key) or "its keeper ended without a word"})
            raise Failed("start", self._status(key).reason, "see the reason; delete it before it is tried again")
        with line:
            try:
                told = await self._tell(line, await self._make(key))
                if "failed" not in told:
                    await self._client.call(containerd_wire.START, container_id=self._id(key))
                    self._begun.add(folder.name)
                    return self._status(key)
            except Failed as error:
                told = {"failed": error.problem}
        await self._failed(key, told)
        if told.get("taken"):
            raise Refused("spec.network.ports", str(told["failed"]), "publish it as another host_port, or place it on another node")
        if not told.get("lapsed"):
            raise Failed("start", str(told["failed"]), "see the reason; delete it before it is tried again")
        return self._status(key)

    async def _keeper(self, key: Key) -> socket.socket | None:
        """Start a keeper; what is said to it, None where it did not come up."""
        ours, its = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        ours.setblocking(False)

        def start() -> str:
            with its:
                return self._keepers.start(self._path(key), START_S, (its.fileno(),))

        try:
            if await asyncio.to_thread(start) == "laid":
                return ours
        except BaseException:
            ours.close()
            raise
        ours.close()
        return None

    async def _tell(self, line: socket.socket, pid: int) -> dict[str, Any]:
        """Tell a keeper what to keep; its answer."""
        try:
            line.send(json.dumps({"pid": pid}).encode())
            async with asyncio.timeout(START_S):
                heard = await asyncio.get_running_loop().sock_recv(line, ANSWER)
        except OSError:  # it has ended, or it hangs
            heard = b""
        return dict(json.loads(heard)) if heard else {"failed": "its keeper ended without a word"}

    async def _make(self, key: Key) -> int:
        """The container and its task, which does not run yet; its first process."""
        folder, name, told = self._path(key), self._id(key), read(self._path(key) / "keeper.json") or {}
        spec = await asyncio.to_thread((folder / "config.json").read_bytes)
        labels = {AGENT: self._agent, INSTANCE: folder.name, WORKLOAD: key.id, EPOCH: str(key.epoch)}
        await self._client.call(containerd_wire.CREATE_CONTAINER, container={
            "id": name, "labels": labels, "runtime": {"name": self._handler.runtime}, "spec": {"type_url": containerd_wire.SPEC, "value": spec},
        })
        lower = [f"{told['layers']}/{at}" for at in range(len(told["lower"]))]
        root = containerd_wire.overlay(lower, f"{folder}/disk/upper", f"{folder}/disk/work")
        out, err = (pipe_of(str(folder), stream) for stream in STREAMS)
        made = await self._client.call(containerd_wire.CREATE, container_id=name, rootfs=[root], stdout=out, stderr=err)
        return int(made["pid"])

    async def _failed(self, key: Key, told: Mapping[str, Any]) -> None:
        """It did not start: nothing of it runs, and why is written down."""
        folder = self._path(key)
        with suppress(Away):  # then it is removed with the rest of it
            await self._forget(key)
        with suppress(TimeoutError):
            await asyncio.wait_for(unheld(folder), LEFT_S)
        await asyncio.to_thread(keeping.write_end, str(folder), {"at_ms": int(time.time() * 1000), **told})

    # -- its end -------------------------------------------------------------------------------------------------------------

    async def wait(self, key: Key) -> Status:
        while True:
            status = await self.status(key)
            if status.phase is Phase.PREPARED and not held(self._path(key)):
                raise Refused("id", f"{self._path(key).name} was never started", "start it first")
            if status.phase in (Phase.ENDED, Phase.LOST):
                return status
            await self._look_after(key)
            watched = self._watched(key)
            if watched is None:
                await asyncio.sleep(AGAIN_S if status.reason == UNTOLD else LOOK_S)
                continue
            try:
                await readable(watched)
            finally:
                os.close(watched)

    async def _look_after(self, key: Key) -> None:
        """Give one that runs a keeper where that was killed, and start what an agent that was killed had not."""
        folder, running = self._path(key), read(self._path(key) / "running.json")
        if running is None or (folder / "exit.json").exists() or not alive(running):
            return
        async with self._tending.setdefault(folder.name, asyncio.Lock()):
            if not held(folder):
                line = await self._keeper(key)
                told = {"failed": self._keeper_said(key) or "it ended without a word"}
                if line is not None:
                    with line:
                        told = await self._tell(line, int(running["pid"]))
                if "failed" in told:
                    log.warning("%s has no keeper, and another could not be started: %s", folder.name, told["failed"])
                    await asyncio.sleep(AGAIN_S)
                    return
            if folder.name not in self._begun and not self._one(key).locked():
                with suppress(Failed):
                    if (await self._client.call(containerd_wire.GET, container_id=self._id(key)))["process"]["status"] == containerd_wire.CREATED:
                        await self._client.call(containerd_wire.START, container_id=self._id(key))
                    self._begun.add(folder.name)

    async def _look_at_end(self, key: Key) -> None:
        """Ask containerd how one has ended of which that is not written down, write it down, and let containerd forget it."""
        folder, running = self._path(key), read(self._path(key) / "running.json")
        if running is None or (folder / "exit.json").exists() or running.get("boot") != _boot() or (alive(running) and not self._handler.own_kernel):
            return
        async with self._tending.setdefault(folder.name, asyncio.Lock()):
            if (folder / "exit.json").exists():
                return
            answers = False
            try:
                process = (await self._client.call(containerd_wire.GET, container_id=self._id(key)))["process"]
                if alive(running) and process["status"] != containerd_wire.STOPPED:
                    return
                answers = True
                end = self._end(folder, await self._client.call(containerd_wire.WAIT, LEFT_S, container_id=self._id(key)))
            except Absent:
                end = {"lost": "containerd knows it no more: somebody removed it there, or its shim was killed"}
            except Failed as error:
                self._asked[folder.name] = asked = self._asked.get(folder.name, 0) + answers
                if asked < MAX_ASKED:
                    return
                end = {"lost": f"containerd cannot tell how it ended: {error.problem}"}
            with suppress(TimeoutError):  # the end of what it wrote
                await asyncio.wait_for(unheld(folder), LEFT_S)
            if not folder.exists() or (folder / "exit.json").exists():  # a start that failed has said so meanwhile
                return
            await asyncio.to_thread(keeping.write_end, str(folder), end)
            with suppress(Failed):  # else with the rest of it
                await self._remove(self._id(key))
            self._begun.discard(folder.name)
            self._asked.pop(folder.name, None)

    def _end(self, folder: Path, told: Mapping[str, Any]) -> dict[str, Any]:
        """What is written down of an end, by containerd's answer and what the kernel counted in its control group."""
        end, when = _exit(int(told["exit_status"])), told["exited_at"] or {"seconds": int(time.time()), "nanos": 0}
        killed = end.signal == signal.SIGKILL
        before = int((read(folder / "running.json") or {}).get("memory_kills", 0))  # of what made it, in its control group
        kills = max(0, keeping.memory_kills(read(folder / "keeper.json") or {}) - before)
        return {
            "code": end.code, "signal": end.signal, "out_of_memory": keeping.for_memory(end.code, kills), "memory_kills": kills, "at_ms": when["seconds"] * 1000 + when["nanos"] // 1_000_000,
            "lapsed": killed and (folder / "lapsed.json").exists(),
        }

    async def kill(self, key: Key, number: int) -> None:
        try:
            await self._signal(key, number)
        except Failed as error:
            await self._look_at_end(key)  # what has just ended needs none
            if not isinstance(error, Absent) and self._status(key).phase in (Phase.RUNNING, Phase.PAUSED):
                raise

    async def _signal(self, key: Key, number: int) -> None:
        await self._client.call(containerd_wire.KILL, container_id=self._id(key), signal=number)

    async def _freeze(self, key: Key) -> None:
        await self._client.call(containerd_wire.PAUSE, container_id=self._id(key))

    async def _thaw(self, key: Key) -> None:
        await self._client.call(containerd_wire.RESUME, container_id=self._id(key))

    async def _forget(self, key: Key) -> None:
        await self._remove(self._id(key))
        await asyncio.to_thread(unmount_layers, f"{LAYERS}/{self._id(key)}")

    async def _remove(self, name: str) -> None:
        """End a container and take it from containerd; what is not there is gone already."""
        with suppress(Absent):
            process = (await self._client.call(containerd_wire.GET, container_id=name))["process"]
            if process["status"] != containerd_wire.STOPPED:
                with suppress(Absent):  # it has just ended
                    await self._client.call(containerd_wire.KILL, container_id=name, signal=int(signal.SIGKILL), all=True)
                if process["status"] == containerd_wire.PAUSED:
                    await self._client.call(containerd_wire.RESUME, container_id=name)
                await self._client.call(containerd_wire.WAIT, LEFT_S, container_id=name)
            await self._client.call(containerd_wire.DELETE, container_id=name)
        with suppress(Absent):
            await self._client.call(containerd_wire.DELETE_CONTAINER, id=name)

    # -- what is there -------------------------------------------------------------------------------------------------------

    async def status(self, key: Key) -> Status:
        await self._look_at_end(key)
        return self._status(key)

    async def instances(self) -> Sequence[Status]:
        for entry in (await asyncio.to_thread(self._present)).values():
            await self._look_at_end(Key(entry["id"], entry["epoch"]))
        return await super().instances()

    def _seen(self, key: Key) -> Status:
        folder = self._path(key)
        end, running = read(folder / "exit.json"), read(folder / "running.json")
        if end is not None and "lost" in end:
            return Status(key, Phase.LOST, reason=str(end["lost"]))
        if end is not None or running is None:
            return super()._seen(key)
        if running.get("boot") != _boot():
            return Status(key, Phase.LOST, reason="it does not run any more: the machine restarted")
        if not alive(running):
            return Status(key, Phase.RUNNING, int(running["pid"]), reason=UNTOLD)
        frozen = self._groups.frozen(self.group(key))
        return Status(key, Phase.PAUSED if frozen else Phase.RUNNING, int(running["pid"]))

    def _id(self, key: Key) -> str:
        """What containerd calls it: ids there have fewer characters than ours, and all agents of a machine share the namespace."""
        return _hash(str(self._path(key)))

    # -- commands in it ------------------------------------------------------------------------------------------------------

    async def exec(self, key: Key, args: Sequence[str], timeout_s: float) -> Ran:
        await self._ready(Ability.EXEC)
        if not args or any("\0" in one for one in args):
            raise Refused("args", "are empty, or have a zero byte", "give a command")
        folder = self._path(key)
        if self._running(key).phase is Phase.PAUSED:
            raise Refused("id", f"{folder.name} is paused", "resume it first")
        name, container = f"exec-{time.monotonic_ns()}", self._id(key)
        process = (read(folder / "config.json") or {})["process"] | {"args": list(args)}
        with ExitStack() as stack:
            pipes = [(path, stack.enter_context(open(_pipe(path, stack), "rb", buffering=0))) for path in (f"{folder}/{name}.{stream}" for stream in STREAMS)]
            await self._client.call(
                containerd_wire.EXEC, container_id=container, exec_id=name, stdout=pipes[0][0], stderr=pipes[1][0], spec={"type_url": containerd_wire.PROCESS_SPEC, "value": json.dumps(process).encode()},
            )
            starting = asyncio.ensure_future(self._client.call(containerd_wire.START, container_id=container, exec_id=name))
            try:
                async with asyncio.timeout(timeout_s):
                    await asyncio.shield(starting)
                    readers = [await _reader(pipe) for _, pipe in pipes]
                    (out, cut), (err, also), told = await asyncio.gather(
                        bounded(readers[0]), bounded(readers[1]), self._client.call(containerd_wire.WAIT, timeout_s + LEFT_S, container_id=container, exec_id=name),
                    )
            except TimeoutError:
                raise Failed("exec", f"{args[0][:80]} took longer than {timeout_s:g} s, and was killed", "give it more time") from None
            finally:
                await asyncio.shield(self._end_command(container, name, starting))
        return Ran(_exit(int(told["exit_status"])), Output(out, err, cut or also))

    async def _end_command(self, container: str, name: str, starting: "asyncio.Future[dict[str, Any]]") -> None:
        """Whether it runs still or not: nothing of it is left. Its start, which containerd goes on with whoever has lost patience, comes to its end first."""
        try:
            await starting
        except Failed:
            pass  # it never ran
        else:
            with suppress(Failed):  # it has ended
                await self._client.call(containerd_wire.KILL, container_id=container, exec_id=name, signal=int(signal.SIGKILL))
            with suppress(Failed):
                await self._client.call(containerd_wire.WAIT, LEFT_S, container_id=container, exec_id=name)
        with suppress(Failed):
            await self._client.call(containerd_wire.DELETE_PROCESS, container_id=container, exec_id=name)


def _hash(text: str) -> str:
    return hashlib.blake2b(text.encode(), digest_size=16).hexdigest()


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _exit(status: int) -> Exit:
    """Of a shim's number: 128 and the signal where one has ended it."""
    return Exit(status, max(0, status - 128) if 128 < status <= 192 else 0)


def _pipe(path: str, stack: ExitStack) -> int:
    """A named pipe that is removed with `stack`; its reading end, without waiting for the other one."""
    os.mkfifo(path, 0o600)
    stack.callback(os.unlink, path)
    return os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)


async def _reader(pipe: Any) -> asyncio.StreamReader:
    reader = asyncio.StreamReader()
    await asyncio.get_running_loop().connect_read_pipe(lambda: asyncio.StreamReaderProtocol(reader), pipe)
    return reader
