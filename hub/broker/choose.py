"""One setting: `auto`, `embedded`, `mosquitto`, or the URL of a broker that runs already."""

import asyncio
import logging
from pathlib import Path
from urllib.parse import unquote, urlsplit

from .base import Broker, BrokerError
from .embedded import EmbeddedBroker
from .mosquitto import MosquittoBroker, find_mosquitto

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 5.0
PORTS = {"mqtt": 1883, "mqtts": 8883}

_CONNECT_5 = bytes.fromhex("101500044d51545405020005000008" + "6e632d70726f6265")
"""An MQTT 5 CONNECT of client `nc-probe`, clean start, keep-alive 5 s, no properties."""


class ExternalBroker:
    """A broker that is not ours: nothing is started or ended."""

    kind = "external"
    restarts = 0

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError as error:
            raise BrokerError("broker", f"{url[:120]!r} ({error})", "use auto, embedded, mosquitto or mqtt://host:port") from None
        if parts.scheme not in PORTS or not parts.hostname:
            raise BrokerError("broker", f"{url[:120]!r} is not known", "use auto, embedded, mosquitto or mqtt://host:port")
        self.host = parts.hostname
        self.port = port or PORTS[parts.scheme]
        self.tls = parts.scheme == "mqtts"
        self.username = unquote(parts.username or "")
        self.password = unquote(parts.password or "")
        self.mqtt5 = False

    async def start(self) -> None:
        """Ask it whether it speaks MQTT 5; a broker that is away now may come later and is spoken to in 3.1.1."""
        if self.tls:
            return
        try:
            self.mqtt5 = await asyncio.wait_for(self._probe(), PROBE_TIMEOUT_S)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            log.warning("broker %s:%d did not answer the probe (%s); it will be tried again", self.host, self.port, error or type(error).__name__)

    async def _probe(self) -> bool:
        reader, writer = await asyncio.open_connection(self.host, self.port)
        try:
            writer.write(_CONNECT_5)
            await writer.drain()
            head = await reader.readexactly(2)
            body = await reader.readexactly(min(head[1], 64))
            # CONNACK of an MQTT 5 broker has flags, reason code and properties; 0x84 is "unsupported protocol version".
            return head[0] == 0x20 and len(body) >= 3 and body[1] != 0x84
        finally:
            writer.close()

    async def close(self) -> None:
        """It is not ours to end."""


async def open_broker(setting: str, data_dir: Path, host: str = "127.0.0.1", port: int = 0, password_file: str = "", username: str = "", password: str = "") -> Broker:
    """The broker that `setting` names, running.

    Args:
        setting: `auto` (mosquitto where it is installed, else embedded), `embedded`, `mosquitto` or a URL.
        port: 0 takes a free one.

    Raises:
        BrokerError: naming the field and the remedy.
    """
    if setting == "auto":
        setting = "mosquitto" if find_mosquitto() else "embedded"
    broker: EmbeddedBroker | MosquittoBroker | ExternalBroker
    if setting == "embedded":
        broker = EmbeddedBroker(host, port)
    elif setting == "mosquitto":
        broker = MosquittoBroker(host, port, data_dir, password_file, username, password)
    else:
        broker = ExternalBroker(setting)
    await broker.start()
    return broker
