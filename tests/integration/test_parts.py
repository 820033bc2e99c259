"""What hub and edge consist of: a part that has ended is told and has the program started anew; links go on through faults of ours and through outages of days."""

import asyncio
import random
from pathlib import Path
from typing import Any
from urllib.error import HTTPError
from urllib.request import urlopen

import aiomqtt
import pytest

from edge_runtime.mqtt_reconnect import run_session
from edge_runtime.mqtt_session import SessionClosed
from edge_runtime.system.parts import Parts
from hub.broker.choose import ExternalBroker
from hub.broker.mosquitto import MosquittoBroker
from hub.cli import _alive
from hub.link import HubLink
from tools.ending import ended

from .edges import Edges
from .hub_side import api_of, in_thread, needs_mosquitto, running_hub
from .waiting import until

LONG = 1_500
"""Failures in a row; two to the power of 1,024 of them is no float any more."""


class Manager:
    """What the program tells systemd."""

    def __init__(self) -> None:
        self.looks = 0
        self.told: list[dict[str, str]] = []

    @property
    def watchdog_s(self) -> float:
        """Asked for in each turn of who gives signs of life."""
        self.looks += 1
        return 0.03

    def notify(self, **fields: str) -> bool:
        self.told.append(fields)
        return True

    def ready(self, status: str) -> None:
        self.notify(READY="1", STATUS=status)

    def settled(self) -> None:
        self.notify(WATCHDOG="1")

    def fed(self) -> int:
        return sum("WATCHDOG" in fields for fields in self.told)

    async def unfed(self) -> None:
        """Fails where it is given signs of life still."""
        fed, looks = self.fed(), self.looks
        await until(lambda: self.looks > looks + 20, what="turns of who gives signs of life")
        assert self.fed() <= fed + 1, "one was under way"


async def fails() -> None:
    raise RuntimeError("planted")


async def returns() -> None:
    pass


@pytest.mark.parametrize(("work", "why"), [(fails, "RuntimeError: planted"), (returns, "it returned")])
async def test_what_ends_by_itself_is_told_and_what_is_cancelled_is_not(work: Any, why: str) -> None:
    parts = Parts()
    forever = parts.start(asyncio.sleep(3600), name="forever")
    task = parts.start(work(), name="short")
    await asyncio.wait((task,))
    await ended(forever)
    assert parts.ended == {"short": why} and "short has ended" in parts.problems()[0]
    parts.ending = True
    await asyncio.wait((parts.start(work(), name="at the stop"),))
    assert list(parts.ended) == ["short"], "a stop is no loss"


async def test_an_edge_that_lacks_a_part_says_so_and_feeds_its_watchdog_no_more(edges: Edges, monkeypatch: pytest.MonkeyPatch) -> None:
    manager = Manager()
    monkeypatch.setattr("edge_runtime.runtime.ServiceManager", lambda *_: manager)
    edge = await edges.start()
    await until(lambda: manager.fed() > 3, what="signs of life")
    assert [(await edge.ask(path))[0] for path in ("/healthz", "/livez")] == [200, 200]
    await asyncio.wait((edge.runtime.parts.start(fails(), name="planted"),))
    for path in ("/healthz", "/livez"):
        status, told = await edge.ask(path)
        assert status == 503 and "planted has ended (RuntimeError: planted)" in str(told)
    await manager.unfed()


async def test_a_hub_that_lacks_a_part_says_so_and_feeds_its_watchdog_no_more(tmp_path: Path) -> None:
    manager = Manager()
    async with running_hub(tmp_path, "embedded") as hub:
        alive = asyncio.create_task(_alive(hub, manager))  # type: ignore[arg-type]
        await until(lambda: manager.fed() > 3, what="signs of life")
        assert manager.told[0]["READY"] == "1" and [(await in_thread(api_of(hub).get, path))["status"] for path in ("/healthz", "/livez")] == ["ok", "ok"]
        await asyncio.wait((hub.parts.start(fails(), name="planted"),))
        assert "planted has ended" in "".join(hub.problems())
        with pytest.raises(HTTPError) as told:
            await in_thread(urlopen, f"{hub.url}/livez")
        assert told.value.code == 503 and "planted has ended (RuntimeError: planted)" in told.value.read().decode()
        await manager.unfed()
        await ended(alive)


async def test_each_long_lived_task_of_a_hub_is_one_of_its_parts(tmp_path: Path) -> None:
    async with running_hub(tmp_path, "embedded") as hub:
        tasks = [*hub.ingest._tasks, hub.link._task, *hub.workloads._tasks, hub._pruning]
        assert len(tasks) >= 7
        for task in tasks:
            assert task is not None
            assert any(getattr(callback[0], "__self__", None) is hub.parts for callback in task._callbacks), task.get_name()  # type: ignore[attr-defined]


class Closed:
    """A session that ends at once, `fault` having been raised by what it does."""

    reached, accepted, connack_timeout_s = True, True, 0.0

    def __init__(self) -> None:
        self.closed: asyncio.Future[SessionClosed] = asyncio.get_running_loop().create_future()

    async def connect(self) -> None:
        """At once."""

    def abort(self, _reason: str) -> None:
        """Nothing is left of it."""


async def test_a_fault_in_what_a_connection_does_is_not_the_end_of_the_link() -> None:
    made, told = [], []

    def make(_five: bool) -> Any:
        made.append(Closed())
        return made[-1]

    async def serve(_session: Any) -> None:
        raise (KeyError, RecursionError, UnicodeDecodeError)[len(made) % 2]("planted")

    task = asyncio.create_task(run_session(make, serve, protocol="auto", next_pause_s=lambda: 0.0, on_failure=lambda error: told.append(error.reason), wake=asyncio.Event(), broker="it"))
    await until(lambda: len(made) >= 5, what="five connections")
    assert not task.done() and "planted" in told[0]
    await ended(task)


async def test_a_hub_whose_broker_is_away_for_long_still_looks_for_it() -> None:
    tries = 0

    class Away:
        def __init__(self, *_: Any, **__: Any) -> None:
            nonlocal tries
            tries += 1

        async def __aenter__(self) -> None:
            raise aiomqtt.MqttError("planted") if tries % 100 else ValueError("planted")

        async def __aexit__(self, *_: object) -> None:
            """It never came up."""

    class AtOnce(random.Random):
        def random(self) -> float:
            return 0.0

    link = HubLink(ExternalBroker("mqtt://127.0.0.1:1"), "h", "b", on_message=lambda *_: None, on_up=lambda: None, on_bad=lambda *_: None, now_ms=lambda: 0, client=Away, entropy=AtOnce())
    task = link.start()
    await until(lambda: tries > LONG or task.done(), what=f"{LONG} tries")
    assert not task.done() and "planted" in link.last_error
    await link.stop()


@needs_mosquitto
async def test_a_broker_that_cannot_be_started_for_long_is_started_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    broker = MosquittoBroker("127.0.0.1", 0, tmp_path)
    tries = 0

    async def spawn() -> None:
        nonlocal tries
        tries += 1
        raise OSError("planted")

    monkeypatch.setattr(broker, "_spawn", spawn)
    monkeypatch.setattr("hub.broker.mosquitto.random.random", lambda: 0.0)
    task: asyncio.Task[None] = asyncio.create_task(broker._supervise())
    await until(lambda: tries > LONG or task.done(), what=f"{LONG} tries")
    assert not task.done()
    await ended(task)
