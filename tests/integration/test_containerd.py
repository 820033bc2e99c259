"""The driver of containers under containerd, with a containerd of its own: the tests of the direct driver (`test_containers` and others) as they stand, and what is containerd's alone."""

import asyncio
import json
import os
import shutil
import signal
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import cgroups, lease
from edge_runtime.workloads.drivers.container_laying import FIRST_ID
from edge_runtime.workloads.drivers.face import Ability, Failed, Key, Order, Phase, Refused
from edge_runtime.workloads.drivers.instance import held
from edge_runtime.workloads.drivers.programs import searched
from tools.escape.attempts import ATTEMPTS
from tools.escape.program import program

from .container_side import end_all, layer, made_store, started
from .containerd_side import Containerd, answers, containerd, driver, made_driver, reason_against, running
from .test_container_disk import test_one_that_writes_more_than_it_asked_for_is_ended_and_says_why
from .test_container_leases import now_ms, prepared
from .test_container_network import (
    connected,
    test_a_port_that_is_taken_is_told_and_nothing_is_left,
    test_a_published_port_answers_on_the_node_until_the_container_ends,
    test_what_a_container_sees_of_its_network,
)
from .test_containers import (
    is_gone,
    keeper_of,
    test_a_life_from_prepare_to_delete,
    test_a_program_that_is_not_there_is_told_and_leaves_nothing_running,
    test_a_root_that_cannot_be_written,
    test_another_user_has_no_capability,
    test_commands_in_it,
    test_it_is_asked_to_end_and_then_killed,
    test_its_root_is_nobody_on_the_host_and_its_priority_is_ordinary,
    test_many_at_once,
    test_mounts,
    test_output_stays_within_its_limit,
    test_pause_stops_all_of_it_and_stop_ends_a_paused_one,
    test_what_a_container_sees_and_may,
    test_what_cannot_be_is_refused_before_anything_is_touched,
)
from .test_isolation import MACHINE, attempted, holes, platform
from .test_snapshots import (
    test_a_snapshot_has_what_was_changed_with_its_owners_and_the_container_goes_on,
    test_one_that_is_paused_stays_so_and_one_that_has_ended_is_copied,
    test_one_whose_copy_fails_or_is_given_up_goes_on,
)
from .waiting import until

__all__ = [
    "connected",
    "containerd",
    "driver",
    "test_a_life_from_prepare_to_delete",
    "test_a_port_that_is_taken_is_told_and_nothing_is_left",
    "test_a_program_that_is_not_there_is_told_and_leaves_nothing_running",
    "test_a_published_port_answers_on_the_node_until_the_container_ends",
    "test_a_root_that_cannot_be_written",
    "test_a_snapshot_has_what_was_changed_with_its_owners_and_the_container_goes_on",
    "test_another_user_has_no_capability",
    "test_commands_in_it",
    "test_it_is_asked_to_end_and_then_killed",
    "test_its_root_is_nobody_on_the_host_and_its_priority_is_ordinary",
    "test_many_at_once",
    "test_mounts",
    "test_one_that_is_paused_stays_so_and_one_that_has_ended_is_copied",
    "test_one_that_writes_more_than_it_asked_for_is_ended_and_says_why",
    "test_one_whose_copy_fails_or_is_given_up_goes_on",
    "test_output_stays_within_its_limit",
    "test_pause_stops_all_of_it_and_stop_ends_a_paused_one",
    "test_what_a_container_sees_and_may",
    "test_what_a_container_sees_of_its_network",
    "test_what_cannot_be_is_refused_before_anything_is_touched",
]

pytestmark = [pytest.mark.skipif(bool(reason_against()), reason=reason_against()), pytest.mark.timeout(600)]

FOREVER = "trap 'exit 7' TERM; echo up; while :; do sleep 0.05; done"
WAIT_S = 250.0
"""An upper bound for what is awaited here."""


class Killed(BaseException):
    """Nothing in the agent goes on after it."""


async def says(driver: Any, key: Key, word: bytes, times: int = 1) -> bool:
    return (await driver.logs(key, 65_536)).stdout.count(word) >= times


async def test_the_probe_runs_a_container_and_tells_what_can_be_done(driver: Any) -> None:
    told = await driver.probe()
    assert told.usable and told.driver == "containerd" and told.kind == "container" and told.runtime.startswith("containerd ") and "io.containerd.runc.v2" in told.runtime
    assert {"start", "stop", "adopt", "pause", "stats", "logs", "exec", "snapshot", "limits", "seccomp"} <= set(told.to_json()["can"])
    for ability in (Ability.CHECKPOINT, Ability.RESTORE):
        with pytest.raises(Refused, match="only the driver that runs runc directly"):
            driver.demand(ability)
    assert await driver.instances() == []


@pytest.mark.skipif(platform.machine() != MACHINE, reason=f"the attempts' program is made for {MACHINE} only")
async def test_a_container_refuses_every_attempt_to_escape(containerd: Containerd, tmp_path: Path) -> None:
    store = made_store(tmp_path, [layer([("file", "attempts", program(ATTEMPTS))])])
    escaping = made_driver(tmp_path, store, containerd)
    assert (await escaping.probe()).can(Ability.SECCOMP)
    assert holes(await attempted(escaping, "attempts")) == {}
    strict = escaping._ways
    escaping._ways = type(strict)(strict.runtime, strict.users, False)
    assert "a user namespace" in holes(await attempted(escaping, "weaker")), "the control: without the filter that is let through"
    escaping.close()
    store.close()


async def test_containerd_has_it_under_our_name_and_with_the_direct_drivers_ids_apart(driver: Any, containerd: Containerd) -> None:
    key = await started(driver, "mine:1", FOREVER)
    if (await driver.probe()).can(Ability.USER_NAMESPACE):
        assert os.stat(f"/proc/{(await driver.status(key)).pid}").st_uid >= FIRST_ID + 513 * 65_536
    assert not Path(f"/run/novacron/layers/{driver._id(key)}").exists(), "the layers' own mounts are gone when the root is put together"
    (shim,) = containerd.shims()
    words = Path(f"/proc/{shim}/cmdline").read_bytes().split(b"\0")
    assert words[words.index(b"-namespace") + 1] == b"novacron"
    await driver.delete(key)
    await until(lambda: not containerd.shims(), WAIT_S)


async def test_a_killed_keeper_is_replaced_and_nothing_is_lost(driver: Any) -> None:
    key = await started(driver, "cared-for", "trap 'exit 7' TERM; i=0; while :; do echo line $i; i=$((i+1)); sleep 0.02; done")
    waiting = asyncio.ensure_future(driver.wait(key))
    await until(lambda: says(driver, key, b"line", 3), WAIT_S)
    first = keeper_of(driver, key)
    await is_gone(first, signal.SIGKILL)
    await until(lambda: keeper_of(driver, key) != first and held(driver._path(key)), WAIT_S)
    lines = (await driver.logs(key, 65_536)).stdout.count(b"line")
    await until(lambda: says(driver, key, b"line", lines + 3), WAIT_S)
    assert (await driver.stop(key, WAIT_S)).exit.code == 7 and (await waiting).exit.code == 7
    told = (await driver.logs(key, 65_536)).stdout.decode().splitlines()
    assert told == [f"line {number}" for number in range(len(told))], "what it wrote meanwhile waited in the pipe"
    await driver.delete(key)


async def test_another_agent_takes_over_and_learns_how_it_ended(driver: Any) -> None:
    """As after kill -9: the next one has nothing but the disk and containerd. One that ended meanwhile, one that runs, one that nobody's folder names any more."""
    ended, runs, lost = [await started(driver, name, FOREVER) for name in ("ended", "runs", "lost")]
    await until(lambda: says(driver, runs, b"up"), WAIT_S)
    next_one = type(driver)(driver._folder.parent.parent, driver._store, driver._settings, path=driver._client.path)
    before = await driver.status(runs)
    await is_gone((await driver.status(ended)).pid, signal.SIGKILL)
    orphan = (await driver.status(lost)).pid
    shutil.rmtree(driver._path(lost))
    await next_one.probe()
    assert {status.key: status.phase for status in await next_one.instances()} == {ended: Phase.ENDED, runs: Phase.RUNNING}
    assert (await next_one.status(ended)).exit.signal == signal.SIGKILL
    assert await next_one.start(runs) == before, "it is not started twice"
    await is_gone(orphan)
    assert (await next_one.stop(runs, WAIT_S)).exit.code == 7
    for key in (ended, runs):
        await next_one.delete(key)
    next_one.close()


async def test_an_agent_that_was_killed_before_the_start_has_it_started_by_the_next(driver: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is there, and the program does not run yet: that is the moment between two calls."""
    from edge_runtime.workloads.drivers import containerd_wire

    key = Key("between", 1)
    await driver.prepare(Order(key, "box:1", {}, {"command": ["sh", "-c", "echo ran; " + FOREVER]}))
    real = driver._client.call

    async def killed(method: Any, *args: Any, **more: Any) -> Any:
        if method is containerd_wire.START:
            raise Killed
        return await real(method, *args, **more)

    monkeypatch.setattr(driver._client, "call", killed)
    with pytest.raises(Killed):
        await driver.start(key)
    monkeypatch.undo()
    assert (await driver.status(key)).phase is Phase.RUNNING and (await driver.logs(key, 100)).stdout == b""
    next_one = type(driver)(driver._folder.parent.parent, driver._store, driver._settings, path=driver._client.path)
    await next_one.probe()
    await until(lambda: says(next_one, key, b"up"), WAIT_S)
    assert (await next_one.stop(key, WAIT_S)).exit.code == 7 and (await next_one.logs(key, 100)).stdout.count(b"ran") == 1
    await next_one.delete(key)
    next_one.close()


async def test_memory_processes_and_processor_are_limited(driver: Any) -> None:
    hungry = await started(driver, "hungry", "exec busybox tail /dev/zero", limits={"memory": "24Mi"})
    assert (await driver.wait(hungry)).exit.out_of_memory
    mourns = await started(driver, "mourns", "busybox tail /dev/zero; exit 6", limits={"memory": "24Mi"})
    ended = (await driver.wait(mourns)).exit
    assert ended.code == 6 and not ended.out_of_memory and ended.memory_kills > 0
    key = await started(driver, "forks", "sh -c 'while :; do sleep 60 & done'; exec sleep 60", limits={"pids": 16, "cpu": "200m"}, requests={"memory": 32 << 20, "cpu": 500})

    async def refused() -> bool:
        return b"fork" in (await driver.logs(key, 4096)).stderr

    await until(refused, WAIT_S)
    told, groups = await driver.stats(key), cgroups.read()
    assert 12 < told.processes <= 16 and 0 < told.memory_bytes <= 32 << 20 and told.cpu_ns > 0
    assert groups.memory_limit(driver.group(key)) == 32 << 20
    quota = Path(groups.unified + driver.group(key), "cpu.max") if groups.layout == "v2" else Path(groups.mounts["cpu"] + driver.group(key), "cpu.cfs_quota_us")
    assert quota.read_text().split()[0] == "20000"
    for one in (hungry, key):
        await driver.delete(one)
        assert not any(os.path.exists(folder) for folder in groups.folders(driver.group(one)))


async def test_its_keeper_ends_it_when_its_lease_is_over_and_it_does_not_begin_without_one(driver: Any) -> None:
    key, other = await prepared(driver, "short", now_ms() + 3_600_000), await prepared(driver, "long", now_ms() + 3_600_000)
    for one in (key, other):
        assert (await driver.start(one)).phase is Phase.RUNNING
    driver.renew(key, now_ms() - 1)
    ended = await driver.wait(key)
    assert ended.phase is Phase.LOST and ended.leased and "still this node's" in ended.reason
    assert (await driver.status(other)).phase is Phase.RUNNING and driver.lease_ms(other) > now_ms(), "the control: the other one's is not over"
    late = await prepared(driver, "late", now_ms() - 1)
    assert (await driver.start(late)).phase is Phase.LOST
    for one in (key, other, late):
        await driver.delete(one)
        lease.remove(driver._leased(one))


async def test_a_command_that_is_not_there_is_told_and_leaves_nothing(driver: Any) -> None:
    key = await started(driver, "without", FOREVER)
    with pytest.raises(Failed, match="no-such-command"):
        await driver.exec(key, ["no-such-command"], 30.0)
    assert not list(driver._path(key).glob("exec-*")) and (await driver.exec(key, ["true"], 30.0)).exit.code == 0
    await driver.delete(key)


@pytest.mark.slow  # on a machine with twenty processes for each processor a start of containerd takes minutes
async def test_containerd_is_killed_and_comes_back(tmp_path: Path) -> None:
    with running_here() as one:
        await answers(one)
        store = made_store(tmp_path)
        driver = made_driver(tmp_path, store, one)
        assert (await driver.probe()).usable
        runs, ends = await started(driver, "away-runs", FOREVER), await started(driver, "away-ends", "trap 'exit 5' TERM; echo up; while :; do sleep 0.05; done")
        for key in (runs, ends):
            await until(lambda key=key: says(driver, key, b"up"), WAIT_S)
        pid = (await driver.status(ends)).pid
        one.end(signal.SIGKILL)
        assert (await driver.status(runs)).phase is Phase.RUNNING and Path(f"/proc/{(await driver.status(runs)).pid}").exists()
        await driver.prepare(Order(Key("away-new", 1), "box:1", {}, {"command": ["true"]}))
        for what in (driver.stop(runs, 1.0), driver.start(Key("away-new", 1)), driver.pause(runs), driver.exec(runs, ["true"], 30.0), driver.delete(runs)):
            with pytest.raises(Failed, match="containerd: does not answer at .*; start it"):
                await what
        os.kill(pid, signal.SIGTERM)
        await is_gone(pid)
        assert "when containerd is back" in (await driver.status(ends)).reason, "nobody knows it yet"
        waiting = asyncio.ensure_future(driver.wait(ends))
        one.start()
        await answers(one)
        assert (await waiting).exit.code == 5, "the shim has kept it"
        assert (await driver.stop(runs, WAIT_S)).exit.code == 7
        for key in (runs, ends, Key("away-new", 1)):
            await driver.delete(key)
        assert await driver.instances() == []
        driver.close()
        store.close()


def running_here() -> Any:
    """`running` within a loop: without waiting for its answer."""
    from contextlib import contextmanager

    @contextmanager
    def run() -> Any:
        one = Containerd()
        try:
            one.start()
            yield one
        finally:
            one.remove()

    return run()


async def test_a_shim_that_was_killed_takes_its_container_with_it_and_that_is_told(driver: Any, containerd: Containerd) -> None:
    key = await started(driver, "orphaned", FOREVER)
    waiting = asyncio.ensure_future(driver.wait(key))
    (shim,) = containerd.shims()
    os.kill(shim, signal.SIGKILL)
    status = await asyncio.wait_for(waiting, WAIT_S)
    assert status.phase in (Phase.LOST, Phase.ENDED) and (status.phase is Phase.LOST or status.exit.signal == signal.SIGKILL), status
    await driver.delete(key)


async def test_without_containerd_or_its_shim_it_is_refused_with_the_reason(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from edge_runtime.workloads.drivers import containerd_probe
    from edge_runtime.workloads.drivers.containerd import ContainerdDriver

    store = made_store(tmp_path)
    driver = ContainerdDriver(tmp_path, store, path=str(tmp_path / "no.sock"))
    told = await driver.probe()
    assert not told.usable and "does not answer at" in told.cannot[Ability.START] and "start it" in told.cannot[Ability.START]
    with pytest.raises(Refused, match="cannot do this here"):
        await driver.prepare(Order(Key("a", 1), "box:1"))
    monkeypatch.setattr(containerd_probe, "searched", lambda name: None)
    assert "containerd-shim-runc-v2 is not installed (as root: apt install containerd)" in (await driver.probe()).cannot[Ability.START]
    driver.close()
    store.close()


async def test_kata_is_refused_where_it_is_not_installed(tmp_path: Path, containerd: Containerd) -> None:
    from edge_runtime.workloads.drivers.containerd import KATA

    if searched(KATA.shim) is not None:
        pytest.skip("Kata's shim is installed here")
    store = made_store(tmp_path)
    driver = made_driver(tmp_path, store, containerd, handler=KATA)
    told = await driver.probe()
    assert not told.usable and told.driver == "kata" and "containerd-shim-kata-v2 is not installed (Debian has no package of it" in told.cannot[Ability.START]
    driver.close()
    store.close()


@pytest.mark.parametrize("shim", ["runc under another name", "no shim at all"])
def test_a_shim_that_only_bears_katas_name_is_refused(shim: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The control of the probe: a container starts and runs, and is on the node's own kernel."""
    from edge_runtime.workloads.drivers.containerd import KATA

    programs = tmp_path / "bin"
    programs.mkdir()
    if shim == "no shim at all":
        (programs / KATA.shim).write_text("#!/bin/sh\nexit 1\n")
        (programs / KATA.shim).chmod(0o755)
    else:
        (programs / KATA.shim).symlink_to(str(searched("containerd-shim-runc-v2")))
    monkeypatch.setenv("PATH", f"{programs}:{os.environ['PATH']}")
    store = made_store(tmp_path)
    with running(str(programs)) as one:
        driver = made_driver(tmp_path, store, one, handler=KATA)
        told = asyncio.run(driver.probe())
        reason = told.cannot[Ability.START]
        assert not told.usable
        assert ("runs on this node's own kernel: it does not isolate" in reason) == (shim != "no shim at all"), reason
        assert asyncio.run(driver.instances()) == [] and one.shims() == []
        end_all(driver)
    store.close()


def test_the_probes_program_for_kata_tells_the_boot_of_the_kernel_that_it_runs_on(tmp_path: Path) -> None:
    import subprocess

    from edge_runtime.workloads.drivers.probe_program import teller

    code = teller(platform.machine())
    if code is None:
        pytest.skip(f"there is no such program for {platform.machine()}")
    (tmp_path / "teller").write_bytes(code)
    (tmp_path / "teller").chmod(0o755)
    with subprocess.Popen([str(tmp_path / "teller")], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        said = process.stdout.readline()
        process.kill()
    assert said.decode().strip() == Path("/proc/sys/kernel/random/boot_id").read_text().strip()
    assert json.loads(json.dumps(teller("riscv64"))) is None
