"""The smallest programs there are, for the probes of drivers of containers: wait for a signal until the end of time, one after it has told its kernel. Made here, byte by byte, so that a probe needs no image and no compiler. Pure."""

import struct

_BASE = 0x40_0000
"""Where it is loaded."""

_PROGRAMS = {
    "x86_64": (62, bytes.fromhex("b8220000000f05ebf7")),  # again: eax = 34 (pause); syscall; jmp again
    "aarch64": (183, struct.pack("<7I", 0xD2800000, 0xD2800001, 0xD2800002, 0xD2800003, 0xD2800928, 0xD4000001, 0x17FFFFFA)),  # again: x0..x3 = 0; x8 = 73 (ppoll); svc 0; b again
    "riscv64": (243, struct.pack("<7I", 0x00000513, 0x00000593, 0x00000613, 0x00000693, 0x04900893, 0x00000073, 0xFE9FF06F)),  # again: a0..a3 = 0; a7 = 73; ecall; j again
}
"""ELF's number of the machine, and its code."""


_TELLERS = {
    # open the path, read 64 bytes of it, write them to descriptor 1; then as above. The path stands behind the code.
    "x86_64": (62, bytes.fromhex("488d3d3700000031f631d2b8020000000f0589c74883ec404889e6ba4000000031c00f0589c2bf010000004889e6b8010000000f05b8220000000f05ebf7")),
    "aarch64": (183, bytes.fromhex(
        "600c8092c1020010020080d2030080d2080780d2010000d4ff0301d1e1030091020880d2e80780d2010000d4e20300aae1030091200080d2080880d2010000d4000080d2010080d2020080d2030080d2280980d2010000d4faffff17")),
}

_BOOT = b"/proc/sys/kernel/random/boot_id\0"


def program(machine: str) -> bytes | None:
    """A static ELF program for a machine (as uname says) that waits; None where we have none."""
    return _elf(*_PROGRAMS[machine]) if machine in _PROGRAMS else None


def teller(machine: str) -> bytes | None:
    """One that first writes the id of the running kernel's boot, as a line: no two kernels have the same."""
    if machine not in _TELLERS:
        return None
    number, code = _TELLERS[machine]
    return _elf(number, code + _BOOT)


def _elf(number: int, code: bytes) -> bytes:
    size = 64 + 56 + len(code)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, number, 1, _BASE + 64 + 56, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + code
