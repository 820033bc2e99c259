"""The agent as a process, in a network namespace and on a file system of its own that fail under it."""

import asyncio
import contextlib
import json
import sqlite3
import urllib.error
from collections.abc import AsyncIterator, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.integration.edges import Device, LocalBroker
from tests.integration.hub_side import differences, running_hub
from tests.integration.waiting import until
from tests.system.ground import Namespace, SmallDisk, StubbornCard
from tests.system.settable_clock import SettableClock
from tools.bench.agent import Agent
from tools.bench.harness import free_port
from tools.novactl.journal import check

pytestmark = pytest.mark.system

EDGE = "bench-edge"
SITE, UPLINK = 0, 1
RULE: dict[str, Any] = {
    "id": "each", "on": {"device": "boiler-*", "metric": "n"}, "if": {"value": "n", "op": ">=", "than": 0}, "trigger": "each",
    "then": [{"command": {"device": "fan-1", "name": "act", "args": {"n": "$value:n"}, "expires": "10m"}}],
}
JOURNAL = {"min_free_bytes": 4 << 20, "ballast_bytes": 2 << 20, "target_hours": 0}


class Site:
    """A place with a bus, a fan, a boiler and an agent in a namespace of its own."""

    def __init__(self, namespace: Namespace, folder: Path, data: Path) -> None:
        self.namespace, self.data = namespace, data
        self.bus_port = free_port()
        self.bus = LocalBroker(folder / "bus", f"listener {self.bus_port} {namespace.here(SITE)}\nset_tcp_nodelay true\n")
        self.bus.start()
        self.fan = Device(self.bus.port, "fan-1", persistent=True)
        self.sent = 0
        self.api_port = 0

    @contextlib.asynccontextmanager
    async def agent(self, uplink: str = "", **more: Any) -> AsyncIterator[Agent]:
        """The agent, from when it hears the bus to its orderly stop."""
        self.api_port = free_port()
        extra = {
            "bus": {"url": f"mqtt://{self.namespace.here(SITE)}:{self.bus_port}", "keepalive_s": 2}, "api": {"port": self.api_port}, "decisions": {"rules": [RULE]}, "journal": JOURNAL,
            "uplink": {"enabled": bool(uplink), "url": uplink or "mqtt://127.0.0.1:1", "keepalive_s": 2, "backoff_base_s": 0.1, "backoff_cap_s": 0.5},
        }
        agent = Agent(1, api=False, model="", host=False, data=self.data, extra=extra, wrap=self.namespace.wrap, **more)

        async def ready() -> bool:
            try:
                return bool(await self.get("/readyz"))
            except OSError:
                return False  # not yet there, or the bus is not

        try:
            await asyncio.to_thread(agent.__enter__)
            await until(ready, 30, "the agent hears the bus")
            yield agent
        finally:
            await asyncio.to_thread(agent.__exit__)

    async def readings(self, count: int, pad: int = 0, seconds: float = 60) -> None:
        """Readings, each of which must bring its command."""
        for _ in range(count):
            await self.fan.say("telemetry", {"n": self.sent, "pad": "x" * pad}, name="boiler-1")
            self.sent += 1
        await until(lambda: len(self.commands) == self.sent, seconds, f"a command for each of {self.sent} readings")

    @property
    def commands(self) -> dict[int, str]:
        """Number of the reading to the id of its command, of all that came; one id for two readings does not hide."""
        found = {body["args"]["n"]: body["id"] for body in self.fan.got("command")}
        assert len(set(found.values())) == len(found)
        return found

    async def get(self, path: str) -> Any:
        """The agent's API."""
        return await self.namespace.get(self.api_port, path)

    async def metric(self, series: str) -> float:
        """One series of the agent's metrics, 0 where it is not shown."""
        for line in (await self.get("/metrics")).splitlines():
            if line.startswith(f"novacron_edge_{series} "):
                return float(line.rsplit(" ", 1)[1])
        return 0.0

    async def unhealthy(self) -> str:
        """The answer of /healthz where it is 503, else nothing."""
        try:
            await self.get("/healthz")
            return ""
        except urllib.error.HTTPError as error:
            return error.read().decode()

    def decided(self) -> list[int]:
        """The readings that the journal has decisions on, in order."""
        with contextlib.closing(sqlite3.connect(f"file:{self.data}/journal/journal.db?mode=ro", uri=True)) as connection:
            return [json.loads(row[0])["inputs"]["n"] for row in connection.execute("SELECT body FROM records_decision ORDER BY seq")]


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace(2)
    yield made
    made.close()


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[SmallDisk]:
    made = SmallDisk(tmp_path / "small")
    made.insert()
    yield made
    made.remove()


async def test_a_full_ext4_refuses_telemetry_decides_on_and_recovers_by_itself(tmp_path: Path, disk: SmallDisk, namespace: Namespace) -> None:
    site = Site(namespace, tmp_path, disk.path / "data")
    async with site.fan:
        async with site.agent():
            await site.readings(50, 500)
            for _ in range(100):
                disk.fill()
                await site.readings(20, 500)
                if await site.metric("journal_refused_telemetry_total"):
                    break
            else:
                pytest.fail("a full disk was not noticed")
            health = await site.get("/healthz")
            assert health["status"] == "ok" and any("disk" in problem for problem in health["problems"])
            await site.readings(100, 500)
            disk.make_room()

            async def taken_again() -> bool:
                before = await site.metric("journal_refused_telemetry_total")
                await site.readings(2)
                return await site.metric("journal_refused_telemetry_total") == before

            async def well() -> bool:
                # A commit of decisions that met the full disk is tried again after up to five seconds; until then /healthz says so.
                return not await site.unhealthy() and not any("refused" in problem for problem in (await site.get("/healthz"))["problems"])

            await until(taken_again, 30, "telemetry is taken again")
            await until(well, 30, "it is well again by itself")
    site.bus.stop()
    assert check(site.data, lambda *_: None)["ok"] and site.decided() == list(range(site.sent))


async def test_a_file_system_that_goes_read_only_stops_no_command_and_after_its_repair_nothing_durable_is_lost(tmp_path: Path, disk: SmallDisk, namespace: Namespace) -> None:
    site = Site(namespace, tmp_path, disk.path / "data")
    async with site.fan:
        async with site.agent() as agent:
            await site.readings(30)
            durable = (await site.get("/api/v1/status"))["journal"]["decision"]["next"] - 1
            disk.meet_an_error()
            await site.readings(10)  # after a second without the disk they are carried out all the same
            why = await until(site.unhealthy, what="/healthz says 503")
            assert "cannot be written" in why
            assert await site.metric("journal_undurable_effects_total") > 0 and await site.metric("journal_failed_commits_total") > 0
            assert agent.process is not None and agent.process.poll() is None
            before = site.commands
        assert agent.process.returncode == 0  # it also ends in good order
        disk.repair()
        async with site.agent():
            await site.readings(30)
            status = await site.get("/api/v1/status")
            assert status["journal"]["decision"]["next"] - 1 >= durable + 30 and (await site.get("/healthz"))["problems"] == []
            boot = next(record for record in await site.get("/api/v1/journal/event?limit=50") if record["kind"] == "boot")
            assert not boot["body"]["clean"] and not boot["body"]["recovered"]
    site.bus.stop()
    # One id means one thing, also where a number was given to a command that never became durable.
    assert len({**before, **site.commands}) == site.sent and len(set(site.commands.values())) == site.sent
    decided = site.decided()
    assert check(site.data, lambda *_: None)["ok"] and decided[:30] == list(range(30)) and decided[-30:] == list(range(40, 70))


async def test_a_card_that_refuses_writes_for_a_while_is_waited_for(tmp_path: Path, namespace: Namespace) -> None:
    """No restart: the failed commit is tried again as it is, with the same numbers."""
    with StubbornCard(tmp_path / "card") as card:
        site = Site(namespace, tmp_path, card.path / "data")
        async with site.fan:
            async with site.agent():
                await site.readings(30)
                card.refuses = True
                await site.readings(10)
                await until(site.unhealthy, what="/healthz says 503")
                assert card.refused and await site.metric("journal_undurable_effects_total") > 0
                card.refuses = False

                async def well() -> bool:
                    return not await site.unhealthy()

                await until(well, 30, "the journal is written again")
                await site.readings(30)
        site.bus.stop()
        assert check(site.data, lambda *_: None)["ok"] and site.decided() == list(range(70))


async def test_one_bad_day_and_the_hub_holds_exactly_what_was_journalled(tmp_path: Path, disk: SmallDisk, namespace: Namespace) -> None:
    """Cold start in 1970 with the cable out; the bus killed; the clock jumps to today, then a day on; the cable in, out, in; kill -9; the hub's broker killed."""
    wall = SettableClock(tmp_path)
    wall.shows(10.0)
    site = Site(namespace, tmp_path, disk.path / "data")
    hub_port = free_port()
    hub_broker = LocalBroker(tmp_path / "hub-broker", f"listener {hub_port} {namespace.here(UPLINK)}\nset_tcp_nodelay true\n")
    hub_broker.start()
    uplink = f"mqtt://{namespace.here(UPLINK)}:{hub_port}"
    namespace.cut(UPLINK)

    async def link(state: str) -> None:
        async def there() -> bool:
            return bool((await site.get("/api/v1/status"))["link"] == state)

        await until(there, 30, f"the link is {state}")

    async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{hub_broker.port}") as hub, site.fan:
        async with site.agent(uplink, program=wall.program) as agent:
            await site.readings(20)
            assert (await site.get("/api/v1/status"))["decided_offline"] == 20
            site.bus.save()
            site.bus.kill()
            site.bus.start()
            await site.fan.__aexit__()
            await site.fan.__aenter__()
            await site.readings(20)
            wall.off_by(0)
            await site.readings(20)
            namespace.heal(UPLINK)
            await link("up")
            wall.off_by(86_400)
            await site.readings(20)
            namespace.cut(UPLINK)
            await link("down")
            await site.readings(20)
            await asyncio.to_thread(agent.kill)
        namespace.heal(UPLINK)
        async with site.agent(uplink, program=wall.program):
            await link("up")
            hub_broker.kill()
            await site.readings(20)
            hub_broker.start()
            await link("up")
            await site.readings(20)

            async def drained() -> bool:
                status = await site.get("/api/v1/status")
                return bool(status["backlog_records"] == 0 and status["link"] == "up")

            await until(drained, 60, "everything is at the hub")
            await until(lambda: not differences(site.data, tmp_path / "hub", EDGE), 30, "hub and journal are the same")
            assert hub.link.up
    site.bus.stop()
    hub_broker.stop()
    assert check(site.data, lambda *_: None)["ok"]
    assert set(site.decided()) == set(range(site.sent))
