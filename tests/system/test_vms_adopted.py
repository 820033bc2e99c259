"""Virtual machines through everything: hub, agent as a process, QEMU. A killed agent's machines are the next one's."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from tests.integration.hub_side import running_hub
from tests.integration.vm_side import BOOT_S, MEMORY, end_all, kernel_folder, made_vms, reason_against
from tests.integration.waiting import until
from tools.bench.agent import Agent
from tools.novactl import samples

from .test_containers_adopted import alive, said, states, submit

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.system]


def machine(name: str, script: str, **spec: Any) -> dict[str, Any]:
    """A workload of kind `vm` whose user data is a script."""
    return {
        "id": name, "kind": "vm", "image": samples.NAMES["vm"], "requests": {"cpu": "100m", "memory": MEMORY}, "spec": {"boot_s": BOOT_S, "cloud_init": {"user_data": "#!/bin/sh\n" + script}, **spec},
    }


async def test_a_machine_outlives_a_killed_agent(tmp_path: Path) -> None:
    from edge_runtime.workloads.drivers.instance import read
    from edge_runtime.workloads.images import ImageStore

    data = tmp_path / "data"
    await asyncio.to_thread(samples.make, "vm", data / "workloads/archives", kernel_folder())
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        def agent() -> Agent:
            made = Agent(0, api=False, uplink_port=hub.broker.port, model="", host=False, data=data, extra={
                "bus": {"enabled": False}, "decisions": {}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
                "workloads": {
                    "enabled": True, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "reserve_disk_bytes": 0, "runtimes": [], "functions": False, "vms": True, "guest_kernel": kernel_folder(),
                },
            })
            made.__enter__()
            return made

        running = await asyncio.to_thread(agent)
        try:
            await until(lambda: "bench-edge" in hub.workloads.planner.tables.nodes and hub.workloads.planner.runs("bench-edge") == ["vm"], 90.0, what="a node that runs virtual machines")
            await submit(hub, machine("ends", "poweroff -f", template=True), machine("lasting", "true", template=True), machine("odd", "true", nonsense=1))
            await until(lambda: states(hub, "lasting") == ["accepted", "running"], 120.0, what="the lasting one")
            await until(lambda: states(hub, "ends")[-1:] == ["done"], 60.0, what="the end of the other")
            await until(lambda: any(row[0] == "odd" and row[2] == "refused" and "spec.nonsense" in row[3] for row in said(hub)), 60.0, what="the refusal")
            note = read(data / "workloads/vms/lasting.1/running.json")
            assert note is not None
            running.kill()
            running.__exit__()
            assert alive(int(note["pid"]))
            running = await asyncio.to_thread(agent)
            await hub.workloads.ask(lambda planner, now: planner.cancel("lasting", now))
            await until(lambda: states(hub, "lasting") == ["accepted", "running", "stopped"], 120.0, what="the stop")
            assert not alive(int(note["pid"])) and not (data / "workloads/vms/lasting.1").exists()
        finally:
            await asyncio.to_thread(running.kill)
            running.__exit__()
            store = ImageStore(data / "workloads/images")
            await asyncio.to_thread(end_all, made_vms(data / "workloads", store))
            store.close()
