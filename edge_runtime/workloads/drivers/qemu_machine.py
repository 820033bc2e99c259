"""QEMU's command line for a guest of the machine type `microvm`. Pure."""

from collections.abc import Sequence
from dataclasses import dataclass

from .microvm_guest import PORTS

TRANSLATED_MB = 24
"""QEMU's room for translated code (TCG). Its default takes a quarter of the guest's memory; with this a small guest loses nothing, and stays within its memory bar."""

RAM = "/proc/self/fd/{ram}"
"""The guest's memory, as `command` wants it."""

DRIVES = tuple(f"driver=raw,node-name=disk{at},read-only={'off' if at else 'on'},file.driver=file,file.locking=off,file.filename=/dev/fdset/{at + 1}" for at in range(2))
"""A clone's disks, as `command` wants them: the image, and what it writes."""

DRIVE_FILES = ("-add-fd", "fd={root},set=1", "-add-fd", "fd={disk},set=2")
"""Where those two are."""


LEFT_OUT = "psi=0 lsm=landlock,yama audit=0 nowatchdog transparent_hugepage=never init_on_alloc=0"
"""What a micro-VM's kernel does not do: it would do it in each clone anew, and translate the code for it; a guest that has one workload needs none of it."""


@dataclass(frozen=True, slots=True)
class Machine:
    """What clones of one template have in common: memory (MiB), processors, and the accelerator (`tcg` or `kvm`)."""

    memory_mb: int
    cpus: int
    accelerator: str = "tcg"


def command(program: str, machine: Machine, ram: str, shared: bool, disks: Sequence[str], *more: str) -> list[str]:
    """The command line.

    Args:
        ram: path of the guest's memory; of a template it is shared, of a clone private (copy on write).
        disks: one `-blockdev` each, with its node name `disk0`, ...; the first one is read-only.
        more: a kernel to boot, or that it waits for a state.
    Descriptors stand in braces, for whoever starts it: `{qmp}`, those of `PORTS`, and what `disks` and `more` name.
    """
    line = [
        program, "-name", "novacron", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-S", "-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny",
        # No option ROMs: they would have to be the same in a clone, which has no kernel to load.
        # SeaBIOS, which QEMU takes where it is not told, does without them in Debian 12 and starts no kernel then in Debian 13.
        "-bios", "qboot.rom", "-machine", "microvm,x-option-roms=off,rtc=on,pit=off,pic=off,isa-serial=off,memory-backend=mem,accel=" + machine.accelerator,
        *(("-accel", f"tcg,tb-size={TRANSLATED_MB}") if machine.accelerator == "tcg" else ()), "-cpu", "max" if machine.accelerator == "tcg" else "host", "-smp", str(machine.cpus), "-m", f"{machine.memory_mb}M",
        "-object", f"memory-backend-file,id=mem,size={machine.memory_mb}M,mem-path={ram},share={'on' if shared else 'off'}",
        "-chardev", "socket,id=qmp,fd={qmp}", "-mon", "chardev=qmp,mode=control", "-device", "virtio-serial-device,max_ports=8",
    ]
    if machine.accelerator == "tcg":  # the machine's option and this one exclude each other
        line[line.index("-machine") + 1] = line[line.index("-machine") + 1].removesuffix(",accel=tcg")
    for number, name in enumerate(PORTS, 1):
        line += ["-chardev", f"socket,id={name},fd={{{name}}}", "-device", f"virtserialport,chardev={name},nr={number},name={name}"]
    for number, disk in enumerate(disks):
        line += ["-blockdev", disk, "-device", f"virtio-blk-device,drive=disk{number},logical_block_size=512,physical_block_size=512"]
    return [*line, *more]


def boot(kernel: str, initramfs: str, tsc_khz: int, more: str = "") -> list[str]:
    """The options that boot a kernel. `tsc_khz`: the host's; without it a kernel that finds no timer to measure its clock against hangs now and then (8 of 10 boots, Debian's 6.1). `more`: of the kernel's own options.

    `reboot=t`: this machine has no keyboard controller, by which a kernel would restart it, and a jump into a BIOS that has nothing to boot is no end.
    """
    words = ["quiet loglevel=1 panic=-1 reboot=t random.trust_cpu=on mitigations=off", *([f"tsc_early_khz={tsc_khz}"] if tsc_khz else []), *([more] if more else [])]
    return ["-kernel", kernel, "-initrd", initramfs, "-append", " ".join(words)]
