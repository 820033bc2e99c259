"""One setting: `auto`, `embedded`, `mosquitto`, or the URL of a broker that runs already."""

import asyncio
import logging
import ssl
from pathlib import Path
from urllib.parse import unquote, urlsplit

from edge_runtime.system.reach import NEXT_S

from .base import Broker, BrokerError, Door
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

    def __init__(self, url: str, ca_file: str = "") -> None:
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
        self.ca_file = ca_file
        self.inside = (self.host, self.port)
        if ca_file and not self.tls:
            raise BrokerError("broker-ca-file", "is given for a broker without TLS", "use mqtts://, or leave it out")
        self.username = unquote(parts.username or "")
        self.password = unquote(parts.password or "")
        self.mqtt5 = False

    async def start(self) -> None:
        """Ask it whether it speaks MQTT 5; a broker that is away now may come later and is spoken to in 3.1.1."""
        context = None
        if self.tls:
            try:
                context = await asyncio.to_thread(ssl.create_default_context, cafile=self.ca_file or None)
            except OSError as error:
                raise BrokerError("broker-ca-file", f"{self.ca_file} holds no authorities ({error.strerror or error})", "give a PEM file") from None
        try:
            self.mqtt5 = await asyncio.wait_for(self._probe(context), PROBE_TIMEOUT_S)
        except (OSError, TimeoutError, asyncio.IncompleteReadError) as error:
            log.warning("broker %s:%d did not answer the probe (%s); it will be tried again", self.host, self.port, str(error) or type(error).__name__)

    async def _probe(self, context: ssl.SSLContext | None) -> bool:
        reader, writer = await asyncio.open_connection(self.host, self.port, ssl=context, happy_eyeballs_delay=NEXT_S)
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


async def open_broker(setting: str, data_dir: Path, host: str = "127.0.0.1", port: int = 0, door: Door = Door(), ca_file: str = "") -> Broker:
    """The broker that `setting` names, running.

    Args:
        setting: `auto` (mosquitto where it is installed, else embedded), `embedded`, `mosquitto` or a URL.
        port: 0 takes a free one.
        door: of mosquitto.
        ca_file: authorities by which an external broker is trusted (PEM); empty: the system's.

    Raises:
        BrokerError: naming the field and the remedy.
    """
    if setting == "auto":
        setting = "mosquitto" if find_mosquitto() else "embedded"
    broker: EmbeddedBroker | MosquittoBroker | ExternalBroker
    if setting == "embedded":
        if door.guards:
            raise BrokerError("broker", "is embedded, which lets everybody on this machine in", "apt install mosquitto, and use mosquitto")
        broker = EmbeddedBroker(host, port)
    elif setting == "mosquitto":
        broker = MosquittoBroker(host, port, data_dir, door)
    else:
        if door.guards:
            raise BrokerError("broker", "is not ours, so whom it lets in is not ours to say", "configure that broker, and leave out broker-password-file and broker-client-ca")
        broker = ExternalBroker(setting, ca_file)
    await broker.start()
    return broker
