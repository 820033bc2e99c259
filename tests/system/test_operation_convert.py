"""Conversions of an agent that is killed at each of their steps: the next agent undoes each, or brings it to its end, says which, and exactly one copy has run. The workload is the witness: it writes 0, 1, 2..;
a number that is there twice was written by two copies, or by one that was brought back from too early; one that is missing was lost. Before them it says which run of it this is, as one that began anew
begins with 0 too, in an output of its own."""

import asyncio
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.conversion.driver import ConvertibleDriver
from edge_runtime.workloads.conversion.host import Settings as HostSettings
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_laying import Settings
from edge_runtime.workloads.drivers.face import Phase
from edge_runtime.workloads.images import ImageStore
from tests.integration.checkpoint_side import program, reason_against_checkpoints
from tests.integration.container_side import base
from tests.integration.microvm_side import kernel_folder, reason_against
from tests.integration.waiting import until
from tests.system.convert_agent import key
from tests.system.converting_agent import BEGAN
from tests.system.test_operation_conversion import linked
from tests.unit.workloads.image_side import archive, layout

REASON = reason_against_checkpoints() or reason_against()

pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.system, pytest.mark.timeout(600)]

AGENT_S = 400.0
"""For a life of an agent that takes some ten seconds on a machine of one's own: it boots guests under emulation."""

PATIENCE_S = 120.0
"""For a guest under emulation on a busy machine to write a few numbers more."""

INTO = ("accepted", "converting", "warming", "ready", "taking", "frozen", "dumped", "restored", "passing", "ended", "went", "plugged", "done")
BACK = ("taking", "dumped", "passing", "ended", "went", "plugged", "done")
PASSED = ("passing", "ended", "went", "plugged", "done")
"""From here on it is what it shall be."""


def steps(names: tuple[str, ...], often: str) -> list[Any]:
    """The others only in the longer run."""
    return [name if name == often else pytest.param(name, marks=pytest.mark.slow) for name in names]


def agent(folder: Path, operations: list[Any], point: str = "") -> dict[str, tuple[str, str, str]]:
    """One life of an agent; how its operations ended, by id: state, reason, form."""
    words = [sys.executable, "-m", "tests.system.converting_agent", str(folder), json.dumps(operations), *([point] if point else [])]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=AGENT_S)
    assert (ran.returncode, f"killed at {point}" in ran.stdout) == ((-9, True) if point else (0, False)), ran.stdout + ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return {one["id"]: (one["state"], one["reason"], one["detail"].get("form", "")) for one in told}


def opened(folder: Path) -> ConvertibleDriver:
    """The driver on what an agent left, as far as looking and ending needs it."""
    data = folder / "data/workloads"
    store = ImageStore(data / "images")
    containers = Settings(criu=program())
    return ConvertibleDriver(data / "convertible", store, ContainerDriver(data, store, containers), HostSettings(kernel=kernel_folder()), containers)


def closed(driver: ConvertibleDriver) -> None:
    driver.close()
    driver.conversions._store.close()


@pytest.fixture(scope="module")
def boots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves what guests boot, for the others."""
    return tmp_path_factory.mktemp("boots")


@pytest.fixture
def folder(tmp_path: Path, boots: Path) -> Any:
    """An edge's folder with an image; what runs of it in the end is ended."""
    conversions = tmp_path / "data/workloads/convertible/conversions"
    conversions.mkdir(parents=True, mode=0o700)
    linked(boots, conversions)
    archives = tmp_path / "data/workloads/archives"
    archives.mkdir(parents=True)
    archive(layout(tmp_path / "in", [base()], name="box:1"), archives / "box.tar")
    yield tmp_path
    linked(conversions, boots)
    if (tmp_path / "data/workloads/images").exists():
        driver = opened(tmp_path)

        async def end() -> None:
            for status in await driver.instances():
                await driver.delete(status.key)

        asyncio.run(end())
        closed(driver)


async def goes_on(folder: Path, form: str) -> None:
    """One copy runs, as this, is what has run from the first, and has left nothing out."""
    driver = opened(folder)
    conversions = driver.conversions
    try:
        async def said() -> list[str]:
            return (await driver.logs(key(folder), 1 << 20)).stdout.decode().split("\n")[:-1]

        [status] = await driver.instances()
        assert (status.key, status.phase, status.form) == (key(folder), Phase.RUNNING, form)
        guest = conversions.guest(key(folder))
        runs = ["container"] * bool(conversions._processes(key(folder))) + ["microvm"] * (guest.lives and (await guest.ask("state"))["state"] == "running")
        assert runs == [form] and conversions.workload(key(folder)).step == ""
        assert (await driver.stats(key(folder))).memory_bytes > 0
        seen = len(await said())

        async def more() -> bool:
            return len(await said()) > seen + 3

        await until(more, PATIENCE_S)
        run, *counted = await said()
        lives = (folder / BEGAN).read_text().splitlines()
        assert set(lives) == {run}, f"began anew: {run} after {lives}"
        found = [int(one) for one in counted]
        assert found == list(range(len(found))), next((at, found[max(0, at - 1):at + 2]) for at in range(len(found)) if found[at] != at)
    finally:
        closed(driver)


@pytest.mark.parametrize("step", steps(INTO, "restored"))
async def test_a_conversion_that_its_agent_was_killed_at_is_undone_or_done_by_the_next_one(folder: Path, step: str) -> None:
    assert await asyncio.to_thread(agent, folder, [["o-in", "microvm"]], step) == {}
    ended = await asyncio.to_thread(agent, folder, [["o-in", "microvm"]])
    # What was not begun is begun; what was begun and did not pass is not begun again by itself.
    form = "microvm" if step in ("accepted", *PASSED) else "container"
    state, reason, told = ended["o-in"]
    assert (state, told) == (("succeeded", form) if form == "microvm" else ("failed", "")), ended
    assert state == "succeeded" or "has been undone, and it is a container as before; ask again" in reason
    await goes_on(folder, form)


@pytest.mark.parametrize("step", steps(BACK, "passing"))
async def test_a_way_back_that_its_agent_was_killed_at_is_undone_or_done_by_the_next_one(folder: Path, step: str) -> None:
    assert await asyncio.to_thread(agent, folder, [["o-in", "microvm"], ["o-back", "container"]], step) == {"o-in": ("succeeded", "", "microvm")}
    state, reason, told = (await asyncio.to_thread(agent, folder, [["o-in", "microvm"], ["o-back", "container"]]))["o-back"]
    form = "container" if step in PASSED else "microvm"
    assert (state, told) == (("succeeded", form) if form == "container" else ("failed", "")), reason
    await goes_on(folder, form)


@pytest.mark.slow
async def test_the_witness_sees_a_workload_that_began_anew(folder: Path) -> None:
    """The negative control: the container is thrown away behind its agent's back, and all else is as it shall be."""
    assert await asyncio.to_thread(agent, folder, []) == {}
    driver = opened(folder)
    await driver.delete(key(folder))
    closed(driver)
    assert await asyncio.to_thread(agent, folder, [["o-in", "microvm"]]) == {"o-in": ("succeeded", "", "microvm")}
    with pytest.raises(AssertionError, match="began anew"):
        await goes_on(folder, "microvm")
