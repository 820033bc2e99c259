"""What the hub lets go of: the oldest first, only what is past its time, and `verify` stays exact through it and over a restart."""

import asyncio
from pathlib import Path
from typing import Any

import pytest

from hub.cli import main
from hub.retention import DAY_MS, SLICE, Retention, RetentionSettings
from hub.server import Hub

from .hub_side import EDGE, api_of, in_thread, linked_edge, needs_mosquitto, running_hub, synced


class Steady:
    """Time that passes when it is told to."""

    def __init__(self) -> None:
        self.days = 0.0

    def __call__(self) -> int:
        return int(self.days * DAY_MS)


def retention_of(hub: Hub, settings: RetentionSettings) -> tuple[Retention, Steady]:
    """The hub's retention, by a time of the test's own."""
    steady = Steady()
    return Retention(hub.ingest, settings, read=hub.read, steady_ms=steady), steady


async def later(hub: Hub, days: float, settings: RetentionSettings) -> int:
    """How many records go when a hub that has all of them now has run for so many days more."""
    retention, steady = retention_of(hub, settings)
    went = await retention.round()
    steady.days = days
    return went + await retention.round()


async def counts(hub: Hub) -> dict[str, int]:
    answer = await in_thread(api_of(hub).get, f"/api/v1/edges/{EDGE}/verify")
    assert answer["exact"], answer
    return {stream: entry["counted"] for stream, entry in answer["streams"].items()}


@needs_mosquitto
async def test_what_is_past_its_time_goes_and_verify_stays_exact(tmp_path: Path) -> None:
    settings = RetentionSettings(telemetry_days=1, decision_days=10)
    async with running_hub(tmp_path / "hub", "mosquitto") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        await edge.append(SLICE + 50, ("telemetry",))
        await edge.append(7, ("decision", "event"))
        await synced(hub, edge)
        retention, steady = retention_of(hub, settings)
        assert await retention.round() == 0
        steady.days = 0.9
        assert await retention.round() == 0
        steady.days = 1.1
        left = SLICE + 50 - await retention.round()
        assert left in (0, 1), "the newest of all stays: its number is not given again"
        assert await counts(hub) == {"telemetry": left, "decision": 7, "event": 7}
        await edge.append(3)
        await synced(hub, edge)
        assert await counts(hub) == {"telemetry": left + 3, "decision": 10, "event": 10}
        await edge.stop()
    async with running_hub(tmp_path / "hub", "mosquitto") as again:
        assert await counts(again) == {"telemetry": left + 3, "decision": 10, "event": 10}
        retention, steady = retention_of(again, settings)
        assert await retention.round() == left
        steady.days = 0.1
        assert await retention.round() == 0, "the hub has not run long enough since they came"
        steady.days = 8
        went = await retention.round()
        assert went in (2, 3)
        steady.days = 11
        went += await retention.round()
        assert went == 22 and sum((await counts(again)).values()) == 1
        assert await later(again, 9_000, RetentionSettings(0, 0)) == 0


@needs_mosquitto
async def test_records_come_while_others_go(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "mosquitto") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        retention, steady = retention_of(hub, RetentionSettings(1, 1))
        coming = asyncio.create_task(edge.append(3 * SLICE, ("telemetry",)))
        went = 0
        while not coming.done() or went < 3 * SLICE - 1:
            went += await retention.round()
            steady.days += 0.5
            await asyncio.sleep(0)  # without books a round does not let go of the loop
        await coming
        await edge.append(5)
        await synced(hub, edge)
        assert went in (3 * SLICE - 1, 3 * SLICE) and (await counts(hub))["telemetry"] == 3 * SLICE + 5 - went


@needs_mosquitto
async def test_verify_notices_records_that_went_by_themselves_and_a_chain_that_did_not_go_with_them(tmp_path: Path) -> None:
    """The negative controls: deleting without the base, and moving the base without the chain."""
    async with running_hub(tmp_path / "hub", "mosquitto") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        await edge.append(20, ("telemetry", "decision"))
        await synced(hub, edge)
        hub.store._write.execute("DELETE FROM records WHERE stream='telemetry' AND seq<=5")  # type: ignore[attr-defined]
        book = hub.ingest.books[EDGE, "decision"]
        hub.store.prune(EDGE, "decision", 5, book.base_chain)
        book.base = 6
        answer = await in_thread(api_of(hub).get, f"/api/v1/edges/{EDGE}/verify")
        assert [answer["streams"][stream]["exact"] for stream in ("telemetry", "decision", "event")] == [False, False, True]


@needs_mosquitto
async def test_a_store_that_cannot_delete_changes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_hub(tmp_path / "hub", "mosquitto") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        await edge.append(20, ("telemetry",))
        await synced(hub, edge)

        def refuse(*_: Any) -> int:
            raise OSError("disk I/O error")

        with monkeypatch.context() as patch:
            patch.setattr(hub.store, "prune", refuse)
            with pytest.raises(OSError):
                await later(hub, 2, RetentionSettings(1, 1))
        assert (await counts(hub))["telemetry"] == 20
        assert await later(hub, 2, RetentionSettings(1, 1)) >= 19


@pytest.mark.parametrize("text", ["-1", "a month", "nan", "1e9", ""])
def test_days_that_are_none_are_refused(text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["--data-dir", str(tmp_path), f"--keep-telemetry-days={text}"]) == 2
    assert "keep-telemetry-days" in capsys.readouterr().err
