"""An agent that carries out conversions, as a process that can be killed at any step: `python -m tests.system.converting_agent FOLDER OPERATIONS [POINT]`.

OPERATIONS is a JSON list of [id, TO]; they are asked for one after the other, and the agent ends when the last has ended; it prints how each did. POINT is what the last one has reached when the agent is
killed: `accepted`, `converting` (written down), one of `conversion.record.POINTS`, or `done` (the operation has not ended yet). The workload runs on. Each life adds to FOLDER's file `BEGAN` which run of it was there.
"""

import asyncio
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import ApiConfig, BusConfig, DevicesConfig, HostConfig, JournalConfig, UplinkConfig, WorkloadsConfig
from edge_runtime.contract.desired import parse_desired
from edge_runtime.contract.operations import FINAL_STATES
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.workloads.conversion.driver import ConvertibleDriver
from edge_runtime.workloads.conversion.hot import Conversions
from edge_runtime.workloads.operations import Operations
from tests.integration.checkpoint_side import program
from tests.integration.microvm_side import kernel_folder
from tests.integration.waiting import until
from tests.system.convert_agent import key

EDGE = "converting"
COUNTS = "trap 'exit 0' TERM; read -r run < /proc/sys/kernel/random/uuid; echo $run; i=0; while true; do echo $i; i=$((i+1)); sleep 0.1; done"
"""Says first which run of it this is: what its agent starts again has an output of its own, which begins with 0 as this one did."""

BEGAN = "began"
BOUND_S = 240.0
"""Of one wait: a guest boots within it on a busy machine."""


def config(folder: Path) -> EdgeConfig:
    """One edge without link, bus and API."""
    return EdgeConfig(
        edge_id=EDGE, data_dir=str(folder / "data"), uplink=UplinkConfig(enabled=False), bus=BusConfig(enabled=False), api=ApiConfig(enabled=False), devices=DevicesConfig(host=HostConfig(enabled=False)),
        journal=JournalConfig(min_free_bytes=0, ballast_bytes=0, target_hours=0),
        workloads=WorkloadsConfig(
            enabled=True, runtimes=("runc",), criu=program(), conversions=True, guest_kernel=kernel_folder(), functions=False, reserve_cpu_milli=0, reserve_memory_bytes=0, reserve_disk_bytes=0,
            evict_memory_bytes=0, evict_disk_bytes=0,
        ),
    )


def desired(folder: Path, generation: int, operations: list[list[str]]) -> Any:
    """The workload, and what it shall become."""
    one, epoch = key(folder).id, key(folder).epoch
    spec = {"command": ["sh", "-c", COUNTS], "restart": "always", "converts": True, "limits": {"memory": "32Mi"}}
    return parse_desired({
        "v": 1, "edge": EDGE, "generation": generation, "spec": {
            "workloads": [{"id": one, "epoch": epoch, "wanted": "running", "kind": "container", "image": "box:1", "requests": {"disk": 64 << 20}, "document": {"id": one, "image": "box:1", "spec": spec}}],
            "operations": [{"id": name, "kind": "convert", "workload": one, "epoch": epoch, "to": to, "expires_ms": 2**53} for name, to in operations],
        },
    }, EDGE)


def killed_at(point: str, last: str) -> None:
    """Have this process killed there, in the operation `last`."""
    def kill(word: str) -> None:
        if word == point and now[0] == last:
            print(f"killed at {point}", flush=True)
            os.kill(os.getpid(), signal.SIGKILL)

    reach, convert, made, now = Operations.reach, ConvertibleDriver.convert, Conversions.__init__, [""]

    async def reached(self: Operations, name: str, step: str) -> None:
        now[0] = name
        kill("accepted")
        await reach(self, name, step)
        kill(step)

    async def converted(self: ConvertibleDriver, *rest: Any) -> Any:
        found = await convert(self, *rest)
        kill("done")
        return found

    def making(self: Conversions, *rest: Any) -> None:
        made(self, *rest, step=kill)

    for where, name, other in ((Operations, "reach", reached), (ConvertibleDriver, "convert", converted), (Conversions, "__init__", making)):
        setattr(where, name, other)


async def lived(folder: Path, operations: list[list[str]]) -> None:
    """One agent's life."""
    runtime = EdgeRuntime(config(folder))
    await runtime.start()
    generation = runtime.desired.generation if runtime.desired else 0
    runtime.desired_state.receive(desired(folder, generation + 1, []))
    node = runtime.workload_node()

    async def speaks() -> bool:
        said = await node.output(key(folder).id, 1 << 20)
        if said is None or len(lines := said["stdout"].splitlines()) <= 4:
            return False
        with (folder / BEGAN).open("a") as began:
            began.write(f"{lines[0]}\n")
        return True

    await until(speaks, BOUND_S)
    for at, (name, _) in enumerate(operations):
        runtime.desired_state.receive(desired(folder, generation + 2 + at, operations[: at + 1]))
        await until(lambda name=name: (node.asked.operation(name) or {}).get("state") in FINAL_STATES, BOUND_S)  # type: ignore[misc]
        print(json.dumps(node.asked.operation(name)), flush=True)
    await runtime.stop("test")


def main() -> int:
    """See the module."""
    folder, operations = Path(sys.argv[1]), json.loads(sys.argv[2])
    if len(sys.argv) > 3:
        killed_at(sys.argv[3], operations[-1][0])
    asyncio.run(lived(folder, operations))
    return 0


if __name__ == "__main__":
    sys.exit(main())
