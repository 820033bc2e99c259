"""What every driver has whose instances are QEMUs: how they are started, ended, watched and told of. What is laid out for them, and what is known of the guest, is the driver's own.

    <dir>/<what>/<name>/    one instance: instance.json, keeper.json, its disks, and what its keeper writes
    <dir>/<what>/.new/      what is being laid out or removed; emptied at start

What is on the disk is the truth, as for containers. Each has a keeper of its own (`qemu_keeper`), which outlives the agent; a QEMU dies with its keeper.
"""

import asyncio
import hashlib
import json
import os
import shutil
import subprocess
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from typing import Any, ClassVar

from ..images import ImageStore
from . import cgroups, lease
from .face import Ability, Capabilities, Failed, Key, Order, Output, Phase, Refused, Stats, Status
from .instance import alive, ended, held, known, over, present, read, tail, unheld
from .keepers import Keepers

MAX_INSTANCES = 64
"""Machines of one driver on the disk, the ended ones too; each that runs takes some 50 MB beside its workload."""

QEMU_OWN = 160 << 20
"""Bytes that a QEMU may use beside its guest's memory: its program, its translated code and its buffers take up to 100 MB."""

START_S = 60.0
"""A clone that has not started its program by then hangs; it takes 0.2 s."""

ASK_S = 30.0
"""A keeper that does not answer within this hangs."""

LEFT_S = 10.0
"""A QEMU that was killed, and its keeper, are gone by then."""

ASKS = Path("/run/novacron/microvms")
"""Sockets of keepers: their paths must be short."""

PROGRAMS = ("qemu-system-x86_64",)


class QemuDriver(ABC):
    """The common part of drivers; see `face.Driver`. Needs root.

    Args:
        directory: its own, in the agent's data folder; absolute.
        store: where the images are.
    """

    WHAT: ClassVar[str]
    """What an instance is called."""

    FOLDER: ClassVar[str]
    """Where instances are, below `directory`."""

    KEEPER: ClassVar[str]
    """The script that keeps one."""

    def __init__(self, directory: Path, store: ImageStore) -> None:
        self._folder, self._store = directory / self.FOLDER, store
        self._new = self._folder / ".new"
        self._groups = cgroups.read()
        self._capabilities: Capabilities | None = None
        self._keepers = Keepers(self._groups, Path(__file__).with_name(self.KEEPER))
        self._busy: dict[str, asyncio.Lock] = {}
        self._laying = asyncio.Lock()
        for folder in (directory, self._folder, self._new):
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
        for leaving in self._new.iterdir():
            shutil.rmtree(leaving, ignore_errors=True) if leaving.is_dir() else leaving.unlink()

    def folder(self, key: Key) -> Path:
        """An instance's folder, there or not."""
        return self._path(key)

    def close(self) -> None:
        """What runs goes on."""
        self._keepers.close()

    async def probe(self) -> Capabilities:
        """Boot a guest: that is the proof."""
        self._capabilities = await asyncio.to_thread(self._find)
        return self._capabilities

    @property
    def capabilities(self) -> Capabilities | None:
        """What the last probe found; None before it."""
        return self._capabilities

    @abstractmethod
    def _find(self) -> Capabilities:
        """What can be done here; blocks."""

    async def _ready(self, ability: Ability = Ability.START) -> None:
        if self._capabilities is None:
            await self.probe()
        assert self._capabilities is not None
        self._capabilities.demand(Ability.START)
        self._capabilities.demand(ability)

    def _limits(self, group: str, memory_mb: int, order: Order, quota_us: int = 0) -> list[list[Any]]:
        """The control groups of a QEMU whose guest has so much memory: files and what to write, None for those that take its process. They hold a QEMU that misbehaves."""
        quota = quota_us + cgroups.PERIOD_US // 10 if quota_us else 0
        return self._groups.of_machine(group, (memory_mb << 20) + QEMU_OWN, order.requests.get("cpu", 0) or 100, quota)

    # -- start, end ----------------------------------------------------------------------------------------------------------

    async def start(self, key: Key) -> Status:
        async with self._one(key):
            status = self._status(key)
            if status.phase is not Phase.PREPARED or held(self._path(key)):
                return status  # what an earlier agent started runs also where this one could start nothing
            await self._ready()
            word = await asyncio.to_thread(self._launch, key)
            status = self._status(key)
            if word != "running" and (read(self._path(key) / "exit.json") or {}).get("taken"):
                raise Refused("spec.network.ports", status.reason, "publish it as another host_port, or place it on another node")
            if word != "running" and status.phase not in (Phase.RUNNING, Phase.LOST) and (status.exit is None):
                raise Failed("start", status.reason or self._keeper_said(key) or "its keeper ended without a word", "see the reason; delete it before it is tried again")
            return status

    @abstractmethod
    def _launch(self, key: Key) -> str:
        """The keeper's first word; blocks."""

    async def wait(self, key: Key) -> Status:
        return await over(self._path(key), lambda: self._status(key), lambda: self._watched(key))

    async def kill(self, key: Key) -> Status:
        """End one that runs, at once. Raises `Failed` where it does not end."""
        try:
            await self.ask(key, {"do": "kill"})
        except Failed:  # the keeper hangs, or has just gone
            await self._force(key)
        try:
            return await asyncio.wait_for(self.wait(key), LEFT_S)
        except TimeoutError:
            await self._force(key)
        try:
            return await asyncio.wait_for(self.wait(key), LEFT_S)
        except TimeoutError:
            raise Failed("stop", "it does not end though it was killed", "look at the node: a process that cannot be killed waits for its kernel or disk") from None

    async def _force(self, key: Key) -> None:
        """Kill QEMU itself; a keeper that lives writes down its end."""
        import signal

        running = read(self._path(key) / "running.json")
        if running is not None and alive(running):
            with suppress(OSError):
                os.kill(int(running["pid"]), signal.SIGKILL)

    async def delete(self, key: Key) -> None:
        folder = self._path(key)
        async with self._one(key):
            if not folder.exists():
                return
            if self._status(key).phase in (Phase.RUNNING, Phase.PAUSED):
                await self.kill(key)
            try:
                await asyncio.wait_for(unheld(folder), LEFT_S)
            except TimeoutError:
                raise Failed("delete", "its keeper does not end", "look at the node") from None
            gone = self._new / f"{folder.name}.gone"
            await asyncio.to_thread(shutil.rmtree, gone, True)
            os.rename(folder, gone)
            await asyncio.to_thread(shutil.rmtree, gone, True)
            lease.remove(self._lease(key))
        self._busy.pop(folder.name, None)

    def renew(self, key: Key, until_ms: int) -> None:
        lease.write(self._lease(key), until_ms)

    def lease_ms(self, key: Key) -> int:
        return lease.read(self._lease(key))

    def _lease(self, key: Key) -> Path:
        """What its lease is called after: a site renews the lease of a workload before it knows which driver runs it, so all have the same."""
        return self._folder.parent / "containers" / name_of(key)

    # -- pause, stats, logs, exec --------------------------------------------------------------------------------------------

    async def pause(self, key: Key) -> Status:
        async with self._one(key):
            if self._running(key).phase is Phase.RUNNING:
                await self.ask(key, {"do": "pause"})
        return self._status(key)

    async def resume(self, key: Key) -> Status:
        async with self._one(key):
            if self._running(key).phase is Phase.PAUSED:
                await self.ask(key, {"do": "resume"})
        return self._status(key)

    async def stats(self, key: Key) -> Stats:
        """Of QEMU, the guest in it: what the node spends."""
        self._running(key)
        return self._groups.stats(f"{cgroups.PARENT}/{name_of(key)}")

    async def logs(self, key: Key, most: int) -> Output:
        self._instance(key)
        (out, cut), (err, also) = await asyncio.to_thread(lambda: [tail(self._path(key) / f"{stream}.log", most) for stream in ("stdout", "stderr")])
        return Output(out, err, cut or also)

    async def ask(self, key: Key, request: Mapping[str, Any], seconds: float = ASK_S) -> dict[str, Any]:
        """A question to its keeper. Raises `Failed`."""
        writer = None
        try:
            async with asyncio.timeout(seconds):
                reader, writer = await asyncio.open_unix_connection(str(ask_path(self._path(key))), limit=4 << 20)
                writer.write(json.dumps(request).encode() + b"\n")
                await writer.drain()
                answer: Any = json.loads(await reader.readline() or b"{}")
        except (OSError, ValueError) as error:  # TimeoutError is an OSError
            raise Failed(str(request["do"]), f"its keeper does not answer ({str(error) or 'in time'})", "look at whether it still runs") from None
        finally:
            if writer is not None:
                writer.close()
        if not isinstance(answer, dict) or not answer or "failed" in answer:
            raise Failed(str(request["do"]), str(answer.get("failed") or "it ended meanwhile") if isinstance(answer, dict) else "its keeper answers nonsense", "look at whether it still runs")
        return answer

    # -- what is there -------------------------------------------------------------------------------------------------------

    async def status(self, key: Key) -> Status:
        return self._status(key)

    async def instances(self) -> Sequence[Status]:
        found = []
        for entry in (await asyncio.to_thread(self._present)).values():
            with suppress(Refused):  # it was deleted in between
                found.append(self._status(Key(entry["id"], entry["epoch"])))
        return found

    def layers(self) -> set[str]:
        """Layers of the store that instances stand on."""
        return {layer for entry in self._present().values() for layer in entry.get("layers", ())}

    def _present(self) -> dict[str, dict[str, Any]]:
        return present(self._folder)

    def _path(self, key: Key) -> Path:
        return self._folder / name_of(key)

    def _instance(self, key: Key) -> dict[str, Any]:
        return known(self._path(key), self.WHAT)

    def _status(self, key: Key) -> Status:
        """The lock first: where it is free, nothing changes any more. A QEMU dies with its keeper."""
        leased = bool(self._instance(key).get("leased", False))
        folder = self._path(key)
        kept = held(folder)
        end, running = read(folder / "exit.json"), read(folder / "running.json")
        if end is not None:
            if end.get("lapsed"):
                return Status(key, Phase.LOST, reason="it was ended since nobody could prove that it is still this node's", leased=leased)
            return replace(ended(key, end), leased=leased)
        if running is None:
            return Status(key, Phase.PREPARED, leased=leased)
        if not kept:
            return Status(key, Phase.LOST, reason="it does not run any more, and nobody saw its end: the machine restarted, or its keeper was killed", leased=leased)
        return Status(key, Phase.PAUSED if (folder / "paused").exists() else Phase.RUNNING, int(running["pid"]), leased=leased)

    def _running(self, key: Key) -> Status:
        status = self._status(key)
        if status.phase not in (Phase.RUNNING, Phase.PAUSED):
            raise Refused("id", f"{name_of(key)} does not run ({status.phase.value})", "start it first")
        return status

    def _watched(self, key: Key) -> int | None:
        """A descriptor that becomes readable at the end of its keeper; None where it is not there yet, or any more."""
        running = read(self._path(key) / "running.json")
        if running is None:
            return None
        try:
            found = os.pidfd_open(int(running["keeper"]))
        except OSError:
            return None
        if held(self._path(key)):  # asked again: then it is of the process that was meant, not of a later one with its number
            return found
        os.close(found)
        return None

    def _keeper_said(self, key: Key) -> str:
        data, _ = tail(self._path(key) / "keeper.err", 2000)
        return data.decode("utf-8", "replace").strip()

    def _one(self, key: Key) -> asyncio.Lock:
        return self._busy.setdefault(name_of(key), asyncio.Lock())


def name_of(key: Key) -> str:
    """What an instance's folder and control group are called."""
    return lease.name_of(key.id, key.epoch)


def ask_path(folder: Path) -> Path:
    """The socket of the keeper of an instance's folder."""
    return ASKS / hashlib.blake2b(str(folder).encode(), digest_size=12).hexdigest()


def open_to_group(path: str) -> bool:
    """Whether its group, or everybody, may read and write a file."""
    mode = os.stat(path).st_mode
    return mode & 0o060 == 0o060 or mode & 0o006 == 0o006


def version_of(path: str) -> str:
    """What a program says of itself; its name where it says nothing."""
    try:
        said = subprocess.run([path, "--version"], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=10).stdout
    except (OSError, subprocess.SubprocessError):
        return os.path.basename(path)
    return (said.splitlines() or [os.path.basename(path)])[0][:200]
