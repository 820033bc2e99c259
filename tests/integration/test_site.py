"""Edges of one site on one real mosquitto: killed, stopped, restarted, said goodbye; latches stay, no reading is done twice, old fences are refused."""

import asyncio
import base64
import json
import os
import signal
import subprocess
import sys
from collections import Counter
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml

from edge_runtime.clock import SystemClock
from edge_runtime.config.schema import ModelConfig, UplinkConfig
from edge_runtime.contract.site_messages import Duty
from edge_runtime.journal import Journal, JournalSettings
from edge_runtime.site.member import OURS, Member
from edge_runtime.site_wiring import SharedDuties
from hub.hierarchy import build_tree
from hub.server import Hub
from tools.bench.harness import ROOT, die_with_parent, free_port
from tools.ending import ended

from .edges import Device, Edge, LocalBroker
from .hub_side import needs_mosquitto, running_hub
from .site_edges import EACH, HOMES, LATCHED, Obedient, served_by, serving, site_config
from .test_edge_desired import model
from .waiting import until

pytestmark = needs_mosquitto

TAKEOVER_S = 45.0
"""Eight to eleven seconds where the machine is free."""


class Process:
    """A member in a process of its own, which can be killed and stopped."""

    def __init__(self, name: str, folder: Path, port: int) -> None:
        self.name = name
        self._config = folder / f"{name}.yaml"
        self._config.write_text(yaml.safe_dump({
            "edge_id": name, "site": "hall-2", "data_dir": str(folder / name), "uplink": {"enabled": False}, "bus": {"url": f"mqtt://127.0.0.1:{port}"},
            "journal": {"ballast_bytes": 0, "min_free_bytes": 0}, "devices": {"host": {"enabled": False}}, "decisions": {"rules": [EACH, LATCHED]},
            "api": {"port": free_port()}, "duties": {"enabled": True, "home": list(HOMES[name])}, "logging": {"level": "error"},
        }))
        self.process: subprocess.Popen[bytes] | None = None

    def start(self) -> None:
        """Start; the site is not waited for."""
        env = {**os.environ, "PYTHONPATH": str(ROOT)}
        self.process = subprocess.Popen([sys.executable, "-OO", "-m", "edge_runtime", "run", "--config", str(self._config)], env=env, cwd=ROOT, preexec_fn=die_with_parent)

    def signal(self, number: int) -> None:
        """Send it a signal; SIGKILL is waited for."""
        assert self.process is not None
        self.process.send_signal(number)
        if number == signal.SIGKILL:
            self.process.wait()

    def end(self) -> None:
        """End it, whatever state it is in."""
        if self.process is not None and self.process.poll() is None:
            self.process.kill()
            self.process.wait()


class Numbered:
    """A device that publishes numbered hot readings all the time."""

    def __init__(self, device: Device, pause_s: float = 0.1) -> None:
        self.device, self.sent = device, 0
        self._pause_s = pause_s
        self._task: asyncio.Task[None] | None = None

    async def __aenter__(self) -> "Numbered":
        self._task = asyncio.get_running_loop().create_task(self._run())
        return self

    async def __aexit__(self, *_: object) -> None:
        assert self._task is not None
        await ended(self._task)

    async def _run(self) -> None:
        while True:
            await self.device.say("telemetry", {"n": self.sent, "temp": 90})
            self.sent += 1
            await asyncio.sleep(self._pause_s)


@pytest.fixture
async def site(tmp_path: Path, broker: LocalBroker) -> AsyncIterator[tuple[dict[str, Edge], Process]]:
    """gw-2 and gw-3 in this process, gw-1, where the boilers have their home, in one of its own."""
    first = Process("gw-1", tmp_path, broker.port)
    first.start()
    edges = {name: Edge(site_config(name, tmp_path, broker.port)) for name in ("gw-2", "gw-3")}
    for edge in edges.values():
        await edge.start()
    try:
        yield edges, first
    finally:
        first.end()
        for edge in edges.values():
            await edge.stop()


async def by_first(edges: dict[str, Edge], device: str = "boiler-1") -> None:
    """Until gw-1 serves the device, as the others see it, and nobody else does."""
    def settled() -> bool:
        members = [edge.runtime.site.member for edge in edges.values() if edge.runtime.site is not None]
        return all(one.server(device) == "gw-1" and "gw-1" in one.peers and one.table is not None and one.peers["gw-1"].heartbeat.table == one.table.number for one in members)

    await until(lambda: settled() and serving(edges, device) == [], TAKEOVER_S, "gw-1 serves the device")


def nothing_twice(obedient: Obedient) -> None:
    """No reading was counted twice, and the latch fired once."""
    assert [n for n, count in Counter(obedient.numbers()).items() if count > 1] == [], "a reading was counted twice"
    assert len({body["id"] for body in obedient.done}) == len(obedient.done), "a command came twice"
    fired = sum(body["name"] == "cool" for body in obedient.done)
    assert fired == 1, f"the latch fired {fired} times"


async def test_a_sibling_takes_over_from_a_killed_edge_and_does_nothing_twice(site: tuple[dict[str, Edge], Process], broker: LocalBroker) -> None:
    edges, first = site
    async with Device(broker.port, "boiler-1") as boiler:
        obedient = Obedient(boiler)
        async with Numbered(boiler) as numbered:
            await by_first(edges)
            await until(lambda: any(body["name"] == "cool" for body in obedient.done) and len(obedient.numbers()) > 5, what="gw-1 decides")
            assert {body["id"].split(".")[0] for body in obedient.done} == {"gw-1"}
            before = obedient.done[-1]
            first.signal(signal.SIGKILL)
            killed = numbered.sent
            await until(lambda: len(serving(edges, "boiler-1")) == 1, TAKEOVER_S, "a sibling takes over")
            taker = serving(edges, "boiler-1")[0]
            await until(lambda: obedient.numbers() and max(obedient.numbers()) > killed + 5 and obedient.done[-1]["id"].startswith(taker), what="the sibling decides")
            # A command of the edge that was replaced, as one would come from a process that was stopped before it could send it.
            await boiler.publish("novacron/1/device/boiler-1/command", {**before, "id": "gw-1.00000000.1.0", "args": {"n": 100_000}})
            await until(lambda: obedient.refused, what="the old fence is refused")
        assert {body["fence"] for body in obedient.done if body["id"].startswith(taker)} == {edges[taker].runtime.site.member.started["boiler-1"].fence}  # type: ignore[union-attr]
    nothing_twice(obedient)
    decisions = await edges[taker].records("decision")
    assert {body["rule"] for body in decisions} == {"each"} and {body["for"] for body in decisions} == {"gw-1"} and min(body["fence"] for body in decisions) > before["fence"]
    (taken,) = [body for body in await edges[taker].records("event", "site") if body["what"] == "taken"]
    assert taken["duties"] == [{"device": "boiler-1", "origin": "gw-1", "fence": decisions[0]["fence"], "from": "gw-1"}]
    # Not everybody acted: the other one dropped what the taker decided.
    other = next(edge for name, edge in edges.items() if name != taker)
    assert await other.records("decision") == [] and other.runtime.metrics.value("site_dropped_messages_total") > 0


async def test_goodbye_hands_over_at_once_and_what_is_anothers_is_left_alone(tmp_path: Path, broker: LocalBroker) -> None:
    async with running_hub(tmp_path / "hub", "mosquitto") as hub:
        uplink = UplinkConfig(url=f"mqtt://127.0.0.1:{hub.broker.port}", backoff_base_s=0.05, backoff_cap_s=0.3)
        edges = {name: Edge(site_config(name, tmp_path, broker.port, uplink=uplink)) for name in ("gw-1", "gw-2")}
        for edge in edges.values():
            await edge.start()
        try:
            await _goodbye(hub, edges, broker)
        finally:
            for edge in edges.values():
                await edge.stop()


def shown(hub: Hub) -> dict[str, list[str]]:
    """Edge to the devices that the hub's tree shows under it."""
    nodes = [node for region in build_tree(hub.fleet.rows.values(), hub.now_ms())["children"] for site in region["children"] for node in site["children"]]
    return {edge["name"]: [device["name"] for device in edge["children"]] for node in nodes for edge in node["children"]}


async def _goodbye(hub: Hub, edges: dict[str, Edge], broker: LocalBroker) -> None:
    async with Device(broker.port, "boiler-1") as boiler:
        obedient = Obedient(boiler)
        async with Numbered(boiler, 0.02) as numbered:
            await served_by(edges, "boiler-1", "gw-1")
            await until(lambda: shown(hub) == {"gw-1": ["boiler-1"], "gw-2": []}, what="the hub shows the boiler at home")
            first, second = edges["gw-1"], edges["gw-2"]
            first.runtime.pipeline.desire("boiler-1", {"mode": "eco"})
            await until(lambda: boiler.got("desired"), what="the twin is told")
            # The hub's command for a device of another is not done here, and it says so.
            one = {"id": "c-1", "device": "boiler-1", "name": "on", "args": {}, "expires_ms": second.now_ms() + 60_000}
            await hub.change_desired("gw-2", {"commands": [one], "twins": {"boiler-1": {"mode": "no"}}})
            await until(lambda: second.runtime.metrics.value("commands_superseded_total") == 1, what="the command is superseded")
            states = [(body["state"], body["reason"]) for body in await second.records("event", "operation")]
            assert states == [("running", ""), ("superseded", "boiler-1 is served by gw-1 now, not by this edge")] and second.runtime.desired_state.commands == {"c-1": "superseded"}
            assert boiler.got("desired") == [{"version": 1, "desired": {"mode": "eco"}}]
            await first.stop()
            await served_by(edges, "boiler-1", "gw-2")
            upto = numbered.sent + 20
            await until(lambda: obedient.numbers() and max(obedient.numbers()) > upto, what="gw-2 decides")
            # And the new one does what the hub wants of a device that is its own now, with the fence of its duty.
            await hub.change_desired("gw-2", {"commands": [one, {**one, "id": "c-2"}]})
            await until(lambda: any(body["id"] == "c-2" for body in obedient.done), what="the hub's command")
            (ordered,) = [body for body in obedient.done if body["id"] == "c-2"]
            assert ordered["duty"] == "boiler-1" and ordered["fence"] > 0
    nothing_twice(obedient)
    assert obedient.refused == []
    assert {body["name"] for body in obedient.done if body["id"].startswith("gw-2")} == {"count"}
    await until(lambda: shown(hub) == {"gw-1": [], "gw-2": ["boiler-1"]}, what="the hub shows the boiler where it is served")
    told = await hub.read(lambda: hub.store.read_latest(streams=("event",), kinds=("site",), limit=100))
    bodies = [(stored.edge, json.loads(stored.record.body)) for _, stored in told]
    assert [body["duties"][0]["from"] for edge, body in bodies if edge == "gw-2" and body["what"] == "taken"] == ["gw-1"]
    # The hub's word for gw-1, which it may still send, moves nothing: who serves is the site's to say.
    await hub.change_desired("gw-1", {"twins": {"boiler-1": {"mode": "hub"}}})
    assert serving(edges, "boiler-1") == ["gw-2"]


async def test_what_was_decided_before_a_crash_and_is_anothers_now_is_superseded(tmp_path: Path, broker: LocalBroker) -> None:
    clock = SystemClock()
    journal = Journal(JournalSettings(tmp_path / "gw-1" / "journal", min_free_bytes=0, ballast_bytes=0), clock, clock.raise_floor)
    journal.start()
    journal.append("decision", "decision", {
        "rule": "each", "device": "boiler-1", "outcome": "fired", "inputs": {}, "generation": 0, "offline": True, "fence": 1,
        "actions": [{"command": {"device": "boiler-1", "name": "count", "args": {"n": -1}, "expires_ms": 3_600_000}}],
    })
    await journal.close()  # durable, and no effect of it was confirmed
    edges = {"gw-2": Edge(site_config("gw-2", tmp_path, broker.port, home=("boiler-*",)))}
    await edges["gw-2"].start()
    try:
        async with Device(broker.port, "boiler-1") as boiler:
            obedient = Obedient(boiler)
            await boiler.say("register", {"kind": "boiler"}, retain=True)
            await served_by(edges, "boiler-1", "gw-2")
            edges["gw-1"] = Edge(site_config("gw-1", tmp_path, broker.port, home=()))
            await edges["gw-1"].start()
            await until(lambda: edges["gw-1"].runtime.metrics.value("commands_superseded_total") == 1, what="it is superseded")
            assert [body["state"] for body in await edges["gw-1"].records("event", "operation")] == ["superseded"]
            assert boiler.got("command") == [] and obedient.done == []
    finally:
        for edge in edges.values():
            await edge.stop()


@pytest.mark.slow
async def test_a_rule_moves_with_a_small_model_and_is_named_where_its_model_cannot(tmp_path: Path, broker: LocalBroker) -> None:
    asks = {**EACH, "id": "asks", "if": {"model": "small", "op": ">", "than": 80}}
    lacks = {**EACH, "id": "lacks", "if": {"model": "own", "op": ">", "than": 80}}
    own = model(2, "own")
    (tmp_path / "own.json").write_text(json.dumps({**own["manifest"], "data_file": "own.data"}))
    (tmp_path / "own.data").write_bytes(base64.b64decode(own["data_b64"]))
    first = site_config("gw-1", tmp_path, broker.port)
    first = replace(first, decisions=replace(first.decisions, models=(ModelConfig(str(tmp_path / "own.json")),)))
    edges = {"gw-1": Edge(first), "gw-2": Edge(site_config("gw-2", tmp_path, broker.port))}
    for edge in edges.values():
        await edge.start()
    try:
        edges["gw-1"].desire(1, rules=[asks, lacks], models=[model(3, "small")])
        async with Device(broker.port, "boiler-1") as boiler:
            obedient = Obedient(boiler)
            await boiler.say("telemetry", {"n": 1, "temp": 30})
            await served_by(edges, "boiler-1", "gw-1")
            await until(lambda: obedient.numbers() == [1], what="3 * 30 is over 80, 2 * 30 is not")
            await edges["gw-1"].stop()
            await served_by(edges, "boiler-1", "gw-2")
            await boiler.say("telemetry", {"n": 2, "temp": 50})
            await until(lambda: len(obedient.numbers()) == 2, what="the rule with the small model")
        decided = [(body["rule"], body["for"]) for body in await edges["gw-2"].records("decision")]
        (held,) = [body for body in await edges["gw-2"].records("event", "site") if body["what"] == "held back"]
        assert decided == [("asks", "gw-1")] and held["origin"] == "gw-1" and held["rules"] == [{"rule": "lacks", "reason": "model own is not here"}]
    finally:
        for edge in edges.values():
            await edge.stop()


def _keeps_no_state(self: SharedDuties, device: str, duty: Duty, _mono_ms: int) -> None:
    self._held[device] = duty


def _always_ours(_self: Member, _device: str, _now: int) -> str:
    return OURS


@pytest.mark.slow
@pytest.mark.parametrize(("owner", "name", "bug", "says"), [(SharedDuties, "_take_over", _keeps_no_state, "the latch fired 2 times"), (Member, "standing", _always_ours, "a reading was counted twice")], ids=["no hand-over", "everybody decides"])
async def test_the_check_finds_a_planted_bug(tmp_path: Path, broker: LocalBroker, monkeypatch: pytest.MonkeyPatch, owner: type, name: str, bug: Any, says: str) -> None:
    monkeypatch.setattr(owner, name, bug)
    edges = {edge: Edge(site_config(edge, tmp_path, broker.port)) for edge in ("gw-1", "gw-2")}
    for edge in edges.values():
        await edge.start()
    try:
        async with Device(broker.port, "boiler-1") as boiler:
            obedient = Obedient(boiler)
            async with Numbered(boiler, 0.02) as numbered:
                await until(lambda: "boiler-1" in edges["gw-1"].runtime.site.member.started, TAKEOVER_S)  # type: ignore[union-attr]
                await until(lambda: any(body["name"] == "cool" for body in obedient.done), what="gw-1 decides")
                await edges["gw-1"].stop()
                upto = numbered.sent + 20
                await until(lambda: any(body["args"].get("n", 0) > upto and body["id"].startswith("gw-2.") for body in obedient.done), TAKEOVER_S, "gw-2 decides")
        with pytest.raises(AssertionError, match=says):
            nothing_twice(obedient)
    finally:
        for edge in edges.values():
            await edge.stop()


@pytest.mark.slow
async def test_a_broken_connection_moves_nothing_and_brings_nothing_twice(tmp_path: Path, broker: LocalBroker) -> None:
    edges = {edge: Edge(site_config(edge, tmp_path, broker.port)) for edge in ("gw-1", "gw-2")}
    for edge in edges.values():
        await edge.start()
    try:
        async with Device(broker.port, "boiler-1") as boiler:
            obedient = Obedient(boiler)
            async with Numbered(boiler, 0.01):
                await served_by(edges, "boiler-1", "gw-1")
                for _ in range(4):
                    before = edges["gw-1"].runtime.metrics.value("bus_connects_total")
                    bus = edges["gw-1"].runtime.bus
                    assert bus is not None and bus._session is not None
                    bus._session.abort("the test cuts it")
                    await until(lambda before=before: edges["gw-1"].runtime.metrics.value("bus_connects_total") > before and serving(edges, "boiler-1") == ["gw-1"], what="it goes on")  # type: ignore[misc]
                    upto = max(obedient.numbers(), default=0) + 30
                    await until(lambda upto=upto: max(obedient.numbers(), default=0) > upto, what="it decides")  # type: ignore[misc]
        nothing_twice(obedient)
        assert {body["fence"] for body in obedient.done} == {edges["gw-1"].runtime.site.member.started["boiler-1"].fence}  # type: ignore[union-attr]
        assert await edges["gw-2"].records("decision") == []
    finally:
        for edge in edges.values():
            await edge.stop()


@pytest.mark.slow
async def test_while_the_broker_hangs_nobody_acts_and_afterwards_nothing_is_missing(tmp_path: Path, broker: LocalBroker) -> None:
    edges = {edge: Edge(site_config(edge, tmp_path, broker.port)) for edge in ("gw-1", "gw-2")}
    for edge in edges.values():
        await edge.start()
    try:
        async with Device(broker.port, "boiler-1") as boiler:
            obedient = Obedient(boiler)
            async with Numbered(boiler, 0.05):
                await served_by(edges, "boiler-1", "gw-1")
                await until(lambda: len(obedient.numbers()) > 10, what="gw-1 decides")
                broker.freeze()
                await until(lambda: serving(edges, "boiler-1") == [], TAKEOVER_S, "the lease runs out")
                assert any("heartbeats" in problem for problem in edges["gw-1"].runtime.health())
                broker.thaw()
                await served_by(edges, "boiler-1", "gw-1")
                upto = max(obedient.numbers()) + 20
                await until(lambda: max(obedient.numbers()) > upto, what="gw-1 decides again")
        nothing_twice(obedient)
        assert sorted(obedient.numbers()) == list(range(len(obedient.numbers()))) and obedient.refused == []
    finally:
        for edge in edges.values():
            await edge.stop()


@pytest.mark.slow
async def test_stopped_restarted_and_with_a_broker_that_forgets_nothing_is_done_twice(site: tuple[dict[str, Edge], Process], broker: LocalBroker) -> None:
    edges, first = site
    async with Device(broker.port, "boiler-1") as boiler:
        obedient = Obedient(boiler)
        async with Numbered(boiler):
            await by_first(edges)
            await until(lambda: any(body["name"] == "cool" for body in obedient.done) and len(obedient.numbers()) > 5, what="gw-1 decides")
            first.signal(signal.SIGSTOP)
            await until(lambda: len(serving(edges, "boiler-1")) == 1, TAKEOVER_S, "a sibling takes over from a stopped one")
            marker = len(obedient.done)
            first.signal(signal.SIGCONT)
            member = edges["gw-2"].runtime.site.member  # type: ignore[union-attr]
            await until(lambda: member.table is not None and "gw-1" in member.peers and member.peers["gw-1"].heartbeat.table == member.table.number, what="gw-1 follows again")
            assert not any(body["id"].startswith("gw-1.") for body in obedient.done[marker:])
            await by_first(edges)
            at_home = obedient.numbers()[-1]
            await until(lambda: obedient.numbers()[-1] > at_home + 20, what="gw-1 decides again")
            numbers = obedient.numbers()
            # The planned return loses nothing: from the take-over on there is no gap.
            taken = obedient.done[marker]["args"]["n"]
            assert [n for n in range(taken, at_home + 20) if n not in numbers] == []
    nothing_twice(obedient)
    assert obedient.refused == []
    fence = obedient.done[-1]["fence"]
    broker.kill()
    broker.start()
    async with Device(broker.port, "boiler-1") as boiler:
        again = Obedient(boiler)
        again.fences = obedient.fences
        async with Numbered(boiler) as numbered:
            numbered.sent = 1_000_000
            await until(lambda: len(again.numbers()) > 20, TAKEOVER_S, "the site works again")
    assert {body["id"].split(".")[0] for body in again.done} == {"gw-1"} and min(body["fence"] for body in again.done) > fence
    assert again.refused == [] and {body["name"] for body in again.done} == {"count"}  # the latch is still set
