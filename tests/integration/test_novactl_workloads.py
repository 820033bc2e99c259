"""novactl on workloads and nodes against a real hub: every command, with --json and without, errors in one line."""

import json
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from hub.server import Hub
from tools.novactl.cli import main

from .hub_side import served_hub

Run = Any


@pytest.fixture(scope="module")
def hub(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Hub]:
    with served_hub(tmp_path_factory.mktemp("novactl-workloads") / "hub") as (background, hub):
        async def fill() -> None:
            for name in ("n-1", "n-2"):
                await hub.workloads.ask(lambda planner, now, name=name: planner.put_node(name, {"capacity": {"cpu": 4, "memory": "8Gi"}, "gpus": [{"model": "t4"}]}, "declared", now))

        background.run(fill())
        yield hub


@pytest.fixture
def novactl(hub: Hub, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    monkeypatch.setenv("NOVACRON_HUB_URL", f"http://127.0.0.1:{hub.port}")
    monkeypatch.setenv("NOVACRON_TOKEN", hub.token)
    monkeypatch.setenv("COLUMNS", "240")

    def run(*arguments: str) -> tuple[int, str, str]:
        capsys.readouterr()
        status = main(list(arguments))
        said = capsys.readouterr()
        return status, said.out, said.err

    return run


def test_submit_list_explain_drain_cancel(novactl: Run, tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text(json.dumps([{"id": "a", "requests": {"cpu": 1}}, {"id": "b", "requests": {"cpu": 99}}]))
    status, out, _ = novactl("workload", "submit", str(file))
    assert status == 0 and "placed" in out and "pending" in out and "more than any node has" in out
    assert [one["state"] for one in json.loads(novactl("workload", "submit", str(file), "--json")[1])["workloads"]] == ["placed", "pending"]
    listed = json.loads(novactl("workload", "list", "--state", "placed", "--json")[1])
    assert [one["workload"] for one in listed] == ["a"]
    node = listed[0]["node"]
    assert "pending" not in novactl("workload", "list", "--node", node)[1]
    status, out, _ = novactl("explain", "workload", "b")
    assert status == 0 and "99000m CPU wanted" in out and "n-1" in out and "n-2" in out
    assert json.loads(novactl("explain", "workload", "a", "--json")[1])["nodes"][0]["fits"]
    assert "*" in novactl("explain", "workload", "a")[1]
    status, out, _ = novactl("nodes")
    assert status == 0 and "1.0 of 4.0" in out and "0.0 of 1" in out
    assert len(json.loads(novactl("nodes", "--json")[1])) == 2
    assert "drain" in novactl("node", "drain", node)[1]
    assert json.loads(novactl("workload", "list", "--state", "placed", "--json")[1])[0]["node"] != node
    assert json.loads(novactl("node", "uncordon", node, "--json")[1])["cordon"] == ""
    assert "cancelled" in novactl("workload", "cancel", "a")[1]


def test_moves_are_listed_and_a_drain_tells_what_is_left(novactl: Run, hub: Hub, tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    file.write_text(json.dumps({"id": "stays", "requests": {"cpu": 1}, "when_drained": "stay"}))
    assert novactl("workload", "submit", str(file))[0] == 0
    node = json.loads(novactl("workload", "list", "--state", "placed", "--json")[1])[0]["node"]
    status, out, _ = novactl("node", "drain", node)
    assert status == 0 and "must leave" in out and "it stays, as its document says" in out
    status, out, _ = novactl("node", "drain", node, "--wait", "0.1", "--json")
    assert status == 1 and [one["workload"] for one in json.loads(out)["left"]] == ["stays"]
    assert novactl("node", "uncordon", node)[0] == 0 and "cancelled" in novactl("workload", "cancel", "stays")[1]
    assert "can be moved" in novactl("move", "begin", "stays")[2] or "it is cancelled" in novactl("move", "begin", "stays")[2]
    assert json.loads(novactl("move", "list", "--json")[1]) == [] and "expected s" in novactl("move", "list")[1]


def test_a_planned_start_is_shown(novactl: Run, tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    node = {"node_affinity": {"required": [{"names": [{"op": "In", "values": ["n-1"]}]}]}}
    file.write_text(json.dumps([{"id": name, "kind": "batch", "requests": {"cpu": 3}, "duration_ms": 60_000, **node} for name in ("j1", "j2")]))
    status, out, _ = novactl("workload", "submit", str(file))
    assert status == 0 and "UTC on n-1" in out
    assert "starts" in novactl("explain", "workload", "j2")[1] and "UTC on n-1" in novactl("explain", "workload", "j2")[1]
    file.write_text(json.dumps({"id": "j3", "kind": "batch", "requests": {"cpu": 3}, "duration_ms": 60_000, "deadline_ms": 5, **node}))
    status, _, err = novactl("workload", "submit", str(file))
    assert status == 1 and "will miss it by" in err and err.count("\n") == 1
    status, out, _ = novactl("workload", "what-if", str(file))
    assert status == 1 and "refused" in out and "will miss it by" in out and out.count(" UTC") >= 2 and "when_late: accept" in out
    assert json.loads(novactl("workload", "what-if", str(file), "--json")[1])["jobs"][0]["late_ms"] > 0
    file.write_text(json.dumps([{"id": "j4", "kind": "batch", "requests": {"cpu": 1}, "duration_ms": 60_000}, {"id": "c4", "requests": {"cpu": 1}}]))
    status, out, _ = novactl("workload", "what-if", str(file), "--lose", "n-2")
    assert status == 0 and "j4" in out and "c4" in out and "n-1" in out
    assert "not known" in novactl("explain", "workload", "j4")[2]
    for name in ("j1", "j2"):
        novactl("workload", "cancel", name)


def test_rebalance_plan_go_list_cancel(novactl: Run, tmp_path: Path) -> None:
    file = tmp_path / "w.json"
    for name, other in (("b1", "n-2"), ("b2", "n-1")):
        novactl("node", "cordon", other)
        file.write_text(json.dumps({"id": name, "requests": {"cpu": 1}}))
        novactl("workload", "submit", str(file))
        novactl("node", "uncordon", other)
    status, out, _ = novactl("rebalance")
    assert status == 0 and "a plan only: planned: after moving 1 workload" in out and "restart" in out
    assert json.loads(novactl("rebalance", "list", "--json")[1]) == []
    status, out, _ = novactl("rebalance", "go", "--drain", "n-1")
    assert status == 0 and "running" in out
    name = json.loads(novactl("rebalance", "list", "--json")[1])[0]["id"]
    assert name in novactl("rebalance", "list")[1]
    assert json.loads(novactl("rebalance", "cancel", name, "--json")[1])["state"] in ("cancelled", "done")
    assert json.loads(novactl("node", "uncordon", "n-1", "--json")[1])["cordon"] == ""
    for name in ("b1", "b2"):
        novactl("workload", "cancel", name)


@pytest.mark.parametrize(("arguments", "words"), [
    (("workload", "submit"), "file is missing"), (("workload", "what-if"), "file is missing"), (("workload", "what-if", "/nowhere"), "cannot be read"), (("workload", "submit", "/nowhere"), "cannot be read"), (("workload", "cancel"), "id is missing"), (("workload", "cancel", "none"), "not known"),
    (("explain", "workload"), "id is missing"), (("explain", "workload", "none"), "not known"), (("explain", "gw/1", "more"), "too much"), (("node", "drain", "none"), "not known"),
    (("move", "begin"), "workload is missing"), (("move", "cancel"), "move is missing"), (("move", "cancel", "none"), "not known"), (("move", "begin", "none"), "not known"),
    (("workload", "list", "--state", "odd"), "unknown"), (("rebalance", "cancel"), "id is missing"), (("rebalance", "cancel", "none"), "not known"), (("rebalance", "go", "--drain", "none"), "is no node"),
])
def test_what_is_wrong_is_said_in_one_line(novactl: Run, arguments: tuple[str, ...], words: str) -> None:
    status, out, err = novactl(*arguments)
    assert status == 1 and out == "" and err.startswith("novactl: ") and err.count("\n") == 1 and words in err
