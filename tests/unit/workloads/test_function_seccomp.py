"""The filter of system calls of function workers: what its program says of every number, and what the kernel then does."""

import errno
import platform
import struct
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads.drivers.function_seccomp import ARCHITECTURES, CALLS, install, program

ALLOW, KILL, REFUSE = 0x7FFF_0000, 0x8000_0000, 0x0005_0000 | errno.EPERM


def verdict(steps: bytes, architecture: int, number: int) -> int:
    """What a program says: an interpreter of the four instructions that it has."""
    at, accumulator = 0, 0
    while True:
        code, on_true, on_false, value = struct.unpack_from("=HBBI", steps, at * 8)
        at += 1
        if code == 0x20:
            accumulator = {0: number, 4: architecture}[value]
        elif code in (0x15, 0x35):
            at += on_true if (accumulator == value if code == 0x15 else accumulator >= value) else on_false
        else:
            assert code == 0x06
            return int(value)


@pytest.mark.parametrize("machine", sorted(ARCHITECTURES))
def test_every_number_is_left_or_refused(machine: str) -> None:
    column, architecture = ARCHITECTURES[machine]
    left = {pair[column] for pair in CALLS.values()}
    assert len(left) == len(CALLS)
    steps = program(machine)
    for number in range(1024):
        assert verdict(steps, architecture, number) == (ALLOW if number in left else REFUSE), number


@given(st.sampled_from(sorted(ARCHITECTURES)), st.integers(0, 2**32 - 1), st.integers(0, 2**32 - 1))
def test_another_interface_is_no_way_around(machine: str, architecture: int, number: int) -> None:
    column, own = ARCHITECTURES[machine]
    steps = program(machine)
    assert verdict(steps, architecture, number) == KILL if architecture != own else True
    assert verdict(steps, own, number | 0x4000_0000) == REFUSE


def test_an_architecture_whose_numbers_are_not_known_has_no_filter() -> None:
    assert program("riscv64") == b""
    install("riscv64")


ATTEMPTS = """
import ctypes, os, socket, sys
sys.path.insert(0, sys.argv[1])
from edge_runtime.workloads.drivers.function_seccomp import install
libc = ctypes.CDLL(None, use_errno=True)
libc.prctl(38, 1, 0, 0, 0)
left, right = socket.socketpair()
giving, taking = socket.socketpair()
attempts = {
    "open": lambda: os.close(os.open("/etc/passwd", os.O_RDONLY)), "execute": lambda: os.execve("/nowhere", ["x"], {}), "fork": lambda: os.waitpid(os.fork() or os._exit(0), 0),
    "socket": lambda: socket.socket(), "kill": lambda: os.kill(os.getpid(), 0), "list": lambda: os.listdir("/"), "mkdir": lambda: os.mkdir("/proc/no"), "pass a descriptor": lambda: socket.send_fds(giving, [b"x"], [1]),
    "priority": lambda: os.setpriority(os.PRIO_PROCESS, 0, 1), "user": lambda: os.setresuid(-1, -1, -1),
    **{name: (lambda number=number: libc.syscall(number, 0, 0, 0, 0, 0, 0) >= 0 or (_ for _ in ()).throw(OSError(ctypes.get_errno(), "")))
       for name, number in {"io_uring": 425, "bpf": 321, "ptrace": 101, "mount": 165, "userfaultfd": 323, "unshare": 272, "process_vm_writev": 311, "clone3": 435}.items()},
}
if sys.argv[2] == "filtered":
    install()
refused = []
for name, attempt in attempts.items():
    try:
        attempt()
    except OSError as error:
        if error.errno == 1:
            refused.append(name)
left.sendall(b"still"); data = right.recv(10); memory = bytearray(1 << 20)
sys.stdout.write("|".join(refused) + "|" + data.decode()); sys.stdout.flush()
os._exit(0)
"""


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the attempts' numbers are those of x86_64")
def test_the_kernel_refuses_what_is_not_left() -> None:
    def refused(how: str) -> set[str]:
        done = subprocess.run([sys.executable, "-c", ATTEMPTS, ".", how], capture_output=True, text=True, timeout=60)
        names = done.stdout.split("|")
        assert names[-1] == "still", (done.stdout, done.stderr)
        return set(names[:-1])

    before, after = refused("control"), refused("filtered")
    assert {"open", "fork", "socket", "list", "pass a descriptor", "kill"} & before == set(), "the attempts are ones that succeed without it"
    assert len(after) == 18, after
