"""A hub whose wall clock is wrong, and set: nobody was silent for that, nothing is deleted for it, and the workloads' time goes on."""

import asyncio
from pathlib import Path

import pytest

from hub.fleet import SILENT_AFTER_MS, Fleet
from hub.ingest import Ingest
from hub.retention import DAY_MS
from hub.scheduler.arrays import SILENT
from hub.server import Hub, HubSettings, HubSurroundings
from hub.store.base import EdgeRow
from hub.workloads.service import CATCH_UP_MS, ROUND_S

from .hub_side import EDGE, api_of, differences, in_thread, linked_edge, needs_mosquitto, synced
from .waiting import until
from .workload_side import submit, work

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
    fleet = Fleet(began_ms=NOW, looked_ms=NOW + 100_000)
    fleet.rows = {"here": EdgeRow("here", "online", last_seen_ms=NOW + 90_000), "gone": EdgeRow("gone", "offline", last_seen_ms=NOW + 10_000), "long gone": EdgeRow("long gone", "offline", last_seen_ms=NOW - 10**9)}
    now = NOW + 100_000
    assert [fleet.silence_ms(row) for row in fleet.rows.values()] == [10_000, 90_000, 100_000]
    for by_ms in (10 * HOUR_MS, -30 * HOUR_MS, 500):
        fleet.stepped(by_ms)
        now += by_ms
        fleet.looked_ms = now
        assert [fleet.silence_ms(row) for row in fleet.rows.values()] == [10_000, 90_000, 100_000] and fleet.silent(now) == []
    assert fleet.rows["long gone"].last_seen_ms == NOW - 10**9
    # Control: without being told of it everybody was silent.
    assert [change.row.edge for change in fleet.silent(now + 10 * HOUR_MS)] == ["here"]


@pytest.mark.parametrize("planted", [False, True])
async def test_a_step_ahead_loses_no_node_that_is_silent_just_then(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, planted: bool) -> None:
    """Planted: the hub does not look at its clock."""
    clocks = Clocks()
    if planted:
        monkeypatch.setattr(Ingest, "_look_at_clock", lambda *_: None)
    hub = Hub(HubSettings(tmp_path / "hub", broker="embedded", broker_port=0, port=0), clocks.surroundings)
    await hub.start()
    try:
        for name in ("gw-1", "gw-2"):
            hub.fleet.rows[name] = EdgeRow(name, "online", last_seen_ms=hub.now_ms())
            await hub.workloads.ask(lambda planner, now, name=name: planner.put_node(name, {"capacity": {"cpu": 9}}, "edge", now))
        assert await submit(hub, work("a")) == ["placed"]
        [(name, epoch)] = hub.workloads.planner.tables.open
        [node] = [node for node in ("gw-1", "gw-2") if hub.workloads.planner.tables.on_node.get(node)]
        hub.fleet.rows[node].state = "offline"
        state = hub.workloads.planner.state
        await until(lambda: state.status[state.node_index[node]] == SILENT, what="its silence")
        clocks.off_ms += HOUR_MS
        before = hub.now_ms()
        await until(lambda: hub.fleet.looked_ms >= before, what="a look at the clock")
        if planted:
            await until(lambda: (name, epoch) not in hub.workloads.planner.tables.open, what="it is taken for lost")
        else:
            for _ in range(3):  # rounds
                await hub.workloads.ask(lambda planner, now: None)
                await asyncio.sleep(ROUND_S)
            assert list(hub.workloads.planner.tables.open) == [(name, epoch)] and hub.ingest.counters["clock_steps_total"] == 1
    finally:
        await hub.stop()
