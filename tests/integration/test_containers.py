"""The container driver with real containers: what they may, what they may not, and how their lives are told."""

import asyncio
import fcntl
import json
import os
import re
import signal
import struct
import subprocess
import termios
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.system.process import TURN_NS, prefer, short_turns
from edge_runtime.workloads.drivers import cgroups
from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_laying import FIRST_ID, Ways
from edge_runtime.workloads.drivers.face import Ability, Failed, Key, Order, Phase, Refused
from edge_runtime.workloads.drivers.instance import held, readable
from edge_runtime.workloads.drivers.keeping import ordinary_turns
from edge_runtime.workloads.drivers.programs import searched

from .container_side import driver, made_driver, made_store, output, reason_against, started
from .waiting import until

__all__ = ["driver"]

pytestmark = pytest.mark.skipif(bool(reason_against()), reason=reason_against())


async def test_the_probe_runs_a_container_and_tells_what_can_be_done(driver: ContainerDriver) -> None:
    told = await driver.probe()
    assert told.usable and told.runtime.startswith("runc") and told.cgroup in ("v1", "v2", "hybrid") and told.cpu_flags
    assert {"start", "stop", "pause", "exec", "snapshot", "limits", "seccomp"} <= set(told.to_json()["can"])
    with pytest.raises(Refused, match="no code for it yet"):
        told.demand(Ability.LAZY)
    assert await driver.instances() == []


async def test_a_life_from_prepare_to_delete(driver: ContainerDriver) -> None:
    key = Key("life:a", 7)
    order = Order(key, "box:1")
    assert (await driver.prepare(order)).phase is Phase.PREPARED
    assert (await driver.prepare(order)).phase is Phase.PREPARED
    await driver.start(key)
    ended = await driver.wait(key)
    assert ended.exit is not None and ended.exit.code == 3 and ended.reason == "exit code 3"
    assert await driver.start(key) == ended and await driver.stop(key, 1.0) == ended
    told = await driver.logs(key, 100)
    assert (told.stdout, told.stderr) == (b"hello\n", b"trouble\n")
    assert [status.key for status in await driver.instances()] == [key]
    await driver.delete(key)
    await driver.delete(key)
    with pytest.raises(Refused, match="no container"):
        await driver.status(key)


async def test_what_a_container_sees_and_may(driver: ContainerDriver) -> None:
    status, out, err = await output(driver, "inside", """
        grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; echo fds $(ls /proc/self/fd | wc -l); echo pid $$; ls -l /proc/$$/fd/0
        echo net $(ls /sys/class/net); echo old $(ls /srv/old) srv $(ls /srv); echo host $(cat /proc/sys/kernel/hostname)
        stat -c '%u %g' /bin/busybox; touch /made && echo made; unshare -U true || echo no namespace; mount -t tmpfs none /tmp || echo no mount; echo x > /proc/sys/kernel/hostname || echo no sysctl
    """)
    assert status.exit is not None and status.exit.code == 0, err
    # Four descriptors: the three, and the folder that ls reads.
    for told in ("CapEff:\t00000000000004fb", "NoNewPrivs:\t1", "Seccomp:\t2", "fds 4", "pid 1", "-> /dev/null", "net lo", "old c", "srv old", "host inside", "0 0", "made", "no namespace", "no mount", "no sysctl"):
        assert told in out, (told, out, err)


async def test_control_without_seccomp_a_namespace_can_be_had(driver: ContainerDriver, tmp_path: Path) -> None:
    store = made_store(tmp_path)
    loose = made_driver(tmp_path, store)
    loose._capabilities, loose._ways = await driver.probe(), Ways((str(searched("runc")),), True, False)
    _, out, _ = await output(loose, "loose", "unshare -U true && echo a namespace")
    store.close()
    assert "a namespace" in out


async def test_its_root_is_nobody_on_the_host_and_its_priority_is_ordinary(driver: ContainerDriver) -> None:
    key = await started(driver, "nobody", "touch /mine; sleep 60")
    pid = (await driver.status(key)).pid
    can = (await driver.probe()).can(Ability.USER_NAMESPACE)
    owner = os.stat(f"/proc/{pid}").st_uid
    assert (owner >= FIRST_ID) == can and os.getpriority(os.PRIO_PROCESS, pid) == max(0, os.getpriority(os.PRIO_PROCESS, 0))
    assert os.getsid(pid) != os.getsid(0)
    made = driver._path(key) / "disk/upper/mine"
    await until(made.exists)
    assert made.stat().st_uid == owner
    other = await started(driver, "nobody2", "sleep 60")
    assert not can or os.stat(f"/proc/{(await driver.status(other)).pid}").st_uid != owner
    for one in (key, other):
        await driver.delete(one)


async def test_another_user_has_no_capability(driver: ContainerDriver) -> None:
    _, out, _ = await output(driver, "user", "id -u; id -g; grep CapEff /proc/self/status", user="app")
    assert out.split() == ["1000", "1001", "CapEff:", "0" * 16]
    _, out, _ = await output(driver, "user", "id -u; id -g", user="app:staff")
    assert out.split() == ["1000", "50"]


async def test_memory_processes_and_processor_are_limited(driver: ContainerDriver) -> None:
    status, _, _ = await output(driver, "hungry", "x=$(yes 0123456789abcdef | head -c 100000000); echo ${#x}", limits={"memory": "24Mi"})
    assert status.exit is not None and (status.exit.out_of_memory or status.exit.signal == 9 or status.exit.code == 137), status
    status, _, _ = await output(driver, "mourns", "busybox tail /dev/zero; exit 6", limits={"memory": "24Mi"})
    assert status.exit is not None and status.exit.code == 6 and not status.exit.out_of_memory, "it went on when a child was killed, and ended for a reason of its own"
    assert status.reason == f"exit code 6; before that the kernel killed {status.exit.memory_kills} of its processes for want of memory" and status.exit.memory_kills > 0
    key = await started(driver, "forks", "sh -c 'while :; do sleep 60 & done'; exec sleep 60", limits={"pids": 16}, requests={"memory": 32 << 20, "cpu": 500})
    await until(lambda: _complains(driver, key, b"fork"))
    told = await driver.stats(key)
    assert 12 < told.processes <= 16 and 0 < told.memory_bytes <= 32 << 20 and told.cpu_ns > 0
    groups = cgroups.read()
    assert groups.memory_limit("/novacron/forks.1") == 32 << 20
    await driver.delete(key)
    key = await started(driver, "slow", "sleep 60", limits={"cpu": "200m"})
    quota = Path(groups.unified, "novacron/slow.1/cpu.max") if groups.layout == "v2" else Path(groups.mounts["cpu"], "novacron/slow.1/cpu.cfs_quota_us")
    assert quota.read_text().split()[0] == "20000"
    await driver.delete(key)
    assert all(not os.path.exists(folder) for folder in groups.folders("/novacron/slow.1"))


async def test_it_is_asked_to_end_and_then_killed(driver: ContainerDriver) -> None:
    polite = await started(driver, "polite", "trap 'echo bye; exit 5' TERM; echo up; while :; do sleep 0.05; done")
    deaf = await started(driver, "deaf", "trap '' TERM; echo up; while :; do sleep 0.05; done")
    for key in (polite, deaf):
        await until(lambda key=key: _says(driver, key, b"up"))
    ended = await driver.stop(polite, 30.0)
    assert ended.exit is not None and ended.exit.code == 5 and (await driver.logs(polite, 100)).stdout == b"up\nbye\n"
    ended = await driver.stop(deaf, 0.2)
    assert ended.exit is not None and ended.exit.signal == signal.SIGKILL
    for key in (polite, deaf):
        await driver.delete(key)


async def _says(driver: ContainerDriver, key: Key, word: bytes) -> bool:
    return word in (await driver.logs(key, 1000)).stdout


async def _complains(driver: ContainerDriver, key: Key, word: bytes) -> bool:
    return word in (await driver.logs(key, 1000)).stderr


async def test_pause_stops_all_of_it_and_stop_ends_a_paused_one(driver: ContainerDriver) -> None:
    key = await started(driver, "still", "trap 'exit 0' TERM; while :; do echo tick; sleep 0.02; done")
    await until(lambda: _says(driver, key, b"tick"))
    assert (await driver.pause(key)).phase is Phase.PAUSED and (await driver.pause(key)).phase is Phase.PAUSED
    before = (await driver.stats(key)).cpu_ns
    with pytest.raises(Refused, match="is paused"):
        await driver.exec(key, ["true"], 5.0)
    assert (await driver.stats(key)).cpu_ns == before
    assert (await driver.resume(key)).phase is Phase.RUNNING
    await until(lambda: _more(driver, key, before))
    await driver.pause(key)
    ended = await driver.stop(key, 20.0)
    assert ended.exit is not None and ended.exit.code == 0
    await driver.delete(key)


async def _more(driver: ContainerDriver, key: Key, before: int) -> bool:
    return (await driver.stats(key)).cpu_ns > before


async def test_commands_in_it(driver: ContainerDriver) -> None:
    key = await started(driver, "exec", "echo own > /tmp/file; sleep 60", user="app", env={"GREETING": "hi"})
    ran = await driver.exec(key, ["sh", "-c", "id -u; echo $GREETING; grep CapEff /proc/self/status; echo no >&2; exit 4"], 20.0)
    assert ran.exit.code == 4 and ran.output.stderr == b"no\n" and ran.output.stdout.split() == [b"1000", b"hi", b"CapEff:", b"0" * 16]
    many = await driver.exec(key, ["sh", "-c", "yes | head -c 3000000"], 20.0)
    assert many.output.cut and len(many.output.stdout) == 1 << 20
    processes = (await driver.stats(key)).processes
    with pytest.raises(Failed, match="longer than 0.3 s"):
        await driver.exec(key, ["sleep", "50"], 0.3)
    await until(lambda: _processes(driver, key, processes))
    await driver.delete(key)


async def _processes(driver: ContainerDriver, key: Key, wanted: int) -> bool:
    return (await driver.stats(key)).processes == wanted


async def test_output_stays_within_its_limit(driver: ContainerDriver) -> None:
    key = await started(driver, "talker", "yes 0123456789 | head -c 1100000; echo end")
    await driver.wait(key)
    told = await driver.logs(key, 1 << 20)
    assert told.stdout.endswith(b"\nend\n") and 32_768 <= len(told.stdout) <= 65_536
    assert sum(file.stat().st_size for file in driver._path(key).glob("stdout.log*")) <= 65_536
    assert (await driver.logs(key, 4)).stdout == b"end\n" and (await driver.logs(key, 4)).cut
    await driver.delete(key)


async def test_mounts(driver: ContainerDriver) -> None:
    allowed = driver._settings.allowed_mounts[0]
    script = "cat /data/file; touch /data/x || echo read only; touch /rw/y && echo written; grep -c 'tmpfs /scratch .*size=1024k' /proc/mounts"
    os.chmod(allowed, 0o777)
    _, out, err = await output(driver, "mounts", script, mounts=[{"target": "/data", "source": allowed}, {"target": "/rw", "source": allowed, "read_only": False}, {"target": "/scratch", "tmpfs": "1Mi"}])
    assert out == "from the noderead only\nwritten\n1\n", err
    for source in ("/etc", f"{allowed}/../..", f"{allowed}/way-out", "relative"):
        with pytest.raises(Refused, match="not in a folder that this node allows"):
            await driver.prepare(Order(Key("mounts", 1), "box:1", {}, {"command": ["true"], "mounts": [{"target": "/data", "source": source}]}))


@pytest.mark.parametrize("how", ["noexec,nosuid,nodev", "noatime,nodiratime", "strictatime", "noexec,noatime,ro"])
async def test_a_folder_of_a_file_system_that_the_node_has_mounted_its_own_way(how: str, driver: ContainerDriver) -> None:
    """A stick, a network's folder, a partition of data: what the node mounted it with holds for the container too, and does not keep it from being mounted."""
    name = f"stick-{len(how)}"
    place = Path(driver._settings.allowed_mounts[0]) / name
    place.mkdir()
    subprocess.run(["mount", "-t", "tmpfs", "-o", "mode=777", "tmpfs", str(place)], check=True)
    try:
        (place / "program").write_text("#!/bin/sh\necho ran\n")
        (place / "program").chmod(0o755)
        subprocess.run(["mount", "-o", f"remount,{how}", str(place)], check=True)
        fixed = how.endswith("ro")
        mounts = [{"target": "/seen", "source": str(place)}, {"target": "/written", "source": str(place), "read_only": fixed}]
        status, out, err = await output(driver, name, "/seen/program || echo no program; touch /seen/x || echo read only; touch /written/y && echo written", mounts=mounts)
        assert status.exit is not None and out == ("no program\n" if "noexec" in how else "ran\n") + "read only\n" + ("" if fixed else "written\n"), err
        if fixed:
            with pytest.raises(Refused, match="mounted the file system of .* read-only"):
                await driver.prepare(Order(Key(name, 2), "box:1", {}, {"command": ["true"], "mounts": [{"target": "/data", "source": str(place), "read_only": False}]}))
    finally:
        subprocess.run(["umount", "-l", str(place)], check=True)


async def test_a_root_that_cannot_be_written(driver: ContainerDriver) -> None:
    _, out, _ = await output(driver, "fixed", "touch /x || echo no", read_only_root=True)
    assert out == "no\n"


@pytest.mark.parametrize(("order", "says"), [
    ({"image": "nothing:1"}, "not on this node"), ({"spec": {"user": "nobody"}}, "not in the image's /etc/passwd"), ({"spec": {"command": ["x"], "privileged": True}}, "privileged: is not known"),
    ({"requests": {"disk": 1 << 60}}, "bytes are asked for"), ({"spec": {"limits": {"memory": "900Ti"}}}, "more than this node has"), ({"spec": {"capabilities": ["CAP_SYS_ADMIN"]}}, "choose from"),
    ({"spec": {"limits": {"pids": 5}}}, "the runtime's own"),
])
async def test_what_cannot_be_is_refused_before_anything_is_touched(order: dict[str, Any], says: str, driver: ContainerDriver) -> None:
    key = Key("refused", 1)
    with pytest.raises(Refused, match=says):
        await driver.prepare(Order(**{"key": key, "image": "box:1", **order}))
    assert await driver.instances() == [] and not any(driver.scratch.iterdir())


async def test_a_program_that_is_not_there_is_told_and_leaves_nothing_running(driver: ContainerDriver) -> None:
    key = Key("absent", 1)
    await driver.prepare(Order(key, "box:1", {}, {"command": ["no-such-program"]}))
    with pytest.raises(Failed, match="no-such-program"):
        await driver.start(key)
    ended = await driver.status(key)
    assert ended.phase is Phase.ENDED and "no-such-program" in ended.reason
    await driver.delete(key)
    assert not any(driver._state.iterdir())


async def test_images_in_use_stay(driver: ContainerDriver, tmp_path: Path) -> None:
    store = made_store(tmp_path)
    own = made_driver(tmp_path, store)
    own._capabilities, own._ways = await driver.probe(), driver._ways
    key = Key("user", 1)
    await own.prepare(Order(key, "box:1"))
    store.remove(store.find("box:1").digest)
    assert await own.prune(0) == [] and store.used_bytes() > 0
    assert (await own.start(key)).phase in (Phase.RUNNING, Phase.ENDED)
    await own.wait(key)
    await own.delete(key)
    await own.prune(0)
    assert store.used_bytes() == 0
    store.close()


def keeper_of(driver: ContainerDriver, key: Key) -> int:
    """Its keeper's process id."""
    return int(json.loads((driver._path(key) / "running.json").read_text())["keeper"])


async def is_gone(process: int, number: int = 0) -> None:
    """Wait until a process has ended, after this signal where one is given."""
    try:
        watched = os.pidfd_open(process)
    except ProcessLookupError:
        if number:
            raise
        return
    try:
        if number:
            signal.pidfd_send_signal(watched, number)
        await readable(watched)
    finally:
        os.close(watched)


async def test_keepers_go_on_without_the_process_that_they_come_from(driver: ContainerDriver) -> None:
    """It is killed, and the next container finds another; the first one's end is still written down."""
    first = await started(driver, "first", "trap 'exit 7' TERM; echo ready; sleep 600 & wait")
    await until(lambda: _says(driver, first, b"ready"))
    assert driver._keepers._server is not None
    before = driver._keepers._server.pid
    os.kill(before, signal.SIGKILL)
    second = await started(driver, "second", "exit 3")
    assert driver._keepers._server is not None and driver._keepers._server.pid != before
    for key, code in ((first, 7), (second, 3)):
        status = await (driver.stop(key, 60) if key is first else driver.wait(key))
        assert status.exit is not None and status.exit.code == code
        await driver.delete(key)
    assert await driver.instances() == []


async def test_what_a_keeper_starts_has_the_priority_and_the_turns_of_any_process(driver: ContainerDriver) -> None:
    """Ours are better than that; the control is the process that started it."""
    if os.geteuid() != 0 or not (short_turns() and prefer(-5)):
        pytest.skip("turns and priority cannot be changed here")
    driver.close()  # so that the process that keepers come from is started by this one, as it is now
    try:
        key = await started(driver, "ordinary", "sleep 600")
        status = await driver.status(key)
        nice, turn = scheduled(status.pid)
        assert nice == 0 and turn != TURN_NS
        ran = await driver.exec(key, ["cat", "/proc/self/stat"], 60)
        assert ran.output.stdout.rpartition(b")")[2].split()[16] == b"0", "nor has what runs beside it"
        own_nice, own_turn = scheduled(os.getpid())
        assert own_nice == -5 and own_turn in (TURN_NS, None)
        await driver.delete(key)
    finally:
        ordinary_turns()


def scheduled(process: int) -> tuple[int, int | None]:
    """Nice value, and nanoseconds of a turn; None where the kernel does not tell it."""
    try:
        told = Path(f"/proc/{process}/sched").read_text()
    except FileNotFoundError:
        return os.getpriority(os.PRIO_PROCESS, process), None
    found = re.search(r"^se\.slice\s*:\s*(\d+)$", told, re.M)
    return os.getpriority(os.PRIO_PROCESS, process), int(found[1]) if found else None


async def test_a_keeper_is_in_a_group_of_keepers_but_has_the_processor_as_any_process_has(driver: ContainerDriver) -> None:
    groups = cgroups.read()
    if "cpu" not in groups.mounts:
        pytest.skip("control groups of version 2 have one tree for all")
    key = await started(driver, "kept", "sleep 600")
    found = {name: path for line in Path(f"/proc/{keeper_of(driver, key)}/cgroup").read_text().splitlines() for _, names, path in [line.split(":", 2)] for name in names.split(",")}
    assert not found["cpu"].endswith(cgroups.KEEPERS) and found["memory"].endswith(cgroups.KEEPERS) and found["pids"].endswith(cgroups.KEEPERS)
    await driver.delete(key)


async def test_a_start_that_the_process_that_keepers_come_from_took_to_its_grave_is_made_again(driver: ContainerDriver) -> None:
    """It is stopped, so that what it is asked lies unread, and killed then."""
    key = Key("unread", 1)
    await driver.prepare(Order(key, "box:1", {}, {"command": ["sh", "-c", "exit 3"]}))
    await output(driver, "before", "exit 0")  # so that there is one
    assert driver._keepers._server is not None and driver._keepers._socket is not None
    before = driver._keepers._server.pid
    os.kill(before, signal.SIGSTOP)
    await until(lambda: Path(f"/proc/{before}/stat").read_text().rpartition(")")[2].split()[0] == "T", what="it stands still")  # else it might have taken the request before
    starting = asyncio.ensure_future(driver.start(key))
    queued = struct.Struct("i")

    def asked() -> bool:
        assert driver._keepers._socket is not None
        return bool(queued.unpack(fcntl.ioctl(driver._keepers._socket, termios.TIOCOUTQ, queued.pack(0)))[0])

    try:
        await until(asked, what="the request lies there")
    finally:
        os.kill(before, signal.SIGKILL)
    await starting
    ended = await driver.wait(key)
    assert ended.exit is not None and ended.exit.code == 3 and driver._keepers._server.pid != before
    await driver.delete(key)


async def test_a_killed_keeper_is_told_and_nothing_is_left_of_its_container(driver: ContainerDriver) -> None:
    key = await started(driver, "orphan", "sleep 600")
    await is_gone(keeper_of(driver, key), signal.SIGKILL)
    status = await driver.status(key)
    assert status.phase is Phase.RUNNING and "keeper was killed" in status.reason
    ended = await driver.stop(key, 0.1)
    assert ended.phase is Phase.LOST and "nobody saw" in ended.reason
    await driver.delete(key)
    assert not any(driver._state.iterdir())
    groups = cgroups.read()
    assert all(not os.path.exists(folder) for folder in groups.folders("/novacron/orphan.1"))


async def test_another_agent_takes_over_what_runs_and_starts_nothing_twice(driver: ContainerDriver) -> None:
    key = await started(driver, "mine", "echo began; sleep 600")
    next_one = ContainerDriver(driver._folder.parent, driver._store, driver._settings)
    next_one._capabilities, next_one._ways = driver._capabilities, driver._ways
    before = await driver.status(key)
    assert await next_one.start(key) == before and [status.key for status in await next_one.instances()] == [key]
    await until(lambda: _says(driver, key, b"began"))
    # The control: without the lock, and what the keeper wrote down, it is started again.
    keeper = keeper_of(driver, key)
    for name in ("lock", "running.json"):
        (driver._path(key) / name).unlink()
    (driver._path(key) / "lock").touch()
    await next_one.start(key)
    await until(lambda: _says(driver, key, b"began\nbegan"))
    await next_one.delete(key)
    await is_gone(keeper)
    next_one.close()


async def test_many_at_once(driver: ContainerDriver) -> None:
    keys = await asyncio.gather(*(started(driver, f"many-{at}", f"exit {at}") for at in range(6)))
    ends = await asyncio.gather(*(driver.wait(key) for key in keys))
    assert [end.exit and end.exit.code for end in ends] == list(range(6))
    await asyncio.gather(*(driver.delete(key) for key in keys))
    assert await driver.instances() == []


async def test_a_runtime_that_is_not_there_or_does_not_work_is_reported(tmp_path: Path) -> None:
    store = made_store(tmp_path)
    broken = tmp_path / "broken"
    broken.write_text("#!/bin/sh\necho it is broken >&2\nexit 1\n")
    broken.chmod(0o755)
    driver = made_driver(tmp_path, store, runtimes=("no-such-runtime", str(broken)))
    told = await driver.probe()
    assert not told.usable and "no-such-runtime is not installed" in told.cannot[Ability.START] and "broken" in told.cannot[Ability.START]
    with pytest.raises(Refused, match="cannot do this here"):
        await driver.prepare(Order(Key("a", 1), "box:1"))
    assert await driver.instances() == []
    store.close()


async def test_a_path_that_overlayfs_would_misread_is_reported(tmp_path: Path) -> None:
    (tmp_path / "a,b").mkdir()
    store = made_store(tmp_path / "a,b")
    told = await made_driver(tmp_path / "a,b", store).probe()
    assert not told.usable and "path has ," in told.cannot[Ability.START]
    store.close()


async def test_crun_is_taken_where_it_passes_and_else_its_own_words_are_the_reason(tmp_path: Path) -> None:
    if searched("crun") is None:
        pytest.skip("no crun (as root: apt install crun)")
    store = made_store(tmp_path)
    driver = made_driver(tmp_path, store, runtimes=("crun",))
    told = await driver.probe()
    if told.usable:
        _, out, _ = await output(driver, "other", "echo by another")
        assert out == "by another\n"
    else:
        assert told.cannot[Ability.START].startswith("crun: crun create: ")
        both = await made_driver(tmp_path, store, runtimes=("crun", "runc")).probe()
        assert both.usable and both.runtime.startswith("runc")
    store.close()


def test_no_mount_of_a_container_is_seen_on_the_host(driver: ContainerDriver) -> None:
    key = asyncio.run(started(driver, "hidden", "sleep 60"))
    assert str(driver._folder.parent) not in Path("/proc/self/mounts").read_text()
    asyncio.run(driver.delete(key))
    assert not held(driver._path(key))
