"""A real agent behind a link of 16 kbit/s (2G, a satellite's lowest rate), after an outage: what waited is sent once, over one connection, and what the hub says comes through meanwhile."""

import asyncio
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.integration.edges import LocalBroker
from tests.integration.hub_side import differences, running_hub
from tests.integration.waiting import until
from tests.system.ground import Namespace
from tests.system.test_torture import EDGE, RULE, SITE, UPLINK, Site
from tools.bench.agent import Agent
from tools.bench.harness import free_port

pytestmark = pytest.mark.system

KBIT, READINGS = 16, 200
"""They are 400 records, 97 KB: a minute."""
WIDE = ("-c", "import runpy\nfrom edge_runtime.uplink.window import Window\nWindow.room = lambda self: 1 << 20\nrunpy.run_module('edge_runtime', run_name='__main__', alter_sys=True)")
"""As it was: a megabyte may be under way."""


@pytest.fixture
def namespace() -> Iterator[Namespace]:
    made = Namespace(2)
    yield made
    made.close()


@pytest.mark.parametrize("program", [("-m", "edge_runtime"), pytest.param(WIDE, marks=pytest.mark.slow)], ids=["shipped", "control"])
async def test_what_waited_goes_once_and_over_one_connection(program: tuple[str, ...], tmp_path: Path, namespace: Namespace) -> None:
    site = Site(namespace, tmp_path, tmp_path / "data")
    hub_port = free_port()
    broker = LocalBroker(tmp_path / "hub-broker", f"listener {hub_port} {namespace.here(UPLINK)}\nset_tcp_nodelay true\n")
    broker.start()
    namespace.thin(UPLINK, KBIT)
    namespace.cut(UPLINK)
    site.api_port = free_port()
    extra = {
        "bus": {"url": f"mqtt://{namespace.here(SITE)}:{site.bus_port}"}, "api": {"port": site.api_port}, "decisions": {"rules": [RULE]},
        "uplink": {"enabled": True, "url": f"mqtt://{namespace.here(UPLINK)}:{hub_port}", "backoff_cap_s": 2},
    }

    async def ready() -> bool:
        try:
            return bool(await site.get("/readyz"))
        except OSError:
            return False  # not yet there

    async def again() -> float:
        """Connections after the first, and times that all was sent again."""
        return await site.metric("uplink_connects_total") - 1 + await site.metric("uplink_resyncs_total")

    async def over() -> bool:
        status = await site.get("/api/v1/status")
        return bool(status["link"] == "up" and status["backlog_records"] == 0) or (program is WIDE and await again() > 0)

    async def heard() -> int:
        """What waits once the edge has the hub's desired state; 0 until then."""
        status = await site.get("/api/v1/status")
        return int(status["backlog_records"]) if status["generation"] else 0

    async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{broker.port}") as hub, site.fan:
        agent = Agent(1, api=False, model="", host=False, data=site.data, extra=extra, wrap=namespace.wrap, program=program)
        await asyncio.to_thread(agent.__enter__)
        try:
            await until(ready, 30, "the agent hears the bus")
            await site.readings(READINGS)
            namespace.heal(UPLINK)
            if program is not WIDE:
                await until(lambda: hub.ingest.books, 60, "the first of it is at the hub")
                await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": 1}}})
                await until(heard, 60, "the edge hears the hub while something waits")
            await until(over, 300, "what waited is at the hub")
            sent = await site.metric('uplink_sent_records_total{lane="history"}') + await site.metric('uplink_sent_records_total{lane="live"}')
            if program is WIDE:
                assert await again() > 0
            else:
                assert await again() == 0 and 2 * READINGS <= sent <= 2.2 * READINGS, sent
                await until(lambda: not differences(site.data, tmp_path / "hub", EDGE), 60, "hub and journal are the same")
        finally:
            await asyncio.to_thread(agent.__exit__)
    site.bus.stop()
    broker.stop()
