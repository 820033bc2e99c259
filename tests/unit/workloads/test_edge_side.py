"""The edge's half: what it has, when it tells it again, what it answers while it has no driver; and that the hub's scheduler reads what it says."""

from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.schema import check_fields
from edge_runtime.contract.workloads import REPORT_FIELDS
from edge_runtime.workloads.answers import answers
from edge_runtime.workloads.capacity import changed, describe, gpus
from hub.workloads.documents import read_node

GIB = 1 << 30


def machine(root: Path, zones: int = 0) -> Path:
    """A tree that looks like /proc and /sys of a machine with 16 GiB."""
    (root / "proc").mkdir()
    (root / "proc/meminfo").write_text("MemTotal:       16777216 kB\nMemFree: 5 kB\n")
    for number in range(zones):
        folder = root / f"sys/devices/system/node/node{number}"
        folder.mkdir(parents=True)
        (folder / "cpulist").write_text(f"{number * 4}-{number * 4 + 3}\n")
        (folder / "meminfo").write_text(f"Node {number} MemTotal:       8388608 kB\n")
    return root


def told(root: Path, **more: Any) -> dict[str, Any]:
    given: dict[str, Any] = {
        "kind": "edge", "region": "eu", "site": "plant", "labels": {"a": "b", "odd": "no way!"}, "taints": [{"key": "k", "effect": "NoSchedule"}], "runs": ["container"], "reserve_milli": 500,
        "reserve_memory": GIB, "reserve_disk": 0, "most": 50, "data_dir": root, "root": root, "cores": 8,
    }
    return describe(**{**given, **more})


def test_a_node_tells_what_it_has_less_what_it_keeps_and_the_scheduler_reads_it(tmp_path: Path) -> None:
    body = told(machine(tmp_path))
    assert body["capacity"]["cpu"] == "7500m" and body["capacity"]["memory"] == 15 * GIB and body["capacity"]["slots"] == 50 and body["capacity"]["disk"] % GIB == 0 and body["numa"] == []
    assert "odd" not in body["labels"] and body["labels"]["a"] == "b" and body["labels"]["os"] == "linux"
    node = read_node(body, "gw-1", agent=True)[1]
    assert dict(node.capacity)["cpu"] == 7500 and dict(node.labels)["site"] == "plant" and dict(node.labels)["novacron.runs/container"] == "true"


def test_zones_add_up_to_the_capacity(tmp_path: Path) -> None:
    body = told(machine(tmp_path, 2), reserve_milli=4500, reserve_memory=9 * GIB)
    assert body["numa"] == [{"cpu": "0m", "memory": 0}, {"cpu": "3500m", "memory": 7 * GIB}] and body["capacity"]["cpu"] == "3500m" and body["capacity"]["memory"] == 7 * GIB
    assert len(read_node(body, "gw-1")[1].numa) == 2


def test_devices_are_found_and_a_machine_that_tells_nothing_has_nothing(tmp_path: Path) -> None:
    assert gpus(tmp_path) == []
    card = tmp_path / "proc/driver/nvidia/gpus/0000:01:00.0"
    card.mkdir(parents=True)
    (card / "information").write_text("Model: \t\t NVIDIA A100-SXM4\nIRQ: 5\n")
    amd = tmp_path / "sys/class/drm/card1/device"
    amd.mkdir(parents=True)
    (tmp_path / "sys/class/drm/card1-HDMI").mkdir()
    for name, text in (("vendor", "0x1002\n"), ("device", "0x740f\n"), ("mem_info_vram_total", f"{16 * GIB}\n")):
        (amd / name).write_text(text)
    assert gpus(tmp_path) == [{"model": "nvidia-a100-sxm4", "memory": 0}, {"model": "amd-740f", "memory": 16 * GIB}]
    bare = told(tmp_path, data_dir=tmp_path / "none")
    assert bare["capacity"]["memory"] == 0 and "disk" not in bare["capacity"]
    assert read_node(bare, "gw-1")


def test_it_is_told_again_when_it_has_changed_and_not_for_every_byte_of_disk(tmp_path: Path) -> None:
    body = told(machine(tmp_path))
    assert changed(None, body) and not changed(body, body)
    disk = body["capacity"]["disk"]
    for amount, again in ((disk, False), (int(disk * 0.95), False), (int(disk * 0.8), True), (disk * 2, True)):
        assert changed(body, {**body, "capacity": {**body["capacity"], "disk": amount}}) is again
    assert changed(body, {**body, "runs": []}) and changed(body, {**body, "capacity": {**body["capacity"], "cpu": "1m"}})


def entry(name: str, epoch: int = 1, wanted: str = "running", kind: str = "container") -> dict[str, Any]:
    return {"id": name, "epoch": epoch, "wanted": wanted, "kind": kind}


@pytest.mark.parametrize(("runs", "enabled", "reason"), [((), True, "no driver for kind container on this edge"), (("vm",), True, "no driver"), (("container",), False, "not enabled"), (("container",), True, None)])
def test_what_cannot_run_is_refused_with_the_reason(runs: tuple[str, ...], enabled: bool, reason: str | None) -> None:
    reports, now = answers([entry("a"), entry("b", wanted="stopped")], [], runs, enabled, "because")
    stops = [] if runs and enabled else [{"id": "b", "epoch": 1, "state": "stopped", "reason": ""}]  # where there is a driver, it answers: the entry does not say its kind
    assert [one for one in reports if one["id"] == "b"] == stops and now == ["a/1/running", "b/1/stopped"]
    left, _ = answers([entry("a"), entry("b", wanted="stopped")], [], runs, enabled, "because", driven=True)
    assert enabled is False or left == []  # something of them may still run here: only who ends it can say that
    assert (reports == stops) if reason is None else reports[0]["state"] == "refused" and reason in reports[0]["reason"]


@given(st.lists(st.lists(st.tuples(st.sampled_from("abc"), st.integers(1, 3), st.sampled_from(["running", "stopped"])), max_size=5, unique=True), max_size=6))
def test_each_entry_is_answered_once_while_it_stands(documents: list[list[tuple[str, int, str]]]) -> None:
    answered: list[str] = []
    for document in documents:
        before = set(answered)
        reports, answered = answers([entry(*one) for one in document], answered, (), True)
        assert len(answered) == len(document), "what is remembered is bounded by the document"
        keys = {f"{one['id']}/{one['epoch']}/{'stopped' if one['state'] == 'stopped' else 'running'}" for one in reports}
        assert keys == {f"{name}/{epoch}/{wanted}" for name, epoch, wanted in document} - before
        for one in reports:
            check_fields(REPORT_FIELDS, one, "payload")
