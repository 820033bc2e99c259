"""Real containers that run on a lease: their keeper ends them when it is over, and what else happens to a lease."""

import signal
import time
from pathlib import Path

import pytest

from edge_runtime.workloads.drivers import lease
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Key, Order, Phase

from .container_side import driver, reason_against
from .waiting import until

__all__ = ["driver"]

pytestmark = pytest.mark.skipif(bool(reason_against()), reason=reason_against())


def now_ms() -> int:
    return time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000


async def remove(driver: ContainerDriver, key: Key) -> None:
    """The container, and its lease, which belongs to whoever renews it."""
    await driver.delete(key)
    lease.remove(driver.folder(key))


async def prepared(driver: ContainerDriver, name: str, until_ms: int, leased: bool = True) -> Key:
    key = Key(name, 1)
    driver.renew(key, until_ms)
    await driver.prepare(Order(key, "box:1", {}, {"command": ["sh", "-c", "trap '' TERM; while :; do sleep 0.1; done"]}, leased=leased))
    return key


async def test_it_is_ended_when_its_lease_is_over_and_goes_on_while_it_is_renewed(driver: ContainerDriver) -> None:
    key, other = await prepared(driver, "short", now_ms() + 600_000), await prepared(driver, "long", now_ms() + 600_000)
    for one in (key, other):
        assert (await driver.start(one)).phase is Phase.RUNNING
    driver.renew(key, now_ms() + 1_000)  # only now: a start may take long
    over = driver.lease_ms(key)
    ended = await driver.wait(key)
    assert ended.phase is Phase.LOST and ended.leased and "still this node's" in ended.reason and now_ms() >= over
    assert (await driver.status(other)).phase is Phase.RUNNING and (await driver.status(other)).leased
    await driver.pause(other)
    driver.renew(other, now_ms() - 1)
    assert (await driver.stop(other, 60.0)).phase is Phase.LOST, "a paused one is ended as well"  # it ignores the signal: its keeper's look at the lease comes long before the stop's own kill
    for one in (key, other):
        await remove(driver, one)


async def test_it_does_not_begin_when_its_lease_is_over_or_missing(driver: ContainerDriver) -> None:
    for name, until_ms in (("late", now_ms() - 1), ("none", 0)):
        key = await prepared(driver, name, until_ms)
        if not until_ms:
            lease.remove(driver.folder(key))
            assert driver.lease_ms(key) == 0
        assert (await driver.start(key)).phase is Phase.LOST
        await remove(driver, key)


async def test_control_without_a_lease_it_goes_on(driver: ContainerDriver) -> None:
    key, short = await prepared(driver, "free", now_ms() - 1, leased=False), await prepared(driver, "short2", now_ms() + 3_000)
    for one in (key, short):
        await driver.start(one)
    await driver.wait(short)
    assert (await driver.status(key)).phase is Phase.RUNNING
    for one in (key, short):
        await remove(driver, one)


async def test_what_ends_by_itself_is_no_lapse(driver: ContainerDriver) -> None:
    key = Key("itself", 1)
    driver.renew(key, now_ms() + 60_000)
    await driver.prepare(Order(key, "box:1", {}, {"command": ["sh", "-c", "kill -9 $$; exit 4"]}, leased=True))
    await driver.start(key)
    ended = await driver.wait(key)
    assert ended.phase is Phase.ENDED and ended.leased and ended.exit is not None and (ended.exit.code == 4 or ended.exit.signal == signal.SIGKILL)
    await remove(driver, key)


async def test_a_damaged_lease_is_none(driver: ContainerDriver, tmp_path: Path) -> None:
    key = await prepared(driver, "odd", now_ms() + 60_000)
    await driver.start(key)
    lease.path_of(driver.folder(key)).write_text("soon")
    assert driver.lease_ms(key) == 0
    await until(lambda: _lost(driver, key), 10.0)
    await remove(driver, key)


async def _lost(driver: ContainerDriver, key: Key) -> bool:
    return (await driver.status(key)).phase is Phase.LOST
