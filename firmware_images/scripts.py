"""The shell scripts of an image: the initrd's first program, first boot, what a start tells the console. Pure: texts; where each goes is in `contents` and `initrd`."""

from edge_runtime.updates import slots

from .layout import DATA, ESP_NAME, PROVISIONED

ROOT_WAIT_TENTHS = 300
"""Tenths of a second that the initrd waits for the root's disk; a slow USB stick takes ten seconds."""

LASTING_STARTS = 3
"""Starts in a row of which none lasted, after which the initrd reads the whole slot before it starts it: as many as an image on trial has. They are no proof of damage (a power supply may fail as often), what is read is."""

STOPPED_S = 60
"""Seconds between two lines of a device that stays off: whoever opens its console need not wait long."""

PROVISION = f"""#!/bin/sh
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

FSCK = """#!/bin/sh
# systemd asks for `fsck -y ... DEVICE`; the only file system here that is checked is the data partition's.
for device; do :; done
exec /usr/sbin/fsck.ext4 -y "$device"
"""

REPORT = """#!/bin/sh
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

INIT = f"""#!/bin/sh
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
