"""An image that boots: without network and clock, decides, keeps its records through a power cut; and one whose root was tampered with, which does not."""

import contextlib
import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from firmware_images.build import Built
from firmware_images.data import take_out
from tests.integration.edges import MOSQUITTO
from tests.integration.waiting import until_sync
from tests.system.image_device import ALL_RECORDS, API_PORT, ARCH, BOOT_S, HOME, PROFILE, Device, every, image
from tools.bench.harness import ROOT, die_with_parent
from tools.bench.image_inside import HubProcess
from tools.novactl.journal import check, show

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(5400)]


@pytest.fixture(scope="module")
def built() -> Built:
    """The image."""
    return image()


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
        kept = {record["seq"]: record for record in every(device.get, "/api/v1/decisions")}
    for record in before:
        assert kept[record["seq"]] == record
    text = "\n".join(report)
    assert " / squashfs ro" in text
    listening = report[report.index("listening:") + 1 : report.index("failed:")]
    assert {line.split(":")[-1] for line in listening if "/tcp" in line} == {f"{API_PORT:04X}"}, listening
    assert {line.split(":")[-1] for line in listening if "/udp" in line} <= {"0044", "0222"}, listening  # it asks for an address (DHCP)
    assert report[report.index("failed:") + 1 : report.index("slot:")] == []
    assert ARCH.emulated in report[report.index("command line:") + 1]  # came by way of firmware and boot loader
    # The dead device's disk says the same.
    edge = take_out(device.disk, tmp_path / "autopsy") / "edge"
    verdict = check(edge, lambda *_: None)
    assert verdict["ok"], verdict
    assert verdict["records"]["decision"] >= newest
    assert {record["seq"] for record in show(edge, "decision", ALL_RECORDS)} >= {record["seq"] for record in before}


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


def as_from_a_terminal() -> None:
    """In the child: what was started in the background of a shell ignores Ctrl-C, and its children do too."""
    die_with_parent()
    signal.signal(signal.SIGINT, signal.SIG_DFL)


def test_image_that_is_booted_by_hand_with_a_hub_appears_there_and_goes_with_its_command(built: Built, tmp_path: Path) -> None:
    """As a person does it: the command, a hub on this machine's loopback, no other configuration."""
    if not MOSQUITTO:
        pytest.skip("no mosquitto: apt install mosquitto")
    name, log = f"{PROFILE.name}-{ARCH.name}", tmp_path / "console.log"
    with HubProcess(tmp_path) as hub, log.open("wb") as told:
        line = [sys.executable, "-m", "firmware_images", "boot", "--home", str(HOME), "--state", str(tmp_path / "machine"), "--hub", f"mqtt://127.0.0.1:{hub.broker_port}"]
        with subprocess.Popen(line, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=told, stderr=told, preexec_fn=as_from_a_terminal, start_new_session=True) as process:
            try:
                until_sync(lambda: process.poll() is not None or hub.decisions(name), BOOT_S, "a decision at the hub")
                assert process.poll() is None, log.read_text()
                edges = hub.get("/api/v1/edges")
                assert [edge["edge"] for edge in edges] == [name] and "novacron: configuration taken over" in log.read_text()
                os.killpg(process.pid, signal.SIGINT)  # Ctrl-C in a terminal: the machine gets it too
                assert process.wait(60) == 130
                with pytest.raises(ProcessLookupError):
                    os.killpg(process.pid, 0)  # no machine is left
            finally:
                with contextlib.suppress(ProcessLookupError):
                    os.killpg(process.pid, signal.SIGKILL)


def test_image_says_what_is_wrong_with_a_configuration_and_waits(built: Built, tmp_path: Path) -> None:
    bad = tmp_path / "edge.yaml"
    bad.write_text("edge_id: image-test\nuplink: {urll: x}\n")
    device = Device(built, tmp_path, bad)
    with device.on() as machine:
        machine.wait_for("the configuration that is given cannot be used .see above.; nothing was taken over", BOOT_S)
        machine.wait_for("Reached target multi-user.target", BOOT_S)
        assert any("urll" in text for _, text in machine.lines)
    shutil.rmtree(device.state)
