"""What ingest reads of its own store while others read there too."""

from pathlib import Path

import pytest

from edge_runtime.contract import topics
from hub.store.sqlite import SqliteStore

from .hub_side import EDGE, api_of, in_thread, raw_client, running_hub
from .test_dating import batch, record
from .waiting import until


async def test_records_that_close_a_gap_are_not_taken_for_lost_while_a_page_is_read(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A cursor in the midst of its rows holds the connection by which pages read at what there was when it began."""
    first, gap, above = ([record(seq, seq * 1000, "ntp") for seq in seqs] for seqs in ((1, 2, 3), (4, 5), (6, 7)))
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        async with raw_client(hub.broker.port, "gateway") as client:
            for records, before, top in ((first, [], 3), (above, [*first, *gap], 7)):
                await client.publish(topics.edge_topic(EDGE, "up"), batch(records, before), qos=1)
                await until(lambda top=top: (book := hub.ingest.books.get((EDGE, "telemetry"))) is not None and max(book.contiguous, book.above.top) == top, what=f"up to {top}")  # type: ignore[misc]
            assert isinstance(hub.store, SqliteStore)
            page = hub.store._read.execute("SELECT seq FROM records ORDER BY seq")
            assert page.fetchone() == (1,)
            await client.publish(topics.edge_topic(EDGE, "up"), batch(gap, first), qos=1)
            await until(lambda: hub.ingest.books[EDGE, "telemetry"].contiguous == 7, what="the gap is closed")
            assert page.fetchall() and "asking the edge again" not in caplog.text
        report = await in_thread(api_of(hub).get, f"/api/v1/edges/{EDGE}/verify")
        assert report["streams"]["telemetry"]["counted"] == 7 and report["exact"]
