"""QEMU's command line for a virtual machine: a PC with firmware, PCI, ACPI, disks, a serial console. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

PORTS = ("control", "console")
"""What a keeper has of a guest: a port by which the guest may say that it is ready, and its serial console."""

CONTROL = "novacron.0"
"""What the first one is called in the guest: /dev/virtio-ports/novacron.0."""

TRANSLATED_MB = 32
"""QEMU's room for translated code (TCG). Its default takes a quarter of the guest's memory, beside it; with less than this a kernel's boot is translated over and over."""

UPPER, UPPER_SET = "rest", 101
"""Node of what lies over a disk that came before the rest of it, until that is written into it; the number of its descriptor set."""

BIOS, UEFI, KERNEL = BOOTS = ("bios", "uefi", "kernel")
"""How a guest begins: from its disk by SeaBIOS or OVMF, or with a kernel that is given to it."""

FIRMWARE = ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd")
"""Of UEFI: code, and the variables that each machine begins with."""


@dataclass(frozen=True, slots=True)
class Shape:
    """What clones of one template have in common: memory (MiB), processors, how it boots, whether it has a network card, the accelerator (`tcg` or `kvm`)."""

    memory_mb: int
    cpus: int
    boot: str = BIOS
    network: bool = False
    accelerator: str = "tcg"


@dataclass(frozen=True, slots=True)
class Layer:
    """One file of a disk: its format, and the number of the descriptor set that holds it."""

    format: str
    fdset: int


def chain(node: str, layers: Sequence[Layer], writable: bool) -> list[str]:
    """`-blockdev` options of a disk, as words: the lowest layer first. Only the last one is written to, where that is wanted."""
    words: list[str] = []
    for at, layer in enumerate(layers):
        last = at == len(layers) - 1
        name, below = node if last else f"{node}-{at}", "" if at == 0 else f",backing={node}-{at - 1}"
        words += ["-blockdev", f"driver={layer.format},node-name={name},read-only={'off' if last and writable else 'on'},file.driver=file,file.locking=off,file.filename=/dev/fdset/{layer.fdset}{below}"]
    return words


def upper(below: str) -> list[str]:
    """Options of one more layer over a disk that is written to, for `command(.., drive=UPPER)`; its file is `{rest}`."""
    return ["-add-fd", f"fd={{{UPPER}}},set={UPPER_SET}", "-blockdev", f"driver=qcow2,node-name={UPPER},file.driver=file,file.locking=off,file.filename=/dev/fdset/{UPPER_SET},backing={below}"]


def command(
    program: str, shape: Shape, memory: str, disks: Sequence[str], forwards: Sequence[tuple[str, int, int]] = (), more: Sequence[str] = (), hardware_address: str = "", drive: str = "disk",
) -> list[str]:
    """The command line.

    Args:
        memory: the options of the guest's memory (`anonymous`, `file`).
        disks: what `chain` gives for the nodes `disk` and `seed`.
        forwards: protocol, port beside QEMU, port in the guest.
        more: a kernel to boot, or that it waits for a state.
        hardware_address: of its network card, where that is a port of a bridge (`{tap}`).
        drive: the node that it boots from.
    Descriptors stand in braces, for whoever starts it: `{qmp}`, those of `PORTS`, and what `more` names.
    """
    tcg = shape.accelerator == "tcg"
    line = [
        program, "-name", "novacron", "-nodefaults", "-no-user-config", "-display", "none", "-S", "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        "-machine", "q35,smm=off,vmport=off,memory-backend=mem" + ("" if tcg else ",accel=" + shape.accelerator), *(("-accel", f"tcg,tb-size={TRANSLATED_MB}") if tcg else ()),
        "-cpu", "max" if tcg else "host", "-smp", str(shape.cpus), "-m", f"{shape.memory_mb}M", "-object", memory, "-rtc", "base=utc,clock=host",
        "-chardev", "socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control", "-chardev", "socket,id=console,fd={console}", "-serial", "chardev:console",
        *disks, "-device", f"virtio-blk-pci,drive={drive},bootindex=1,logical_block_size=512,physical_block_size=512", "-device", "virtio-blk-pci,drive=seed,logical_block_size=512,physical_block_size=512",
        "-device", "virtio-serial-pci,max_ports=4", "-chardev", "socket,id=control,fd={control}", "-device", f"virtserialport,chardev=control,nr=1,name={CONTROL}",
        "-object", "rng-random,id=random,filename=/dev/urandom", "-device", "virtio-rng-pci,rng=random",
    ]
    if shape.network and hardware_address:
        line += ["-netdev", "tap,id=net,fd={tap}", "-device", f"virtio-net-pci,netdev=net,romfile=,mac={hardware_address}"]
    elif shape.network:
        told = "".join(f",hostfwd={protocol}::{outer}-:{inner}" for protocol, outer, inner in forwards)
        line += ["-netdev", f"user,id=net,ipv6=off{told}", "-device", "virtio-net-pci,netdev=net,romfile="]
    return [*line, *more]


def anonymous(shape: Shape) -> str:
    """Memory of its own."""
    return f"memory-backend-ram,id=mem,size={shape.memory_mb}M"


def file(shape: Shape, path: str, shared: bool) -> str:
    """Memory in a file: of a template it is shared, of a clone private (copy on write)."""
    return f"memory-backend-file,id=mem,size={shape.memory_mb}M,mem-path={path},share={'on' if shared else 'off'}"


def kernel(image: str, initramfs: str, arguments: str) -> list[str]:
    """The options that boot a kernel; no initramfs where its path is empty."""
    return ["-kernel", image, *(["-initrd", initramfs] if initramfs else []), "-append", arguments]
