"""Connections to the hub's API that ask for nothing: they do not keep others out, and do not stay."""

import asyncio
import contextlib
import shutil
import ssl
import urllib.request
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import pytest
from aiohttp import web

from hub.api import visitors as module
from hub.api.visitors import Visitors
from hub.server import Hub, HubSettings
from hub.tls import served

from .certificates import self_signed
from .waiting import until

pytestmark = pytest.mark.skipif(shutil.which("openssl") is None, reason="openssl is not installed (apt install openssl)")


class Slow:
    """A server of one page that is told when it may be answered."""

    def __init__(self) -> None:
        self.asked, self.answer = asyncio.Event(), asyncio.Event()

    async def page(self, _request: web.Request) -> web.StreamResponse:
        self.asked.set()
        await self.answer.wait()
        return web.Response(text="x" * 4_000_000)

    @contextlib.asynccontextmanager
    async def run(self, shown: ssl.SSLContext | None) -> AsyncIterator[tuple[Visitors, int]]:
        app = web.Application()
        app.router.add_get("/slow", self.page)
        app.router.add_get("/", lambda _request: web.Response(text="here"))
        runner = web.AppRunner(app, access_log=None)
        await runner.setup()
        assert runner.server is not None
        found = Visitors(runner.server, shown)
        port = await found.listen("127.0.0.1", 0)
        try:
            yield found, port
        finally:
            self.answer.set()  # a test that fails has to say so, not to wait for what it holds itself
            found.close()
            await runner.cleanup()


@pytest.fixture(params=[False, True], ids=["plain", "tls"])
def tls(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[ssl.SSLContext | None, ssl.SSLContext | None]:
    """By which the server shows itself, and by which one comes."""
    if not request.param:
        return None, None
    context = ssl.create_default_context()
    context.check_hostname, context.verify_mode = False, ssl.CERT_NONE
    return served(*map(str, self_signed(tmp_path, "hub"))), context


async def get(port: int, path: str, context: ssl.SSLContext | None) -> bytes:
    """All that it answers, read slowly at its end."""
    reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=context)
    writer.write(f"GET {path} HTTP/1.1\r\nHost: hub\r\nConnection: close\r\n\r\n".encode())
    try:
        return await reader.read(-1)
    finally:
        writer.close()


async def test_idle_ones_give_way_and_one_that_is_answered_does_not(tls: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VISITORS_MAX", 8)
    slow, idle = Slow(), []
    async with slow.run(tls[0]) as (found, port):
        asking = asyncio.create_task(get(port, "/slow", tls[1]))
        await asyncio.wait_for(slow.asked.wait(), 60)
        for number in range(40):
            _, writer = await asyncio.open_connection("127.0.0.1", port)
            writer.write(b"\x16\x03\x01" if tls[0] else b"GET / HTTP/1.1\r\nX: ")
            idle.append(writer)
            assert len(found) <= 8
            await until(lambda number=number: found.gave_way >= number - 6, what="it has been taken")
        assert (await get(port, "/", tls[1])).endswith(b"here"), "one who asks comes in"
        assert found.gave_way >= 33 and not asking.done()
        slow.answer.set()
        assert len(await asyncio.wait_for(asking, 60)) > 4_000_000
        for writer in idle:
            writer.close()


async def test_where_all_are_answered_no_more_come_in(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(module, "VISITORS_MAX", 2)
    slow = Slow()
    async with slow.run(None) as (found, port):
        asking = [asyncio.create_task(get(port, "/slow", None)) for _ in range(2)]
        await until(lambda: len(found) == 2 and all(one.busy for one in found._open), what="both are asked for")
        with contextlib.suppress(ConnectionError):
            assert await get(port, "/", None) == b""
        slow.answer.set()
        assert all(len(one) > 4_000_000 for one in await asyncio.gather(*asking))


async def test_one_that_asks_for_nothing_is_closed_and_one_that_did_may_wait(tls: tuple[Any, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    for name, value in (("FIRST_S", 0.2), ("HANDSHAKE_S", 0.2), ("SWEEP_S", 0.05)):
        monkeypatch.setattr(module, name, value)
    async with Slow().run(tls[0]) as (found, port):
        reader, writer = await asyncio.open_connection("127.0.0.1", port, ssl=tls[1])
        writer.write(b"GET / HTTP/1.1\r\nHost: hub\r\n\r\n")
        assert (await reader.readuntil(b"here")).startswith(b"HTTP/1.1 200")
        silent, stays = await asyncio.open_connection("127.0.0.1", port)
        stays.write(b"\x16\x03\x01" if tls[0] else b"GET / HTTP/1.1\r\nX: ")
        with contextlib.suppress(ConnectionError):
            assert await asyncio.wait_for(silent.read(), 60) in (b"", b"\x15\x03\x01\x00\x02\x02\x32")
        await until(lambda: len(found) == 1, what="only the one that asked is left")
        writer.write(b"GET / HTTP/1.1\r\nHost: hub\r\n\r\n")
        assert (await reader.readuntil(b"here")).startswith(b"HTTP/1.1 200")
        writer.close()
        await until(lambda: len(found) == 0, what="it has gone")


async def test_a_hub_answers_while_a_thousand_ask_for_nothing(tmp_path: Path) -> None:
    hub = Hub(HubSettings(tmp_path, broker="embedded", broker_port=0, port=0))
    await hub.start()
    idle = []
    try:
        for _ in range(1000):
            _, writer = await asyncio.open_connection("127.0.0.1", hub.port)
            idle.append(writer)
        assert hub.visitors is not None

        def asked() -> bytes:
            with urllib.request.urlopen(f"http://127.0.0.1:{hub.port}/healthz", timeout=30) as answer:
                return bytes(answer.read())

        assert b"ok" in await asyncio.to_thread(asked)
        assert len(hub.visitors) <= module.VISITORS_MAX and hub.visitors.gave_way >= 1000 - module.VISITORS_MAX
    finally:
        for writer in idle:
            writer.close()
        await hub.stop()


async def test_an_address_that_is_taken_is_named(tmp_path: Path) -> None:
    async with Slow().run(None) as (_, port):
        with pytest.raises(OSError, match=f"the API cannot listen on 127.0.0.1:{port}: Address already in use"):
            await Visitors(lambda: None, None).listen("127.0.0.1", port)
