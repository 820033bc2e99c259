"""Operations of an agent that is killed at each of their steps: the next agent brings each to its end, and exactly one copy has run. The container itself is the witness: it writes 0, 1, 2.. to a file of the node.
A number that is there twice was written by two copies, or by one that was brought back from too early; one that is missing was lost; a workload that began anew would begin with 0."""

import asyncio
import json
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.runtime import EdgeRuntime
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_laying import Settings
from edge_runtime.workloads.drivers.face import Phase
from edge_runtime.workloads.images import ImageStore
from tests.integration.checkpoint_side import program, reason_against_checkpoints
from tests.integration.container_side import LIMITS, base, end_all
from tests.integration.waiting import until
from tests.system.operation_agent import config, desired, key
from tests.unit.workloads.image_side import archive, layout

pytestmark = [pytest.mark.skipif(bool(reason_against_checkpoints()), reason=reason_against_checkpoints()), pytest.mark.system, pytest.mark.timeout(400)]

AGENT_S = 160.0
"""For a life of an agent that takes some seconds on a machine of one's own."""

CHECKPOINT = ("accepted", "taking", "noted", "frozen", "dumped", "packed", "whole", "let go", "ended")
RESTORE = ("clearing", "deleted", "placing", "laid", "criu", "running", "back", "ended")
SNAPSHOT = ("accepted", "taking", "standing", "copied", "finished", "written", "ended")
OFTEN = {"dumped", "whole", "placing", "standing", "written"}
"""The others only in the longer run."""

TAKE, BACK, SNAP = ["o-take", "checkpoint", {"stop": True, "name": "state"}], ["o-back", "restore", {}], ["o-snap", "snapshot", {"name": "disk"}]


def steps(names: Sequence[str]) -> list[Any]:
    return [name if name in OFTEN else pytest.param(name, marks=pytest.mark.slow) for name in names]


def agent(folder: Path, operations: list[Any], point: str = "") -> dict[str, Any]:
    """One life of an agent; how its operations ended, by id."""
    words = [sys.executable, "-m", "tests.system.operation_agent", str(folder), json.dumps(operations), *([point] if point else [])]
    ran = subprocess.run(words, capture_output=True, text=True, timeout=AGENT_S)
    assert (ran.returncode, f"killed at {point}" in ran.stdout) == ((-9, True) if point else (0, False)), ran.stdout + ran.stderr
    told = [json.loads(line) for line in ran.stdout.splitlines() if line.startswith("{")]
    return {one["id"]: (one["state"], one["reason"]) for one in told}


def numbers(folder: Path) -> list[int]:
    return [int(one) for one in (folder / "shared/numbers").read_text().split("\n")[:-1]]


@pytest.fixture
def folder(tmp_path: Path) -> Any:
    """An edge's folder with an image; what runs of it in the end is ended."""
    (tmp_path / "shared").mkdir()
    (tmp_path / "shared").chmod(0o777)
    archives = tmp_path / "data/workloads/archives"
    archives.mkdir(parents=True)
    archive(layout(tmp_path / "in", [base()], name="box:1"), archives / "box.tar")
    yield tmp_path
    if (tmp_path / "data/workloads/images").exists():
        store = ImageStore(tmp_path / "data/workloads/images")
        end_all(ContainerDriver(tmp_path / "data/workloads", store, Settings(criu=program())))
        store.close()


async def goes_on(folder: Path) -> None:
    """One copy runs, and has left nothing out."""
    store = ImageStore(folder / "data/workloads/images")
    driver = ContainerDriver(folder / "data/workloads", store)
    try:
        assert [(status.key, status.phase) for status in await driver.instances()] == [(key(folder), Phase.RUNNING)]
        seen = len(numbers(folder))
        await until(lambda: len(numbers(folder)) > seen + 3)
        found = numbers(folder)
        assert found == list(range(len(found))), next((at, found[at - 1:at + 2]) for at in range(len(found)) if found[at] != at)
    finally:
        driver.close()
        store.close()


def phases(folder: Path) -> list[Phase]:
    """How what is on the disk stands."""
    store = ImageStore(folder / "data/workloads/images")
    driver = ContainerDriver(folder / "data/workloads", store)
    try:
        return [status.phase for status in asyncio.run(driver.instances())]
    finally:
        driver.close()
        store.close()


@pytest.mark.parametrize("step", steps(CHECKPOINT))
async def test_an_operation_that_takes_a_state_is_brought_to_its_end_by_the_next_agent(folder: Path, step: str) -> None:
    assert "o-take" not in await asyncio.to_thread(agent, folder, [TAKE], step)
    ended = await asyncio.to_thread(agent, folder, [TAKE, BACK])
    assert ended == {"o-take": ("succeeded", ""), "o-back": ("succeeded", "")}
    await goes_on(folder)


@pytest.mark.parametrize("step", steps(RESTORE))
async def test_an_operation_that_brings_back_is_brought_to_its_end_by_the_next_agent(folder: Path, step: str) -> None:
    assert await asyncio.to_thread(agent, folder, [TAKE, BACK], step) == {"o-take": ("succeeded", "")}
    assert (await asyncio.to_thread(agent, folder, [TAKE, BACK]))["o-back"] == ("succeeded", "")
    await goes_on(folder)


@pytest.mark.parametrize("step", steps(SNAPSHOT))
async def test_a_snapshot_is_brought_to_its_end_by_the_next_agent_and_the_workload_goes_on(folder: Path, step: str) -> None:
    """Also where it stood still for it."""
    assert "o-snap" not in await asyncio.to_thread(agent, folder, [SNAP], step)
    assert await asyncio.to_thread(agent, folder, [SNAP]) == {"o-snap": ("succeeded", "")}
    await goes_on(folder)
    there = folder / "data/workloads/snapshots"
    one, name = key(folder).id, f"snapshots/{key(folder).id}:disk"
    assert sorted(path.name for path in there.iterdir() if path.name != ".new") == [f"{one}@disk.json", f"{one}@disk.tar"] and not any((there / ".new").iterdir() if (there / ".new").exists() else ())
    store = ImageStore(folder / "other", limits=LIMITS)
    image = store.add(there / f"{one}@disk.tar", name, strict=True)
    assert [(lower / "bin/busybox").exists() for lower in store.lower(image)] == [False, True]
    store.close()


async def test_what_nobody_sees_the_end_of_when_its_state_is_whole_does_not_begin_anew(folder: Path) -> None:
    """Its keeper is killed too, and writes nothing down: as when the power goes."""
    assert "o-take" not in await asyncio.to_thread(agent, folder, [TAKE], "keeper:whole")
    assert await asyncio.to_thread(agent, folder, [TAKE]) == {"o-take": ("succeeded", "")}
    assert await asyncio.to_thread(phases, folder) == [Phase.CHECKPOINTED]
    assert (await asyncio.to_thread(agent, folder, [TAKE, BACK]))["o-back"] == ("succeeded", "")
    await goes_on(folder)


async def test_the_witness_sees_a_workload_that_began_anew(folder: Path) -> None:
    """The negative control: the container is thrown away behind its agent's back, and all else is as it shall be."""
    await asyncio.to_thread(agent, folder, [])
    store = ImageStore(folder / "data/workloads/images")
    driver = ContainerDriver(folder / "data/workloads", store)
    await driver.delete(key(folder))
    driver.close()
    store.close()
    seen, runtime = len(numbers(folder)), EdgeRuntime(config(folder))
    await runtime.start()
    try:
        runtime.desired_state.receive(desired(folder, 2, []))
        await until(lambda: len(numbers(folder)) > seen + 3, AGENT_S)
    finally:
        await runtime.stop("test")
    with pytest.raises(AssertionError, match=r"^\(\d+, \[\d+, 0, 1\]\)"):
        await goes_on(folder)
