"""Running workloads move between nodes with their state: hub, agents as processes, migration workers, runtime and CRIU."""

from pathlib import Path

import pytest

from hub.workloads import moving
from tests.integration.checkpoint_side import reason_against_checkpoints
from tests.integration.hub_side import running_hub
from tests.system.moving_side import Two

pytestmark = [pytest.mark.skipif(bool(reason_against_checkpoints()), reason=reason_against_checkpoints()), pytest.mark.system, pytest.mark.timeout(400)]


async def test_a_running_container_moves_to_the_other_node_and_back(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        two = Two(tmp_path, hub)
        try:
            await two.start()
            for target, epoch in (("b", 2), ("a", 3)):
                begun = await hub.workloads.ask(lambda planner, now, target=target: moving.begin(planner, two.workload, target, now, "asked for"))
                ended = await two.over(begun["id"])
                assert (ended["state"], ended["reason"]) == ("done", "")
                print(ended)
                assert await two.one_copy() == target and hub.workloads.rows[two.workload].epoch == epoch
        finally:
            await two.end()
