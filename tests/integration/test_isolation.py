"""Escape attempts from inside of a workload: every one is refused. The controls: the same program outside of any boundary, and within one that has been weakened, is not refused."""

import platform
import shutil
import signal
import subprocess
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers.container import ContainerDriver
from edge_runtime.workloads.drivers.container_laying import Ways
from edge_runtime.workloads.drivers.face import Ability, Key, Order, Phase
from edge_runtime.workloads.drivers.outside import short_of_root
from tools.escape.attempts import ATTEMPTS, Attempt
from tools.escape.program import MACHINE, answers, program

from .container_side import driver, layer, made_driver, made_store, output, reason_against
from .waiting import until

__all__ = ["driver"]

REASON = reason_against() or ("" if platform.machine() == MACHINE else f"the attempts' program is made for {MACHINE} only")

pytestmark = pytest.mark.skipif(bool(REASON), reason=REASON)


def holes(found: list[int]) -> dict[str, int]:
    """The attempts that were not refused, and what the kernel answered."""
    return {attempt.name: answer for attempt, answer in zip(ATTEMPTS, found, strict=True) if -answer not in attempt.refusals}


async def attempted(driver: ContainerDriver, name: str) -> list[int]:
    """What the kernel answers to all of them in a container."""
    key = Key(name, 1)
    await driver.prepare(Order(key, "box:1", {}, {"command": ["/attempts"]}))
    await driver.start(key)
    await driver.wait(key)
    told = await driver.logs(key, 65_536)
    await driver.delete(key)
    assert not told.stderr, told.stderr
    return answers(told.stdout, ATTEMPTS)


@pytest.fixture(scope="module")
def escaping(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """A driver whose image has the program."""
    folder = tmp_path_factory.mktemp("isolation")
    store = made_store(folder, [layer([("file", "attempts", program(ATTEMPTS))])])
    made = made_driver(folder, store)
    yield made
    made.close()
    store.close()


async def test_a_container_refuses_every_attempt(escaping: ContainerDriver) -> None:
    told = await escaping.probe()
    assert told.can(Ability.SECCOMP)
    assert holes(await attempted(escaping, "attempts")) == {}


async def test_each_layer_alone_refuses_what_harms_the_host(escaping: ContainerDriver) -> None:
    """Without the filter or without the user namespace, what the other layers leave open is what does not reach the host; without the filter there is such."""
    told = await escaping.probe()
    strict = escaping._ways
    assert strict is not None
    found = {}
    try:
        for users, seccomp in ((told.can(Ability.USER_NAMESPACE), False), (False, True)):
            escaping._ways = Ways(strict.runtime, users, seccomp)
            found[seccomp] = holes(await attempted(escaping, f"weaker-{int(seccomp)}"))
    finally:
        escaping._ways = strict
    assert found[True] == {}, "the filter and the capabilities do not need the user namespace"
    assert {"a user namespace"} <= set(found[False]), "the control: it is the filter that refuses that"
    by_kind = {attempt.kind for attempt in ATTEMPTS if attempt.name in found[False]}
    assert not by_kind & {"devices", "proc and sys"}, found[False]


async def test_a_call_by_an_abi_that_the_filter_does_not_know_ends_the_program(tmp_path: Path) -> None:
    """x32 is left out of the filter. The control: without a filter the program gets an answer, whatever the kernel's is."""
    asked = [Attempt("kernel", "a call of x32", "x32 getpid", ())]
    store = made_store(tmp_path, [layer([("file", "attempts", program(asked))])])
    driver = made_driver(tmp_path, store)
    try:
        await driver.probe()
        strict = driver._ways
        assert strict is not None and strict.seccomp
        for name, seccomp in (("filtered", True), ("unfiltered", False)):
            driver._ways, key = Ways(strict.runtime, strict.users, seccomp), Key(name, 1)
            await driver.prepare(Order(key, "box:1", {}, {"command": ["/attempts"]}))
            await driver.start(key)
            ended = (await driver.wait(key)).exit
            told = await driver.logs(key, 4096)
            await driver.delete(key)
            assert ended is not None and ended.signal == (signal.SIGSYS if seccomp else 0), ended
            assert bool(told.stdout) is not seccomp
    finally:
        driver.close()
        store.close()


def outside(attempt: Attempt) -> int:
    """What the kernel answers to root on this machine, in namespaces of its own so that nothing of it stays."""
    script = "mount -t tmpfs none /tmp && cat > /tmp/attempt && chmod +x /tmp/attempt && exec /tmp/attempt"
    done = subprocess.run(["unshare", "--mount", "--uts", "--ipc", "--net", "--pid", "--fork", "--mount-proc", "sh", "-c", script], input=program([attempt]), capture_output=True, timeout=60)
    return answers(done.stdout, [attempt])[0]


@pytest.mark.skipif(bool(short_of_root()) or shutil.which("unshare") is None, reason="the control needs a machine's root and unshare (util-linux)")
def test_the_control_is_let_through_where_there_is_no_boundary() -> None:
    """Else a call that this kernel has not, or a wrong number, would look like a boundary. What opens a device of the host is left out."""
    allowed = {attempt.name for attempt in ATTEMPTS if attempt.arguments and not str(attempt.arguments[0]).startswith("b'/dev/") and -outside(attempt) not in attempt.refusals}
    assert len(allowed) >= len(ATTEMPTS) * 6 // 10, allowed
    for name in ("mount a file system", "a user namespace", "trace a process", "raw packets", "make a disk's node", "rename the host", "write the core pattern"):
        assert name in allowed


async def test_memory_and_process_bombs_end_in_the_container(escaping: ContainerDriver) -> None:
    """Beside it another one goes on, and its keeper writes down how the bomb ended."""
    quiet = Key("neighbour", 1)
    await escaping.prepare(Order(quiet, "box:1", {}, {"command": ["sh", "-c", "while :; do echo alive; sleep 0.05; done"]}))
    await escaping.start(quiet)
    status, _, _ = await output(escaping, "memory-bomb", "exec busybox tail /dev/zero", limits={"memory": "24Mi"})
    assert status.exit is not None and status.exit.out_of_memory
    bomb = Key("process-bomb", 1)
    await escaping.prepare(Order(bomb, "box:1", {}, {"command": ["sh", "-c", "b() { b | b & }; b; sleep 600"], "limits": {"pids": 32}}))
    await escaping.start(bomb)

    async def refused() -> bool:
        return b"fork" in (await escaping.logs(bomb, 4096)).stderr

    await until(refused)
    assert (await escaping.stats(bomb)).processes <= 32
    before = len((await escaping.logs(quiet, 1 << 20)).stdout)

    async def goes_on() -> bool:
        return len((await escaping.logs(quiet, 1 << 20)).stdout) > before

    await until(goes_on)
    for key in (bomb, quiet):
        assert (await escaping.stop(key, 0.1)).phase is Phase.ENDED
        await escaping.delete(key)


def test_an_answer_that_is_cut_is_no_refusal() -> None:
    with pytest.raises(ValueError, match="did not come to its end"):
        answers(b"\xff" * 8, ATTEMPTS)
    assert len({attempt.name for attempt in ATTEMPTS}) == len(ATTEMPTS), "each is told by its name"
