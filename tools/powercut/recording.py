"""The run that is recorded: the real agent on a recorded ext4, with a bus, a hub and devices that keep it busy; killed, stopped and cut off from power on the way."""

import asyncio
import contextlib
import itertools
import json
import os
import random
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import aiomqtt

from hub.link import SOCKET_OPTIONS
from tools.bench.agent import Agent
from tools.bench.harness import ROOT, die_with_parent, free_port
from tools.demo import ask, until
from tools.novactl.client import Api, CommandError

from ..ending import ended
from .block_log import BlockLog
from .claims import Claims
from .fuse_disk import RecordingDisk
from .mounts import attach, mount, program, unmount
from .wiretap import Wiretap

EDGE = "bench-edge"
DISK_BYTES = 40 << 20
"""Two databases, their WALs grown to 4 MiB each and up to 12, and the file system's own journal."""

GROUP_BLOCKS = 4096
"""Blocks of 4 KiB in a group of the file system. The second group has the backup of the superblock, which a larger disk has anyway: ext4 overwrites
its superblock in place, and a sector torn there is for the backup to mend."""

OPTIONS = "noauto_da_alloc"
"""ext4 without its mercy for programs that rename a file which they did not sync: what is not synced may be lost, as the standard says."""

RATE = 60
"""Readings per second: most commits then hold one or two of them, so that a write is a moment of its own."""

CHANGE_S = 0.25
"""Time between two changes from above: a twin, a command or a rule, in turn."""

DEVICES = 4
RETAINED = 150
"""Records kept behind the hub's receipt: so few that freeing and vacuuming is in the recording."""

ENDS = ("kill", "power", "stop")
"""How the lives of the agent end, in turn: SIGKILL; the power of its disk goes; in good order."""

LIVES_MAX, LIFE_WRITES = 8, 80
"""Lives in one recording at most, and the writes that each has at least: a start alone makes some twenty."""

LIFE_EFFECTS = 40
"""What the world must have seen of a life before it ends: one that ends before it did anything tells nothing."""

PROGRAMS = (("-m", "edge_runtime"), ("-m", "tools.powercut.small_agent"))
"""The agent as it is shipped, and with a small WAL, in turn."""

TIMEOUT_S = 600.0
"""For the whole recording: a disk that stops growing must not hang the run."""

SETTINGS: dict[str, Any] = {"min_free_bytes": 2 << 20, "ballast_bytes": 1 << 20, "retain_receipted_records": RETAINED}


def rule(number: int) -> dict[str, Any]:
    """Decides at every reading; `number` makes it another rule."""
    return {
        "id": "each", "on": {"device": "boiler-*", "metric": "n"}, "if": {"value": "n", "op": ">=", "than": -number}, "trigger": "each",
        "then": [{"command": {"device": "fan-1", "name": "act", "args": {"n": "$value:n"}, "expires": "10m"}}],
    }


@dataclass(slots=True)
class Recorded:
    """A log, what was claimed on the way, and how the run went."""

    log: BlockLog
    claims: Claims = field(default_factory=Claims)
    ends: list[str] = field(default_factory=list)
    readings: int = 0
    seconds: float = 0.0


def make_base(folder: Path) -> bytes:
    """The bytes of an empty ext4."""
    image = folder / "base.img"
    with open(image, "wb") as handle:
        handle.truncate(DISK_BYTES)
    subprocess.run(
        [program("mkfs.ext4"), "-q", "-b", "4096", "-g", str(GROUP_BLOCKS), "-J", "size=4", "-m", "0", "-E", "lazy_itable_init=0,lazy_journal_init=0,nodiscard", "-O", "^resize_inode", str(image)], check=True,
    )
    content = image.read_bytes()
    image.unlink()
    return content


class Recorder:
    """Makes one recording.

    Args:
        home: a folder of its own, not on the recorded disk.
        writes: when to end.
        programs: what the agent's interpreter is given to run, in turn for each life; a control puts its planted bug there.
    """

    def __init__(self, home: Path, writes: int, bus_port: int, seed: int, programs: Sequence[Sequence[str]] = PROGRAMS) -> None:
        self._home = home
        self._writes = writes
        self._bus_port = bus_port
        self._draw = random.Random(f"recording {seed}")
        self._programs = programs
        self.recorded = Recorded(BlockLog(make_base(home)))
        self._mount = home / "mount"
        self._disk_file = home / "disk"
        self._commands: asyncio.Queue[dict[str, Any]] = asyncio.Queue(1000)

    async def run(self) -> Recorded:
        """Record."""
        began = asyncio.get_running_loop().time()
        self._mount.mkdir()
        self._disk_file.touch()
        recorded, log = self.recorded, self.recorded.log
        claims = recorded.claims
        broker_port, hub_port = free_port(), free_port()

        def nothing(_topic: str, _payload: bytes) -> None:
            pass

        bus = Wiretap(
            self._bus_port, lambda topic, payload: claims.edge_published(log.position, topic, payload), lambda topic, payload: claims.edge_acknowledged(log.position, topic, payload), nothing
        )
        uplink = Wiretap(broker_port, lambda topic, payload: claims.edge_published(log.position, topic, payload), nothing, lambda topic, payload: claims.hub_said(log.position, topic, payload))
        with open(self._home / "hub.log", "ab") as words:
            hub = await asyncio.create_subprocess_exec(
                sys.executable, "-m", "hub", "--data-dir", str(self._home / "hub"), "--listen", f"127.0.0.1:{hub_port}", "--broker", "mosquitto", "--broker-listen", f"127.0.0.1:{broker_port}",
                stdout=words, stderr=words, stdin=asyncio.subprocess.DEVNULL, env={**os.environ, "PYTHONPATH": str(ROOT)}, preexec_fn=die_with_parent,
            )
        tasks: list[asyncio.Task[None]] = []
        try:
            await until(lambda: ask(Api(f"http://127.0.0.1:{hub_port}"), "/readyz"), 60, "the hub's start", hub, self._home / "hub.log")
            api = Api(f"http://127.0.0.1:{hub_port}", (self._home / "hub" / "token").read_text().strip())
            await bus.start()
            await uplink.start()
            with RecordingDisk(log, self._disk_file) as disk:
                tasks = [asyncio.create_task(self._devices()), asyncio.create_task(self._changes(api))]
                try:
                    async with asyncio.timeout(TIMEOUT_S):
                        await self._lives(disk, bus.port, uplink.port, tasks)
                finally:
                    await ended(*tasks)
        finally:
            await bus.close()
            await uplink.close()
            if hub.returncode is None:
                hub.terminate()
                await hub.wait()
        recorded.seconds = asyncio.get_running_loop().time() - began
        return recorded

    async def _lives(self, disk: RecordingDisk, bus_port: int, uplink_port: int, tasks: list[asyncio.Task[None]]) -> None:
        log = self.recorded.log
        config = {
            "journal": SETTINGS, "decisions": {"rules": [rule(0)]}, "bus": {"url": f"mqtt://127.0.0.1:{bus_port}", "inflight_max": 100},
            "uplink": {"url": f"mqtt://127.0.0.1:{uplink_port}", "backoff_base_s": 0.05, "backoff_cap_s": 0.2},
        }
        lives = max(len(ENDS), min(LIVES_MAX, self._writes // LIFE_WRITES))
        for number, end in enumerate(itertools.islice(itertools.cycle(ENDS), lives)):
            upto, seen = self._writes * (number + 1) // lives, len(self.recorded.claims) + LIFE_EFFECTS
            self._insert_disk()
            agent = Agent(1, api=False, uplink_port=1, model="", host=False, data=self._mount / "data", extra=config, program=self._programs[number % len(self._programs)])
            try:
                await asyncio.to_thread(agent.__enter__)
                while log.writes < upto or len(self.recorded.claims) < seen:
                    for task in tasks:
                        if task.done():
                            task.result()
                    if agent.process is not None and agent.process.poll() is not None:
                        raise RuntimeError(f"the agent ended by itself with status {agent.process.returncode}")
                    await asyncio.sleep(0.02)
                if end == "stop":
                    await asyncio.to_thread(agent.__exit__)
                else:
                    await asyncio.to_thread(agent.kill)
                    disk.power = end != "power"
                self.recorded.ends.append(end)
            finally:
                await asyncio.to_thread(agent.__exit__)
                await asyncio.to_thread(unmount, self._mount)
            if not disk.power:
                disk.restore_power(self._draw)

    def _insert_disk(self) -> None:
        device, descriptor = attach(self._disk_file)
        try:
            mount(device, self._mount, "ext4", OPTIONS)
        finally:
            os.close(descriptor)

    # -- load ----------------------------------------------------------------------------------------------------------------

    async def _devices(self) -> None:
        async with aiomqtt.Client("127.0.0.1", self._bus_port, identifier="devices", socket_options=SOCKET_OPTIONS) as client:
            await client.subscribe("novacron/1/device/+/command", qos=1)
            loop = asyncio.get_running_loop()
            obey = asyncio.create_task(self._obey(client))
            start = loop.time()
            try:
                for number in itertools.count():
                    await client.publish(f"novacron/1/device/boiler-{number % DEVICES}/telemetry", json.dumps({"n": number, "temp": 20 + number % 60}), qos=1)
                    self.recorded.readings = number + 1
                    if obey.done():
                        obey.result()
                    await asyncio.sleep(max(0.0, start + number / RATE - loop.time()))
            finally:
                await ended(obey)

    async def _obey(self, client: aiomqtt.Client) -> None:
        """Some commands are answered with a result, some with a reported state."""
        count = 0
        async for message in client.messages:
            command = json.loads(bytes(message.payload))  # type: ignore[arg-type]
            count += 1
            if count % 10 == 0:
                await client.publish("novacron/1/device/fan-1/result", json.dumps({"id": command["id"], "ok": True}), qos=1)
            elif count % 10 == 5:
                await client.publish("novacron/1/device/fan-1/reported", json.dumps({"n": count}), qos=1)

    async def _changes(self, api: Api) -> None:
        """Desired state: twins, commands, rules."""
        loop = asyncio.get_running_loop()
        path = f"/api/v1/edges/{EDGE}"
        for number in itertools.count(1):
            await asyncio.sleep(CHANGE_S)
            with contextlib.suppress(CommandError):  # the hub has not heard of the edge yet
                if number % 3 == 0:
                    body = {"device": "fan-1", "name": "speed", "args": {"level": number}, "expires_seconds": 600}
                    await loop.run_in_executor(None, api.call, "POST", f"{path}/commands", body)
                elif number % 3 == 1:
                    await loop.run_in_executor(None, api.call, "PUT", f"{path}/desired", {"twins": {"fan-1": {"mode": number}, "boiler-1": {"target": number % 7}}})
                else:
                    await loop.run_in_executor(None, api.call, "PUT", f"{path}/desired", {"rules": [rule(number)]})
