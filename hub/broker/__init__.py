"""The broker, three ways behind one setting: embedded (amqtt in this process), mosquitto (supervised), external (a URL)."""

from .base import Broker, BrokerError
from .choose import open_broker

__all__ = ["Broker", "BrokerError", "open_broker"]
