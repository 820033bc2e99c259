"""Functions: WebAssembly modules, run by wasmtime in processes of their own; see `function_host` for those. This is the agent's side, which never imports the engine.

    <dir>/functions/<name>/     one instance: instance.json, lock, and what its host writes
    <dir>/functions/.new/       what is being laid out or removed; emptied at start
    <dir>/functions/.code/      native code by module and engine, each with the keyed hash that this node gave it; `key`

Native code is loaded only where its keyed hash is right: it was compiled here, from the module with this digest, by this engine, and nobody has changed it since. Else it is compiled anew.
As with containers, the disk is the truth: who holds an instance's lock lives, and what is written down has happened.
"""

import asyncio
import contextlib
import fcntl
import importlib.util
import json
import logging
import os
import platform
import secrets
import select
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any

from ..images import Image, ImageError, ImageStore
from ..images.manifest import MODULE_FILE
from . import cgroups, function_seccomp, outside
from .face import Ability, Capabilities, Failed, Key, Order, Output, Phase, Refused, Stats, Status
from .function_call import Answer, ask
from .function_code import NativeCode, engine_version, memory_file, whole
from .function_frames import PROBE, PROBE_MEMORY
from .function_spec import limits
from .instance import alive, ended, held, known, over, present, read, readable, tail, unheld

log = logging.getLogger(__name__)

FIRST_ID = 0x6F00_0000
"""User of the first function on the host; each has one of its own. Below those of containers, above those of systemd and of people."""

COMPILER_ID = FIRST_ID - 1
"""User of a compiler."""

MAX_INSTANCES = 256
"""Instances on the disk, the ended ones too."""

MAX_CALLS = 256
"""Calls of the agent under way, of all functions: each holds a socket and an answer of at most 1 MiB."""

SPAWNER_S, START_S, COMPILE_S = 30.0, 30.0, 120.0
"""A spawner, a host, a compiler that has said nothing by then hangs. The engine is loaded from disk in the first; the last may have used its minute of processor time on a slow machine."""

MAX_WORD = 4096
"""Bytes of what a host or compiler says first."""

LEFT_S = 10.0
"""A host that was killed is gone by then."""

@dataclass(frozen=True, slots=True)
class Settings:
    """`log_bytes`: kept of each stream of a function."""

    log_bytes: int = 1 << 20


class FunctionDriver:
    """The driver of functions, and of batch jobs that are WebAssembly; see `face.Driver`.

    Args:
        directory: the agent's data folder's part for workloads; absolute.
        store: where the modules are.
    """

    def __init__(self, directory: Path, store: ImageStore, settings: Settings = Settings()) -> None:
        self._folder, self._store, self._settings = directory / "functions", store, settings
        self._new = self._folder / ".new"
        self._code = NativeCode(self._folder / ".code", self._new)
        self._capabilities: Capabilities | None = None
        self._spawner: tuple[subprocess.Popen[bytes], socket.socket] | None = None
        self._busy: dict[str, asyncio.Lock] = {}
        self._laying, self._spawning = asyncio.Lock(), asyncio.Lock()
        self._serving: dict[str, Key] = {}
        self._calls = 0
        for folder in (directory, self._folder, self._new, self._folder / ".code"):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leaving in self._new.iterdir():
            shutil.rmtree(leaving, ignore_errors=True) if leaving.is_dir() else leaving.unlink()
        # Instances are not awaited on the disk when they are made: what a power cut left of one is no instance, and nothing of it runs.
        for entry in os.scandir(self._folder):
            if not entry.name.startswith(".") and read(Path(entry.path, "instance.json")) is None:
                shutil.rmtree(entry.path, ignore_errors=True)

    def folder(self, key: Key) -> Path:
        """An instance's folder, there or not."""
        return self._folder / _name(key)

    def close(self) -> None:
        """Let the spawner end; what runs goes on."""
        if self._spawner is not None:
            process, channel = self._spawner
            self._spawner = None
            channel.close()
            try:
                process.wait(LEFT_S)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    # -- what can be done ----------------------------------------------------------------------------------------------------

    async def probe(self) -> Capabilities:
        """Compile and run a module, and say what worked."""
        cannot = dict.fromkeys(
            (Ability.CHECKPOINT, Ability.RESTORE, Ability.SNAPSHOT, Ability.MIGRATE_OUT, Ability.MIGRATE_IN, Ability.LIVE, Ability.INCREMENTAL, Ability.LAZY), "a function keeps nothing between two calls",
        ) | {Ability.PAUSE: "a function that nobody calls stands still", Ability.EXEC: "a function's program is its module alone", Ability.NETWORK: "a module has no way to ask for one", Ability.DISK_LIMIT: "a module writes to no disk"}
        cannot |= {Ability.USER_NAMESPACE: "each function has a user of its own instead"}
        if not function_seccomp.there():
            cannot[Ability.SECCOMP] = "the kernel does not filter system calls, or their numbers on this architecture are not known"
        runtime, why = "", ""
        if importlib.util.find_spec("wasmtime") is None:
            why = "wasmtime is not installed (pip install 'novacron[functions]')"
        else:
            runtime = f"wasmtime {engine_version()}"
            try:
                await self._try()
            except (Refused, Failed, OSError) as error:
                why = str(error)
        if why:
            cannot |= dict.fromkeys((ability for ability in Ability if ability not in cannot), why)
        self._capabilities = Capabilities("function", "function", runtime, platform.machine(), (), cgroups.read().layout, platform.release(), cannot)
        return self._capabilities

    async def _try(self) -> None:
        key = Key(f"probe-{secrets.token_hex(6)}", 1)
        digest = sha256(PROBE).hexdigest()
        module = self._new / f"{key.id}.wasm"
        await asyncio.to_thread(module.write_bytes, PROBE)
        try:
            await self._compiled(digest, module)
            await asyncio.to_thread(self._lay_out, Order(key, "", {}, {"limits": {"memory": PROBE_MEMORY}, "concurrency": 1}), digest, None)
            await self._begin(key)
            answer = await self.call(key.id, b"")
            if (answer.what, answer.code) != ("exited", 7):
                raise Failed("start", f"the probe's function answered {answer.what} {answer.code} instead of 7", "look at the node")
            ended = await self.stop(key, LEFT_S)
            if ended.exit is None:
                raise Failed("stop", f"the probe's function ended by {ended.reason or ended.phase.value}", "see the reason")
        finally:
            module.unlink(missing_ok=True)
            await self.delete(key)

    async def _ready(self) -> None:
        if self._capabilities is None:
            await self.probe()
        assert self._capabilities is not None
        self._capabilities.demand(Ability.START)

    # -- native code ---------------------------------------------------------------------------------------------------------

    async def _compiled(self, digest: str, module: Path) -> int:
        """A descriptor's worth of verified native code is on the disk after this; milliseconds that compiling took, 0 where it was there."""
        if await asyncio.to_thread(self._code.verified, digest) is not None:
            return 0
        began = time.monotonic()
        raw = await asyncio.to_thread(whole, module)
        if sha256(raw).hexdigest() != digest:
            raise Refused("image", f"the module on this node is not what its digest sha256:{digest} says", "remove the image, and bring it again")
        target = self._new / f"{digest}-{secrets.token_hex(4)}.code"
        given = memory_file(raw)
        out = os.open(target, os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_CLOEXEC, 0o600)
        try:
            word = await self._spawn({"what": "compile", "uid": COMPILER_ID if outside.machine_root() else 0}, [given, out], COMPILE_S)
            if word.startswith("bad "):
                raise Refused("image", word[4:], "build it for wasm32-wasi, preview 1")
            if word != "compiled":
                raise Failed("image", f"the module could not be compiled: {word or 'its compiler took too much time or memory'}", "look at the node, or build a smaller module")
            await asyncio.to_thread(self._code.keep, digest, target, out)
        finally:
            os.close(given)
            os.close(out)
            target.unlink(missing_ok=True)
        return round((time.monotonic() - began) * 1000)

    # -- prepare -------------------------------------------------------------------------------------------------------------

    async def prepare(self, order: Order) -> Status:
        await self._ready()
        limits(order)
        async with self._laying:
            if not self.folder(order.key).exists():
                try:
                    image = await asyncio.to_thread(self._store.find, order.image)
                    if not image.config.module:
                        raise Refused("image", "is not a WebAssembly module", "submit it as a container, or name a module")
                    digest = image.config.diff_ids[0]
                    took = await self._compiled(digest, self._store.lower(image)[0] / MODULE_FILE)
                    await asyncio.to_thread(self._lay_out, order, digest, image, took)
                except ImageError as error:
                    raise Refused(error.field, error.problem, error.remedy) from None
                except OSError as error:
                    raise Failed("disk", f"the function could not be laid out: {error.strerror}", "look at the disk of the data folder") from None
        return self._status(order.key)

    def _lay_out(self, order: Order, digest: str, image: Image | None, compiled_ms: int = 0) -> None:
        """Write an instance's folder, all or nothing; blocks."""
        limit, present = limits(order), self._present()
        if len(present) >= MAX_INSTANCES:
            raise Refused("instances", f"there are {len(present)} on this node, the most there may be", "delete those that have ended")
        taken = {entry.get("slot") for entry in present.values()}
        slot = next(number for number in range(MAX_INSTANCES + 1) if number not in taken)
        folder = self.folder(order.key)
        laid = self._new / folder.name
        shutil.rmtree(laid, ignore_errors=True)
        laid.mkdir(mode=0o700)
        told = {
            **asdict(limit), "args": [order.key.id, *limit.args], "what": "run", "job": order.job, "folder": str(folder), "uid": FIRST_ID + slot if outside.machine_root() else 0, "log_bytes": self._settings.log_bytes,
        }
        (laid / "lock").touch(mode=0o600)
        (laid / "instance.json").write_text(json.dumps({
            "id": order.key.id, "epoch": order.key.epoch, "slot": slot, "image": image.digest if image else "", "layers": [digest] if image else [], "module": digest, "compiled_ms": compiled_ms, "told": told,
        }))
        os.rename(laid, folder)

    # -- start, end ----------------------------------------------------------------------------------------------------------

    async def start(self, key: Key) -> Status:
        self._instance(key)
        await self._ready()
        async with self._one(key):
            return await self._begin(key)

    async def _begin(self, key: Key) -> Status:
        status = self._status(key)
        if status.phase is Phase.PREPARED and not held(self.folder(key)):
            instance = self._instance(key)
            if (code := await asyncio.to_thread(self._code.verified, instance["module"])) is None:
                await self._again(instance)
                code = await asyncio.to_thread(self._code.verified, instance["module"])
            if code is None:
                raise Failed("start", "its native code is not what was compiled here", "look at who writes to the data folder")
            lock = os.open(self.folder(key) / "lock", os.O_RDWR | os.O_CLOEXEC)
            native = memory_file(code)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                word = await self._spawn(instance["told"], [lock, native], START_S)
            except BlockingIOError:
                word = ""
            finally:
                os.close(lock)
                os.close(native)
            status = self._status(key)
            if word != "running" and status.phase is not Phase.RUNNING and not (status.phase is Phase.ENDED and status.exit is not None):
                raise Failed("start", status.reason or "its host ended without a word", "see the reason; delete it before it is tried again")
        if status.phase is Phase.RUNNING and not self._instance(key)["told"]["job"]:
            self._serving[key.id] = key
        return status

    async def _again(self, instance: dict[str, Any]) -> None:
        """Compile what an earlier engine, or somebody else, left no good code of."""
        if not instance["layers"]:
            return
        with contextlib.suppress(ImageError):
            image = await asyncio.to_thread(self._store.find, f"sha256:{instance['image']}")
            await self._compiled(instance["module"], self._store.lower(image)[0] / MODULE_FILE)

    async def wait(self, key: Key) -> Status:
        return await over(self.folder(key), lambda: self._status(key), lambda: self._watched(key))

    async def stop(self, key: Key, grace_s: float) -> Status:
        """Calls that run are ended with it: the hub has no other place for them, and a job's exit is told as that of a signal."""
        status = self._status(key)
        if status.phase is Phase.RUNNING:
            self._kill(key, signal.SIGTERM)
            with contextlib.suppress(TimeoutError):
                return await asyncio.wait_for(self.wait(key), grace_s)
            self._kill(key, signal.SIGKILL)
            return await self._gone(key)
        return status

    async def delete(self, key: Key) -> None:
        folder = self.folder(key)
        async with self._one(key):
            if folder.exists():
                if self._status(key).phase is Phase.RUNNING:
                    self._kill(key, signal.SIGKILL)
                    await self._gone(key)
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(unheld(self.folder(key)), LEFT_S)
                if held(self.folder(key)):
                    raise Failed("delete", "its host does not end", "look at the node: a process that cannot be killed waits for its kernel or disk")
                gone = self._new / f"{folder.name}.gone"
                await asyncio.to_thread(shutil.rmtree, gone, True)
                os.rename(folder, gone)
                await asyncio.to_thread(shutil.rmtree, gone, True)
        self._busy.pop(folder.name, None)
        if self._serving.get(key.id) == key:
            del self._serving[key.id]
        if not self._present():
            await asyncio.to_thread(self.close)  # nothing is forked where nothing is wanted: the spawner's memory goes back

    def _kill(self, key: Key, number: int) -> None:
        watched = self._watched(key)
        if watched is not None:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(watched, number)
            os.close(watched)

    async def _gone(self, key: Key) -> Status:
        try:
            return await asyncio.wait_for(self.wait(key), LEFT_S)
        except TimeoutError:
            raise Failed("stop", "it does not end though it was killed", "look at the node: a process that cannot be killed waits for its kernel or disk") from None

    # -- calls ---------------------------------------------------------------------------------------------------------------

    async def call(self, function: str, stdin: bytes, timeout_s: float | None = None) -> Answer:
        """Run a function once. Raises `Refused` where it does not run here, or has no room; what it did wrong itself is in the answer.

        Args:
            timeout_s: less than the function's own; None: that.
        """
        key = self._serving.get(function)
        if key is None:
            await self.instances()
            key = self._serving.get(function)
        if key is None:
            raise Refused("id", f"no function {function[:80]} runs here", "submit it to the hub, or ask the node that runs it")
        if self._calls >= MAX_CALLS:
            raise Refused("calls", f"{MAX_CALLS} are under way on this node, the most there may be", "come again")
        told = self._instance(key)["told"]
        self._calls += 1
        try:
            return await ask(self.folder(key), stdin, min(timeout_s or told["timeout_s"], told["timeout_s"]))
        finally:
            self._calls -= 1

    # -- what is there -------------------------------------------------------------------------------------------------------

    async def stats(self, key: Key) -> Stats:
        """Of its host and workers; memory as their shares of what they share."""
        pid = self._status(key).pid
        if not pid:
            raise Refused("id", f"{_name(key)} does not run", "start it first")
        return await asyncio.to_thread(_used, pid)

    async def logs(self, key: Key, most: int) -> Output:
        self._instance(key)
        (out, cut), (err, also) = await asyncio.to_thread(lambda: [tail(self.folder(key) / f"{stream}.log", most) for stream in ("stdout", "stderr")])
        return Output(out, err, cut or also)

    async def status(self, key: Key) -> Status:
        return self._status(key)

    async def instances(self) -> Sequence[Status]:
        found = []
        for entry in (await asyncio.to_thread(self._present)).values():
            with contextlib.suppress(Refused):  # it was deleted in between
                status = self._status(Key(entry["id"], entry["epoch"]))
                found.append(status)
                if status.phase is Phase.RUNNING and not entry["told"]["job"] and self._serving.get(status.key.id, status.key).epoch <= status.key.epoch:
                    self._serving[status.key.id] = status.key
        return found

    def layers(self) -> set[str]:
        """Layers of the store that instances stand on."""
        return {layer for entry in self._present().values() for layer in entry.get("layers", ())}

    def _present(self) -> dict[str, dict[str, Any]]:
        return present(self._folder)

    def _instance(self, key: Key) -> dict[str, Any]:
        return known(self.folder(key), "function")

    def _status(self, key: Key) -> Status:
        """The lock first: where it is free, nothing changes any more."""
        self._instance(key)
        folder = self.folder(key)
        kept = held(folder)
        end, running = read(folder / "exit.json"), read(folder / "running.json")
        if end is not None:
            return ended(key, end)
        if running is None:
            return Status(key, Phase.PREPARED)
        if not (kept and alive(running)):
            if kept and (end := read(folder / "exit.json")) is not None:  # it ended between the two looks
                return ended(key, end)
            return Status(key, Phase.LOST, reason="it does not run any more, and nobody saw its end: the machine restarted, or its host was killed")
        return Status(key, Phase.RUNNING, int(running["pid"]), load_ms=float(running["load_ms"]))

    def _watched(self, key: Key) -> int | None:
        """A descriptor that becomes readable at the end of its host; None where that is not there yet, or any more."""
        running = read(self.folder(key) / "running.json")
        if running is None:
            return None
        try:
            found = os.pidfd_open(int(running["pid"]))
        except OSError:
            return None
        if alive(running):  # asked after the descriptor is there: then it is of the process that was meant
            return found
        os.close(found)
        return None

    def _one(self, key: Key) -> asyncio.Lock:
        return self._busy.setdefault(_name(key), asyncio.Lock())

    # -- the spawner ---------------------------------------------------------------------------------------------------------

    async def _spawn(self, told: dict[str, Any], descriptors: list[int], seconds: float) -> str:
        """Have something forked; its first word, empty where there is none in time. Asked for again where the spawner was killed and what it was asked for is not there."""
        word = await self._asked(told, descriptors, seconds)
        if word == "" and self._spawner_gone():
            for descriptor in descriptors:
                os.lseek(descriptor, 0, os.SEEK_SET)
            if told["what"] == "compile":
                os.ftruncate(descriptors[1], 0)
            word = await self._asked(told, descriptors, seconds)
        return word or ""

    def _spawner_gone(self) -> bool:
        """Its end of the channel is closed: it takes a moment until a process that was killed has ended, and what it is sent meanwhile is lost."""
        if self._spawner is None:
            return True
        look = select.poll()
        look.register(self._spawner[1], 0)
        return any(event & select.POLLHUP for _, event in look.poll(0))

    async def _asked(self, told: dict[str, Any], descriptors: list[int], seconds: float) -> str | None:
        """The first word of what was forked; empty where it ended without one, or was never forked, None where there is none in time."""
        async with self._spawning:
            hears, says = os.pipe2(os.O_CLOEXEC)
            try:
                request = json.dumps(told).encode()
                given = [descriptors[0], says, descriptors[1]] if told["what"] == "run" else [*descriptors, says]
                for attempt in (1, 2):
                    if self._spawner is None:
                        self._spawner = await asyncio.to_thread(self._launch)
                    try:
                        socket.send_fds(self._spawner[1], [request], given)
                        break
                    except OSError as error:  # it was killed, or hangs
                        await asyncio.to_thread(self.close)
                        if attempt == 2:
                            raise Failed("start", f"the process that starts functions cannot be reached: {error.strerror}", "look at the node") from None
            finally:
                os.close(says)
        try:
            async with asyncio.timeout(seconds):
                await readable(hears)
            return os.read(hears, MAX_WORD).decode("utf-8", "replace").strip()  # what is written at once, up to a pipe's page, is read at once
        except TimeoutError:
            return None
        finally:
            os.close(hears)

    def _launch(self) -> tuple[subprocess.Popen[bytes], socket.socket]:
        """Start it; blocks until it has loaded the engine."""
        ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
        root = Path(__file__).parents[3]
        groups = cgroups.read().folders(cgroups.KEEPERS)
        program = f"import sys; sys.path.insert(0, {str(root)!r}); from edge_runtime.workloads.drivers.function_spawner import spawner; sys.exit(spawner())"
        with theirs:
            process = subprocess.Popen(
                [sys.executable, "-I", "-c", program, str(theirs.fileno()), json.dumps(groups)], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, cwd="/", start_new_session=True,
                pass_fds=(theirs.fileno(),), env={"PATH": os.environ.get("PATH", os.defpath), "LC_ALL": "C.UTF-8"},
            )
        ours.settimeout(SPAWNER_S)
        try:
            said = ours.recv(16)
        except OSError:
            said = b""
        assert process.stderr is not None
        if said != b"ready":
            process.kill()
            words = process.stderr.read(2000).decode("utf-8", "replace").strip()
            ours.close()
            with process:
                pass
            raise Failed("start", f"the process that starts functions did not come up: {words or 'no word'}", "look at the node")
        process.stderr.close()
        ours.setblocking(False)  # a spawner that does not listen must not hold the agent up
        return process, ours


def _name(key: Key) -> str:
    """A folder. Ids have no `+`."""
    return f"{key.id.replace(':', '+')}.{key.epoch}"


def _used(pid: int) -> Stats:
    """Of a process and its children. An agent that is not root may not look into a worker, which is closed against its own user too: what of its memory is no file's is taken for its share then."""
    ticks, memory, count = 0, 0, 0
    try:
        children = [int(one) for one in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    except OSError:
        children = []
    for one in (pid, *children):
        with contextlib.suppress(OSError, ValueError, IndexError):
            fields = Path(f"/proc/{one}/stat").read_bytes().rpartition(b")")[2].split()
            try:
                rollup = Path(f"/proc/{one}/smaps_rollup").read_text()
                memory += next(int(row.split()[1]) << 10 for row in rollup.splitlines() if row.startswith("Pss:"))
            except PermissionError:
                resident, shared = (int(pages) for pages in Path(f"/proc/{one}/statm").read_text().split()[1:3])
                memory += (resident - shared) * os.sysconf("SC_PAGE_SIZE")
            ticks += int(fields[11]) + int(fields[12]) + (int(fields[13]) + int(fields[14]) if one == pid else 0)
            count += 1
    return Stats(ticks * 1_000_000_000 // os.sysconf("SC_CLK_TCK"), memory, count)
