"""Running virtual machines move between nodes with their state: hub, agents as processes, migration workers, QEMU. The guest is the witness (`counting_guest`).

Its console is at its node, and goes with it; so what it says is read from files that the test has open. All of it, one node after the other, must be 0, 1, 2.. with not a byte missing or there twice.
"""

import asyncio
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.images import ImageStore
from hub.server import Hub
from tests.integration import counting_guest
from tests.integration.hub_side import running_hub
from tests.integration.vm_side import BOOT_S, end_all, kernel_folder, made_vms, reason_against
from tests.integration.waiting import until
from tests.system.moving_side import ROOM_S, Json, Node, Two, again_when_killed, goes_on_at_its_source, killed_at, killed_once, known
from tests.unit.workloads.image_side import archive, layer, layout
from tools.novactl.cli import main as novactl

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.system, pytest.mark.timeout(900)]

SOURCE = ("check", "copied", "ahead", "taking", "noted", "frozen", "dumped", "packed", "whole", "let go", "packed-up", "out")
TARGET = ("laid-out", "room", "came", "filled", "restored", "settled")
RETURNING = ("returned", "clearing", "placing", "back")
"""At a source whose target refuses."""


PLAIN = ("-m", "tests.system.moving_agent", "-", "/nowhere")
"""An agent that is killed at no point."""


class MachineNode(Node):
    """One that runs virtual machines."""

    FOLDER = "vms"
    ahead = True
    """Whether disks go ahead, small as they are."""

    def __init__(self, folder: Path, hub: Hub, name: str) -> None:
        super().__init__(folder, hub, name, runtimes=[], vms=True, guest_kernel=kernel_folder())

    def start(self, program: tuple[str, ...] = PLAIN, **environment: str) -> None:
        """See `Node`."""
        super().start(program, **environment, **({"AHEAD_LEAST": "1"} if self.ahead else {}))

    def give_image(self, archives: Path, scratch: Path) -> None:
        """The guest that counts."""
        archive(layout(scratch, [layer([("file", "disk/a.raw", counting_guest.DISK)], mode=0o644)], name=counting_guest.IMAGE), archives / "counter.tar")

    def end_all(self) -> None:
        """All that it left."""
        store = ImageStore(self.data / "workloads/images")
        end_all(made_vms(self.data / "workloads", store))
        store.close()


class TwoMachines(Two):
    """Nodes `a` and `b`, and a guest."""

    NODE, MOVES = MachineNode, "vm"

    def __init__(self, folder: Path, hub: Hub, ahead: bool = True) -> None:
        super().__init__(folder, hub)
        for node in self.nodes.values():
            node.ahead = ahead  # type: ignore[attr-defined]
        self._consoles: dict[tuple[int, int], tuple[int, int]] = {}
        """Epoch and descriptor of each file, by the file."""

    def document(self, name: str, **more: Any) -> Json:
        """The witness."""
        return {"id": name, "kind": "vm", "image": counting_guest.IMAGE, "requests": {"cpu": "100m", "memory": counting_guest.MEMORY}, "spec": {"boot_s": BOOT_S}, **more}

    def said_by_guest(self) -> bytes:
        """All that it has said, at all nodes; a file that is found once is read to its end, also when it has gone."""
        for node in self.nodes.values():
            for name in node.instances():
                with suppress(FileNotFoundError):
                    opened = os.open(node.data / "workloads/vms" / name / "stdout.log", os.O_RDONLY)
                    told = os.fstat(opened)
                    if (told.st_dev, told.st_ino) in self._consoles:
                        os.close(opened)
                    else:
                        self._consoles[told.st_dev, told.st_ino] = (int(name.rpartition(".")[2]), opened)
        return b"".join(os.pread(opened, os.fstat(opened).st_size, 0) for _, opened in sorted(self._consoles.values()))

    def numbers(self) -> list[int]:
        """Whole lines."""
        said = self.said_by_guest()
        assert b"differs" not in said, said[-500:]
        return counting_guest.counted(said)

    async def end(self) -> None:
        """End all of it."""
        await super().end()
        for _, opened in self._consoles.values():
            os.close(opened)


async def test_a_machine_moves_whoever_is_killed_and_back_when_its_node_is_drained(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running_hub(tmp_path / "hub", "auto") as hub:
        two = TwoMachines(tmp_path, hub)

        async def command(*words: str) -> Any:
            capsys.readouterr()
            status = await asyncio.to_thread(novactl, [words[0], "--hub", f"http://127.0.0.1:{hub.port}", "--token", hub.token, *words[1:], "--json"])
            assert status == 0, capsys.readouterr()
            return json.loads(capsys.readouterr().out)

        try:
            await two.start(when_drained="move")
            mark = await killed_once(two, "b", "restored")
            await known(two)
            begun = await command("move", "begin", two.workload, "--to", "b")
            await again_when_killed(two, "b", mark)
            ended = await two.over(begun["id"])
            assert (ended["state"], ended["reason"]) == ("done", "") and ended["bytes"] > 0 and ended["ahead"] and ended["ahead_bytes"] > 0
            assert await two.one_copy() == "b" and hub.workloads.rows[two.workload].epoch == 2
            await known(two)
            assert (await command("node", "drain", "b", "--wait", str(ROOM_S)))["left"] == []
            assert await two.one_copy() == "a" and hub.workloads.rows[two.workload].epoch == 3
            assert all(one["ahead"] for one in await two.hub.workloads.look(lambda planner: list(planner.tables.moves.values())))
            for node in two.nodes.values():
                await until(lambda node=node: set(os.listdir(node.data / "workloads/moves")) <= {".migration-history"} and not (node.data / "workloads/checkpoints" / two.workload).exists(), ROOM_S, what="nothing of its way is left")
        finally:
            await two.end()


@pytest.mark.slow
@pytest.mark.parametrize(("source", "target"), [("packed-up", "restored"), *((one, "") for one in SOURCE), *(("", one) for one in TARGET)])
async def test_agents_killed_at_any_step_of_a_move_leave_one_copy_at_its_target(tmp_path: Path, source: str, target: str) -> None:
    async with running_hub(tmp_path / "hub", "auto") as hub:
        await killed_at(TwoMachines(tmp_path, hub), source, target)


@pytest.mark.parametrize(("point", "ahead"), [pytest.param(one, ahead, marks=pytest.mark.slow) for one, ahead in (("whole", True), ("whole", False), *((one, True) for one in ("", *RETURNING)))])
async def test_what_its_target_cannot_start_goes_on_at_its_source(tmp_path: Path, point: str, ahead: bool) -> None:
    """The target is an agent that refuses what comes."""
    async with running_hub(tmp_path / "hub", "auto") as hub:
        await goes_on_at_its_source(TwoMachines(tmp_path, hub, ahead), point)
