"""200 workloads on this host, its agent killed with SIGKILL ten times, while they start, while they run and while they stop: what runs is adopted, nothing is started twice, nothing is left.

A real hub and broker, a real agent, real containers, functions and batch jobs: some run until they are stopped, some end well, some fail. Each program says one word when it starts; so a log with two is a
workload that was started twice. The process of each lasting one (pid and start time) must be the same before a kill and after the agent is back. At the end everything is cancelled, and no process,
control group or folder of it may be left. Without wasmtime there are containers only.
"""

import asyncio
import json
import os
import random
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from edge_runtime.workloads.drivers import cgroups
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.function import FunctionDriver
from edge_runtime.workloads.images import ImageStore
from hub.server import Hub, HubSettings
from hub.workloads.documents import read_list
from tools.escape.attempts import Attempt
from tools.escape.program import program

from .agent import Agent
from .container_start import layout_of
from .functions_image import LINE, artefact
from .harness import arguments, machine, note, report

WORKLOADS = 200
KILLS = 10
SEED = 1

WORD = b"began\n"
"""What each program says first."""

WAIT_S = 300.0
"""Something that has not come by then does not come."""

LOOK_S = 0.1

KINDS = {"lasting": 3, "done": 2, "failing": 1, "function": 3, "job": 1}
"""Share of each: containers that stay, end well and fail; functions, which stay; batch jobs of WebAssembly, which end well."""

STAYING = ("lasting", "function")
ENDS = {"lasting": "placed", "done": "done", "failing": "failed", "function": "placed", "job": "done"}
"""What the hub shall say of each kind in the end."""


def programs() -> dict[str, bytes]:
    """One for each kind: says its word, then waits for ever, ends well, or fails."""
    word = Attempt("", "", "write", (1, WORD, len(WORD)))
    ends = {"lasting": Attempt("", "", "pause", ()), "done": Attempt("", "", "exit", (0,)), "failing": Attempt("", "", "exit", (7,))}
    return {kind: program([word, end], told=False) for kind, end in ends.items()}


@dataclass(slots=True)
class Found:
    """What was seen."""

    adopted: int = 0
    moved: list[str] = field(default_factory=list)
    twice: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    left: list[str] = field(default_factory=list)
    back_s: list[float] = field(default_factory=list)
    rss_mb: list[float] = field(default_factory=list)


class Host:
    """An agent on this host, and a look at what it runs.

    Args:
        count: workloads.
    """

    def __init__(self, folder: Path, port: int, count: int) -> None:
        self.data, self._port, self.count = folder / "data", port, count
        store = ImageStore(self.data / "workloads/images")
        store.add(layout_of(folder / "image", programs()), "mixed:1")
        if find_spec("wasmtime") is not None:
            store.add(artefact(folder / "module"), "line:1")
        store.close()
        self.agent: Agent | None = None

    def start(self) -> None:
        """Until it is ready."""
        self.agent = Agent(0, api=False, uplink_port=self._port, model="", host=False, data=self.data, extra={
            "bus": {"enabled": False}, "decisions": {}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0}, "workloads": {
                "enabled": True, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "reserve_disk_bytes": 0, "runtimes": ["runc"], "max_workloads": self.count,
            },
        })
        self.agent.__enter__()

    def kill(self) -> None:
        """SIGKILL."""
        if self.agent is not None:
            self.agent.kill()
            self.agent.__exit__()
            self.agent = None

    def running(self) -> dict[str, tuple[int, int]]:
        """Pid and start of the first process of each that shall stay and runs."""
        found = {}
        for name, folder in self.folders().items():
            told = _read(folder / "running.json")
            if told is not None and not (folder / "exit.json").exists() and name.startswith(STAYING):
                found[name] = (told["pid"], told["started"])
        return found

    def at_least(self, count: int) -> bool:
        """Whether so many run."""
        return len(self.running()) >= count

    def at_most(self, count: int) -> bool:
        """Whether no more than so many run."""
        return len(self.running()) <= count

    def folders(self) -> dict[str, Path]:
        """Of instances, by name."""
        tops = [self.data / "workloads" / kind for kind in ("containers", "functions")]
        return {entry.name: Path(entry.path) for top in tops if top.exists() for entry in os.scandir(top) if not entry.name.startswith(".")}

    def end(self) -> None:
        """Kill the agent, and everything that is left."""
        self.kill()
        store = ImageStore(self.data / "workloads/images")
        drivers = (ContainerDriver(self.data / "workloads", store), FunctionDriver(self.data / "workloads", store))

        async def all_of_it() -> None:
            for driver in drivers:
                for status in await driver.instances():
                    await driver.delete(status.key)

        asyncio.run(all_of_it())
        for driver in drivers:
            driver.close()
        store.close()


def _read(path: Path) -> dict[str, Any] | None:
    try:
        value = json.loads(path.read_text())
    except (FileNotFoundError, ValueError):
        return None
    return value if isinstance(value, dict) else None


def lives(pid: int, started: int) -> bool:
    """Whether this very process is there."""
    try:
        return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19]) == started
    except (OSError, IndexError):
        return False


def kind_of(number: int) -> str:
    """Of a workload, by its number."""
    turn = [kind for kind, share in KINDS.items() for _ in range(share)]
    return turn[number % len(turn)]


def document(number: int) -> dict[str, Any]:
    """What is submitted."""
    kind = kind_of(number)
    about: dict[str, Any] = {"kind": "container", "image": "mixed:1", "spec": {"command": [f"/{kind}"]}}
    if kind in ("function", "job"):
        about = {"kind": "function" if kind == "function" else "batch", "image": "line:1"}
    return {"id": f"{kind}-{number}", "requests": {"cpu": "5m", "memory": "16Mi"}, **about}


async def until(condition: Callable[[], bool], what: str, why: Callable[[], object] = str) -> None:
    """Raises TimeoutError where it does not come, with what `why` finds then."""
    end = time.monotonic() + WAIT_S
    while not condition():
        if time.monotonic() > end:
            raise TimeoutError(f"{what} did not come within {WAIT_S:g} s {why()}")
        await asyncio.sleep(LOOK_S)


def states(hub: Hub) -> dict[str, str]:
    """What the edge said last of each workload."""
    return {name: row.state for name, row in hub.workloads.rows.items()}


async def cancel(hub: Hub, name: str) -> None:
    """As the API does."""
    await hub.workloads.ask(lambda planner, now: planner.cancel(name, now))


def plant(before: Mapping[str, tuple[int, int]]) -> None:
    """The planted bug: a container ends with its agent."""
    pid, started = next(one for name, one in before.items() if name.startswith("lasting"))
    os.kill(pid, signal.SIGKILL)
    end = time.monotonic() + WAIT_S
    while lives(pid, started) and time.monotonic() < end:
        time.sleep(LOOK_S)


async def killed(host: Host, found: Found, planted: bool) -> None:
    """Kill the agent, have it back, and look whether what ran is the same."""
    before = {name: one for name, one in host.running().items() if lives(*one)}
    await asyncio.to_thread(host.kill)
    if planted:
        await asyncio.to_thread(plant, before)
    found.wrong += [f"{name} ended with the agent" for name, one in before.items() if not lives(*one)]
    began = time.monotonic()
    await asyncio.to_thread(host.start)
    found.back_s.append(round(time.monotonic() - began, 2))
    for name, one in before.items():
        if host.running().get(name, one) == one:
            found.adopted += 1
        else:
            found.moved.append(name)


async def run(options: Any, folder: Path, found: Found) -> None:
    """The whole story."""
    chance = random.Random(options.seed)
    hub = Hub(HubSettings(folder / "hub", broker="embedded", broker_port=0, port=0))
    await hub.start()
    host = Host(folder, hub.broker.port, options.workloads)
    try:
        await asyncio.to_thread(host.start)
        await until(lambda: "bench-edge" in hub.workloads.planner.tables.nodes and bool(hub.workloads.planner.runs("bench-edge")), "a node that runs containers")
        await hub.workloads.submit(read_list([document(number) for number in range(options.workloads)]))
        lasting = sum(kind_of(number) in STAYING for number in range(options.workloads))
        starting, stopping = max(1, options.kills * 4 // 10), max(1, options.kills * 2 // 10)
        for number in range(starting):  # at so much of them, somewhere within the start of one
            await until(partial(host.at_least, lasting * (number + 1) // (starting + 1)), "the next part of them")
            await asyncio.sleep(chance.uniform(0, 0.2))
            await killed(host, found, False)
            note(options, f"killed while {len(host.running())} of {lasting} lasting ones ran")
        await until(lambda: all(states(hub).get(f"{kind_of(number)}-{number}") == ENDS[kind_of(number)] for number in range(options.workloads)), "the state that each shall have", lambda: dict(Counter((name.partition("-")[0], state) for name, state in states(hub).items())))
        ran = host.running()
        for _ in range(options.kills - starting - stopping):
            await killed(host, found, options.control)
            if options.control:
                return
            assert host.agent is not None
            found.rss_mb.append(round(host.agent.memory().rss / 1e6, 1))
            note(options, f"killed while all ran; back after {found.back_s[-1]} s")
        await until(lambda: len(host.running()) == lasting, "all lasting ones")
        for name, one in host.running().items():
            if name.startswith("lasting") and one != ran.get(name):
                found.moved.append(name)
        found.wrong += [f"{name}: {state}" for name, state in states(hub).items() if state != ENDS[name.partition("-")[0]]]
        await until(lambda: not any(name.startswith("probe-") for name in host.folders()), "the removal of what killed agents were probing with")
        for name, place in host.folders().items():
            said = (place / "stdout.log").read_bytes() if (place / "stdout.log").exists() else b""
            word = b"" if name.startswith("function") else LINE if name.startswith("job") else WORD
            if word and said.count(word) > 1:
                found.twice.append(name)
            elif said != word:
                found.wrong.append(f"{name} said {said!r}")
        pids = dict(host.running())
        for number in range(options.workloads):
            if kind_of(number) in STAYING:
                await cancel(hub, f"{kind_of(number)}-{number}")
        for number in range(stopping):
            await until(partial(host.at_most, lasting * (stopping - number) // (stopping + 1)), "the stop of the next part")
            await asyncio.to_thread(host.kill)
            await asyncio.to_thread(host.start)
            note(options, f"killed while {len(host.running())} ran that shall stop")
        await until(lambda: not host.folders(), "the removal of all")
        found.left += [name for name, one in pids.items() if lives(*one)]
        found.left += sorted(path for top in cgroups.read().folders(cgroups.PARENT) if os.path.isdir(top) for path in os.listdir(top) if path.startswith(tuple(f"{kind}-" for kind in KINDS)))
        found.left += sorted(os.listdir(host.data / "workloads/runtime"))
    finally:
        await asyncio.to_thread(host.end)
        await hub.stop()


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--workloads", type=int, default=WORKLOADS)
    parser.add_argument("--kills", type=int, default=KILLS)
    parser.add_argument("--seed", type=int, default=SEED, help="of the moments of the kills")
    parser.add_argument("--control", action="store_true", help="plant a bug: the promise must be broken")
    options = parser.parse_args()
    about, found = machine(), Found()
    if find_spec("wasmtime") is None:
        for kind in ("function", "job"):
            del KINDS[kind]
    if os.geteuid() != 0:
        raise SystemExit("containers need root")
    began = time.monotonic()
    with tempfile.TemporaryDirectory() as top:
        asyncio.run(run(options, Path(top), found))
    bad = len(found.moved) + len(found.twice) + len(found.wrong) + len(found.left)
    details = {
        "adopted": found.adopted, "started_again": found.moved[:20], "started_twice": found.twice[:20], "wrong": found.wrong[:20], "left": found.left[:20],
        "agent_back_s": {"most": max(found.back_s, default=0), "all": found.back_s}, "agent_rss_mb": found.rss_mb, "seconds": round(time.monotonic() - began),
    }
    return report(
        options, about, f"{options.workloads} workloads, the agent killed {options.kills} times: lost, started again, left over", bad, "workloads", bad == 0 and found.adopted > 0,
        inputs={"workloads": options.workloads, "kills": options.kills, "seed": options.seed, "kinds": KINDS}, details=details,
    )


if __name__ == "__main__":
    sys.exit(main())
