"""The independent checker finds what the scheduler might do wrong, and the translation of kube-scheduler's cases says what they say."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hub.scheduler import Fail, Placed, Scheduler, State, feasible, node, place, rank, workload
from tools.bench import k8s_cases
from tools.bench.placement_check import Checker, main
from tools.bench.scheduler_latency import Run, fill

Json = dict[str, Any]
SAME = {"selector": {"labels": {"app": "a"}}}
BIG = {"capacity": {"cpu": 8, "memory": "8Gi"}}

PLANTS: list[tuple[str, Fail, list[Json], list[Json], str]] = [
    ("taint", Fail.TAINT, [{"name": "n0", **BIG, "taints": [{"key": "k", "effect": "NoSchedule"}]}], [{}], "taint k"),
    ("selector", Fail.NODE_AFFINITY, [{"name": "n0", **BIG}], [{"node_selector": {"disk": "ssd"}}], "node selector"),
    ("anti-affinity", Fail.ANTI_AFFINITY, [{"name": "n0", **BIG}], [{"labels": {"app": "a"}}, {"anti_affinity": [{"topology_key": "host", **SAME}]}], "anti-affinity"),
    ("its mirror image", Fail.EXCLUDED, [{"name": "n0", **BIG}], [{"anti_affinity": [{"topology_key": "host", **SAME}]}, {"labels": {"app": "a"}}], "apart from it"),
    ("affinity", Fail.AFFINITY, [{"name": "n0", **BIG, "zone": "z"}], [{"affinity": [{"topology_key": "zone", **SAME}]}], "affinity does not hold"),
    ("spread", Fail.SPREAD, [{"name": "n0", **BIG, "zone": "z1", "labels": {"p": "1"}}, {"name": "n1", **BIG, "zone": "z2"}],
     [{"labels": {"app": "a"}, "spread": [{"topology_key": "zone", **SAME}], "node_affinity": {"preferred": [{"weight": 100, "term": {"labels": [{"key": "p", "op": "Exists"}]}}]}}] * 2, "uneven"),
    ("residency", Fail.RESIDENCY, [{"name": "n0", **BIG, "region": "us"}], [{"residency": ["eu"]}], "outside its regions"),
    ("kind", Fail.KIND, [{"name": "n0", **BIG}], [{"node_kinds": ["edge"]}], "wrong kind"),
]


@pytest.mark.parametrize(("name", "flag", "nodes", "arrivals", "problem"), PLANTS, ids=[row[0] for row in PLANTS])
def test_a_filter_that_is_left_out_is_caught(name: str, flag: Fail, nodes: list[Json], arrivals: list[Json], problem: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Negative control: without the fault nothing is placed wrongly, with it the checker names the constraint."""
    for planted in (False, True):
        if planted:
            monkeypatch.setattr(place, "verdicts", lambda state, klass: feasible.verdicts(state, klass) & ~np.uint32(flag))
        state = State(seed=2)
        state.add_nodes([node(entry) for entry in nodes])
        scheduler, checker = Scheduler(state), Checker(nodes)
        for at, wanted in enumerate(arrivals):
            raw = {"id": f"w{at}", "requests": {"cpu": 1}, "weights": {"node_affinity": 100}, **wanted}
            answer = scheduler.reserve(workload(raw), 0)
            if isinstance(answer, Placed):
                checker.placed(raw, answer.node, answer.seat.gpus)
        assert bool(checker.problems) == planted
        assert not planted or any(problem in text for text in checker.problems)


def test_capacity_devices_quotas_and_gangs_are_checked() -> None:
    checker = Checker([{"name": "n0", "capacity": {"cpu": 2, "memory": "4Gi"}, "gpus": [{"model": "T4", "memory": "8Gi", "count": 2}]}], quotas={"t": {"cpu": 2}})
    checker.placed({"id": "a", "requests": {"cpu": "1500m"}, "gpu": {"milli": 600, "memory": "5Gi"}, "tenant": "t"}, "n0", (0,))
    assert checker.problems == []
    checker.placed({"id": "b", "requests": {"cpu": 1}, "gpu": {"milli": 600, "memory": "5Gi", "models": ["A100"]}, "tenant": "t"}, "n0", (0,))
    said = " ".join(checker.problems)
    for part in ("cpu: 2.5 used of 2.0", "device 0 is used 1200", "its memory is overcommitted", "is a T4", "over its quota"):
        assert part in said
    checker.problems.clear()
    checker.placed({"id": "c", "gpu": {"count": 2}}, "n0", (1,))
    checker.placed({"id": "c"}, "n0")
    checker.placed({"id": "d"}, "elsewhere")
    checker.released("nobody")
    checker.gang_is_whole(["a", "missing"])
    assert [text for text in checker.problems if "asked for 2" in text] and len(checker.problems) == 5


def test_the_checker_as_a_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "run.json"
    for extra, status in (([], 0), ([{"place": {"id": "c", "requests": {"cpu": 2}}, "node": "n0"}], 1)):
        file.write_text(json.dumps({"nodes": [{"name": "n0", "capacity": {"cpu": 2}}], "events": [{"place": {"id": "a", "requests": {"cpu": 1}}, "node": "n0"}, *extra]}))
        monkeypatch.setattr("sys.argv", ["placement_check.py", str(file)])
        assert main() == status
        assert json.loads(capsys.readouterr().out)["ok"] == (status == 0)


def test_the_latency_stream_keeps_its_constraints_and_a_planted_overcommitment_is_caught() -> None:
    run = Run(60, 600, 5)
    fill(run, 200)
    for _ in range(200):
        run.step()
    placements, problems = run.problems()
    assert placements > 400 and problems == [] and run.outcomes["preemptions"] > 0
    at = next(at for at, event in enumerate(run.events) if event[0] == "place")
    run.events[at: at + 1] = [run.events[at], *[("place", {**run.events[at][1], "id": f"copy{number}"}, run.events[at][2]) for number in range(60)]]
    assert run.problems()[1]


def pod(name: str, priority: int, cpu: str, on: str | None = None, start: int = 0, **labels: str) -> Json:
    spec: Json = {"priority": priority, "containers": [{"requests": {"cpu": cpu}}]}
    return {"metadata": {"name": name, "namespace": "default", "labels": labels}, "spec": {**spec, **({"nodeName": on} if on else {})}, "status": {"startTime": start}}


def pdb(allowed: int, app: str) -> Json:
    return {"metadata": {"name": app, "namespace": "default"}, "spec": {"selector": {"matchLabels": {"app": app}}}, "status": {"disruptionsAllowed": allowed}}


TWO_NODES = [{"metadata": {"name": name}, "status": {"allocatable": {"cpu": "2", "pods": 10}}} for name in ("node1", "node2")]

PREEMPT: list[tuple[str, Json, list[Json], list[Json], Any, Any]] = [
    ("node and victims", pod("p", 100, "2"), [pod("a", 5, "2", "node1"), pod("b", 3, "2", "node2")], [], {"node": "node2", "victims": ["b"], "violations": 0}, {"node": "node1", "victims": ["a"]}),
    ("candidates", pod("p", 100, "2"), [pod("a", 5, "1", "node1"), pod("c", 4, "1", "node1"), pod("b", 200, "2", "node2")], [], {"node1": ["a", "c"]}, {"node1": ["a"]}),
    ("reprieve", pod("p", 100, "1"), [pod("a", 5, "1", "node1"), pod("c", 4, "1", "node1"), pod("b", 200, "2", "node2")], [], {"candidates": [{"name": "node1", "victims": ["c"]}]}, []),
    ("budget", pod("p", 100, "2"), [pod("a", 1, "2", "node1", app="x"), pod("b", 5, "2", "node2")], [pdb(0, "x")],
     {"candidates": {"node1": {"victims": ["a"], "num_pdb_violations": 1}, "node2": {"victims": ["b"], "num_pdb_violations": 0}}, "node": "node2"}, {"node": "node1"}),
    ("latest start", pod("p", 100, "2"), [pod("a", 1, "2", "node1", 100), pod("b", 1, "2", "node2", 200)], [], "node2", "node1"),
    ("any of", pod("p", 100, "2"), [pod("a", 1, "2", "node1"), pod("b", 1, "2", "node2")], [], ["node1", "node2"], ["node3"]),
    ("never", {**pod("p", 100, "2"), "spec": {**pod("p", 100, "2")["spec"], "preemptionPolicy": "Never"}}, [pod("a", 1, "2", "node1")], [], None, {"node": "node1"}),
    ("nothing lower", pod("p", 1, "2"), [pod("a", 1, "2", "node1"), pod("b", 2, "2", "node2")], [], {}, "node1"),
]


@pytest.mark.parametrize(("name", "incoming", "there", "pdbs", "expect", "wrong"), PREEMPT, ids=[row[0] for row in PREEMPT])
def test_preempt_cases_in_every_layout(name: str, incoming: Json, there: list[Json], pdbs: list[Json], expect: Any, wrong: Any) -> None:
    case = {"suite": "Preemption", "test": "t", "name": name, "kind": "preempt", "pod": incoming, "nodes": TWO_NODES, "existing_pods": there, "pdbs": pdbs, "expect": expect}
    agrees, said = k8s_cases.judge(case, {})
    assert agrees, said
    assert not k8s_cases.judge({**case, "expect": wrong}, {})[0]


def test_kube_schedulers_cases_agree_and_a_planted_error_is_noticed(monkeypatch: pytest.MonkeyPatch) -> None:
    if not k8s_cases.DATA.is_file():
        pytest.skip(f"{k8s_cases.DATA} is not here")
    data = json.loads(k8s_cases.DATA.read_text())
    namespaces = {item["name"]: item["labels"] for item in data["namespaces"]}
    differ = [(case["test"], case["name"], said) for case in data["cases"] for agrees, said in [k8s_cases.judge(case, namespaces)]
              if not agrees and (case["test"], case["name"]) not in k8s_cases.DOCUMENTED]
    assert differ == []
    monkeypatch.setattr(rank, "BEST", 99)
    monkeypatch.setattr(feasible, "in_domain", lambda state, key, counts: counts)
    assert sum(not k8s_cases.judge(case, namespaces)[0] for case in data["cases"]) > 20
