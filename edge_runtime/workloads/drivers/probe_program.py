"""The smallest program there is, for the probe of the container driver: waits for a signal until the end of time. Made here, byte by byte, so that a probe needs no image and no compiler. Pure."""

import struct

_BASE = 0x40_0000
"""Where it is loaded."""

_PROGRAMS = {
    "x86_64": (62, bytes.fromhex("b8220000000f05ebf7")),  # again: eax = 34 (pause); syscall; jmp again
    "aarch64": (183, struct.pack("<7I", 0xD2800000, 0xD2800001, 0xD2800002, 0xD2800003, 0xD2800928, 0xD4000001, 0x17FFFFFA)),  # again: x0..x3 = 0; x8 = 73 (ppoll); svc 0; b again
    "riscv64": (243, struct.pack("<7I", 0x00000513, 0x00000593, 0x00000613, 0x00000693, 0x04900893, 0x00000073, 0xFE9FF06F)),  # again: a0..a3 = 0; a7 = 73; ecall; j again
}
"""ELF's number of the machine, and its code."""


def program(machine: str) -> bytes | None:
    """A static ELF program for a machine (as uname says); None where we have none."""
    if machine not in _PROGRAMS:
        return None
    number, code = _PROGRAMS[machine]
    size = 64 + 56 + len(code)
    header = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", 2, number, 1, _BASE + 64 + 56, 64, 0, 0, 64, 56, 1, 0, 0, 0)
    segment = struct.pack("<IIQQQQQQ", 1, 5, 0, _BASE, _BASE, size, size, 0x1000)
    return header + segment + code
