"""Functions that run as containers: real ones, called over the loopback of their own network."""

import asyncio
import contextlib
import os
from collections.abc import AsyncIterator
from typing import Any

import aiohttp
import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads.drivers import function_container
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.face import Key, Order, Phase, Refused
from edge_runtime.workloads.drivers.function_container import ContainerFunctions, calls, container

from .container_side import driver, reason_against
from .waiting import until

__all__ = ["driver"]

needs_containers = pytest.mark.skipif(bool(reason_against()), reason=reason_against())

PATH = "/cgi-bin/answer"

ANSWER = r"""#!/bin/sh
told=$(head -c "$CONTENT_LENGTH")
case "$told" in
fail) printf 'Status: 500 no\r\n\r\ntrouble';;
slow) sleep 600;;
cut) kill -9 "$PPID";;
much) printf 'Content-Type: x/y\r\n\r\n'; yes | head -c 300000;;
*) printf 'Content-Type: x/y\r\n\r\nhello %s' "$told";;
esac
"""

SERVE = f"mkdir -p /srv/cgi-bin && cat > /srv{PATH} <<'END'\n{ANSWER}END\nbusybox chmod 755 /srv{PATH}; exec busybox httpd -f -p $PORT -h /srv"
"""A program that answers POST by a script."""

LISTENS_NOT = "sleep 600"


@contextlib.asynccontextmanager
async def function(driver: ContainerDriver, name: str, script: str = SERVE, **spec: Any) -> AsyncIterator[ContainerFunctions]:
    """One that runs."""
    told = {"command": ["sh", "-c", script], "path": PATH, "timeout_s": 60, **spec}
    entry = {"id": name, "epoch": 1, "kind": "function", "wanted": "running", "document": {"spec": told}}
    key = Key(name, 1)
    await driver.prepare(Order(key, "box:1", {}, container(told)))
    await driver.start(key)
    try:
        yield ContainerFunctions(driver, lambda: [entry])
    finally:
        await driver.delete(key)


@needs_containers
async def test_what_is_sent_is_answered(driver: ContainerDriver) -> None:
    async with function(driver, "greets") as functions:
        first = await functions.call("greets", b"world")
        assert first is not None and (first.what, first.code, first.stdout, first.cut) == ("exited", 0, b"hello world", False)
        again = await functions.call("greets", b"you")
        assert again is not None and again.stdout == b"hello you" and not again.cold and again.ran_us > 0
        failed = await functions.call("greets", b"fail")
        assert failed is not None and (failed.what, failed.code, failed.stdout) == ("failed", 500, b"trouble")
        assert await functions.call("another", b"") is None
        with pytest.raises(Refused) as told:
            await functions.call("greets", bytes(65_537))
        assert told.value.field == "body"


@needs_containers
async def test_it_listens_where_nobody_else_is(driver: ContainerDriver) -> None:
    async with function(driver, "alone", port=18_231) as functions:
        answer = await functions.call("alone", b"world")
        assert answer is not None and answer.stdout == b"hello world", "the control: it listens"
        with pytest.raises(aiohttp.ClientConnectorError):
            async with aiohttp.ClientSession() as session, session.get("http://127.0.0.1:18231/"):
                pass


@needs_containers
async def test_an_answer_is_bounded(driver: ContainerDriver) -> None:
    async with function(driver, "much", output=1000) as functions:
        answer = await functions.call("much", b"much")
        assert answer is not None and answer.cut and answer.stdout == b"y\n" * 500
        answer = await functions.call("much", b"after")
        assert answer is not None and answer.stdout == b"hello after"


@needs_containers
async def test_a_call_that_takes_too_long_ends_the_program_and_one_that_was_not_sent_does_not(driver: ContainerDriver) -> None:
    async with function(driver, "late") as functions:
        assert (await functions.call("late", b"x")) is not None

        async def ended() -> bool:
            """A call whose time is over before it was sent ends nothing; then comes another."""
            answer = await functions.call("late", b"slow", 0.3)
            assert answer is not None and answer.what == "timed out"
            return (await driver.status(Key("late", 1))).phase is Phase.ENDED

        await until(ended)
    async with function(driver, "deaf", LISTENS_NOT) as functions:
        answer = await functions.call("deaf", b"x", 0.2)
        assert answer is not None and answer.what == "timed out" and b"does not listen on port 8080" in answer.stderr
        assert (await driver.status(Key("deaf", 1))).phase is Phase.RUNNING


@needs_containers
async def test_a_program_that_dies_with_a_call_is_told(driver: ContainerDriver) -> None:
    async with function(driver, "dies", f"{SERVE} & wait") as functions:
        assert (await functions.call("dies", b"x")) is not None
        answer = await functions.call("dies", b"cut")
        assert answer is not None and answer.what == "crashed"


@needs_containers
async def test_turns_and_the_queue(driver: ContainerDriver) -> None:
    async with function(driver, "turns", concurrency=1, queue=1) as functions:
        assert (await functions.call("turns", b"x")) is not None
        first = asyncio.ensure_future(functions.call("turns", b"slow", 30.0))
        pool = functions._pools["turns"]
        await until(pool.turns.locked)
        second = await functions.call("turns", b"y", 0.1)
        assert second is not None and second.what == "timed out" and b"its turn" in second.stderr and not first.done(), "one that waits ends nobody"
        waits = asyncio.ensure_future(functions.call("turns", b"y", 30.0))
        await until(lambda: pool.waiting == 2)
        with pytest.raises(Refused) as told:
            await functions.call("turns", b"z")
        assert told.value.field == "calls"
        for task in (first, waits):
            task.cancel()
        await asyncio.gather(first, waits, return_exceptions=True)
        assert pool.waiting == 0 and not pool.turns.locked(), "a caller who goes away leaves nothing behind"


@needs_containers
async def test_no_thread_stays_in_a_containers_network(driver: ContainerDriver) -> None:
    own = os.readlink("/proc/self/ns/net")

    def elsewhere() -> list[str]:
        found = []
        for task in os.listdir("/proc/self/task"):
            with contextlib.suppress(OSError):  # it has ended meanwhile
                found += [task] * (os.readlink(f"/proc/self/task/{task}/ns/net") != own)
        return found

    async with function(driver, "enters") as functions:
        assert (await functions.call("enters", b"x")) is not None
        late = asyncio.ensure_future(functions.call("enters", b"slow"))
        await until(lambda: bool(elsewhere()))  # the control: it is seen
        late.cancel()
        await asyncio.gather(late, return_exceptions=True)
        await until(lambda: not elsewhere())
    with pytest.raises(OSError):
        function_container.enter(2**22 + 1)


@pytest.mark.parametrize(("spec", "named"), [
    ({"network": {}}, "spec.network"), ({"timeout_s": 0}, "spec.timeout_s"), ({"timeout_s": True}, "spec.timeout_s"), ({"port": 0}, "spec.port"), ({"port": 70_000}, "spec.port"), ({"concurrency": 0}, "spec.concurrency"),
    ({"queue": -1}, "spec.queue"), ({"output": 1 << 30}, "spec.output"), ({"path": "x"}, "spec.path"), ({"path": "/a b"}, "spec.path"), ({"path": "/" + "a" * 2000}, "spec.path"),
    ({"env": []}, "spec.env"), ({"env": {"PORT": "9"}}, "spec.env"),
])
def test_what_cannot_be_is_refused_by_name(spec: dict[str, Any], named: str) -> None:
    with pytest.raises(Refused) as told:
        container(spec)
    assert told.value.field == named


@given(st.dictionaries(st.sampled_from((*function_container.CALL_KEYS, "env", "network", "command")), st.one_of(st.none(), st.integers(), st.floats(), st.text(), st.lists(st.text()), st.dictionaries(st.text(), st.text()))))
def test_any_document_is_taken_or_refused(spec: dict[str, Any]) -> None:
    try:
        left = container(spec)
    except Refused:
        return
    assert not set(left) & set(function_container.CALL_KEYS) and left["env"]["PORT"] == str(calls(spec).port)
