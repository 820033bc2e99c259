"""A move through a checkpoint, killed at every step: exactly one copy runs in the end, and at no time have two. The container itself is the witness: it writes 0, 1, 2.. to a file of the node.
A number that is there twice was written by two copies, or by one that was brought back from too early; one that is missing was lost."""

import asyncio
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import keeper_restore
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_move import Moves
from edge_runtime.workloads.drivers.face import Failed, Key, Phase, Refused
from tests.integration.checkpoint_side import begun, made, next_of, reason_against_checkpoints
from tests.integration.container_side import end_all
from tests.integration.waiting import until
from tests.system.checkpoint_agent import keys
from tests.system.checkpoint_agent import made as again

pytestmark = [pytest.mark.skipif(bool(reason_against_checkpoints()), reason=reason_against_checkpoints()), pytest.mark.system]

AGENT = ("taking", "noted", "frozen", "dumped", "packed", "whole", "let go", "bringing", "laid", "criu", "running", "done")
KEEPER = ("noted", "dumped", "whole", "criu", "running")
RARE = ("taking", "noted", "frozen", "packed", "whole", "criu", "let go", "bringing", "laid")
"""An agent killed there finds what one does that is killed at a step beside it: only in the longer run."""


def steps(names: Sequence[str], rare: Sequence[str]) -> list[Any]:
    return [pytest.param(name, marks=pytest.mark.slow) if name in rare else name for name in names]

COUNTS = "trap 'exit 0' TERM; i=0; while true; do echo $i >> /shared/numbers; i=$((i+1)); sleep 0.005; done"


def numbers(folder: Path) -> list[int]:
    return [int(one) for one in (folder / "shared/numbers").read_text().splitlines()]


PROBED: list[Any] = []
"""What the first driver's probe found; the others here find the same."""


async def witness(folder: Path) -> ContainerDriver:
    driver = made(folder)
    if not PROBED:
        PROBED[:] = await driver.probe(), driver._ways, driver._criu
    driver._capabilities, driver._ways, driver._criu = PROBED
    (folder / "shared").chmod(0o777)
    spec = {"command": ["sh", "-c", COUNTS], "mounts": [{"target": "/shared", "source": str(folder / "shared"), "read_only": False}]}
    await begun(driver, keys(folder)[0].id, spec)
    await until(lambda: (folder / "shared/numbers").exists() and len(numbers(folder)) > 3)
    return driver


async def one_copy(driver: ContainerDriver, folder: Path) -> Key:
    """Which one runs, after it was seen that it alone does, goes on, and left nothing out."""
    running = [status.key for status in await driver.instances() if status.phase is Phase.RUNNING]
    assert len(running) == 1, f"{running} run"
    source, target = keys(folder)
    other = driver.folder(target if running == [source] else source).name
    try:
        assert not keeper_restore.processes(driver._groups.processes(f"/novacron/{other}"))
    except FileNotFoundError:
        pass  # the group is gone with its processes
    hierarchies = driver._groups.of_all(f"/novacron/{other}")
    await until(lambda: not any(os.path.exists(top) for top in hierarchies), what="its control groups are gone")
    seen = len(numbers(folder))
    await until(lambda: len(numbers(folder)) > seen + 3)
    found = numbers(folder)
    assert found == list(range(len(found))), next((at, found[at - 1:at + 2]) for at in range(len(found)) if found[at] != at)
    return running[0]


async def killed(folder: Path, point: str) -> tuple[ContainerDriver, Moves]:
    """The next agent, after one that was killed (or whose keeper was) has been settled."""
    driver = await witness(folder)
    driver.close()
    driver._store.close()
    ran = await asyncio.to_thread(subprocess.run, [sys.executable, "-m", "tests.system.checkpoint_agent", str(folder), point], capture_output=True, text=True, timeout=120)
    assert f"killed at {point.split(':')[1]}" in ran.stdout, ran.stdout + ran.stderr
    assert (ran.returncode == -9) == point.startswith("agent"), ran.stderr
    found = again(folder)
    await found.probe()
    moves = Moves(found, folder / "operations")
    await moves.resume()
    return found, moves


@pytest.mark.parametrize("step", steps(AGENT, RARE))
async def test_an_agent_killed_at_any_step_leaves_one_copy_that_the_next_one_brings_home(tmp_path: Path, step: str) -> None:
    driver, moves = await killed(tmp_path, f"agent:{step}")
    try:
        assert await one_copy(driver, tmp_path) == keys(tmp_path)[1]
        assert [move.step for move in moves.all()] == ["done"]
        with pytest.raises(Refused):
            await driver.status(keys(tmp_path)[0])
    finally:
        await asyncio.to_thread(end_all, driver)


@pytest.mark.slow
@pytest.mark.parametrize("at", [f"{at * 0.031:.3f}" for at in range(1, 13)])
async def test_an_agent_killed_at_any_moment_leaves_one_copy(tmp_path: Path, at: str) -> None:
    """Also within a step: while CRIU dumps, while the state is packed, while it is looked through."""
    driver, moves = await killed(tmp_path, f"agent:+{at}")
    try:
        found = await one_copy(driver, tmp_path)
        assert (found, [move.step for move in moves.all()]) in ((keys(tmp_path)[1], ["done"]), (keys(tmp_path)[0], []))  # the latter where not even the operation had been written
    finally:
        await asyncio.to_thread(end_all, driver)


@pytest.mark.parametrize("step", steps(KEEPER, ("noted", "dumped", "whole", "running")))
async def test_a_keeper_killed_at_any_step_leaves_one_copy(tmp_path: Path, step: str) -> None:
    driver, moves = await killed(tmp_path, f"keeper:{step}")
    try:
        found = await one_copy(driver, tmp_path)
        # A keeper that was killed while it brought the target back has the source's place get it; later it runs without its keeper, as any container does. How far it came before it was dead cannot be told of `criu`.
        ends = [(["done"], keys(tmp_path)[1]), (["returned"], keys(tmp_path)[0])]
        assert ([move.step for move in moves.all()], found) in (ends if step == "criu" else ends[:1])
    finally:
        await asyncio.to_thread(end_all, driver)


async def test_the_witness_sees_a_second_copy_and_a_lost_number(tmp_path: Path) -> None:
    """The negative control: the state of one that goes on is brought back beside it."""
    driver = await witness(tmp_path)
    try:
        await driver.checkpoint(keys(tmp_path)[0], tmp_path / "state", leave_running=True)
        spec = {"command": ["sh", "-c", COUNTS], "mounts": [{"target": "/shared", "source": str(tmp_path / "shared"), "read_only": False}]}
        await driver.restore(next_of(keys(tmp_path)[0], spec), tmp_path / "state")
        with pytest.raises(AssertionError, match="run"):
            await one_copy(driver, tmp_path)
        await driver.delete(keys(tmp_path)[1])
        with pytest.raises(AssertionError, match=r"^\(\d+, \["):
            await one_copy(driver, tmp_path)
    finally:
        await asyncio.to_thread(end_all, driver)


async def test_what_cannot_be_taken_or_brought_back_stays_where_it_is(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    driver = await witness(tmp_path)
    moves = Moves(driver, tmp_path / "operations")
    try:
        (tmp_path / "full").mkdir()
        (tmp_path / "full/file").touch()
        with pytest.raises(Refused, match="not an empty folder"):
            await moves.move("one", *keys(tmp_path), tmp_path / "full")
        assert not moves.all() and await one_copy(driver, tmp_path) == keys(tmp_path)[0]
        fill = driver.checkpoints().fill

        def odd(*where: object) -> None:
            fill(*where)  # type: ignore[arg-type]
            if str(where[3]).endswith(".2"):
                where[6]["restore"]["processes"][0]["threads"] += 1  # type: ignore[index]

        monkeypatch.setattr(driver.checkpoints(), "fill", odd)
        with pytest.raises(Failed, match="old place again"):
            await moves.move("one", *keys(tmp_path), tmp_path / "state")
        assert [move.step for move in moves.all()] == ["returned"] and await one_copy(driver, tmp_path) == keys(tmp_path)[0]
        moves.forget("one")
        monkeypatch.undo()
        await moves.move("one", *keys(tmp_path), tmp_path / "second")
        assert await one_copy(driver, tmp_path) == keys(tmp_path)[1]
    finally:
        await asyncio.to_thread(end_all, driver)
