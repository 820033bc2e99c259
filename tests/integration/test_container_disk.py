"""Containers are held to what they asked of the disk: what one has in its root is counted, whatever it does with names, and one that has more is ended and says why."""

import os
import stat
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.workloads.drivers import container_disk
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_disk import counted
from edge_runtime.workloads.drivers.face import Ability, Key, Phase

from .container_side import driver, reason_against, started
from .waiting import until

__all__ = ["driver"]

real = pytest.mark.skipif(bool(reason_against()), reason=reason_against())
MIB = 1 << 20

NAMES = st.sampled_from([f"{folder}{name}" for folder in ("", "a/", "a/b/") for name in "xyz"])
STEPS = st.lists(st.one_of(
    st.tuples(st.just("write"), NAMES, st.integers(0, 200_000)), st.tuples(st.just("hole"), NAMES, st.integers(0, 10**9)), st.tuples(st.just("link"), NAMES, NAMES), st.tuples(st.just("remove"), NAMES, st.just(0)),
), max_size=15)


@given(STEPS)
@settings(max_examples=60)
def test_what_is_counted_is_what_the_file_system_holds_each_file_once(steps: list[tuple[str, str, int | str]]) -> None:
    with tempfile.TemporaryDirectory() as top:
        for folder in ("a", "a/b"):
            Path(top, folder).mkdir()
        for what, name, more in steps:
            path = Path(top, name)
            if what == "write" and isinstance(more, int):
                path.write_bytes(os.urandom(more))
            elif what == "hole" and isinstance(more, int):
                with open(path, "wb") as handle:
                    handle.truncate(more)
            elif what == "link" and path.exists() and not Path(top, str(more)).exists():
                os.link(path, Path(top, str(more)))
            elif what == "remove":
                path.unlink(missing_ok=True)
        told = [os.lstat(os.path.join(where, name)) for where, folders, files in os.walk(top) for name in (*folders, *files)]
        want = sum({(one.st_dev, one.st_ino): one.st_blocks * 512 for one in told}.values())
        assert counted(Path(top)) == (want, False)
        regular = sum(stat.S_ISREG(one.st_mode) for one in told)
        assert counted(Path(top), len(told) - 1)[1] and counted(Path(top), len(told)) == (want, False) and regular <= len(told)


@real
async def test_one_that_writes_more_than_it_asked_for_is_ended_and_says_why(driver: ContainerDriver) -> None:
    assert (await driver.probe()).can(Ability.DISK_LIMIT)
    script = "dd if=/dev/zero of=/srv/big bs=1M count={} 2>/dev/null; echo written; exec sleep 1000"
    over = await started(driver, "disk-over", script.format(9), requests={"disk": 8 * MIB})
    under = await started(driver, "disk-under", script.format(7), requests={"disk": 8 * MIB})
    free = await started(driver, "disk-free", script.format(9))

    async def written(key: Key) -> bool:
        return b"written" in (await driver.logs(key, 100)).stdout

    for key in (over, under, free):
        await until(lambda key=key: written(key))
    assert [(one.key, one.limit) for one in await driver.hold_disks()] == [(over, 8 * MIB)]
    status = await driver.wait(over)
    assert status.phase is Phase.ENDED and status.reason.startswith("killed: it has ") and status.reason.endswith(f"asked for {8 * MIB} (requests.disk)")
    assert [(await driver.status(key)).phase for key in (under, free)] == [Phase.RUNNING] * 2, "the control: who is within its limit, or has none, goes on"
    assert await driver.hold_disks() == []
    for key in (over, under, free):
        await driver.delete(key)


@real
async def test_files_that_were_deleted_and_are_open_count_and_so_do_files_without_end(driver: ContainerDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    hidden = await started(driver, "disk-hidden", "exec 3>/srv/gone; rm /srv/gone; dd if=/dev/zero bs=1M count=9 >&3 2>/dev/null; echo written; exec sleep 1000", requests={"disk": 8 * MIB})
    many = await started(driver, "disk-many", "i=0; while [ $i -lt 60 ]; do : > /srv/$i; i=$((i+1)); done; echo written; exec sleep 1000", requests={"disk": 800 * MIB})

    async def written(key: Key) -> bool:
        return b"written" in (await driver.logs(key, 100)).stdout

    for key in (hidden, many):
        await until(lambda key=key: written(key))
    assert counted(driver.folder(hidden) / "disk/upper")[0] < 8 * MIB, "by its names alone it would be within its limit"
    assert [one.key for one in await driver.hold_disks()] == [hidden]
    assert "requests.disk" in (await driver.wait(hidden)).reason
    monkeypatch.setattr(counted, "__defaults__", (50,))
    monkeypatch.setattr(driver._disks, "_again", {})
    assert [(one.key, one.files) for one in await driver.hold_disks()] == [(many, True)]
    assert f"more than {container_disk.MAX_FILES} files" in (await driver.wait(many)).reason
    for key in (hidden, many):
        await driver.delete(key)


@real
async def test_a_look_that_took_long_is_not_begun_again_at_once(driver: ContainerDriver, monkeypatch: pytest.MonkeyPatch) -> None:
    key = await started(driver, "disk-slow", "exec sleep 1000", requests={"disk": 8 * MIB})
    looks = []

    def slow(folder: Path) -> tuple[int, bool]:
        looks.append(folder)
        clock[0] += 2.0
        return 0, False

    clock = [100.0]
    monkeypatch.setattr(container_disk, "time", SimpleNamespace(monotonic=lambda: clock[0]))
    monkeypatch.setattr(container_disk, "counted", slow)
    for at, seen in ((100.0, 1), (139.0, 1), (141.0, 2)):
        driver._disks.look({key: 8 * MIB}, at)
        assert len(looks) == seen
    monkeypatch.undo()
    await driver.delete(key)
