"""Running workloads move between nodes with their state: hub, agents as processes, migration workers, runtime and CRIU. Whoever is killed when, one copy runs in the end, and at no time have two."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from tests.integration.checkpoint_side import reason_against_checkpoints
from tests.integration.hub_side import running_hub
from tests.integration.waiting import until
from tests.system.moving_side import ROOM_S, Two, begun, goes_on_at_its_source, killed_at, known
from tools.novactl.cli import main as novactl

pytestmark = [pytest.mark.skipif(bool(reason_against_checkpoints()), reason=reason_against_checkpoints()), pytest.mark.system, pytest.mark.timeout(900)]

SOURCE = ("check", "taking", "noted", "frozen", "dumped", "packed", "whole", "let go", "packed-up", "out")
TARGET = ("laid-out", "room", "came", "restored", "settled")
RETURNING = ("returned", "clearing", "placing", "back")
"""At a source whose target refuses."""


async def test_a_running_container_moves_to_the_other_node_and_back_when_that_is_drained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running_hub(tmp_path / "hub", "auto") as hub:
        two = Two(tmp_path, hub)

        async def command(*words: str) -> Any:
            capsys.readouterr()
            status = await asyncio.to_thread(novactl, [words[0], "--hub", f"http://127.0.0.1:{hub.port}", "--token", hub.token, *words[1:], "--json"])
            assert status == 0, capsys.readouterr()
            return json.loads(capsys.readouterr().out)

        try:
            await two.start()
            await known(two)
            begun = await command("move", "begin", two.workload, "--to", "b")
            assert (begun["source"], begun["target"], begun["state"]) == ("a", "b", "running")
            ended = await two.over(begun["id"])
            assert (ended["state"], ended["reason"]) == ("done", "") and ended["bytes"] > 0
            assert await two.one_copy() == "b" and hub.workloads.rows[two.workload].epoch == 2
            await known(two)
            assert (await command("node", "drain", "b", "--wait", str(ROOM_S)))["left"] == []
            moves = await command("move", "list")
            assert [(one["why"], one["state"], one["expected_s"] > 0, one["progress"]["moved_bytes"] > 0) for one in moves] == [("b is drained", "done", True, True), ("asked for", "done", True, True)], moves
            assert await two.one_copy() == "a" and hub.workloads.rows[two.workload].epoch == 3
            for node in two.nodes.values():
                await until(lambda node=node: set(os.listdir(node.data / "workloads/moves")) <= {".migration-history"} and not (node.data / "workloads/checkpoints" / two.workload).exists(), ROOM_S, what="nothing of its way is left")
        finally:
            await two.end()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("packed-up", "restored"), *((one, "") for one in SOURCE), *(("", one) for one in TARGET)])
async def test_agents_killed_at_any_step_of_a_move_leave_one_copy_at_its_target(tmp_path: Path, source: str, target: str) -> None:
    async with running_hub(tmp_path / "hub", "auto") as hub:
        await killed_at(Two(tmp_path, hub), source, target)


@pytest.mark.parametrize("point", ["", *(pytest.param(one, marks=pytest.mark.slow) for one in RETURNING)])
async def test_what_its_target_cannot_start_goes_on_at_its_source(tmp_path: Path, point: str) -> None:
    """The target is an agent that refuses what comes."""
    async with running_hub(tmp_path / "hub", "auto") as hub:
        await goes_on_at_its_source(Two(tmp_path, hub), point)


@pytest.mark.slow
@pytest.mark.parametrize("whose", ["a", "b"])
async def test_a_killed_migration_worker_costs_time(tmp_path: Path, whose: str) -> None:
    async with running_hub(tmp_path / "hub", "auto") as hub:
        two = Two(tmp_path, hub)
        try:
            await two.start()
            name = await begun(two, "b")
            pid = await until(lambda: worker_of(two, whose), ROOM_S, what="a worker")
            os.kill(pid, signal.SIGKILL)
            assert (await two.over(name))["state"] == "done" and await two.one_copy() == "b"
        finally:
            await two.end()


def worker_of(two: Two, name: str) -> int:
    """The pid of a node's migration worker; 0 where there is none."""
    agent = two.nodes[name].agent
    assert agent is not None
    for pid in Path(f"/proc/{agent.pid}/task/{agent.pid}/children").read_text().split():
        try:
            if b"\0worker\0" in Path(f"/proc/{pid}/cmdline").read_bytes():
                return int(pid)
        except OSError:
            continue
    return 0
