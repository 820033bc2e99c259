"""An agent as a process of a user who is not root: it goes into its namespace by itself, runs what the hub gives it, and after a kill finds that again."""

import asyncio
import json
import os
from pathlib import Path

import pytest

from tests.integration.container_side import base
from tests.integration.hub_side import running_hub
from tests.integration.rootless_side import FIRST, UID, User, user
from tests.integration.waiting import until
from tests.unit.workloads.image_side import archive, layout
from tools.bench.agent import Agent

from .test_containers_adopted import said, states, submit, work

__all__ = ["user"]

pytestmark = [pytest.mark.system, pytest.mark.timeout(600)]

WAIT_S = 250.0
"""An upper bound for what is awaited here."""


def made(one: User, port: int) -> Agent:
    """An agent of this user, not started; its files are the user's."""
    agent = Agent(0, api=False, uplink_port=port, model="", host=False, data=one.data, wrap=one.wrap(), extra={
        "bus": {"enabled": False}, "decisions": {}, "journal": {"min_free_bytes": 0, "ballast_bytes": 0, "target_hours": 0},
        "workloads": {"enabled": True, "rootless": True, "reserve_cpu_milli": 0, "reserve_memory_bytes": 0, "reserve_disk_bytes": 0, "runtimes": ["runc"], "functions": False, "evict_memory_bytes": 0, "evict_disk_bytes": 0},
    })
    folder = Path(agent._folder.name)
    for path in (folder, *folder.iterdir()):
        os.chown(path, UID, UID)
    return agent


async def test_an_agent_without_root_runs_what_the_hub_gives_it_and_finds_it_again(user: User, tmp_path: Path) -> None:
    archives = user.data / "workloads/archives"
    archives.mkdir(parents=True)
    archive(layout(tmp_path / "in", [base()], name="box:1"), archives / "box.tar")
    for path in (archives.parent, archives, archives / "box.tar"):
        os.chown(path, UID, UID)
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        agent = made(user, hub.broker.port)
        try:
            await asyncio.to_thread(agent.__enter__)
            await submit(hub, work("lasting", "trap 'exit 6' TERM; echo up; while :; do sleep 0.05; done", user="app"), work("limited", "true", limits={"memory": "32Mi"}))
            await until(lambda: "running" in states(hub, "lasting") and "refused" in states(hub, "limited"), WAIT_S, what=f"both to be answered: {said(hub)}")
            assert "spec.limits: cannot be kept on this node: " in next(reason for name, _, state, reason in said(hub) if (name, state) == ("limited", "refused"))
            folder = user.data / "workloads/containers/lasting.1"
            await until(lambda: (folder / "stdout.log").exists() and (folder / "stdout.log").read_bytes(), WAIT_S, what="its first word: it heeds signals")
            pid = int(json.loads((folder / "running.json").read_text())["pid"])
            assert os.stat(f"/proc/{pid}").st_uid == FIRST + 999
            await asyncio.to_thread(agent.kill)
            agent.__exit__()
            agent = made(user, hub.broker.port)
            await asyncio.to_thread(agent.__enter__)
            await hub.workloads.ask(lambda planner, now: planner.cancel("lasting", now))
            await until(lambda: not Path(f"/proc/{pid}").exists(), WAIT_S, what="its end, by the next agent")
            assert states(hub, "lasting").count("running") == 1, "it was not started again"
        finally:
            await asyncio.to_thread(agent.kill)
            agent.__exit__()
