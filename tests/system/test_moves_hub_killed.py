"""A hub that is killed (SIGKILL, its broker with it, so that every link is cut too) at each step of a move: the next one goes on with it, and exactly one copy runs. The unit tests have hubs that end
between any two events; this is the real one, with its store."""

import asyncio
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from tests.integration.checkpoint_side import reason_against_checkpoints
from tests.integration.live_side import needs_live
from tests.integration.vm_side import reason_against
from tests.integration.waiting import until
from tests.system.moving_side import ROOM_S, Two
from tests.system.test_moves_live import TwoLive
from tools.bench.harness import die_with_parent, free_port
from tools.novactl.client import Api, CommandError

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

TOKEN = "0123456789abcdef"


class HubProcess:
    """A hub that can be killed and comes back on the same ports."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port, self.token, self.broker = folder, free_port(), TOKEN, SimpleNamespace(port=free_port())
        folder.mkdir()
        (folder / "token").touch(mode=0o600)
        (folder / "token").write_text(TOKEN)
        self.api = Api(f"http://127.0.0.1:{self.port}", TOKEN)
        self._process: subprocess.Popen[bytes] | None = None

    async def start(self) -> None:
        """Until its API answers."""
        self._process = subprocess.Popen([
            sys.executable, "-m", "hub", "--data-dir", str(self.folder), "--broker", "embedded", "--broker-listen", f"127.0.0.1:{self.broker.port}", "--listen", f"127.0.0.1:{self.port}", "--log-level", "warning",
        ], preexec_fn=die_with_parent, stdout=subprocess.DEVNULL)
        await until(lambda: self.get("/api/v1/moves") is not None, ROOM_S, what="the hub answers")

    def kill(self) -> None:
        """SIGKILL."""
        assert self._process is not None
        self._process.kill()
        self._process.wait()

    def get(self, path: str) -> Any:
        """None where it does not answer."""
        try:
            return self.api.get(path)
        except CommandError:
            return None


async def killed_in_a_move(hub: HubProcess, two: Two, label: str, steps: tuple[str, ...], step: str) -> Any:
    """A move to `b` whose hub is killed at a step: it is gone on with, and one copy runs. How it ended. Ends all that it starts."""
    await hub.start()
    try:
        await asyncio.gather(*(asyncio.to_thread(node.start) for node in two.nodes.values()))
        await until(lambda: {one["node"] for one in hub.get("/api/v1/nodes") if one["status"] == "up" and one["document"].get("labels", {}).get(label)} == {"a", "b"}, ROOM_S, what="both nodes")
        hub.api.call("POST", "/api/v1/nodes/b/cordon")
        hub.api.call("POST", "/api/v1/workloads", two.document(two.workload))
        workload = f"/api/v1/workloads/{two.workload}"
        await until(lambda: hub.get(workload)["said"] == "running" and len(two.numbers()) > 3, ROOM_S, what="it counts")
        hub.api.call("POST", "/api/v1/nodes/b/uncordon")
        hub.api.call("POST", "/api/v1/moves", {"workload": two.workload, "to": "b"})
        await until(lambda: hub.get("/api/v1/moves")[0]["state"] != "running" or steps.index(hub.get("/api/v1/moves")[0]["step"]) >= steps.index(step), ROOM_S, what=step)
        hub.kill()
        await hub.start()
        await until(lambda: hub.get("/api/v1/moves")[0]["state"] != "running", ROOM_S, what="the end of the move")
        [move] = hub.get("/api/v1/moves")
        assert (move["state"], move["reason"]) == ("done", ""), move
        await until(lambda: hub.get(workload)["node"] == "b" and hub.get(workload)["said"] == "running" and not hub.get(workload)["waits_for"], ROOM_S, what="it runs on b alone")
        seen = len(two.numbers())
        await until(lambda: len(two.numbers()) > seen + 3, ROOM_S, what="it goes on")
        assert two.numbers() == list(range(len(two.numbers())))
        await until(lambda: two.nodes["a"].instances() == [] and two.nodes["b"].instances() == [f"{two.workload}.2"], ROOM_S, what="nothing is left at its source")
        return move
    finally:
        await two.end()
        hub.kill()


@pytest.mark.skipif(bool(reason_against_checkpoints()), reason=reason_against_checkpoints())
@pytest.mark.parametrize("step", ["checking", "room", "taking", "sending", "starting"])
async def test_a_hub_that_is_killed_in_a_move_goes_on_with_it(tmp_path: Path, step: str) -> None:
    hub = HubProcess(tmp_path / "hub")
    await killed_in_a_move(hub, Two(tmp_path, hub), "novacron.moves/container", ("checking", "room", "taking", "sending", "starting"), step)  # type: ignore[arg-type]


@pytest.mark.skipif(bool(reason_against()), reason=reason_against())
@needs_live
@pytest.mark.parametrize("step", ["live", "starting"])
async def test_a_hub_that_is_killed_while_a_machine_moves_that_runs_goes_on_with_it(tmp_path: Path, step: str) -> None:
    """Its broker goes with it. What the two nodes have between them goes on without it."""
    hub = HubProcess(tmp_path / "hub")
    await killed_in_a_move(hub, TwoLive(tmp_path, hub), "novacron.moves/vm", ("checking", "room", "live", "ahead", "taking", "sending", "starting"), step)  # type: ignore[arg-type]
