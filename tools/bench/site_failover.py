"""A site of five edges whose cloud is gone: the leader and another edge are killed with -9; how long until their devices are served again.

Five agents, a site bus (mosquitto) and a hub with its broker are real processes. Every device publishes numbered readings at a steady rate. One rule
commands at every reading, one once per latch. Devices keep the fences of their duties. The hub is killed first. After the measurement hub and edges
come back: duties go home, and at the end `verify` says whether the hub holds all that all five journalled.

The value is the longest time, of all devices of all rounds, from the kill to the first command by another edge.
"""

import argparse
import asyncio
import contextlib
import json
import os
import random
import socket
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

import aiomqtt
import yaml

from hub.link import SOCKET_OPTIONS
from tools.demo import ask, start_program, until
from tools.fencing import Fences
from tools.novactl.client import Api
from tools.novactl.verify import verify_edge

from ..ending import ended
from .harness import ROOT, arguments, machine, note, private_mosquitto, report, spread

SITE = "bench-site"
EDGES = tuple(f"edge-{number}" for number in range(1, 6))
DEVICES_PER_EDGE = 2
RATE = 5
"""Readings of each device per second: fifty a second for the site, enough to see a gap of a fifth of a second."""

BAR_S = 30.0
UP_S = 60.0
"""For programs to start and for a site to settle."""

HOME_S = 120.0
"""For killed edges to be stable again and get their devices back."""

DRAIN_S = 120.0

RULES: list[dict[str, Any]] = [
    {
        "id": "each", "on": {"device": "dev-*", "metric": "n"}, "trigger": "each", "if": {"value": "n", "op": ">=", "than": 0},
        "then": [{"command": {"device": "$device", "name": "count", "args": {"n": "$value:n"}, "expires": "60s"}}],
    },
    {
        "id": "hot", "on": {"device": "dev-*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": 80}, "clear": {"value": "temp", "op": "<", "than": 70},
        "then": [{"command": {"device": "$device", "name": "cool", "args": {}, "expires": "60s"}}],
    },
]


def lasting_port() -> int:
    """A free port below the ephemeral range: while the hub is away nobody may get it, least of all an edge that tries to connect to it."""
    low = int(Path("/proc/sys/net/ipv4/ip_local_port_range").read_text().split()[0])
    while True:
        port = random.randrange(low // 2, low)
        with socket.socket() as sock, contextlib.suppress(OSError):
            sock.bind(("127.0.0.1", port))
            return port


class Devices:
    """All devices of the site, over one connection: they publish, they obey, they remember everything."""

    def __init__(self, port: int, names: list[str], rate: float) -> None:
        self._port, self._names, self._rate = port, names, rate
        self.stop = asyncio.Event()
        self.sent = 0
        self.fences = {name: Fences() for name in names}
        self.ids: Counter[str] = Counter()
        self.counted: Counter[tuple[str, int]] = Counter()
        """Executions per device and reading."""
        self.cooled: Counter[str] = Counter()
        self.refused = 0
        self.by: dict[str, list[tuple[float, str, float]]] = {name: [] for name in names}
        """Per device when, by which edge, and how long after the execution before, where another edge executed one than before; seconds."""
        self._last: dict[str, tuple[float, str]] = {}

    async def run(self) -> None:
        """Until `stop`, and a second for what is under way."""
        async with aiomqtt.Client("127.0.0.1", self._port, identifier="devices", socket_options=SOCKET_OPTIONS) as client:
            await client.subscribe("novacron/1/device/+/command", qos=1)
            for name in self._names:
                await client.publish(f"novacron/1/device/{name}/register", json.dumps({"kind": "bench"}), qos=1, retain=True)
            listener = asyncio.create_task(self._listen(client))
            loop = asyncio.get_running_loop()
            start = loop.time()
            try:
                while not self.stop.is_set():
                    # A device is above 80 degrees all the time: its latch may fire once in all.
                    payload = json.dumps({"n": self.sent, "temp": 90})
                    for name in self._names:
                        await client.publish(f"novacron/1/device/{name}/telemetry", payload, qos=1)
                    self.sent += 1
                    await asyncio.sleep(max(0.0, start + self.sent / self._rate - loop.time()))
                await asyncio.sleep(1)
            finally:
                await ended(listener)

    async def _listen(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            command = json.loads(message.payload if isinstance(message.payload, bytes) else b"{}")
            name = str(message.topic).split("/")[3]
            self.ids[command["id"]] += 1
            if self.ids[command["id"]] > 1:
                continue  # at least once: a device does an id once
            if not self.fences[name].admits(command):
                self.refused += 1
                await client.publish(f"novacron/1/device/{name}/result", json.dumps(self.fences[name].refusal(command)), qos=1)
                continue
            edge, now = command["id"].split(".")[0], time.monotonic()
            before = self._last.get(name)
            if before is None or before[1] != edge:
                self.by[name].append((now, edge, now - before[0] if before else 0.0))
            self._last[name] = now, edge
            if command["name"] == "count":
                self.counted[name, command["args"]["n"]] += 1
            else:
                self.cooled[name] += 1
            await client.publish(f"novacron/1/device/{name}/result", json.dumps({"id": command["id"], "ok": True}), qos=1)


class Site:
    """Hub, five agents, and what happens to them."""

    def __init__(self, options: argparse.Namespace, home: Path, bus_port: int) -> None:
        self.options, self.home, self.bus_port = options, home, bus_port
        self.hub_port, self.broker_port = lasting_port(), lasting_port()
        self.ports = {edge: lasting_port() for edge in EDGES}
        self.apis = {edge: Api(f"http://127.0.0.1:{port}") for edge, port in self.ports.items()}
        self.env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        self.hub: Api
        self.hub_process: asyncio.subprocess.Process | None = None
        self.processes: dict[str, asyncio.subprocess.Process] = {}

    async def start_hub(self) -> None:
        """The hub with its own supervised mosquitto."""
        self.hub_process = await start_program(
            [sys.executable, "-m", "hub", "--data-dir", str(self.home / "hub"), "--listen", f"127.0.0.1:{self.hub_port}", "--broker", "mosquitto", "--broker-listen", f"127.0.0.1:{self.broker_port}"],
            self.home / "hub.log", self.env,
        )
        await until(lambda: ask(Api(f"http://127.0.0.1:{self.hub_port}"), "/readyz"), UP_S, "the hub's start", self.hub_process, self.home / "hub.log")
        self.hub = Api(f"http://127.0.0.1:{self.hub_port}", (self.home / "hub" / "token").read_text().strip())

    async def start_edge(self, edge: str) -> None:
        """One agent."""
        number = EDGES.index(edge) + 1
        config = {
            "edge_id": edge, "site": SITE, "data_dir": str(self.home / edge), "api": {"port": self.ports[edge]}, "bus": {"url": f"mqtt://127.0.0.1:{self.bus_port}"},
            "uplink": {"url": f"mqtt://127.0.0.1:{self.broker_port}", "backoff_base": "200ms", "backoff_cap": "2s", "keepalive": "5s"},
            "journal": {"retain_receipted_records": 10_000_000}, "decisions": {"rules": RULES}, "devices": {"host": {"enabled": False}}, "logging": {"level": "warning"},
            "duties": {"enabled": True, "home": [f"dev-{number}-*"]},
        }
        path = self.home / f"{edge}.yaml"
        path.write_text(yaml.safe_dump(config))
        log = self.home / f"{edge}.log"
        self.processes[edge] = await start_program([sys.executable, "-OO", "-X", "no_debug_ranges", "-m", "edge_runtime", "run", "--config", str(path)], log, self.env)
        await until(lambda: ask(self.apis[edge], "/readyz"), UP_S, f"the start of {edge}", self.processes[edge], log)

    async def duties(self) -> dict[str, str]:
        """Device to edge as the edges themselves say it; empty unless every live edge agrees and nothing waits."""
        said: dict[str, str] = {}
        for edge, process in self.processes.items():
            if process.returncode is None:
                for device in (await ask(self.apis[edge], "/api/v1/status"))["site"]["serves"]:
                    if device in said:
                        raise RuntimeError(f"{device} is served by {said[device]} and {edge}")
                    said[device] = edge
        return said

    async def at_home(self, names: list[str]) -> bool:
        """Every device is served by its home."""
        return await self.duties() == {name: f"edge-{name.split('-')[1]}" for name in names}

    async def leader(self) -> str:
        """Who leads, once."""
        for edge in EDGES:
            if (await ask(self.apis[edge], "/api/v1/status"))["site"]["leads"]:
                return edge
        return ""

    async def link(self, wanted: str) -> bool:
        """Every live edge says that its link is `up` or `down`."""
        states = [(await ask(self.apis[edge], "/api/v1/status"))["link"] for edge, process in self.processes.items() if process.returncode is None]
        return all(state == wanted for state in states)

    async def kill_hub(self) -> None:
        """-9 to the hub and its broker: the cloud is gone."""
        assert self.hub_process is not None
        children = [int(pid) for task in Path(f"/proc/{self.hub_process.pid}/task").iterdir() for pid in (task / "children").read_text().split()]
        self.hub_process.kill()
        await self.hub_process.wait()
        for pid in children:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, 9)

    async def drained(self) -> bool:
        """The hub holds what every edge has journalled."""
        loop = asyncio.get_running_loop()
        for edge in EDGES:
            result = await loop.run_in_executor(None, lambda edge=edge: verify_edge(self.hub, edge, self.apis[edge]))  # type: ignore[misc]
            if not result["exact"] or any(one["missing"] or one.get("not_yet_sent", 1) for one in result["streams"].values()):
                return False
        return True

    async def end(self) -> None:
        """End what was started."""
        for process in (*self.processes.values(), self.hub_process):
            if process is not None and process.returncode is None:
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 15)
                if process.returncode is None:
                    process.kill()
                    await process.wait()


async def one_round(site: Site, devices: Devices, names: list[str], draw: random.Random) -> dict[str, Any]:
    """Hub away, two killed, measured; everything back and at home."""
    await site.kill_hub()
    await until(lambda: site.link("down"), UP_S, "the edges' notice that the hub is gone")
    await asyncio.sleep(draw.uniform(1, 3))
    leader = await until(site.leader, UP_S, "a leader")
    victims = [leader, draw.choice([edge for edge in EDGES if edge != leader])]
    owned = [name for name, edge in (await site.duties()).items() if edge in victims]
    killed = time.monotonic()
    for edge in victims:
        site.processes[edge].kill()
    for edge in victims:
        await site.processes[edge].wait()

    def moved(name: str) -> float | None:
        return next((at - killed for at, edge, _ in devices.by[name] if at > killed and edge not in victims), None)

    async def all_moved() -> bool:
        return all(moved(name) is not None for name in owned)

    await until(all_moved, UP_S, "the move of the duties")
    times = [moved(name) or 0.0 for name in owned]
    said = await until(lambda: _covered(site, names), UP_S, "every device is served")
    await site.start_hub()
    for edge in victims:
        await site.start_edge(edge)
    began = time.monotonic()
    await until(lambda: site.at_home(names), HOME_S, "the return of the duties")
    home_s = time.monotonic() - began
    gaps = [gap for name in owned for at, _, gap in devices.by[name] if at > killed + max(times)]
    return {
        "killed": victims, "devices_moved": len(owned), "seconds": [round(value, 2) for value in times], "home_after_s": round(home_s, 1), "shared_by": dict(Counter(said.values())),
        "largest_gap_of_the_return_s": round(max(gaps, default=0.0), 2),
    }


async def _covered(site: Site, names: list[str]) -> dict[str, str]:
    said = await site.duties()
    return said if set(said) == set(names) else {}


async def run(options: argparse.Namespace, home: Path, bus_port: int) -> dict[str, Any]:
    """All rounds; the findings."""
    draw = random.Random(options.seed)
    site = Site(options, home, bus_port)
    names = [f"dev-{number}-{index}" for number in range(1, len(EDGES) + 1) for index in range(DEVICES_PER_EDGE)]
    devices = Devices(bus_port, names, options.rate)
    rounds: list[dict[str, Any]] = []
    task: asyncio.Task[None] | None = None
    try:
        await site.start_hub()
        for edge in EDGES:
            await site.start_edge(edge)
        task = asyncio.create_task(devices.run())
        await until(lambda: site.at_home(names), HOME_S, "the first distribution")
        for number in range(options.rounds):
            rounds.append(await one_round(site, devices, names, draw))
            note(options, f"round {number + 1}: {rounds[-1]}")
        devices.stop.set()
        await task
        await until(lambda: site.link("up"), UP_S, "the links' return")
        try:
            await until(site.drained, DRAIN_S, "the drain")
            drained = True
        except RuntimeError as error:
            note(options, str(error))
            drained = False
        events = await ask(site.hub, "/api/v1/events?kind=site&limit=1000")
    finally:
        if task is not None and not task.done():
            await ended(task)
        await site.end()
    told = Counter(event["body"]["what"] for event in events)
    undecided = sum(devices.counted[name, number] == 0 for name in names for number in range(devices.sent))
    return {
        "rounds": rounds, "drained_and_exact": drained, "readings": devices.sent * len(names), "executed": sum(devices.counted.values()),
        "doubled": sum(count - 1 for count in devices.counted.values() if count > 1), "latch_fired_again": sum(count - 1 for count in devices.cooled.values()),
        "latches": len(devices.cooled), "refused_by_fence": devices.refused, "decided_by_nobody": undecided, "site_events_at_the_hub": dict(told),
    }


def main() -> int:
    parser = arguments(__doc__, rounds=3)
    parser.add_argument("--rate", type=float, default=RATE, help="readings of each device per second")
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--home", default="", help="keep everything in this folder")
    options = parser.parse_args()
    options.seed = options.seed or random.SystemRandom().randrange(1, 1 << 30)
    about = machine()
    with tempfile.TemporaryDirectory(dir=ROOT) as folder, private_mosquitto() as bus_port:
        home = Path(options.home or folder)
        home.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(run(options, home, bus_port))
    times = [value for one in found["rounds"] for value in one["seconds"]]
    worst = max(times)
    by_round = [max(one["seconds"]) for one in found["rounds"]]
    ok = worst <= BAR_S and found["doubled"] == 0 and found["latch_fired_again"] == 0 and found["latches"] == len(EDGES) * DEVICES_PER_EDGE and found["drained_and_exact"]
    ok = ok and found["site_events_at_the_hub"].get("taken", 0) > 0 and found["site_events_at_the_hub"].get("elected", 0) > options.rounds
    return report(
        options, about, "cloud gone, leader and another of 5 edges killed: their devices are served again within 30 s, nothing done twice", round(worst, 2), "s", ok,
        spread_=spread(by_round), inputs={"edges": len(EDGES), "devices": len(EDGES) * DEVICES_PER_EDGE, "readings_per_second": options.rate * len(EDGES) * DEVICES_PER_EDGE, "seed": options.seed}, details=found,
    )


if __name__ == "__main__":
    sys.exit(main())
