"""Small fleets for the tests of moving: one description as plain dicts for the checker, and the scheduler's state made from it."""

from collections.abc import Mapping
from typing import Any

import numpy as np

from hub.scheduler import Scheduler, State
from hub.scheduler import node as parse_node
from hub.scheduler import workload as parse_workload
from hub.scheduler.units import LEAVING

GB = 10**9


def node(name: str, cpu: int = 8, gb: int = 32, zone: str = "z1", gpus: int = 0, price: int = 0, kbps: int = 1_000_000, site: str | None = None) -> dict[str, Any]:
    return {"name": name, "capacity": {"cpu": cpu * 1000, "memory": gb * GB}, "zone": zone, "gpus": gpus, "price": price, "kbps": kbps, "site": site}


def item(name: str, cpu: float = 1, gb: int = 1, *, app: str = "", kind: str = "vm", migratable: bool | None = None, apart: str | None = None, spread: str | None = None, skew: int = 1,
         gpu: int = 0, carried: int | None = None, zone: str = "", priority: int = 0) -> dict[str, Any]:
    return {
        "id": name, "requests": {"cpu": int(cpu * 1000), "memory": gb * GB}, "app": app or name, "kind": kind, "migratable": kind == "vm" if migratable is None else migratable,
        "apart": apart, "spread": spread, "skew": skew, "gpu": gpu, "bytes": (gb if carried is None else carried) * GB, "zone": zone, "priority": priority,
    }


def to_workload(each: Mapping[str, Any]) -> Any:
    chosen = {"labels": {"app": each["app"]}}
    return parse_workload({
        "id": each["id"], "kind": each["kind"], "labels": {"app": each["app"]}, "requests": {"cpu": each["requests"]["cpu"] / 1000, "memory": each["requests"]["memory"]},
        "migratable": each["migratable"], "state_bytes": each["bytes"], "priority": each["priority"],
        **({"gpu": {"count": 1, "milli": each["gpu"]}} if each["gpu"] else {}),
        **({"anti_affinity": [{"selector": chosen, "topology_key": each["apart"]}]} if each["apart"] else {}),
        **({"spread": [{"max_skew": each["skew"], "topology_key": each["spread"], "selector": chosen}]} if each["spread"] else {}),
        **({"node_selector": {"zone": each["zone"]}} if each["zone"] else {}),
    })


class Fleet:
    """Nodes, workloads and the scheduler over them. `put` places one on a named node, against the filters' wish where `anyway`."""

    def __init__(self, *nodes: dict[str, Any]) -> None:
        self.nodes = {each["name"]: each for each in nodes}
        self.items: dict[str, dict[str, Any]] = {}
        self.state = State()
        self.state.add_nodes([parse_node({
            "name": each["name"], "zone": each["zone"], "price": each["price"], **({"site": each["site"]} if each["site"] else {}),
            "capacity": {"cpu": each["capacity"]["cpu"] / 1000, "memory": each["capacity"]["memory"], "network": each["kbps"]},
            "gpus": [{"model": "T4", "count": each["gpus"]}] if each["gpus"] else [],
        }) for each in nodes])
        self.scheduler = Scheduler(self.state)

    def put(self, each: dict[str, Any], where: str, *, anyway: bool = False) -> bool:
        workload = to_workload(each)
        among = np.zeros(self.state.size, bool)
        among[self.state.node_index[where]] = True
        klass = self.state.klass(workload.shape)
        decision = self.scheduler.decide(workload, 0, among)
        seat = decision.seat or (self.scheduler.seat_on(klass, self.state.node_index[where]) if anyway else None)
        if seat is None:
            return False
        self.state.place(workload, seat, 0)
        self.items[each["id"]] = each
        return True

    def where(self) -> dict[str, str]:
        return {name: self.state.nodes[seat.node].name for name in self.state.slot_of if not name.endswith(LEAVING) and (seat := self.state.seat(name)) is not None}

    def devices(self) -> dict[str, int]:
        return {name: seat.gpus[0] for name in self.state.slot_of if not name.endswith(LEAVING) and (seat := self.state.seat(name)) is not None and seat.gpus}
