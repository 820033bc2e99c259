"""Whether we are root of the machine, or only in a user namespace of our own (`workloads.rootless`), and what is called otherwise then. Nothing of ours is imported: keepers import this."""

import os

WHOLE = ["0", "0", "4294967295"]
"""The only line of the map of ids where there is no user namespace but the machine's."""


def outside(uid_map: str | None = None) -> int | None:
    """The user id that our root is outside of our user namespace; None where that is the machine's own. `uid_map`: as in /proc/self/uid_map."""
    if uid_map is None:
        try:
            with open("/proc/self/uid_map") as handle:
                uid_map = handle.read()
        except OSError:  # a kernel without them
            return None
    lines = [line.split() for line in uid_map.splitlines()]
    if lines == [WHOLE]:
        return None
    return next((int(first) for inside, first, _ in lines if inside == "0"), None)


UID = outside()

RUN = "/run/novacron" if UID is None else os.path.join(f"/run/user/{UID}" if os.path.isdir(f"/run/user/{UID}") else "/tmp", f"novacron-{UID}")
"""For what needs a short path, or shall not outlive a restart of the machine."""

GROUPS = "/novacron" if UID is None else f"/novacron-{UID}"
"""The control group above all containers, in every hierarchy: of a user's own agent, one that root has made for it."""


SYS_ADMIN = 21
"""Number of the capability without which root mounts nothing and makes no namespaces (linux/capability.h)."""


def short_of_root(of_machine: bool = True) -> str:
    """What we lack to mount, to make namespaces and control groups; empty where we can. `of_machine`: as root of the machine, not of a user namespace of our own."""
    if os.geteuid() != 0 or (of_machine and UID is not None):
        return "the agent does not run as root"
    try:
        with open("/proc/self/status") as handle:
            may = next((int(line.split()[1], 16) for line in handle if line.startswith("CapEff:")), 0)
    except OSError:
        return ""
    return "" if may & 1 << SYS_ADMIN else "the agent runs as root without a machine's root's rights (CAP_SYS_ADMIN), as in a container"


def machine_root() -> bool:
    """Whether we are root, and that of the machine: only then there are other users to start things as."""
    return UID is None and os.geteuid() == 0


def made(folder: str) -> str:
    """A folder in `RUN`, made where it is not there. Raises OSError where `RUN` is somebody else's: in /tmp anybody can make anything."""
    os.makedirs(RUN, mode=0o755 if UID is None else 0o700, exist_ok=True)
    if UID is not None and os.lstat(RUN).st_uid != os.geteuid():
        raise PermissionError(f"{RUN} is another user's")
    if UID is None and os.stat(RUN).st_mode & 0o777 != 0o755:
        os.chmod(RUN, 0o755)  # a container's root user, who is nobody here, has to come through it, whatever umask the agent's unit gives
    os.makedirs(folder, mode=0o700, exist_ok=True)
    return folder
