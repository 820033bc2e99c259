"""The attempts: one system call each, with arguments that do no harm where it is allowed. Pure.

Each is chosen so that a kernel that would let it through answers differently from one that does not: the permission is looked at first, and what would do harm is missing or wrong after that (a
module of no bytes, a restart with the wrong magic). So a refusal is one of a few error numbers, and everything else is a hole, also where the call failed.
"""

import errno
from dataclasses import dataclass

NEWNS, NEWUSER = 0x0002_0000, 0x1000_0000
O_WRONLY, O_RDWR = 1, 2
S_IFBLK, S_IFCHR = 0o060000, 0o020000
PF_INET, PF_PACKET, PF_ALG, PF_VSOCK = 2, 17, 38, 40
SOCK_STREAM, SOCK_RAW, SOCK_SEQPACKET = 1, 3, 5

REFUSALS = frozenset({errno.EPERM, errno.EACCES, errno.ENOSYS, errno.EROFS})
"""Not permitted, not accessible, no such call, read-only."""

ABSENT = REFUSALS | {errno.ENOENT, errno.ENXIO, errno.ENODEV}
"""Of a file that should not be there at all."""


@dataclass(frozen=True, slots=True)
class Attempt:
    """One system call.

    Attributes:
        kind: what it would break through.
        call: its name; `program.CALLS` has its number.
        arguments: integers, or bytes, which are passed by address with a zero behind.
        refusals: the error numbers that mean that the boundary holds.
    """

    kind: str
    name: str
    call: str
    arguments: tuple[int | bytes, ...]
    refusals: frozenset[int] = REFUSALS


ATTEMPTS: tuple[Attempt, ...] = (
    Attempt("mounts", "mount a file system", "mount", (b"none", b"/tmp", b"tmpfs", 0, 0)),
    Attempt("mounts", "bind the root elsewhere", "mount", (b"/", b"/tmp", 0, 0x1000, 0)),
    Attempt("mounts", "make /proc/sys writable", "mount", (b"none", b"/proc/sys", 0, 0x1020, 0)),
    Attempt("mounts", "unmount /proc", "umount2", (b"/proc", 2)),
    Attempt("mounts", "change the root by pivot_root", "pivot_root", (b".", b".")),
    Attempt("mounts", "change the root by chroot", "chroot", (b"/tmp",)),
    Attempt("mounts", "new mount API", "fsopen", (b"tmpfs", 0)),
    Attempt("mounts", "open a file by its handle", "open_by_handle_at", (-1, 0, 0)),
    Attempt("namespaces", "enter a namespace", "setns", (-1, 0)),
    Attempt("namespaces", "a user namespace", "unshare", (NEWUSER,)),
    Attempt("namespaces", "a mount namespace", "unshare", (NEWNS,)),
    Attempt("namespaces", "clone3, whose flags no filter sees", "clone3", (0, 0)),
    Attempt("namespaces", "rename the host", "sethostname", (b"escaped", 7)),
    Attempt("processes", "trace a process", "ptrace", (0x4206, 999_999, 0, 0)),
    Attempt("processes", "read a process's memory", "process_vm_readv", (999_999, 0, 0, 0, 0, 0)),
    Attempt("processes", "compare processes", "kcmp", (1, 999_999, 0, 0, 0)),
    Attempt("processes", "raise its own priority", "setpriority", (0, 0, -20)),
    Attempt("kernel", "load a module", "init_module", (0, 0, b"")),
    Attempt("kernel", "load a module from a file", "finit_module", (-1, b"", 0)),
    Attempt("kernel", "remove a module", "delete_module", (b"no_such_module", 0)),
    Attempt("kernel", "load another kernel", "kexec_load", (0, 0, 0, 1 << 30)),
    Attempt("kernel", "load a BPF program", "bpf", (5, 0, 0)),
    Attempt("kernel", "performance counters", "perf_event_open", (0, 0, -1, -1, 0)),
    Attempt("kernel", "userfaultfd", "userfaultfd", (1 << 20,)),
    Attempt("kernel", "io_uring", "io_uring_setup", (1, 0)),
    Attempt("kernel", "keyrings", "add_key", (0, 0, 0, 0, 0)),
    Attempt("kernel", "another personality", "personality", (0x0040_0000,)),
    Attempt("kernel", "process accounting", "acct", (b"/no/such",)),
    Attempt("kernel", "swap", "swapon", (b"/no/such", 0)),
    Attempt("kernel", "restart", "reboot", (0, 0, 0, 0)),
    Attempt("kernel", "the kernel's log", "syslog", (3, 0, 0)),
    Attempt("kernel", "kernel crypto by socket", "socket", (PF_ALG, SOCK_SEQPACKET, 0)),
    Attempt("devices", "ports of the machine", "iopl", (3,)),
    Attempt("devices", "one port", "ioperm", (0x80, 1, 1)),
    Attempt("devices", "make a disk's node", "mknod", (b"/tmp/disk", S_IFBLK | 0o600, 0xFE00)),
    Attempt("devices", "make /dev/mem", "mknod", (b"/tmp/mem", S_IFCHR | 0o600, 0x0101)),
    Attempt("devices", "open /dev/mem", "open", (b"/dev/mem", O_RDWR, 0), ABSENT),
    Attempt("devices", "open the disk", "open", (b"/dev/vda", O_RDWR, 0), ABSENT),
    Attempt("devices", "open /dev/kmsg", "open", (b"/dev/kmsg", O_RDWR, 0), ABSENT),
    Attempt("devices", "open /dev/kvm", "open", (b"/dev/kvm", O_RDWR, 0), ABSENT),
    Attempt("network", "read all packets", "socket", (PF_PACKET, SOCK_RAW, 0x0300)),
    Attempt("network", "raw packets", "socket", (PF_INET, SOCK_RAW, 1)),
    Attempt("network", "the hypervisor's sockets", "socket", (PF_VSOCK, SOCK_STREAM, 0)),
    Attempt("proc and sys", "write the core pattern", "open", (b"/proc/sys/kernel/core_pattern", O_WRONLY, 0), ABSENT),
    Attempt("proc and sys", "write sysrq-trigger", "open", (b"/proc/sysrq-trigger", O_WRONLY, 0), ABSENT),
    Attempt("proc and sys", "write uevent_helper", "open", (b"/sys/kernel/uevent_helper", O_WRONLY, 0), ABSENT),
    Attempt("proc and sys", "write modprobe's path", "open", (b"/proc/sys/kernel/modprobe", O_WRONLY, 0), ABSENT),
    Attempt("proc and sys", "write a control group's release_agent", "open", (b"/sys/fs/cgroup/release_agent", O_WRONLY, 0), ABSENT),
    Attempt("proc and sys", "write a process's memory file of the host", "open", (b"/proc/999999/mem", O_RDWR, 0), ABSENT),
)
