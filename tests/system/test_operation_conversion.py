"""A hot conversion whose guest is killed, at every step (its agent is in `test_operation_convert`): exactly one copy runs in the end, and at no time have two. The workload is the witness: it writes 0, 1, 2.. and what it wrote in all its forms is kept.
A number that is there twice was written by two copies, or by one that was brought back from too early; one that is missing was lost."""

import asyncio
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.conversion import hot
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Order, Phase
from tests.integration.checkpoint_side import reason_against_checkpoints
from tests.integration.container_side import made_store
from tests.integration.microvm_side import reason_against
from tests.integration.waiting import until
from tests.system.convert_agent import key, made

REASON = reason_against_checkpoints() or reason_against()

PATIENCE_S = 120.0
"""For a guest under emulation on a busy machine to write a few numbers more."""

pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.system, pytest.mark.timeout(600)]

COUNTS = "i=0; while true; do echo $i; i=$((i+1)); sleep 0.1; done"

slow = pytest.mark.slow


@pytest.fixture(scope="module")
def boots(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the first test leaves what guests boot, for the others."""
    return tmp_path_factory.mktemp("boots")


def linked(source: Path, target: Path) -> None:
    for folder in source.glob("boot-*"):
        if not (target / folder.name).exists():
            shutil.copytree(folder, target / folder.name, copy_function=os.link)


async def witness(folder: Path, boots: Path) -> tuple[ContainerDriver, hot.Conversions]:
    """It runs as a container."""
    made_store(folder).close()
    (folder / "conversions").mkdir(mode=0o700)
    linked(boots, folder / "conversions")
    driver, conversions = made(folder)
    await driver.probe()
    await conversions.prepare(Order(key(folder), "box:1", {"disk": 64 << 20}, {"command": ["sh", "-c", COUNTS], "limits": {"memory": "32Mi"}}))
    linked(folder / "conversions", boots)
    await conversions.start(key(folder))
    await grown(conversions, folder, 3)
    return driver, conversions


async def numbers(conversions: hot.Conversions, folder: Path) -> list[int]:
    said = await conversions.logs(key(folder), 1 << 20)
    return [int(one) for one in said.stdout.decode().splitlines()]


async def grown(conversions: hot.Conversions, folder: Path, by: int) -> None:
    seen = len(await numbers(conversions, folder))

    async def more() -> bool:
        return len(await numbers(conversions, folder)) > seen + by

    await until(more, PATIENCE_S)


async def copies(driver: ContainerDriver, conversions: hot.Conversions, folder: Path) -> list[str]:
    """The forms in which it runs."""
    found = []
    if conversions._processes(key(folder)):
        found.append("container")
    guest = conversions.guest(key(folder))
    if guest.lives and (await guest.ask("state"))["state"] == "running":
        found.append("microvm")
    return found


async def one_copy(driver: ContainerDriver, conversions: hot.Conversions, folder: Path) -> str:
    """In which form it runs, after it was seen that it alone does, goes on, and left nothing out."""
    found = await copies(driver, conversions, folder)
    now = conversions.workload(key(folder))
    assert (found, now.step) == ([now.form], ""), (found, now)
    assert (await conversions.status(key(folder))).phase is Phase.RUNNING
    await grown(conversions, folder, 3)
    seen = await numbers(conversions, folder)
    assert seen == list(range(len(seen))), next((at, seen[max(0, at - 2):at + 3]) for at in range(len(seen)) if seen[at] != at)
    return now.form


async def killed(driver: ContainerDriver, folder: Path, point: str, to: str) -> tuple[ContainerDriver, hot.Conversions]:
    """The next agent, after one that was killed (or somebody beside it) has been settled."""
    driver.close()
    driver._store.close()
    ran = await asyncio.to_thread(subprocess.run, [sys.executable, "-m", "tests.system.convert_agent", str(folder), point, to], capture_output=True, text=True, timeout=400)
    assert f"killed at {point.split(':')[1]}" in ran.stdout, ran.stdout + ran.stderr
    assert (ran.returncode == -9) == point.startswith("agent"), ran.stdout + ran.stderr
    driver, conversions = made(folder)
    await driver.probe()
    await conversions.resume()
    return driver, conversions


async def ended(driver: ContainerDriver, conversions: hot.Conversions, folder: Path) -> None:
    await conversions.delete(key(folder))
    assert not await copies(driver, conversions, folder)
    driver.close()
    driver._store.close()


INTO = [(whom, step, "container") for whom in ("guest", "qemu") for step in ("ready", "taking", "frozen", "dumped", "restored", "passing", "ended")]
"""Whom to kill on the way in, at which step, and in which form it is then."""


@slow
@pytest.mark.parametrize(("whom", "step", "form"), INTO)
async def test_whoever_is_killed_on_the_way_into_a_guest_leaves_one_copy(tmp_path: Path, boots: Path, whom: str, step: str, form: str) -> None:
    driver, conversions = await witness(tmp_path, boots)
    try:
        driver, conversions = await killed(driver, tmp_path, f"{whom}:{step}", "microvm")
        assert await one_copy(driver, conversions, tmp_path) == form
    finally:
        await ended(driver, conversions, tmp_path)


@slow
@pytest.mark.parametrize(("whom", "step", "form"), [
    (whom, step, "container") for whom in ("guest", "qemu") for step in ("dumped", "passing")
])
async def test_whoever_is_killed_on_the_way_back_leaves_one_copy(tmp_path: Path, boots: Path, whom: str, step: str, form: str) -> None:
    driver, conversions = await witness(tmp_path, boots)
    try:
        await conversions.convert(key(tmp_path), "microvm")
        driver, conversions = await killed(driver, tmp_path, f"{whom}:{step}", "container")
        assert await one_copy(driver, conversions, tmp_path) == form
    finally:
        await ended(driver, conversions, tmp_path)


@slow
@pytest.mark.parametrize(("whom", "step", "to"), [("qemu", "went", "microvm"), ("guest", "plugged", "microvm"), ("qemu", "taking", "container")])
async def test_a_guest_that_is_killed_while_it_is_the_copy_takes_it_with_it_and_no_older_one_comes_back(tmp_path: Path, boots: Path, whom: str, step: str, to: str) -> None:
    driver, conversions = await witness(tmp_path, boots)
    try:
        if to == "container":
            await conversions.convert(key(tmp_path), "microvm")
        driver, conversions = await killed(driver, tmp_path, f"{whom}:{step}", to)
        assert not await copies(driver, conversions, tmp_path)
        assert (await conversions.status(key(tmp_path))).phase in (Phase.LOST, Phase.ENDED)
    finally:
        await ended(driver, conversions, tmp_path)


@slow
@pytest.mark.parametrize("share", [share / 10 for share in range(1, 9)])
async def test_an_agent_killed_at_any_moment_leaves_one_copy(tmp_path: Path, boots: Path, share: float) -> None:
    """Moments of the way back, as shares of what an earlier one took: a second is the midst of it on one machine and after its end on another."""
    driver, conversions = await witness(tmp_path, boots)
    try:
        await conversions.convert(key(tmp_path), "microvm")
        began = time.monotonic()
        await conversions.convert(key(tmp_path), "container")
        took = time.monotonic() - began
        await conversions.convert(key(tmp_path), "microvm")
        driver, conversions = await killed(driver, tmp_path, f"agent:+{share * took:.2f}", "container")
        await one_copy(driver, conversions, tmp_path)
    finally:
        await ended(driver, conversions, tmp_path)


@slow
async def test_the_witness_sees_a_second_copy(tmp_path: Path, boots: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a container that is let go on beside its guest."""
    driver, conversions = await witness(tmp_path, boots)
    try:
        async def left(wanted: Any) -> None:
            await driver.runtime(wanted, "resume")

        async def kept(_: Any) -> None:
            pass

        monkeypatch.setattr(conversions, "_ended", left)
        monkeypatch.setattr(driver, "delete", kept)
        await conversions.convert(key(tmp_path), "microvm")
        with pytest.raises(AssertionError, match="'container', 'microvm'"):
            await one_copy(driver, conversions, tmp_path)
        monkeypatch.undo()
    finally:
        await ended(driver, conversions, tmp_path)
