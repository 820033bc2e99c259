"""Workloads through a whole hub: edges that tell and are told, many callers at once, a store that refuses, a hub that is killed."""

import asyncio
import json
import random
import shutil
import sqlite3
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import ApiConfig, BusConfig, DevicesConfig, HostConfig, JournalConfig, UplinkConfig, WorkloadsConfig
from edge_runtime.contract.limits import MAX_WORKLOADS
from edge_runtime.contract.records import Record
from edge_runtime.runtime import EdgeRuntime
from hub.cli import main as hub_main
from hub.scheduler import Invalid
from hub.scheduler.audit import check_invariants
from hub.server import Hub, HubSettings
from hub.store.base import EdgeRow, StoredRecord, Transaction
from hub.store.sqlite import SqliteStore
from hub.workloads import service as service_module
from hub.workloads.documents import Conflict, read_list
from hub.workloads.planner import Planner
from hub.workloads.service import Busy, Workloads
from tools.bench import placement_log

from .hub_side import LinkedEdge, linked_edge, running_hub
from .waiting import until
from .workload_side import clean, declare, submit, work

Json = dict[str, Any]
CAPACITY: Json = {"kind": "edge", "capacity": {"cpu": 4, "memory": "8Gi"}, "region": "eu", "site": "plant", "runs": ["container"]}


def wanted(edge: LinkedEdge) -> list[tuple[str, int, str]]:
    return [] if edge.desired is None else [(entry["id"], entry["epoch"], entry["wanted"]) for entry in edge.desired.workloads]


# -- edges -------------------------------------------------------------------------------------------------------------------


async def test_an_edge_tells_what_it_has_is_told_what_to_run_and_what_it_says_counts(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        edge.journal.append("event", "node.capacity", CAPACITY)
        await until(lambda: "gw-1" in hub.workloads.planner.tables.nodes, what="the node")
        assert await submit(hub, work("a", 2), work("b", 1)) == ["placed", "placed"]
        await until(lambda: wanted(edge) == [("a", 1, "running"), ("b", 1, "running")], what="desired state")
        assert edge.desired is not None and edge.desired.workloads[0]["document"] == work("a", 2)
        edge.journal.append("event", "workload", {"id": "a", "epoch": 1, "state": "running"})
        edge.journal.append("event", "workload", {"id": "b", "epoch": 1, "state": "refused", "reason": "no driver for kind container on this edge"})
        await until(lambda: wanted(edge) == [("a", 1, "running")], what="the refused one gone")
        assert hub.workloads.rows["b"].state == "pending"
        await until(lambda: "no driver for kind container" in hub.workloads.rows["b"].reason, what="the reason")
        await hub.workloads.ask(lambda planner, now: planner.cancel("a", now))
        await until(lambda: wanted(edge) == [("a", 1, "stopped")], what="the order to stop")
        assert hub.workloads.rows["a"].state == "ending"
        edge.journal.append("event", "workload", {"id": "a", "epoch": 1, "state": "stopped"})
        await until(lambda: wanted(edge) == [] and hub.workloads.rows["a"].state == "cancelled", what="its end")
        clean(hub, {"a": work("a", 2), "b": work("b", 1)})


async def test_what_an_edge_said_last_counts_though_it_came_first_also_over_a_restart(tmp_path: Path) -> None:
    """After a break what is live comes before what waited: the older words come last, and the hub may have been restarted between."""

    async def hear(hub: Hub, seq: int, kind: str, body: Json) -> None:
        record = StoredRecord("gw-1", "event", Record(seq, "b-1", seq, seq, "ntp", kind, json.dumps(body)), hub.now_ms())
        await hub.ingest.write(lambda: hub.store.commit(Transaction([record])))
        hub.workloads.records([record])
        newest = hub.store.read_latest(streams=("event",), kinds=(), limit=1)[0][0]
        await until(lambda: hub.store.workload_cursor() >= newest, what="that it was acted upon")

    def placed(hub: Hub) -> tuple[str, Any]:
        placement = hub.workloads.planner.tables.open["a", 1]
        return placement.said, placement.seat.get("form")

    async with running_hub(tmp_path / "hub", "embedded") as hub:
        hub.fleet.rows["gw-1"] = EdgeRow("gw-1", "online", last_seen_ms=hub.now_ms())
        await hear(hub, 1, "node.capacity", CAPACITY)
        assert await submit(hub, work("a")) == ["placed"]
        await hear(hub, 8, "workload", {"id": "a", "epoch": 1, "state": "checkpointed"})
        await hear(hub, 6, "workload", {"id": "a", "epoch": 1, "state": "running", "form": "microvm"})
        assert placed(hub) == ("checkpointed", "microvm")
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        await hear(hub, 5, "workload", {"id": "a", "epoch": 1, "state": "running", "form": "container"})
        await hear(hub, 4, "workload", {"id": "a", "epoch": 1, "state": "accepted"})
        assert placed(hub) == ("checkpointed", "microvm")
        await hear(hub, 9, "workload", {"id": "a", "epoch": 1, "state": "running"})
        assert placed(hub) == ("running", "microvm")
        await hear(hub, 11, "workload", {"id": "a", "epoch": 1, "state": "done"})
        await hear(hub, 10, "workload", {"id": "a", "epoch": 1, "state": "checkpointed"})
        assert hub.workloads.rows["a"].state == "done" and not hub.workloads.planner.tables.open
        assert [(row.said, row.why) for row in hub.store.read_placements("a")] == [("done", "done")]


async def test_what_an_edge_said_while_the_hub_was_killed_counts_once_when_it_is_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The records were committed, the hub ended before it acted: the mark in the same transaction brings it to them again."""
    async with running_hub(tmp_path / "hub", "embedded") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        edge.journal.append("event", "node.capacity", CAPACITY)
        await until(lambda: "gw-1" in hub.workloads.planner.tables.nodes, what="the node")
        await submit(hub, work("a"))
        with monkeypatch.context() as patch:
            patch.setattr(Workloads, "records", lambda *_: None)
            edge.journal.append("event", "workload", {"id": "a", "epoch": 1, "state": "done"})
            await until(lambda: len(hub.store.read_events_after(("workload",), 0, 10)[0]) == 1, what="the record")
            assert hub.workloads.rows["a"].state == "placed"
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        await until(lambda: hub.workloads.rows["a"].state == "done", what="the late word")
        await until(lambda: hub.desired["gw-1"]["spec"].get("workloads", []) == [], what="nothing wanted any more")
        assert hub.store.workload_cursor() > 0
        clean(hub)


async def test_odd_words_of_edges_are_counted_and_change_nothing(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        edge.journal.append("event", "node.capacity", CAPACITY)
        await until(lambda: "gw-1" in hub.workloads.planner.tables.nodes, what="the node")
        await submit(hub, work("a"))
        for kind, body in (
            ("node.capacity", {"capacity": {"cpu": -4}}), ("node.capacity", {"capacity": 5}), ("node.capacity", {"taints": [{"key": "\ud800"}]}), ("workload", {}), ("workload", {"id": "a", "epoch": 1, "state": "flown"}),
            ("workload", {"id": 5, "epoch": "x", "state": "done"}), ("workload", {"id": "zz", "epoch": 1, "state": "done"}), ("workload", {"id": "a", "epoch": 9, "state": "done"}),
        ):
            edge.journal.append("event", kind, body)
        await until(lambda: hub.workloads.counters["refused_records_total"] == 6, what="the refusals")
        assert hub.workloads.rows["a"].state == "placed" and "is negative" not in hub.workloads.planner.tables.nodes["gw-1"].document
        assert hub.workloads.planner.tables.nodes["gw-1"].problem
        edge.journal.append("event", "node.capacity", {**CAPACITY, "capacity": {"cpu": 8}})
        await until(lambda: hub.workloads.planner.tables.nodes["gw-1"].problem == "", what="a good description")
        clean(hub)


async def test_an_edge_away_takes_nothing_new_and_keeps_what_it_has(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        async with linked_edge(tmp_path / "edge", hub.broker.port) as edge:
            edge.journal.append("event", "node.capacity", CAPACITY)
            await until(lambda: "gw-1" in hub.workloads.planner.tables.nodes, what="the node")
            await submit(hub, work("a"))
        await until(lambda: not hub.workloads.planner.is_up("gw-1"), what="its silence")
        assert await submit(hub, work("b")) == ["pending"] and hub.workloads.rows["a"].state == "placed"
        assert "not heard from" in hub.workloads.rows["b"].reason
        async with linked_edge(tmp_path / "edge", hub.broker.port) as edge:
            await until(lambda: hub.workloads.rows["b"].state == "placed" and len(wanted(edge)) == 2, what="both")
        clean(hub)


async def test_more_than_one_desired_state_holds_is_not_placed_there(tmp_path: Path) -> None:
    """Two limits: the number of workloads (slots of the node) and the bytes of the document (what cannot be told is taken back)."""
    async with running_hub(tmp_path / "hub", "embedded") as hub, linked_edge(tmp_path / "edge", hub.broker.port) as edge:
        edge.journal.append("event", "node.capacity", {**CAPACITY, "capacity": {"cpu": 900}})
        await until(lambda: "gw-1" in hub.workloads.planner.tables.nodes, what="the node")
        states = await submit(hub, *(work(f"w{n:03}", "1m") for n in range(MAX_WORKLOADS + 5)))
        assert states.count("placed") == MAX_WORKLOADS and states.count("pending") == 5
        await until(lambda: len(wanted(edge)) == MAX_WORKLOADS, what="all told")
    async with running_hub(tmp_path / "other", "embedded") as hub, linked_edge(tmp_path / "edge2", hub.broker.port) as edge:
        edge.journal.append("event", "node.capacity", {**CAPACITY, "capacity": {"cpu": 900}})
        await until(lambda: "gw-1" in hub.workloads.planner.tables.nodes, what="the node")
        for number in range(20):
            await submit(hub, work(f"big{number:02}", "1m", spec={"text": "x" * 15_000}))
        await until(lambda: 10 < len(wanted(edge)) == sum(row.state == "placed" for row in hub.workloads.rows.values()) < 20, what="as many as fit")
        left = next(row for row in hub.workloads.rows.values() if row.state == "pending")
        await until(lambda: "cannot be told" in hub.workloads.rows[left.id].reason, what="the reason")
        clean(hub)


async def test_an_agent_without_drivers_says_so_and_the_hub_shows_it(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The shipped agent: it tells what it has; nothing is sent to it that it cannot run; what is sent nevertheless is refused with the reason, once, also over a restart."""
    def agent(url: str) -> EdgeRuntime:
        return EdgeRuntime(EdgeConfig(
            edge_id="gw-1", site="plant", region="eu", node="gw-1", data_dir=str(tmp_path / "edge"), uplink=UplinkConfig(url=url, backoff_base_s=0.05, backoff_cap_s=0.3, protocol="3.1.1"),
            bus=BusConfig(enabled=False), journal=JournalConfig(min_free_bytes=0, ballast_bytes=0, target_hours=0), devices=DevicesConfig(host=HostConfig(enabled=False)),
            api=ApiConfig(enabled=False), workloads=WorkloadsConfig(enabled=True, reserve_disk_bytes=0, reserve_memory_bytes=0, runtimes=(), functions=False),
        ))

    async with running_hub(tmp_path / "hub", "embedded") as hub:
        url = f"mqtt://127.0.0.1:{hub.broker.port}"
        edge = agent(url)
        await edge.start()
        try:
            await until(lambda: "gw-1" in hub.workloads.planner.tables.nodes, what="the node")
            assert hub.workloads.planner.tables.nodes["gw-1"].document["region"] == "eu" and hub.workloads.planner.runs("gw-1") == []
            assert await submit(hub, work("a", "100m")) == ["pending"] and "no node has a driver for container" in hub.workloads.rows["a"].reason
            await hub.change_desired("gw-1", {"workloads": [{"id": "x", "epoch": 1, "wanted": "running"}, {"id": "y", "epoch": 2, "wanted": "stopped"}]})
            await until(lambda: len(hub.store.read_events_after(("workload",), 0, 9)[0]) == 2, what="both answers")
        finally:
            await edge.stop()
        edge = agent(url)
        await edge.start()
        try:
            await until(lambda: hub.fleet.rows["gw-1"].state == "online" and hub.fleet.rows["gw-1"].generation == hub.desired["gw-1"]["generation"], what="the edge again")
            monkeypatch.setattr(edge.workload_node().here, "runs", ("container",))
            edge.journal.append("event", "node.capacity", edge.workload_node().describe())
            await until(lambda: hub.workloads.planner.runs("gw-1") == ["container"], what="a driver that is none")
            monkeypatch.undo()
            await until(lambda: "refused" in hub.workloads.rows["a"].reason or "left alone" in hub.workloads.rows["a"].reason, what="the refusal")
            assert "no driver for kind container on this edge" in hub.workloads.rows["a"].reason
        finally:
            await edge.stop()
        said = [json.loads(item.record.body) for _, item in hub.store.read_events_after(("workload",), 0, 99)[0]]
        assert [(one["id"], one["state"]) for one in said] == [("x", "refused"), ("y", "stopped"), ("a", "refused")], "each is answered once"
        clean(hub)


# -- many at once, refusals, kills -------------------------------------------------------------------------------------------


async def caller(hub: Hub, number: int, acknowledged: dict[str, Json]) -> None:
    draw = random.Random(number)
    for _ in range(12):
        name = f"w{draw.randrange(60)}"
        document = work(name, draw.choice(["250m", 1, 2]), priority=draw.randrange(2))
        try:
            if draw.random() < 0.7:
                await submit(hub, document)
                acknowledged[name] = hub.workloads.rows[name].document
            elif draw.random() < 0.7:
                await hub.workloads.ask(lambda planner, now, name=name: planner.cancel(name, now))
            else:
                node, how = f"n-{draw.randrange(4)}", draw.choice(["drain", "", ""])
                await hub.workloads.ask(lambda planner, now, node=node, how=how: planner.cordon(node, how, now))
        except (Conflict, Busy):
            pass


async def test_sixty_four_callers_at_once(tmp_path: Path) -> None:
    acknowledged: dict[str, Json] = {}
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        for number in range(4):
            await declare(hub, f"n-{number}")
        await asyncio.gather(*(caller(hub, number, acknowledged) for number in range(64)))
        clean(hub, acknowledged)
        assert hub.workloads.counters["placements_total"] > 20 and len(acknowledged) > 30
        held = hub.workloads.planner.state.free.copy()
    hub = Hub(HubSettings(tmp_path / "hub"))
    assert (hub.workloads.planner.state.free == held).all(), "the rows alone bring everything back"
    clean(hub, acknowledged)
    await hub.stop()


class Blind(dict[str, str]):
    """Knows of no document: the planted bug."""

    def get(self, key: str, default: Any = None) -> Any:
        return default


@pytest.mark.parametrize("planted", [False, True])
async def test_the_older_document_is_changed_first(tmp_path: Path, planted: bool) -> None:
    double: list[list[str]] = []
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        tell = hub.workloads._tell

        async def observed(node: str, change: Json) -> Any:
            done = await tell(node, change)
            double.append([name for name, document in hub.desired.items() if any(entry["wanted"] == "running" for entry in document["spec"].get("workloads", []))])
            return done

        hub.workloads._tell = observed
        for name in ("gw-1", "gw-2"):
            hub.fleet.rows[name] = EdgeRow(name, "online", last_seen_ms=hub.now_ms())
        await hub.workloads.ask(lambda planner, now: planner.put_node("gw-1", {"capacity": {"cpu": 9}}, "edge", now))
        await submit(hub, work("a"))
        await until(lambda: double == [["gw-1"]], what="the first document")
        await hub.workloads.ask(lambda planner, now: planner.put_node("gw-2", {"capacity": {"cpu": 9}}, "edge", now))
        if planted:
            hub.workloads._listed = Blind()

        def moves(planner: Planner, now: int) -> None:
            planner.soil("gw-2")  # so that the new node would be told first
            planner.said("gw-1", 1, {"id": "a", "epoch": 1, "state": "refused", "reason": "lot"}, now)
            assert planner.attempt("a", now)

        await hub.workloads.ask(moves)
        await until(lambda: double[-1] == ["gw-2"], what="the second document")
        assert (["gw-1", "gw-2"] in double) is planted, double


async def test_at_no_moment_do_two_documents_want_one_workload(tmp_path: Path) -> None:
    """Edges that refuse, end and stop by lot, while their nodes are drained: after every document that is written all of them are looked at."""
    draw, seen, double = random.Random(5), set[tuple[str, str, int, str]](), list[str]()
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        tell = hub.workloads._tell

        async def observed(node: str, change: Json) -> Any:
            done = await tell(node, change)
            running = [(entry["id"], name) for name, document in hub.desired.items() for entry in document["spec"].get("workloads", []) if entry["wanted"] == "running"]
            double.extend(f"{one}" for one in running if sum(one[0] == other[0] for other in running) > 1)
            for entry in done["spec"].get("workloads", []):
                key = (node, entry["id"], entry["epoch"], entry["wanted"])
                if key not in seen:
                    seen.add(key)
                    state = "stopped" if entry["wanted"] == "stopped" else draw.choice(["running", "running", "refused", "stopped"])
                    body = {"id": entry["id"], "epoch": entry["epoch"], "state": state, "reason": "lot"}
                    answers.append(asyncio.ensure_future(hub.workloads.ask(lambda planner, now, body=body, seq=len(seen): planner.said(node, seq, body, now))))
            return done

        answers: list[asyncio.Future[Any]] = []
        hub.workloads._tell = observed
        for name in ("gw-1", "gw-2", "gw-3"):
            hub.fleet.rows[name] = EdgeRow(name, "online", last_seen_ms=hub.now_ms())
            await hub.workloads.ask(lambda planner, now, name=name: planner.put_node(name, {"capacity": {"cpu": 9}}, "edge", now))
        await submit(hub, *(work(f"w{n}") for n in range(18)))
        for turn in range(300):
            if turn >= 30 and len(seen) > 40:  # on a busy machine several changes go into one document
                break
            node, how = f"gw-{turn % 3 + 1}", draw.choice(["drain", ""])
            await hub.workloads.ask(lambda planner, now, node=node, how=how: planner.cordon(node, how, now))
            hub.fleet.rows[node].last_seen_ms = hub.now_ms()
        await until(lambda: not hub.workloads.planner.tables.dirty and all(answer.done() for answer in answers), what="rest")
        assert double == [] and len(seen) > 40
        clean(hub)


def refuse(*_: Any) -> None:
    raise sqlite3.OperationalError("database or disk is full")


async def test_a_store_that_refuses_undoes_everything_of_the_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        await declare(hub, "n-1")
        await submit(hub, work("stays"))
        planner = hub.workloads.planner
        before, rows = planner.state.digest(), dict(planner.tables.rows)
        with monkeypatch.context() as patch:
            patch.setattr(hub.store, "commit_workloads", refuse)
            asked = [submit(hub, work(f"w{n}")) for n in range(3)] + [hub.workloads.ask(lambda planner, now: planner.cancel("stays", now))]
            outcomes = await asyncio.gather(*asked, return_exceptions=True)
            assert all(isinstance(outcome, Busy) for outcome in outcomes), outcomes
            await until(lambda: not planner._marks, what="the round's end")
            assert planner.tables.rows == rows and planner.state.digest() == before and hub.workloads.rows == rows
        assert await submit(hub, work("w0")) == ["placed"]
        clean(hub, {"stays": work("stays"), "w0": work("w0")})


async def test_one_bad_request_of_a_batch_is_no_trouble_of_the_others(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        await declare(hub, "n-1")
        def stumble(planner: Planner, now: int) -> None:
            planner.submit(read_list(work("half")), now)
            raise RuntimeError("planted")
        async with hub.workloads.turn:  # all of them wait, and come in one transaction
            tasks = [asyncio.ensure_future(one) for one in (
                submit(hub, work("a")), hub.workloads.ask(stumble), submit(hub, work("b"), work("c", weights={"luck": 1})), submit(hub, work("d")))]
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert outcomes[0] == outcomes[3] == ["placed"] and isinstance(outcomes[1], RuntimeError) and isinstance(outcomes[2], Invalid)
        assert set(hub.workloads.rows) == {"a", "d"}
        clean(hub, {"a": work("a"), "d": work("d")})


async def test_a_node_that_vanishes_amid_decisions_leaves_nothing_half_done(tmp_path: Path) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        await declare(hub, "n-1")
        async with hub.workloads.turn:  # one transaction: placed, the node gone, placed again, the node back
            tasks = [asyncio.ensure_future(one) for one in (
                submit(hub, work("a")), hub.workloads.ask(lambda planner, now: planner.remove_node("n-1", False, now)), submit(hub, work("b")), declare(hub, "n-1"), submit(hub, work("c")))]
            await asyncio.sleep(0)
        outcomes = await asyncio.gather(*tasks)
        assert outcomes[0] == ["pending"] and outcomes[2] == ["pending"] and outcomes[4] == ["placed"], "what is answered is what stands after the transaction"
        await until(lambda: {row.state for row in hub.workloads.rows.values()} == {"placed"}, what="the others again")
        clean(hub, {name: work(name) for name in "abc"})


async def test_a_hub_that_is_told_so_rebalances_by_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running_hub(tmp_path / "hub", "embedded", rebalance_minutes=0.005) as hub:
        for name, other in (("n-1", "n-2"), ("n-2", "n-1")):
            await declare(hub, name)
            if other in hub.workloads.planner.tables.nodes:
                await hub.workloads.ask(lambda planner, now, other=other: planner.cordon(other, "cordon", now))
            await submit(hub, work(f"on-{name}"))
        await hub.workloads.ask(lambda planner, now: planner.cordon("n-1", "", now))
        await until(lambda: hub.workloads.rows["on-n-1"].node == hub.workloads.rows["on-n-2"].node, what="both on one node")
        await until(lambda: [document["state"] for document in hub.workloads.planner.tables.rebalances.values()] == ["done"], what="the end of it")
        clean(hub, {f"on-{name}": work(f"on-{name}") for name in ("n-1", "n-2")})
    for wrong in ("-1", "0.5", "often"):
        assert hub_main(["--rebalance-minutes", wrong, "--data-dir", str(tmp_path / "none")]) == 2 and "rebalance-minutes" in capsys.readouterr().err


def test_a_hub_says_what_compiled_may_be(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert hub_main(["--compiled", "perhaps", "--data-dir", str(tmp_path / "none")]) == 2 and "compiled" in capsys.readouterr().err


async def test_past_the_queue_a_caller_is_told_to_come_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(service_module, "QUEUE_MAX", 3)
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        await declare(hub, "n-1")
        async with hub.workloads.turn:
            tasks = [asyncio.ensure_future(submit(hub, work(f"w{n}"))) for n in range(5)]
            done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
            assert all(isinstance(task.exception(), Busy) for task in done)
        outcomes = await asyncio.gather(*tasks, return_exceptions=True)
        assert sum(outcome == ["placed"] for outcome in outcomes) >= 3 and all(outcome == ["placed"] or isinstance(outcome, Busy) for outcome in outcomes)


async def test_the_checker_catches_an_answer_before_the_transaction(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The negative control: a hub that answers before the store has it, and then ends, has lost what it acknowledged."""
    acknowledged: dict[str, Json] = {}
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        await declare(hub, "n-1")

        async def early(self: Workloads, cursor: int | None = None) -> None:
            changes = self.planner.changes()
            self.planner.keep()
            self.rows.update({name: row for name, row in changes.workloads.items() if row is not None})  # and the write never comes: the kill

        monkeypatch.setattr(Workloads, "_commit", early)
        await submit(hub, work("a"))
        acknowledged["a"] = work("a")
        log = placement_log.read(hub.settings.data_dir / "hub.db")
        assert placement_log.lost(log, acknowledged) == ["a: acknowledged, and in no row"]


async def test_a_store_that_was_edited_is_set_right_and_named(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        await declare(hub, "n-1")
        await submit(hub, work("a"), work("b"), work("c"))
    with sqlite3.connect(tmp_path / "hub" / "hub.db") as db:
        db.execute("DELETE FROM placements WHERE workload='a'")
        db.execute("UPDATE placements SET node='nowhere' WHERE workload='b'")
        db.execute("UPDATE workloads SET document='{\"id\": \"c\", \"kind\": \"dream\"}' WHERE id='c'")
    db.close()
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        await until(lambda: hub.workloads.rows["a"].state == hub.workloads.rows["b"].state == "placed", what="both again")
        assert hub.workloads.rows["c"].state == "failed" and "dream" in hub.workloads.rows["c"].reason
        assert "nowhere" in caplog.text and placement_log.doubles(placement_log.read(tmp_path / "hub" / "hub.db"), hub.desired) == []
        check_invariants(hub.workloads.planner.state)


async def test_a_hub_restored_from_a_backup_gives_no_epoch_twice(tmp_path: Path) -> None:
    """The edges send again what the restored hub does not have, and it goes on above what they speak of."""
    data = tmp_path / "hub"
    async with running_hub(data, "embedded") as hub, linked_edge(tmp_path / "e1", hub.broker.port) as one, linked_edge(tmp_path / "e2", hub.broker.port, name="gw-2") as two:
        for edge in (one, two):
            edge.journal.append("event", "node.capacity", {**CAPACITY, "labels": {"n": edge.name}})
        await until(lambda: all(hub.workloads.planner.is_up(edge.name) for edge in (one, two)), what="both")
        await submit(hub, work("a", node_affinity={"preferred": [{"weight": 100, "term": {"labels": [{"key": "n", "op": "In", "values": ["gw-1"]}]}}]}))
        assert hub.workloads.rows["a"].node == "gw-1"
        await until(lambda: wanted(one) == [("a", 1, "running")], what="the order")
    shutil.copytree(data, tmp_path / "backup")
    async with running_hub(data, "embedded") as hub, linked_edge(tmp_path / "e1", hub.broker.port) as one, linked_edge(tmp_path / "e2", hub.broker.port, name="gw-2") as two:
        await until(lambda: hub.workloads.planner.is_up("gw-1") and hub.workloads.planner.is_up("gw-2"), what="both again")
        await hub.workloads.ask(lambda planner, now: planner.move("a", now, "for the test", "gw-2"))
        await until(lambda: wanted(one) == [("a", 1, "stopped")], what="the order to stop")
        one.journal.append("event", "workload", {"id": "a", "epoch": 1, "state": "stopped"})
        await until(lambda: wanted(two) == [("a", 2, "running")], what="the order to run")
        two.journal.append("event", "workload", {"id": "a", "epoch": 2, "state": "running"})
        await until(lambda: hub.workloads.planner.tables.open["a", 2].said == "running", what="the word of gw-2")
    shutil.rmtree(data)
    shutil.copytree(tmp_path / "backup", data)
    async with running_hub(data, "embedded") as hub, linked_edge(tmp_path / "e1", hub.broker.port) as one, linked_edge(tmp_path / "e2", hub.broker.port, name="gw-2") as two:
        await until(lambda: hub.workloads.rows["a"].epoch > 2, what="what gw-2 knows")
        await until(lambda: hub.workloads.rows["a"].state == "placed" and [("a", hub.workloads.rows["a"].epoch, "running")] in (wanted(one), wanted(two)), what="the new order")
        assert hub.workloads.rows["a"].epoch >= 3 and ("a", 2, "running") not in wanted(two)
        clean(hub, {"a": hub.workloads.rows["a"].document})


async def test_a_hub_of_before_workloads_is_migrated(tmp_path: Path) -> None:
    hub = Hub(HubSettings(tmp_path))
    assert isinstance(hub.store, SqliteStore) and hub.workloads.rows == {}
    await hub.stop()
