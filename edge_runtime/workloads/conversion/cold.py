"""Cold conversion: an image and its `spec` become a disk that a virtual machine boots, and such a disk, or another one with Linux on it, becomes an image. Blocks.

The disk is one file system of the kind ext4 (label `novacron`), raw or as qcow2. Beside what the image has, it holds `/.novacron`: the kernel, its first file system, how they are told apart (`extlinux.conf`, as
boot loaders read it), and the document. A machine boots it by its kernel, as QEMU's `-kernel` and libvirt's `<kernel>` do; there is no boot loader on it. Each folder of the node that the `spec` mounts becomes a
disk of its own beside it. What the form does not have is listed first (`losses`).
"""

import hashlib
import io
import json
import os
import platform
import shlex
import shutil
import stat
import struct
import subprocess
import tarfile
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO, cast

from ..drivers import qemu_kernel
from ..drivers.container_spec import CAPABILITIES, CPU_PERIOD_US, Host, configuration, limits
from ..drivers.face import Failed, Order, Refused
from ..drivers.microvm_disks import Disks
from ..drivers.microvm_guest import _program
from ..drivers.microvm_spec import disk_bytes
from ..drivers.network import network
from ..drivers.outside import short_of_root
from ..drivers.programs import searched
from ..drivers.users import ids
from ..images import ImageStore
from ..images.manifest import REF_NAME, Platform
from .ext4 import Ext4
from .state import _Pieces

OWN = ".novacron"
"""The folder on the disk that is not the image's."""

LABEL = "novacron"
"""Of the root's file system; volumes have `novacron-0`, .. (ext4 takes 16 bytes)."""

MODULES = ("virtio_pci", "virtio_mmio", "virtio_blk", "virtio_net")
"""What the machine needs beyond what Debian's kernels have built in."""

SPARE_MB = 64
"""MiB that a machine has beside the workload's limit, for its kernel."""

MOST_DISK = 1 << 40
"""Bytes of a disk that is read, and of what is taken from it."""

SECTOR = 512

QCOW2 = b"QFI\xfb"

TOOL_S = 600.0
"""For one run of qemu-img or resize2fs."""

LINUX = uuid.UUID("0fc63daf-8483-4772-8e79-3d69d8477de4"), uuid.UUID("4f68bce3-e8cd-4db1-96e7-fbcaf984b709")
"""Types of partitions (GPT): data of Linux, root of x86-64."""

INIT = rb"""#!/bin/busybox sh
export PATH=/bin
/bin/busybox --install -s /bin
mount -t devtmpfs dev /dev; mount -t proc proc /proc; mount -t sysfs sys /sys; mount -t tmpfs run /run
while read -r module; do insmod /modules/$module.ko; done < /modules/order
mount -t cgroup2 cgroup /sys/fs/cgroup
echo '+memory +pids +cpu' > /sys/fs/cgroup/cgroup.subtree_control
mkdir /sys/fs/cgroup/program
tries=0
until device=$(findfs LABEL=novacron 2>/dev/null) || [ $tries -ge 100 ]; do tries=$((tries+1)); sleep 0.1; done
if mount -t ext4 "$device" /root; then . /root/.novacron/start; else echo 'novacron: there is no disk with the label novacron'; fi
sync; mount -o remount,ro /root; poweroff -f
"""

_LEASE = rb"""#!/bin/sh
[ "$1" = bound ] || [ "$1" = renew ] || exit 0
ip addr flush dev $interface; ip addr add $ip/${mask:-24} dev $interface; ip route add default via ${router%% *}
[ -f /run/resolver ] && for one in $dns; do echo nameserver $one; done > /run/resolver
exit 0
"""
"""What a lease of an address has to say."""


@dataclass(frozen=True, slots=True)
class Loss:
    """What the other form does not have: the field, what becomes of it, and what could be done."""

    field: str
    problem: str
    remedy: str


@dataclass(frozen=True, slots=True)
class Plan:
    """What a conversion will do, before it does anything.

    Attributes:
        document: what the machine will run: args, env, cwd, uid, gid, hostname, memory, pids, cpu_us, read_only, tmpfs, volumes (folder of the node, target, read only), ports.
        lost: what it will not have.
    """

    document: Mapping[str, Any]
    lost: tuple[Loss, ...]
    image: str
    lower: tuple[Path, ...]
    size: int

    def to_json(self) -> dict[str, Any]:
        """As a JSON object."""
        return {"image": self.image, "size": self.size, "document": dict(self.document), "lost": [asdict(loss) for loss in self.lost]}


def plan(store: ImageStore, order: Order, allowed: Sequence[str] = ()) -> Plan:
    """Look through all of it; raises `Refused`. Writes nothing.

    Args:
        allowed: folders of the node that may be mounted.
    """
    image = store.find(order.image)
    if image.config.module:
        raise Refused("image", "is a WebAssembly module", "convert a container's image")
    lower = store.lower(image)
    host = Host(platform.machine(), None, False, 1024, tuple(map(os.path.realpath, allowed)), False, network="", publish=("127.0.0.1", "0.0.0.0"), files="/run")
    told = configuration(order, image.config, host, "/", "", lambda user: ids(user, lower))
    process, limit = told["process"], limits(order)
    connected = network(order.spec.get("network"), host.publish)
    mounts = told["mounts"][5 + 2 * (connected is not None):]
    document = {
        "args": process["args"], "env": process["env"], "cwd": process["cwd"], "uid": process["user"]["uid"], "gid": process["user"]["gid"], "hostname": told["hostname"], "read_only": told["root"]["readonly"],
        "memory": limit.memory, "pids": limit.pids, "cpu_us": limit.cpu * CPU_PERIOD_US // 1000, "connected": connected is not None,
        "tmpfs": [[one["destination"], one["options"][-1].removeprefix("size=")] for one in mounts if one["type"] == "tmpfs"],
        "volumes": [[one["source"], one["destination"], "ro" in one["options"]] for one in mounts if one["type"] == "bind"],
        "ports": [asdict(port) for port in connected.ports] if connected is not None else [],
    }
    for source, _, _ in document["volumes"]:
        if not os.path.isdir(source):
            raise Refused("spec.mounts", f"{source[:80]!r} is a file, and a disk holds a folder", "mount the folder that it is in")
    return Plan(document, tuple(_lost(order, document)), image.digest, tuple(lower), disk_bytes(order))


def _lost(order: Order, document: Mapping[str, Any]) -> list[Loss]:
    found = [
        Loss("isolation", "no user namespace, no filter of system calls and no hidden parts of /proc: the machine is the border", "run it as another user than root (spec.user)"),
        Loss("logs", "what it writes goes to the machine's console", "read the console, or have it write to a file"),
        Loss("spec.stop_signal", "a machine that is switched off sends it nothing", "end the program first; its end switches the machine off"),
    ]
    if set(order.spec.get("capabilities", CAPABILITIES) or ()) != set(CAPABILITIES):
        found.append(Loss("spec.capabilities", "root in the machine has all of them", "run it as another user than root"))
    if document["cpu_us"] % CPU_PERIOD_US:
        found.append(Loss("spec.limits.cpu", "is kept by a control group in the machine, which has whole processors", "give the machine no more processors than that"))
    for name in ("restart", "retries", "deadline_s"):
        if name in order.spec:
            found.append(Loss(f"spec.{name}", "the machine does not start it again", "have whoever runs the machine do it"))
    for source, target, read_only in document["volumes"]:
        found.append(Loss("spec.mounts", f"{target} becomes a disk with a copy of {source}; " + ("later changes of the folder do not reach it" if read_only else "neither side sees what the other one writes from then on"), "convert it while nothing writes there"))
    if document["connected"]:
        found.append(Loss("spec.network", "published ports are the network's of whoever runs the machine; the addresses on the node stand in the document", "publish them there (`boot` does)"))
    if order.requests.get("network"):
        found.append(Loss("requests.network", "is not set aside by the machine", "limit it where the machine is connected"))
    return found


def to_disk(found: Plan, target: Path, kernel: qemu_kernel.Kernel, form: str = "raw") -> list[Path]:
    """Write the disk, and one for each volume (`NAME.0`, ..); returns their paths. Nothing is there where it fails. Needs root: files have owners. Raises `Refused` and `Failed`."""
    if form not in ("raw", "qcow2"):
        raise Refused("form", f"{form[:40]!r} is neither raw nor qcow2", "say one of them")
    if os.geteuid() != 0:
        raise Refused("host", "files on the disk have owners, which only root can give", "run it as root")
    if short_of_root(of_machine=False):
        raise Refused("host", "the disk's files are laid out in a mount of their own, which takes a machine's root's rights (CAP_SYS_ADMIN)", "run it as root of the machine, not in a container")
    needed = {"mke2fs": "e2fsprogs", "resize2fs": "e2fsprogs", "tune2fs": "e2fsprogs", **({"qemu-img": "qemu-utils"} if form == "qcow2" else {})}
    for program, package in needed.items():
        if searched(program) is None:
            raise Refused("host", f"{program} is not installed", f"as root: apt install {package}")
    paths = [target, *(target.with_name(f"{target.name}.{at}") for at in range(len(found.document["volumes"])))]
    for path in paths:
        if os.path.lexists(path):
            raise Refused("target", f"{path} is there already", "name another file")
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    work.mkdir(mode=0o700)
    try:
        own = work / "own" / OWN
        own.mkdir(parents=True, mode=0o700)
        os.chmod(work / "own", os.stat(found.lower[0]).st_mode & 0o7777)
        _boot_files(found, own, kernel)
        disks = Disks(work, str(searched("mke2fs")))
        made = [(disks.image("root", [work / "own", *found.lower]), LABEL, found.size)]
        made += [(disks.image(f"volume-{at}", [Path(source)]), f"{LABEL}-{at}", found.size if not read_only else 0) for at, (source, _, read_only) in enumerate(found.document["volumes"])]
        for (path, label, more), final in zip(made, paths, strict=True):
            os.truncate(path, os.path.getsize(path) + more)
            _tool("resize2fs", str(path))
            _tool("tune2fs", "-L", label, str(path))
            if form == "qcow2":
                _tool("qemu-img", "convert", "-f", "raw", "-O", "qcow2", str(path), f"{path}.qcow2")
                path = path.with_name(f"{path.name}.qcow2")
            os.rename(path, work / f"final-{final.name}")
        for final in paths:
            os.rename(work / f"final-{final.name}", final)
    except BaseException:
        for path in paths:
            path.unlink(missing_ok=True)
        raise
    finally:
        shutil.rmtree(work, ignore_errors=True)
    return paths


def _boot_files(found: Plan, own: Path, kernel: qemu_kernel.Kernel) -> None:
    archive = qemu_kernel.initramfs(qemu_kernel.busybox(), qemu_kernel.modules(kernel, MODULES), INIT) + qemu_kernel.cpio([("bin/lease", 0o100755, _LEASE)])
    (own / "kernel").write_bytes(kernel.image.read_bytes())
    (own / "initramfs").write_bytes(archive)
    (own / "extlinux.conf").write_text(f"DEFAULT novacron\nLABEL novacron\n  KERNEL /{OWN}/kernel\n  INITRD /{OWN}/initramfs\n  APPEND console=ttyS0 quiet panic=-1\n")
    (own / "document.json").write_text(json.dumps({"image": found.image, "release": kernel.release, **found.document}))
    (own / "start").write_text(_start(found.document))


def _start(document: Mapping[str, Any]) -> str:
    """The script that the first process runs when the disk is mounted at /root."""
    lines = [f"echo {shlex.quote(document['hostname'])} >/proc/sys/kernel/hostname", "ip link set lo up"]
    lines += [f"echo {document['memory']} >/sys/fs/cgroup/program/memory.max", "echo 1 >/sys/fs/cgroup/program/memory.oom.group", f"echo {document['pids']} >/sys/fs/cgroup/program/pids.max"]
    if document["cpu_us"]:
        lines.append(f"echo '{document['cpu_us']} {CPU_PERIOD_US}' >/sys/fs/cgroup/program/cpu.max")
    lines += [f"mkdir -p /root/{name}" for name in ("dev", "proc", "sys")]
    lines += ["mount -o bind /dev /root/dev", "mkdir -p /root/dev/pts /root/dev/shm /root/dev/.guest", "mount -t devpts pts /root/dev/pts", "mount -t tmpfs -o nosuid,nodev,mode=1777 shm /root/dev/shm", "mount -o bind /bin /root/dev/.guest"]
    lines += ["mount -t sysfs -o ro,nosuid,noexec,nodev sys /root/sys"]
    for at, (_, where, read_only) in enumerate(document["volumes"]):
        place = shlex.quote("/root" + where)
        lines.append(f"mkdir -p {place}; mount -t ext4 -o nosuid,nodev,{'ro' if read_only else 'rw'} $(findfs LABEL={LABEL}-{at}) {place} || {{ echo 'novacron: the disk of volume {at} is missing'; return; }}")
    for where, size in document["tmpfs"]:
        place = shlex.quote("/root" + where)
        lines.append(f"mkdir -p {place}; mount -t tmpfs -o nosuid,nodev,mode=1777,size={size} tmpfs {place}")
    if document["connected"]:
        lines += ["touch /run/resolver; mkdir -p /root/etc; [ -e /root/etc/resolv.conf ] || touch /root/etc/resolv.conf; mount -o bind /run/resolver /root/etc/resolv.conf"]
        lines += ["ip link set eth0 up; udhcpc -i eth0 -n -q -t 10 -s /bin/lease >/dev/null 2>&1 || echo 'novacron: nobody gave the machine an address'"]
    lines.append(f"mount -t tmpfs -o ro,size=4k hidden /root/{OWN}")
    if document["read_only"]:
        lines.append("mount -o remount,ro,bind /root")
    lines += [f"(echo 0 >/sys/fs/cgroup/program/cgroup.procs; exec unshare -m -p -f --mount-proc=/root/proc chroot /root {_program(document, document['args'])}); code=$?", 'echo "novacron: exit $code"']
    return "mount -t proc proc /root/proc\n" + "\n".join(lines) + "\n"


def boot_command(disk: Path, volumes: Sequence[Path], kernel: Path, initramfs: Path, document: Mapping[str, Any], form: str = "raw", accelerator: str = "tcg", tsc_khz: int = 0) -> list[str]:
    """QEMU's command line for a disk, its kernel and first file system taken from it (`boot_parts`); its console is stdout. Pure. That /dev/kvm is there does not say that `kvm` boots a guest."""
    memory = -(-document["memory"] // (1 << 20)) + SPARE_MB
    cpus = max(1, -(-document["cpu_us"] // CPU_PERIOD_US))
    words = ["qemu-system-x86_64", "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-machine", f"q35,accel={accelerator}", "-cpu", "max" if accelerator == "tcg" else "host", "-smp", str(cpus), "-m", f"{memory}M", "-serial", "stdio", "-kernel", str(kernel), "-initrd", str(initramfs)]
    words += ["-append", f"console=ttyS0 quiet panic=-1 no_timer_check{f' tsc_early_khz={tsc_khz}' if tsc_khz else ''}"]
    for at, path in enumerate((disk, *volumes)):
        read_only = at > 0 and document["volumes"][at - 1][2]
        words += ["-blockdev", f"driver={form},node-name=disk{at},read-only={'on' if read_only else 'off'},file.driver=file,file.filename={path}", "-device", f"virtio-blk-pci,drive=disk{at}"]
    if document["connected"]:
        forwards = "".join(f",hostfwd={port['protocol']}:{port['address']}:{port['host_port']}-:{port['port']}" for port in document["ports"])
        words += ["-netdev", f"user,id=net{forwards}", "-device", "virtio-net-pci,netdev=net"]
    return words


def boot_parts(disk: Path, folder: Path) -> tuple[Path, Path, dict[str, Any]]:
    """Take the kernel, its first file system and the document from a raw disk that `to_disk` wrote, into `folder`. Raises `Refused`."""
    with Ext4(disk) as system:
        for name in ("kernel", "initramfs"):
            (folder / name).write_bytes(system.read(system.find(f"{OWN}/{name}".encode()), qemu_kernel.MAX_KERNEL))
        return folder / "kernel", folder / "initramfs", _document(system)


def _document(system: Ext4) -> dict[str, Any]:
    try:
        value: Any = json.loads(system.read(system.find(f"{OWN}/document.json".encode()), 4 << 20))
    except ValueError:
        value = None
    if not isinstance(value, dict):
        raise Refused("disk", f"its /{OWN}/document.json is no document", "convert it again")
    return value


# -- back ------------------------------------------------------------------------------------------------------------------------


def to_image(disk: Path, target: Path, reference: str) -> dict[str, Any]:
    """Write an OCI layout (a folder, which must not be there) of what a disk holds: one layer, and how the program is run where the disk says it. Nothing is mounted. Returns what is known: `digest`, `files`, `lost`.

    The disk is raw or qcow2, with a file system of the kind ext4 on it as a whole or in a partition. Raises `Refused` and `Failed`.
    """
    if os.path.lexists(target):
        raise Refused("target", f"{target} is there already", "name another folder")
    work = target.with_name(f".{target.name}.{uuid.uuid4().hex[:8]}")
    work.mkdir(mode=0o700)
    try:
        with open(disk, "rb") as handle:
            packed = handle.read(4) == QCOW2
        if packed:
            if searched("qemu-img") is None:
                raise Refused("host", "qemu-img is not installed", "as root: apt install qemu-utils")
            told = json.loads(_tool("qemu-img", "info", "--output=json", str(disk)))
            if told.get("backing-filename") or told.get("full-backing-filename"):
                raise Refused("disk", "it stands on another file, which it names itself", "flatten it first: qemu-img convert")
            if int(told.get("virtual-size", 0)) > MOST_DISK:
                raise Refused("disk", f"it has more than {MOST_DISK} bytes", "convert a smaller one")
            _tool("qemu-img", "convert", "-f", "qcow2", "-O", "raw", str(disk), str(work / "raw"))
            disk = work / "raw"
        with Ext4(disk, _root_of(disk)) as system:
            layout = work / "layout"
            (layout / "blobs/sha256").mkdir(parents=True)
            known = any(name == OWN.encode() for name, _ in system.folder(system.node(2)))
            document = _document(system) if known else None
            digest, size, files, lost = _root_layer(system, layout)
        _describe(layout, reference, digest, size, document)
        (work / "raw").unlink(missing_ok=True)
        os.rename(layout, target)
    finally:
        shutil.rmtree(work, ignore_errors=True)
    if document is None:
        lost.append(Loss("config", "the disk does not say which program is its own: the image runs nothing by itself", "give spec.command"))
        lost.append(Loss("boot", "kernel, boot loader and services of the machine are files in the image, and nothing starts them", "have spec.command start what is needed"))
    for source, where, _ in (document or {}).get("volumes", ()):
        lost.append(Loss("spec.mounts", f"{where} is on a disk of its own, which is not taken in", f"mount {source} there again"))
    return {"digest": digest, "files": files, "lost": [asdict(loss) for loss in lost], "document": document}


def _root_of(disk: Path) -> int:
    """Where the root's file system begins: 0, or that of the largest partition of Linux's that is ext4 and has /etc or /bin."""
    size = os.path.getsize(disk)
    with open(disk, "rb") as handle:
        head = handle.read(34 * SECTOR)
    found: list[tuple[int, int]] = []
    if head[SECTOR:SECTOR + 8] == b"EFI PART":
        first, count, length = struct.unpack_from("<QII", head, SECTOR + 72)
        if length < 128 or length > 4096 or count > 1024:
            raise Refused("disk", "its table of partitions makes no sense", "look at it by fdisk -l")
        with open(disk, "rb") as handle:
            handle.seek(first * SECTOR)
            table = handle.read(count * length)
        for at in range(0, len(table) - 127, length):
            if uuid.UUID(bytes_le=table[at:at + 16]) in LINUX:
                begin, last = struct.unpack_from("<QQ", table, at + 32)
                found.append((last - begin, begin * SECTOR))
    elif head[510:512] == b"\x55\xaa" and head[1080:1082] != b"\x53\xef":
        for at in range(446, 510, 16):
            begin, length = struct.unpack_from("<II", head, at + 8)
            if head[at + 4] == 0x83:
                found.append((length, begin * SECTOR))
    else:
        return 0
    for _, offset in sorted(found, reverse=True):
        if offset < size:
            try:
                with Ext4(disk, offset) as system:
                    if {name for name, _ in system.folder(system.node(2))} & {b"etc", b"bin", b"usr"}:
                        return offset
            except Refused:
                continue
    raise Refused("disk", "none of its partitions is a root of Linux that can be read (ext4, shut down in order)", "name a disk that has one")


class _Hashed(io.RawIOBase):
    """Writes to a file, and hashes."""

    def __init__(self, target: BinaryIO) -> None:
        self.target, self.hash, self.size = target, hashlib.sha256(), 0

    def write(self, data: Any) -> int:
        self.hash.update(data)
        self.size += len(data)
        self.target.write(data)
        return len(data)


def _root_layer(system: Ext4, layout: Path) -> tuple[str, int, int, list[Loss]]:
    """The one layer: its digest, bytes, files; and what was left out."""
    path, count, devices = layout / "blobs/sha256/new", 0, 0
    with open(path, "xb") as target:
        told = _Hashed(target)
        with tarfile.open(fileobj=cast(BinaryIO, told), mode="w|", format=tarfile.PAX_FORMAT, encoding="utf-8", errors="surrogateescape") as archive:
            seen: dict[int, str] = {}
            skipped = (OWN.encode(), b"lost+found")
            for raw, node in system.walk():
                if raw in skipped or raw.startswith(tuple(one + b"/" for one in skipped)):
                    continue
                name = os.fsdecode(raw)
                entry = tarfile.TarInfo(name or ".")
                entry.mode, entry.mtime, entry.uid, entry.gid = stat.S_IMODE(node.mode), node.mtime, node.uid, node.gid
                count += 1
                if stat.S_ISDIR(node.mode):
                    entry.type = tarfile.DIRTYPE
                    archive.addfile(entry)
                elif node.number in seen:
                    entry.type, entry.linkname = tarfile.LNKTYPE, seen[node.number]
                    archive.addfile(entry)
                elif stat.S_ISREG(node.mode):
                    seen[node.number] = name
                    entry.size = node.size
                    if told.size + node.size > MOST_DISK:
                        raise Refused("disk", f"it holds more than {MOST_DISK} bytes", "convert a smaller one")
                    archive.addfile(entry, cast(BinaryIO, _Pieces(system.content(node))))
                elif stat.S_ISLNK(node.mode):
                    entry.type, entry.linkname = tarfile.SYMTYPE, os.fsdecode(system.link(node))
                    archive.addfile(entry)
                elif stat.S_ISFIFO(node.mode):
                    entry.type = tarfile.FIFOTYPE
                    archive.addfile(entry)
                else:
                    devices += 1
    digest = told.hash.hexdigest()
    os.rename(path, layout / "blobs/sha256" / digest)
    return digest, told.size, count, [Loss("devices", f"{devices} device nodes and sockets are left out", "a container has those of its own /dev")] if devices else []


def _describe(layout: Path, reference: str, digest: str, size: int, document: Mapping[str, Any] | None) -> None:
    def put(data: bytes, media: str) -> dict[str, Any]:
        name = hashlib.sha256(data).hexdigest()
        (layout / "blobs/sha256" / name).write_bytes(data)
        return {"mediaType": media, "digest": f"sha256:{name}", "size": len(data)}

    here = Platform.here()
    run = {} if document is None else {"Cmd": document["args"], "Env": document["env"], "WorkingDir": document["cwd"], "User": f"{document['uid']}:{document['gid']}"}
    config = {"os": here.os, "architecture": here.arch, **({"variant": here.variant} if here.variant else {}), "config": run, "rootfs": {"type": "layers", "diff_ids": [f"sha256:{digest}"]}}
    layer = {"mediaType": "application/vnd.oci.image.layer.v1.tar", "digest": f"sha256:{digest}", "size": size}
    manifest = {"schemaVersion": 2, "mediaType": "application/vnd.oci.image.manifest.v1+json", "config": put(json.dumps(config).encode(), "application/vnd.oci.image.config.v1+json"), "layers": [layer]}
    entry = put(json.dumps(manifest).encode(), "application/vnd.oci.image.manifest.v1+json") | {"annotations": {REF_NAME: reference}}
    (layout / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (layout / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))


def _tool(name: str, *words: str) -> str:
    try:
        done = subprocess.run([str(searched(name)), *words], stdin=subprocess.DEVNULL, capture_output=True, text=True, errors="replace", timeout=TOOL_S)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise Failed("disk", f"{name}: {error}", "look at the disk of the folder") from None
    if done.returncode:
        raise Failed("disk", f"{name}: {done.stderr.strip()[:1000] or done.returncode}", "see what it says")
    return done.stdout
