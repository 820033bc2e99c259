"""Workloads over the hub's API: submit, explain, what-if, nodes, rebalancing, use over time; bad input of every kind names its field and changes nothing."""

import json
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hub.scheduler.audit import check_invariants

from .hub_side import Served, error_of, served_hub
from .waiting import until_sync
from .workload_side import clean, declare, submit, work

Json = dict[str, Any]


@pytest.fixture(scope="module")
def served(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    with served_hub(tmp_path_factory.mktemp("workloads") / "hub") as (background, hub):
        async def fill() -> None:
            for number in range(3):
                await declare(hub, f"n-{number}", region=f"r{number}")
            await submit(hub, work("w-1"), work("w-2", 64))

        background.run(fill())
        yield Served(background, hub)


def test_submit_list_look_explain_cancel(served: Served) -> None:
    said = served.json("/api/v1/workloads", "POST", [work("x-1"), work("x-2", 99)])["workloads"]
    assert [(one["workload"], one["state"]) for one in said] == [("x-1", "placed"), ("x-2", "pending")]
    assert served.json("/api/v1/workloads", "POST", work("x-1"))["workloads"][0]["epoch"] == 1
    assert error_of(served.ask("POST", "/api/v1/workloads", json.dumps(work("x-1", 2)).encode())[2])["field"] == "workload.requests"
    one = served.json("/api/v1/workloads/x-1")
    assert one["placements"][0]["to_ms"] is None and one["node"] == one["placements"][0]["node"]
    assert [item["workload"] for item in served.json("/api/v1/workloads?limit=1")] == ["x-2"]
    assert {item["state"] for item in served.json("/api/v1/workloads?state=pending")} == {"pending"}
    assert all(item["node"] == one["node"] for item in served.json(f"/api/v1/workloads?node={one['node']}"))
    why = served.json("/api/v1/workloads/x-2/explain")
    assert why["advice"] and all(not node["fits"] and "cpu: 99000m CPU wanted" in node["why"][0] for node in why["nodes"]) and len(why["nodes"]) == 3
    assert served.json("/api/v1/workloads/x-1", "DELETE")["state"] == "cancelled" and served.json("/api/v1/workloads/x-1", "DELETE")["state"] == "cancelled"
    assert served.json("/api/v1/workloads/x-2", "DELETE")["state"] == "cancelled"


def test_a_deadline_is_promised_or_refused_with_the_reason_and_the_start_is_shown(served: Served) -> None:
    served.json("/api/v1/nodes/d-1", "PUT", {"capacity": {"cpu": 2}, "labels": {"d": "1"}})
    now = served.hub.now_ms()

    def job(name: str, seconds: int, deadline: int | None = None, **more: Any) -> Json:
        return {"id": name, "kind": "batch", "requests": {"cpu": 2}, "duration_ms": seconds * 1000, "node_selector": {"d": "1"}, **({"deadline_ms": now + deadline * 1000} if deadline else {}), **more}

    said = served.json("/api/v1/workloads", "POST", [job("d-a", 100, 200), job("d-b", 100, 250)])["workloads"]
    assert [(one["workload"], one["state"], one["planned_nodes"]) for one in said] == [("d-a", "placed", ["d-1"]), ("d-b", "pending", ["d-1"])]
    assert said[1]["planned_ms"] - said[0]["planned_ms"] == 120_000 and said[1]["late_ms"] == 0
    status, _, text = served.ask("POST", "/api/v1/workloads", json.dumps(job("d-c", 100, 300)).encode())
    refusal = error_of(text)
    assert status == 409 and refusal["field"] == "workload.deadline_ms" and "'d-c' will miss it by " in refusal["problem"] and "CPU short on d-1 until " in refusal["problem"] and "when_late" in refusal["remedy"]
    assert served.ask("GET", "/api/v1/workloads/d-c")[0] == 404
    [thought] = served.json("/api/v1/what-if", "POST", {"workloads": [job("d-c", 100, 300)]})["jobs"]
    assert thought["verdict"] == "refused" and thought["late_ms"] > 0 and thought["planned_nodes"] == ["d-1"] and "'d-c' will miss it by " in thought["reason"] and "when_late" in thought["remedy"]
    [thought] = served.json("/api/v1/what-if", "POST", {"workloads": [job("d-c", 100, 300, when_late="accept")]})["jobs"]
    assert served.ask("GET", "/api/v1/workloads/d-c")[0] == 404
    taken = served.json("/api/v1/workloads", "POST", job("d-c", 100, 300, when_late="accept"))["workloads"][0]
    assert (thought["verdict"], thought["planned_ms"], thought["planned_end_ms"]) == ("late", taken["planned_ms"], taken["planned_end_ms"])
    assert taken["late_ms"] > 0 and "CPU short" in taken["late_because"] and taken["planned_ms"] - said[1]["planned_ms"] == 120_000
    assert served.json("/api/v1/workloads/d-b/explain")["planned_ms"] == said[1]["planned_ms"] == next(one for one in served.json("/api/v1/workloads") if one["workload"] == "d-b")["planned_ms"]
    for name in ("d-a", "d-b", "d-c"):
        served.json(f"/api/v1/workloads/{name}", "DELETE")
    served.json("/api/v1/nodes/d-1", "DELETE")


def test_what_if_tells_and_changes_nothing(served: Served) -> None:
    before = served.json("/api/v1/workloads"), served.json("/api/v1/nodes")
    question = {"workloads": [work("q-1", 3), work("q-2", 64)], "lose": [served.json("/api/v1/workloads/w-1")["node"]], "add": [{"name": "new", "capacity": {"cpu": 3}}]}
    said = served.json("/api/v1/what-if", "POST", question)
    assert [one["workload"] for one in said["placed"]] == ["q-1"] and [one["workload"] for one in said["waiting"]] == ["q-2"] and "than any node has" not in str(said["moved"])
    assert said["moved"][0]["workload"] == "w-1" and said["moved"][0]["to"] != question["lose"][0]  # type: ignore[index]
    assert (served.json("/api/v1/workloads"), served.json("/api/v1/nodes")) == before


def test_what_if_knows_gangs_priority_and_quotas(served: Served) -> None:
    served.json("/api/v1/nodes/p-1", "PUT", {"capacity": {"cpu": 2}, "labels": {"p": "1"}})
    served.json("/api/v1/quotas/poor", "PUT", {"nominal": {"cpu": 1}})
    here = {"node_selector": {"p": "1"}}
    served.json("/api/v1/workloads", "POST", work("p-low", 2, **here))
    said = served.json("/api/v1/what-if", "POST", {"workloads": [
        work("p-high", 1, priority=9, **here), work("p-poor", 2, tenant="poor"), *(work(f"g{n}", "100m", gang={"id": "g", "size": 2}) for n in range(2)), work("h0", gang={"id": "h", "size": 2}),
    ]})
    assert {one["workload"] for one in said["placed"]} == {"p-high", "g0", "g1"}
    waiting = {one["workload"]: one["reason"] for one in said["waiting"]}
    assert waiting["p-low"] == "preempted by p-high" and "tenant poor" in waiting["p-poor"] and "waits for 1 more of 2 members" in waiting["h0"]
    assert served.json("/api/v1/workloads/p-low")["state"] == "placed"
    served.json("/api/v1/workloads/p-low", "DELETE")
    served.json("/api/v1/nodes/p-1", "DELETE")
    served.json("/api/v1/quotas/poor", "DELETE")


def test_nodes_are_declared_cordoned_drained_and_taken_out(served: Served) -> None:
    shown = served.json("/api/v1/nodes/m-1", "PUT", {"capacity": {"cpu": 2}, "gpus": [{"model": "t4", "memory": "16Gi"}], "labels": {"m": "1"}})
    assert shown["status"] == "up" and shown["resources"]["cpu"] == [0, 2000] and shown["gpus"][0]["free_milli"] == 1000
    assert served.json("/api/v1/workloads", "POST", work("m", node_selector={"m": "1"}))["workloads"][0]["node"] == "m-1"
    assert served.json("/api/v1/nodes/m-1/cordon", "POST")["cordon"] == "cordon"
    served.json("/api/v1/nodes/m-2", "PUT", {"capacity": {"cpu": 2}, "labels": {"m": "1"}})
    assert served.json("/api/v1/nodes/m-1/drain", "POST")["workloads"] == 0
    assert served.json("/api/v1/workloads/m")["node"] == "m-2"
    assert served.json("/api/v1/nodes/m-1/uncordon", "POST")["cordon"] == ""
    assert served.json("/api/v1/nodes/m-2", "DELETE")["status"] == "gone"
    assert served.json("/api/v1/workloads/m")["node"] == "m-1"
    assert [entry["node"] for entry in served.json("/api/v1/workloads/m")["placements"]] == ["m-1", "m-2", "m-1"]
    served.json("/api/v1/workloads/m", "DELETE")
    served.json("/api/v1/nodes/m-1", "DELETE")
    clean(served.hub, gone={name: {"capacity": {"cpu": 2}} for name in ("m-1", "m-2", "p-1", "d-1", "r-1", "r-2")})


def test_rebalancing_is_planned_carried_out_shown_and_cancelled(served: Served) -> None:
    for name in ("r-1", "r-2"):
        served.json(f"/api/v1/nodes/{name}", "PUT", {"capacity": {"cpu": 4}, "labels": {"r": "1"}, "price": 1_000_000})
    here = {"node_selector": {"r": "1"}}
    for name, other in (("r-a", "r-2"), ("r-b", "r-1")):
        served.json(f"/api/v1/nodes/{other}/cordon", "POST")
        served.json("/api/v1/workloads", "POST", work(name, 1, **here))
        served.json(f"/api/v1/nodes/{other}/uncordon", "POST")
    assert {served.json(f"/api/v1/workloads/{name}")["node"] for name in ("r-a", "r-b")} == {"r-1", "r-2"}
    before = served.json("/api/v1/workloads")
    found = served.json("/api/v1/rebalance", "POST", {})
    assert found["state"] == "planned" and any(move["workload"] in ("r-a", "r-b") for step in found["steps"] for move in step) and served.json("/api/v1/rebalance") == []
    assert served.json("/api/v1/workloads") == before, "a plan changes nothing"
    kept = served.json("/api/v1/rebalance", "POST", {"drain": ["r-1"], "go": True})
    assert kept["state"] == "running" and kept["kind"] == "drain" and served.json("/api/v1/rebalance")[0]["id"] == kept["id"]
    until_sync(lambda: served.json("/api/v1/rebalance")[0]["state"] == "done", what="the end of it")
    assert {served.json(f"/api/v1/workloads/{name}")["node"] for name in ("r-a", "r-b")} == {"r-2"}
    status, _, text = served.ask("POST", "/api/v1/rebalance", b'{"drain":["r-1"],"go":true}')
    assert status == 409 and "empty already" in error_of(text)["problem"]
    assert served.json(f"/api/v1/rebalance/{kept['id']}", "DELETE")["state"] == "done", "what is over stays as it was"
    for name in ("r-a", "r-b"):
        served.json(f"/api/v1/workloads/{name}", "DELETE")
    for name in ("r-1", "r-2"):
        served.json(f"/api/v1/nodes/{name}", "DELETE")


def test_the_scheduler_tells_use_now_and_over_time(served: Served) -> None:
    said = served.json("/api/v1/scheduler?hours=1")
    assert said["now"]["resources"]["cpu"][1] >= 12_000 and said["submit_ms"]["count"] > 0 and said["submit_ms"]["p99"] > 0
    assert said["history"] and said["history"][-1]["nodes"]["up"] >= 1
    metrics = served.ask("GET", "/metrics")[2].decode()
    assert "novacron_hub_workloads_placed 1" in metrics and "novacron_hub_workloads_placements_total" in metrics


@pytest.mark.parametrize(("method", "path", "body", "status", "field"), [
    ("POST", "/api/v1/workloads", b"", 400, "payload"), ("POST", "/api/v1/workloads", b"[]", 400, "body"), ("POST", "/api/v1/workloads", b"7", 400, "workload"),
    ("POST", "/api/v1/workloads", b'{"id":"q","requests":{"cpu":-1}}', 400, "workload.requests.cpu"), ("POST", "/api/v1/workloads", b'{"id":"q","requests":{"cpu":1e300}}', 400, "workload.requests.cpu"),
    ("POST", "/api/v1/workloads", b'[{"id":"q"},{"id":"r","requests":{"x":1}}]', 400, "workloads[1].requests.x"), ("POST", "/api/v1/workloads", b'{"id":"w-1"}', 409, "workload."),
    ("POST", "/api/v1/workloads", b'{"id":"q","spec":{"a":"' + b"x" * 1_100_000 + b'"}}', 413, "body"), ("POST", "/api/v1/workloads", b'{"id":"q","spec":{"a":"' + b"x" * 300_000 + b'"}}', 400, "workload"),
    ("GET", "/api/v1/workloads?state=odd", None, 400, "state"), ("GET", "/api/v1/workloads/none", None, 404, "workload"), ("DELETE", "/api/v1/workloads/none", None, 404, "workload"),
    ("GET", "/api/v1/workloads/none/explain", None, 404, "workload"), ("POST", "/api/v1/what-if", b"[]", 400, "body"), ("POST", "/api/v1/what-if", b'{"lose":["none"]}', 400, "lose"),
    ("POST", "/api/v1/what-if", b'{"add":[{"name":"n-1"}]}', 400, "add"), ("POST", "/api/v1/what-if", b'{"add":[5]}', 400, "add[0]"), ("POST", "/api/v1/what-if", b'{"lose":5}', 400, "lose"),
    ("POST", "/api/v1/what-if", b'{"x":5}', 400, "x"), ("POST", "/api/v1/what-if", b'{"workloads":[{"id":"q","kind":"batch","duration_ms":-5}]}', 400, "workloads[0].duration_ms"),
    ("POST", "/api/v1/what-if", b'{"workloads":[{"id":"q","kind":"batch","duration_ms":5,"deadline_ms":1e30}]}', 400, "workloads[0].deadline_ms"), ("POST", "/api/v1/what-if", b'{"workloads":[{"id":"w-1"}]}', 409, "workload."),
    ("POST", "/api/v1/what-if", b'{"add":[{"name":"z"},{"name":"z"}]}', 400, "add[1].name"), ("PUT", "/api/v1/nodes/a%20b", b"{}", 400, "node"), ("PUT", "/api/v1/nodes/q", b'{"capacity":{"cpu":"many"}}', 400, "node.capacity.cpu"),
    ("PUT", "/api/v1/nodes/q", b'{"name":"other"}', 400, "node.name"), ("PUT", "/api/v1/nodes/q", b"[]", 400, "body"), ("DELETE", "/api/v1/nodes/none", None, 404, "node"), ("POST", "/api/v1/nodes/none/drain", None, 404, "node"),
    ("PUT", "/api/v1/budgets/b", b'{"allowed":-1e99}', 400, "budget"), ("PUT", "/api/v1/budgets/b", b'{"selector":[]}', 400, "budget.selector"), ("DELETE", "/api/v1/budgets/none", None, 404, "budget"),
    ("PUT", "/api/v1/quotas/t", b'{"nominal":{"cpu":"x"}}', 400, "quota.nominal.cpu"), ("DELETE", "/api/v1/quotas/none", None, 404, "quota"),
    ("POST", "/api/v1/rebalance", b'{"drain":"n-1"}', 400, "drain"), ("POST", "/api/v1/rebalance", b'{"drain":["none"]}', 400, "drain"), ("POST", "/api/v1/rebalance", b'{"drain":["a b"]}', 400, "drain[0]"),
    ("POST", "/api/v1/rebalance", b'{"go":1}', 400, "go"), ("POST", "/api/v1/rebalance", b'{"x":1}', 400, "x"), ("DELETE", "/api/v1/rebalance/none", None, 404, "rebalance"),
    ("POST", "/api/v1/workloads", b'{"id":"q","kind":"vm","deadline_ms":5}', 400, "workload.deadline_ms"), ("POST", "/api/v1/workloads", b'{"id":"q","kind":"batch","deadline_ms":5}', 400, "workload.duration_ms"),
    ("POST", "/api/v1/workloads", b'{"id":"q","kind":"batch","deadline_ms":5,"duration_ms":5,"requests":{"cpu":1}}', 409, "workload.deadline_ms"),
    ("POST", "/api/v1/moves", b"[]", 400, "body"), ("POST", "/api/v1/moves", b"{}", 400, "workload"), ("POST", "/api/v1/moves", b'{"workload":"none"}', 404, "workload"), ("POST", "/api/v1/moves", b'{"workload":"w-1"}', 409, "workload"),
    ("POST", "/api/v1/moves", b'{"workload":"w-1","to":5}', 400, "to"), ("POST", "/api/v1/moves", b'{"workload":"w-1","limit_mbit":1e99}', 400, "limit_mbit"), ("POST", "/api/v1/moves", b'{"workload":"w-1","x":1}', 400, "x"),
    ("DELETE", "/api/v1/moves/none", None, 404, "move"), ("GET", "/api/v1/nodes/none/drain", None, 404, "node"), ("POST", "/api/v1/workloads", b'{"id":"q","when_drained":"often"}', 400, "workload.when_drained"),
    ("GET", "/api/v1/scheduler?hours=999", None, 400, "hours"), ("PUT", "/api/v1/edges/gw-1/desired", b'{"workloads":[]}', 400, "workloads"),
])
def test_an_error_names_the_field_and_changes_nothing(served: Served, method: str, path: str, body: bytes | None, status: int, field: str) -> None:
    before = served.hub.workloads.planner.state.digest(), dict(served.hub.workloads.rows)
    got, _, text = served.ask(method, path, body)
    said = error_of(text)
    assert got == status and said["field"].startswith(field), said
    assert (served.hub.workloads.planner.state.digest(), dict(served.hub.workloads.rows)) == before


ODD = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-(2**70), 2**70), st.floats(), st.text(max_size=6), st.sampled_from(["\ud800", "4Gi", "-1", "host", "app", "In", "w-1", "n-1", "NoExecute"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.one_of(st.text(max_size=5), st.sampled_from(["selector", "labels", "topology_key", "key", "op", "values", "effect", "cpu"])), inner, max_size=3)), max_leaves=8,
)
KEYS = ["id", "name", "kind", "requests", "capacity", "gpu", "gpus", "numa", "labels", "taints", "tolerations", "affinity", "anti_affinity", "spread", "node_affinity", "weights", "gang", "priority", "links", "spec",
        "lost_after_ms", "runs", "selector", "allowed", "nominal", "borrow", "cohort", "workloads", "lose", "add", "tenant", "duration_ms", "deadline_ms", "when_late", "images", "location", "preferred_peers"]
BODY = st.one_of(st.binary(max_size=30), st.one_of(ODD, st.dictionaries(st.sampled_from(KEYS), ODD, max_size=5), st.dictionaries(st.sampled_from(KEYS), ODD, max_size=3).map(lambda value: {**value, "id": "fuzz"}))
                 .map(lambda value: json.dumps(value).encode()))
ROUTES = [("POST", "/api/v1/workloads"), ("POST", "/api/v1/what-if"), ("PUT", "/api/v1/nodes/fuzz"), ("PUT", "/api/v1/budgets/fuzz"), ("PUT", "/api/v1/quotas/fuzz"), ("POST", "/api/v1/nodes/n-1/cordon"), ("POST", "/api/v1/rebalance")]


@settings(max_examples=200, deadline=None)
@given(route=st.sampled_from(ROUTES), body=BODY)
def test_nothing_that_is_sent_breaks_the_api(served: Served, route: tuple[str, str], body: bytes) -> None:
    status, _, text = served.ask(*route, body)
    assert status in (200, 400, 409, 413), (status, text[:300])
    if status != 200:
        error_of(text)
    check_invariants(served.hub.workloads.planner.state)
