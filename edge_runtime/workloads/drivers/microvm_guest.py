"""What runs in a micro-VM beside the workload: its first process, a shell script, and the scripts that it is sent. Pure.

The host sends scripts, and the guest's shell runs them as they come. It answers in lines: `ready`, `running`, `trouble TEXT`, `exit CODE KILLED_FOR_MEMORY`, `done CODE`.
What programs write goes through a pipe (so that /dev/stdout can be opened) to a port of its own, and is closed by a mark that the host chose.

Under emulation a guest's first steps are its dearest: each piece of code is translated when it is first run, anew in each QEMU. So all that guests of an image have in common is done before their template is
saved: its disks are mounted (`HOLD`), and the process that will become the program stands in its namespaces, root and limits, and waits. `start` tells it what it becomes.
"""

import shlex
import struct
from collections.abc import Mapping, Sequence

PORTS = ("control", "out", "err", "exec_out", "exec_err")
"""The channels of a guest (virtio-serial ports 1..): orders and answers, what its program writes, what a command in it writes."""

INIT = rb"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run
while read -r module; do [ $module = virtio_blk ] && echo 0 > /sys/bus/virtio/drivers_autoprobe; insmod /modules/$module.ko; done < /modules/order
mount -t cgroup2 cgroup /sys/fs/cgroup
echo '+memory +pids +cpu' > /sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/program
echo -1000 > /proc/self/oom_score_adj
ip link set lo up
mount -t tmpfs -o mode=755,nosuid,size=65536k dev /devices
for one in 'null 1 3' 'zero 1 5' 'full 1 7' 'random 1 8' 'urandom 1 9' 'tty 5 0'; do set -- $one; mknod -m 666 /devices/$1 c $2 $3; done
ln -s /proc/self/fd /devices/fd; ln -s fd/0 /devices/stdin; ln -s fd/1 /devices/stdout; ln -s fd/2 /devices/stderr; ln -s pts/ptmx /devices/ptmx
mkdir /devices/pts /devices/shm /devices/.guest
mount -t devpts -o newinstance,ptmxmode=0666,mode=0620,nosuid,noexec pts /devices/pts
mount -t tmpfs -o nosuid,noexec,nodev,mode=1777,size=65536k shm /devices/shm
mount -o bind /bin /devices/.guest; mount -o remount,bind,ro /devices/.guest
mount -t sysfs -o ro,nosuid,noexec,nodev sys /system
mkfifo -m 666 /run/out /run/err
mkfifo -m 600 /run/go /run/held /run/renew; : >/run/program
mkdir /etc
echo '/dev/vda /image ext4 ro,nodev 0 0
/dev/vdb /disk ext4 nodev 0 0
root /root overlay nodev,lowerdir=/image,upperdir=/disk/upper,workdir=/disk/work 0 0
/devices /root/dev none rbind 0 0
/system /root/sys none bind 0 0
proc /root/proc tmpfs ro,size=4k 0 0' > /etc/fstab
for port in 1 2 3 4 5; do until (exec 8>/dev/vport0p$port) 2>/dev/null; do sleep 0.02; done; done
exec 3<>/dev/vport0p1 4>/dev/vport0p2 5>/dev/vport0p3 6>/dev/vport0p4 7>/dev/vport0p5
(cat /run/out >&4; read -r closing </run/closing; printf "$closing" >&4) &
(cat /run/err >&5; read -r closing </run/closing; printf "$closing" >&5) &
exec 8<>/run/go 9<>/run/held
echo ready >&3
exec sh <&3
"""
"""Its disks are bound to their driver only when it is told to start something: a clone of it then meets its own for the first time. A port has its name before it can be opened.
unshare mounts /proc only over what is mounted already."""

_JOIN = "echo 0 >/sys/fs/cgroup/program/cgroup.procs; echo 0 >/proc/self/oom_score_adj; "
"""Into the workload's limits; the first process of the guest itself may not be killed for memory, what it starts may."""

_CHILD = "$(cat /proc/$(cat /run/{0})/task/*/children)"

_BESIDE = "/sys/fs/cgroup/program/beside"
"""Where a command runs that is run beside the program: within its limits, and ended as a whole."""

_TOOLS = "/dev/.guest/busybox"

_HELD = "echo held >&9; read -r _ <&8; exec 8<&- 9>&-; . /proc/self/fd/7"
"""What the process runs that will become the program, in its namespaces and root: it waits, and then is what /run/program says, which it has open."""

HOLD = f"""
(exec renew 0<>/run/renew 1>&9 3</dev/urandom) &
for one in /sys/bus/virtio/devices/*; do [ -e $one/driver ] || echo ${{{{one##*/}}}} >/sys/bus/virtio/drivers/virtio_blk/bind; done
if mount -a && chmod {{root_mode}} /root
then
(
  ({_JOIN}exec unshare -m -p -f --mount-proc=/root/proc chroot /root {_TOOLS} setpriv --nnp {_TOOLS} env -i {_TOOLS} sh -c '{_HELD}' 3>&- 4>&- 5>&- 6>&- 7</run/program) >/run/out 2>/run/err </dev/null & echo $! >/run/pid
  exec 8<&- 9>&-; wait $!; code=$?; set -- $(grep '^oom_kill ' /sys/fs/cgroup/program/memory.events); echo "exit $code $2" >&3
) &
read -r held <&9
{{warm}}
echo $held >&3
else echo 'trouble its disks cannot be mounted' >&3; fi
"""
"""The script that mounts a guest's disks, and makes the process that will become its program. It says `held` when that waits."""

WARM_BYTES = 16 << 20
"""Read of an image before its template is saved, so that clones have it in memory, and share it: most programs are smaller. They need not even translate the code that reads a disk."""


def framed(script: str) -> bytes:
    """A script as it is sent."""
    return script.strip().encode() + b"\n"


_PATH = "/usr/local/sbin:/usr/local/bin:/usr/sbin:/usr/bin:/sbin:/bin"
"""Where a program is looked for that has no PATH: what container engines set."""


def mark(token: str) -> bytes:
    """What closes a stream."""
    return b"\0end " + token.encode() + b"\n"


def _program(document: Mapping[str, object], args: Sequence[str]) -> str:
    """The end of every start: as its user, with its variables and nothing else, in place of a shell. A command in a root that is the program's."""
    return shlex.join([_TOOLS, "sh", "-c", _become(document, args)])


_NO_MORE_RIGHTS = f"{_TOOLS} setpriv --nnp "


def _become(document: Mapping[str, object], args: Sequence[str], before: str = _NO_MORE_RIGHTS) -> str:
    """A script that becomes a program. It is looked for here, in the program's own PATH: Debian's busybox would take one of its own where it has one of that name."""
    user = [_TOOLS, "nsenter", "-F", "-S", str(document["uid"]), "-G", str(document["gid"])] if document["uid"] or document["gid"] else []
    become = before + shlex.join([*user, _TOOLS, "env", "-i", *document["env"]])  # type: ignore[misc]
    lines = [f"cd {shlex.quote(str(document['cwd']))} || exit 126"] if document["cwd"] != "/" else []
    if "/" in args[0]:
        return "\n".join([*lines, f"exec {become} {shlex.join(args)}"])
    found = _candidates(document, args[0])
    missing = f"{{ echo {shlex.quote(args[0] + ': not found in PATH')} >&2; exit 127; }}"
    return "\n".join([*lines, f'for path in {found}; do [ -f "$path" ] && [ -x "$path" ] && break; path=; done; [ "$path" ] || {missing}', f'exec {become} "$path" {shlex.join(args[1:])}'])


def _candidates(document: Mapping[str, object], program: str) -> str:
    """Where a program may be, as words of a shell."""
    if "/" in program:
        return shlex.quote(program)
    paths = next((entry[5:] for entry in reversed(document["env"]) if entry.startswith("PATH=")), _PATH)  # type: ignore[call-overload]
    return " ".join(shlex.quote(f"{folder or '.'}/{program}") for folder in paths.split(":"))


def start(document: Mapping[str, object], token: str, seed: str, now_ns: int, held: bool) -> str:
    """The script that starts the program of a document (see `microvm_spec.document`). `seed`: random text, never the same twice. `held`: whether `HOLD` was run before the template was saved."""
    closing = shlex.quote(f"\\0end {token}\\n")
    tmpfs = [f"{_TOOLS} mkdir -p {shlex.quote(target)}; {_TOOLS} mount -t tmpfs -o nosuid,nodev,mode=1777,size={size} tmpfs {shlex.quote(target)}" for target, size in document["tmpfs"]]  # type: ignore[attr-defined]
    read_only = [f"{_TOOLS} mount -o remount,ro /"] if document["read_only"] else []
    quota = f"echo '{document['cpu_us']} 100000' >/sys/fs/cgroup/program/cpu.max" if document["cpu_us"] else ""
    program = "\n".join(["exec 7<&-", *tmpfs, *read_only, _become(document, document["args"], "")])  # type: ignore[arg-type]
    return f"""
{"" if held else hold(document)}
printf %s {seed} >/dev/urandom; {clock(now_ns)}
[ $failed = 0 ] || echo 'trouble the random numbers could not be made new' >&3
echo {shlex.quote(str(document["hostname"]))} >/proc/sys/kernel/hostname; echo {closing} >/run/closing
echo {document["memory"]} >/sys/fs/cgroup/program/memory.max; echo 1 >/sys/fs/cgroup/program/memory.oom.group; echo {document["pids"]} >/sys/fs/cgroup/program/pids.max
{quota}
printf %s {shlex.quote(program)} >/run/program
echo go >&8; echo running >&3
"""


def hold(document: Mapping[str, object], warm: str = "") -> str:
    """The script `HOLD` for an image. `warm`: what else is done before a template is saved (see `warm`)."""
    return HOLD.format(root_mode=document["root_mode"], warm=warm)


def warm(document: Mapping[str, object], everything: bool) -> str:
    """The script that reads an image's files, so that they are in memory: all of them, or the program of a document."""
    read = f"{_TOOLS} head -c {WARM_BYTES}"
    if everything:
        return f"chroot /root {_TOOLS} find / -xdev -type f -exec {read} {{}} + >/dev/null; sync"
    each = f'for path in {_candidates(document, document["args"][0])}; do [ -f "$path" ] && exec {read} "$path"; done'  # type: ignore[index]
    return f"chroot /root {_TOOLS} sh -c {shlex.quote(each)} >/dev/null; sync"


def kill(number: int) -> str:
    """The script that sends the program a signal; what starts it would lose it, so it waits for that to be over (5 s at most)."""
    return f"""
tries=0
while [ $tries -lt 100 ] && {{ child={_CHILD.format("pid")}; [ -z "$child" ] || grep -qE '^(unshare|chroot|/dev/.guest/)' /proc/$child/cmdline; }}; do tries=$((tries+1)); sleep 0.05; done
kill -{number} $child
"""


def run(document: Mapping[str, object], args: Sequence[str], token: str) -> str:
    """The script that runs a command beside the program, in its namespaces and limits."""
    closing = shlex.quote(f"\\0end {token}\\n")
    enter = f"exec nsenter -t {_CHILD.format('pid')} -m -p chroot /root {_program(document, args)}"
    return f"""
rm -f /run/exec /run/exec_out /run/exec_err; mkfifo -m 666 /run/exec_out /run/exec_err; mkdir -p {_BESIDE}
(cat /run/exec_out >&6; printf {closing} >&6) & (cat /run/exec_err >&7; printf {closing} >&7) &
(({_JOIN}echo 0 >{_BESIDE}/cgroup.procs; : >/run/exec; {enter} 3>&- 4>&- 5>&- 6>&- 7>&-) >/run/exec_out 2>/run/exec_err </dev/null & wait $!; echo "done $?" >&3) &
"""


def end_run() -> str:
    """The script that kills the command with all that it has started, once it has begun: on a busy machine it may be told to end before (20 s of the guest's time at most)."""
    return f"tries=0; while [ $tries -lt 1000 ] && ! [ -e /run/exec ]; do tries=$((tries+1)); sleep 0.02; done; echo 1 >{_BESIDE}/cgroup.kill"


def clock(now_ns: int) -> str:
    """The script that sets the clock, and makes the random numbers new: before anything runs, and after the guest stood still. It may have been copied."""
    now = "".join(f"\\{byte:03o}" for byte in struct.pack("<qq", *divmod(now_ns, 1_000_000_000)))
    return f"printf '{now}' >/run/renew; read -r failed <&9"
