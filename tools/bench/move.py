"""How long a container of 64 MiB stands still while it moves to another node with its state, and what goes over the wire: a hub, two agents as processes on this machine, migration workers that they start.
`--kind vm`: a virtual machine of 256 MiB (`move_vm`); `--disk MIB`: which has written that much to its disk. Where the QEMU of both nodes can, it moves while it runs; `--qemu FOLDER`: the agents use the one that lies there.

The container is the witness: it writes the machine's wall clock (CRIU has the monotonic one go on from where it stood) to a folder that both nodes have, some hundred times a second. The longest gap in that is the time for which it stood still, from its last
instruction at the source to its first one at the target. A round is believed only where its memory is unchanged by a hash that it made before, and no line is missing or there twice.

The peer is what a drain without moves does in the same set-up: stopped at the source and begun anew at the target, where its memory is lost. It says what the way through hub and agents alone costs.
"""

import asyncio
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

from hub.server import Hub, HubSettings
from hub.transfers.service import worker_token
from hub.workloads import moving
from hub.workloads.documents import read_list

from .agent import Agent
from .checkpoint import LAID_OUT, MOUNTS, PYTHON
from .container_start import layout_of
from .harness import arguments, machine, note, report, spread

SIZE = 64 << 20
"""Bytes of the witness's memory, the files of /usr/lib in order."""

BAR_S = 10.0
"""What a client's usual timeouts bear; two cores that do all of it, source, target, hub and both workers."""

PATIENCE_S = 120.0
"""For a step of a round, on a machine that is busy with other things."""

LOOK_S = 0.02

PROGRAM = """
import hashlib, os, signal, sys, time
signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
most, held, have = int(os.environ["MOST"]), [], 0
for top, folders, files in os.walk("/usr/lib"):
    folders.sort()
    for name in sorted(files):
        path = os.path.join(top, name)
        if have < most and os.path.isfile(path) and not os.path.islink(path):
            with open(path, "rb") as source:
                data = source.read(most - have)
            held.append(data)
            have += len(data)
def digest():
    told = hashlib.sha256()
    for data in held:
        told.update(data)
    return told.hexdigest()
number, out = 0, open("/shared/lines", "a", buffering=1)
while True:
    out.write(f"{number} {time.time_ns()}\\n")
    number += 1
    time.sleep(0.003)
    if os.path.exists("/shared/ask"):
        told = digest()
        os.unlink("/shared/ask")
        with open("/shared/new", "w") as answer:
            answer.write(told)
        os.rename("/shared/new", "/shared/told")
"""


async def until(check: Callable[[], Any], what: str) -> Any:
    """What `check` gives, once it is true; raises SystemExit past `PATIENCE_S`."""
    end = asyncio.get_running_loop().time() + PATIENCE_S
    while not (found := check()):
        if asyncio.get_running_loop().time() > end:
            raise SystemExit(f"{what} did not happen within {PATIENCE_S:g} s")
        await asyncio.sleep(LOOK_S)
    return found


class Witness:
    """The container, and what it wrote. `folder`: below which all is that it needs."""

    KIND, BAR_S = "container", BAR_S
    WHAT = "a container of 64 MiB"

    def __init__(self, folder: Path) -> None:
        self.INPUTS: dict[str, Any] = {"bytes": SIZE, "memory": "the files of /usr/lib, in order"}
        self.folder = folder / "shared"
        self.folder.mkdir()
        self.folder.chmod(0o777)

    def give_image(self, data: Path, scratch: Path) -> None:
        """What it runs from, in the archives of a node."""
        (data / "workloads/archives").mkdir(parents=True)
        shutil.copytree(layout_of(scratch, {"tmp/nothing": b""}), data / "workloads/archives/bench")
        index = data / "workloads/archives/bench/index.json"
        told = json.loads(index.read_text())
        told["manifests"][0]["annotations"] = {"org.opencontainers.image.ref.name": "bench:1"}
        index.write_text(json.dumps(told))

    def workloads(self) -> dict[str, Any]:
        """Of a node's configuration."""
        return {"mounts": ["/usr", str(self.folder)], "criu": str(LAID_OUT) if LAID_OUT.exists() else "criu"}

    def document(self) -> dict[str, Any]:
        """The workload."""
        mounts = [*MOUNTS, {"target": "/shared", "source": str(self.folder), "read_only": False, "shared": True}]
        spec = {"command": [PYTHON, "-c", PROGRAM], "env": {"MOST": str(SIZE)}, "mounts": mounts, "limits": {"memory": SIZE * 4}}
        return {"id": "w", "image": "bench:1", "requests": {"cpu": "100m", "memory": SIZE * 4}, "spec": spec}

    def forget(self) -> None:
        """Numbers begin anew; who has the file open writes on there."""
        (self.folder / "lines").rename(self.folder / "lines.before")

    def close(self) -> None:
        """Nothing more will be asked."""

    def lines(self) -> list[tuple[int, int]]:
        """Number and clock (ns) of each whole line."""
        path = self.folder / "lines"
        return [(int(number), int(at)) for number, at in (line.split() for line in path.read_text().split("\n")[:-1])] if path.exists() else []

    async def digest(self) -> str:
        """The hash over its memory, as it has it now."""
        (self.folder / "told").unlink(missing_ok=True)
        (self.folder / "ask").touch()
        await until((self.folder / "told").exists, "the hash over its memory")
        return (self.folder / "told").read_text()


def gap_s(lines: list[tuple[int, int]]) -> float:
    """The longest time between two lines."""
    return max(later - sooner for (_, sooner), (_, later) in pairwise(lines)) / 1e9


async def settled(hub: Hub, node: str) -> None:
    """It runs on a node, and nothing is left elsewhere."""
    def there() -> bool:
        tables = hub.workloads.planner.tables
        return hub.workloads.rows["w"].node == node and len(tables.epochs.get("w", ())) == 1 and tables.open["w", hub.workloads.rows["w"].epoch].said == "running"

    await until(there, f"it runs on {node}")


async def moved(hub: Hub, witness: Witness, target: str) -> dict[str, float]:
    """One move; figures."""
    before, first = await witness.digest(), len(witness.lines())
    begun = await hub.workloads.ask(lambda planner, now: moving.begin(planner, "w", target, now, "bench"))
    await until(lambda: hub.workloads.planner.tables.moves[begun["id"]]["state"] != "running", "the end of the move")
    ended = hub.workloads.planner.tables.moves[begun["id"]]
    if ended["state"] != "done":
        raise SystemExit(f"the move failed: {ended['reason']}")
    await settled(hub, target)
    seen = len(witness.lines())
    await until(lambda: len(witness.lines()) > seen + 10, "it goes on")
    lines = witness.lines()
    if [number for number, _ in lines] != list(range(len(lines))):
        raise SystemExit("lines are missing or there twice: another copy ran")
    gap = gap_s(lines[first:])
    if await witness.digest() != before:
        raise SystemExit("its memory is not what it was")
    carried, since = hub.transfers.book.transfers[moving.shown_transfer(ended)], ended["since_ms"]
    starting, whole = (ended["end_ms"] - since["starting"]) / 1000, (ended["end_ms"] - ended["created_ms"]) / 1000
    if ended["live"]:
        return {"down_s": gap, "qemu_down_s": ended["still_ms"] / 1000, "wire_mb": carried.progress.get("wire_bytes", 0) / 1e6, "whole_s": whole, "live_s": (since["starting"] - since["live"]) / 1000, "starting_s": starting}
    return {
        "down_s": gap, "wire_mb": carried.result.get("wire_bytes", 0) / 1e6, "state_mb": ended["bytes"] / 1e6, "whole_s": whole,
        "taking_s": (since["sending"] - since["taking"]) / 1000, "sending_s": (since["starting"] - since["sending"]) / 1000, "starting_s": starting,
        "ahead_mb": ended.get("ahead_bytes", 0) / 1e6, "ahead_s": (since["taking"] - since.get("ahead", since["taking"])) / 1000,
        "expected_s": carried.prediction.get("estimated_duration_seconds") or 0.0,
    }


async def restarted(hub: Hub, witness: Witness, target: str) -> float:
    """Stopped and begun anew at the other node: seconds without a line (its memory is filled before its first one)."""
    first = len(witness.lines())
    await hub.workloads.ask(lambda planner, now: planner.move("w", now, "bench", target))
    await settled(hub, target)
    await until(lambda: len(witness.lines()) > first + 10 and witness.lines()[-1][0] < witness.lines()[first - 1][0], "it begins anew")
    gap = gap_s(witness.lines()[first - 1:])
    witness.forget()
    return gap


async def measured(options: Any, folder: Path, witness: Witness) -> tuple[list[dict[str, float]], list[float]]:
    """Figures of each move, and of each restart."""
    hub = Hub(HubSettings(folder / "hub", broker="embedded", broker_port=0, port=0))
    await hub.start()
    agents: list[Agent] = []
    try:
        await until(lambda: hub.link.up, "the hub's link")
        for name in ("a", "b"):
            data = folder / name / "data"
            witness.give_image(data, folder / name / "image")
            token = folder / name / "token"
            token.touch(mode=0o600)
            token.write_text(worker_token(hub.token, name))
            path = {"PATH": f"{options.qemu}:{os.environ['PATH']}"} if options.qemu else {}
            agent = Agent(0, api=False, uplink_port=hub.broker.port, model="", host=False, data=data, environment=path, extra={
                "edge_id": name, "bus": {"enabled": False}, "decisions": {}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
                "workloads": {
                    "enabled": True, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "reserve_disk_bytes": 0, "evict_memory_bytes": 0, "evict_disk_bytes": 0, "functions": False, **witness.workloads(),
                    "moves_hub": f"http://127.0.0.1:{hub.port}", "moves_token_file": str(token),
                },
            })
            agents.append(agent)
            await asyncio.to_thread(agent.__enter__)
        tables = hub.workloads.planner.tables
        await until(lambda: all(name in tables.nodes and moving.movable(hub.workloads.planner, name, witness.KIND) and hub.workloads.planner.is_up(name) for name in ("a", "b")), "two nodes that move states")
        await hub.workloads.submit(read_list([witness.document()]))
        here = hub.workloads.rows["w"].node
        await settled(hub, here)
        moves, restarts = [], []
        await until(lambda: len(witness.lines()) > 10, "it writes")
        for number in range(options.rounds):
            here = "b" if here == "a" else "a"
            moves.append(await moved(hub, witness, here))
            note(options, f"round {number + 1}: {json.dumps({name: round(value, 3) for name, value in moves[-1].items()})}")
        here = "b" if here == "a" else "a"
        restarts.append(await restarted(hub, witness, here))
        await hub.workloads.ask(lambda planner, now: planner.cancel("w", now))
        await until(lambda: hub.workloads.rows["w"].state == "cancelled", "its end")
        return moves, restarts
    finally:
        for agent in agents:
            await asyncio.to_thread(agent.__exit__)
        await hub.stop()


def main() -> int:
    parser = arguments(__doc__, rounds=5)
    parser.add_argument("--kind", choices=("container", "vm"), default="container")
    parser.add_argument("--disk", type=int, default=0, metavar="MIB", help="of a virtual machine: MiB that it has written to its disk, 64 or more; 0: next to nothing")
    parser.add_argument("--qemu", type=lambda text: Path(text).resolve(strict=True), default=None, metavar="FOLDER", help="of a virtual machine: where the agents' qemu-system-x86_64 lies (.novacron/qemu: QEMU 10 as the set-up lays it out)")
    options = parser.parse_args()
    if options.disk and (options.kind != "vm" or options.disk < 64):
        parser.error("--disk is for --kind vm, and 64 or more")
    about = machine()
    with tempfile.TemporaryDirectory() as top:
        if options.kind == "vm":
            from .move_vm import Guest

            witness: Witness = Guest(Path(top), options.disk)
        else:
            witness = Witness(Path(top))
        try:
            moves, restarts = asyncio.run(measured(options, Path(top), witness))
        finally:
            witness.close()
    down = [one["down_s"] for one in moves]
    value = round(median(down), 3)
    return report(
        options, about, f"{witness.WHAT} stands still while it moves to another node with its state", value, "s", value <= witness.BAR_S, spread_=spread(down),
        peer={"stopped and begun anew at the other node, its memory lost, s": round(restarts[0], 3)}, inputs={**witness.INPUTS, "bar_s": witness.BAR_S},
        details={name: spread([one[name] for one in moves if name in one]) for name in moves[0]} | {"while_it_ran": sum("live_s" in one for one in moves)},
    )


if __name__ == "__main__":
    sys.exit(main())
