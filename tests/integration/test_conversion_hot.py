"""A hot conversion with a client that goes on asking over one connection, and what stands against one: refused while the container runs on, as if nobody had asked."""

import asyncio
import os
import signal
import socket
from typing import Any

import pytest

from edge_runtime.workloads.conversion import hot
from edge_runtime.workloads.conversion.host import Settings as HostSettings
from edge_runtime.workloads.drivers import keeper_restore
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_laying import Settings
from edge_runtime.workloads.drivers.face import Failed, Key, Order, Phase, Refused
from edge_runtime.workloads.drivers.programs import searched
from edge_runtime.workloads.images import ImageStore, Limits
from tests.integration.checkpoint_side import program, reason_against_checkpoints
from tests.integration.container_side import end_all, made_store
from tests.integration.microvm_side import kernel_folder, reason_against
from tests.integration.waiting import until
from tools.bench.container_start import layout_of
from tools.bench.convert import Client
from tools.bench.convert_program import PYTHON, SERVICE, files
from tools.bench.harness import free_port

REASON = reason_against_checkpoints() or reason_against()

pytestmark = [pytest.mark.skipif(bool(REASON), reason=REASON), pytest.mark.timeout(600)]

PATIENCE_S = 120.0
"""For one answer out of a guest under emulation, on a busy machine."""


@pytest.fixture(scope="module")
def side(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A driver and conversions for all tests here; what they leave is ended."""
    folder = tmp_path_factory.mktemp("hot")
    made_store(folder).close()
    store = ImageStore(folder / "images", limits=Limits(keep_free=0))
    driver = ContainerDriver(folder, store, Settings(criu=program()))
    conversions = hot.Conversions(folder, driver, store, HostSettings(kernel=kernel_folder()))
    yield driver, conversions, store, folder

    async def end() -> None:
        for one in conversions.all():
            await conversions.delete(one.order.key)

    asyncio.run(end())
    end_all(driver)
    store.close()


async def begun(conversions: hot.Conversions, name: str, script: str, **more: Any) -> Key:
    key = Key(f"{name}-{os.getpid()}", 1)
    await conversions.prepare(Order(key, "box:1", {"disk": 64 << 20}, {"command": ["sh", "-c", script], "limits": {"memory": "32Mi"}, **more}))
    await conversions.start(key)
    return key


@pytest.mark.skipif(searched("slirp4netns") is None, reason="no slirp4netns (as root: apt install slirp4netns)")
async def test_a_service_goes_into_a_guest_and_back_with_its_memory_and_the_connection_of_its_client(side: Any) -> None:
    driver, conversions, store, folder = side
    try:
        parts = files()
    except OSError as error:
        pytest.skip(f"no Python of the system's own ({error})")
    store.add(layout_of(folder / "service", parts), "service:1")
    key, port = Key(f"service-{os.getpid()}", 1), free_port()
    spec = {"command": [PYTHON, "-S", "-c", SERVICE], "limits": {"memory": "64Mi"}, "network": {"ports": [{"port": 80, "host_port": port}]}}
    await conversions.prepare(Order(key, "service:1", {"disk": 64 << 20}, spec))
    await conversions.start(key)

    async def ready() -> bool:
        return b"ready" in (await conversions.logs(key, 4096)).stdout

    await until(ready, PATIENCE_S)
    line = await asyncio.to_thread(socket.create_connection, ("127.0.0.1", port), PATIENCE_S)
    client = Client(line, 0)
    digest, kernels, clock = client.ask("digest"), [client.ask("kernel")], float(client.ask("clock"))
    for to in ("microvm", "container"):
        client.start()
        assert (await conversions.convert(key, to)).phase is Phase.RUNNING
        seen = len(client.waits)
        await until(lambda: len(client.waits) > seen + 2 or client.problem, PATIENCE_S)  # noqa: B023
        client.stop.set()
        await asyncio.to_thread(client.join, PATIENCE_S)
        assert not client.problem and not client.is_alive(), client.problem
        client = Client(line, client.answered)
        assert await asyncio.to_thread(client.ask, "digest") == digest
        kernels.append(await asyncio.to_thread(client.ask, "kernel"))
        later = float(await asyncio.to_thread(client.ask, "clock"))
        assert 0 < later - clock < 600  # one clock, in both forms
        clock = later
    assert not client.problem, client.problem
    assert kernels[0] == kernels[2] == os.uname().release and kernels[1] != kernels[0]
    line.close()
    await conversions.delete(key)
    assert not conversions.segment(key).lives


async def test_what_stands_against_it_is_named_and_nothing_is_touched(side: Any) -> None:
    driver, conversions, _, _ = side
    with pytest.raises(Refused, match="a folder of the node"):
        await begun(conversions, "mount", "sleep 1000", mounts=[{"target": "/data", "source": "/srv"}])
    key = await begun(conversions, "stays", "sleep 1000 & wait")
    try:
        assert (await conversions.check(key))["processes"] >= 1
        with pytest.raises(Refused, match="none of container, microvm"):
            await conversions.convert(key, "vm")
        await until(lambda: len(conversions._processes(key)) == 2)
        pid = next(pid for pid, one in conversions._processes(key).items() if one["pid"] != 1)
        os.kill(pid, signal.SIGSTOP)
        await until(lambda: conversions._processes(key)[pid]["stopped"])
        with pytest.raises(Refused, match="stopped by a signal"):
            await conversions.convert(key, "microvm")
        os.kill(pid, signal.SIGCONT)
        await until(lambda: not conversions._processes(key)[pid]["stopped"])
        assert conversions.workload(key).step == "" and (await conversions.status(key)).phase is Phase.RUNNING
    finally:
        await conversions.delete(key)


async def test_a_program_that_was_not_kept_from_its_processor_is_refused(side: Any) -> None:
    driver, conversions, _, _ = side
    await driver.probe()
    if not set(driver.capabilities.cpu_flags) - set(await conversions.host.flags()):
        pytest.skip("a guest's processor lacks nothing here")
    key = await begun(conversions, "bare", "env -i sleep 1000 & wait")
    try:
        await until(lambda: len(conversions._processes(key)) == 2)
        with pytest.raises(Refused, match=r"resource\.processor"):
            await conversions.convert(key, "microvm")
        assert (await conversions.status(key)).phase is Phase.RUNNING
    finally:
        await conversions.delete(key)


async def test_a_state_that_cannot_be_taken_leaves_it_a_container(side: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Planted: the guest has another number of processes than there were."""
    _, conversions, _, _ = side
    key = await begun(conversions, "odd", "i=0; while true; do echo $i; i=$((i+1)); sleep 0.1; done")
    try:
        processes = keeper_restore.processes

        def more(group: str) -> dict[int, Any]:
            found = processes(group)
            return {pid: {**one, "threads": one["threads"] + 1} for pid, one in found.items()}

        monkeypatch.setattr(keeper_restore, "processes", more)
        with pytest.raises(Failed, match="not what was there"):
            await conversions.convert(key, "microvm")
        monkeypatch.undo()
        now = conversions.workload(key)
        assert (now.form, now.step) == ("container", "") and "not what was there" in now.problem and not conversions.guest(key).lives
        seen = len((await conversions.logs(key, 1 << 20)).stdout.split())

        async def grown() -> bool:
            return len((await conversions.logs(key, 1 << 20)).stdout.split()) > seen

        await until(grown, PATIENCE_S)
        said = [int(word) for word in (await conversions.logs(key, 1 << 20)).stdout.split()]
        assert said == list(range(len(said)))
        await conversions.convert(key, "microvm")  # what was in the way is gone
        ended = await conversions.stop(key, 1.0)  # the first process of a namespace ignores what it has no handler for
        assert ended.phase is Phase.ENDED and not conversions.guest(key).lives, ended
    finally:
        await conversions.delete(key)
