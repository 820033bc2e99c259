"""The micro-VM driver with real guests: what they may, what they may not, and how their lives are told."""

import asyncio
import os
import platform
import signal
import time
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import qemu_kernel
from edge_runtime.workloads.drivers.container_spec import CAPABILITIES
from edge_runtime.workloads.drivers.face import Ability, Failed, Key, Order, Phase, Refused
from edge_runtime.workloads.drivers.instance import read
from edge_runtime.workloads.drivers.keeping import OOM_SCORE
from edge_runtime.workloads.drivers.microvm import MACHINE, MicrovmDriver
from edge_runtime.workloads.drivers.microvm_templates import UID

from .container_side import made_store
from .microvm_side import kernel_folder, made_microvms, microvms, output, reason_against, started
from .waiting import until

__all__ = ["microvms"]

pytestmark = pytest.mark.skipif(bool(reason_against()), reason=reason_against())

FOREVER = "trap 'exit 7' TERM; echo up; while :; do sleep 0.1; done"


async def test_the_probe_boots_a_guest_and_tells_what_can_be_done(microvms: MicrovmDriver) -> None:
    told = await microvms.probe()
    assert told.usable and told.driver == "microvm" and "QEMU" in told.runtime and "Linux" in told.runtime
    assert {"start", "stop", "adopt", "pause", "exec", "logs", "stats", "limits"} <= set(told.to_json()["can"])
    with pytest.raises(Refused, match="no code for it yet"):
        told.demand(Ability.CHECKPOINT)


async def test_a_life_from_prepare_to_delete(microvms: MicrovmDriver) -> None:
    key = Key("life:a", 7)
    order = Order(key, "box:1")
    assert (await microvms.prepare(order)).phase is Phase.PREPARED
    assert (await microvms.prepare(order)).phase is Phase.PREPARED
    await microvms.start(key)
    ended = await microvms.wait(key)
    assert ended.exit is not None and ended.exit.code == 3 and ended.reason == "exit code 3"
    assert await microvms.start(key) == ended and await microvms.stop(key, 1.0) == ended
    told = await microvms.logs(key, 100)
    assert (told.stdout, told.stderr) == (b"hello\n", b"trouble\n")
    await microvms.delete(key)
    await microvms.delete(key)
    with pytest.raises(Refused, match="no micro-VM"):
        await microvms.status(key)


async def test_what_a_guest_sees(microvms: MicrovmDriver) -> None:
    status, out, err = await output(microvms, "in-side", """
        id; cat /proc/sys/kernel/osrelease; echo host $(cat /proc/sys/kernel/hostname); echo pid $$; echo net $(ls /sys/class/net); pwd; echo "a=$A b=$B"; ls / ; echo $0 "$@"
        touch /srv/x && echo wrote; grep -c . /proc/mounts >/dev/null; echo disks $(ls /dev | grep -c vd); echo to-err > /dev/stderr; echo to-out > /dev/stdout; stat -c %a /tmp
    """, env={"A": "it's \"so\" $HOME\n", "B": ""}, user="app", cwd="/srv", mounts=[{"target": "/tmp", "tmpfs": "1Mi"}])
    lines = out.splitlines()
    assert status.exit is not None and status.exit.code == 0, (out, err)
    assert lines[0].startswith("uid=1000") and "gid=1001" in lines[0]
    assert lines[1] != platform.release() and lines[1] == qemu_kernel.find(kernel_folder()).release
    assert {"host in-side", "pid 1", "net lo", "/srv", "a=it's \"so\" $HOME", "disks 0", "to-out", "1777"} <= set(lines) and " b=" in lines and "wrote" not in lines
    assert "to-err" in err and "lost+found" not in out


async def test_output_is_whole_and_bounded(microvms: MicrovmDriver) -> None:
    status, out, _ = await output(microvms, "much", "yes 0123456789abcdef | head -n 6000; echo the end")
    assert status.exit is not None and status.exit.code == 0
    assert out.endswith("0123456789abcdef\nthe end\n") and len(out) <= 65_536


async def test_it_is_asked_to_end_then_killed(microvms: MicrovmDriver) -> None:
    key = await started(microvms, "asked", FOREVER)
    await until(lambda: b"up" in (microvms._path(key) / "stdout.log").read_bytes())  # its trap is set
    ended = await microvms.stop(key, 20.0)
    assert ended.exit is not None and ended.exit.code == 7 and not ended.exit.signal
    await microvms.delete(key)
    key = await started(microvms, "deaf", "trap '' TERM; while :; do sleep 0.1; done")
    ended = await microvms.stop(key, 0.2)
    assert ended.exit is not None and ended.exit.signal == signal.SIGKILL
    await microvms.delete(key)


async def test_commands_run_beside_the_program(microvms: MicrovmDriver) -> None:
    key = await started(microvms, "exec", FOREVER, user="app")
    await until(lambda: b"up" in (microvms._path(key) / "stdout.log").read_bytes())
    ran = await microvms.exec(key, ["sh", "-c", "id; echo err >&2; ps | grep -c sleep; exit 9"], 120.0)
    assert ran.exit.code == 9 and ran.output.stdout.startswith(b"uid=1000") and ran.output.stderr == b"err\n"
    with pytest.raises(Failed, match="took longer"):
        await microvms.exec(key, ["sleep", "1000"], 0.5)
    with pytest.raises(Failed, match="took longer"):  # it has to end before it has begun
        await microvms.exec(key, ["sleep", "1000"], 0.001)
    with pytest.raises(Failed, match="took longer"):  # what it has started holds its output open
        await microvms.exec(key, ["sh", "-c", "sleep 1000 & sleep 1000; echo"], 5.0)
    ran = await microvms.exec(key, ["echo", "a b", "'\"$x"], 120.0)
    assert ran.output.stdout == b"a b '\"$x\n"
    ran = await microvms.exec(key, ["head", "-c", "1500000", "/dev/zero"], 120.0)
    assert len(ran.output.stdout) == 1 << 20 and ran.output.cut
    with pytest.raises(Refused, match="are empty"):
        await microvms.exec(key, [], 1.0)
    assert (await microvms.status(key)).phase is Phase.RUNNING
    await microvms.delete(key)


async def test_a_paused_guest_stands_still(microvms: MicrovmDriver) -> None:
    key = await started(microvms, "pause", "trap 'exit 0' TERM; n=0; while :; do echo $n; n=$((n+1)); sleep 0.02; done")
    await until(lambda: (microvms._path(key) / "stdout.log").stat().st_size > 0)
    assert (await microvms.exec(key, ["busybox", "date", "-s", "@1000"], 60.0)).exit.code == 0  # its clock is wrong, as if it had stood for long
    assert (await microvms.pause(key)).phase is Phase.PAUSED
    spent = (await microvms.stats(key)).cpu_ns
    with pytest.raises(Refused, match="is paused"):
        await microvms.exec(key, ["true"], 1.0)
    before = (await microvms.logs(key, 1000)).stdout
    other = await started(microvms, "meanwhile", "exit 0")  # while another one lives and ends, it would have gone on
    assert (await microvms.wait(other)).phase is Phase.ENDED
    await microvms.delete(other)
    assert (await microvms.logs(key, 1000)).stdout == before and (await microvms.stats(key)).cpu_ns - spent < 100_000_000
    assert (await microvms.resume(key)).phase is Phase.RUNNING
    ran = await microvms.exec(key, ["busybox", "date", "+%s"], 60.0)
    assert abs(int(ran.output.stdout) - time.time()) < 600
    assert (await microvms.pause(key)).phase is Phase.PAUSED
    assert (await microvms.stop(key, 20.0)).phase is Phase.ENDED
    await microvms.delete(key)


async def test_limits_are_kept_by_the_guest(microvms: MicrovmDriver) -> None:
    status, _, _ = await output(microvms, "greedy", "dd if=/dev/zero of=/dev/shm/x bs=65536 count=900; echo never", limits={"memory": "24Mi"})
    assert status.exit is not None and status.exit.out_of_memory and "memory limit" in status.reason
    status, _, err = await output(microvms, "forks", "for n in 1 2 3 4 5 6 7 8 9 10 11 12 13 14 15 16 17 18 19 20; do sleep 5 & done; echo all", limits={"pids": 16, "memory": "64Mi"})
    assert "can't fork" in err
    status, _, err = await output(microvms, "writes", "dd if=/dev/zero of=/big bs=65536 count=1000", requests={"disk": 32 << 20})
    assert status.exit is not None and status.exit.code == 1 and "No space left" in err


async def test_clones_share_nothing_that_they_write_and_no_random_numbers(microvms: MicrovmDriver) -> None:
    script = "head -c 16 /dev/urandom | cat > /srv/own; stat -c %s /srv/own /srv/other; cat /proc/sys/kernel/random/uuid; " + FOREVER
    keys = await asyncio.gather(*(started(microvms, f"clone-{number}", script) for number in range(3)))
    for key in keys:
        await until(lambda key=key: b"up" in (microvms._path(key) / "stdout.log").read_bytes())
    told = [(await microvms.logs(key, 1000)).stdout.decode().splitlines() for key in keys]
    assert len({lines[1] for lines in told}) == 3 and all(lines[0] == "16" for lines in told)
    assert len({(await microvms.status(key)).pid for key in keys}) == 3
    owners = {os.stat(f"/proc/{(await microvms.status(key)).pid}").st_uid for key in keys}
    assert len(owners) == 3 and min(owners) > UID
    for key in keys:
        await microvms.delete(key)


async def test_a_template_cannot_be_changed(microvms: MicrovmDriver) -> None:
    await microvms.probe()
    assert microvms._templates is not None
    template = await asyncio.to_thread(microvms._templates.get, MACHINE)
    for descriptor in (template.ram, template.state):
        again = os.open(f"/proc/self/fd/{descriptor}", os.O_RDWR)
        with pytest.raises(PermissionError):
            os.pwrite(again, b"x", 0)
        os.close(again)


async def test_qemu_has_no_rights_and_dies_with_its_keeper(microvms: MicrovmDriver) -> None:
    key = await started(microvms, "confined", FOREVER)
    pid = (await microvms.status(key)).pid
    told = dict(line.split(":\t", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":\t" in line)
    assert set(told["Uid"].split()) == set(told["Gid"].split()) and int(told["Uid"].split()[0]) > UID and told["Groups"].strip() == ""
    assert int(told["CapPrm"], 16) == int(told["CapEff"], 16) == 0 and told["NoNewPrivs"] == "1" and told["Seccomp"] == "2"
    assert os.readlink(f"/proc/{pid}/ns/net") != os.readlink("/proc/self/ns/net")
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == f"{OOM_SCORE}\n", "it goes before the agent, whose unit may spare it"
    running = read(microvms._path(key) / "running.json")
    assert running is not None
    os.kill(int(running["keeper"]), signal.SIGKILL)
    lost = await microvms.wait(key)
    assert lost.phase is Phase.LOST and "keeper was killed" in lost.reason
    await until(lambda: not Path(f"/proc/{pid}").exists())
    await microvms.delete(key)


async def test_a_qemu_that_is_killed_is_told(microvms: MicrovmDriver) -> None:
    key = await started(microvms, "shot", FOREVER)
    os.kill((await microvms.status(key)).pid, signal.SIGKILL)
    ended = await microvms.wait(key)
    assert ended.phase is Phase.ENDED and "ended before its program" in ended.reason
    await microvms.delete(key)


async def test_a_lease_that_is_over_ends_it(microvms: MicrovmDriver) -> None:
    now = time.clock_gettime_ns(time.CLOCK_BOOTTIME) // 1_000_000
    microvms.renew(Key("leased", 1), now + 60_000)
    key = await started(microvms, "leased", FOREVER, leased=True)
    assert (await microvms.status(key)).leased
    microvms.renew(key, now)
    lost = await microvms.wait(key)
    assert lost.phase is Phase.LOST and lost.leased
    await microvms.delete(key)


async def test_the_next_driver_finds_what_runs(microvms: MicrovmDriver, tmp_path: Path) -> None:
    key = await started(microvms, "adopted", FOREVER)
    await until(lambda: b"up" in (microvms._path(key) / "stdout.log").read_bytes())
    microvms._keepers.close()
    second = MicrovmDriver(microvms._folder.parent, microvms._store, microvms._settings)
    assert (await second.status(key)).phase is Phase.RUNNING
    assert (await second.start(key)).phase is Phase.RUNNING
    assert (await second.exec(key, ["echo", "here"], 20.0)).output.stdout == b"here\n"
    ended = await second.stop(key, 20.0)
    assert ended.exit is not None and ended.exit.code == 7
    await second.delete(key)
    second.close()


@pytest.mark.parametrize(("spec", "requests", "field"), [
    ({"mounts": [{"target": "/data", "source": "/srv"}]}, {}, "spec.mounts"),
    ({"network": {"ports": []}}, {}, "spec.network"),
    ({"capabilities": list(CAPABILITIES[:2])}, {}, "spec.capabilities"),
    ({"limits": {"memory": "900Gi"}}, {}, "spec.limits.memory"),
    ({"limits": {"cpu": 900}}, {}, "spec.limits.cpu"),
    ({"command": ["a=b"]}, {}, "spec.command"),
    ({"nonsense": 1}, {}, "spec.nonsense"),
    ({}, {"disk": 4096}, "requests.disk"),
    ({}, {"disk": 1 << 49}, "requests.disk"),
])
async def test_what_cannot_be_is_refused_before_anything_is_touched(microvms: MicrovmDriver, spec: dict[str, Any], requests: dict[str, int], field: str) -> None:
    with pytest.raises(Refused) as told:
        await microvms.prepare(Order(Key("refused", 1), "box:1", requests, spec))
    assert told.value.field.startswith(field), told.value
    assert not microvms._path(Key("refused", 1)).exists()


async def test_a_guest_that_does_not_boot_is_ended_and_reported(tmp_path: Path) -> None:
    real = qemu_kernel.find(kernel_folder())
    (tmp_path / "k/boot").mkdir(parents=True)
    (tmp_path / "k/lib").mkdir()
    (tmp_path / "k/lib/modules").symlink_to(real.modules.parent)
    whole = bytearray(real.image.read_bytes())
    whole[1 << 20:-4096] = bytes(len(whole) - (1 << 20) - 4096)  # its header is right, what is packed in it is not
    (tmp_path / f"k/boot/vmlinuz-{real.release}").write_bytes(whole)
    store = made_store(tmp_path)
    driver = made_microvms(tmp_path, store, kernel=str(tmp_path / "k"), boot_s=4.0)
    told = await driver.probe()
    assert not told.usable and "no guest boots" in told.cannot[Ability.START]
    with pytest.raises(Refused, match="no guest boots"):
        await driver.prepare(Order(Key("a", 1), "box:1"))
    driver.close()
    none = made_microvms(tmp_path, store, kernel=str(tmp_path / "in"))
    assert "guest_kernel.sh" in (await none.probe()).cannot[Ability.START]
    none.close()
    store.close()
