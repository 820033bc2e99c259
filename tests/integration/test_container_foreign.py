"""The containers of edge and hub for other architectures than this machine's, and in development mode: their own start line, in their own files, by QEMU's user mode. A decision and an answer, not a speed."""

import json
import os
import platform
import shutil
import subprocess
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from firmware_images import containers, oci, recipes
from firmware_images.build import MACHINES
from firmware_images.errors import FirmwareError
from tests.integration.edges import MOSQUITTO
from tests.integration.waiting import until_sync
from tools.bench.harness import ROOT, die_with_parent, free_port, private_mosquitto, stop

QEMU = {"arm64": "qemu-aarch64-static", "riscv64": "qemu-riscv64-static"}

ENTER = 'mount --rbind /proc "$0/proc" && mount --rbind /dev "$0/dev" && exec chroot "$0" "$@"'
"""Into a root of ours with this machine's processes and devices, in a mount space of its own."""


def reason_against() -> str:
    """Why nothing of another architecture can be run here; empty where it can."""
    if lacking := [name for name in QEMU.values() if shutil.which(name) is None]:
        return f"{', '.join(lacking)} not found: as root, apt install --no-install-recommends qemu-user-static"
    if subprocess.run(["unshare", "-r", "-m", "true"], capture_output=True).returncode:
        return "unshare -r -m is refused here"
    return ""


pytestmark = [pytest.mark.slow, pytest.mark.timeout(1800), pytest.mark.skipif(bool(reason_against()), reason=reason_against())]

START_S = 900
"""Longest wait for an answer: a quarter of a minute on an idle machine."""

CONFIG = """edge_id: foreign
data_dir: /data
uplink: {enabled: false}
decisions:
  models: ["shipped:host-anomaly/portable"]
  rules:
    - {id: awake, "on": {device: host, metric: uptime_seconds}, if: {value: uptime_seconds, op: ">", than: 0}, trigger: each, then: [{alert: {severity: info, text: awake}}]}
"""


def root_of(arch: str, service: str, mode: str, folder: Path) -> tuple[Path, dict[str, Any]]:
    """The image's files in a folder, and its configuration; built where it is not there (once, with the network)."""
    home = Path(os.environ.get("NOVACRON_IMAGES", ROOT / ".novacron" / "images"))
    chosen = containers.service(service)
    where = containers.layout(home, chosen, mode)

    def entry() -> dict[str, Any] | None:
        return next((one for one in oci.listed(where, containers.reference(chosen, mode)) if one["platform"]["architecture"] == arch), None)

    try:
        found = entry() or (containers.build(home, recipes.architecture(arch), chosen, mode, print), entry())[1]
    except FirmwareError as error:
        if error.field in ("tools", "network", "space", "machine"):
            pytest.skip(f"no image can be built here: {error}")
        raise
    assert found is not None

    def blob(digest: str) -> Path:
        return where / "blobs" / "sha256" / digest.removeprefix("sha256:")

    manifest = json.loads(blob(found["digest"]).read_text())
    config: dict[str, Any] = json.loads(blob(manifest["config"]["digest"]).read_text())
    assert config["architecture"] == arch
    root = folder / "root"
    root.mkdir()
    for layer in manifest["layers"]:
        subprocess.run(["tar", "-xzf", str(blob(layer["digest"])), "-C", str(root), "--no-same-owner"], check=True)
    for name in ("data", "proc", "dev"):
        (root / name).mkdir(exist_ok=True)
    return root, config["config"]


@contextmanager
def started(root: Path, arch: str, config: dict[str, Any], log: Path, *arguments: str, **environment: str) -> Iterator[subprocess.Popen[bytes]]:
    """The image's own start line, and `arguments` behind it."""
    program = []
    if arch != MACHINES[platform.machine()]:
        shutil.copy(str(shutil.which(QEMU[arch])), root / "qemu")
        program = ["/qemu"]
    env = {**dict(word.partition("=")[::2] for word in config["Env"]), **environment}
    with log.open("wb") as words:
        line = ["unshare", "-r", "-m", "sh", "-c", ENTER, str(root), *program, *config["Entrypoint"], *arguments]
        process = subprocess.Popen(line, env=env, stdin=subprocess.DEVNULL, stdout=words, stderr=subprocess.STDOUT, preexec_fn=die_with_parent)
        try:
            yield process
        finally:
            stop(process, 60)


def answer(url: str, process: "subprocess.Popen[bytes]", log: Path, token: str = "") -> Any:
    """JSON from there, once there is something."""
    def ask() -> Any:
        assert process.poll() is None, log.read_text(errors="replace")[-3000:]
        try:
            with urllib.request.urlopen(urllib.request.Request(url, headers={"Authorization": f"Bearer {token}"}), timeout=20) as told:
                return json.load(told)
        except (OSError, ValueError):
            return None

    return until_sync(ask, START_S, f"an answer of {url}")


@pytest.mark.parametrize(("arch", "mode"), [("arm64", "production"), ("riscv64", "production"), ("arm64", "development"), ("riscv64", "development")])
def test_an_edge_decides_in_the_container_of_its_architecture(arch: str, mode: str, tmp_path: Path) -> None:
    root, config = root_of(arch, "edge", mode, tmp_path)
    (root / "edge.yaml").write_text(CONFIG)
    port = free_port()
    log = tmp_path / "log"
    with started(root, arch, config, log, "--config", "/edge.yaml", NOVACRON_EDGE__API__PORT=str(port), NOVACRON_EDGE__DATA_DIR="/data") as process:
        found = answer(f"http://127.0.0.1:{port}/api/v1/decisions", process, log)
        assert found[0]["body"]["rule"] == "awake"
        models = answer(f"http://127.0.0.1:{port}/api/v1/status", process, log)["models"]
        assert models["host-anomaly"]["engine"] == "portable"
    assert process.returncode == 0, log.read_text(errors="replace")[-3000:]
    assert (root / "usr/bin/sh").is_symlink() is (mode == "development")


@pytest.mark.skipif(not MOSQUITTO, reason="no mosquitto: apt install mosquitto")
@pytest.mark.parametrize("arch", list(QEMU))
def test_a_hub_is_ready_in_the_container_of_its_architecture(arch: str, tmp_path: Path) -> None:
    root, config = root_of(arch, "hub", "production", tmp_path)
    port = free_port()
    log = tmp_path / "log"
    # Its own broker is a program that it starts, which QEMU's user mode cannot without the kernel's help: this machine's is taken.
    with private_mosquitto() as broker, started(root, arch, config, log, "--broker", f"mqtt://127.0.0.1:{broker}", "--listen", f"127.0.0.1:{port}", "--data-dir", "/data") as process:
        assert answer(f"http://127.0.0.1:{port}/readyz", process, log)
        token = (root / "data" / "token").read_text().strip()
        assert answer(f"http://127.0.0.1:{port}/openapi.json", process, log, token)["openapi"].startswith("3.1")
    assert process.returncode == 0, log.read_text(errors="replace")[-3000:]


def test_control_a_root_that_lacks_a_module_does_not_start(tmp_path: Path) -> None:
    root, config = root_of("riscv64", "edge", "production", tmp_path)
    for path in (root / "usr/lib").rglob("edge_runtime/pipeline.py"):
        path.unlink()
    for path in (root / "usr/lib").rglob("edge_runtime/__pycache__/pipeline.*"):
        path.unlink()
    (root / "edge.yaml").write_text(CONFIG)
    with started(root, "riscv64", config, tmp_path / "log", "--config", "/edge.yaml", NOVACRON_EDGE__DATA_DIR="/data") as process:
        process.wait(START_S)
    assert process.returncode != 0 and "pipeline" in (tmp_path / "log").read_text()
