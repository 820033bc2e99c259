"""What an image has beside Debian's files: users, mounts, what is masked, and where units and scripts go. Pure: names and texts."""

import json
from collections.abc import Mapping

from edge_runtime.updates import slots

from . import broker, scripts, units
from .layout import AGENT_UID, DATA, DATA_NAME, REPART, UPDATE_KEYS
from .recipes import Architecture, Profile
from .tree import Tree

NETWORK_ORDER = "After=network.target\n"
"""What the image leaves out of the agent's unit: a device decides without a network, so it starts beside it."""

DATA_WAIT_S = 1800
"""Longest wait for the data partition; then the device starts again, as there is nothing that it can do without. A slow card takes half a minute; emulated beside 20 others, udev named it after 370 s (2026-11-29)."""

START_S = 300
"""Longest start of one service: systemd's own 90 s cut off, and began again, what was starved on an emulated machine beside others."""

USERS = {
    "root": (0, "/root"), "nobody": (65534, "/nonexistent"), "systemd-network": (998, "/"), "systemd-resolve": (997, "/"), "systemd-timesync": (996, "/"), "novacron": (AGENT_UID, "/"), "mosquitto": (989, "/"),
}

GROUPS = {
    "tty": 5, "disk": 6, "lp": 7, "dialout": 20, "cdrom": 24, "tape": 26, "audio": 29, "video": 44, "input": 104, "kvm": 105, "render": 106, "sgx": 107, "kmem": 15, "utmp": 43, "adm": 4, "systemd-journal": 995, "users": 100, "clock": 108,
    "nogroup": 65534,
}

MASKED = (
    "getty@.service", "serial-getty@.service", "console-getty.service", "container-getty@.service", "autovt@.service", "debug-shell.service", "systemd-sysusers.service", "systemd-firstboot.service", "ldconfig.service",
    "systemd-hwdb-update.service", "systemd-journal-catalog-update.service", "systemd-machine-id-commit.service", "systemd-update-done.service", "systemd-logind.service", "systemd-logind-varlink.socket", "systemd-journal-flush.service", "systemd-user-sessions.service",
    "systemd-ask-password-console.path", "systemd-ask-password-wall.path", "e2scrub_reap.service", "e2scrub_all.timer", "fstrim.timer", "systemd-networkd-persistent-storage.service", "systemd-networkd-wait-online.service",
    "systemd-boot-random-seed.service", "systemd-boot-update.service", "systemd-boot-clear-sysfail.service", "systemd-pcrlock-make-policy.service", "systemd-vconsole-setup.service", "proc-sys-fs-binfmt_misc.automount", "dev-hugepages.mount",
    "systemd-userdbd.socket", "systemd-mountfsd.socket", "systemd-nsresourced.socket", "dm-event.socket", "mosquitto.service",
    "getty-static.service", "getty.target", "modprobe@configfs.service", "modprobe@fuse.service", "modprobe@drm.service", "modprobe@efi_pstore.service", "sys-kernel-debug.mount", "sys-kernel-tracing.mount", "sys-kernel-config.mount",
    "sys-fs-fuse-connections.mount", "dev-mqueue.mount", "systemd-sysext.socket", "systemd-hostnamed.socket", "systemd-creds.socket", "systemd-initctl.socket", "systemd-importd.socket", "systemd-bootctl.socket",
    "systemd-pcrextend.socket", "systemd-pcrlock.socket", "systemd-random-seed.service", "systemd-modules-load.service", "systemd-remount-fs.service", "systemd-udev-load-credentials.service", "systemd-tmpfiles-clean.timer",
    "systemd-binfmt.service", "systemd-sysext.service", "systemd-confext.service", "systemd-tpm2-setup.service", "systemd-tpm2-setup-early.service", "systemd-pstore.service", "systemd-battery-check.service", "run-lock.mount",
)
"""No logins and no shells, on no console; nothing that writes to the root; nothing that a device does not need at boot."""

_NETWORK = """[Match]
Type=ether
Kind=!*

[Network]
DHCP=yes
LLMNR=no
MulticastDNS=no
"""

_FSTAB = f"""PARTLABEL={DATA_NAME} {DATA} ext4 noatime,nodev,nosuid,noexec,errors=remount-ro,nofail,x-systemd.device-timeout={DATA_WAIT_S}s 0 2
tmpfs /var tmpfs mode=0755,nodev,nosuid,noexec,size=25% 0 0
tmpfs /tmp tmpfs mode=1777,nodev,nosuid,noexec,size=25% 0 0
"""

def enable(tree: Tree, unit: str, target: str) -> None:
    """What `systemctl enable` would do."""
    tree.link(f"/etc/systemd/system/{target}.wants/{unit}", f"/usr/lib/systemd/system/{unit}")


def add(tree: Tree, arch: Architecture, chosen: Profile, agent_unit: str, containers_drop_in: str, version: str, sequence: int = 0, keys: Mapping[str, bytes] | None = None) -> None:
    """Put all of it into the tree, over what the packages brought. `keys`: public keys (PEM) by name, whose bundles the device takes."""
    for name in ("proc", "sys", "dev", "run", "tmp", "var", "root", "mnt"):
        tree.folder(f"/{name}", 0o700 if name == "root" else 0o755)
    gids = {**{name: uid for name, (uid, _) in USERS.items() if name != "nobody"}, **GROUPS}
    tree.file("/etc/passwd", "".join(f"{name}:x:{uid}:{gids.get(name, 65534)}::{home}:/usr/sbin/nologin\n" for name, (uid, home) in USERS.items()))
    tree.file("/etc/group", "".join(f"{name}:x:{gid}:\n" for name, gid in gids.items()))
    tree.file("/etc/shadow", "".join(f"{name}:!*:1::::::\n" for name in USERS), 0o600)
    tree.file("/etc/machine-id", "")
    tree.file("/etc/hostname", "novacron\n")
    tree.file("/etc/hosts", "127.0.0.1 localhost\n::1 localhost\n127.0.1.1 novacron\n")
    tree.file("/etc/nsswitch.conf", "passwd: files\ngroup: files\nshadow: files\nhosts: files dns\n")
    tree.file("/usr/lib/os-release", f'NAME=NovaCron\nID=novacron\nID_LIKE=debian\nPRETTY_NAME="NovaCron {chosen.name} {version}"\nVERSION_ID={version}\nVARIANT_ID={chosen.name}\n')
    tree.link("/etc/os-release", "../usr/lib/os-release")
    tree.file("/etc/fstab", _FSTAB)
    tree.link("/etc/mtab", "../proc/self/mounts")
    tree.link("/etc/resolv.conf", "../run/systemd/resolve/resolv.conf")
    tree.link("/etc/localtime", "../usr/share/zoneinfo/Etc/UTC")
    tree.file("/etc/systemd/network/80-novacron.network", _NETWORK)
    tree.file("/etc/systemd/system.conf.d/novacron.conf", f"[Manager]\nRuntimeWatchdogSec=30s\nRebootWatchdogSec=2min\nShowStatus=yes\nDumpCore=no\nDefaultTimeoutStartSec={START_S}s\nDefaultTimeoutStopSec=30s\n")
    tree.file("/etc/systemd/journald.conf.d/novacron.conf", "[Journal]\nStorage=volatile\nRuntimeMaxUse=8M\nForwardToConsole=no\nRateLimitBurst=1000\n")
    tree.file("/etc/systemd/resolved.conf.d/novacron.conf", "[Resolve]\nLLMNR=no\nMulticastDNS=no\nDNSStubListener=no\n")
    tree.file("/etc/sysctl.d/90-novacron.conf", "kernel.panic=10\nkernel.panic_on_oops=1\nkernel.kptr_restrict=2\nkernel.dmesg_restrict=1\nkernel.unprivileged_bpf_disabled=1\nkernel.sysrq=0\nfs.suid_dumpable=0\nvm.overcommit_memory=0\n")
    tree.file("/etc/modprobe.d/novacron.conf", "blacklist pcspkr\n")
    for unit in MASKED:
        tree.link(f"/etc/systemd/system/{unit}", "/dev/null")
    tree.file("/usr/lib/systemd/system/systemd-resolved.service.d/novacron.conf", "[Unit]\n# /var is memory that has to be mounted first.\nAfter=local-fs.target\n")
    for unit in ("emergency", "rescue"):
        tree.file(f"/etc/systemd/system/{unit}.service.d/novacron.conf", units.NO_LOGIN)
    tree.link("/etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target")
    for unit, target in (("systemd-networkd.service", "multi-user.target"), ("systemd-networkd.socket", "sockets.target"), ("systemd-resolved.service", "multi-user.target"), ("systemd-timesyncd.service", "multi-user.target")):
        enable(tree, unit, target)
    if NETWORK_ORDER not in agent_unit:
        raise ValueError(f"the agent's unit has no line {NETWORK_ORDER!r}")
    agent_unit = agent_unit.replace(NETWORK_ORDER, "")
    ours = {"novacron-provision.service": units.PROVISION, "novacron-grow.service": units.GROW, "novacron-configured.service": units.CONFIGURED, "novacron-report.service": units.REPORT, "novacron-edge.service": agent_unit}
    if "broker" in chosen.extra:
        ours["novacron-broker.service"] = broker.UNIT
        tree.file("/etc/mosquitto/novacron.conf", broker.CONFIGURATION)
        tree.file("/usr/lib/systemd/system/novacron-provision.service.d/broker.conf", broker.PROVISION_DROP_IN)
        tree.file("/usr/lib/systemd/system/novacron-edge.service.d/30-broker.conf", broker.AGENT_DROP_IN)
        for name, text in (("take", broker.TAKE), ("ready", broker.MAKE_READY), ("ended", broker.ENDED)):
            tree.file(f"{broker.SCRIPTS}/broker-{name}", text, 0o755)
    ours |= {"novacron-update.service": units.UPDATE, "novacron-update.path": units.UPDATE_PATH}
    for unit, text in ours.items():
        tree.file(f"/usr/lib/systemd/system/{unit}", text)
        enable(tree, unit, "multi-user.target")
    tree.file("/usr/lib/systemd/system/novacron-gate.service", units.GATE)
    tree.file("/usr/lib/systemd/system/novacron-gate.timer", units.GATE_TIMER)
    enable(tree, "novacron-gate.timer", "sysinit.target")
    tree.file("/usr/lib/systemd/system/novacron-no-data.service", units.NO_DATA)
    tree.file("/usr/lib/systemd/system/novacron-no-data.timer", units.NO_DATA_TIMER)
    enable(tree, "novacron-no-data.timer", "sysinit.target")
    tree.file(f"/usr/lib/systemd/system/{DATA.strip('/').replace('/', '-')}.mount.d/novacron.conf", units.DATA_DROP_IN)
    tree.file("/usr/lib/systemd/system/novacron-lasted.service", units.LASTED)
    tree.file("/usr/lib/systemd/system/novacron-lasted.timer", units.LASTED_TIMER)
    enable(tree, "novacron-lasted.timer", "timers.target")
    tree.file("/usr/lib/novacron/image.json", json.dumps({"arch": arch.name, "profile": chosen.name, "version": version, "sequence": sequence}))
    for name, data in (keys or {}).items():
        tree.file(f"{UPDATE_KEYS}/{name}.pem", data)
    tree.file("/usr/lib/systemd/system/novacron-edge.service.d/10-image.conf", units.agent_drop_in(chosen))
    if "containers" in chosen.extra:
        tree.file("/usr/lib/systemd/system/novacron-edge.service.d/20-containers.conf", containers_drop_in + "SystemCallFilter=\nRestrictSUIDSGID=no\nRestrictRealtime=no\n")
    tree.file("/usr/lib/novacron/provision", scripts.PROVISION, 0o755)
    tree.file("/usr/lib/novacron/configured", scripts.CONFIGURED, 0o755)
    tree.file("/usr/lib/novacron/grow", scripts.GROW, 0o755)
    for number, (name, more) in enumerate((*((slot, "Weight=0\n") for slot in slots.SLOTS), (DATA_NAME, ""))):
        tree.file(f"{REPART}/{number}-{name}.conf", f"[Partition]\nType=linux-generic\nLabel={name}\n{more}")
    tree.file("/usr/lib/novacron/report", scripts.REPORT, 0o755)
    tree.file("/usr/sbin/fsck", scripts.FSCK, 0o755)
    tree.link("/usr/bin/sh", "busybox")
    tree.link("/usr/sbin/nologin", "../bin/false")
    tree.link("/usr/bin/false", "busybox")


def command_line(arch: Architecture) -> str:
    """The kernel's command line, without what names the slot (`edge_runtime.updates.slots.slot_words`). `gpt`: where the first partition table is damaged, the one at the end of the disk is taken."""
    return (
        f"console=tty0 console={arch.console} quiet loglevel=4 panic=10 ro fsck.repair=yes gpt systemd.gpt_auto=no systemd.show_status=yes systemd.tty.term.console=dumb lockdown=integrity"
    )
