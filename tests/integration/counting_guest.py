"""A guest in one sector, that counts: it boots within a tenth of a second where a Linux needs some, so what is tried with it need not wait, and has nothing of its own that could be late.

It says 00000000, 00000001, .. on its serial console, one a tick of its timer (18 in a second). Each number has been written to its disk and read back before, past any cache, and it says `differs` where it is not what was written. So what it
says is one sequence only where memory, devices and disk went on from one moment.
"""

import base64

CODE = base64.b64decode(
    "+jHAjtiOwI7QvAB8+/yIFpR8vwCAuQQAuDAw86u4DQqrtEPHBqR8AIDoUQDHBqR8AILHBgCCAAC0QuhAAL4AgL8AgrkKAPOmdAm+lXy5CgDoGgC+AIC5CgDoEQD0vweA/gWAPTp1usYFME/r87r9A+yoIHT7uvgD"
    "rO7i8cMwwL6gfIoWlHzNE3MJvpV8uQoA6Nr/wwBkaWZmZXJzIA0KkBAAAQAAgAAAAQ=="
)
"""Machine code of `TEXT`."""

TEXT = """
.code16
.globl _start
_start:
    cli
    xorw %ax, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %ss
    movw $0x7c00, %sp
    sti
    cld
    movb %dl, drive
    movw $0x8000, %di           # the number, eight digits and an end of line, at the beginning of a sector of its own
    movw $4, %cx
    movw $0x3030, %ax
    rep stosw
    movw $0x0a0d, %ax
    stosw
again:
    movb $0x43, %ah             # to the disk's second sector, and back to another place
    movw $0x8000, packet+4
    call disk
    movw $0x8200, packet+4
    movw $0, 0x8200
    movb $0x42, %ah
    call disk
    movw $0x8000, %si
    movw $0x8200, %di
    movw $10, %cx
    repe cmpsb
    je 1f
    movw $differs, %si
    movw $10, %cx
    call say
1:  movw $0x8000, %si
    movw $10, %cx
    call say
    hlt                         # until the timer's next tick
    movw $0x8007, %di           # one more
2:  incb (%di)
    cmpb $0x3a, (%di)
    jne again
    movb $0x30, (%di)
    decw %di
    jmp 2b

say:                            # %cx bytes from %si to the serial port
    movw $0x3fd, %dx
3:  inb %dx, %al
    testb $0x20, %al
    jz 3b
    movw $0x3f8, %dx
    lodsb
    outb %al, %dx
    loop say
    ret

disk:
    xorb %al, %al
    movw $packet, %si
    movb drive, %dl
    int $0x13
    jnc 4f
    movw $differs, %si
    movw $10, %cx
    call say
4:  ret

drive: .byte 0
differs: .ascii "differs \r\n"
.balign 4
packet: .byte 16, 0
    .word 1, 0x8000, 0
    .long 1, 0
"""
"""For GNU as (`as --32`, `ld -m elf_i386 -Ttext 0x7c00 --oformat binary`): by a BIOS's calls 13h (42h and 43h, sectors by number)."""

DISK = (CODE.ljust(510, b"\0") + b"\x55\xaa").ljust(1 << 20, b"\0")
"""What it boots from, raw."""

IMAGE = "counter:1"

MEMORY = 64 << 20
"""Of the guest: the least that a machine may have."""


def counted(said: bytes) -> list[int]:
    """The numbers that it, or another guest that counts so, has said; whole lines."""
    lines = [line.strip() for line in said.split(b"\n")[:-1]]
    return [int(line) for line in lines if line.isdigit()]
