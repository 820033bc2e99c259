"""A user who is not root, made for a test: with ids that /etc/subuid gives it in mounts of the test's own, and a data folder. Skips where that cannot be had."""

import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from contextlib import suppress
from functools import cache
from pathlib import Path
from typing import Any

import pytest

from .container_side import reason_against as against_containers

ROOT = Path(__file__).parents[2]
PROGRAM = Path(__file__).with_name("rootless_agent.py")
UID = 0x0F00_0000 + os.getpid() % 8192
"""Of nobody else, and of no other test that runs beside this one."""
FIRST = 0x1000_0000 + os.getpid() % 8192 * 65_536
"""First of the ids that are given to it; below those that our drivers give."""
OVERLAY = "mkdir l u w m && mount -t overlay overlay -o lowerdir=l,upperdir=u,workdir=w,userxattr m"
WAIT_S = 250.0
"""An upper bound for one program."""


@cache
def reason_against() -> str:
    """Why nothing can be tested here; empty where it can."""
    if why := against_containers():
        return why
    for program in ("newuidmap", "newgidmap", "unshare", "setpriv"):
        if shutil.which(program) is None:
            return f"no {program} (as root: apt install uidmap util-linux)"
    with tempfile.TemporaryDirectory(prefix="rootless-") as top:
        one = User(Path(top))
        try:
            said, _ = one.start("enter").communicate(timeout=WAIT_S)
            mounts = subprocess.run([*one.wrap(), "unshare", "--user", "--map-root-user", "--mount", "sh", "-c", OVERLAY], cwd=one.data, capture_output=True)
        finally:
            one.end()
    if not said:
        return "another user cannot read this checkout, its Python, or temporary files"
    told = json.loads(said.splitlines()[0])
    if not told["entered"]:
        return f"no user namespace can be had here: {told['why']}"
    return "" if mounts.returncode == 0 else "overlayfs cannot be mounted in a user namespace here"


class User:
    """A user of the test's own, with a data folder; its programs see these files as /etc/passwd and so on."""

    def __init__(self, top: Path) -> None:
        self.top, self.data, self.programs = top, top / "data", list[subprocess.Popen[bytes]]()
        top.chmod(0o755)
        self.data.mkdir()
        os.chown(self.data, UID, UID)
        (top / "passwd").write_text(Path("/etc/passwd").read_text() + f"rootless:x:{UID}:{UID}::/:/bin/sh\n")
        self.give(65_536)
        os.mknod(top / "tun", 0o020666, os.makedev(10, 200))
        (top / "tun").chmod(0o666)

    def give(self, ids: int) -> None:
        """So many ids beside its own."""
        for name in ("subuid", "subgid"):
            (self.top / name).write_text(f"rootless:{FIRST}:{ids}\n" if ids else "")

    def wrap(self) -> list[str]:
        """What a command is put after so that this user runs it."""
        binds = " && ".join([f"mount --bind {self.top}/{name} /etc/{name}" for name in ("passwd", "subuid", "subgid")] + [f"if [ -e /dev/net/tun ]; then mount --bind {self.top}/tun /dev/net/tun; fi"])
        return ["unshare", "--mount", "--propagation", "private", "sh", "-c", f"{binds} && exec setpriv --reuid {UID} --regid {UID} --clear-groups \"$@\"", "sh"]

    def start(self, what: str) -> "subprocess.Popen[bytes]":
        """A program of `rootless_agent`."""
        process = subprocess.Popen(
            [*self.wrap(), sys.executable, str(PROGRAM), str(self.data), what], stdin=subprocess.PIPE, stdout=subprocess.PIPE, cwd="/",
            env={"PYTHONPATH": str(ROOT), "PATH": os.environ.get("PATH", os.defpath), "PYTHONDONTWRITEBYTECODE": "1"},
        )
        self.programs.append(process)
        return process

    def done(self, what: str, *specs: Any) -> list[dict[str, Any]]:
        """All that a program said; `specs`: of what it shall run, one after the other."""
        out, _ = self.start(what).communicate(b"".join(json.dumps(spec).encode() + b"\n" for spec in specs), WAIT_S)
        return [json.loads(line) for line in out.splitlines()]

    def end(self) -> None:
        """Everything that runs as this user, or by one of its ids."""
        for process in self.programs:
            process.kill()
            process.wait()
        for entry in Path("/proc").iterdir():
            with suppress(OSError):
                if entry.name.isdigit() and ((owner := entry.stat().st_uid) == UID or FIRST <= owner < FIRST + 65_536):
                    os.kill(int(entry.name), signal.SIGKILL)


@pytest.fixture
def user() -> Iterator[User]:
    if reason := reason_against():
        pytest.skip(reason)
    with tempfile.TemporaryDirectory(prefix="rootless-") as top:
        one = User(Path(top))
        try:
            yield one
        finally:
            one.end()
            shutil.rmtree(f"/tmp/novacron-{UID}", ignore_errors=True)
