"""Running virtual machines move between nodes while they run: hub, agents as processes, migration workers, QEMU. The guest is the witness, as in `test_moves_vm`: all that it says, one node after the other, is 0, 1, 2.. with not a byte missing or
there twice. Where it cannot go so, or somebody is killed while it does, it moves standing still, or stays."""

import asyncio
import os
from pathlib import Path
from typing import Any

import pytest

from hub.server import Hub
from hub.workloads import moving
from tests.integration.hub_side import running_hub
from tests.integration.live_side import live_qemu, needs_live
from tests.integration.vm_side import reason_against
from tests.integration.waiting import until
from tests.system.moving_side import ROOM_S, Two, again_when_killed, begun, killed_once
from tests.system.test_moves_vm import PLAIN, MachineNode, TwoMachines
from tools.novactl.client import Api

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), needs_live, pytest.mark.system, pytest.mark.timeout(900)]

SOURCE = ("leaving", "near", "live")
TARGET = ("arrived", "come")


class LiveNode(MachineNode):
    """One whose QEMU sends machines while they run."""

    live = True

    def start(self, program: tuple[str, ...] = PLAIN, **environment: str) -> None:
        """See `Node`. The program lies where a QEMU without rights can read it too, which a test's folder is not."""
        folder = os.path.dirname(live_qemu()) if self.live else ""
        super().start(program, **({"PATH": f"{folder}:{os.environ['PATH']}"} if folder else {}), **environment)


class TwoLive(TwoMachines):
    """Two of them."""

    NODE = LiveNode


async def moved(two: Two, hub: Hub) -> dict[str, Any]:
    """How the newest move went, when it is over, it runs at its target alone, and nothing of its way is left."""
    name = list(await hub.workloads.look(lambda planner: list(planner.tables.moves)))[-1]
    ended = await two.over(name)
    assert (ended["state"], ended["reason"]) == ("done", "")
    assert await two.one_copy() == ended["target"]
    for node in two.nodes.values():
        await until(lambda node=node: set(os.listdir(node.data / "workloads/moves")) <= {".migration-history"}, ROOM_S, what="nothing of its way is left")
    return ended


async def test_a_machine_moves_while_it_runs_there_and_back(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "auto") as hub:
        two, shown = TwoLive(tmp_path, hub), Api(f"http://127.0.0.1:{hub.port}", hub.token)
        try:
            await two.start()
            for target in ("b", "a"):
                await begun(two, target)
                ended = await moved(two, hub)
                assert ended["live"] and not ended["live_problem"] and "taking" not in ended["since_ms"] and ended["still_ms"] > 0, ended
                assert (await asyncio.to_thread(shown.get, "/api/v1/moves"))[0]["why_still"] == f"moved while it ran, and stood still for {ended['still_ms']:.0f} ms"
        finally:
            await two.end()


@pytest.mark.parametrize(("source", "target"), [("near", ""), *(pytest.param(*one, marks=pytest.mark.slow) for one in (*((one, "") for one in SOURCE if one != "near"), *(("", one) for one in TARGET)))])
async def test_where_an_agent_is_killed_before_it_may_begin_it_moves_standing_still(tmp_path: Path, source: str, target: str) -> None:
    async with running_hub(tmp_path / "hub", "auto") as hub:
        two = TwoLive(tmp_path, hub)
        try:
            await two.start()
            marks = {name: await killed_once(two, name, point) for name, point in (("a", source), ("b", target)) if point}
            await begun(two, "b")
            await asyncio.gather(*(again_when_killed(two, node, mark) for node, mark in marks.items()))
            ended = await moved(two, hub)
            assert not ended["live"] and ended["live_problem"], ended
        finally:
            await two.end()


@pytest.mark.slow
@pytest.mark.parametrize("target", ["restored", "settled"])
async def test_a_target_that_is_killed_when_it_has_begun_goes_on(tmp_path: Path, target: str) -> None:
    async with running_hub(tmp_path / "hub", "auto") as hub:
        two = TwoLive(tmp_path, hub)
        try:
            await two.start()
            mark = await killed_once(two, "b", target)
            await begun(two, "b")
            await again_when_killed(two, "b", mark)
            assert (await moved(two, hub))["live"]
        finally:
            await two.end()


async def test_what_its_target_cannot_begin_goes_on_at_its_source(tmp_path: Path) -> None:
    """The target's agent ends what waits, when it is told that it may begin."""
    async with running_hub(tmp_path / "hub", "auto") as hub:
        two = TwoLive(tmp_path, hub)
        try:
            await two.start()
            await killed_once(two, "b", "drops")
            ended = await two.over(await begun(two, "b"))
            assert ended["state"] == "failed" and ended["live"] and "b could not go on with it" in ended["reason"], ended
            assert await two.one_copy() == "a" and hub.workloads.rows[two.workload].epoch == 1
            assert not (two.nodes["a"].data / f"workloads/vms/{two.workload}.1/left.json").exists()
        finally:
            await two.end()


@pytest.mark.slow
async def test_one_that_is_cancelled_while_it_goes_stays_and_nothing_is_left_of_its_way(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "auto") as hub:
        two = TwoLive(tmp_path, hub)
        try:
            await two.start()
            name = await begun(two, "b")

            async def goes() -> bool:
                return (await two.move(name))["step"] == "live"

            await until(goes, ROOM_S, what="it is asked for while it runs")
            await hub.workloads.ask(lambda planner, now: moving.cancel(planner, name, now))
            assert (await two.over(name))["state"] == "cancelled" and await two.one_copy() == "a"
            await until(lambda: hub.transfers.unfinished("move-") == [], ROOM_S, what="nothing connects the two any more")
        finally:
            await two.end()


@pytest.mark.slow
async def test_between_different_versions_of_qemu_it_does_not_move(tmp_path: Path) -> None:
    """Their machines are others; it is refused before anything is touched."""
    async with running_hub(tmp_path / "hub", "auto") as hub:
        two = TwoLive(tmp_path, hub)
        two.nodes["b"].live = False  # type: ignore[attr-defined]
        if not os.path.dirname(live_qemu()):
            pytest.skip("this machine has one QEMU only")
        try:
            await two.start()
            ended = await two.over(await begun(two, "b"))
            assert ended["state"] == "failed" and "host.qemu" in ended["reason"] and await two.one_copy() == "a"
        finally:
            await two.end()
