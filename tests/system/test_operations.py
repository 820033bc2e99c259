"""Operations through everything: hub and command, agent as a process, runtime and CRIU. A workload is checkpointed, held, restored; its agent is killed meanwhile; what cannot be taken says what is in the way."""

import asyncio
import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest

from hub.server import Hub
from tests.integration.checkpoint_side import program, reason_against_checkpoints
from tests.integration.hub_side import running_hub
from tests.integration.waiting import until
from tests.system.test_containers_adopted import Node, alive, said, states, submit, work
from tools.novactl.cli import main as novactl

pytestmark = [pytest.mark.skipif(bool(reason_against_checkpoints()), reason=reason_against_checkpoints()), pytest.mark.system, pytest.mark.timeout(400)]

COUNTS = "trap 'exit 0' TERM; i=0; while true; do echo $i; i=$((i+1)); sleep 0.02; done"
EDGE = "bench-edge"
ROOM_S = 90.0
"""For what takes a second on a machine of one's own."""


def operations(hub: Hub) -> dict[str, list[tuple[str, str]]]:
    """By id, the states and reasons that the edge told, in its order: what is live arrives before what waited."""
    found: dict[str, list[tuple[str, str]]] = {}
    for _, item in sorted(hub.store.read_events_after(("operation",), 0, 1000)[0], key=lambda one: one[1].record.seq):
        body = json.loads(item.record.body)
        found.setdefault(body["id"], []).append((body["state"], body["reason"]))
    return found


def why(hub: Hub) -> str:
    """The reason of the operation that was asked for last."""
    return list(operations(hub).values())[-1][-1][1]


def counted(node: Node, name: str) -> list[int]:
    """What the workload's program has written."""
    log = node.data / f"workloads/containers/{name}.1/stdout.log"
    lines = log.read_text().split("\n") if log.exists() else [""]  # while it is being restored it is nowhere
    return [int(line) for line in lines[:-1] if line]


async def command(hub: Hub, *words: str) -> int:
    """novactl, in a thread: the hub lives in this loop."""
    return await asyncio.to_thread(novactl, [words[0], "--hub", f"http://127.0.0.1:{hub.port}", "--token", hub.token, *words[1:]])


async def running(hub: Hub, node: Node, name: str) -> None:
    await until(lambda: states(hub, name)[-1:] == ["running"], ROOM_S, what=f"{name} runs")
    await until(lambda: len(counted(node, name)) > 3, ROOM_S, what=f"{name} counts")


@pytest.fixture
def with_criu(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", os.pathsep.join((os.path.dirname(program()), os.environ["PATH"])))


async def test_a_workload_is_checkpointed_held_over_a_killed_agent_and_restored(tmp_path: Path, with_criu: None, capsys: pytest.CaptureFixture[str]) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            await asyncio.to_thread(node.start)
            await submit(hub, work("counter", COUNTS, restart="always"), work("waits", "sleep 1000 & exec sleep 1000"))
            await running(hub, node, "counter")
            assert await command(hub, "workload", "checkpoint", "counter", "--checkpoint", "first", "--wait", str(ROOM_S)) == 0
            first = node.pid("counter")
            assert alive(first) and states(hub, "counter") == ["accepted", "running"], "it goes on"
            assert await command(hub, "workload", "checkpoint", "counter", "--checkpoint", "first", "--wait", str(ROOM_S)) == 1, "the name is taken"
            assert "has a checkpoint first already" in why(hub)

            assert await command(hub, "workload", "checkpoint", "counter", "--checkpoint", "second", "--stop", "--id", "o-stop", "--wait", str(ROOM_S)) == 0
            await until(lambda: states(hub, "counter")[-1] == "checkpointed", ROOM_S, what="it is held")
            seen = counted(node, "counter")
            assert not alive(first) and seen == list(range(len(seen)))
            await asyncio.to_thread(node.kill)
            await asyncio.to_thread(node.start)
            assert await command(hub, "workload", "delete-checkpoint", "counter", "--checkpoint", "second", "--wait", str(ROOM_S)) == 1
            assert "this is its state" in why(hub)
            assert counted(node, "counter") == seen and states(hub, "counter") == ["accepted", "running", "checkpointed"], "a restart policy does nothing to it, nor does another agent"
            assert operations(hub)["o-stop"][-1][0] == "succeeded"

            assert await command(hub, "workload", "restore", "counter", "--wait", str(ROOM_S)) == 0
            await until(lambda: states(hub, "counter")[-1] == "running", ROOM_S, what="it runs again")
            await until(lambda: len(counted(node, "counter")) > len(seen) + 3, ROOM_S)
            after = counted(node, "counter")
            assert after[0] == 0 and sorted(set(after)) == list(range(after[-1] + 1)), "it goes on where it was, with the output that it had (what was on its way to its keeper may stand there twice)"
            capsys.readouterr()
            assert await command(hub, "workload", "checkpoints", "counter", "--json") == 0
            there = json.loads(capsys.readouterr().out)
            assert [one["name"] for one in there] == ["first", "second"] and all(one["bytes"] > 0 and len(one["root"]) == 64 for one in there)
            assert await command(hub, "workload", "delete-checkpoint", "counter", "--checkpoint", "first", "--wait", str(ROOM_S)) == 0
            assert not (node.data / "workloads/checkpoints/counter/first").exists()

            await hub.workloads.ask(lambda planner, now: planner.cancel("counter", now))
            await until(lambda: states(hub, "counter")[-1] == "stopped", ROOM_S)
            await until(lambda: not (node.data / "workloads/checkpoints/counter").exists(), ROOM_S, what="its checkpoints go with it")
        finally:
            await asyncio.to_thread(node.end)


async def test_a_workload_is_begun_from_anothers_snapshot_though_that_has_gone(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            await asyncio.to_thread(node.start)
            await submit(hub, work("counter", f"echo 42 > /srv/answer; {COUNTS}"))
            await running(hub, node, "counter")
            assert await command(hub, "workload", "snapshot", "counter", "--snapshot", "night", "--wait", str(ROOM_S)) == 0
            assert await command(hub, "workload", "snapshot", "counter", "--snapshot", "night", "--wait", str(ROOM_S)) == 1, "the name is taken"
            assert await command(hub, "workload", "snapshot", "counter", "--checkpoint", "night") == 1, "it is no checkpoint"
            seen = len(counted(node, "counter"))
            await until(lambda: len(counted(node, "counter")) > seen + 3, ROOM_S, what="it goes on")
            capsys.readouterr()
            assert await command(hub, "workload", "snapshots", "counter", "--json") == 0
            [kept] = json.loads(capsys.readouterr().out)
            assert (kept["name"], kept["image"]) == ("night", "snapshots/counter:night") and Path(kept["file"]).stat().st_size == kept["bytes"]
            await hub.workloads.ask(lambda planner, now: planner.cancel("counter", now))
            await until(lambda: states(hub, "counter")[-1] == "stopped", ROOM_S)
            await submit(hub, {**work("second", f"cat /srv/answer; {COUNTS}"), "image": kept["image"]})
            await running(hub, node, "second")
            assert counted(node, "second")[0] == 42
        finally:
            await asyncio.to_thread(node.end)


async def test_what_cannot_be_taken_names_what_is_in_the_way_and_goes_on(tmp_path: Path, with_criu: None) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            await asyncio.to_thread(node.start)
            await submit(hub, work("stopped-inside", "sleep 1000 & kill -STOP $!; " + COUNTS))
            await running(hub, node, "stopped-inside")
            assert await command(hub, "workload", "checkpoint", "stopped-inside", "--wait", str(ROOM_S)) == 1
            assert "resource.process: process" in why(hub) and "was stopped by a signal" in why(hub) and "kill -CONT" in why(hub)
            seen = len(counted(node, "stopped-inside"))
            await until(lambda: len(counted(node, "stopped-inside")) > seen, ROOM_S, what="it goes on")
            assert await command(hub, "workload", "restore", "stopped-inside", "--wait", str(ROOM_S)) == 1
            assert "has no checkpoint" in why(hub)
            assert [one for one in said(hub) if one[2] == "failed"] == []
        finally:
            await asyncio.to_thread(node.end)


async def test_what_a_workload_says_is_asked_by_way_of_the_hub_and_a_command_is_run_where_that_is_allowed(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub, exec=True)
        try:
            await asyncio.to_thread(node.start)
            await submit(hub, work("counter", "echo trouble >&2; " + COUNTS), work("long", "yes 0123456789abcdef | head -c 200000; echo; echo end; exec sleep 1000"))
            await running(hub, node, "counter")
            assert await command(hub, "logs", "counter", "--json") == 0
            assert (told := json.loads(capsys.readouterr().out))["stderr"] == "trouble\n" and (told["node"], told["phase"], told["epoch"]) == (EDGE, "running", 1)
            assert await command(hub, "logs", "counter") == 0 and capsys.readouterr().err == "trouble\n"
            assert await command(hub, "logs", "counter", "--tail", "2") == 0
            last = capsys.readouterr().out.split()
            assert len(last) == 2 and int(last[1]) == int(last[0]) + 1
            log = node.data / "workloads/containers/long.1/stdout.log"
            await until(lambda: log.exists() and log.read_bytes().endswith(b"end\n"), ROOM_S, what="it has written all")
            assert await command(hub, "logs", "long") == 0
            assert capsys.readouterr().out.encode() == log.read_bytes(), "in pieces, and put together again"

            assert await command(hub, "exec", "counter", "--", "sh", "-c", "echo in; echo err >&2; exit 7") == 7
            assert (said_ := capsys.readouterr()).out == "in\n" and said_.err == "err\n"
            await until(lambda: len(hub.store.read_events_after(("workload.exec",), 0, 100)[0]) == 2, ROOM_S, what="its records")
            bodies = [json.loads(item.record.body) for _, item in hub.store.read_events_after(("workload.exec",), 0, 100)[0]]
            assert [(one["state"], one.get("code")) for one in bodies] == [("begun", None), ("ended", 7)] and "exit 7" in bodies[0]["args"]
            assert await command(hub, "exec", "counter", "--timeout", "0.3", "--", "sleep", "100") == 1, "it is killed"
            assert "took longer than 0.3 s" in capsys.readouterr().err

            looked, ask = asyncio.Event(), hub.questions.ask

            async def watched(*words: Any, **more: Any) -> Any:
                try:
                    return await ask(*words, **more)
                finally:
                    looked.set()

            monkeypatch.setattr(hub.questions, "ask", watched)
            greedy = work("greedy", "dd if=/dev/zero of=/srv/big bs=1M count=20 2>/dev/null; exec sleep 1000")
            await submit(hub, work("short", "echo brief; exit 3"), {**greedy, "requests": {**greedy["requests"], "disk": "8Mi"}})
            await until(lambda: hub.workloads.rows["short"].state == hub.workloads.rows["greedy"].state == "failed", ROOM_S, what="their ends")
            assert hub.workloads.rows["greedy"].reason.endswith("asked for 8388608 (requests.disk)"), "ended by its node, and the hub knows why"
            assert [json.loads(item.record.body)["id"] for _, item in hub.store.read_events_after(("workload.disk",), 0, 100)[0]] == ["greedy"]
            capsys.readouterr()
            assert await command(hub, "logs", "short") == 0 and capsys.readouterr().out == "brief\n", "of what has ended its last node is asked"

            following = asyncio.create_task(command(hub, "logs", "counter", "--follow"))
            await asyncio.wait_for(looked.wait(), ROOM_S)
            await hub.workloads.ask(lambda planner, now: planner.cancel("counter", now))
            assert await following == 0, "it ends with the workload"
            assert [int(line) for line in capsys.readouterr().out.split()][:3] == [0, 1, 2]
        finally:
            await asyncio.to_thread(node.end)


@pytest.mark.slow
async def test_what_is_lost_goes_on_from_the_checkpoint_that_its_document_asks_for(tmp_path: Path, with_criu: None) -> None:
    async with running_hub(tmp_path / "hub", "embedded") as hub:
        node = Node(tmp_path, hub)
        try:
            await asyncio.to_thread(node.start)
            await submit(hub, work("counter", COUNTS, checkpoint={"every_s": 10}))
            await running(hub, node, "counter")
            folder = node.data / "workloads/checkpoints/counter"
            await until(lambda: folder.exists() and any(not one.name.startswith(".") for one in folder.iterdir()), ROOM_S, what="a checkpoint that nobody asked for")
            await until(lambda: any(states_ and states_[-1][0] == "succeeded" for states_ in operations(hub).values()), ROOM_S)
            told = json.loads((node.data / "workloads/containers/counter.1/running.json").read_text())
            for pid in (told["keeper"], told["pid"]):
                os.kill(pid, signal.SIGKILL)
            await until(lambda: states(hub, "counter")[-2:] == ["checkpointed", "running"], ROOM_S, what="it goes on")
            before = counted(node, "counter")
            await until(lambda: len(counted(node, "counter")) > len(before) + 3, ROOM_S)
            after = counted(node, "counter")
            back = [at for at in range(1, len(after)) if after[at] != after[at - 1] + 1]
            assert len(back) == 1 and after[back[0]] > 0, "from its checkpoint, not from its beginning; and what it wrote since the checkpoint stands there twice"
        finally:
            await asyncio.to_thread(node.end)
