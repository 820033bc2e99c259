"""Imports that cost a device memory it gets nothing for, left out. Each falls back to the ordinary import.

Measured here (MB of resident memory, Python 3.11, x86_64): OpenSSL through `ssl` and `_hashlib` 4.5; `urllib.request` with `http.client` and
`email`, which paho wants for websockets, 2.6.
"""

import importlib
import sys
import types
from typing import Any

_OPENSSL = ("ssl", "_ssl", "_hashlib")


class _Never(Exception):
    """Stands where an exception of ssl is named and no ssl is."""


def leave_out_openssl() -> bool:
    """Let `import ssl` fail from now on; asyncio, aiohttp and paho then work without TLS, hashlib with its own C code.

    Only where no configured address asks for TLS, and only before anything has imported it. Returns whether it was left out.
    """
    if any(name in sys.modules for name in _OPENSSL):
        return False
    for name in _OPENSSL:
        sys.modules[name] = None  # type: ignore[assignment]
    return True


class _Later(types.ModuleType):
    """A module that is imported when something of it is first asked for."""

    def __getattr__(self, name: str) -> Any:
        found = getattr(importlib.import_module(self.__name__), name)
        setattr(self, name, found)
        return found


def import_asyncio() -> types.ModuleType:
    """asyncio, without `inspect` and the nine modules that come with it, down to Python's grammar: a tenth of all that a start imports. asyncio asks it only for what awaitables of a foreign kind are."""
    if "asyncio" not in sys.modules and "inspect" not in sys.modules:
        sys.modules["inspect"] = _Later("inspect")
        try:
            return importlib.import_module("asyncio")
        finally:
            sys.modules.pop("inspect", None)  # whoever imports it later gets the real one
    return importlib.import_module("asyncio")


def import_paho() -> Any:
    """The module `paho.mqtt.client`, without what only its websocket transport needs."""
    name = "paho.mqtt.client"
    if name in sys.modules:
        _share_property_tables()
        return sys.modules[name]
    stand_ins = {"urllib.request": types.ModuleType("urllib.request"), "socks": None}
    added = [module for module in stand_ins if module not in sys.modules]
    for module in added:
        sys.modules[module] = stand_ins[module]  # type: ignore[assignment]
    try:
        client = importlib.import_module(name)
        if getattr(client, "ssl", None) is None:
            # paho names ssl's exceptions in `except` clauses even where it found no ssl; these are never raised.
            client.ssl = types.SimpleNamespace(SSLWantReadError=_Never, SSLWantWriteError=_Never, SSLError=_Never)  # type: ignore[attr-defined]
        _share_property_tables()
        return client
    finally:
        # Whoever imports them later gets the real ones.
        for module in added:
            sys.modules.pop(module, None)
        if "urllib.request" in added:
            urllib = sys.modules.get("urllib")
            if urllib is not None and hasattr(urllib, "request"):
                del urllib.request


def _share_property_tables() -> None:
    """Let every MQTT 5 packet share paho's three tables of properties, which it builds anew for each packet and each acknowledgement.

    That was a tenth of the agent's time under load. Left alone where this version of paho keeps them elsewhere.
    """
    packet = sys.modules.get("paho.mqtt._packet")
    original = getattr(packet, "Properties", None)
    if packet is None or original is None or original.__module__ == __name__:
        return
    tables = {name: value for name, value in vars(original(3)).items() if name in ("types", "names", "properties")}
    if len(tables) != 3:
        return

    # paho takes the spaces out of all 27 names at each packet, and the interpreter's cache of attribute names keeps thousands of the copies: a third of a
    # megabyte after some thousand connections. Names without spaces are given back as they are.
    tables["names"] = {sys.intern(name.replace(" ", "")): identifier for name, identifier in tables["names"].items()}

    class SharedTables(original):  # type: ignore[misc, valid-type]
        """paho's `Properties`, without building its tables."""

        def __init__(self, packetType: int) -> None:  # noqa: N803 - paho's name
            self.__dict__.update(tables, packetType=packetType)

        def unpack(self, buffer: bytes) -> tuple[Any, int]:
            """No properties, the usual case, are nothing to clear and nothing to read."""
            if buffer[:1] == b"\0":
                return self, 1
            read: tuple[Any, int] = super().unpack(buffer)
            return read

    packet.Properties = SharedTables  # type: ignore[attr-defined]


def packet_properties() -> Any:
    """paho's class of MQTT 5 properties, the one with shared tables where this version of paho lets it."""
    found = getattr(sys.modules.get("paho.mqtt._packet"), "Properties", None)
    if found is not None:
        return found
    from paho.mqtt.properties import Properties

    return Properties
