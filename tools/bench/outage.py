"""The link cut 50 times in 5 minutes under load; the hub killed and started again, its broker killed; one long outage at the end.

Hub, broker and agent are real processes; the uplink runs through a proxy that resets connections or lets no byte pass. A device publishes
numbered readings at a fixed rate to the edge's own bus and counts the command that each must bring, once. At the end `novactl verify`, and
every record of the edge's journal compared with the hub's rows by content. Live-first: of the records written after the last heal, the
hub's receive times must lie before those of the backlog's end.
"""

import argparse
import asyncio
import contextlib
import os
import random
import signal
import sqlite3
import statistics
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
from tools.demo import ask, compare, start_program, until
from tools.faultproxy import FaultProxy
from tools.novactl.client import Api, CommandError
from tools.novactl.verify import verify_edge

from ..ending import ended
from .agent import COMMAND_TOPIC, RULE, TELEMETRY_TOPIC, number_of, payload
from .harness import ROOT, arguments, free_port, machine, note, private_mosquitto, report

EDGE = "outage-edge"
RATE = 100
"""Readings, and so decisions, per second: a busy gateway."""

LAST_OUTAGE_S = 20.0
"""The outage at the end whose drain is looked at."""

AFTER_S = 5.0
DRAIN_TIMEOUT_S = 120.0


class Device:
    """Publishes numbered readings and counts what came of each."""

    def __init__(self, port: int, rate: float) -> None:
        self._port, self._rate = port, rate
        self.sent = 0
        self.commands: Counter[int] = Counter()
        self.stop = asyncio.Event()
        self.late: list[float] = []

    async def run(self) -> None:
        """Until `stop`."""
        async with aiomqtt.Client("127.0.0.1", self._port, identifier="device", socket_options=SOCKET_OPTIONS) as client:
            await client.subscribe(COMMAND_TOPIC, qos=1)
            listener = asyncio.create_task(self._listen(client))
            loop = asyncio.get_running_loop()
            start = loop.time()
            try:
                while not self.stop.is_set():
                    await client.publish(TELEMETRY_TOPIC, payload(self.sent), qos=1)
                    self.sent += 1
                    await asyncio.sleep(max(0.0, start + self.sent / self._rate - loop.time()))
                await asyncio.sleep(1)
            finally:
                await ended(listener)

    async def _listen(self, client: aiomqtt.Client) -> None:
        async for message in client.messages:
            number = number_of(message.payload if isinstance(message.payload, bytes) else b"")
            if number is not None:
                self.commands[number] += 1


class Run:
    """One run of the whole."""

    def __init__(self, options: argparse.Namespace, home: Path, bus_port: int) -> None:
        self.options = options
        self.home = home
        self.bus_port = bus_port
        self.hub_port, self.broker_port, self.edge_port = free_port(), free_port(), free_port()
        self.proxy = FaultProxy("127.0.0.1", self.broker_port)
        self.env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.env.pop("PYTHONDONTWRITEBYTECODE", None)
        self.hub_process: asyncio.subprocess.Process
        self.edge_process: asyncio.subprocess.Process
        self.hub: Api
        self.edge = Api(f"http://127.0.0.1:{self.edge_port}")
        self.done: dict[str, int] = {"cuts": 0, "holds": 0, "hub_killed": 0, "broker_killed": 0}

    async def start_hub(self) -> None:
        """The hub with its own supervised mosquitto."""
        self.hub_process = await start_program(
            [sys.executable, "-m", "hub", "--data-dir", str(self.home / "hub"), "--listen", f"127.0.0.1:{self.hub_port}", "--broker", "mosquitto", "--broker-listen", f"127.0.0.1:{self.broker_port}"],
            self.home / "hub.log", self.env,
        )
        await until(lambda: ask(Api(f"http://127.0.0.1:{self.hub_port}"), "/readyz"), 60, "the hub's start", self.hub_process, self.home / "hub.log")
        self.hub = Api(f"http://127.0.0.1:{self.hub_port}", (self.home / "hub" / "token").read_text().strip())

    async def start_edge(self) -> None:
        """The agent; nothing that is receipted is freed, so that all can be compared at the end."""
        config = {
            "edge_id": EDGE, "data_dir": str(self.home / "edge"), "api": {"port": self.edge_port}, "bus": {"url": f"mqtt://127.0.0.1:{self.bus_port}", "inflight_max": 1000},
            "uplink": {"url": f"mqtt://127.0.0.1:{self.proxy.port}", "backoff_base": "200ms", "backoff_cap": "2s", "keepalive": "5s"},
            "journal": {"retain_receipted_records": 10_000_000}, "decisions": {"rules": [RULE], "models": ["shipped:host-anomaly/portable"]}, "devices": {"host": {"enabled": False}},
        }
        path = self.home / "edge.yaml"
        path.write_text(yaml.safe_dump(config))
        command = [sys.executable, "-OO", "-X", "no_debug_ranges", "-m", "edge_runtime", "run", "--config", str(path)]
        self.edge_process = await start_program(command, self.home / "edge.log", self.env)
        await until(lambda: ask(self.edge, "/readyz"), 60, "the edge's start", self.edge_process, self.home / "edge.log")

    def _broker_pid(self) -> int:
        """The hub's child mosquitto."""
        for task in Path(f"/proc/{self.hub_process.pid}/task").iterdir():
            for pid in (task / "children").read_text().split():
                if "mosquitto" in Path(f"/proc/{pid}/comm").read_text():
                    return int(pid)
        return 0

    async def disturb(self, draw: random.Random) -> None:
        """Cut, hold, kill, spread over the time."""
        options = self.options
        slot = options.seconds / options.cuts
        hub_at, broker_at = options.cuts // 3, 2 * options.cuts // 3
        for number in range(options.cuts):
            began = time.monotonic()
            length = draw.uniform(0.1, 0.6) * slot
            if number % 5 == 4:
                self.proxy.hold()
                self.done["holds"] += 1
                await asyncio.sleep(length)
                await self.proxy.cut()
                await self.proxy.heal()
            else:
                await self.proxy.cut()
                await asyncio.sleep(length)
                await self.proxy.heal()
            self.done["cuts"] += 1
            if number == hub_at:
                self.hub_process.kill()
                await self.hub_process.wait()
                self.done["hub_killed"] += 1
                await asyncio.sleep(min(2.0, slot / 3))
                await self.start_hub()
            if number == broker_at and (pid := self._broker_pid()):
                os.kill(pid, signal.SIGKILL)
                self.done["broker_killed"] += 1
            note(options, f"cut {number + 1} of {options.cuts}, {length:.1f} s")
            await asyncio.sleep(max(0.0, slot - (time.monotonic() - began)))

    async def last_outage(self, seconds: float) -> tuple[int, int]:
        """A backlog, then the heal; returns the first decision after the link was up, and the backlog's size."""
        await self.proxy.cut()
        await asyncio.sleep(seconds)
        await self.proxy.heal()

        async def up() -> bool:
            return bool((await ask(self.edge, "/api/v1/status"))["link"] == "up")

        before = await ask(self.edge, "/api/v1/status")
        await until(up, 30, "the link's return")
        status = await ask(self.edge, "/api/v1/status")
        await asyncio.sleep(AFTER_S)
        return status["journal"]["decision"]["next"], before["backlog_records"]

    async def drained(self) -> bool:
        """Everything at the hub and proven."""
        result = await asyncio.get_running_loop().run_in_executor(None, lambda: verify_edge(self.hub, EDGE, self.edge))
        status = await ask(self.edge, "/api/v1/status")
        return bool(status["backlog_records"] == 0 and result["exact"] and all(not one["missing"] and one["not_yet_sent"] == 0 for one in result["streams"].values()))

    async def end(self) -> None:
        """End what was started."""
        for process in (getattr(self, "edge_process", None), getattr(self, "hub_process", None)):
            if process is not None and process.returncode is None:
                process.terminate()
                with contextlib.suppress(TimeoutError):
                    await asyncio.wait_for(process.wait(), 15)
                if process.returncode is None:
                    process.kill()
                    await process.wait()
        await self.proxy.close()


def live_first(hub_data: Path, split: int) -> dict[str, Any]:
    """From the hub's own receive times of the decisions around the last heal."""
    hub = sqlite3.connect(f"file:{hub_data / 'hub.db'}?mode=ro", uri=True)
    # `id` is the order of arrival. Records written while the link was already up wait for nothing: their delay is the live lane's.
    live = hub.execute("SELECT received - wall, id, received FROM records WHERE edge=? AND stream='decision' AND seq>=? ORDER BY seq LIMIT 200", (EDGE, split)).fetchall()
    last = hub.execute("SELECT id, received FROM records WHERE edge=? AND stream='telemetry' AND wall<(SELECT wall FROM records WHERE edge=? AND stream='decision' AND seq=?) ORDER BY id DESC LIMIT 1", (EDGE, EDGE, split)).fetchone()
    hub.close()
    if not live or last is None:
        return {"live_records": len(live), "ok": False}
    return {
        "live_records": len(live), "live_delay_p50_ms": statistics.median(row[0] for row in live), "live_delay_max_ms": max(row[0] for row in live),
        "live_before_backlog_end": sum(row[1] < last[0] for row in live), "first_live_before_backlog_end_ms": last[1] - live[0][2], "ok": live[0][1] < last[0],
    }


async def run(options: argparse.Namespace, home: Path, bus_port: int) -> dict[str, Any]:
    """All of it; the findings."""
    draw = random.Random(options.seed or None)
    one = Run(options, home, bus_port)
    device = Device(bus_port, options.rate)
    try:
        await one.start_hub()
        await one.proxy.start()
        await one.start_edge()
        task = asyncio.create_task(device.run())
        await one.disturb(draw)
        split, backlog = await one.last_outage(options.last_outage)
        device.stop.set()
        await task
        began = time.monotonic()
        try:
            await until(one.drained, DRAIN_TIMEOUT_S, "the drain")
            drained = True
        except RuntimeError as error:
            note(options, str(error))
            drained = False
        drain_s = time.monotonic() - began
        result = await asyncio.get_running_loop().run_in_executor(None, lambda: verify_edge(one.hub, EDGE, one.edge))
        status = await ask(one.edge, "/api/v1/status")
        hub_status = await ask(one.hub, "/api/v1/status")
    except CommandError as error:
        raise RuntimeError(f"{error}; hub.log: {(home / 'hub.log').read_text()[-1500:]}") from None
    finally:
        await one.end()
    missing = sum(device.commands[number] == 0 for number in range(device.sent))
    return {
        "readings": device.sent, "commands_missing": missing, "commands_twice": sum(count - 1 for count in device.commands.values()), "decided_offline": status["decided_offline"],
        **one.done, "links_made": one.proxy.connections, "broker_restarts": hub_status["broker"]["restarts"], "verify_exact": result["exact"], "drained": drained, "drain_seconds": round(drain_s, 1),
        "resent_and_dropped": sum(entry["duplicates"] for entry in result["streams"].values()), "last_backlog_records": backlog,
        "records": {stream: entry["contiguous"] for stream, entry in result["streams"].items()}, **compare(home / "edge", home / "hub", EDGE), "live_first": live_first(home / "hub", split),
    }


def main() -> int:
    parser = arguments(__doc__, seconds=300, rounds=1)
    parser.add_argument("--cuts", type=int, default=50)
    parser.add_argument("--rate", type=float, default=RATE)
    parser.add_argument("--last-outage", type=float, default=LAST_OUTAGE_S)
    parser.add_argument("--seed", type=int, default=0, help="0: another one each time")
    parser.add_argument("--home", default="", help="keep everything in this folder")
    options = parser.parse_args()
    options.seed = options.seed or random.SystemRandom().randrange(1, 1 << 30)
    about = machine()
    with tempfile.TemporaryDirectory(dir=ROOT) as folder, private_mosquitto() as bus_port:
        home = Path(options.home or folder)
        home.mkdir(parents=True, exist_ok=True)
        found = asyncio.run(run(options, home, bus_port))
    ok = found["verify_exact"] and found["drained"] and found["lost"] == 0 and found["duplicated"] == 0 and found["commands_missing"] == 0 and found["commands_twice"] == 0
    ok = ok and found["live_first"]["ok"] and found["hub_killed"] > 0 and found["broker_killed"] > 0 and found["decided_offline"] > 0
    return report(
        options, about, "after cuts and kills the hub holds exactly what the edge journalled, live records first", found["lost"] + found["duplicated"], "records lost or doubled", ok,
        inputs={"seconds": options.seconds, "cuts": options.cuts, "readings_per_second": options.rate, "last_outage_seconds": options.last_outage, "seed": options.seed}, details=found,
    )


if __name__ == "__main__":
    sys.exit(main())
