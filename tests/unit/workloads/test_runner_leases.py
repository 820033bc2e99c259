"""The runner with workloads that run on a lease: what may not run here is ended and nothing is said of it, what its lease ended begins anew, what has ended by itself does not."""

from typing import Any

import pytest

from edge_runtime.workloads import runner as runners
from edge_runtime.workloads.drivers.face import Key, Order, Phase, Refused, Status

from .test_runner import Disk, InMemory, entry, made, quiet

A = Key("a", 1)


class Leased(InMemory):
    """Knows of leases; `lapse` is what the keeper of a real one does."""

    async def prepare(self, order: Order) -> Status:
        await super().prepare(order)
        found = self._disk.instances[order.key]
        if found.phase is Phase.PREPARED:
            self._disk.instances[order.key] = Status(order.key, Phase.PREPARED, leased=order.leased)
        return self._disk.instances[order.key]

    async def start(self, key: Key) -> Status:
        leased = (await self.status(key)).leased
        found = await super().start(key)
        self._disk.instances[key] = Status(key, found.phase, found.pid, found.exit, found.reason, leased=leased)
        return self._disk.instances[key]

    def renew(self, key: Key, until_ms: int) -> None:
        raise AssertionError

    def lease_ms(self, key: Key) -> int:
        raise AssertionError


def lapse(disk: Disk, key: Key) -> None:
    disk.instances[key] = Status(key, Phase.LOST, leased=True, reason="its lease was over")
    disk.ended[key].set()


@pytest.fixture(autouse=True)
def at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "AGAIN_S", 0.0)


async def test_it_runs_only_while_it_may_and_what_the_hub_hears_is_one_life() -> None:
    disk = Disk()
    runner = made(disk, Leased)
    await runner.take([entry("a", 1)], {"a/1": False})
    await quiet()
    assert disk.instances == {} and disk.records == []
    await runner.take([entry("a", 1)], {"a/1": True})
    await quiet()
    assert disk.instances[A].phase is Phase.RUNNING and disk.instances[A].leased
    await runner.take([entry("a", 1)], {"a/1": False})
    await runner.ended("a")
    assert disk.instances == {}, "when `ended` returns nothing runs"
    await runner.take([entry("a", 1)], {"a/1": True})
    await quiet()
    assert disk.starts[A] == 2 and disk.records == [("a", 1, "accepted"), ("a", 1, "running")]
    await runner.close()


async def test_what_its_lease_ended_begins_anew_where_it_may_and_only_there() -> None:
    disk = Disk()
    runner = made(disk, Leased)
    await runner.take([entry("a", 1)], {"a/1": True})
    await quiet()
    lapse(disk, A)
    await quiet()
    assert disk.instances[A].phase is Phase.RUNNING and disk.starts[A] == 2
    lapse(disk, A)
    await runner.take([entry("a", 1)], {"a/1": False})
    await quiet()
    assert disk.instances == {} and disk.starts[A] == 2 and disk.records == [("a", 1, "accepted"), ("a", 1, "running")]
    await runner.close()


async def test_what_ended_by_itself_is_told_once_and_not_begun_again() -> None:
    for may in (True, False):
        disk = Disk()
        runner = made(disk, Leased)
        await runner.take([entry("a", 1)], {"a/1": True})
        await quiet()
        await runner.close()
        disk.finish(A, 0)
        disk.instances[A] = Status(A, Phase.ENDED, exit=disk.instances[A].exit, leased=True)
        runner = made(disk, Leased)
        await runner.take([entry("a", 1)], {"a/1": may})
        await quiet()
        await runner.take([entry("a", 1)], {"a/1": True})
        await quiet()
        assert disk.records == [("a", 1, "accepted"), ("a", 1, "running"), ("a", 1, "done")] and disk.starts[A] == 1 and runner.ends() == {"a/1": "done"}
        await runner.close()


async def test_with_and_without_a_lease_are_two_containers() -> None:
    disk = Disk()
    runner = made(disk, Leased)
    await runner.take([entry("a", 1)])
    await quiet()
    assert not disk.instances[A].leased
    await runner.take([entry("a", 1)], {"a/1": True})
    await quiet()
    assert disk.instances[A].leased and disk.starts[A] == 2
    await runner.close()


async def test_a_driver_without_leases_refuses_what_may_move() -> None:
    disk = Disk()
    runner = made(disk)
    await runner.take([entry("a", 1)], {"a/1": True})
    await quiet()
    assert disk.records == [("a", 1, "accepted"), ("a", 1, "refused")] and disk.instances == {}
    await runner.close()
    with pytest.raises(Refused):
        await Leased(disk).status(A)


async def test_what_a_sibling_had_is_told_with_its_fence_and_only_when_it_runs() -> None:
    disk = Disk()
    bodies: list[dict[str, Any]] = []
    append = disk.append
    disk.append = lambda stream, kind, body: (bodies.append(body), append(stream, kind, body))[1]  # type: ignore[method-assign, func-returns-value]
    held = {**entry("a", 1), "for": "gw-9", "generation": 3, "fence": 7}
    runner = made(disk, Leased)
    await runner.take([held, {**entry("b", 1, bad=True), "for": "gw-9", "generation": 3, "fence": 8}, {**entry("c", 1), "refusal": "too many"}], {"a/1": True, "b/1": True})
    await quiet()
    disk.finish(A, 3)
    await quiet()
    assert [(one["id"], one["state"], one.get("for"), one.get("fence")) for one in bodies] == [("c", "refused", None, None), ("a", "running", "gw-9", 7), ("a", "failed", "gw-9", 7)]
    assert runner.ends() == {"a/1": "failed", "b/1": "refused", "c/1": "refused"}
    await runner.close()


async def test_what_would_be_started_again_is_not_told_as_ended_while_it_is_anothers(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runners, "pause_s", lambda tries: 0.0)
    disk = Disk()
    now = [entry("a", 1, restart="always")]
    runner = made(disk, Leased)
    await runner.take(now, {"a/1": True})
    await quiet()
    await runner.close()
    disk.finish(A, 3)
    disk.instances[A] = Status(A, Phase.ENDED, exit=disk.instances[A].exit, leased=True)
    runner = made(disk, Leased)
    await runner.take(now, {"a/1": False})
    await quiet()
    assert disk.records[:2] == [("a", 1, "accepted"), ("a", 1, "running")] and len(disk.records) == 2 and disk.starts[A] == 1
    await runner.take(now, {"a/1": True})
    await quiet()
    assert disk.starts[A] == 2 and disk.instances[A].phase is Phase.RUNNING
    await runner.close()
