"""Containers under containerd through everything: hub, agent as a process, containerd. A killed agent's containers are the next one's, and so is how they ended meanwhile."""

import asyncio
import json
import os
import signal
from pathlib import Path

import pytest

from tests.integration.containerd_side import Containerd, answers, reason_against
from tests.integration.hub_side import running_hub
from tests.integration.waiting import until

from .test_containers_adopted import Node, said, states, submit, work

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.system, pytest.mark.timeout(600)]

WAIT_S = 250.0
"""An upper bound for what is awaited here."""

ROOM = {"memory": "128Mi"}
"""What starts a container counts as well, and this is not about that."""


async def test_a_killed_agents_containers_under_containerd_are_the_next_ones(tmp_path: Path) -> None:
    one = Containerd()
    one.start()
    await answers(one)
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path / "node", hub, runtimes=["containerd", "runc"], containerd=one.socket)
        try:
            await asyncio.to_thread(node.start)
            await submit(
                hub, work("adopted-goes-on", "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done", limits=ROOM), work("adopted-ends", "trap 'exit 6' TERM; echo up; while :; do sleep 0.05; done", limits=ROOM),
                work("kata", "true", isolation="kata"),
            )
            for name in ("adopted-goes-on", "adopted-ends"):
                await until(lambda name=name: "running" in states(hub, name), WAIT_S, what=f"{name} to run: {said(hub)}")
            folders = sorted((node.data / "workloads/containerd/containers").glob("*.1"))
            assert [folder.name.partition(".")[0] for folder in folders] == ["adopted-ends", "adopted-goes-on"] and len(one.shims()) == 2, "by containerd, which is named first"
            assert not list((node.data / "workloads/containers").glob("*.1")) and hub.workloads.rows["kata"].state == "pending", "no node has that"
            pids = {folder.name.partition(".")[0]: int(json.loads((folder / "running.json").read_text())["pid"]) for folder in folders}
            for folder in folders:
                await until(lambda folder=folder: (folder / "stdout.log").exists() and (folder / "stdout.log").read_bytes(), WAIT_S, what="its first word: it heeds signals")
            await asyncio.to_thread(node.kill)
            watched = os.pidfd_open(pids["adopted-ends"])
            signal.pidfd_send_signal(watched, signal.SIGTERM)
            os.close(watched)
            await asyncio.to_thread(node.start)
            await until(lambda: "failed" in states(hub, "adopted-ends"), WAIT_S, what=f"how it ended: {said(hub)}")
            assert next(reason for name, _, state, reason in said(hub) if (name, state) == ("adopted-ends", "failed")) == "exit code 6"
            assert Path(f"/proc/{pids['adopted-goes-on']}").exists() and states(hub, "adopted-goes-on").count("running") == 1, "it was not started again"
            await hub.workloads.ask(lambda planner, now: planner.cancel("adopted-goes-on", now))
            await until(lambda: not Path(f"/proc/{pids['adopted-goes-on']}").exists(), WAIT_S)
            await until(lambda: not one.shims(), WAIT_S, what="the end of all shims")
        finally:
            await asyncio.to_thread(node.end)
            one.remove()


async def test_without_containerd_the_next_one_named_is_taken(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path / "node", hub, runtimes=["containerd", "runc"], containerd=str(tmp_path / "none.sock"))
        try:
            await asyncio.to_thread(node.start)
            await submit(hub, work("adopted-direct", "trap 'exit 0' TERM; echo up; while :; do sleep 0.05; done", limits=ROOM))
            await until(lambda: "running" in states(hub, "adopted-direct"), WAIT_S, what=f"it to run: {said(hub)}")
            assert (node.data / "workloads/containers/adopted-direct.1").is_dir()
        finally:
            await asyncio.to_thread(node.end)
