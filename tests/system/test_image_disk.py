"""An image on a disk that is larger than it: its data partition gets the rest, wherever the power is cut meanwhile. And a device that is given another configuration by its boot partition."""

import os
import random
import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from firmware_images import gpt, tools
from firmware_images.build import Built
from firmware_images.data import take_out
from firmware_images.layout import DATA_NAME, ESP_NAME
from tests.integration.waiting import until_sync
from tests.system.image_device import BOOT_S, Device, image
from tools.novactl.journal import check
from tools.powercut.machine_log import Replay

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(7200)]

MORE_BYTES = 192 << 20
"""By which the disk is larger than the image."""

DRAWS = 200
"""Of what is lost or torn of the unflushed writes, after each write to a partition table."""


@pytest.fixture(scope="module")
def built() -> Built:
    """The image."""
    return image()


def put(device: Device, **files: str) -> None:
    """Into the folder of the boot partition, as a person with the disk in another computer would."""
    for name, text in files.items():
        source = device.state / "put"
        source.write_text(text)
        where = f"{device.disk}@@{device.built.manifest['partitions'][ESP_NAME]['start']}"
        tools.run(["mcopy", "-o", "-i", where, str(source), f"::/novacron/{name.replace('_', '.')}"], field="test", remedy="", env={"MTOOLS_SKIP_CHECK": "1"})


def cut_at_each_write(before: Path, log: Path, flushes: bool) -> tuple[set[int], int, list[str]]:
    """Sizes of the data partition that a start after a cut finds, how many cuts were looked at, and where no table was whole or another partition has moved."""
    replay = Replay(before, log, flushes)
    disk_bytes, draw = len(replay.content), random.Random(1)
    first = gpt.read(replay.content, disk_bytes)
    ends = gpt.TABLE_SECTORS * gpt.SECTOR
    sizes: set[int] = set()
    bad: list[str] = []
    looked = 0

    def look(disk: gpt.Readable, where: str) -> None:
        nonlocal looked
        looked += 1
        try:
            found = gpt.read(disk, disk_bytes)
        except ValueError as error:
            bad.append(f"{where}: {error}")
            return
        sizes.add(found[DATA_NAME][1])
        if {**found, DATA_NAME: first[DATA_NAME]} != first or found[DATA_NAME][0] != first[DATA_NAME][0]:
            bad.append(f"{where}: {found}")

    for number in range(len(replay.entries)):
        entry = replay.step()
        if entry.size and (entry.offset < ends + gpt.SECTOR or entry.offset + entry.size > disk_bytes - ends):
            look(replay.content, f"write {number}")
            for _ in range(DRAWS):
                with replay.lossy(draw) as disk:
                    look(disk, f"write {number}, unflushed lost")
    return sizes, looked, bad


def test_image_gives_its_data_partition_the_rest_of_the_disk_wherever_the_power_is_cut(built: Built, tmp_path: Path) -> None:
    device = Device(built, tmp_path)
    os.truncate(device.disk, built.manifest["disk_bytes"] + MORE_BYTES)
    before, log = tmp_path / "before.img", tmp_path / "log"
    shutil.copyfile(device.disk, before)
    os.truncate(before, device.disk.stat().st_size)
    log.touch()
    wiring, device.wiring = device.wiring, replace(device.wiring, log=log)
    with device.on() as machine:
        machine.wait_for(r"the data partition has \d+ MiB", BOOT_S)
        device.get("/api/v1/status")
        machine.wait_for("=== end of report", BOOT_S)
    grown = built.manifest["partitions"][DATA_NAME]["size"] + MORE_BYTES
    with device.disk.open("rb") as file:
        content = file.read(1 << 20) + bytes(built.manifest["disk_bytes"] + MORE_BYTES - (1 << 20))
    assert grown < gpt.read(content, len(content))[DATA_NAME][1] < grown + gpt.ALIGN_BYTES  # up to the table in the last sectors
    sizes, looked, bad = cut_at_each_write(before, log, True)
    assert not bad, bad[:5]
    assert len(sizes) == 2 and looked > DRAWS
    # Control: a disk that keeps nothing in the order in which it was flushed is seen.
    assert cut_at_each_write(before, log, False)[2]
    device.wiring = wiring
    with device.on() as machine:
        device.get("/api/v1/decisions?limit=1")
        machine.wait_for("=== end of report", BOOT_S)
        assert not [text for _, text in machine.lines if "novacron: the data partition" in text]  # once
    edge = take_out(device.disk, tmp_path / "autopsy") / "edge"
    assert check(edge, lambda *_: None)["ok"]


CONFIG = """edge_id: image-test
uplink: {enabled: false}
api: {host: 0.0.0.0, token_file: /var/lib/novacron/config/api.token}
decisions:
  rules:
    - {id: NAME, "on": {device: host, metric: uptime_seconds}, if: {value: uptime_seconds, op: ">", than: 0}, trigger: each, then: [{alert: {severity: info, text: up}}]}
"""


def rules(device: Device) -> list[str]:
    """Of the agent that runs, once it has decided by them."""
    until_sync(lambda: device.get("/api/v1/decisions?limit=1"), BOOT_S, "a decision")
    return list(device.get("/api/v1/status")["rules"])


def told(device: Device) -> tuple[str, str]:
    """The newest of what it has for its hub of what it was given."""
    body = next(one["body"] for one in device.get("/api/v1/journal/event?limit=1000") if one["kind"] == "provisioned")
    return body["outcome"], body["reason"]


def test_image_takes_another_configuration_at_a_later_start_and_goes_back_from_one_with_which_its_agent_does_not_start(built: Built, tmp_path: Path) -> None:
    device = Device(built, tmp_path)
    device.wiring = replace(device.wiring, credentials={})  # all it gets is in its boot partition
    put(device, edge_yaml=CONFIG.replace("NAME", "first"), api_token=device.token)
    with device.on() as machine:
        machine.wait_for("configuration taken over", BOOT_S)
        assert rules(device) == ["first"] and told(device) == ("taken", "")
        newest = device.get("/api/v1/decisions?limit=1")[0]["seq"]
    put(device, edge_yaml=CONFIG.replace("NAME", "second"))
    with device.on() as machine:
        machine.wait_for("configuration taken over", BOOT_S)
        assert rules(device) == ["second"] and device.get("/api/v1/decisions?limit=1")[0]["seq"] >= newest
        machine.wait_for("the agent runs with its new configuration", BOOT_S)
    put(device, edge_yaml=CONFIG.replace("NAME", "third") + "data_dir: /srv/edge\n")  # of the root, to which nothing can be written
    with device.on() as machine:
        machine.wait_for("going back to the one before", BOOT_S)
        machine.wait_for("the one with which the agent did not start", BOOT_S)
        assert rules(device) == ["second"] and told(device) == ("refused", "it is the one with which the agent did not start")
    put(device, edge_yaml="edge_id: [")
    with device.on() as machine:
        machine.wait_for("cannot be used .see above.; nothing was taken over", BOOT_S)
        assert rules(device) == ["second"] and told(device)[0] == "refused" and "edge.yaml" in told(device)[1]
    shutil.rmtree(device.state)
