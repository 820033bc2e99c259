"""A static ELF program, made byte by byte, that makes system calls one after the other and writes what the kernel answered. Pure.

No compiler, no C library and no shell is needed inside of the workload, and nothing between the attempt and the kernel can make it look refused.
"""

import struct
from collections.abc import Sequence

from .attempts import Attempt

MACHINE = "x86_64"
"""The only machine for which there is code here."""

CALLS = {
    "write": 1, "open": 2, "pause": 34, "socket": 41, "exit": 60, "ptrace": 101, "syslog": 103, "mknod": 133, "personality": 135, "setpriority": 141, "pivot_root": 155, "chroot": 161, "acct": 163,
    "mount": 165, "umount2": 166, "swapon": 167, "reboot": 169, "sethostname": 170, "iopl": 172, "ioperm": 173, "init_module": 175, "delete_module": 176, "kexec_load": 246, "add_key": 248,
    "unshare": 272, "perf_event_open": 298, "open_by_handle_at": 304, "setns": 308, "process_vm_readv": 310, "kcmp": 312, "finit_module": 313, "bpf": 321, "userfaultfd": 323, "io_uring_setup": 425,
    "fsopen": 430, "clone3": 435, "x32 getpid": 0x4000_0000 | 39,
}
"""Numbers of system calls on x86_64 (linux/arch/x86/entry/syscalls/syscall_64.tbl)."""

_CODE, _DATA, _RESULTS = 0x40_0000, 0x60_0000, 0x80_0000
"""Where the parts are loaded: code, what calls are given by address, and one answer of eight bytes each."""

PAGE = 4096
"""Bytes; a part begins at one in the file as in memory."""

_REGISTERS = (b"\x48\xbf", b"\x48\xbe", b"\x48\xba", b"\x49\xba", b"\x49\xb8", b"\x49\xb9")
"""`mov REGISTER, 64 bits` for rdi, rsi, rdx, r10, r8 and r9: the six arguments of a call."""


def program(attempts: Sequence[Attempt], *, told: bool = True) -> bytes:
    """The program; its stdout is `len(attempts)` signed 64-bit numbers, little-endian. Not `told`: nothing of its own."""
    code, data = bytearray(), bytearray()

    def call(number: int, arguments: Sequence[int | bytes]) -> None:
        nonlocal code, data
        for register, argument in zip(_REGISTERS, arguments, strict=False):
            if isinstance(argument, bytes):
                address = _DATA + len(data)
                data += argument + b"\0"
                argument = address
            code += register + struct.pack("<Q", argument & 0xFFFF_FFFF_FFFF_FFFF)
        code += b"\x48\xb8" + struct.pack("<Q", number) + b"\x0f\x05"  # mov rax, number; syscall

    for at, attempt in enumerate(attempts):
        call(CALLS[attempt.call], attempt.arguments)
        code += b"\x48\xa3" + struct.pack("<Q", _RESULTS + 8 * at)  # mov [address], rax
    if told:
        call(CALLS["write"], (1, _RESULTS, 8 * len(attempts)))
    call(CALLS["exit"], (0,))
    return _elf(bytes(code), bytes(data), 8 * len(attempts))


def answers(output: bytes, attempts: Sequence[Attempt]) -> list[int]:
    """What the kernel answered to each: 0 and more where it was done, else the negative error number. Raises ValueError where the output is not the program's."""
    if len(output) != 8 * len(attempts):
        raise ValueError(f"{len(output)} bytes instead of {8 * len(attempts)}: the program did not come to its end")
    return list(struct.unpack(f"<{len(attempts)}q", output))


def _elf(code: bytes, data: bytes, results: int) -> bytes:
    head = 64 + 3 * 56
    code += bytes(-(head + len(code)) % PAGE)
    parts = ((5, _CODE, 0, head + len(code), head + len(code)), (4, _DATA, head + len(code), len(data), len(data)), (6, _RESULTS, 0, 0, results))
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, 62, 1, _CODE + head, 64, 0, 0, 64, 56, 3, 0, 0, 0)
    segments = b"".join(struct.pack("<IIQQQQQQ", 1, flags, offset, address, address, size, memory, 0x1000) for flags, address, offset, size, memory in parts)
    return header + segments + code + data
