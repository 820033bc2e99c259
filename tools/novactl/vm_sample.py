"""The sample of a virtual machine: a disk of some 17 MB that boots by BIOS, made on the spot from Debian's kernel for guests and this machine's static busybox. No root, no tools, the same bytes each time.

    sector 0      a boot sector of our own (`LOADER_TEXT`), and a partition table
    sector 1      the kernel's arguments
    sector 8..    the kernel, then its first file system (initramfs); both in a partition of type DA, which no system touches
    behind them   a partition for the guest's data

The guest says hello on its serial console, answers HTTP on port 80, does what cloud-init would do with the host name and a script in `user_data`, and ends when its power button is pressed. It knows
the port `novacron.0` (see `vm_keeper`), so it can be a template.
"""

import base64
import struct

from edge_runtime.workloads.drivers import qemu_kernel

from .client import CommandError

SECTOR = 512
KERNEL_AT = 8
"""Sector of the kernel."""

INITRAMFS_ADDRESS = 0x500_0000
"""Where it is put in memory: above what a kernel of Debian's needs while it unpacks itself (67 MiB), within 96 MiB."""

DATA_BYTES = 16 << 20
"""Of the guest's own partition."""

MODULES = ("virtio_pci", "virtio_blk", "virtio_net", "virtio_console", "vfat", "nls_ascii", "nls_cp437", "button", "evdev")

ARGUMENTS = "console=ttyS0 quiet loglevel=1 panic=-1 random.trust_cpu=on mitigations=off no_timer_check"

LOADER = base64.b64decode(
    "+jHAjtiOwI7QvAB8+/yIFjF9xwY6fQCYZrgBAAAAxwY2fQEA6JYAxwY6fQCQZqGgfYsOtH2JDjZ96IEAZg+3DrR9ZqGgfWYByGaLDqR9Zr8AABAA6HgAZqGofWaLDqx9ZoHB/wEAAGbB6Qlmiz6wfehcALgAkI7AJsYGEAL/JoAOEQKAJscG"
    "JAIAfiZmxwYoAgCACQBmobB9JmajGAJmoax9JmajHAL6uACQjtiOwI7gjuiO0LwAfuoAACCQZqM8fb40fbRCihYxfc0TclrDxwY6fQAQZoXJdE1mD7ceMn1mOdlzA2aJy4keNn1mYOjM/2ZhZon6iRZefWbB6hCIFmB9iDZjfWZgidnB4Qi+"
    "RH20h80VZmFyEGYB2GYp2WbB4wlmAd/rrsO6+AOwIe706/cAQAAQAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAAP//AAABkwAA//8AAACT"
)
"""Machine code of `LOADER_TEXT`, up to the numbers that are written behind it."""

NUMBERS_AT = 0x1A0
"""Where those are: sectors of the kernel and of its protected part, of the initramfs; its bytes, its address; sectors of the kernel's first part."""

LOADER_TEXT = """
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
    # the arguments, one sector, at 0x98000; then the setup code at 0x90000
    movw $0x9800, packet+6
    movl $1, %eax
    movw $1, packet+2
    call read
    movw $0x9000, packet+6
    movl kernel, %eax
    movw setup, %cx
    movw %cx, packet+2
    call read
    movzwl setup, %ecx
    movl kernel, %eax
    addl %ecx, %eax
    movl code, %ecx
    movl $0x100000, %edi
    call load
    movl initrd, %eax
    movl initrd_bytes, %ecx
    addl $511, %ecx
    shrl $9, %ecx
    movl place, %edi
    call load
    movw $0x9000, %ax
    movw %ax, %es
    movb $0xff, %es:0x210
    orb $0x80, %es:0x211
    movw $0x7e00, %es:0x224
    movl $0x98000, %es:0x228
    movl place, %eax
    movl %eax, %es:0x218
    movl initrd_bytes, %eax
    movl %eax, %es:0x21c
    cli
    movw $0x9000, %ax
    movw %ax, %ds
    movw %ax, %es
    movw %ax, %fs
    movw %ax, %gs
    movw %ax, %ss
    movw $0x7e00, %sp
    ljmp $0x9020, $0

read:                       # sector %eax to where the packet says
    movl %eax, packet+8
    movw $packet, %si
    movb $0x42, %ah
    movb drive, %dl
    int $0x13
    jc fail
    ret

load:                       # %ecx sectors from %eax to the address %edi, by way of 0x10000
    movw $0x1000, packet+6
again:
    testl %ecx, %ecx
    jz done
    movzwl most, %ebx
    cmpl %ebx, %ecx
    jae 1f
    movl %ecx, %ebx
1:  movw %bx, packet+2
    pushal
    call read
    popal
    movl %edi, %edx
    movw %dx, target+2
    shrl $16, %edx
    movb %dl, target+4
    movb %dh, target+7
    pushal
    movw %bx, %cx
    shlw $8, %cx
    movw $table, %si
    movb $0x87, %ah
    int $0x15
    popal
    jc fail
    addl %ebx, %eax
    subl %ebx, %ecx
    shll $9, %ebx
    addl %ebx, %edi
    jmp again
done:
    ret

fail:
    movw $0x3f8, %dx
    movb $'!', %al
    outb %al, %dx
    hlt
    jmp fail

drive: .byte 0
most: .word 64
packet: .byte 16, 0
    .word 0, 0, 0
    .long 0, 0
table: .fill 16
    .word 0xffff, 0
    .byte 1, 0x93, 0, 0
target: .word 0xffff, 0
    .byte 0, 0x93, 0, 0
    .fill 16
.org 0x1a0
kernel: .long 0
code: .long 0
initrd: .long 0
initrd_bytes: .long 0
place: .long 0
setup: .word 0
.org 0x1be
"""
"""For GNU as (`as --32`, `ld -m elf_i386 -Ttext 0x7c00 --oformat binary`): Linux's boot protocol for a BIOS, by the calls 13h (42h, sectors by number) and 15h (87h, to memory above one megabyte)."""

INIT = rb"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run
while read -r module; do insmod /modules/$module.ko; done < /modules/order
mkdir -p /seed /data /www /etc
ifconfig lo 127.0.0.1
if ifconfig eth0 10.0.2.15 netmask 255.255.255.0 2>/dev/null; then route add default gw 10.0.2.2; echo nameserver 10.0.2.3 > /etc/resolv.conf; fi
mount -t ext2 /dev/vda2 /data 2>/dev/null || { mke2fs -q /dev/vda2 >/dev/null 2>&1; mount -t ext2 /dev/vda2 /data; }
read -r starts 2>/dev/null < /data/starts; starts=$((starts + 1)); echo $starts > /data/starts
read -r release < /proc/sys/kernel/osrelease
port=
for one in /sys/class/virtio-ports/*; do read -r label 2>/dev/null < $one/name; [ "$label" = novacron.0 ] && port=/dev/${one##*/}; done
if [ -n "$port" ]; then
  until (exec 8>$port) 2>/dev/null; do sleep 0.02; done
  exec 3<>$port; echo ready >&3; read -r word seconds seed name <&3
fi
hello() { echo "$1" > /proc/sys/kernel/hostname; hello="hello from $1, a virtual machine on Linux $release, start $starts"; echo "$hello" > /dev/ttyS0; echo "$hello" > /www/index.html; }
[ -z "$name" ] || hello $name
[ -z "$seconds" ] || { printf %s "$seed" >/dev/urandom; reseed </dev/urandom; date -s @$seconds >/dev/null; }
mount -t vfat -o ro /dev/vdb /seed
while read -r line; do case $line in *'"local-hostname": "'*) told=${line#*'"local-hostname": "'}; told=${told%%'"'*};; esac; done < /seed/meta-data
[ "$name" = "$told" ] || hello $told
httpd -p 80 -h /www
for button in /dev/input/event*; do
  (dd if=$button of=/dev/null bs=24 count=1 2>/dev/null && { echo "the power button was pressed" > /dev/ttyS0; umount /data; sync; poweroff -f; }) &
done
if head -n 1 /seed/user-data | grep -q '^#!'; then sh /seed/user-data > /dev/ttyS0 2>&1; fi
while :; do sleep 1000; done
"""


def disk(kernel_folder: str) -> bytes:
    """The disk. Raises `CommandError` where what it is made of is not here."""
    try:
        kernel = qemu_kernel.find(kernel_folder)
        image, first = kernel.image.read_bytes(), qemu_kernel.initramfs(qemu_kernel.busybox(), qemu_kernel.modules(kernel, MODULES), INIT)
    except (qemu_kernel.NoKernel, OSError) as error:
        raise CommandError(f"image: {error}") from None
    return assemble(image, first)


def assemble(kernel: bytes, initramfs: bytes) -> bytes:
    """A disk that boots this kernel."""
    setup = (kernel[0x1F1] or 4) + 1
    kernel_sectors, initramfs_sectors = -(-len(kernel) // SECTOR), -(-len(initramfs) // SECTOR)
    initramfs_at = KERNEL_AT + kernel_sectors
    data_at = -(-(initramfs_at + initramfs_sectors) // 2048) * 2048
    numbers = struct.pack("<IIIIIH", KERNEL_AT, kernel_sectors - setup, initramfs_at, len(initramfs), INITRAMFS_ADDRESS, setup)
    partitions = _partition(0x80, 0xDA, 1, data_at - 1) + _partition(0, 0x83, data_at, DATA_BYTES // SECTOR)
    first = (LOADER.ljust(NUMBERS_AT, b"\0") + numbers).ljust(0x1BE, b"\0") + partitions.ljust(64, b"\0") + b"\x55\xaa"
    head = (first + ARGUMENTS.encode().ljust(SECTOR, b"\0")).ljust(KERNEL_AT * SECTOR, b"\0")
    body = kernel.ljust(kernel_sectors * SECTOR, b"\0") + initramfs.ljust(initramfs_sectors * SECTOR, b"\0")
    return (head + body).ljust(data_at * SECTOR + DATA_BYTES, b"\0")


def _partition(active: int, kind: int, first: int, sectors: int) -> bytes:
    """One entry of the table; who reads it goes by sector numbers, not by cylinders."""
    return struct.pack("<B3sB3sII", active, b"\xfe\xff\xff", kind, b"\xfe\xff\xff", first, sectors)
