"""The hot loops compiled with numba where it is installed and wanted; the numpy forms stand beside them in the modules that call these, and give the same results."""

from importlib import import_module
from typing import Any

from .units import Invalid

active: Any = None
"""The compiled functions, None while numpy does the work."""


def use(choice: str) -> bool:
    """`auto`: where numba is installed; `on`: or `Invalid`; `off`: numpy. Gives whether compiled code is used from now on."""
    global active
    active = None
    if choice == "off":
        return False
    try:
        compiled = import_module("hub.scheduler.compiled")
    except ImportError as error:
        if choice == "on":
            raise Invalid("numba", "is not installed", "pip install 'novacron[fast]', or leave it off") from error
        return False
    active = compiled
    return True



def warm() -> None:
    """Have the kernels compiled, or read from numba's cache on the disk: by decisions of each sort on a small cluster, whose outcome is thrown away. Takes some seconds the first time on a machine."""
    from . import parse, preempt, rank  # they need this module
    from .fragmentation import Fragmentation, typical_of
    from .place import Scheduler
    from .state import State

    state = State(0)
    plain: dict[str, Any] = {"capacity": {"cpu": 4, "memory": "16Gi"}, "idle_mw": 1, "busy_mw": 2}
    devices: dict[str, Any] = {"gpus": [{"model": "T4", "memory": "16Gi", "count": 4}]}
    state.add_nodes([parse.node({**plain, **(devices if number < 2 else {}), "name": f"n{number}", "zone": f"z{number % 2}", "price": number}, "node") for number in range(6)], 0)
    scheduler = Scheduler(state)
    chosen = {"labels": {"app": "a"}}
    spread = {"spread": [{"topology_key": "zone", "selector": chosen, "max_skew": 1}]}
    peers: dict[str, Any] = {"topology_key": "zone", "selector": chosen}
    sorts: tuple[dict[str, Any], ...] = (
        {"gpu": {"milli": 500}}, {"gpu": {"milli": 500}}, {}, spread, {"spread": [{**peers, "hard": False}]}, {"anti_affinity": [{"topology_key": "zone", "selector": {"labels": {"app": "b"}}}]},
        {"affinity": [peers]}, {"preferred_peers": [{"weight": 1, "term": peers}]}, {"gpu": {"milli": 1000}, "priority": 9}, {"priority": 9, **spread}, {"priority": 9, "requests": {"cpu": 3, "memory": "4Gi"}},
    )
    for sort, more in enumerate(sorts):
        for number in range(4):
            document = {"id": f"w{sort}-{number}", "kind": "container", "labels": {"app": "a"}, "requests": {"cpu": 1, "memory": "1Gi"}, **more}
            preempt.reserve(scheduler, parse.workload(document, "workload"), 0)
        if not sort:  # from now on fragmentation counts too
            scheduler.ranker = rank.Ranker({"fragmentation": Fragmentation(typical_of(state))})
