"""64 callers at once on a real hub that is killed (SIGKILL) in mid-placement: 0 overcommitted node-seconds, 0 lost, 0 double placements.

The hub is a process of its own with its own broker. Callers submit, submit the same again, cancel, drain and give back nodes, ask for rebalancing; each repeats a request whose
answer it never got. Some workloads are batch jobs that say how long they run, some of these with a deadline that is promised or refused.
Some nodes are declared, others are edges: MQTT clients that speak the contract, report what they have, run what they are told, refuse some of it, and watch that no workload
runs on two of them. At the end `placement_log`, which shares no code with the scheduler, reads hub.db and the published documents.
"""

import argparse
import asyncio
import contextlib
import json
import random
import sqlite3
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

import aiohttp
import aiomqtt

from edge_runtime.contract import jsoncodec, topics
from edge_runtime.contract.records import CHAIN_START
from hub.link import SOCKET_OPTIONS
from tools.ending import ended

from . import placement_log
from .harness import ROOT, arguments, die_with_parent, free_port, machine, note, percentile, report, stop

NODES, EDGES = 12, 6
"""Declared nodes, and edges that answer."""

NAMES, REQUESTS_PER_NAME = 80, 6
"""The names in use at one time, and after how many requests the oldest of them gives way to a new one: the same workload is often submitted again, and cancelled while it
is placed; a cancelled one does not come back, so new ones must."""

SAMPLE = 300
"""Workloads of the file that are asked for by name at the end."""

CAPACITY: dict[str, Any] = {"capacity": {"cpu": 8, "memory": "16Gi"}, "gpus": [{"model": "t4", "memory": "16Gi", "count": 2}]}

RESEND_S = 0.2
"""An edge sends again what has no receipt so often."""

RETRY_S = 0.3
"""A caller without an answer asks again after so long: sooner, 64 of them keep a hub that starts from its work."""

PLANTED = """
import asyncio, sys
from hub.cli import main
from hub.workloads.service import Workloads
from ..ending import ended

async def early(self, cursor=None):
    changes = self.planner.changes()
    changes.cursor = cursor
    self.planner.keep()
    self.rows.update({name: row for name, row in changes.workloads.items() if row is not None})
    if changes:
        asyncio.get_running_loop().call_later(1.0, lambda: self._write(lambda: self._store.commit_workloads(changes)))

Workloads._commit = early
sys.exit(main(sys.argv[1:]))
"""
"""The negative control (`--planted`): a hub that answers a second before it writes. The bench must find that it loses what it acknowledged."""

JOB_S = (1, 3, 10)
"""How long batch jobs run on edges: on declared nodes nobody ends them but who cancels them."""

DEADLINE_S = (10, 60, 600)
"""Deadlines of batch jobs, after the begin of the run: some cannot be promised any more when they are asked for."""

QUIET_S = 3.0
"""After the last request: edges answer, the hub comes to rest."""


def document(number: int, begin_ms: int) -> dict[str, Any]:
    """The document of one name; always the same in a run that began then."""
    draw = random.Random(number)
    made: dict[str, Any] = {
        "id": f"w{number}", "kind": draw.choice(["vm", "container"]), "requests": {"cpu": draw.choice(["100m", "500m", 1, 2]), "memory": draw.choice(["64Mi", "1Gi", "3Gi"])},
        "priority": draw.randrange(3), "labels": {"app": f"a{number % 7}"},
    }
    if draw.random() < 0.2:
        made["gpu"] = draw.choice([{"milli": 300, "memory": "4Gi"}, {"count": 1}])
    if draw.random() < 0.2:
        made["anti_affinity"] = [{"selector": {"labels": {"app": f"a{number % 7}"}}, "topology_key": "host"}]
    if draw.random() < 0.25:
        made |= {"kind": "batch", "duration_ms": draw.choice(JOB_S) * 1000}
        if draw.random() < 0.6:
            made |= {"deadline_ms": begin_ms + draw.choice(DEADLINE_S) * 1000, "when_late": draw.choice(["refuse", "accept"])}
    return made


class Edge:
    """An edge as the hub sees it: presence, records with receipts, desired state."""

    def __init__(self, name: str, port: int, runs: dict[str, set[str]], found: list[str]) -> None:
        self.name, self._port, self._runs, self._found = name, port, runs, found
        self.records: list[dict[str, Any]] = []
        self.receipted = 0
        self.running: dict[str, int] = {}
        self.ends: dict[str, float] = {}
        """Batch jobs that run here, and until when."""
        self.answered: set[tuple[str, int, str]] = set()
        self.generation = 0
        self._draw = random.Random(name)
        self.say("node.capacity", {**CAPACITY, "kind": "edge", "runs": ["vm", "container", "batch"]})

    def say(self, kind: str, body: dict[str, Any]) -> None:
        """Journal a record."""
        self.records.append({"seq": len(self.records) + 1, "boot": "b", "mono": len(self.records), "wall": int(time.time() * 1000), "tq": "ntp", "kind": kind, "body": body})

    def take(self, desired: dict[str, Any]) -> None:
        """Apply desired state."""
        if desired["edge"] != self.name:
            self._found.append(f"{self.name} was given the document of {desired['edge']}")
            return
        if desired["generation"] < self.generation:
            return
        self.generation = desired["generation"]
        entries = desired["spec"].get("workloads", [])
        keeps = {entry["id"] for entry in entries if entry["wanted"] == "running"}
        for name in [name for name in self.running if name not in keeps]:
            self._halt(name)
        for entry in entries:
            key = (entry["id"], entry["epoch"], entry["wanted"])
            if key in self.answered:
                continue
            self.answered.add(key)
            if entry["wanted"] == "stopped":
                if self.running.get(entry["id"]) == entry["epoch"]:
                    self._halt(entry["id"])
                self.say("workload", {"id": entry["id"], "epoch": entry["epoch"], "state": "stopped"})
            elif self._draw.random() < 0.1:
                self.say("workload", {"id": entry["id"], "epoch": entry["epoch"], "state": "refused", "reason": "drawn by lot"})
            else:
                others = self._runs.setdefault(entry["id"], set()) - {self.name}
                if others:
                    self._found.append(f"{entry['id']}: {self.name} shall run it while {', '.join(others)} does")
                self._runs[entry["id"]].add(self.name)
                self.running[entry["id"]] = entry["epoch"]
                if entry["kind"] == "batch":
                    self.ends[entry["id"]] = time.monotonic() + entry["document"]["duration_ms"] / 1000
                self.say("workload", {"id": entry["id"], "epoch": entry["epoch"], "state": "running"})

    def _halt(self, name: str) -> None:
        del self.running[name]
        self.ends.pop(name, None)
        self._runs[name].discard(self.name)

    async def run(self) -> None:
        """Until cancelled; comes back when the broker does."""
        while True:
            with contextlib.suppress(aiomqtt.MqttError, OSError, TimeoutError):
                async with aiomqtt.Client("127.0.0.1", self._port, identifier=self.name, socket_options=SOCKET_OPTIONS, timeout=5) as client:
                    for leaf in ("desired", "receipts"):
                        await client.subscribe(topics.edge_topic(self.name, leaf), qos=1)
                    sender = asyncio.create_task(self._send(client))
                    try:
                        async for message in client.messages:
                            value = json.loads(message.payload if isinstance(message.payload, bytes) else b"{}")
                            if str(message.topic).endswith("desired"):
                                self.take(value)
                            else:
                                for mark in value["marks"]:
                                    if mark["stream"] == "event":
                                        self.receipted = mark["upto"]
                    finally:
                        await ended(sender)
            await asyncio.sleep(0.1)

    async def _send(self, client: aiomqtt.Client) -> None:
        turn = 0
        while True:
            for name in [name for name, end in self.ends.items() if end <= time.monotonic()]:
                self.say("workload", {"id": name, "epoch": self.running[name], "state": "done"})
                self._halt(name)
            if turn % 10 == 0:
                status = {"v": 1, "edge": self.name, "boot": "b", "boot_n": 1, "state": "online", "reason": "heartbeat", "generation": self.generation}
                await client.publish(topics.edge_topic(self.name, "status"), jsoncodec.encode(status), qos=1, retain=True)
            rest = self.records[self.receipted : self.receipted + 200]
            if rest:
                batch = {
                    "v": 1, "edge": self.name, "boot": "b", "boot_n": 1, "stream": "event", "lane": "live", "floor": 1, "floor_chain": CHAIN_START.hex(), "dropped": 0,
                    "live": 1, "history": 1, "next": len(self.records) + 1, "records": rest,
                }
                await client.publish(topics.edge_topic(self.name, "up"), jsoncodec.encode(batch), qos=1)
            turn += 1
            await asyncio.sleep(RESEND_S)


class Run:
    """One run."""

    def __init__(self, options: argparse.Namespace, home: Path) -> None:
        self.options, self.home = options, home
        self.port, self.broker_port = free_port(), free_port()
        self.process: subprocess.Popen[bytes] | None = None
        self.acknowledged: dict[str, dict[str, Any]] = {}
        self.counts: Counter[str] = Counter()
        self.begin_ms = int(time.time() * 1000)
        self.issued = 0
        self.submit_ms: list[float] = []
        self.back_s: list[float] = []
        self.found: list[str] = []
        self.runs: dict[str, set[str]] = {}
        self.edges = [Edge(f"edge-{number}", self.broker_port, self.runs, self.found) for number in range(EDGES)]
        self.http: aiohttp.ClientSession
        self.ended = asyncio.Event()

    async def start_hub(self) -> None:
        """The process, until it takes requests."""
        command = [
            sys.executable, *(("-c", PLANTED) if self.options.planted else ("-m", "hub")), "--data-dir", str(self.home), "--listen", f"127.0.0.1:{self.port}", "--broker", "embedded", "--broker-listen", f"127.0.0.1:{self.broker_port}",
            "--log-level", "error", "--token-file", str(self.home / "chosen"),
        ]
        began = time.monotonic()
        with open(self.home / "hub.log", "ab") as log:
            self.process = subprocess.Popen(command, cwd=ROOT, stdout=log, stderr=log, preexec_fn=die_with_parent)
        while True:
            with contextlib.suppress(aiohttp.ClientError, OSError):
                async with self.http.get(self._url("/readyz")) as answer:
                    if answer.status == 200:
                        break
            if self.process.poll() is not None or time.monotonic() - began > 60:
                raise SystemExit(f"the hub does not start: {(self.home / 'hub.log').read_text()[-2000:]}")
            await asyncio.sleep(0.05)
        self.back_s.append(time.monotonic() - began)

    def _url(self, path: str) -> str:
        return f"http://127.0.0.1:{self.port}{path}"

    async def ask(self, method: str, path: str, body: Any = None) -> tuple[int, Any]:
        """One request, repeated until it is answered: a hub that was killed in it may have done it, or not."""
        while True:
            try:
                async with self.http.request(method, self._url(path), json=body) as answer:
                    said = await answer.json()
                    if answer.status != 503:
                        self.counts[f"{method.lower()} {answer.status}"] += 1
                        return answer.status, said
                    self.counts["asked to come again"] += 1
            except (aiohttp.ClientError, OSError, TimeoutError, ValueError):
                self.counts["answers that never came"] += 1
            await asyncio.sleep(RETRY_S)

    def name(self, draw: random.Random) -> int:
        """One of the names in use."""
        self.issued += 1
        return self.issued // REQUESTS_PER_NAME + draw.randrange(NAMES)

    async def caller(self, number: int) -> None:
        """One of the callers, until the end."""
        draw = random.Random(f"{self.options.seed}/{number}")
        while not self.ended.is_set():
            what, name = draw.random(), self.name(draw)
            if what < 0.6:
                began = time.monotonic()
                status, _ = await self.ask("POST", "/api/v1/workloads", document(name, self.begin_ms))
                if status == 200:
                    self.submit_ms.append((time.monotonic() - began) * 1000)
                    self.acknowledged[f"w{name}"] = document(name, self.begin_ms)
            elif what < 0.75:
                names = [self.name(draw) for _ in range(4)]
                status, _ = await self.ask("POST", "/api/v1/workloads", [document(one, self.begin_ms) for one in sorted(set(names))])
                if status == 200:
                    self.acknowledged |= {f"w{one}": document(one, self.begin_ms) for one in names}
            elif what < 0.92:
                await self.ask("DELETE", f"/api/v1/workloads/w{name}")
            elif what < 0.93:
                status, _ = await self.ask("POST", "/api/v1/rebalance", {"go": True, "drain": [f"n{draw.randrange(NODES)}"] if draw.random() < 0.5 else []})
                self.counts["rebalances begun"] += status == 200
            else:
                node = draw.choice([f"n{draw.randrange(NODES)}", f"edge-{draw.randrange(EDGES)}"])
                await self.ask("POST", f"/api/v1/nodes/{node}/{'drain' if what < 0.95 else 'uncordon'}")
            if self.counts["post 500"] or self.counts["delete 500"]:
                raise SystemExit(f"the hub answered 500: {(self.home / 'hub.log').read_text()[-2000:]}")

    async def kill(self) -> None:
        """SIGKILL, and a new process; with requests under way all the time."""
        assert self.process is not None
        self.process.kill()
        self.process.wait()
        self.counts["kills"] += 1
        await self.start_hub()

    async def run(self) -> dict[str, Any]:
        """All of it; returns what was found."""
        options = self.options
        (self.home / "chosen").write_text("bench")
        async with aiohttp.ClientSession(headers={"Authorization": "Bearer bench"}, connector=aiohttp.TCPConnector(limit=0), timeout=aiohttp.ClientTimeout(20)) as self.http:
            await self.start_hub()
            for number in range(NODES):
                await self.ask("PUT", f"/api/v1/nodes/n{number}", {**CAPACITY, "region": f"r{number % 3}"})
            tasks = [asyncio.create_task(edge.run()) for edge in self.edges]
            while len((await self.ask("GET", "/api/v1/nodes"))[1]) < NODES + EDGES:
                await asyncio.sleep(0.1)
            callers = [asyncio.create_task(self.caller(number)) for number in range(options.callers)]
            draw = random.Random(options.seed)
            for number in range(options.kills):
                await asyncio.sleep(options.seconds / (options.kills + 1) * draw.uniform(0.6, 1.4))
                note(options, f"kill {number + 1} of {options.kills}: {self.counts['post 200']} answers")
                await self.kill()
            await asyncio.sleep(options.seconds / (options.kills + 1))
            self.ended.set()
            await asyncio.gather(*callers)
            await asyncio.sleep(QUIET_S)
            desired = {edge.name: said for edge in self.edges for status, said in [await self.ask("GET", f"/api/v1/edges/{edge.name}/desired")] if status == 200}
            sample = random.Random(options.seed).sample(sorted(self.acknowledged), min(SAMPLE, len(self.acknowledged)))
            unknown = [f"{name}: acknowledged, and not known to the API" for name in sample if (await self.ask("GET", f"/api/v1/workloads/{name}"))[0] != 200]
            await ended(*tasks)
        assert self.process is not None
        stop(self.process)
        return self.judge(desired, unknown)

    def judge(self, desired: dict[str, Any], unknown: list[str]) -> dict[str, Any]:
        """The independent checker on the file, the documents, and what the edges saw."""
        log = placement_log.read(self.home / "hub.db")
        over, where = placement_log.overcommit(log, int(time.time() * 1000))
        doubles = placement_log.doubles(log, desired) + self.found
        lost = placement_log.lost(log, self.acknowledged) + unknown
        with contextlib.closing(sqlite3.connect(self.home / "hub.db")) as db:
            sound = db.execute("PRAGMA integrity_check").fetchone()[0]
            planned = db.execute("SELECT count(*) FROM workloads WHERE plan!='{}'").fetchone()[0]
            rebalances = Counter(json.loads(text)["state"] for (text,) in db.execute("SELECT document FROM rebalances"))
        states = Counter(state for state, _, _ in log.workloads.values())
        return {
            "overcommitted_node_seconds": over, "overcommitted": where[:5], "double": len(doubles), "doubles": doubles[:5], "lost": len(lost), "losses": lost[:5], "integrity": sound,
            "placements": len(log.placements), "acknowledged": len(self.acknowledged), "states": dict(states), "planned": planned, "rebalances": dict(rebalances), "requests": dict(self.counts),
            "submit_ms": {"p50": round(percentile(self.submit_ms, 0.5), 1), "p99": round(percentile(self.submit_ms, 0.99), 1)},
            "hub_start_s": {"first": round(self.back_s[0], 2), "after_kill_max": round(max(self.back_s[1:], default=0.0), 2)}, "edge_records": sum(len(edge.records) for edge in self.edges),
        }


def main() -> int:
    """The bench."""
    parser = arguments(__doc__, seconds=40)
    parser.add_argument("--callers", type=int, default=64)
    parser.add_argument("--kills", type=int, default=6)
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--planted", action="store_true", help="negative control: a hub with a planted bug, which must be found (exit status 1)")
    options = parser.parse_args()
    about = machine()
    with tempfile.TemporaryDirectory() as folder:
        found = asyncio.run(Run(options, Path(folder)).run())
    bad = found["overcommitted_node_seconds"] + found["lost"] + found["double"]
    ok = bad == 0 and found["integrity"] == "ok" and found["requests"].get("kills", 0) == options.kills and found["placements"] > 0
    inputs = {"callers": options.callers, "kills": options.kills, "seconds": options.seconds, "nodes": NODES, "edges": EDGES, "names_at_once": NAMES, "seed": options.seed}
    return report(options, about, "0 overcommitted node-seconds, 0 lost, 0 double placements under 64 callers and SIGKILL", bad, "violations", ok, inputs=inputs, details=found)


if __name__ == "__main__":
    sys.exit(main())
