"""A gateway that booted in 1970: its records come as they were written, and are dated right once its clock is; also after a restart of the hub."""

import json
from pathlib import Path

from edge_runtime.contract import topics
from edge_runtime.contract.records import CHAIN_START, Record, chain_over, encode_batch

from .hub_side import EDGE, api_of, in_thread, raw_client, running_hub
from .waiting import until

TRUE_MS = 1_795_500_000_000


def record(seq: int, mono: int, quality: str) -> Record:
    wall = mono + TRUE_MS if quality == "ntp" else mono + 5_000
    body = {"device": "boiler-1", "values": {"temp": 20 + seq}, "device_ms": 86_400_000 + mono}
    return Record(seq, "b1", mono, wall, quality, "reading", json.dumps(body, separators=(",", ":")))


def batch(records: list[Record], before: list[Record]) -> bytes:
    return encode_batch(
        edge=EDGE, boot="b1", boot_n=1, stream="telemetry", lane="live", floor=1, floor_chain=CHAIN_START, dropped=0, live=1, history=1, next_seq=records[-1].seq + 1, records=records,
        chain=chain_over([*before, *records], CHAIN_START),
    )


async def test_records_are_dated_anew_and_never_overwritten(tmp_path: Path) -> None:
    early, late = [record(seq, seq * 1000, "unsynced") for seq in (1, 2, 3)], [record(4, 4000, "ntp")]
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        async with raw_client(hub.broker.port, "gateway") as client:
            await client.publish(topics.edge_topic(EDGE, "up"), batch(early, []), qos=1)
            await until(lambda: EDGE in hub.fleet.rows and hub.ingest.counters["commits_total"] > 0, what="the first batch")
            shown = await in_thread(api_of(hub).get, f"/api/v1/edges/{EDGE}/records?stream=telemetry")
            assert [(one["dated_ms"], one["dated_quality"]) for one in shown] == [(one["wall_ms"], "unsynced") for one in shown]
            await client.publish(topics.edge_topic(EDGE, "up"), batch(late, early), qos=1)
            await until(lambda: hub.ingest.books[EDGE, "telemetry"].contiguous == 4, what="the second batch")
            await until(lambda: hub.store.clocks(10), what="the clock in the store")
    for _ in range(2):
        async with running_hub(tmp_path / "hub", "embedded") as hub:
            shown = await in_thread(api_of(hub).get, f"/api/v1/edges/{EDGE}/records?stream=telemetry")
            assert [(one["dated_ms"], one["dated_quality"]) for one in shown] == [(seq * 1000 + TRUE_MS, "ntp") for seq in (1, 2, 3, 4)]
            assert [(one["wall_ms"], one["time_quality"]) for one in shown[:3]] == [(seq * 1000 + 5_000, "unsynced") for seq in (1, 2, 3)]
            assert [one["body"]["device_ms"] for one in shown] == [86_400_000 + seq * 1000 for seq in (1, 2, 3, 4)]
            report = await in_thread(api_of(hub).get, f"/api/v1/edges/{EDGE}/verify")
            assert report["exact"]
