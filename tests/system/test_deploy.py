"""compose.yaml, brought up by its own first lines by a Docker of its own, in namespaces of its own: nothing of this machine's Docker, network or mounts is touched."""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from firmware_images import containers, recipes
from firmware_images.build import MACHINES
from firmware_images.errors import FirmwareError
from tests.integration.waiting import until_sync
from tests.system.deploy_program import compose_words, search_path
from tools.bench.harness import ROOT, die_with_parent

NAMESPACES = ["unshare", "--net", "--mount", "--uts", "--ipc", "--pid", "--fork", "--kill-child", "--mount-proc", "--propagation", "private"]


def reason_against() -> str:
    """Why it cannot be seen here; empty where it can."""
    if os.geteuid() != 0:
        return "a Docker of its own needs root"
    path = search_path()
    packages = {"dockerd": "docker.io", "docker": "docker.io (Debian 13: docker-cli)", "containerd": "containerd", "runc": "runc", "iptables": "iptables", "mosquitto_passwd": "mosquitto", "ip": "iproute2"}
    if absent := next((package for program, package in packages.items() if shutil.which(program, path=path) is None), ""):
        return f"no {absent} (tools/setup/docker.sh, or as root: apt install docker.io docker-compose; mosquitto, runc, iproute2)"
    if not compose_words(path):
        return "no Docker Compose 2 (tools/setup/docker.sh, or as root, on Debian 13: apt install docker-compose)"
    if subprocess.run([*NAMESPACES, "true"], capture_output=True, check=False).returncode:
        return "unshare is refused here"
    return ""


pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(2400), pytest.mark.skipif(bool(reason_against()), reason=reason_against())]

RUN_S = 1500.0
"""Longest wait: half a minute on a machine at load 2 (2026-11-30)."""

GONE_S = 30.0
"""Longest wait for the end of killed containers."""


@pytest.fixture(scope="module")
def home() -> Path:
    """Where the images are, made of this very code."""
    where = Path(os.environ.get("NOVACRON_IMAGES", ROOT / ".novacron" / "images"))
    try:
        for name in ("hub", "edge"):
            containers.build(where, recipes.architecture(MACHINES[platform.machine()]), containers.service(name), "production", print)
    except FirmwareError as error:
        if error.field in ("tools", "network", "space", "machine"):
            pytest.skip(f"no image can be built here: {error}")
        raise
    return where


def there(folder: Path, home: Path, control: str) -> "subprocess.CompletedProcess[str]":
    line = [*NAMESPACES, "sh", "-c", 'ip link set lo up && exec "$@"', "-", sys.executable, "-m", "tests.system.deploy_program", str(folder), str(home), control]
    try:
        return subprocess.run(line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=RUN_S, preexec_fn=die_with_parent, env={**os.environ, "PATH": search_path()})
    finally:
        # Docker leaves the group above those of its containers, and these too where it is killed.
        for group in (*Path("/sys/fs/cgroup").glob("*/novacron-deploy"), Path("/sys/fs/cgroup/novacron-deploy")):
            for below in (*sorted((path for path in group.rglob("*") if path.is_dir()), reverse=True), *([group] if group.is_dir() else [])):
                until_sync(lambda: _removed(below), GONE_S, f"the end of {below}")  # noqa: B023


def _removed(group: Path) -> bool:
    try:
        group.rmdir()
    except OSError:  # what was killed in it is not gone yet
        return False
    return True


def test_hub_broker_and_edge_run_as_compose_has_them(tmp_path: Path, home: Path) -> None:
    told = there(tmp_path, home, "-")
    assert told.returncode == 0, told.stdout[-20_000:]


@pytest.mark.parametrize(("control", "words"), [("configs", "container rootfs is marked read-only"), ("rights", "does not come up")])
def test_what_is_written_or_done_wrongly_is_seen(control: str, words: str, tmp_path: Path, home: Path) -> None:
    """The control: the broker's configuration as compose.yaml had it at first; secrets that the containers' user cannot read."""
    told = there(tmp_path, home, control)
    assert told.returncode == 1 and words in told.stdout, told.stdout[-20_000:]
