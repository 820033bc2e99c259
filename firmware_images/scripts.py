"""The shell scripts of an image: the initrd's first program, what takes a configuration over, what gives a disk's rest to the data, what a start tells the console. Pure: texts; where each goes is in `contents` and `initrd`."""

from edge_runtime.updates import slots

from .layout import DATA, ESP_NAME, PROVISIONED, REPART, TOLD

ROOT_WAIT_TENTHS = 300
"""Tenths of a second that the initrd waits for the root's disk; a slow USB stick takes ten seconds."""

LASTING_STARTS = 3
"""Starts in a row of which none lasted, after which the initrd reads the whole slot before it starts it: as many as an image on trial has. They are no proof of damage (a power supply may fail as often), what is read is."""

STOPPED_S = 60
"""Seconds between two lines of a device that stays off: whoever opens its console need not wait long."""

GIVEN_MAX_BYTES = 1 << 20
"""A larger file in the boot partition is none that a device takes over: systemd takes no larger credential, and a damaged FAT may say any length."""

SETTLED_S = 10
"""Seconds after its start that an agent has to run for its new configuration to be kept."""

_CONFIGURATION = f"""config={DATA}/config
# Beside what is kept: what is looked at; what is decided on, whole, and put into its place by `finish`; what is gone back to; the sum of what the agent did not start with.
new=$config/.new take=$config/.take before=$config/.before refused=$config/.refused
digest() {{
  (cd $1 && for name in {" ".join(PROVISIONED)}; do [ -e $name ] && busybox sha256sum $name; done | busybox sha256sum)
}}
"""

TELL = f"""# What the hub is told: of what, what came of it, why.
tell() {{ busybox mkdir -p -m 755 {TOLD} && printf '%s\\n%s\\n' "$2" "$3" > {TOLD}/$1.new && busybox chmod 644 {TOLD}/$1.new && busybox mv {TOLD}/$1.new {TOLD}/$1; }}
"""

PROVISION = f"""#!/bin/sh
# At each boot, before the agent: what is given, as credentials (novacron.edge.yaml, ...), else in the folder novacron of the boot partition, is checked and taken over as a whole where it differs from what is kept.
# A file that is not given stays as it is kept: a certificate is renewed by its two files.
set -u
umask 027
{_CONFIGURATION}{TELL}busybox mkdir -p $config
busybox chgrp novacron $config
finish() {{
  for name in edge.yaml.json {" ".join(PROVISIONED)}; do
    if [ -e $take/$name ]; then busybox mv $take/$name $config/$name; fi
  done
  busybox sync
  busybox rm -rf $take
}}
# The power was cut in between, or `configured` goes back.
if [ -d $take ]; then finish; fi
# As what the agent will see: in the place of what is kept. What it says as JSON is put beside it: a start need not read YAML.
check() {{
  busybox unshare -m sh -c "/usr/bin/mount --bind $1 $config && exec python3 -OO -m edge_runtime check --quick --strict --config $config/edge.yaml" 2> $1/.said
  found=$?
  busybox cat $1/.said >&2
  return $found
}}
# What the agent ran with last, to be gone back to. Where that is still there, what is kept has not been proven.
keep() {{
  [ ! -d $before ] || return 0
  busybox mkdir -p $before.new || return 1
  for name in edge.yaml.json {" ".join(PROVISIONED)}; do
    if [ -e $config/$name ]; then busybox cp -p $config/$name $before.new/$name || return 1; fi
  done
  busybox sync
}}
named() {{ busybox sed -n 's/^ "edge_id": \\(.*[^,]\\),*$/\\1/p'; }}
from="${{CREDENTIALS_DIRECTORY:-/nonexistent}}" prefix=novacron. mounted=
given() {{
  for name in {" ".join(name for name in PROVISIONED if name != "report")}; do [ -e "$from/$prefix$name" ] && return 0; done
  return 1
}}
if ! given; then
  from=/run/novacron-esp prefix=
  busybox mkdir -p $from
  # Busybox's programs, which are there already: kmod and mount load libraries of five megabytes, and the kernel would start kmod three times. By the name that udev gives, which may come late; the other one looks at all disks.
  busybox modprobe -a -q vfat nls_cp437 nls_ascii
  busybox mount -t vfat -o ro,nodev,nosuid,noexec /dev/disk/by-partlabel/{ESP_NAME} $from 2> /dev/null || /usr/bin/mount -o ro,nodev,nosuid,noexec PARTLABEL={ESP_NAME} $from
  busybox grep -q " $from " /proc/mounts && mounted=$from && from=$from/novacron
fi
differs=
for name in {" ".join(PROVISIONED)}; do
  if [ -e "$from/$prefix$name" ] && ! busybox cmp -s "$from/$prefix$name" $config/$name; then differs=1; fi
done
if [ -n "$differs" ]; then
  why= more=
  busybox rm -rf $new $before.new
  busybox mkdir -p $new
  for name in {" ".join(PROVISIONED)}; do
    source="$from/$prefix$name"
    [ -e "$source" ] || source=$config/$name
    [ -e "$source" ] || continue
    if [ "$(busybox stat -L -c %s "$source")" -gt {GIVEN_MAX_BYTES} ]; then why="$name is larger than {GIVEN_MAX_BYTES} bytes"; break; fi
    busybox cp "$source" $new/$name && busybox chmod 640 $new/$name && busybox chgrp novacron $new/$name || why="$name cannot be copied"
  done
  if [ -n "$why" ]; then
    :
  elif [ ! -s $new/edge.yaml ]; then
    why="edge.yaml is not among the files"
  elif [ "$(digest $new)" = "$(busybox cat $refused 2> /dev/null)" ]; then
    why="it is the one with which the agent did not start"
  elif ! said="$(check $new)"; then
    why="see above" more="$(busybox tail -c 1000 $new/.said | busybox tr '\\n' ' ')"
  elif [ -s $config/edge.yaml ] && ! keep; then
    why="there is no room for what is gone back to"
  elif [ -s $config/edge.yaml ]; then
    # Its journal is that one's: under another name it would begin in the middle.
    was="$(python3 -OO -m edge_runtime check --config $config/edge.yaml 2> /dev/null | named)" is="$(printf '%s\\n' "$said" | named)"
    [ -z "$was" ] || [ "$is" = "$was" ] || why="edge_id is $is, and this device is $was: write its disk anew for another name"
  fi
  if [ -n "$why" ]; then
    echo "novacron: the configuration that is given cannot be used ($why); nothing was taken over."
    tell configuration refused "${{more:-$why}}"
  else
    if [ -e $new/edge.yaml.json ]; then busybox chgrp novacron $new/edge.yaml.json; fi
    if [ -d $before.new ]; then busybox mv $before.new $before; fi
    busybox sync
    busybox mv $new $take
    finish
    echo "novacron: configuration taken over."
    tell configuration taken ""
  fi
  busybox rm -rf $new $before.new
fi
[ -z "$mounted" ] || busybox umount $mounted
if [ ! -s $config/edge.yaml ]; then
  echo "novacron: no configuration. Give the credential novacron.edge.yaml, or put edge.yaml into the folder novacron of the boot partition, and start again."
fi
# A device that was set up by an image that did not keep it.
if [ -s $config/edge.yaml ] && [ ! -s $config/edge.yaml.json ]; then
  python3 -OO -m edge_runtime check --quick --config $config/edge.yaml > /dev/null
  if [ -e $config/edge.yaml.json ]; then busybox chgrp novacron $config/edge.yaml.json; fi
fi
exit 0
"""

CONFIGURED = f"""#!/bin/sh
# After the agent's first start with another configuration: one with which it does not start is not kept.
set -u
umask 027
{_CONFIGURATION}busybox sleep {SETTLED_S}
if systemctl is-active --quiet novacron-edge.service; then
  # By its name first: half of it is nothing to go back to.
  busybox mv $before $before.new
  busybox rm -rf $before.new $refused
  busybox sync
  echo "novacron: the agent runs with its new configuration."
else
  digest $config > $refused.new
  busybox mv $refused.new $refused
  busybox sync
  busybox rm -rf $take
  busybox mv $before $take
  busybox sync
  echo "novacron: the agent does not start with its new configuration; going back to the one before, and starting again."
  systemctl reboot
fi
exit 0
"""

GROW_SECTORS = 65_536
"""Sectors of 512 bytes behind the data partition from which on it gets them: 32 MiB. An image leaves one behind it, a disk of the image's own size nothing else."""

GROW = f"""#!/bin/sh
# After the data partition is mounted: where the disk is larger than the image, it gets the rest. Once, as a rule: at the first start.
set -u
number() {{ busybox cat /sys/class/block/$1/$2; }}
part=$(busybox sed -n 's,^/dev/\\([^ ]*\\) {DATA} .*,\\1,p' /proc/mounts)
[ -n "$part" ] || exit 0
disk=$(busybox basename "$(busybox dirname "$(busybox readlink -f /sys/class/block/$part)")")
[ $(($(number $disk size) - $(number $part start) - $(number $part size))) -ge {GROW_SECTORS} ] || exit 0
# It writes the table at the end of the disk first and then the one at the front: one of them is whole, wherever the power is cut.
if systemd-repart --dry-run=no --definitions={REPART} /dev/$disk > /dev/null && /usr/lib/systemd/systemd-growfs {DATA}; then
  echo "novacron: the data partition has $(($(number $part size) / 2048)) MiB now."
else
  echo "novacron: the data partition stays as it is: it could not be given the rest of the disk (above)."
fi
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
