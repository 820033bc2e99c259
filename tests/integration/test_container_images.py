"""The containers of edge and hub, run by our own container driver from the layouts that the builder makes."""

import asyncio
import json
import os
from pathlib import Path

import pytest

from edge_runtime.workloads.drivers.face import Key, Order
from edge_runtime.workloads.images import ImageStore
from edge_runtime.workloads.images.manifest import Platform
from firmware_images import containers, oci, recipes
from firmware_images.errors import FirmwareError
from tools.bench.harness import ROOT

from .container_side import LIMITS, end_all, made_driver, reason_against

pytestmark = [pytest.mark.slow, pytest.mark.timeout(1200), pytest.mark.skipif(bool(reason_against()), reason=reason_against())]

START_S = 240
"""Longest wait for an answer: a few seconds on an idle machine."""

ASK = "import sys, urllib.request; print(urllib.request.urlopen(sys.argv[1], timeout=10).read().decode())"

CONFIG = """edge_id: contained
uplink: {enabled: false}
decisions:
  rules:
    - {id: awake, "on": {device: host, metric: uptime_seconds}, if: {value: uptime_seconds, op: ">", than: 0}, trigger: each, then: [{alert: {severity: info, text: awake}}]}
"""


def layout_of(service: str, mode: str) -> Path:
    """The layout for this machine; built where it is not there (once, with the network)."""
    home = Path(os.environ.get("NOVACRON_IMAGES", ROOT / ".novacron" / "images"))
    try:
        arch = recipes.architecture(Platform.here().arch)
        chosen = containers.service(service)
        where = containers.layout(home, chosen, mode)
        if any(entry["platform"]["architecture"] == arch.name for entry in oci.listed(where, containers.reference(chosen, mode))):
            return where
        return containers.build(home, arch, chosen, mode, print)
    except FirmwareError as error:
        if error.field in ("tools", "network", "space", "arch"):
            pytest.skip(f"no image can be built here: {error}")
        raise


@pytest.mark.parametrize(("service", "mode", "port", "path"), [("edge", "production", 8470, "/api/v1/decisions"), ("edge", "development", 8470, "/api/v1/decisions"), ("hub", "production", 8460, "/readyz")])
async def test_a_container_of_ours_runs_in_our_driver(service: str, mode: str, port: int, path: str, tmp_path: Path) -> None:
    store = ImageStore(tmp_path / "images", limits=LIMITS)
    name = containers.reference(containers.service(service), mode)
    await asyncio.to_thread(store.add, await asyncio.to_thread(layout_of, service, mode), name)
    (tmp_path / "config").mkdir(mode=0o755)
    (tmp_path / "config" / "edge.yaml").write_text(CONFIG)
    os.chmod(tmp_path, 0o755)
    driver = made_driver(tmp_path, store, allowed_mounts=(str(tmp_path / "config"),))
    try:
        mounts = [{"target": "/etc/novacron", "source": str(tmp_path / "config"), "read_only": True}, {"target": "/tmp", "tmpfs": "16Mi"}]
        key = Key(service, 1)
        await driver.prepare(Order(key, name, {"memory": 512 << 20}, {"mounts": mounts, **({"args": ["--config", "/etc/novacron/edge.yaml"]} if service == "edge" else {})}))
        await driver.start(key)

        async def answer() -> str:
            ran = await driver.exec(key, ["/usr/bin/python3", "-c", ASK, f"http://127.0.0.1:{port}{path}"], 60)
            return ran.output.stdout.decode()

        async with asyncio.timeout(START_S):
            while not (said := await answer()).strip() or said.strip() == "[]":
                status = await driver.status(key)
                assert status.exit is None, (status, (await driver.logs(key, 1 << 16)).stderr.decode())
        if service == "edge":
            assert json.loads(said)[0]["body"]["rule"] == "awake"
        who = (await driver.exec(key, ["/usr/bin/python3", "-c", "import os, shutil; print(os.getuid(), os.getgid(), shutil.which('sh'))"], 60)).output.stdout.decode().split()
        assert who == [str(containers.USER), str(containers.USER), "/usr/bin/sh" if mode == "development" else "None"]
        await driver.stop(key, 30)
        status = await driver.wait(key)
        assert status.exit is not None and status.exit.code == 0, (status, (await driver.logs(key, 1 << 16)).stderr.decode())
        await driver.delete(key)
    finally:
        await asyncio.to_thread(end_all, driver)
        store.close()
