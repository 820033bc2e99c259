"""A hub whose wall clock is wrong, and set: nobody was silent for that, nothing is deleted for it, and the workloads' time goes on."""

import asyncio
from pathlib import Path

import pytest

from hub.fleet import SILENT_AFTER_MS, Fleet
from hub.retention import DAY_MS
from hub.server import Hub, HubSettings, HubSurroundings
from hub.store.base import EdgeRow
from hub.workloads.service import CATCH_UP_MS

from .hub_side import EDGE, api_of, differences, in_thread, linked_edge, needs_mosquitto, synced
from .waiting import until

NOW = 1_796_000_000_000
HOUR_MS = 3_600_000


class Clocks:
    """The hub's two, in the hand of the test."""

    def __init__(self) -> None:
        self.surroundings = HubSurroundings()
        self._wall, self._steady = self.surroundings.now_ms, self.surroundings.steady_ms
        self.off_ms = self.ran_ms = 0
        self.surroundings.now_ms, self.surroundings.steady_ms = (lambda: self._wall() + self.off_ms), (lambda: self._steady() + self.ran_ms)


@needs_mosquitto
@pytest.mark.parametrize("by_ms", [HOUR_MS, -HOUR_MS, 70 * 365 * DAY_MS, -20 * 365 * DAY_MS])
async def test_a_clock_that_is_set_makes_no_edge_silent_and_deletes_nothing(tmp_path: Path, by_ms: int) -> None:
    clocks = Clocks()
    hub = Hub(HubSettings(tmp_path / "hub", broker="mosquitto", broker_port=0, port=0), clocks.surroundings)
    await hub.start()
    try:
        await until(lambda: hub.link.up, what="the hub's link")
        async with linked_edge(tmp_path / "edge", hub.broker.port) as edge:
            await edge.append(20)
            await synced(hub, edge)
            before = hub.workloads.now_ms()
            clocks.off_ms += by_ms
            await until(lambda: hub.ingest.counters["clock_steps_total"] == 1, what="the hub notices")
            for _ in range(3):
                ticks = hub.ingest.counters["receipts_total"]
                await edge.append(2)
                await until(lambda: hub.ingest.counters["receipts_total"] > ticks, what="a receipt")  # noqa: B023
            await asyncio.sleep(2 * hub.ingest._pace.tick_s)
            row = hub.fleet.rows[EDGE]
            assert row.state == "online" and not hub.fleet.open_outages and abs(hub.now_ms() - row.last_seen_ms) < SILENT_AFTER_MS
            assert await in_thread(api_of(hub).get, "/api/v1/outages") == []
            assert await hub.retention.round() == 0
            now = hub.workloads.now_ms()
            assert now >= before + (by_ms if by_ms > 0 else 0)
            clocks.ran_ms += 5_000
            assert hub.workloads.now_ms() >= now + 5_000 if by_ms < 0 else hub.workloads.now_ms() >= now, "it goes on where the wall clock was set back"
            await synced(hub, edge)
    finally:
        await hub.stop()
    assert differences(edge.folder, tmp_path / "hub", EDGE) == []


@needs_mosquitto
async def test_the_workloads_time_meets_a_wall_clock_that_is_a_little_behind(tmp_path: Path) -> None:
    clocks = Clocks()
    wall, steady = NOW, 0
    clocks.surroundings.now_ms, clocks.surroundings.steady_ms = (lambda: wall), (lambda: steady)
    hub = Hub(HubSettings(tmp_path / "hub", broker="mosquitto", broker_port=0, port=0), clocks.surroundings)
    try:
        assert hub.workloads.now_ms() == NOW
        wall -= CATCH_UP_MS // 2
        seen = [hub.workloads.now_ms()]
        for _ in range(CATCH_UP_MS // 1000):
            wall, steady = wall + 1000, steady + 1000
            seen.append(hub.workloads.now_ms())
        assert seen == sorted(seen) and seen[1] == NOW + 500 and seen[-1] == wall
    finally:
        hub.store.close()


def test_a_step_is_taken_out_of_what_was_seen_since_the_hub_began_and_of_nothing_older() -> None:
    fleet = Fleet(began_ms=NOW)
    fleet.rows = {"here": EdgeRow("here", "online", last_seen_ms=NOW + 90_000), "gone": EdgeRow("gone", "offline", last_seen_ms=NOW + 10_000), "long gone": EdgeRow("long gone", "offline", last_seen_ms=NOW - 10**9)}
    now = NOW + 100_000
    assert [fleet.silence_ms(row, now) for row in fleet.rows.values()] == [10_000, 90_000, 100_000]
    for by_ms in (10 * HOUR_MS, -30 * HOUR_MS, 500):
        fleet.stepped(by_ms)
        now += by_ms
        assert [fleet.silence_ms(row, now) for row in fleet.rows.values()] == [10_000, 90_000, 100_000] and fleet.silent(now) == []
    assert fleet.rows["long gone"].last_seen_ms == NOW - 10**9
    # Control: without being told of it everybody was silent.
    assert [change.row.edge for change in fleet.silent(now + 10 * HOUR_MS)] == ["here"]
