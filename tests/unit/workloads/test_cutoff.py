"""The leader's part: who gets what when a site is cut off, by capacity, and what each member shares for it."""

from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.contract import jsoncodec
from edge_runtime.contract.limits import MAX_MESSAGE_BYTES, MAX_SHARED_WORKLOADS, MAX_SITE_WORKLOADS, MAX_WORKLOAD_BYTES
from edge_runtime.contract.site_messages import LOAD, Duty, is_workload
from edge_runtime.site.actions import Standing
from edge_runtime.workloads.cutoff import DROP_MS, SHARED_BYTES, Shift, others, share

Json = dict[str, Any]
EDGES = ("gw-1", "gw-2", "gw-3")


def entry(name: str, epoch: int = 1, cpu: str = "1", when: str = "move", **more: Any) -> Json:
    document = {"id": name, "kind": "container", "requests": {"cpu": cpu}, "when_cut_off": when, **more}
    return {"id": name, "epoch": epoch, "wanted": "running", "kind": "container", "image": "i", "requests": {}, "gpus": [], "numa": [], "document": document}


def shared(one: Json, source: str = "", generation: int = 1) -> Json:
    return {**one, "for": source, "generation": generation}


def load(edge: str, entries: list[Json], generation: int = 1, cpu: int = 4, ended: dict[str, str] | None = None, stays: list[Json] | None = None) -> Json:
    return LOAD.parse({
        "v": 1, "site": "s", "edge": edge, "generation": generation, "capacity": {"kind": "edge", "capacity": {"cpu": cpu, "memory": "8Gi"}, "runs": ["container"]},
        "entries": [shared(one) if "for" not in one else one for one in entries], "others": stays or [], "ended": ended or {},
    })


def standing(live: tuple[str, ...] = EDGES, cut_off: bool = True, binding: tuple[str, ...] | None = None) -> Standing:
    gone = frozenset(EDGES) - frozenset(live)
    return Standing(frozenset(live), gone, cut_off, gone if binding is None else frozenset(binding))


def table(shift: Shift, stands: Standing, before: dict[str, Duty] | None = None, number: int = 5, anew: bool = False, now: int = 1000) -> dict[str, Duty]:
    return shift.place(before or {}, stands, number, anew, now)


def test_while_everybody_is_there_each_has_its_own() -> None:
    shift = Shift({"gw-1": load("gw-1", [entry("a")]), "gw-2": load("gw-2", [entry("b", 3)])})
    found = table(shift, standing())
    assert found == {"workload/a": Duty("gw-1", 5, "gw-1", 1), "workload/b": Duty("gw-2", 5, "gw-2", 3)}
    assert table(shift, standing(), found, 6) == found, "what stands keeps its number"
    assert {duty.fence for duty in table(shift, standing(), found, 6, anew=True).values()} == {6}


def test_what_was_on_one_that_is_gone_goes_where_it_fits_by_capacity() -> None:
    loads: dict[str, Mapping[str, Any]] = {
        "gw-1": load("gw-1", [entry("a", cpu="2"), entry("b", cpu="2"), entry("c", cpu="3", priority=5), entry("d", cpu="9")]),
        "gw-2": load("gw-2", [], stays=[{"id": "m", "requests": {"cpu": "1500m"}}]), "gw-3": load("gw-3", [entry("x", cpu="1")]),
    }
    shift = Shift(loads)
    before = table(shift, standing())
    after = table(shift, standing(("gw-2", "gw-3")), before, 6)
    assert after["workload/c"] == Duty("gw-3", 6, "gw-1", 1), "the highest priority first: only there three fit"
    assert after["workload/a"] == Duty("gw-2", 6, "gw-1", 1)
    assert {after[key].edge for key in ("workload/b", "workload/d")} == {"gw-1"} and {after[key].fence for key in ("workload/b", "workload/d")} == {5}
    assert "resources" in shift.unplaced["workload/d"] and set(shift.unplaced) == {"workload/b", "workload/d"}
    assert after["workload/x"] == before["workload/x"]
    loads["gw-3"] = load("gw-3", [], cpu=20)
    assert {duty.edge for duty in table(shift, standing(("gw-2", "gw-3")), after, 7).values()} == {"gw-2", "gw-3"} and not shift.unplaced, "it goes when there is room"


@pytest.mark.parametrize("stands", [standing(("gw-2", "gw-3"), cut_off=False), standing(EDGES)])
def test_nothing_moves_while_a_hub_is_there_or_its_node_may_run_it(stands: Standing) -> None:
    shift = Shift({"gw-1": load("gw-1", [entry("a")]), "gw-2": load("gw-2", []), "gw-3": load("gw-3", [])})
    before = {"workload/a": Duty("gw-1", 5, "gw-1", 1)}
    assert table(shift, stands, before, 6) == before


def test_a_hub_that_was_there_after_its_last_word_has_decided() -> None:
    shift = Shift({"gw-1": load("gw-1", [entry("a")]), "gw-2": load("gw-2", [])})
    assert table(shift, standing(("gw-2", "gw-3"), binding=()), {"workload/a": Duty("gw-1", 5, "gw-1", 1)}, 6) == {}


def test_it_stays_with_the_sibling_when_its_node_is_back_and_goes_on_from_there() -> None:
    shift = Shift({"gw-1": load("gw-1", [entry("a")]), "gw-2": load("gw-2", [shared(entry("a"), "gw-1")]), "gw-3": load("gw-3", [])})
    moved = {"workload/a": Duty("gw-2", 6, "gw-1", 1)}
    assert table(shift, standing(), moved, 7) == moved
    assert table(shift, standing(("gw-1", "gw-3")), moved, 7)["workload/a"].edge in ("gw-1", "gw-3")
    del shift.loads["gw-1"]  # the broker has forgotten, and its node is gone
    assert table(shift, standing(("gw-3",)), moved, 7) == {"workload/a": Duty("gw-3", 7, "gw-1", 1)}


def test_the_hubs_word_ends_what_the_site_did() -> None:
    held = load("gw-2", [shared(entry("a"), "gw-1", 1)])
    shift = Shift({"gw-1": load("gw-1", [], generation=2), "gw-2": held})
    moved = {"workload/a": Duty("gw-2", 6, "gw-1", 1)}
    assert table(shift, standing(), moved, 7, now=1000) == moved, "a moment: the hub may give it to the other, who hears of it next"
    assert table(shift, standing(), moved, 7, now=1000 + DROP_MS) == {}
    shift = Shift({"gw-1": load("gw-1", [], generation=2), "gw-2": load("gw-2", [entry("a")])})
    assert table(shift, standing(), moved, 7) == {"workload/a": Duty("gw-2", 6, "gw-2", 1)}, "it is confirmed where it is, and keeps its number"
    shift = Shift({"gw-1": load("gw-1", [], 2, ended={"a/1": "stopped"}), "gw-2": held})
    assert table(shift, standing(), moved, 7) == {}
    shift = Shift({"gw-2": held, "gw-3": load("gw-3", [entry("a", 2)])})
    assert table(shift, standing(), moved, 7) == {"workload/a": Duty("gw-3", 7, "gw-3", 2)}, "a newer placement is another one"


def test_what_has_ended_is_not_begun_again_and_what_one_refuses_another_gets() -> None:
    loads: dict[str, Mapping[str, Any]] = {"gw-1": load("gw-1", [entry("a"), entry("b")]), "gw-2": load("gw-2", [], ended={"b/1": "refused"}), "gw-3": load("gw-3", [], cpu=1, ended={"a/1": "done"})}
    found = table(Shift(loads), standing(("gw-2", "gw-3")), {"workload/b": Duty("gw-2", 6, "gw-1", 1)}, 7)
    assert found == {"workload/b": Duty("gw-3", 7, "gw-1", 1)}


@settings(max_examples=60, deadline=None)
@given(st.lists(st.tuples(st.sampled_from(EDGES), st.sampled_from("abcdef"), st.integers(1, 3), st.sampled_from(("1", "2", "3500m"))), max_size=10), st.sets(st.sampled_from(EDGES), min_size=1), st.booleans())
def test_nobody_who_is_there_gets_more_than_fits(rows: list[tuple[str, str, int, str]], live: set[str], cut_off: bool) -> None:
    shift = Shift({edge: load(edge, [entry(name, epoch, cpu) for where, name, epoch, cpu in rows if where == edge]) for edge in EDGES})
    before = table(shift, standing())
    after = table(shift, standing(tuple(live), cut_off), before, 6)
    assert after.keys() == before.keys() and all(is_workload(key) for key in after)
    best = {name: max(epoch for _, other, epoch, _ in rows if other == name) for _, name, _, _ in rows}
    assert {key.removeprefix("workload/"): duty.epoch for key, duty in after.items()} == best
    for key, duty in after.items():
        assert duty == before[key] or (cut_off and before[key].edge not in live and duty.edge in live and duty.fence == 6)
    asked: dict[str, list[tuple[str, int]]] = {}
    for key, duty in after.items():
        found = shift.entry(key, duty)
        assert found is not None
        cpu = found[0]["document"]["requests"]["cpu"]
        asked.setdefault(duty.edge, []).append((key, int(cpu.removesuffix("m")) if cpu.endswith("m") else int(cpu) * 1000))
    for edge, those in asked.items():
        came = [milli for key, milli in those if before[key].edge != edge]
        assert not came or sum(milli for _, milli in those) <= 4000


def test_a_member_shares_within_limits_and_refuses_the_rest() -> None:
    many = [entry(f"w{at:03}") for at in range(MAX_SHARED_WORKLOADS + 5)]
    told, refused = share([*many, entry("s", when="stay"), {"id": "z", "epoch": 1, "wanted": "stopped", "document": {}}], [])
    assert len(told) == MAX_SHARED_WORKLOADS and [one["id"] for one in refused] == [one["id"] for one in many[-5:]]
    large = [entry(f"w{at:03}", spec={"env": "x" * (MAX_WORKLOAD_BYTES - 200)}) for at in range(30)]
    told, refused = share(large, [shared(entry("held", spec={"env": "y" * 9000}), "gw-9")])
    assert told[0]["id"] == "held" and refused and sum(len(jsoncodec.encode(one)) for one in told) <= SHARED_BYTES
    rest = others([entry(f"o{at}", when="stay", labels={"a": "b" * 60}, anti_affinity=[]) for at in range(128)])
    heavy = others([entry(f"o{at}", when="stay", labels={f"k{label}": "b" * 60 for label in range(8)}) for at in range(128)])
    assert "labels" in rest[0] and "labels" not in heavy[0] and heavy[0]["requests"] == {"cpu": "1"}
    ended = {f"{'n' * 60}{at:04}/{2**40}": "stopped" for at in range(256)}
    assert len(jsoncodec.encode({"entries": told, "others": rest, "ended": ended})) < MAX_MESSAGE_BYTES - 8192
    held, dropped = share([entry("a", 2)], [shared(entry("a", 2), "gw-9")])
    assert len(held) == 1 and held[0]["for"] == "gw-9" and not dropped


def test_the_table_lists_at_most_so_many_those_that_it_had_first() -> None:
    shift = Shift({f"gw-{edge}": load(f"gw-{edge}", [entry(f"w{edge}-{at:02}") for at in range(30)]) for edge in range(1, 7)})
    last = {"workload/w6-29": Duty("gw-6", 4, "gw-6", 1)}
    found = table(shift, Standing(frozenset(shift.loads), frozenset(), False, frozenset()), last)
    assert len(found) == MAX_SITE_WORKLOADS and found["workload/w6-29"] == last["workload/w6-29"]


JSON = st.recursive(st.none() | st.booleans() | st.integers(-3, 2**40) | st.floats(allow_nan=False, allow_infinity=False) | st.text(max_size=4), lambda inner: st.lists(inner, max_size=3) | st.dictionaries(
    st.sampled_from(("cpu", "memory", "key", "op", "values", "labels", "term", "weight", "names", "required", "preferred", "topology_key", "selector", "max_skew", "requirements")), inner, max_size=3), max_leaves=8)
KEYS = st.sampled_from(("requests", "labels", "tolerations", "node_selector", "node_affinity", "node_kinds", "residency", "affinity", "anti_affinity", "spread", "numa", "links", "priority", "kind", "namespace"))


@settings(max_examples=200, deadline=None)
@given(st.dictionaries(KEYS, JSON, max_size=3), st.dictionaries(KEYS, JSON, max_size=3), st.dictionaries(st.sampled_from(("capacity", "labels", "taints", "numa", "gpus", "runs", "kind")), JSON, max_size=3))
def test_whatever_a_member_tells_the_leader_goes_on(document: Json, other: Json, capacity: Json) -> None:
    odd = entry("odd")
    odd["document"] |= document
    shift = Shift({"gw-1": load("gw-1", [odd, entry("sane")]), "gw-2": load("gw-2", []), "gw-3": {**load("gw-3", [], stays=[{**other, "id": "m"}]), "capacity": capacity}})
    before = table(shift, standing())
    after = table(shift, standing(("gw-2", "gw-3")), before, 6)
    assert after.keys() == before.keys() == {"workload/odd", "workload/sane"}
    assert after["workload/sane"].edge != "gw-1" or "workload/sane" in shift.unplaced
