"""Random clusters and event streams for the property tests, as the JSON that a user would send."""

from typing import Any

from hypothesis import strategies as st

APPS = ("a", "b", "c")
ZONES = ("z1", "z2", "z3")
Json = dict[str, Any]


def selector(app: str) -> Json:
    return {"labels": {"app": app}}


def term(key: str, app: str) -> Json:
    return {"selector": selector(app), "topology_key": key}


@st.composite
def node_list(draw: st.DrawFn) -> list[Json]:
    """2 to 7 nodes of few sizes, some with GPUs, NUMA zones, taints, without a zone."""
    made = []
    for index in range(draw(st.integers(2, 7))):
        node: Json = {"name": f"n{index}", "capacity": {"cpu": draw(st.sampled_from([2, 4, 8])), "memory": draw(st.sampled_from(["4Gi", "8Gi"]))}, "labels": {"disk": draw(st.sampled_from(["ssd", "hdd"]))}}
        if draw(st.integers(0, 4)):
            node["zone"] = draw(st.sampled_from(ZONES))
            node["site"] = f"s-{node['zone']}"
        node["region"] = draw(st.sampled_from(["eu", "us"]))
        if draw(st.booleans()):
            node["gpus"] = [{"model": draw(st.sampled_from(["T4", "A100"])), "memory": "16Gi", "count": draw(st.integers(1, 4))}]
        if draw(st.integers(0, 3)) == 0:
            node["taints"] = [{"key": "team", "value": draw(st.sampled_from(["x", "y"])), "effect": draw(st.sampled_from(["NoSchedule", "PreferNoSchedule", "NoExecute"]))}]
        if draw(st.integers(0, 3)) == 0:
            cpu = node["capacity"]["cpu"]
            half = {"4Gi": "2Gi", "8Gi": "4Gi"}[node["capacity"]["memory"]]
            node["numa"] = [{"cpu": cpu // 2, "memory": half}, {"cpu": cpu // 2, "memory": half}]
        made.append(node)
    return made


@st.composite
def workload(draw: st.DrawFn, name: str) -> Json:
    """One workload with up to a few constraints."""
    app = draw(st.sampled_from(APPS))
    made: Json = {
        "id": name, "kind": draw(st.sampled_from(["vm", "container", "function", "batch"])), "labels": {"app": app},
        "requests": {"cpu": draw(st.sampled_from(["250m", "1", "1500m"])), "memory": draw(st.sampled_from(["256Mi", "1Gi", "3Gi"]))},
        "priority": draw(st.integers(0, 3)), "tenant": draw(st.sampled_from(["", "t1", "t2"])),
    }
    for _ in range(draw(st.integers(0, 2))):
        key, other = draw(st.sampled_from(["zone", "host"])), draw(st.sampled_from(APPS))
        match draw(st.integers(0, 10)):
            case 0:
                made["affinity"] = [term(key, other)]
            case 1:
                made["anti_affinity"] = [term(key, other)]
            case 2:
                made["spread"] = [{"topology_key": key, "selector": selector(app), "max_skew": draw(st.integers(1, 2)), "hard": draw(st.booleans())}]
            case 3:
                made["node_selector"] = {"disk": "ssd"}
            case 4:
                made["tolerations"] = [{"key": "team"}]
            case 5:
                made["gpu"] = {"milli": draw(st.sampled_from([200, 500, 1000])), "models": draw(st.sampled_from([[], ["T4"]]))}
            case 6:
                made["gpu"] = {"count": 2}
            case 7:
                made["numa"] = "single"
            case 8:
                made["residency"] = ["eu"]
            case 9:
                made["preferred_peers"] = [{"weight": draw(st.sampled_from([-5, 5])), "term": term(key, other)}]
            case _:
                made["node_affinity"] = {"required": [{"labels": [{"key": "zone", "op": "In", "values": ["z1", "z2"]}]}, {"names": [{"op": "In", "values": ["n0"]}]}]}
    return made


@st.composite
def stream(draw: st.DrawFn) -> list[tuple[str, Any]]:
    """Up to 40 events: reserve, release, ending, cordon, status, heartbeat, label change."""
    events: list[tuple[str, Any]] = []
    for index in range(draw(st.integers(1, 40))):
        match draw(st.integers(0, 9)):
            case 0 | 1:
                events.append(("release", draw(st.integers(0, 39))))
            case 2:
                events.append((draw(st.sampled_from(["ending", "cordon", "status", "beat", "relabel"])), draw(st.integers(0, 39))))
            case _:
                events.append(("reserve", draw(workload(f"w{index}"))))
    return events
