"""A hub whose disk is full: an ext4 of its own, filled to the last byte while edges go on."""

import asyncio
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from urllib.error import HTTPError

import pytest

from tests.integration.hub_side import EDGE, api_of, in_thread, linked_edge, needs_mosquitto, proven, running_hub, synced
from tests.integration.waiting import until
from tests.system.ground import SmallDisk
from tools.bench.harness import ROOT

pytestmark = [pytest.mark.system, needs_mosquitto]


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "small", 24 << 20)
    made.insert()
    yield made
    made.remove()


def fill(disk: SmallDisk) -> None:
    """To the last block."""
    disk.fill()
    try:
        with open(disk.path / "filler", "ab", buffering=0) as handle:
            while handle.write(b"x"):
                pass
    except OSError:
        pass


def health(port: int) -> tuple[int, str]:
    """What the hub says of itself to whoever asks."""
    try:
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/healthz", timeout=30) as answer:
            return int(answer.status), answer.read().decode()
    except HTTPError as error:
        return error.code, error.read().decode()


async def test_a_hub_whose_disk_is_full_says_so_and_loses_neither_records_nor_outages(tmp_path: Path, disk: SmallDisk, caplog: pytest.LogCaptureFixture) -> None:
    async with running_hub(disk.path / "hub", "mosquitto") as hub:
        async with linked_edge(tmp_path / "other", hub.broker.port, "gw-2") as other, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
            await edge.append(20)
            await other.append(20)
            await synced(hub, edge)
            await synced(hub, other)
            assert (await in_thread(health, hub.port))[0] == 200 and not hub.storage()["warning"].startswith("full")
            for _ in range(200):
                disk.fill()
                await edge.append(20)
                if hub.ingest.store_refusal:
                    break
            else:
                pytest.fail("a full disk was not noticed")
            status, said = await in_thread(health, hub.port)
            assert status == 503 and "nothing is stored" in said and str(hub.settings.data_dir) in said
            told = await in_thread(api_of(hub).get, "/api/v1/status")
            assert told["problems"] and "MiB free" in told["storage"]["warning"] and told["storage"]["bytes"] > 0
            # While nothing can be stored an edge goes and comes again, and another one goes.
            await edge.uplink.stop()
            await until(lambda: EDGE in hub.fleet.open_outages, what="the outage")
            began = hub.fleet.open_outages[EDGE]
            edge.uplink.start()
            await until(lambda: hub.fleet.rows[EDGE].state == "online", what="the edge is back")
            await other.uplink.stop()
            await until(lambda: "gw-2" in hub.fleet.open_outages, what="the other one's outage")
            refused = hub.ingest.counters["failed_commits_total"]
            await until(lambda: hub.ingest.counters["failed_commits_total"] >= refused + 5, what="tries")
            assert [record.getMessage() for record in caplog.records if "refuses commits" in record.getMessage()] and hub.ingest.store_refusal
            assert sum("refuses commits" in record.getMessage() for record in caplog.records) == 1, "each try has a line of its own in a log that may be on the same disk"
            disk.make_room()
            await until(lambda: not hub.problems(), what="it is well again by itself")
            await edge.append(20)
            await proven(hub, edge)
            outages = {(one["edge"], one["start_ms"]): one for one in await in_thread(api_of(hub).get, "/api/v1/outages")}
            assert outages[EDGE, began]["end_ms"] > began and outages[EDGE, began]["reason"], outages
            assert outages["gw-2", hub.fleet.open_outages["gw-2"]]["end_ms"] is None


@pytest.mark.parametrize("ended", ["orderly", "killed"])
async def test_a_hub_that_starts_on_a_full_disk_says_what_to_do_and_damages_nothing(tmp_path: Path, disk: SmallDisk, ended: str) -> None:
    """What it must not say is that its file is damaged: whoever believes it moves it away."""
    folder = disk.path / "hub"
    async with running_hub(folder, "mosquitto") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        await edge.append(20)
        await proven(hub, edge)
        if ended == "killed":  # as a hub that is killed leaves it, with its write-ahead log
            copies = {path.name: path.read_bytes() for path in folder.glob("hub.db*")}
    if ended == "killed":
        for name, data in copies.items():
            (folder / name).write_bytes(data)
    fill(disk)
    command = [sys.executable, "-m", "hub", "--data-dir", str(folder), "--listen", "127.0.0.1:0", "--broker", "mosquitto", "--broker-listen", "127.0.0.1:0"]
    done = await asyncio.to_thread(subprocess.run, command, capture_output=True, text=True, cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)}, timeout=30)
    assert done.returncode == 1 and "free space on its disk" in done.stderr and "data-dir" in done.stderr, done.stderr
    assert "backup" not in done.stderr and "Traceback" not in done.stderr
    disk.make_room()
    async with running_hub(folder, "mosquitto") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        await edge.append(20)
        await proven(hub, edge)
