"""The direct driver where the agent is not root: real containers of a made user, with ids that /etc/subuid gives it in mounts of the test's own. What it cannot keep, it refuses or tells."""

import json
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads import rootless
from edge_runtime.workloads.drivers import cgroups
from edge_runtime.workloads.drivers.outside import outside

from .rootless_side import FIRST, UID, WAIT_S, User, user
from .waiting import until_sync

__all__ = ["user"]

pytestmark = pytest.mark.timeout(600)

LIMITLESS = "version 1 only" if cgroups.read().layout == "v2" else f"mkdir novacron-{UID}, chown -R {UID}"
"""Of the reason why no limits can be kept."""


@pytest.fixture
def delegated() -> Iterator[cgroups.Groups]:
    """Control groups that root has given to that user."""
    groups = cgroups.read()
    if groups.layout == "v2":
        pytest.skip("limits without root are kept with control groups of version 1 only")
    folders = list(dict.fromkeys(Path(f"{top}/novacron-{UID}") for top in groups.mounts.values()))
    for folder in folders:
        folder.mkdir()
        for path in (folder, *folder.iterdir()):
            os.chown(path, UID, UID)
    yield groups
    for folder in (*folders, *(folder.with_name(f"novacron-{UID}-keepers") for folder in folders)):
        for below in (*folder.glob("*"), folder):
            if below.is_dir():
                with suppress(OSError):
                    below.rmdir()


def script(text: str, **spec: Any) -> dict[str, Any]:
    return {"command": ["sh", "-c", text], **spec}


def test_a_user_runs_containers_and_is_told_what_cannot_be_kept(user: User) -> None:
    see = "id -u; id -g; grep -E 'CapEff|NoNewPrivs|Seccomp:' /proc/self/status; unshare -U true || echo no namespace; ls /sys/class/net"
    entered, told, seen, files, refused = user.done(
        "run", script(see, user="app"), script("touch /made && stat -c %u /made /bin/busybox; echo $(ls /srv) $(ls /srv/old)"), {"command": ["true"], "limits": {"memory": "32Mi"}},
    )
    assert entered["entered"] and entered["uid"] == 0 and entered["why"] == ""
    report = told["report"]
    assert report["usable"] and {"start", "stop", "adopt", "logs", "exec", "seccomp", "rootless"} <= set(report["can"]), report["cannot"]
    for ability in ("limits", "stats", "pause"):
        assert LIMITLESS in report["cannot"][ability], "with what root would have to do"
    assert "machine's root" in report["cannot"]["checkpoint"] and "no ids for others" in report["cannot"]["user-namespace"]
    assert seen["stdout"] == f"1000\n1001\nCapEff:\t{0:016x}\nNoNewPrivs:\t1\nSeccomp:\t2\nno namespace\nlo\n", seen
    assert files["stdout"] == "0\n0\nold c\n", "owners as in the image, and what a layer takes away is away"
    assert "spec.limits: cannot be kept on this node: " in refused["refused"] and LIMITLESS in refused["refused"], "never silently"


def test_with_control_groups_of_its_own_limits_hold(user: User, delegated: cgroups.Groups) -> None:
    _, told, bomb = user.done("run", script("exec busybox tail /dev/zero", limits={"memory": "24Mi"}))
    assert {"limits", "pause", "stats"} <= set(told["report"]["can"]), told["report"]["cannot"]
    assert bomb["out_of_memory"], bomb


def test_it_has_a_network_where_the_node_lets_users_make_interfaces(user: User) -> None:
    _, told, ran = user.done("run-connected", script("busybox ip -4 -o addr | busybox awk '{print $2, $4}'", network={}))
    if "network" in told["report"]["cannot"]:
        pytest.skip(told["report"]["cannot"]["network"])
    assert ran["stdout"].splitlines()[0] == "lo 127.0.0.1/8" and "10.0.2.100/24" in ran["stdout"], ran


def test_an_agent_that_was_killed_finds_its_namespace_and_containers_again(user: User) -> None:
    first = user.start("begin")
    assert first.stdout is not None
    entered, begun = (json.loads(_line(first)) for _ in range(2))
    owner = os.stat(f"/proc/{begun['pid']}").st_uid
    assert owner == FIRST + 999, "user 1000 of the container is that of the range: 0 is the user's own"
    log = user.data / "workloads/containers/lasting.1/stdout.log"
    until_sync(lambda: log.exists() and log.read_bytes() == b"up\n", WAIT_S)
    first.kill()
    first.wait()
    again, ended = user.done("end")
    assert again["entered"] and again["holder"] == entered["holder"], "the same namespace"
    assert ended == {"phase": "running", "stdout": "up\n", "user": "1000", "code": 7}
    os.kill(entered["holder"], signal.SIGKILL)
    until_sync(lambda: not Path(f"/proc/{entered['holder']}/ns/user").exists(), WAIT_S)
    (anew,) = user.done("enter")
    assert anew["entered"] and anew["holder"] not in (None, entered["holder"]), "the control: where nobody holds it, there is another"


def _line(process: "subprocess.Popen[bytes]") -> bytes:
    assert process.stdout is not None
    found = b""
    while not found.endswith(b"\n"):
        assert select.select([process.stdout], [], [], WAIT_S)[0], "it says nothing"
        one = os.read(process.stdout.fileno(), 1)
        assert one, "it has ended"
        found += one
    return found


@pytest.mark.parametrize(("ids", "says"), [(0, "gives rootless no 65535 ids (as root: usermod --add-subuids"), (1000, "gives rootless no 65535 ids")])
def test_a_user_without_ids_is_refused_and_stays_what_it_was(ids: int, says: str, user: User) -> None:
    user.give(ids)
    told, report = user.done("run")
    assert not told["entered"] and told["uid"] == UID and says in told["why"] and told["holder"] is None
    assert not report["report"]["usable"] and says in report["report"]["cannot"]["start"], "and the driver says so"


def test_ranges_of_ids() -> None:
    text = "other:100000:65536\nme:5:100\nme:200000:x\n1000:300000:65536\nme:400000:65536\nme:4294967000:65536\n"
    assert rootless.ranges(text, "me", 1000) == (300_000, 65_536)
    assert rootless.ranges(text, "me", 1) == (400_000, 65_536)
    assert rootless.ranges("me:4294967000:65536", "me", 1) is None and rootless.ranges("", "me", 1) is None


def test_who_we_are_outside() -> None:
    assert outside("         0          0 4294967295\n") is None
    assert outside("         0       1000          1\n         1     100000      65536\n") == 1000
    assert outside("         0     100000      65536\n") == 100_000 and outside("1000 1000 1\n") is None
