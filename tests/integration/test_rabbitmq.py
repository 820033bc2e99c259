"""A broker of a third make, where it is installed: RabbitMQ speaks MQTT (3.1.1; from 4.0 on 5 as well) by a plug-in that keeps retained messages apart and makes AMQP's dots of MQTT's slashes."""

import asyncio
import os
import shutil
from pathlib import Path

import pytest

from edge_runtime.uplink import lanes
from tools.bench.harness import die_with_parent, free_port

from .hub_side import EDGE, linked_edge, proven, running_hub
from .waiting import until

PROGRAMS = sorted(Path("/usr/lib/rabbitmq/lib").glob("rabbitmq_server-*/sbin/rabbitmq-server"))
START_S = 120.0
"""Erlang's virtual machine and forty modules: 9 s here, alone."""

pytestmark = pytest.mark.skipif(not PROGRAMS or shutil.which("epmd") is None, reason="RabbitMQ is not installed (apt install rabbitmq-server)")


class RabbitMq:
    """One, on loopback, as the user who runs the tests; its name server (epmd) is ours too, as it would stay otherwise."""

    def __init__(self, folder: Path) -> None:
        folder.mkdir(parents=True)
        self.port, names, distribution, amqp = free_port(), free_port(), free_port(), free_port()
        (folder / "enabled").write_text("[rabbitmq_mqtt].\n")
        (folder / "rabbit.conf").write_text(f"listeners.tcp.default = 127.0.0.1:{amqp}\nmqtt.listeners.tcp.default = 127.0.0.1:{self.port}\nmqtt.allow_anonymous = true\n")
        self._environment = {
            **os.environ, "HOME": str(folder), "ERL_EPMD_PORT": str(names), "ERL_EPMD_ADDRESS": "127.0.0.1", "RABBITMQ_NODENAME": f"novacron{self.port}@localhost",
            "RABBITMQ_MNESIA_BASE": str(folder / "data"), "RABBITMQ_LOG_BASE": str(folder / "log"), "RABBITMQ_LOGS": str(folder / "log.txt"), "RABBITMQ_PID_FILE": str(folder / "pid"),
            "RABBITMQ_ENABLED_PLUGINS_FILE": str(folder / "enabled"), "RABBITMQ_CONFIG_FILE": str(folder / "rabbit.conf"), "RABBITMQ_DIST_PORT": str(distribution),
            "RABBITMQ_SERVER_ADDITIONAL_ERL_ARGS": "-kernel inet_dist_use_interface {127,0,0,1} +S 1:1",
        }
        self._folder = folder
        self._names: asyncio.subprocess.Process | None = None
        self._server: asyncio.subprocess.Process | None = None

    async def start(self) -> None:
        """Until it listens."""
        if self._names is None:
            self._names = await asyncio.create_subprocess_exec("epmd", "-port", self._environment["ERL_EPMD_PORT"], "-address", "127.0.0.1", preexec_fn=die_with_parent)
        with (self._folder / "out.txt").open("ab") as out:
            self._server = await asyncio.create_subprocess_exec(
                str(PROGRAMS[-1]), env=self._environment, cwd=self._folder, stdin=asyncio.subprocess.DEVNULL, stdout=out, stderr=out, preexec_fn=die_with_parent, start_new_session=True
            )

        async def listens() -> bool:
            assert self._server is not None and self._server.returncode is None, (self._folder / "out.txt").read_text()[-2000:]
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", self.port)
            except OSError:
                return False
            writer.close()
            return True

        await until(listens, START_S, "RabbitMQ listens")

    async def kill(self) -> None:
        """SIGKILL, to all of it: a shell starts Erlang's machine, and that its helpers."""
        if self._server is not None and self._server.returncode is None:
            os.killpg(self._server.pid, 9)
            await self._server.wait()

    async def stop(self) -> None:
        """All of it has ended."""
        await self.kill()
        if self._names is not None:
            self._names.kill()
            await self._names.wait()


@pytest.mark.timeout(600)
async def test_records_presence_desired_state_and_a_kill_through_rabbitmq(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lanes, "RECEIPT_TIMEOUT_MS", 2_000)
    broker = RabbitMq(tmp_path / "rabbit")
    try:
        await broker.start()
        async with linked_edge(tmp_path / "edge", broker.port) as edge:
            await edge.append(500)
            async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{broker.port}") as hub:
                await until(lambda: EDGE in hub.fleet.rows and hub.fleet.rows[EDGE].state == "online", what="the presence of an edge that was there before")
                await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": 2}}})
                await until(lambda: edge.desired is not None, what="the desired state")
                await proven(hub, edge)
                await broker.kill()
                await until(lambda: not edge.uplink.connected and not hub.link.up, what="both see that it is gone")
                await edge.append(500)
                await broker.start()
                await until(lambda: hub.link.up, what="the hub's link")
                await proven(hub, edge, 120.0)
            await edge.append(100)
            async with running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{broker.port}") as hub:  # which knew nothing of it while it was away
                await proven(hub, edge, 120.0)
                await until(lambda: hub.fleet.rows[EDGE].generation == 1, what="its generation")
                await edge.vanish()
                await until(lambda: hub.fleet.rows[EDGE].state == "offline", what="the Last Will")
            await hub_hears_nothing_of_dots(tmp_path, broker)
    finally:
        await broker.stop()


async def hub_hears_nothing_of_dots(folder: Path, broker: RabbitMq) -> None:
    """A name with dots is another topic there: the edge says why it is not heard."""
    async with running_hub(folder / "hub", f"mqtt://127.0.0.1:{broker.port}") as hub, linked_edge(folder / "dotted", broker.port, "plant.gw.1") as edge:
        await edge.append(5)
        await until(lambda: edge.uplink.unheard != "", what="what it says of itself")
        assert "keeps the dots of 'plant.gw.1'" in edge.uplink.unheard and "plant.gw.1" not in hub.fleet.rows
        await hub.change_desired("plant.gw.1", {"twins": {}})
        await until(lambda: "makes slashes of the dots of 'plant.gw.1'" in edge.uplink.last_error, what="what it says of the desired state")
        assert edge.desired is None
