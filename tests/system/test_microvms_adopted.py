"""Micro-VMs through everything: hub, agent as a process, QEMU. One field apart from a container; a killed agent's micro-VMs are the next one's."""

import asyncio
from pathlib import Path

import pytest

from hub.workloads.documents import read_list
from tests.integration.hub_side import running_hub
from tests.integration.microvm_side import kernel_folder, made_microvms, reason_against
from tests.integration.waiting import until
from tests.unit.workloads.image_side import archive, layout
from tools.bench.agent import Agent

from .test_containers_adopted import alive, said, states, submit, work

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.system]


async def test_a_microvm_outlives_a_killed_agent(tmp_path: Path) -> None:
    from edge_runtime.workloads.drivers.instance import read
    from edge_runtime.workloads.images import ImageStore
    from tests.integration.container_side import base
    from tests.integration.microvm_side import end_all

    data = tmp_path / "data"
    archives = data / "workloads/archives"
    archives.mkdir(parents=True)
    archive(layout(tmp_path / "in", [base()], name="box:1"), archives / "box.tar")
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        def agent() -> Agent:
            made = Agent(0, api=False, uplink_port=hub.broker.port, model="", host=False, data=data, extra={
                "bus": {"enabled": False}, "decisions": {}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
                "workloads": {
                    "enabled": True, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "reserve_disk_bytes": 0, "runtimes": [], "functions": False, "microvms": True, "guest_kernel": kernel_folder(),
                },
            })
            made.__enter__()
            return made

        running = await asyncio.to_thread(agent)
        try:
            await until(lambda: "bench-edge" in hub.workloads.planner.tables.nodes and hub.workloads.planner.runs("bench-edge") == ["container", "batch"], 60.0, what="a node that runs micro-VMs")
            await submit(
                hub, work("good", "exit 0", isolation="microvm"), work("bad", "exit 7", isolation="microvm"), work("lasting", "trap 'exit 0' TERM; while :; do sleep 0.1; done", isolation="microvm"),
                work("kata", "exit 0", isolation="kata"),
            )
            await until(lambda: states(hub, "good")[-1:] == ["done"] and states(hub, "bad")[-1:] == ["failed"], 60.0, what="the ends")
            await until(lambda: states(hub, "lasting") == ["accepted", "running"], 60.0, what="the lasting one")
            assert hub.workloads.rows["kata"].state == "pending", "no node has it"
            assert ("bad", 1, "failed", "exit code 7") in said(hub)
            note = read(data / "workloads/microvms/lasting.1/running.json")
            assert note is not None
            running.kill()
            running.__exit__()
            assert alive(int(note["pid"]))
            running = await asyncio.to_thread(agent)
            await hub.workloads.ask(lambda planner, now: planner.cancel("lasting", now))
            await until(lambda: states(hub, "lasting") == ["accepted", "running", "stopped"], 60.0, what="the stop")
            assert not alive(int(note["pid"])) and not (data / "workloads/microvms/lasting.1").exists()
        finally:
            await asyncio.to_thread(running.kill)
            running.__exit__()
            store = ImageStore(data / "workloads/images")
            await asyncio.to_thread(end_all, made_microvms(data / "workloads", store))
            store.close()


def test_a_document_names_its_isolation() -> None:
    item = read_list([work("a", "true", isolation="microvm")])[0].item
    assert ("novacron.isolation/microvm", "true") in item.shape.node_selector
    assert not any(key.startswith("novacron.isolation/") for key, _ in read_list([work("a", "true", isolation="namespaces")])[0].item.shape.node_selector)
    with pytest.raises(ValueError, match=r"spec.isolation: 'glass' is unknown; use one of namespaces, microvm, kata"):
        read_list([work("a", "true", isolation="glass")])
    with pytest.raises(ValueError, match="is not for a function"):
        read_list([{**work("a", "true", isolation="microvm"), "kind": "function"}])
