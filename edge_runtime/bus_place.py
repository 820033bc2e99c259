"""`python -m edge_runtime.bus_place --config FILE`: takes the agent's place at a local broker that knows nothing of it, before devices come there.

A broker that is new, or has lost what it kept, acknowledges what devices say and has nobody to give it to until the agent has subscribed: those readings would be gone, and their devices would not send them again. From here on the
broker keeps them for the agent, as it does while an agent that it knows is away. For whoever starts a broker; the exit status is 0 where the place was taken or none is to be taken, 1 where the broker cannot be had.
"""

import argparse
import asyncio
import sys
from pathlib import Path

from .config import ConfigError, EdgeConfig, load_config
from .contract import topics
from .devices.bus import client_name
from .mqtt_session import Endpoint, MqttSession, SessionClosed

PATIENCE_S = 60.0
"""Longest wait for a broker that is being started."""

PAUSE_S = 0.1


def wanted(config: EdgeConfig) -> bool:
    """Whether the broker is to keep anything for this agent. On a shared site it is not: what comes late may be another's to decide by then."""
    return config.bus.enabled and bool(config.bus.url) and not config.duties.enabled


async def take(config: EdgeConfig, patience_s: float = PATIENCE_S) -> None:
    """Subscribe in the agent's name to what it subscribes to, and leave the session there. Raises SessionClosed where no broker took it within `patience_s`."""
    bus = config.bus
    endpoint = Endpoint.configured(bus)
    loop = asyncio.get_running_loop()
    end = loop.time() + patience_s
    protocol5 = bus.protocol != "3.1.1"
    while True:
        session = MqttSession(endpoint, client_name(config.edge_id), lambda *_: None, persistent=True, protocol5=protocol5)
        try:
            await session.connect()
            await session.subscribe(topics.bus_subscriptions())
            await session.disconnect()
            return
        except SessionClosed:
            if loop.time() > end:
                raise
            if bus.protocol == "auto" and session.reached and not session.accepted:
                protocol5 = not protocol5  # as the agent does
        finally:
            session.abort("session ended")
        await asyncio.sleep(PAUSE_S)


def main(arguments: list[str] | None = None) -> int:
    """The command; returns the exit status."""
    parser = argparse.ArgumentParser(prog="bus_place", description="have a broker that knows nothing of the agent keep what devices say until the agent is there")
    parser.add_argument("--config", type=Path, required=True, help="the agent's configuration")
    options = parser.parse_args(arguments)
    try:
        config = load_config(options.config).config
    except ConfigError as error:
        print(f"the configuration cannot be used:\n{error}", file=sys.stderr)
        return 2
    if not wanted(config):
        return 0
    try:
        asyncio.run(take(config))
    except SessionClosed as error:
        print(f"the broker at {config.bus.url.rpartition('@')[2]} was not to be had: {error.reason}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
