"""What runs in the micro-VM of a converted workload: its first process, a shell script, and the scripts that it is sent. Pure; for the keeper too, which imports nothing else of the package.

Answers come as in `drivers.microvm_guest`; an order is a length, a line end and a script of that many bytes. CRIU is in the guest with its own libraries; there is no container runtime: its images say all that has to be made.

    flags NAME..                what its processor can do
    ready                       the guest has booted, its disks are mounted, and CRIU has once been through what it does
    restored N                  N processes are here and stand still
    process PID THREADS FDS     one of these, its pid as it sees it
    went                        they have been let go
    process .., dumped          they stand still again, and all of them is on the disk `work`
    trouble TEXT, exit CODE KILLED_FOR_MEMORY
"""

import shlex
from collections.abc import Iterable, Mapping, Sequence

PORTS = ("control", "out", "err", "exec_out", "exec_err")

MODULES = ("virtio_mmio", "virtio_console", "virtio_blk", "overlay", "virtio_net", "nf_tables", "nf_conntrack_netlink", "unix_diag", "tcp_diag", "udp_diag", "inet_diag", "netlink_diag", "af_packet_diag")
"""What a guest needs (see `drivers.qemu_kernel`), and by what CRIU looks at sockets and (it insists) at filters of packets."""

IMAGE, WORK, TRAVEL = "image", "work", "travel"
"""Serial numbers of the disks: the image's layers, what is written here, and what came with the workload."""

CHANGED = "changed.tar"
"""On the disk `travel`, beside CRIU's images: what it changed in its root."""

DEVICES = ("/dev/null", "/dev/zero", "/dev/full", "/dev/random", "/dev/urandom", "/dev/tty")
"""What a runtime mounts from its host into a container with a user namespace, also over what shall not be seen (the empty one)."""

SHOT = "images"
"""On the disk `work`: what CRIU writes."""

INIT = rb"""#!/bin/busybox sh
/bin/busybox mkdir /new
/bin/busybox mount -o bind / /new
cd /new
/bin/busybox mount --move . /
exec /bin/busybox chroot . /bin/busybox sh /stage
"""
"""CRIU changes the root of what it restores by pivot_root(2), which the first file system of a kernel does not allow; a second view of it, moved over it, does."""

STAGE = rb"""export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run; mkdir /tmp /etc /dev/pts; mount -t devpts devpts /dev/pts
mount --make-rprivate /
while read -r module; do insmod /modules/$module.ko; done < /modules/order
mount -t cgroup2 cgroup /sys/fs/cgroup
echo '+memory +pids +cpu' > /sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/program /run/images /run/state
echo -1000 > /proc/self/oom_score_adj
ip link set lo up
for port in 1 2 3 4 5; do until (exec 8>/dev/vport0p$port) 2>/dev/null; do sleep 0.02; done; done
exec 3<>/dev/vport0p1 4>/dev/vport0p2 5>/dev/vport0p3
for disk in /sys/block/vd*; do ln -s /dev/${disk##*/} /dev/$(cat $disk/serial); done
if mount -t ext4 -o ro,nodev /dev/image /image && mount -t ext4 -o nodev /dev/work /disk; then :; else echo 'trouble its disks cannot be mounted' >&3; fi
. /address
if [ -e /sys/class/net/eth0 ]; then ip link set eth0 address $HARDWARE; ip link set eth0 mtu $MTU; fi
criu check >/run/check 2>&1
timeout -s KILL 60 /bin/rehearse >/run/rehearsal 2>&1
grep -m1 ^flags /proc/cpuinfo | tr -d '\t:' >&3
echo ready >&3
while read -r size <&3; do eval "$(dd bs=$size count=1 iflag=fullblock <&3 2>/dev/null)"; done
poweroff -f
"""

_TAR = rb"""#!/bin/sh
z=; m=; d=
while [ $# -gt 0 ]; do
  case $1 in
    --create) m=c;; --extract) m=x;; --gzip) z=z;; --directory) shift; d=$1;; --directory=*) d=${1#*=};;
  esac
  shift
done
[ $m = c ] && exec busybox tar -c$z -C "$d" -f - .
exec busybox tar -x$z -C "$d" -f -
"""
"""CRIU keeps what is in a tmpfs by GNU tar's options."""

_CRIU = rb"""#!/bin/sh
exec /criu/loader --library-path /criu /criu/criu "$@"
"""

_PLUMB = rb"""#!/bin/sh
[ "$CRTOOLS_SCRIPT_ACTION" = setup-namespaces ] || exit 0
[ -e /sys/class/net/eth0 ] || exit 0
ip link set eth0 netns $CRTOOLS_INIT_PID
exec nsenter -t $CRTOOLS_INIT_PID -n sh /bin/connect
"""
"""The interface goes where the workload is."""

_CONNECT = rb"""#!/bin/sh
. /address
echo 0 >/proc/sys/net/ipv4/tcp_window_scaling
ip link set lo up
ip addr add $ADDRESS dev eth0
ip link set eth0 up
ip route add default via $GATEWAY
arp -s $GATEWAY $GATEWAY_HARDWARE
"""
"""There it has the address that the workload's connections have."""

_CENSUS = rb"""#!/bin/sh
n=0
first=$(cat /run/pid)
for p in $(cat /sys/fs/cgroup/program/cgroup.procs); do
  [ /proc/$p/ns/pid -ef /proc/$first/ns/pid ] || continue
  while read -r k a b c; do case $k in NSpid:) ns=$b;; Threads:) t=$a;; esac; done < /proc/$p/status
  set -- /proc/$p/fd/*
  echo "process $ns $t $#" >&3
  n=$((n+1))
done
"""
"""Says which processes the workload has: those in its first one's namespace of pids; CRIU has helpers in others."""

_RESTORED = rb"""#!/bin/sh
. /bin/census
echo restored $n >&3
exec /bin/await
"""
"""What becomes the parent of the restored: says what is there, and waits for the first one's end."""

_REHEARSE = rb"""#!/bin/sh
mkdir -p /run/rehearse && cd /run/rehearse || exit 1
setsid sleep 1000 </dev/null >/dev/null 2>&1 3>&- 4>&- 5>&- &
p=$!
until read -r name </proc/$p/comm && [ "$name" = sleep ]; do sleep 0.02; done
criu dump -t $p -D . -o dump.log -v2 --shell-job --network-lock skip || { cat dump.log; exit 1; }
criu restore -d -D . -o restore.log -v2 --shell-job || { cat restore.log; exit 1; }
kill -9 $p
cd /; rm -rf /run/rehearse
"""
"""Under emulation the first run of any code is slow. How it ends does not matter: what fails at the workload leaves it a container."""

_AWAIT = bytes.fromhex("4883ec10" "b83d000000" "48c7c7ffffffff" "4889e6" "31d2" "4d31d2" "0f05" "8b3c24" "89f8" "83e07f" "7408" "8db880000000" "eb03" "c1ef08" "b83c000000" "0f05")
"""x86_64: wait4(-1), then exit with the child's code, or 128 and its signal."""


def files(criu: Mapping[str, bytes], address: Mapping[str, str]) -> list[tuple[str, int, bytes]]:
    """What the guest's first file system has beyond a micro-VM's, as `drivers.qemu_kernel.cpio` takes it.

    Args:
        criu: the program (`criu`), its loader (`loader`) and its libraries.
        address: HARDWARE, MTU, ADDRESS (with its bits), GATEWAY, GATEWAY_HARDWARE: those of every workload that has a network.
    """
    from ..drivers.qemu_kernel import program  # not in the keeper

    scripts = {"bin/tar": _TAR, "bin/criu": _CRIU, "bin/plumb": _PLUMB, "bin/connect": _CONNECT, "bin/census": _CENSUS, "bin/restored": _RESTORED, "bin/rehearse": _REHEARSE, "bin/await": program(_AWAIT)}
    told = "".join(f"{name}={shlex.quote(value)}\n" for name, value in address.items())
    found = [("stage", 0o100644, STAGE), ("address", 0o100644, told.encode()), ("criu", 0o040755, b"")]
    found += [(f"criu/{name}", 0o100755, data) for name, data in criu.items()]
    return found + [(name, 0o100755, data) for name, data in scripts.items()]


def framed(script: str) -> bytes:
    """A script as it is sent."""
    raw = script.strip().encode()
    return b"%d\n%s" % (len(raw), raw)


def _options(externals: Iterable[str]) -> str:
    words = ["--root", "/root", "--tcp-established", "--file-locks", "--empty-ns", "net", "--manage-cgroups=ignore", "--ghost-limit", str(256 << 20), "--network-lock", "skip", "--leave-stopped", "-v2", "-W", "/run/state"]
    for one in externals:
        words += ["--external", one]
    return shlex.join(words)


def restore(*, pipes: Sequence[str], memory: int, pids: int, cpu_us: int, now_s: int) -> str:
    """The script that brings the workload back, standing still.

    Args:
        pipes: what its first process had as stdout and stderr (`pipe:[NUMBER]`).
    """
    inherit = shlex.join(word for at, pipe in zip((8, 9), pipes, strict=True) for word in ("--inherit-fd", f"fd[{at}]:{pipe}"))
    quota = f"echo '{cpu_us} 100000' >/sys/fs/cgroup/program/cpu.max" if cpu_us else ""
    return f"""
date -s @{now_s} >/dev/null
echo {memory} >/sys/fs/cgroup/program/memory.max; echo 1 >/sys/fs/cgroup/program/memory.oom.group; echo {pids} >/sys/fs/cgroup/program/pids.max
{quota}
if mount -t ext4 -o ro,nodev /dev/{TRAVEL} /run/images && tar -x -C /disk/upper -f /run/images/{CHANGED}
then :
else echo 'trouble what came with it cannot be read' >&3; fi
if mount -t overlay -o nodev,lowerdir=/image,upperdir=/disk/upper,workdir=/disk/work root /root
then
(
  {{ {{ read -r self rest </proc/self/stat; echo $self >/run/writer
  (echo 0 >/sys/fs/cgroup/program/cgroup.procs; exec criu restore -D /run/images -o restore.log --pidfile /run/pid {inherit} {_options(f"mnt[{device}]:{device}" for device in DEVICES)} --action-script /bin/plumb --exec-cmd -- /bin/restored
  ) 8>&1 9>&7 7>&- >/run/said 2>&1 </dev/null; echo $? >/run/code; }} 4>&- | cat >&4; }} 7>&1 5>&- | cat >&5
  set -- $(cat /run/code) $(grep '^oom_kill ' /sys/fs/cgroup/program/memory.events)
  if [ -e /run/pid ]; then echo "exit $1 $3" >&3; else echo "trouble CRIU: $(grep -h Error /run/state/restore.log /run/said 2>/dev/null | head -n 4 | tr '\\n' ' ') $(tail -n3 /run/said | tr '\\n' ' ')" >&3; fi
) &
else echo 'trouble its root cannot be mounted' >&3; fi
"""


def go() -> str:
    """The script that lets it go."""
    return "for one in $(cat /sys/fs/cgroup/program/cgroup.procs); do kill -CONT $one; done; echo went >&3"


def mark(token: str) -> bytes:
    """What comes after all that it has written."""
    return b"\0end " + token.encode() + b"\n"


def dump(devices: Iterable[Sequence[str]], token: str) -> str:
    """The script that takes its state: it stands still then, and is here still; all that it wrote has been sent, with a mark behind it.

    Args:
        devices: where in the container a device of the host is mounted, and which.
    """
    closing = shlex.quote(f"\\0end {token}\\n")
    return f"""
rm -rf /disk/{SHOT}; mkdir /disk/{SHOT}
first=$(cat /run/pid)
if criu dump -t $first -D /disk/{SHOT} -o dump.log {_options(f"mnt[{path}]:{device}" for path, device in devices)}
then
readlink /proc/$first/fd/1 >/disk/{SHOT}/pipes; readlink /proc/$first/fd/2 >>/disk/{SHOT}/pipes
printf {closing} >/proc/$(cat /run/writer)/fd/1; printf {closing} >/proc/$(cat /run/writer)/fd/7
. /bin/census; sync; echo dumped >&3
else echo "undumped $(grep -h Error /run/state/dump.log | head -n 4 | tr '\\n' ' ')" >&3; fi
"""


def resume() -> str:
    """The script that has it go on after its state was taken in vain."""
    return go()


def kill(number: int) -> str:
    """The script that sends its first process a signal."""
    return f"kill -{number} $(cat /run/pid)"
