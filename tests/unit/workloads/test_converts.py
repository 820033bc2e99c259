"""Workloads that can be converted, at the hub: what is set aside for them, where they go, what is asked of their edge, and what is refused."""

from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.workloads import CONVERTING, GUEST_OWN, GUEST_STEP, QEMU_OWN, SNAPSHOTS, conversion_bytes, guest_bytes
from hub.scheduler import Invalid
from hub.store.workloads import WorkloadRow
from hub.workloads.documents import Conflict, read_list, read_workload
from hub.workloads.operations import entry

WORK: dict[str, Any] = {"id": "a", "image": "i", "requests": {"memory": "64Mi"}, "spec": {"converts": True}}


@given(st.integers(1, 1 << 40))
def test_a_guest_has_its_workload_twice_and_its_own(limit: int) -> None:
    assert guest_bytes(limit) % GUEST_STEP == 0 and 0 <= guest_bytes(limit) - 2 * limit - GUEST_OWN < GUEST_STEP and conversion_bytes(limit) == guest_bytes(limit) + QEMU_OWN


def test_what_it_needs_beside_its_own_is_set_aside_and_its_own_stays_what_it_asked_for() -> None:
    [found] = read_list([WORK])
    assert found.over == conversion_bytes(64 << 20) and dict(found.item.shape.requests)["memory"] == (64 << 20) + found.over and (CONVERTING, "true") in found.item.shape.node_selector
    limited = read_workload({**WORK, "spec": {"converts": True, "limits": {"memory": "128Mi"}}})
    assert limited.over == conversion_bytes(128 << 20), "by what it may use, not by what it asked for"
    for spec in ({}, {"converts": False}):
        plain = read_workload({**WORK, "spec": spec})
        assert plain.over == 0 and dict(plain.item.shape.requests)["memory"] == 64 << 20 and all(key != CONVERTING for key, _ in plain.item.shape.node_selector)


@pytest.mark.parametrize(("more", "field"), [
    ({"spec": {"converts": "yes"}}, "spec.converts"), ({"spec": {"converts": 1}}, "spec.converts"), ({"kind": "vm"}, "spec.converts"), ({"kind": "function"}, "spec.converts"),
    ({"spec": {"converts": True, "isolation": "microvm"}}, "spec.isolation"), ({"spec": {"converts": True, "checkpoint": {"every_s": 60}}}, "spec.checkpoint"), ({"when_cut_off": "move"}, "when_cut_off"),
    ({"requests": {}}, "requests.memory"), ({"spec": {"converts": True, "limits": {"memory": "a lot"}}}, "spec.limits.memory"),
])
def test_what_does_not_go_with_it_is_refused_by_name(more: dict[str, Any], field: str) -> None:
    with pytest.raises(Invalid) as caught:
        read_list([{**WORK, **more}])
    assert caught.value.field == f"workload.{field}" or caught.value.field == f"workloads[0].{field}"


def row(**more: Any) -> WorkloadRow:
    return WorkloadRow("a", {**WORK, **more}, "placed", "edge", 3)


def test_what_is_asked_of_its_edge_names_the_form() -> None:
    asked = entry(row(), {"kind": "convert", "to": "microvm"}, "o-1", 1000, {})
    assert asked == {"id": "o-1", "kind": "convert", "workload": "a", "epoch": 3, "name": "", "stop": False, "to": "microvm", "expires_ms": 301_000}
    assert "to" not in entry(row(), {"kind": "checkpoint"}, "o-2", 1000, {}), "an older edge would not know it"
    for bad in ({"kind": "convert"}, {"kind": "convert", "to": "vm"}, {"kind": "restore", "to": "container"}):
        with pytest.raises(ContractError, match="to"):
            entry(row(), bad, "o-3", 1000, {})
    for kind in ("snapshot", "delete-snapshot"):
        assert entry(row(), {"kind": kind, "name": "x"}, "o-5", 1000, {SNAPSHOTS: "true"})["kind"] == kind
        with pytest.raises(Conflict, match="takes no snapshots"):  # an older edge would refuse all of its desired state
            entry(row(), {"kind": kind, "name": "x"}, "o-5", 1000, {})
    with pytest.raises(Conflict, match=r"spec\.converts: a was not started"):
        entry(row(spec={}), {"kind": "convert", "to": "microvm"}, "o-4", 1000, {})
