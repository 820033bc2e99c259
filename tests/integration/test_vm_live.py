"""Real virtual machines that move while they run, from one driver to another. The guest is the witness: it says 0, 1, 2.., each number written to its disk and read back past its cache, so what both consoles say together is one sequence only
where memory, devices and disk went on from one moment, and nothing ran twice."""

import asyncio
import base64
import os
import zlib
from collections.abc import AsyncIterator, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from edge_runtime.workloads.drivers import vm_live, vm_seed
from edge_runtime.workloads.drivers.face import Ability, Failed, Key, Lives, Order, Phase, Refused
from edge_runtime.workloads.drivers.instance import held
from edge_runtime.workloads.drivers.vm import VmDriver
from edge_runtime.workloads.drivers.vm_machine import FIRMWARE
from edge_runtime.workloads.drivers.vm_probe import too_old

from .counting_guest import counted
from .disk_guest import WRITES, laid
from .live_side import Carried, live_qemu, needs_live
from .vm_side import BOOT_S, COUNTS, MEMORY, console, end_all, made_vms, reason_against, sample_store, started
from .waiting import until

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), needs_live, pytest.mark.timeout(600)]


class Pair:
    """Two drivers, as of two nodes, and what carries between them."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.store = folder, sample_store(folder)
        self.a, self.b = (made_vms(folder / name, self.store, qemu=(live_qemu(),)) for name in ("a", "b"))
        self.count = 0

    def ways(self) -> tuple[Path, Path]:
        """Folders of a move, at its source and its target."""
        self.count += 1
        return self.folder / f"out-{self.count}", self.folder / f"in-{self.count}"

    def end(self) -> None:
        for driver in (self.a, self.b):
            end_all(driver)
        self.store.close()


@pytest.fixture(scope="module")
def pair(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Pair]:
    made = Pair(tmp_path_factory.mktemp("live"))
    yield made
    made.end()


@pytest.fixture
async def clean(pair: Pair) -> AsyncIterator[Pair]:
    yield pair
    for driver in (pair.a, pair.b):
        for status in await driver.instances():
            await driver.delete(status.key)


async def offered(driver: VmDriver, key: Key) -> dict[str, object]:
    if driver.capabilities is None:
        await driver.probe()
    return dict(await driver.migrate_out(key))


async def order_there(pair: Pair, key: Key) -> Order:
    return Order(Key(key.id, key.epoch + 1), "kernel:1", {"memory": MEMORY}, pair.a.spec(key))


async def said(driver: VmDriver, key: Key) -> list[int]:
    text = (await driver.logs(key, 65_536)).stdout
    assert b"differs" not in text, text[-500:]
    return counted(text)


async def on(driver: VmDriver, key: Key, more: int) -> list[int]:
    """What it has said when it has gone on by so many numbers."""
    had = len(await said(driver, key))

    async def found() -> list[int]:
        now = await said(driver, key)
        return now if len(now) >= had + more else []

    return await until(found, BOOT_S, "it goes on")


async def test_it_goes_on_at_its_target_where_it_was(clean: Pair) -> None:
    a, b = clean.a, clean.b
    assert isinstance(a, Lives)
    key = await started(a, "goes", "kernel:1", COUNTS)
    await console(a, key, b"3", BOOT_S)
    offer, order, (out, into) = await offered(a, key), await order_there(clean, key), clean.ways()
    assert offer["live"] is True and a.capabilities is not None and a.capabilities.can(Ability.LIVE)
    await b.migrate_in(order, offer)
    await b.arrive(order, offer, into)
    await b.arrive(order, offer, into)  # as after an agent was killed
    assert b.waits(order.key) and (await b.status(order.key)).phase is Phase.PREPARED
    with pytest.raises(Refused, match="waits for what comes"):
        await b.start(order.key)
    carried = Carried(out, into)
    await a.leave(key, out, 0)
    before = len(await said(a, key))
    assert (await b.go(order.key)).phase is Phase.RUNNING and not b.waits(order.key)
    first, second = await said(a, key), await on(b, order.key, 5)
    numbers = [*first, *second]
    assert numbers == list(range(len(numbers))) and len(first) >= before
    assert (await a.status(key)).phase is Phase.PAUSED
    with pytest.raises(Failed, match="has left"):
        await a.resume(key)
    assert (await a.stop(key, 30.0)).phase is Phase.CHECKPOINTED  # killed, and not begun anew here
    await a.delete(key)
    assert await on(b, order.key, 2)
    carried.cut()


async def leaving(clean: Pair, name: str, script: str = COUNTS) -> tuple[Key, Order, Carried]:
    """A machine that runs at `a`, is waited for at `b`, and nearly all there."""
    key = await started(clean.a, name, "kernel:1", script)
    await console(clean.a, key, b"3" if script == COUNTS else b"laid", BOOT_S)
    offer, order, (out, into) = await offered(clean.a, key), await order_there(clean, key), clean.ways()
    await clean.b.arrive(order, offer, into)
    carried = Carried(out, into)
    await clean.a.leave(key, out, 0)
    return key, order, carried


async def goes_on(clean: Pair, key: Key) -> None:
    """It runs at `a` as if nothing had been, and could leave again."""
    await clean.a.stay(key)
    numbers = await on(clean.a, key, 5)
    assert numbers == list(range(len(numbers))) and (await clean.a.status(key)).phase is Phase.RUNNING
    assert not (clean.a.folder(key) / "left.json").exists()
    order, (out, into) = Order(Key(key.id, key.epoch + 2), "kernel:1", {"memory": MEMORY}, clean.a.spec(key)), clean.ways()
    await clean.b.arrive(order, await offered(clean.a, key), into)
    carried = Carried(out, into)
    await clean.a.leave(key, out, 0)
    await clean.b.go(order.key)
    numbers = [*await said(clean.a, key), *await on(clean.b, order.key, 3)]
    assert numbers == list(range(len(numbers)))
    carried.cut()


async def test_a_cut_before_its_target_lets_it_begin_leaves_it_running(clean: Pair) -> None:
    key, order, carried = await leaving(clean, "cut")
    carried.cut()
    await on(clean.a, key, 3)
    with pytest.raises(Refused, match="it did not come while it ran"):
        await clean.b.go(order.key)
    assert not clean.b.folder(order.key).exists()
    await goes_on(clean, key)


async def test_it_runs_until_its_target_may_begin_though_all_is_there(clean: Pair) -> None:
    """The hub's word may take seconds."""
    key, order, carried = await leaving(clean, "early")
    await on(clean.a, key, 40)
    await clean.b.go(order.key)
    numbers = [*await said(clean.a, key), *await on(clean.b, order.key, 3)]
    assert numbers == list(range(len(numbers)))
    carried.cut()


async def test_one_whose_target_goes_before_it_can_begin_goes_on(clean: Pair) -> None:
    key, order, carried = await leaving(clean, "gone")
    await clean.b.delete(order.key)
    assert not clean.b.folder(order.key).exists()
    with pytest.raises(Refused, match="nothing waits here"):
        await clean.b.go(order.key)
    await goes_on(clean, key)
    carried.cut()


async def test_what_says_that_it_left_and_was_not_heard_stands_still_until_it_is_told(clean: Pair, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last word is lost, and nobody can tell it from one that was heard: it goes on nowhere before somebody knows."""
    key, order, carried = await leaving(clean, "unheard")
    carried.swallow(b"over ")
    with pytest.raises(Refused, match="has gone before all of it was here"):
        await clean.b.go(order.key)
    await until((clean.a.folder(key) / "paused").exists, what="it has left")
    assert (await clean.a.status(key)).phase is Phase.PAUSED and not clean.b.folder(order.key).exists()
    with pytest.raises(Failed, match="has left"):
        await clean.a.resume(key)
    await goes_on(clean, key)


async def test_it_does_not_begin_before_its_source_has_said_that_it_stands_still(clean: Pair) -> None:
    """All of it is there; its source's word is late."""
    key, order, carried = await leaving(clean, "late")
    carried.swallow(b"over ", cuts=False)
    going = asyncio.ensure_future(clean.b.go(order.key))
    await until(carried.swallowed.is_set, what="its source has said it")
    with suppress(TimeoutError):
        await asyncio.wait_for(asyncio.shield(going), 2.0)  # there is no event for what does not happen: it would begin at once
    assert not going.done() and clean.b.waits(order.key)
    carried.cut()
    with pytest.raises(Refused):
        await going
    await goes_on(clean, key)


async def test_one_that_is_killed_while_only_the_hub_knows_whose_it_is_does_not_begin_anew(clean: Pair) -> None:
    key, order, carried = await leaving(clean, "killed")
    carried.swallow(b"over ")
    with pytest.raises(Refused):
        await clean.b.go(order.key)
    await clean.a.kill(key)
    assert (await clean.a.status(key)).phase is Phase.CHECKPOINTED
    await clean.a.stay(key)
    assert (await clean.a.status(key)).phase is Phase.ENDED


async def test_whoever_asked_and_has_gone_has_it_stay(clean: Pair) -> None:
    a, b = clean.a, clean.b
    key = await started(a, "asker", "kernel:1", COUNTS)
    await console(a, key, b"3", BOOT_S)
    offer, order, (out, into) = await offered(a, key), await order_there(clean, key), clean.ways()
    await b.arrive(order, offer, into)
    carried = Carried(out, into)
    asked = asyncio.ensure_future(a.leave(key, out, 20_000))  # so slow that it is never nearly there
    await until(lambda: carried.bytes["disk"] > 0, what="its disk is being copied")
    asked.cancel()
    await asyncio.gather(asked, return_exceptions=True)
    await until(lambda: not held(b.folder(order.key)), what="what waited has ended")
    await b.delete(order.key)
    await goes_on(clean, key)


async def test_what_it_wrote_while_it_left_is_there_as_it_was(clean: Pair) -> None:
    """A guest that writes all the time, to memory and disk, and compares the two past its cache."""
    a, b = clean.a, clean.b
    key = await started(a, "writes", "kernel:1", WRITES)
    await console(a, key, b"laid", BOOT_S)
    offer, order, (out, into) = await offered(a, key), await order_there(clean, key), clean.ways()
    await b.arrive(order, offer, into)
    carried = Carried(out, into)
    await a.leave(key, out, 125_000_000)
    await b.go(order.key)
    first = laid((await a.logs(key, 65_536)).stdout)
    text = await console(b, order.key, f"\n{len(first) + 4}".encode(), BOOT_S)
    numbers = [*first, *laid(text)]
    assert numbers == list(range(len(numbers))), numbers
    carried.cut()


async def test_it_runs_while_its_target_has_not_said_a_word(clean: Pair) -> None:
    """QEMU would wait for that with all that it does."""
    a, b = clean.a, clean.b
    key = await started(a, "silent", "kernel:1", COUNTS)
    await console(a, key, b"3", BOOT_S)
    offer, order, (out, into) = await offered(a, key), await order_there(clean, key), clean.ways()
    await b.arrive(order, offer, into)
    carried = Carried(out, into, ("disk",))
    asked = asyncio.ensure_future(a.leave(key, out, 0))
    await on(a, key, 10)
    assert not asked.done()
    carried.cut()
    with pytest.raises(Failed, match="has gone|no place for its disk"):
        await asked
    await b.delete(order.key)
    await goes_on(clean, key)


@pytest.mark.slow
@pytest.mark.parametrize("frozen", ["disk", "memory"])
async def test_a_link_that_freezes_when_its_target_may_begin_does_not_end_it(clean: Pair, frozen: str) -> None:
    """QEMU answers nobody while it waits for what it had sent; it is let go, and it goes on."""
    key, order, carried = await leaving(clean, f"freezes-{frozen}", WRITES)
    carried.freeze(frozen)
    going = asyncio.ensure_future(clean.b.go(order.key))
    await until((clean.a.folder(key) / "left.json").exists, BOOT_S, "it may begin")
    await until(lambda: not held(clean.b.folder(order.key)), 200.0, "its target gives up")
    with pytest.raises(Refused):
        await going
    await clean.a.stay(key)
    had = laid((await clean.a.logs(key, 65_536)).stdout)
    await console(clean.a, key, f"\n{len(had) + 3}".encode(), BOOT_S)
    assert (await clean.a.status(key)).phase is Phase.RUNNING
    carried.cut()


async def test_what_its_keeper_cannot_open_does_not_end_it(clean: Pair) -> None:
    key = await started(clean.a, "opens", "kernel:1", COUNTS)
    await console(clean.a, key, b"3", BOOT_S)
    for asked in ({"do": "copy", "path": "/nowhere/disk"}, {"do": "leave", "folder": "/nowhere", "speed": 0}):
        with pytest.raises(Failed, match="No such file"):
            await clean.a.ask(key, asked)
    await on(clean.a, key, 2)


async def test_an_emulated_machine_of_an_old_qemu_is_not_sent_while_it_runs() -> None:
    assert "loses writes" in too_old("7.2.22") and not too_old("10.0.2") and too_old("")


def test_a_second_disk_that_is_none_is_refused() -> None:
    good = vm_seed.seed(vm_seed.files("x", "x", {}))
    offer = {"seed": base64.b64encode(zlib.compress(good, 9)).decode()}
    assert vm_live.seed_of(offer) == good
    for bad in ({}, {"seed": "%"}, {"seed": base64.b64encode(zlib.compress(good + b"x")).decode()}, {"seed": base64.b64encode(zlib.compress(bytes(64 << 20))).decode()}, {"seed": base64.b64encode(b"x").decode()}):
        with pytest.raises(Refused, match="second disk"):
            vm_live.seed_of(bad)


@pytest.mark.skipif(not all(map(os.path.exists, FIRMWARE)), reason="OVMF is not installed (as root: apt install ovmf)")
async def test_the_variables_of_uefi_go_along(clean: Pair) -> None:
    a, b = clean.a, clean.b
    key = await started(a, "uefi", "blank:1", boot="uefi")
    await console(a, key, b"BdsDxe", BOOT_S)
    offer, order, (out, into) = await offered(a, key), Order(Key("uefi", 2), "blank:1", {"memory": MEMORY}, a.spec(key)), clean.ways()
    await b.migrate_in(order, offer)
    await b.arrive(order, offer, into)
    begins_with = (b.folder(order.key) / "variables.fd").read_bytes()
    carried = Carried(out, into)
    await a.leave(key, out, 0)
    await b.go(order.key)
    had = (a.folder(key) / "variables.fd").read_bytes()
    assert had != begins_with, "its firmware writes some at its first start"
    await until(lambda: (b.folder(order.key) / "variables.fd").read_bytes() == had, what="the same variables")
    carried.cut()
