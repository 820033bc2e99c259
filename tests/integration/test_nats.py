"""A broker of another make, where it is installed: nats-server speaks MQTT 3.1.1 with JetStream behind it, and the contract needs no more."""

import asyncio
import shutil
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from tools.bench.harness import free_port

from .hub_side import EDGE, linked_edge, proven, running_hub
from .waiting import until

pytestmark = pytest.mark.skipif(shutil.which("nats-server") is None, reason="nats-server is not installed (apt install nats-server)")


@asynccontextmanager
async def nats(folder: Path) -> AsyncIterator[int]:
    """A nats-server with its MQTT listener on loopback; gives that port."""
    folder.mkdir(parents=True)
    port, own = free_port(), free_port()
    (folder / "nats.conf").write_text(
        f'server_name: one\nlisten: "127.0.0.1:{own}"\njetstream {{ store_dir: "{folder}" }}\nmqtt {{ listen: "127.0.0.1:{port}" }}\n'
    )
    process = await asyncio.create_subprocess_exec("nats-server", "-c", str(folder / "nats.conf"), stderr=asyncio.subprocess.DEVNULL, stdin=asyncio.subprocess.DEVNULL)
    try:
        async def listens() -> bool:
            try:
                _, writer = await asyncio.open_connection("127.0.0.1", port)
            except OSError:
                return False
            writer.close()
            return True

        await until(listens, what="nats-server listens")
        yield port
    finally:
        process.terminate()
        await process.wait()


async def test_records_presence_and_desired_state_through_nats(tmp_path: Path) -> None:
    async with nats(tmp_path / "nats") as port, running_hub(tmp_path / "hub", f"mqtt://127.0.0.1:{port}") as hub:
        assert not hub.broker.mqtt5
        await hub.change_desired(EDGE, {"twins": {"fan-1": {"speed": 2}}})
        async with linked_edge(tmp_path / "edge", port) as edge:
            await edge.append(300)
            await until(lambda: edge.desired is not None, 30, "the desired state that waited")
            await proven(hub, edge)
            await until(lambda: hub.fleet.rows[EDGE].state == "online" and hub.fleet.rows[EDGE].generation == 1, 30, "presence")
        await until(lambda: hub.fleet.rows[EDGE].state == "offline", 30, "the goodbye")
