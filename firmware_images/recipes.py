"""What an image is made of: architectures, profiles, and what of Debian's packages is left out. Pure data."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, field

from .errors import FirmwareError

MIB = 1 << 20

KERNEL_FOLDERS = (
    "arch", "block", "crypto", "lib", "mm", "fs/ext4", "fs/jbd2", "fs/mbcache", "fs/fat", "fs/nls", "fs/squashfs", "fs/fuse", "fs/overlayfs", "fs/autofs", "fs/configfs", "fs/efivarfs",
    "drivers/acpi", "drivers/ata", "drivers/base", "drivers/block", "drivers/bus", "drivers/char", "drivers/clk", "drivers/cpufreq", "drivers/dma", "drivers/extcon", "drivers/firmware", "drivers/gpio",
    "drivers/hid", "drivers/hwmon", "drivers/i2c", "drivers/iio", "drivers/irqchip", "drivers/leds", "drivers/mailbox", "drivers/md", "drivers/mfd", "drivers/misc/eeprom", "drivers/mmc", "drivers/mux",
    "drivers/net/can", "drivers/net/ethernet/amazon", "drivers/net/ethernet/broadcom", "drivers/net/ethernet/cadence", "drivers/net/ethernet/intel", "drivers/net/ethernet/marvell", "drivers/net/ethernet/microchip",
    "drivers/net/ethernet/realtek", "drivers/net/ethernet/stmicro", "drivers/net/ethernet/allwinner", "drivers/net/ethernet/freescale", "drivers/net/ethernet/ti", "drivers/net/mdio", "drivers/net/pcs", "drivers/net/phy",
    "drivers/net/usb", "drivers/net/virtio_net.ko", "drivers/net/net_failover.ko", "drivers/net/mii.ko", "drivers/net/dummy.ko", "drivers/nvme", "drivers/nvmem", "drivers/pci", "drivers/phy", "drivers/pinctrl",
    "drivers/platform", "drivers/pmdomain", "drivers/power", "drivers/pps", "drivers/ptp", "drivers/pwm", "drivers/regulator", "drivers/reset", "drivers/rtc", "drivers/scsi/scsi_common.ko", "drivers/scsi/scsi_mod.ko",
    "drivers/scsi/sd_mod.ko", "drivers/scsi/virtio_scsi.ko", "drivers/scsi/scsi_transport", "drivers/soc", "drivers/spi", "drivers/spmi", "drivers/thermal", "drivers/tty", "drivers/usb", "drivers/virtio", "drivers/watchdog", "net/802",
    "net/8021q", "net/can", "net/core", "net/ipv4", "net/ipv6", "net/llc", "net/netfilter", "net/packet", "net/sched", "net/unix", "net/bridge",
)
"""Folders of kernel modules that a device gets: storage, wired network, buses of sensors and actuators, watchdogs. No screens, sound, cameras, radio (its firmware is not free), clusters."""

BASE_PACKAGES = (
    "systemd-sysv", "systemd-timesyncd", "systemd-resolved", "udev", "kmod", "mount", "e2fsprogs", "busybox-static", "dmsetup", "python3-minimal", "libpython3-stdlib", "ca-certificates", "netbase", "tzdata",
    "systemd-boot-efi", "systemd-repart", "openssl", "dosfstools",
)

LEFT_OUT = frozenset((
    "initramfs-tools", "initramfs-tools-bin", "initramfs-tools-core", "klibc-utils", "libklibc", "dracut-install", "dracut", "dracut-core", "cpio", "dpkg", "debconf", "tar", "openssl-provider-legacy", "linux-base",
    "debianutils", "coreutils", "coreutils-from-uutils", "rust-coreutils", "libgmp10", "readline-common", "libreadline8t64", "libdb5.3t64", "libncursesw6", "dash", "perl-base", "sysvinit-utils", "dbus", "dbus-bin", "dbus-daemon",
    "dbus-session-bus-common", "dbus-system-bus-common", "libdbus-1-3", "passwd", "login", "logsave", "bsdutils", "init-system-helpers", "adduser", "base-files", "sed", "gzip", "findutils", "diffutils", "hostname", "libcrypt-dev",
))
"""Packages that dependencies name and the image has no use for: package management, shells, tools of set-up. That nothing that is left asks for their libraries is checked at each build."""

UNWANTED_PREFIXES = (
    "/usr/share/doc", "/usr/share/man", "/usr/share/locale", "/usr/share/info", "/usr/share/lintian", "/usr/share/bash-completion", "/usr/share/zsh", "/usr/share/bug", "/usr/share/initramfs-tools", "/usr/share/pixmaps",
    "/usr/share/applications", "/usr/share/polkit-1", "/usr/share/dbus-1", "/usr/share/python3", "/usr/share/binfmts", "/usr/share/debconf", "/usr/share/menu", "/usr/share/mime", "/usr/share/icons", "/usr/share/gcc", "/usr/share/readline",
    "/usr/lib/udev/hwdb.d", "/usr/lib/systemd/catalog", "/usr/lib/systemd/boot", "/usr/lib/kernel", "/usr/lib/initcpio", "/usr/share/initramfs", "/usr/lib/dracut", "/etc/kernel", "/etc/init.d", "/etc/default", "/etc/cron", "/etc/logrotate.d", "/var",
    "/etc/pam.d", "/etc/xdg", "/etc/X11", "/boot/System.map", "/usr/lib/debug", "/usr/lib/valgrind", "/usr/share/zoneinfo/right", "/usr/share/zoneinfo/posix", "/usr/bin/perl",
)

UNWANTED_PARTS = (
    "/gconv/", "/ossl-modules/", "/engines-3/", "/lib-dynload/_curses", "/lib-dynload/readline.", "/lib-dynload/_dbm.", "/lib-dynload/_gdbm.", "/lib-dynload/_tkinter.", "/lib-dynload/_test", "/lib-dynload/_ctypes_test", "/lib-dynload/xx",
    "/idlelib/", "/lib2to3/", "/tkinter/", "/turtledemo/", "/ensurepip/", "/pydoc_data/", "/distutils/", "/__pycache__/", "/sitecustomize.py", "/security/pam_", "/qemu/ui-curses.", "/sasl2/libsasldb.", "/bin/qemu-system-i386", "/sbin/arpd", "/audit/", "/perl5/", "/perl/", "-stub.efi", ".elf.stub",
)


@dataclass(frozen=True, slots=True)
class Architecture:
    """One kind of machine: Debian's names, the wheels' tags, the firmware's and QEMU's.

    `firmware` is code and first variables, in flash; without variables it is a program that QEMU starts (U-Boot, which speaks EFI too).
    `fw_cfg`: QEMU hands credentials over there (7.2 does not for riscv64); else the boot partition has them, as for a real device.
    `least_mib`: MiB of memory below which its firmware does not start.
    `emulated`: what a machine in QEMU adds to the kernel's command line; a real device does not have it.
    """

    name: str
    suite: str
    kernel: str
    python: tuple[int, int]
    wheel_platforms: tuple[str, ...]
    efi: str
    console: str
    qemu: str
    machine: tuple[str, ...]
    firmware: tuple[str, str]
    firmware_package: str
    debian_modules: bool = False
    fw_cfg: bool = True
    least_mib: int = 0
    emulated: str = ""

    @property
    def loader(self) -> str:
        """The file that the firmware starts, under EFI/BOOT."""
        return f"BOOT{self.efi.upper()}.EFI"


def _manylinux(machine: str) -> tuple[str, ...]:
    return tuple(f"{tag}_{machine}" for tag in ("manylinux_2_34", "manylinux_2_31", "manylinux_2_28", "manylinux_2_17", "manylinux2014"))


UNTIMED = "no_timer_check"
"""A kernel of x86 looks for less than a tenth of a second whether its timer ticks, and panics where it does not (`IO-APIC + timer doesn't work!`). QEMU raises those ticks in another thread than the one that runs the guest:
beside others they come late. Under KVM a kernel leaves that look out by itself; on a real board it finds wiring that is wrong, so it is not in the image."""

ARCHITECTURES = {
    arch.name: arch
    for arch in (
        Architecture(
            "amd64", "trixie", "linux-image-amd64", (3, 13), _manylinux("x86_64"), "x64", "ttyS0,115200", "qemu-system-x86_64", ("-machine", "q35", "-cpu", "qemu64,+ssse3,+sse4.1,+sse4.2,+popcnt"),
            ("/usr/share/OVMF/OVMF_CODE_4M.fd", "/usr/share/OVMF/OVMF_VARS_4M.fd"), "ovmf", emulated=UNTIMED,
        ),
        Architecture(
            "arm64", "trixie", "linux-image-arm64", (3, 13), _manylinux("aarch64"), "aa64", "ttyAMA0", "qemu-system-aarch64", ("-machine", "virt", "-cpu", "cortex-a72"),
            ("/usr/share/AAVMF/AAVMF_CODE.fd", "/usr/share/AAVMF/AAVMF_VARS.fd"), "qemu-efi-aarch64",
        ),
        Architecture(
            "riscv64", "unstable", "linux-image-riscv64", (3, 14), _manylinux("riscv64"), "riscv64", "ttyS0", "qemu-system-riscv64", ("-machine", "virt"),
            ("/usr/lib/u-boot/qemu-riscv64_smode/uboot.elf", ""), "u-boot-qemu", debian_modules=True, fw_cfg=False, least_mib=256,
        ),
    )
}


@dataclass(frozen=True, slots=True)
class Profile:
    """What an image is for: `packages` over the base, `kept` of those that are LEFT_OUT elsewhere, `wheels` from the lock, MiB of a root slot and of the data partition, MiB of memory that it is made for.

    `kernel_modules`: what its kernel must have, built in or as a module; a build whose kernel lacks one is refused.
    """

    name: str
    packages: tuple[str, ...] = ()
    wheels: tuple[str, ...] = ()
    slot_mib: int = 96
    data_mib: int = 256
    memory_mib: int = 192
    all_modules: bool = False
    agent_memory_mib: int = 96
    extra: frozenset[str] = field(default_factory=frozenset)
    kept: frozenset[str] = field(default_factory=frozenset)
    kernel_modules: tuple[str, ...] = ()


LEAN_WHEELS = (
    "aiohappyeyeballs", "aiohttp", "aiosignal", "attrs", "frozenlist", "idna", "multidict", "paho-mqtt", "propcache", "pyyaml", "yarl",
)
"""The agent with its local interface; models run in the portable evaluator. Without psutil: the agent's own reader of /proc gives the same metrics on Linux, for less memory and a shorter start."""

DEBIAN_MODULES = ("python3-yaml", "python3-aiohttp", "python3-paho-mqtt")
"""The same where there are no wheels: Debian's own packages of them, whose versions the manifest records."""

PROFILES = {
    profile.name: profile
    for profile in (
        Profile("device", wheels=LEAN_WHEELS),
        Profile("gateway", packages=("mosquitto",), wheels=LEAN_WHEELS, slot_mib=112, data_mib=512, memory_mib=256, extra=frozenset(("broker",))),
        Profile(
            "host", packages=("runc", "criu", "iproute2", "nftables", "slirp4netns", "qemu-system-x86-headless"), wheels=LEAN_WHEELS, slot_mib=768, data_mib=2048, memory_mib=1024, all_modules=True, agent_memory_mib=512,
            extra=frozenset(("containers",)), kept=frozenset(("libgmp10",)),
            kernel_modules=("nvmet", "rdma_rxe", "openvswitch", "overlay", "tun", "kvm", "veth"),
        ),
    )
}

HOST_OPTIONS = {"amd64": ("LIVEPATCH",)}
"""Options that a kernel with `kernel_modules` must have been built with, by architecture: live patching is not in every one's."""

QEMU_OF_HOST = {"amd64": "qemu-system-x86", "arm64": "qemu-system-arm", "riscv64": "qemu-system-riscv"}


def architecture(name: str) -> Architecture:
    """By name; raises FirmwareError."""
    if name not in ARCHITECTURES:
        raise FirmwareError("arch", f"{name!r} is unknown", f"take one of {', '.join(ARCHITECTURES)}")
    return ARCHITECTURES[name]


def profile(name: str) -> Profile:
    """By name; raises FirmwareError."""
    if name not in PROFILES:
        raise FirmwareError("profile", f"{name!r} is unknown", f"take one of {', '.join(PROFILES)}")
    return PROFILES[name]


def memory_mib(arch: Architecture, chosen: Profile) -> int:
    """MiB of memory of a machine for it."""
    return max(arch.least_mib, chosen.memory_mib)


def packages(arch: Architecture, chosen: Profile) -> list[str]:
    """The packages to resolve, kernel included."""
    named = [QEMU_OF_HOST[arch.name] if package.startswith("qemu-system") else package for package in chosen.packages]
    return sorted({*BASE_PACKAGES, arch.kernel, *named, *(DEBIAN_MODULES if arch.debian_modules else ())})


def unwanted(path: str, chosen: Profile) -> bool:
    """Whether a file of a package stays out of the image."""
    if path.startswith(UNWANTED_PREFIXES) or any(part in path for part in UNWANTED_PARTS):
        return True
    if path.startswith("/usr/lib/modules/") and path.split("/")[5:6] in (["dtb"], ["System.map"]):
        return True  # what describes a board comes from its firmware
    head, found, module = path.partition("/kernel/")
    if found and head.startswith(("/usr/lib/modules/", "/lib/modules/")) and ".ko" in module:
        return not chosen.all_modules and not module.startswith(KERNEL_FOLDERS)
    return False


_PYTHON_MARKER = re.compile(r"python_full_version (<|>=) '(\d+)\.(\d+)'")


def _for_python(marker: str, python: tuple[int, int]) -> bool:
    """Whether what a marker says of Python's version holds for the target; the rest of it is about this machine."""
    return all((python < (int(major), int(minor))) == (sign == "<") for sign, major, minor in _PYTHON_MARKER.findall(marker))


def locked(lock: str, wanted: Sequence[str], python: tuple[int, int]) -> str:
    """The lines of a requirements lock (hashes included) that are about `wanted`, their markers left off: the target is not this machine. Raises FirmwareError where one is missing."""
    kept: list[str] = []
    seen = set()
    taking = False
    for line in lock.splitlines():
        if line and not line[0].isspace() and not line.startswith("#"):
            name = line.split("==")[0].strip()
            taking = name in wanted and _for_python(line.partition(" ;")[2], python)
            if taking:
                seen.add(name)
                line = line.split(" ;")[0].rstrip(" \\") + " \\"
        if taking:
            kept.append(line)
    if missing := sorted(set(wanted) - seen):
        raise FirmwareError("requirements/run.lock", f"it lacks {', '.join(missing)}", "run `make lock`")
    return "\n".join(kept) + "\n"
