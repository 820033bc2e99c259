"""Edges of one site in this process, on one mosquitto, and devices that keep the fences of their duties: what the tests of a site share."""

from pathlib import Path
from typing import Any

from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import ApiConfig, BusConfig, DecisionsConfig, DevicesConfig, DutiesConfig, HostConfig, JournalConfig, UplinkConfig
from tools.fencing import Fences

from .edges import Device, Edge
from .waiting import until

EACH: dict[str, Any] = {
    "id": "each", "on": {"device": "*", "metric": "n"}, "trigger": "each", "if": {"value": "n", "op": ">=", "than": 0},
    "then": [{"command": {"device": "$device", "name": "count", "args": {"n": "$value:n"}, "expires": "60s"}}],
}
LATCHED: dict[str, Any] = {
    "id": "hot", "on": {"device": "*", "metric": "temp"}, "if": {"value": "temp", "op": ">", "than": 80}, "clear": {"value": "temp", "op": "<", "than": 70},
    "then": [{"command": {"device": "$device", "name": "cool", "args": {"temp": "$value:temp"}, "expires": "60s"}}],
}
HOMES: dict[str, tuple[str, ...]] = {"gw-1": ("boiler-*",), "gw-2": ("pump-*",), "gw-3": ()}

START_S = 30.0
"""A site is up within 8 s; a machine under load takes longer."""


def site_config(name: str, folder: Path, port: int, rules: tuple[dict[str, Any], ...] = (EACH, LATCHED), uplink: UplinkConfig | None = None, home: tuple[str, ...] | None = None) -> EdgeConfig:
    """One member of the site."""
    return EdgeConfig(
        edge_id=name, node=name, site="hall-2", data_dir=str(folder / name), uplink=uplink or UplinkConfig(enabled=False), bus=BusConfig(url=f"mqtt://127.0.0.1:{port}"),
        journal=JournalConfig(ballast_bytes=0, min_free_bytes=0), devices=DevicesConfig(host=HostConfig(enabled=False)), decisions=DecisionsConfig(rules=rules),
        api=ApiConfig(port=0), duties=DutiesConfig(enabled=True, home=HOMES.get(name, ()) if home is None else home),
    )


class Obedient:
    """What devices do with their commands: each id once, none with a fence that is out of date, all of it remembered."""

    def __init__(self, device: Device) -> None:
        self.fences = Fences()
        self.done: list[dict[str, Any]] = []
        self.refused: list[dict[str, Any]] = []
        self._ids: set[str] = set()
        device.on_message = self._message

    def _message(self, leaf: str, body: dict[str, Any]) -> None:
        if leaf != "command":
            return
        if body.get("again") and body["id"] in self._ids:
            return  # it was on its way when a connection broke: sent again, and said to be
        self._ids.add(body["id"])
        (self.done if self.fences.admits(body) else self.refused).append(body)

    def numbers(self) -> list[int]:
        """The readings that were counted, in order."""
        return [body["args"]["n"] for body in self.done if body["name"] == "count"]


def serving(edges: dict[str, Edge], device: str) -> list[str]:
    """Who may act on a device now."""
    return [name for name, edge in edges.items() if edge.runtime.site is not None and not edge.stopped and edge.runtime.site.admit_now(device)]


async def served_by(edges: dict[str, Edge], device: str, name: str, seconds: float = START_S) -> None:
    """Until `name` serves the device."""
    await until(lambda: serving(edges, device) == [name], seconds, f"{name} serves {device}")
