"""What stands around the core of a site: its messages, who gets which device, hand-over state of an engine, twins, fences, the hub's tree."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.config import ConfigError, load_config
from edge_runtime.contract import topics
from edge_runtime.contract.errors import ContractError
from edge_runtime.contract.limits import MAX_INTEGER, MAX_MESSAGE_BYTES, MAX_SHARED_WORKLOADS, MAX_SITE_DEVICES, MAX_SITE_NUMBER, MAX_SITE_WORKLOADS
from edge_runtime.contract.site_messages import CLAIM, DUTY, LOAD, MEMBER, SPEC, TABLE, WORKLOAD, Duty, Heartbeat, Table, parse, parse_heartbeat, parse_table
from edge_runtime.decisions.engine import DecisionEngine
from edge_runtime.decisions.rules import parse_rules
from edge_runtime.devices.registry import Device, DeviceRegistry
from edge_runtime.metrics import Metrics
from edge_runtime.site.assign import Candidate, assign, home_of
from edge_runtime.site.link import SiteLink
from edge_runtime.site.member import Member
from hub.hierarchy import build_tree
from hub.store.base import EdgeRow
from tools.fencing import Fences

SITE = "plant-a"
THEN = [{"alert": {"text": "t"}}]
LATCH = {"id": "hot", "on": {"device": "*", "metric": "t"}, "if": {"value": "t", "op": ">", "than": 80}, "then": THEN}
HELD = {"id": "held", "on": {"device": "*", "metric": "t"}, "if": {"value": "t", "op": ">", "than": 80}, "for": "10s", "then": THEN}
names = st.from_regex(r"[A-Za-z0-9][A-Za-z0-9_.:-]{0,63}", fullmatch=True)
numbers = st.integers(1, MAX_SITE_NUMBER)


# -- messages ----------------------------------------------------------------------------------------------------------------

@given(names, names, numbers, st.dictionaries(names, st.tuples(names, names), max_size=5))
def test_a_table_comes_back_as_it_was(site: str, leader: str, number: int, duties: dict[str, tuple[str, str]]) -> None:
    table = Table(number, leader, {device: Duty(edge, number, origin) for device, (edge, origin) in duties.items()})
    assert "workloads" not in table.to_json(site), "a member from before workloads gets the table that it knows"
    runs = {f"{WORKLOAD}{device}": Duty(edge, number, origin, 7) for device, (edge, origin) in duties.items()}
    both = Table(number, leader, {**table.duties, **runs})
    assert parse_table(json.dumps(both.to_json(site)).encode(), site) == both
    assert parse_table(json.dumps(table.to_json(site)).encode(), site) == table


@given(names, names, numbers, st.integers(0, 2**53), st.floats(0, 1000), st.booleans())
def test_a_heartbeat_comes_back_as_it_was(site: str, edge: str, number: int, sent: int, capacity: float, leads: bool) -> None:
    beat = Heartbeat(edge, "b", 1, sent, number, number, "l", capacity, 3, ("boiler-*",), leads, hub=leads, run_table=number, run_leader="l")
    assert parse_heartbeat(json.dumps(beat.to_json(site)).encode(), site, edge) == beat


def test_the_largest_table_fits_one_message() -> None:
    duties = {f"{index:064d}": Duty("e" * 64, MAX_SITE_NUMBER, "o" * 64) for index in range(MAX_SITE_DEVICES)}
    duties |= {f"{WORKLOAD}{index:064d}": Duty("e" * 64, MAX_SITE_NUMBER, "o" * 64, MAX_INTEGER) for index in range(MAX_SITE_WORKLOADS)}
    assert len(json.dumps(Table(MAX_SITE_NUMBER, "l" * 64, duties).to_json("s" * 64), separators=(",", ":"))) < MAX_MESSAGE_BYTES


BEAT = dict(MEMBER.example)
BAD: list[tuple[str, str, Any, str]] = [
    ("member/gw-1", "payload", b"{", "json"), ("member/gw-1", "v", {**BEAT, "v": 2}, "version"), ("member/gw-2", "edge", BEAT, "topic"),
    ("member/gw-1", "site", {**BEAT, "site": "plant-b"}, "topic"), ("member/gw-1", "capacity", {**BEAT, "capacity": -1}, "limit"),
    ("member/gw-1", "duties[0]", {**BEAT, "duties": ["no spaces"]}, "name"), ("member/gw-1", "leader", {**BEAT, "leader": "/"}, "name"),
    ("member/gw-1", "number", {**BEAT, "number": MAX_SITE_NUMBER + 1}, "limit"), ("member/gw-1", "duties", {**BEAT, "duties": ["a"] * 33}, "limit"),
    ("claim", "number", {**CLAIM.example, "number": "7"}, "type"), ("claim", "edge", {**CLAIM.example, "edge": ""}, "name"),
    ("table", "duties.boiler-1", {**TABLE.example, "duties": {"boiler-1": ["gw-1", 8, "gw-1"]}}, "limit"),
    ("table", "duties.boiler-1", {**TABLE.example, "duties": {"boiler-1": ["gw-1", 1]}}, "type"),
    ("table", "duties.a b", {**TABLE.example, "duties": {"a b": ["gw-1", 1, "gw-1"]}}, "name"),
    ("table", "duties.boiler-1", {**TABLE.example, "duties": {"boiler-1": ["", 1, "gw-1"]}}, "name"),
    ("table", "duties", {**TABLE.example, "duties": {f"d{index}": ["e", 1, "e"] for index in range(MAX_SITE_DEVICES + 1)}}, "limit"),
    ("spec/gw-1", "rules[0]", {**SPEC.example, "rules": [1]}, "type"), ("spec/gw-1", "models.m", {**SPEC.example, "models": {"m": 1}}, "type"),
    ("duty/boiler-2", "device", DUTY.example, "topic"), ("duty/boiler-1", "fence", {**DUTY.example, "fence": 0}, "limit"), ("nothing", "topic", {}, "topic"),
    ("member/gw-1", "run_leader", {**BEAT, "run_leader": "a b"}, "name"), ("member/gw-1", "hub", {**BEAT, "hub": "yes"}, "type"),
    ("table", "workloads.a b", {**TABLE.example, "workloads": {"a b": ["gw-1", 1, "gw-1", 1]}}, "name"), ("table", "workloads.w", {**TABLE.example, "workloads": {"w": ["gw-1", 8, "gw-1", 1]}}, "limit"),
    ("table", "workloads.w", {**TABLE.example, "workloads": {"w": ["gw-1", 1, "gw-1"]}}, "type"), ("table", "workloads.w", {**TABLE.example, "workloads": {"w": ["gw-1", 1, "gw-1", 0]}}, "type"),
    ("table", "workloads.w", {**TABLE.example, "workloads": {"w": ["gw-1", 1, "/", 1]}}, "name"), ("load/gw-2", "edge", LOAD.example, "topic"),
    ("load/gw-1", "entries[0].id", {**LOAD.example, "entries": [{"id": "a b", "epoch": 1, "wanted": "running"}]}, "name"),
    ("load/gw-1", "entries", {**LOAD.example, "entries": [{"id": f"w{index}", "epoch": 1, "wanted": "running"} for index in range(MAX_SHARED_WORKLOADS + 1)]}, "limit"),
    ("load/gw-1", "others[0]", {**LOAD.example, "others": [7]}, "type"), ("load/gw-1", "ended.w/1", {**LOAD.example, "ended": {"w/1": "lost"}}, "type"),
    ("member/../x", "topic", {}, "topic"), ("member/a b", "topic", {}, "name"),
]


class Recorder:
    """Effects that only count."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __getattr__(self, name: str) -> Any:
        return lambda *_arguments: self.seen.append(name)


@pytest.mark.parametrize(("leaf", "field", "body", "reason"), BAD)
def test_a_bad_message_of_the_site_is_counted_named_and_has_no_effect(leaf: str, field: str, body: Any, reason: str) -> None:
    effects, metrics, member = Recorder(), Metrics(), Member("gw-9", "boot")
    link = SiteLink(SITE, member, effects, metrics, publish=lambda *_: True, mono_ms=lambda: 0, keep=lambda *_: None)  # type: ignore[arg-type]
    link.connected()
    link.subscribed()
    link.message(f"{topics.ROOT}/site/{SITE}/{leaf}", body if isinstance(body, bytes) else json.dumps(body).encode())
    assert metrics.value("site_rejected_messages_total", reason=reason) == 1
    assert link.errors[-1]["field"] == field and link.errors[-1]["remedy"]
    assert (member.number, member.table, member.peers, effects.seen) == (0, None, {}, [])
    # The same message without its fault has one: the test can fail.
    link.message(f"{topics.ROOT}/site/{SITE}/member/gw-1", json.dumps(BEAT).encode())
    assert member.number == 7 and list(member.peers) == ["gw-1"]


def test_a_topic_of_another_site_is_refused() -> None:
    with pytest.raises(ContractError) as caught:
        topics.parse_site(topics.site_topic("plant-b", "table"), SITE)
    assert caught.value.reason == "topic" and topics.parse_site(topics.site_topic(SITE, "duty", "d"), SITE) == ("duty", "d")
    assert all(topics.parse_site(topic.replace("+", "x"), SITE)[0] in topics.SITE_LEAVES for topic in topics.site_subscriptions(SITE))


def test_examples_parse() -> None:
    for message, name in ((MEMBER, "gw-1"), (CLAIM, ""), (TABLE, ""), (SPEC, "gw-1"), (DUTY, "boiler-1"), (LOAD, "gw-1")):
        parse(message, json.dumps(message.example).encode(), SITE, name)


# -- who gets what -----------------------------------------------------------------------------------------------------------

edges = st.sampled_from(("a", "b", "c", "d"))


@given(
    st.dictionaries(st.sampled_from([f"d{index}" for index in range(12)]), st.tuples(edges, st.integers(1, 5), edges)),
    st.lists(st.sampled_from([f"d{index}" for index in range(12)]), unique=True),
    st.dictionaries(edges, st.tuples(st.floats(0, 10), st.booleans()), min_size=1), st.dictionaries(edges, st.lists(st.sampled_from(["d1*", "d?", "d5"]))), st.booleans(),
)
def test_every_device_is_given_to_one_live_member_and_only_who_must_moves(
    before: dict[str, tuple[str, int, str]], devices: list[str], live: dict[str, tuple[float, bool]], patterns: dict[str, list[str]], anew: bool
) -> None:
    old = {device: Duty(*entry) for device, entry in before.items()}
    there = [Candidate(edge, *entry) for edge, entry in live.items()]
    duties = assign(old, devices, there, lambda device: home_of(device, patterns), 9, anew=anew)
    assert list(duties) == sorted(devices)
    for device, duty in duties.items():
        home = home_of(device, patterns)
        assert duty.edge in live and (not home or duty.origin == home)
        was = old.get(device)
        if was is not None and was.edge in live and not (home in live and live[home][1]):
            assert duty.edge == was.edge
        if home in live and (live[home][1] or was is None or was.edge not in live):
            assert duty.edge == home
        kept = was is not None and (was.edge, was.origin) == (duty.edge, duty.origin) and not anew
        assert duty.fence == (was.fence if kept and was is not None else 9)
    assert duties == assign(old, list(reversed(devices)), list(reversed(there)), lambda device: home_of(device, patterns), 9, anew=anew)


def test_capacity_decides_who_takes_what_a_dead_edge_leaves() -> None:
    before = {f"d{index}": Duty("dead", 1, "dead") for index in range(8)}
    duties = assign(before, list(before), [Candidate("big", 3.0, True), Candidate("none", 0.0, True), Candidate("small", 1.0, True)], lambda _: "", 2, anew=False)
    counts = {edge: sum(duty.edge == edge for duty in duties.values()) for edge in ("big", "small", "none")}
    assert counts == {"big": 6, "small": 2, "none": 0} and {duty.origin for duty in duties.values()} == {"dead"}
    crashed = assign(before, list(before), [Candidate("big", 3.0, False, crashed=True), Candidate("small", 1.0, True)], lambda _: "big", 2, anew=False)
    assert {duty.edge for duty in crashed.values()} == {"small"}
    alone = assign(before, list(before), [Candidate("none", 0.0, True)], lambda _: "", 2, anew=False)
    assert {duty.edge for duty in alone.values()} == {"none"}


# -- hand-over ---------------------------------------------------------------------------------------------------------------

def test_a_latch_that_is_handed_over_fires_nothing_anew() -> None:
    ours, theirs = DecisionEngine(parse_rules([LATCH, HELD]), {}), DecisionEngine(parse_rules([LATCH, HELD]), {})
    assert [one.rule for one in ours.evaluate("d", {"t": 90}, 1_000)] == ["hot"] and ours.evaluate("e", {"t": 90}, 1_000)
    theirs.import_state(ours.export_device("d", 5_000), 100_000)
    assert theirs.evaluate("d", {"t": 91}, 100_100) == []
    assert [one.rule for one in theirs.evaluate("d", {"t": 92}, 106_500)] == ["held"]  # its timer had run four seconds
    assert [one.rule for one in theirs.evaluate("e", {"t": 90}, 100_000)] == ["hot"]  # of the other device nothing was handed over
    assert DecisionEngine(parse_rules([LATCH]), {}).evaluate("d", {"t": 91}, 0)  # without it, it fires: the test can fail


def test_who_hands_a_device_over_keeps_nothing_of_it() -> None:
    engine = DecisionEngine(parse_rules([LATCH, {**LATCH, "id": "quiet", "if": {"silent": "5s"}}, {**LATCH, "id": "mean", "if": {"window": {"metric": "t", "over": "60s", "stat": "max"}, "op": ">", "than": 80}}]), {})
    assert len(engine.evaluate("d", {"t": 90}, 0)) == 2 and engine.evaluate("e", {"t": 90}, 0)
    engine.forget("d")
    assert engine.export_device("d", 0) == {} and [one.device for one in engine.tick(9_000)] == ["e"]
    assert [one.rule for one in engine.evaluate("d", {"t": 70}, 9_001)] == []


def test_only_devices_that_are_ours_are_decided_by_time() -> None:
    engine = DecisionEngine(parse_rules([{**LATCH, "if": {"silent": "5s"}}]), {})
    engine.evaluate("d", {"t": 1}, 0)
    assert engine.tick(9_000, lambda device: device != "d") == [] and len(engine.tick(9_000)) == 1


def test_a_twin_is_adopted_where_it_is_newer() -> None:
    registry = DeviceRegistry()
    registry.desire("d", {"speed": 1})
    found = registry.adopt("d", {"desired": {"speed": 5}, "desired_version": 4, "reported": {"speed": 1}, "reported_version": 2, "kind": "fan"})
    assert (found.desired, found.desired_version, found.reported) == ({"speed": 5}, 4, {"speed": 1})
    assert registry.adopt("d", {"desired": {"speed": 2}, "desired_version": 3}).desired == {"speed": 5}
    both = registry.adopt("d", {"desired": {"speed": 9}, "desired_version": 4})
    assert (both.desired, both.desired_version) == ({"speed": 5}, 5)
    new = registry.adopt("e", {"kind": "pump", "name": "P", "desired": "x", "desired_version": True, "meta": [], "surprise": 1})
    assert (new.kind, new.name, new.desired, new.desired_version) == ("pump", "P", {}, 0)
    with pytest.raises(ContractError):
        registry.adopt("f", {"desired": {"x": "y" * 40_000}, "desired_version": 1})
    assert Device("e").to_state().keys() == new.to_state().keys()


def test_a_device_refuses_a_lower_fence_of_the_same_duty_only() -> None:
    fences = Fences()
    assert fences.admits({"id": "1", "duty": "d", "fence": 5}) and fences.admits({"id": "2", "duty": "e", "fence": 2}) and fences.admits({"id": "3"})
    assert not fences.admits({"id": "4", "duty": "d", "fence": 4}) and fences.admits({"id": "5", "duty": "d", "fence": 5})
    assert fences.refusal({"id": "4", "duty": "d"}) == {"id": "4", "ok": False, "reason": "fenced", "fence": 5}


# -- configuration and hub ---------------------------------------------------------------------------------------------------

def test_the_configuration_names_what_is_missing(tmp_path: Path) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text("edge_id: gw-1\nsite: plant-a\nbus: {url: mqtt://h}\nduties: {enabled: true, home: ['boiler-*'], capacity: 2}\n")
    config = load_config(path, {}).config
    assert config.duties.home == ("boiler-*",) and config.duties.capacity == 2
    path.write_text("edge_id: gw-1\nsite: plant a\nduties: {enabled: true, home: ['boiler *']}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert {problem.key for problem in caught.value.problems} == {"site", "duties.enabled", "duties.home[0]"} and all(problem.remedy for problem in caught.value.problems)
    path.write_text("duties: {home: [1]}\n")
    with pytest.raises(ConfigError) as caught:
        load_config(path, {})
    assert caught.value.problems[0].key == "duties.home[0]"


def test_the_hub_shows_a_device_where_it_was_given_to_last() -> None:
    def row(edge: str, serves: Any, devices: list[str], site: str = "s") -> EdgeRow:
        return EdgeRow(edge, presence={"site": site, "devices": devices, "serves": serves})

    def shown(*rows: EdgeRow) -> dict[str, list[str]]:
        out = {}
        for region in build_tree(rows, 0)["children"]:
            for site in region["children"]:
                for node in site["children"]:
                    for edge in node["children"]:
                        out[edge["name"]] = [device["name"] for device in edge["children"]]
        return out

    dead, sibling = row("a", {"d": 3}, ["d", "host"]), row("b", {"d": 7, "e": 1}, ["d", "e", "host"])
    assert shown(dead, sibling) == {"a": ["host"], "b": ["d", "e", "host"]}
    assert shown(replace(dead, presence={**dead.presence, "serves": {"d": 9}}), sibling) == {"a": ["d", "host"], "b": ["e", "host"]}
    assert shown(dead, row("b", {"d": 7}, ["d"], "other")) == {"a": ["d", "host"], "b": ["d"]}
    assert shown(row("a", {"d": "x"}, ["d"]), row("b", [], ["d"])) == {"a": ["d"], "b": ["d"]}


def test_an_edge_without_shared_duties_loads_nothing_of_them() -> None:
    code = "import sys, edge_runtime.runtime, edge_runtime.devices.bus; print([name for name in sys.modules if 'site' in name and name.startswith('edge_runtime')])"
    assert subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout.strip() == "[]"
