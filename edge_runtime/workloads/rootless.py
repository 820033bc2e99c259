"""The agent of a user who is not root, as root of a user namespace of its own: so it can unpack images, mount layers and run containers, and outside of it has no more rights than before.

That needs `newuidmap` and `newgidmap` (they are setuid, and give what root has written into /etc/subuid and /etc/subgid), and a kernel in which a user namespace can mount overlayfs (5.11). Its mounts are seen by it
alone; network, processes and files are the machine's. A small process holds the namespace: what an agent that was killed has started can be reached only from within it, so the next agent goes there again.
Called before there is a second thread; imports little, since what it imports stays.
"""

import ctypes
import json
import os
import subprocess
from pathlib import Path
from typing import NoReturn

CLONE_NEWNS, CLONE_NEWUSER = 0x0002_0000, 0x1000_0000
MS_REC, MS_SLAVE = 0x4000, 0x8_0000

IDS = 65_535
"""Ids that a user needs beside its own: an image may have files of any of 65,536."""

HOLDER = ("sleep", "infinity")
"""What holds the namespace: half a megabyte."""

MAP_S = 30.0
"""newuidmap takes milliseconds; one that takes longer hangs."""

SAID = 500
"""Bytes of what somebody says who failed."""

why = ""
"""Why there is no such namespace, once `enter` was called; for the drivers' reports."""


class NoNamespace(Exception):
    """It cannot be had here; the text is for people, with the remedy."""


def enter(data_dir: Path) -> bool:
    """Go into the namespace of this data folder, made where there is none; whether we are in it then. `why` says why not."""
    global why
    try:
        held = _holder(data_dir)
        _join(_make(data_dir) if held is None else held)
    except (NoNamespace, OSError) as error:
        why = str(error)
        return False
    return True


def ranges(text: str, user: str, uid: int) -> tuple[int, int] | None:
    """The first range of at least `IDS` ids that a file as /etc/subuid gives to a user, by name or number: its first id, and how many."""
    for line in text.splitlines():
        name, _, rest = line.partition(":")
        first, _, count = rest.partition(":")
        if name in (user, str(uid)) and first.isdigit() and count.strip().isdigit() and int(count) >= IDS and int(first) + int(count) < 1 << 32:
            return int(first), int(count)
    return None


def _holder(data_dir: Path) -> int | None:
    """The process that holds the namespace of an earlier agent; None where it is gone."""
    try:
        told = json.loads((data_dir / "workloads/namespace.json").read_bytes())
        pid = int(told["pid"])
        return pid if (told["boot"], told["started"]) == (_boot(), _started(pid)) else None
    except (OSError, ValueError, KeyError, TypeError):
        return None


def _join(pid: int) -> None:
    libc, here, held = ctypes.CDLL(None, use_errno=True), os.getcwd(), os.pidfd_open(pid)
    try:
        if libc.setns(held, CLONE_NEWUSER | CLONE_NEWNS) != 0:  # both or none
            raise NoNamespace(f"the namespace that process {pid} holds cannot be entered: {os.strerror(ctypes.get_errno())}; end that process where nothing of its containers is needed")
    finally:
        os.close(held)
    try:
        os.chdir(here)
    except OSError:
        os.chdir("/")
    _become_root()


def _make(data_dir: Path) -> int:
    """Start what holds a new one; its process. Where that fails we are as we were."""
    import pwd
    import shutil

    uid, gid = os.getuid(), os.getgid()
    try:
        user = pwd.getpwuid(uid).pw_name
    except KeyError:
        raise NoNamespace(f"user id {uid} has no name, by which ids could be given to it; make a user for the agent") from None
    maps = []
    for program, file, own in (("newuidmap", "/etc/subuid", uid), ("newgidmap", "/etc/subgid", gid)):
        path = shutil.which(program)
        if path is None:
            raise NoNamespace(f"{program} is not installed (as root: apt install uidmap)")
        try:
            found = ranges(Path(file).read_text(), user, uid)
        except OSError:
            found = None
        if found is None:
            raise NoNamespace(f"{file} gives {user} no {IDS} ids (as root: usermod --add-subuids 100000-165535 --add-subgids 100000-165535 {user})")
        maps.append([path, "0", str(own), "1", "1", str(found[0]), str(found[1])])
    (ready, its_ready), (its_go, go) = os.pipe(), os.pipe()
    child = os.fork()
    if child == 0:
        os.close(ready)
        os.close(go)
        _hold(its_ready, its_go)
    os.close(its_ready)
    os.close(its_go)
    try:
        said = os.read(ready, SAID)
        if said != b"u":
            raise NoNamespace(f"no user namespace can be made: {said.decode('utf-8', 'replace')}; look at sysctl kernel.unprivileged_userns_clone and user.max_user_namespaces, and at AppArmor")
        for program, *ids in maps:
            done = subprocess.run([program, str(child), *ids], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=MAP_S)
            if done.returncode:
                raise NoNamespace(f"ids could not be mapped: {done.stderr.strip()[:SAID] or done.returncode}; see /etc/subuid and /etc/subgid")
        os.write(go, b"g")
        if said := os.read(ready, SAID):  # nothing: it has become what only holds
            raise NoNamespace(f"the namespace cannot be made ready: {said.decode('utf-8', 'replace')}; look at the node")
    except (NoNamespace, OSError, subprocess.SubprocessError) as error:
        os.close(go)
        go = -1
        os.waitpid(child, 0)
        raise error if isinstance(error, NoNamespace) else NoNamespace(str(error)) from None
    finally:
        os.close(ready)
        if go >= 0:
            os.close(go)
    folder = data_dir / "workloads"
    folder.mkdir(parents=True, exist_ok=True, mode=0o700)
    (folder / "namespace.json.new").write_text(json.dumps({"pid": child, "started": _started(child), "boot": _boot()}))
    os.replace(folder / "namespace.json.new", folder / "namespace.json")
    return child


def _hold(ready: int, go: int) -> NoReturn:
    """The holder's beginning: namespaces, then ids, which it is given from outside, then its own view of the mounts, then nothing any more."""
    try:
        libc, null = ctypes.CDLL(None, use_errno=True), os.open("/dev/null", os.O_RDWR)
        os.setsid()
        for descriptor in range(3):
            os.dup2(null, descriptor)
        if libc.unshare(CLONE_NEWUSER | CLONE_NEWNS) != 0:
            os.write(ready, os.strerror(ctypes.get_errno()).encode())
            os._exit(1)
        os.write(ready, b"u")
        if os.read(go, 1):
            _become_root()
            if libc.mount(b"none", b"/", None, MS_REC | MS_SLAVE, None) != 0:
                os.write(ready, f"mounts: {os.strerror(ctypes.get_errno())}".encode())
                os._exit(1)
            os.chdir("/")
            os.execvp(HOLDER[0], HOLDER)
    except BaseException as error:
        os.write(ready, str(error).encode()[:SAID] or b"it failed")
    finally:
        os._exit(1)


def _become_root() -> None:
    """Root of the namespace; the groups that the user is in stay as they are, with what they may."""
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)


def _boot() -> str:
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def _started(pid: int) -> int:
    return int(Path(f"/proc/{pid}/stat").read_bytes().rpartition(b")")[2].split()[19])
