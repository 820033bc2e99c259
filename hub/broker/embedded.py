"""amqtt inside the hub's process: needs nothing installed. Loopback only.

Measured of amqtt 0.12.1: no MQTT 5, no sessions across a restart, client certificates not enforced. None of that matters to the contract
on one machine (the journal is the durable store); on a network it would, so it is refused there.
"""

import asyncio
import logging
from typing import Any

from .base import BrokerError, authority, is_loopback


class EmbeddedBroker:
    """See `Broker`."""

    kind = "embedded"
    tls = False
    ca_file = ""
    username = password = ""
    mqtt5 = False
    restarts = 0

    def __init__(self, host: str, port: int) -> None:
        if not is_loopback(host):
            raise BrokerError("broker.host", f"the embedded broker is for this machine only, not {host}", "use mosquitto or an external broker for a network")
        self.host = host
        self.port = port
        self._broker: Any = None

    @property
    def inside(self) -> tuple[str, int]:
        """See `Broker`."""
        return self.host, self.port

    async def start(self) -> None:
        """Begin to listen; raises `BrokerError`."""
        try:
            from amqtt.broker import Broker as Amqtt
        except ImportError as error:
            raise BrokerError("broker", f"the embedded broker needs amqtt ({error})", "install amqtt, or use mosquitto") from None
        for name in ("amqtt", "transitions"):
            logging.getLogger(name).setLevel(logging.ERROR)
        if self.port == 0:
            from .mosquitto import free_port

            self.port = free_port(self.host)
        self._broker = Amqtt({
            "listeners": {"default": {"type": "tcp", "bind": f"{self.host}:{self.port}", "max_connections": 1000}},
            "plugins": {"amqtt.plugins.authentication.AnonymousAuthPlugin": {"allow_anonymous": True}},
        })
        try:
            await asyncio.wait_for(self._broker.start(), 10)
        except Exception as error:  # amqtt wraps what went wrong in its own classes
            raise BrokerError("broker.port", f"{authority(self.host, self.port)} cannot be listened on: {error}", "choose another port, or 0") from None

    async def close(self) -> None:
        """End it."""
        if self._broker is not None:
            broker, self._broker = self._broker, None
            try:
                await asyncio.wait_for(broker.shutdown(), 5)
            except Exception as error:
                logging.getLogger(__name__).warning("the embedded broker did not end cleanly: %s", error)
