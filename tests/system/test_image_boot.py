"""An image that boots: without network and clock, decides, keeps its records through a power cut; and one whose root was tampered with, which does not."""

import json
import os
import shutil
import urllib.request
from pathlib import Path
from typing import Any

import pytest

from firmware_images import recipes, tools
from firmware_images.boot import API_PORT, credentials
from firmware_images.build import Built, build, finished
from firmware_images.data import take_out
from firmware_images.errors import FirmwareError
from firmware_images.machine import Machine, Wiring, command, free_port, prepare
from tests.integration.waiting import until_sync
from tools.bench.harness import ROOT
from tools.novactl.journal import check, show

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(900)]

ARCH, PROFILE = recipes.architecture("amd64"), recipes.profile("device")

BOOT_S = 240
"""Longest wait for a boot: 30 s on an idle core, several times that where others want it too."""


@pytest.fixture(scope="module")
def built() -> Built:
    """The image; built where it is not there (once, with the network)."""
    home = Path(os.environ.get("NOVACRON_IMAGES", ROOT / ".novacron" / "images"))
    try:
        tools.require([*tools.BUILD, ARCH.qemu, "e2fsck", "debugfs"])
        try:
            return finished(home, ARCH, PROFILE)
        except FirmwareError:
            return build(home, ARCH, PROFILE, print)
    except FirmwareError as error:
        if error.field in ("tools", "network", "space"):
            pytest.skip(f"no image can be built here: {error}")
        raise


class Device:
    """The image in a machine of its own, at 1970, without a network; its interface."""

    def __init__(self, built: Built, folder: Path, config: Path | None = None) -> None:
        self.built, self.state = built, folder / "state"
        self.disk, self.flash = prepare(ARCH, built.image, self.state)
        handed, self.token = credentials(self.state, config, [], True, "image-test")
        self.port = free_port()
        self.wiring = Wiring(PROFILE.memory_mib, {self.port: API_PORT}, handed, clock="1970-01-02")

    def on(self) -> Machine:
        """Power on."""
        return Machine(command(ARCH, self.disk, self.flash, self.wiring))

    def get(self, path: str, seconds: float = BOOT_S) -> Any:
        """An answer of the interface, asked for until there is one."""
        request = urllib.request.Request(f"http://127.0.0.1:{self.port}{path}", headers={"Authorization": f"Bearer {self.token}"})

        def asked() -> tuple[Any] | None:
            try:
                with urllib.request.urlopen(request, timeout=10) as answer:
                    return (json.load(answer),)
            except (OSError, ValueError):
                return None

        return until_sync(asked, seconds, f"an answer on {path}")[0]


def decisions(device: Device, least: int) -> list[dict[str, Any]]:
    """The newest decisions once there are `least`."""
    def enough() -> list[dict[str, Any]] | None:
        found = device.get("/api/v1/decisions?limit=100")
        return found if len(found) >= least else None

    found: list[dict[str, Any]] = until_sync(enough, BOOT_S, f"{least} decisions")
    return list(found)


def test_image_decides_offline_and_loses_nothing_by_a_power_cut(built: Built, tmp_path: Path) -> None:
    device = Device(built, tmp_path)
    with device.on() as machine:
        before = decisions(device, 3)
        machine.wait_for("=== end of report", BOOT_S)
        report = machine.between("=== novacron report", "=== end of report")
    with pytest.raises(AssertionError, match="an answer on"):
        device.get("/healthz", 0)
    with device.on():
        newest = max(record["seq"] for record in before)
        while (after := decisions(device, 1)) and max(record["seq"] for record in after) <= newest:
            pass
        kept = {record["seq"]: record for record in device.get("/api/v1/decisions?limit=500")}
    for record in before:
        assert kept[record["seq"]] == record
    text = "\n".join(report)
    assert " / squashfs ro" in text
    listening = report[report.index("listening:") + 1 : report.index("failed:")]
    assert {line.split(":")[-1] for line in listening if "/tcp" in line} == {f"{API_PORT:04X}"}, listening
    assert {line.split(":")[-1] for line in listening if "/udp" in line} <= {"0044", "0222"}, listening  # it asks for an address (DHCP)
    assert report[report.index("failed:") + 1 : report.index("root:")] == []
    # The dead device's disk says the same.
    edge = take_out(device.disk, built.manifest, tmp_path / "autopsy") / "edge"
    verdict = check(edge, lambda *_: None)
    assert verdict["ok"], verdict
    assert verdict["records"]["decision"] >= newest
    assert {record["seq"] for record in show(edge, "decision", 1000)} >= {record["seq"] for record in before}


def test_image_with_a_tampered_root_does_not_start(built: Built, tmp_path: Path) -> None:
    device = Device(built, tmp_path)
    slot = built.manifest["partitions"][built.manifest["slot"]]
    with device.disk.open("r+b") as disk:
        for block in range(64, slot["size"] // 4096, 64):  # somewhere in every quarter MiB: one of them is read early
            disk.seek(slot["start"] + block * 4096 + 100)
            byte = disk.read(1)
            disk.seek(-1, os.SEEK_CUR)
            disk.write(bytes([byte[0] ^ 1]))
    with device.on() as machine:
        machine.wait_for("device-mapper: verity|dm-verity device has corrupted|Kernel panic", BOOT_S)
        assert not any("NovaCron edge agent" in text for _, text in machine.lines), machine.tail()


def test_image_says_what_is_wrong_with_a_configuration_and_waits(built: Built, tmp_path: Path) -> None:
    bad = tmp_path / "edge.yaml"
    bad.write_text("edge_id: image-test\nuplink: {urll: x}\n")
    device = Device(built, tmp_path, bad)
    with device.on() as machine:
        machine.wait_for("the configuration cannot be used .above.; nothing was taken over", BOOT_S)
        machine.wait_for("Reached target multi-user.target", BOOT_S)
        assert any("urll" in text for _, text in machine.lines)
    shutil.rmtree(device.state)
