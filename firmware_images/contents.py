"""What an image has beside Debian's files: users, mounts, units, the scripts of initrd and first boot. Pure: names and texts."""

import json
from collections.abc import Mapping

from edge_runtime.updates import slots

from .recipes import Architecture, Profile
from .tree import Tree

DATA = "/var/lib/novacron"
"""The data partition: journal and models in edge/, configuration in config/."""

ESP_NAME, DATA_NAME = "novacron-esp", "novacron-data"
"""Names of partitions, beside the two slots (`edge_runtime.updates.slots`). The initrd takes a slot by its name and its root hash, so that no other disk's slot is taken for it."""

AGENT_UID = 990

PROVISIONED = ("ca.pem", "cert.pem", "key.pem", "api.token", "report", "edge.yaml")
"""Files that first boot takes over, edge.yaml last: where it is, the others are whole. `report`, whatever is in it, has each start told on the console."""

UPDATE_KEYS = "/usr/lib/novacron/update-keys"
"""Public keys whose bundles a device takes; without one it takes none."""

NETWORK_ORDER = "After=network.target\n"
"""What the image leaves out of the agent's unit: a device decides without a network, so it starts beside it."""

ROOT_WAIT_TENTHS = 300
"""Tenths of a second that the initrd waits for the root's disk; a slow USB stick takes ten seconds."""

DATA_WAIT_S = 1800
"""Longest wait for the data partition; then the device starts again, as there is nothing that it can do without. A slow card takes half a minute; emulated beside 20 others, udev named it after 370 s (2026-11-29)."""

TRIAL_DATA_WAIT_S = 900
"""The same where the boot loader counts the start: an image that cannot reach the data goes back the sooner. More than twice the longest wait that was seen."""

NO_DATA_PAUSE_S = 30
"""Seconds between the word that there is no data partition and the next start: to be read on the console."""

START_S = 300
"""Longest start of one service: systemd's own 90 s cut off, and began again, what was starved on an emulated machine beside others."""

LASTING_STARTS = 3
"""Starts in a row of which none lasted, after which the initrd reads the whole slot before it starts it: as many as an image on trial has. They are no proof of damage (a power supply may fail as often), what is read is."""

LASTED_S = 300
"""Seconds after which a start counts as one that lasted; as long as an image on trial has for its proof."""

STOPPED_S = 60
"""Seconds between two lines of a device that stays off: whoever opens its console need not wait long."""

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

_PROVISION_UNIT = f"""[Unit]
Description=NovaCron: take over the configuration at first boot
RequiresMountsFor={DATA}
Before=novacron-edge.service

[Service]
Type=oneshot
RemainAfterExit=yes
ImportCredential=novacron.*
ExecStart=/usr/lib/novacron/provision
StandardOutput=journal+console
StandardError=journal+console

[Install]
WantedBy=multi-user.target
"""

_PROVISION = f"""#!/bin/sh
# At each boot until there is a configuration: from credentials (novacron.edge.yaml, ...), else from the folder novacron of the boot partition. Checked, then taken over as a whole.
set -u
umask 027
config={DATA}/config
busybox mkdir -p $config
busybox chgrp novacron $config
# What the configuration says as JSON beside it: a start need not read YAML. A device that was set up by an image without it gets it here, once.
quick() {{
  python3 -OO -m edge_runtime check --quick --config $1 > /dev/null || return 1
  if [ -e $1.json ]; then busybox chgrp novacron $1.json; fi
}}
if [ -s $config/edge.yaml ]; then
  [ -s $config/edge.yaml.json ] || quick $config/edge.yaml
  exit 0
fi
from="${{CREDENTIALS_DIRECTORY:-/nonexistent}}"
prefix=novacron.
if [ ! -s "$from/${{prefix}}edge.yaml" ]; then
  from=/run/novacron-esp prefix=
  busybox mkdir -p $from
  # By its path: busybox's shell would take its own mount, which knows no names of partitions.
  /usr/bin/mount -o ro,nodev,nosuid,noexec PARTLABEL={ESP_NAME} $from && from=$from/novacron
fi
if [ ! -s "$from/${{prefix}}edge.yaml" ]; then
  echo "novacron: no configuration. Give the credential novacron.edge.yaml, or put edge.yaml into the folder novacron of the boot partition, and start again."
else
  for name in {" ".join(PROVISIONED)}; do
    if [ -e "$from/$prefix$name" ]; then
      busybox cp "$from/$prefix$name" $config/.$name && busybox chmod 640 $config/.$name && busybox chgrp novacron $config/.$name || exit 1
    fi
  done
  if ! quick $config/.edge.yaml; then
    echo "novacron: the configuration cannot be used (above); nothing was taken over."
    busybox rm -f $config/.??*
  else
    for name in edge.yaml.json {" ".join(PROVISIONED)}; do
      if [ -e $config/.$name ]; then busybox sync; busybox mv $config/.$name $config/$name; fi
    done
    busybox sync
    echo "novacron: configuration taken over."
  fi
fi
if busybox grep -q ' /run/novacron-esp ' /proc/mounts; then umount /run/novacron-esp; fi
exit 0
"""

_NO_LOGIN = """[Unit]
# There is no login on any console: say so on it and start again, which is also what a second slot needs.
[Service]
ExecStartPre=
ExecStart=
ExecStart=-/bin/sh -c 'echo "novacron: this start failed (above); starting again in 30 s" > /dev/console; busybox sleep 30; systemctl --force reboot'
"""

_FSCK = """#!/bin/sh
# systemd asks for `fsck -y ... DEVICE`; the only file system here that is checked is the data partition's.
for device; do :; done
exec /usr/sbin/fsck.ext4 -y "$device"
"""

_REPORT_UNIT = f"""[Unit]
Description=NovaCron: tell the console how the start went
ConditionCredential=|novacron.report
ConditionPathExists=|{DATA}/config/report
After=novacron-edge.service

[Service]
Type=exec
ImportCredential=novacron.report
ExecStart=/usr/lib/novacron/report
StandardOutput=tty
TTYPath=/dev/console

[Install]
WantedBy=multi-user.target
"""

_REPORT = """#!/bin/sh
# For tests and benchmarks: what the machine itself says, once the start is over, between two marks.
exec 2>&1
while systemctl is-system-running | busybox grep -Eq 'initializing|starting'; do busybox sleep 1; done
echo "=== novacron report"
systemctl show novacron-edge.service -p ActiveState,MainPID,ExecMainStartTimestampMonotonic,ActiveEnterTimestampMonotonic,NRestarts
systemd-analyze time
systemd-analyze --no-pager critical-chain novacron-edge.service
busybox grep -E '^(MemTotal|MemFree|MemAvailable|Cached|Slab|AnonPages):' /proc/meminfo
pid=$(systemctl show novacron-edge.service -p MainPID --value)
busybox grep -E '^(VmRSS|VmHWM|RssAnon|RssFile):' /proc/$pid/status
echo "listening:"
busybox awk 'FNR > 1 && $4 == "0A" {print FILENAME, $2}' /proc/net/tcp /proc/net/tcp6
busybox awk 'FNR > 1 && $4 == "07" {print FILENAME, $2}' /proc/net/udp /proc/net/udp6
echo "failed:"
systemctl list-units --failed --plain --no-legend --no-pager
echo "slot:"
busybox grep -o 'novacron.slot=[^ ]*' /proc/cmdline
echo "root:"
busybox grep ' / ' /proc/mounts
echo "command line:"
busybox cat /proc/cmdline
echo "=== end of report"
"""

_INIT = f"""#!/bin/sh
# Find the slot that the command line names, let dm-verity vouch for each block of it, and go there. Nothing is started that the root hash does not cover.
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sysfs /sys
mount -t devtmpfs devtmpfs /dev
say() {{ echo "novacron: $*" > /dev/console; }}
again() {{
  say "$*; starting again in 10 s"
  sync
  sleep 10
  reboot -f
}}
stay_off() {{
  while :; do
    say "$*; this device stays off until its power is cut: write its disk anew"
    sleep {STOPPED_S}
  done
}}
name= table= up=
for word in $(cat /proc/cmdline); do
  case "$word" in
    novacron.slot=*) name="${{word#*=}}" ;;
    novacron.verity=*) table="${{word#*=}}" ;;
  esac
done
[ -n "$name" ] && [ -n "$table" ] || again "the command line names no slot"
# novacron.verity=BLOCKS:ROOT:SALT
blocks="${{table%%:*}}"; rest="${{table#*:}}"; root="${{rest%%:*}}"; salt="${{rest#*:}}"
# Each block of the root is hashed: by the processor's own instructions where it has them. They come first: dm-verity takes the quickest there is, and busybox's modprobe does not know modules by features of the processor.
for quick in sha256-ssse3 sha256-arm64 sha256-ce; do modprobe -q $quick; done
modprobe -a -q dm-verity squashfs
# An image on trial is left by the boot loader, which counts its starts. One that is kept is not counted: leave it for the other slot, which tells why; stay off where there is none.
damaged() {{
  say "$*"
  modprobe -a -q vfat nls_cp437 nls_ascii
  for found in /sys/class/block/*/uevent; do
    grep -q '^PARTNAME={ESP_NAME}$' "$found" || continue
    mount -t vfat /dev/$(sed -n 's/^DEVNAME=//p' "$found") /esp || continue
    # Another disk may have such a partition too: ours has the entry that we were started by.
    mine=$(grep -l ":$root:" /esp/{slots.ENTRIES}/novacron-*.conf)
    if [ -z "$mine" ]; then
      umount /esp
      continue
    fi
    for entry in /esp/{slots.ENTRIES}/novacron-*.conf; do
      case "$entry" in *+0*) continue ;; esac
      grep -q ":$root:" "$entry" && continue
      case "$mine" in *+*) umount /esp; again "$*" ;; esac
      echo "$name $root $*" > /esp/{slots.DAMAGED}.new && sync && mv /esp/{slots.DAMAGED}.new /esp/{slots.DAMAGED} && sync && rm $mine && umount /esp && again "the other slot is taken"
      umount /esp
      again "$*, and its entry cannot be taken away"
    done
    umount /esp
  done
  stay_off "$*, and there is no other slot that could start"
}}
tried=0
other=
while :; do
  find /sys/devices -name modalias -exec cat {{}} + 2> /dev/null | sort -u > /modaliases
  xargs -r modprobe -a -q < /modaliases 2> /dev/null
  for found in /sys/class/block/*/uevent; do
    grep -q "^PARTNAME=$name\\$" "$found" || continue
    device=/dev/$(sed -n 's/^DEVNAME=//p' "$found")
    [ -b "$device" ] || continue
    # The top of the hash tree, right behind the data: another disk's slot of this name, or one half written, has another.
    top=$({{ printf "$(echo "$salt" | sed 's/../\\\\x&/g')"; dd if="$device" bs=4096 skip="$blocks" count=1 2> /dev/null; }} | sha256sum)
    [ "${{top%% *}}" = "$root" ] && up=1 && break
    other=1 tried=$((tried + 9))
  done
  [ -n "$up" ] && break
  tried=$((tried + 1))
  [ $tried -lt {ROOT_WAIT_TENTHS} ] || break
  usleep 100000
done
if [ -z "$up" ]; then
  [ -z "$other" ] || damaged "the slot $name is damaged: no disk's slot $name has the root hash $root"
  again "no disk's slot $name is there"
fi
verity="0 $((blocks * 8)) verity 1 $device $device 4096 4096 $blocks $blocks sha256 $root $salt"
whole() {{
  dmsetup create novacron-whole --readonly --noudevsync --noudevrules --table "$verity" || return 1
  dd if=/dev/dm-0 of=/dev/null bs=1M 2> /dev/null
  read=$?
  dmsetup remove --retry --noudevsync --noudevrules novacron-whole
  return $read
}}
# The slot's last block, behind all that an image may have there, counts the starts that have not lasted. A start that lasted makes it zero (`edge_runtime.updates lasted`).
at=$(($(cat /sys/class/block/${{device#/dev/}}/size) / 8 - 1))
starts=0
line=$(dd if="$device" bs=4096 skip=$at count=1 2> /dev/null | tr -d '\\0')
case "$line" in "{slots.STARTS_WORD} $root "[0-9]) starts="${{line##* }}" ;; esac
if [ "$starts" -ge {LASTING_STARTS} ]; then
  say "$starts starts have not lasted: reading the whole slot $name"
  whole || whole || damaged "the slot $name is damaged: it was read twice and does not have its root hash"
  starts=0
fi
{{ echo "{slots.STARTS_WORD} $root $((starts + 1))"; dd if=/dev/zero bs=4096 count=1 2> /dev/null; }} | dd of="$device" bs=4096 seek=$at count=1 iflag=fullblock conv=notrunc,fsync 2> /dev/null
dmsetup create novacron-root --readonly --noudevsync --noudevrules --table "$verity 1 panic_on_corruption" || damaged "dm-verity refuses the slot $name"
# The only one there is; the node is the kernel's own, no udev runs here.
mount -t squashfs -o ro /dev/dm-0 /root || damaged "the slot $name is no squashfs"
mount --move /dev /root/dev
mount --move /sys /root/sys
mount --move /proc /root/proc
exec switch_root /root /usr/lib/systemd/systemd
"""

INITRD_APPLETS = ("sh", "mount", "cat", "sleep", "reboot", "modprobe", "find", "sort", "xargs", "grep", "sed", "usleep", "switch_root", "printf", "dd", "sha256sum", "echo", "umount", "rm", "mv", "sync", "tr")

INITRD_MODULES = (
    "dm-verity", "squashfs", "virtio_blk", "virtio_scsi", "virtio_pci", "virtio_mmio", "nvme", "ahci", "ata_piix", "sd_mod", "usb-storage", "uas", "xhci-pci", "xhci-plat-hcd", "ehci-pci", "mmc_block", "sdhci-pci", "sdhci-acpi", "sdhci-iproc",
    "sdhci-of-dwcmshc", "bcm2835", "dw_mmc-rockchip", "dwmac", "phy-generic", "vfat", "nls_cp437", "nls_ascii", "crc32c_generic", "crc32c_cryptoapi", "sha256_generic", "sha256-ssse3", "sha256_arm64", "sha256-ce",
)
"""Drivers of what a root may lie on; with what they depend on. A name that a kernel does not have (or has built in) is passed over."""


def _agent_drop_in(chosen: Profile) -> str:
    return f"""[Unit]
# Without a configuration the device waits for one; the console says so.
ConditionPathExists={DATA}/config/edge.yaml
After=novacron-provision.service
StartLimitIntervalSec=0

[Service]
ExecStart=
ExecStart=/usr/bin/python3 -OO -X no_debug_ranges -m edge_runtime run --config {DATA}/config/edge.yaml
Environment=PYTHONDONTWRITEBYTECODE=1
Environment=NOVACRON_EDGE__UPDATES__ENABLED=true
# A name of its own for a device whose configuration gives it none.
DynamicUser=no
User=novacron
StateDirectoryMode=0750
UMask=0027
MemoryMax={chosen.agent_memory_mib}M
OOMScoreAdjust=-900
# While the machine starts, what it is for comes first: what starts beside it (network, clock, names) can wait for the processor.
StartupCPUWeight=10000
SystemCallFilter=@system-service
SystemCallErrorNumber=EPERM
ProtectClock=yes
ProtectHostname=yes
ProtectKernelLogs=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RemoveIPC=yes
"""


_BROKER_UNIT = """[Unit]
Description=NovaCron: the local broker
RequiresMountsFor=/var/lib/novacron
Before=novacron-edge.service

[Service]
Type=notify
ExecStart=/usr/sbin/mosquitto -c /etc/mosquitto/novacron.conf
Restart=always
RestartSec=1
User=mosquitto
StateDirectory=novacron/mosquitto
StateDirectoryMode=0700
MemoryMax=64M
TasksMax=16
LimitNOFILE=4096
NoNewPrivileges=yes
ProtectSystem=strict
ProtectHome=yes
PrivateTmp=yes
PrivateDevices=yes
ProtectKernelTunables=yes
ProtectKernelModules=yes
ProtectControlGroups=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
RestrictNamespaces=yes
LockPersonality=yes
SystemCallArchitectures=native
CapabilityBoundingSet=

[Install]
WantedBy=multi-user.target
"""

_BROKER = """# Loopback only: there is no default password, so nothing of the network gets in by default.
listener 1883 127.0.0.1
allow_anonymous true
set_tcp_nodelay true
persistence true
persistence_location /var/lib/novacron/mosquitto/
autosave_interval 60
log_dest stderr
"""


_UPDATE_UNIT = f"""[Unit]
Description=NovaCron: put an update into the other slot
RequiresMountsFor={DATA}
After=novacron-provision.service
ConditionPathExists=|{DATA}/edge/updates/request.json
ConditionPathExists=|{DATA}/updates/trial.json
# At the first start: whether the firmware counts starts.
ConditionPathExists=|!{DATA}/updates/firmware.json
StartLimitIntervalSec=0

[Service]
# Not oneshot: no start waits for a download.
Type=exec
ExecStart=/usr/bin/python3 -OO -X no_debug_ranges -m edge_runtime.updates turn
Restart=on-failure
RestartSec=10
RestartSteps=6
RestartMaxDelaySec=10min
Nice=10
IOSchedulingClass=idle
MemoryMax=64M
TasksMax=16
OOMScoreAdjust=500
StateDirectory=novacron/updates
StateDirectoryMode=0755
RuntimeDirectory=novacron-update
RuntimeDirectoryPreserve=yes
StandardOutput=journal+console
StandardError=journal+console
PrivateTmp=yes
ProtectSystem=strict
ProtectHome=yes
ProtectKernelTunables=yes
ProtectControlGroups=yes
ProtectKernelLogs=yes
ProtectClock=yes
ProtectHostname=yes
NoNewPrivileges=yes
RestrictSUIDSGID=yes
RestrictRealtime=yes
RestrictAddressFamilies=AF_INET AF_INET6 AF_UNIX
LockPersonality=yes
MemoryDenyWriteExecute=yes
SystemCallArchitectures=native
# It mounts the boot partition for itself, and reads what the agent asks for.
CapabilityBoundingSet=CAP_SYS_ADMIN CAP_DAC_READ_SEARCH
DevicePolicy=closed
DeviceAllow=block-* rw

[Install]
WantedBy=multi-user.target
"""

_UPDATE_PATH = f"""[Unit]
Description=NovaCron: what the agent asks of the updater

[Path]
PathChanged={DATA}/edge/updates/request.json

[Install]
WantedBy=multi-user.target
"""

_NO_DATA_UNIT = f"""[Unit]
Description=NovaCron: start again without the data partition
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
ConditionPathIsMountPoint=!{DATA}
# Each start of an image on trial is counted by the boot loader: it goes back by itself, whatever else is wrong with it. One that is kept tries again.
SuccessAction=reboot-force
FailureAction=reboot-force

[Service]
Type=oneshot
ExecStart=-/usr/bin/python3 -OO -X no_debug_ranges -m edge_runtime.updates no-data
ExecStart=/usr/bin/busybox sleep {NO_DATA_PAUSE_S}
RuntimeDirectory=novacron-update
RuntimeDirectoryPreserve=yes
PrivateMounts=yes
StandardOutput=journal+console
StandardError=journal+console
"""

_NO_DATA_TIMER = f"""[Unit]
Description=NovaCron: the longest wait of an image on trial for the data partition
DefaultDependencies=no
ConditionPathExists=/sys/firmware/efi/efivars/{slots.COUNTED_VARIABLE}

[Timer]
OnBootSec={TRIAL_DATA_WAIT_S}
AccuracySec=1

[Install]
WantedBy=sysinit.target
"""

_DATA_DROP_IN = """[Unit]
# Also where what it needs fails or does not come in time.
OnFailure=novacron-no-data.service
"""

_GATE_UNIT = f"""[Unit]
Description=NovaCron: go back from an image that does not prove itself
# Its timer's reason holds for itself too: default dependencies would have it wait for sysinit.target.
DefaultDependencies=no
Conflicts=shutdown.target
Before=shutdown.target
RequiresMountsFor={DATA}
ConditionPathExists={DATA}/updates/trial.json

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -OO -X no_debug_ranges -m edge_runtime.updates gate
StateDirectory=novacron/updates
StateDirectoryMode=0755
RuntimeDirectory=novacron-update
RuntimeDirectoryPreserve=yes
PrivateMounts=yes
StandardOutput=journal+console
StandardError=journal+console
"""

_GATE_TIMER = """[Unit]
Description=NovaCron: look whether an image on trial has proven itself
# Also where the start gets stuck before the targets that a device is to reach.
DefaultDependencies=no

[Timer]
OnBootSec=30
OnUnitInactiveSec=15
AccuracySec=1

[Install]
WantedBy=sysinit.target
"""


_LASTED_UNIT = f"""[Unit]
Description=NovaCron: this start has lasted
RequiresMountsFor={DATA}

[Service]
Type=oneshot
ExecStart=/usr/bin/python3 -OO -X no_debug_ranges -m edge_runtime.updates lasted
Nice=10
IOSchedulingClass=idle
MemoryMax=64M
StateDirectory=novacron/updates
StateDirectoryMode=0755
RuntimeDirectory=novacron-update
RuntimeDirectoryPreserve=yes
PrivateMounts=yes
StandardOutput=journal+console
StandardError=journal+console
"""

_LASTED_TIMER = f"""[Unit]
Description=NovaCron: after a while, this start has lasted

[Timer]
OnBootSec={LASTED_S}
AccuracySec=1

[Install]
WantedBy=timers.target
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
        tree.file(f"/etc/systemd/system/{unit}.service.d/novacron.conf", _NO_LOGIN)
    tree.link("/etc/systemd/system/default.target", "/usr/lib/systemd/system/multi-user.target")
    for unit, target in (("systemd-networkd.service", "multi-user.target"), ("systemd-networkd.socket", "sockets.target"), ("systemd-resolved.service", "multi-user.target"), ("systemd-timesyncd.service", "multi-user.target")):
        enable(tree, unit, target)
    if NETWORK_ORDER not in agent_unit:
        raise ValueError(f"the agent's unit has no line {NETWORK_ORDER!r}")
    agent_unit = agent_unit.replace(NETWORK_ORDER, "")
    ours = {"novacron-provision.service": _PROVISION_UNIT, "novacron-report.service": _REPORT_UNIT, "novacron-edge.service": agent_unit}
    if "broker" in chosen.extra:
        ours["novacron-broker.service"] = _BROKER_UNIT
        tree.file("/etc/mosquitto/novacron.conf", _BROKER)
    ours |= {"novacron-update.service": _UPDATE_UNIT, "novacron-update.path": _UPDATE_PATH}
    for unit, text in ours.items():
        tree.file(f"/usr/lib/systemd/system/{unit}", text)
        enable(tree, unit, "multi-user.target")
    tree.file("/usr/lib/systemd/system/novacron-gate.service", _GATE_UNIT)
    tree.file("/usr/lib/systemd/system/novacron-gate.timer", _GATE_TIMER)
    enable(tree, "novacron-gate.timer", "sysinit.target")
    tree.file("/usr/lib/systemd/system/novacron-no-data.service", _NO_DATA_UNIT)
    tree.file("/usr/lib/systemd/system/novacron-no-data.timer", _NO_DATA_TIMER)
    enable(tree, "novacron-no-data.timer", "sysinit.target")
    tree.file(f"/usr/lib/systemd/system/{DATA.strip('/').replace('/', '-')}.mount.d/novacron.conf", _DATA_DROP_IN)
    tree.file("/usr/lib/systemd/system/novacron-lasted.service", _LASTED_UNIT)
    tree.file("/usr/lib/systemd/system/novacron-lasted.timer", _LASTED_TIMER)
    enable(tree, "novacron-lasted.timer", "timers.target")
    tree.file("/usr/lib/novacron/image.json", json.dumps({"arch": arch.name, "profile": chosen.name, "version": version, "sequence": sequence}))
    for name, data in (keys or {}).items():
        tree.file(f"{UPDATE_KEYS}/{name}.pem", data)
    tree.file("/usr/lib/systemd/system/novacron-edge.service.d/10-image.conf", _agent_drop_in(chosen))
    if "containers" in chosen.extra:
        tree.file("/usr/lib/systemd/system/novacron-edge.service.d/20-containers.conf", containers_drop_in + "SystemCallFilter=\nRestrictSUIDSGID=no\nRestrictRealtime=no\nProtectClock=no\n")
    tree.file("/usr/lib/novacron/provision", _PROVISION, 0o755)
    tree.file("/usr/lib/novacron/report", _REPORT, 0o755)
    tree.file("/usr/sbin/fsck", _FSCK, 0o755)
    tree.link("/usr/bin/sh", "busybox")
    tree.link("/usr/sbin/nologin", "../bin/false")
    tree.link("/usr/bin/false", "busybox")


def initrd_init() -> str:
    """The initrd's first program."""
    return _INIT


def command_line(arch: Architecture) -> str:
    """The kernel's command line, without what names the slot (`edge_runtime.updates.slots.slot_words`)."""
    return (
        f"console=tty0 console={arch.console} quiet loglevel=4 panic=10 ro fsck.repair=yes systemd.gpt_auto=no systemd.show_status=yes systemd.tty.term.console=dumb lockdown=integrity"
    )
