"""Escape attempts where the boundary is not a container's: in a guest root may do what it likes to its own kernel, and the node does not change; a function's process may do nothing."""

import json
import platform
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers import function_seccomp
from edge_runtime.workloads.drivers.face import Key, Order, Phase
from edge_runtime.workloads.drivers.microvm import MicrovmDriver
from tools.escape.attempts import ATTEMPTS, Attempt
from tools.escape.program import CALLS, MACHINE, answers, program

from .container_side import layer, made_store
from .microvm_side import end_all, made_microvms, reason_against, started

needs_machine = pytest.mark.skipif(platform.machine() != MACHINE, reason=f"the attempts' program is made for {MACHINE} only")
needs_guests = pytest.mark.skipif(bool(reason_against()), reason=reason_against())


NOW_AND_THEN = pytest.mark.slow
"""These two were seen to stand still once in ten to twenty runs, their end not told, for a reason that was not found. In 79 later runs, each with templates of its own and most beside heavy load, none did; beside such load
a run takes 20 to 40 s. Not in the ordinary run until it is known what it was."""


def node() -> dict[str, Any]:
    """What of this machine an attempt that got out would have changed, and no other test does."""
    kept = ("/proc/sys/kernel/hostname", "/proc/sys/kernel/core_pattern", "/proc/sys/kernel/modprobe", "/proc/sys/kernel/random/boot_id", "/proc/swaps")
    return {path: Path(path).read_text() for path in kept if Path(path).exists()} | {"disks": sorted(path.name for path in Path("/dev").glob("vd*"))}


@pytest.fixture(scope="module")
def escaping(tmp_path_factory: pytest.TempPathFactory) -> Iterator[MicrovmDriver]:
    """A driver whose image has the program."""
    folder = tmp_path_factory.mktemp("isolation")
    store = made_store(folder, [layer([("file", "attempts", program(ATTEMPTS))])])
    made = made_microvms(folder, store)
    yield made
    end_all(made)
    store.close()


@needs_machine
@needs_guests
async def test_what_a_guests_kernel_lets_through_does_not_reach_the_node(escaping: MicrovmDriver) -> None:
    before = node()
    key = Key("attempts", 1)
    await escaping.prepare(Order(key, "box:1", {}, {"command": ["/attempts"]}))
    await escaping.start(key)
    await escaping.wait(key)
    told = await escaping.logs(key, 65_536)
    await escaping.delete(key)
    through = {attempt.name for attempt, answer in zip(ATTEMPTS, answers(told.stdout, ATTEMPTS), strict=True) if -answer not in attempt.refusals}
    assert {"mount a file system", "rename the host", "make a disk's node", "raw packets"} <= through, "the control: in a guest they do something"
    assert "open the disk" not in through
    assert node() == before


@needs_machine
@needs_guests
@pytest.mark.parametrize(("name", "script"), [
    pytest.param("panic", "mount -o remount,rw /proc; echo 1 > /proc/sys/kernel/sysrq; echo c > /proc/sysrq-trigger; sleep 600", marks=NOW_AND_THEN),
    pytest.param("restart", "mount -o remount,rw /proc; echo b > /proc/sysrq-trigger; sleep 600", marks=NOW_AND_THEN),
    ("power off", "poweroff -f; sleep 600"),
    ("every port", "mknod /dev/port c 1 4; dd if=/dev/zero of=/dev/port bs=1 count=65535; reboot -f; sleep 600"),
    ("its own memory", "mknod /dev/mem c 1 1; dd if=/dev/urandom of=/dev/mem bs=4096 count=16000; reboot -f; sleep 600"),
], ids=["panic", "restart", "power-off", "every-port", "its-own-memory"])
async def test_a_guest_that_destroys_itself_is_told_and_nothing_else_changes(escaping: MicrovmDriver, name: str, script: str) -> None:
    """Its neighbour goes on as well."""
    before = node()
    neighbour = await started(escaping, f"beside-{name.replace(' ', '-')}", "trap 'exit 7' TERM; while :; do sleep 0.1; done")
    key = await started(escaping, name.replace(" ", "-"), script)
    ended = await escaping.wait(key)
    assert ended.phase in (Phase.ENDED, Phase.LOST) and ended.reason
    assert (await escaping.exec(neighbour, ["echo", "alive"], 60.0)).output.stdout == b"alive\n"
    assert node() == before
    for one in (key, neighbour):
        await escaping.delete(one)


FILTERED = """
import ctypes, json, sys
sys.path.insert(0, sys.argv[1])
from edge_runtime.workloads.drivers.function_seccomp import install
attempts = [(number, [argument if isinstance(argument, int) else argument.encode() for argument in arguments]) for number, arguments in json.loads(sys.stdin.read())]
libc = ctypes.CDLL(None, use_errno=True)
libc.syscall.restype = ctypes.c_long
libc.prctl(38, 1, 0, 0, 0)
if sys.argv[2] == "filtered":
    install()
found = []
for number, arguments in attempts:
    ctypes.set_errno(0)
    answer = libc.syscall(ctypes.c_long(number), *(ctypes.c_char_p(argument) if isinstance(argument, bytes) else ctypes.c_long(argument) for argument in arguments))
    found.append(answer if answer >= 0 else -ctypes.get_errno())
print(json.dumps(found), flush=True)
"""


def in_a_functions_process(attempts: tuple[Attempt, ...], how: str) -> list[int]:
    """What the kernel answers under the filter of a function's process, by root where the tests are root."""
    asked = json.dumps([[CALLS[attempt.call], [argument if isinstance(argument, int) else argument.decode() for argument in attempt.arguments]] for attempt in attempts])
    done = subprocess.run([sys.executable, "-c", FILTERED, ".", how], input=asked, capture_output=True, text=True, timeout=60)
    assert done.stdout, done.stderr
    found: list[int] = json.loads(done.stdout)
    return found


@needs_machine
@pytest.mark.skipif(not function_seccomp.there(), reason="this kernel has no seccomp filters")
def test_a_functions_process_may_make_no_attempt() -> None:
    """Here the filter is all there is to hold them: the process has the tests' rights otherwise."""
    assert [answer for answer in in_a_functions_process(ATTEMPTS, "filtered") if answer != -1] == []
    harmless = tuple(attempt for attempt in ATTEMPTS if attempt.call in ("socket", "personality", "userfaultfd", "kcmp") and attempt.name != "read all packets")
    assert [answer for answer in in_a_functions_process(harmless, "control") if answer != -1], "the control: it is the filter"
