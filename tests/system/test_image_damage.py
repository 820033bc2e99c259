"""An image that was kept and whose slot is damaged later: left for the other slot, which says why; without another one the device stays off with the reason."""

import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.updates import slots
from edge_runtime.updates.fat import Fat
from edge_runtime.updates.verity import BLOCK, hash_tree
from firmware_images import tools
from firmware_images.build import Built, output
from firmware_images.layout import ESP_NAME
from firmware_images.machine import Machine, Wiring, command
from firmware_images.scripts import LASTING_STARTS
from tests.integration.waiting import until_sync
from tests.system.image_device import ARCH, BOOT_S, HOME, PROFILE, Device, image, told_to

pytestmark = [pytest.mark.system, pytest.mark.slow, pytest.mark.timeout(10800)]

STARTS_S = 3600
"""Longest wait for what takes several starts, emulated beside others."""


@pytest.fixture(scope="module")
def built() -> Built:
    """The image."""
    return image()


def into_second_slot(disk: Path, built: Built, folder: Path, scratch: Path) -> dict[str, Any]:
    """Put the image in `folder` into slot b as if it had been kept long ago; its manifest."""
    told: dict[str, Any] = json.loads((folder / "manifest.json").read_text())
    data = (folder / "root").read_bytes()
    with disk.open("r+b") as file:
        file.seek(built.manifest["partitions"]["novacron-b"]["start"])
        file.write(data + hash_tree(data, bytes.fromhex(told["salt"])).tree)
    options = f"{told['command_line']} {slots.slot_words('novacron-b', told['blocks'], told['root_hash'], told['salt'])}"
    (scratch / "entry").write_text(slots.entry_text("NovaCron device", told["version"], told["sequence"], told["root_hash"], options))
    where, inside = f"{disk}@@{built.manifest['partitions'][ESP_NAME]['start']}", slots.folder(told["root_hash"])
    tools.run(["mmd", "-i", where, f"::/{inside}"], field="test", remedy="")
    for source, target in ((folder / "linux", f"{inside}/linux"), (folder / "initrd", f"{inside}/initrd"), (scratch / "entry", f"{slots.ENTRIES}/{slots.Entry(told['sequence'], 'novacron-b').name}")):
        tools.run(["mcopy", "-i", where, str(source), f"::/{target}"], field="test", remedy="")
    return told


def damage(disk: Path, built: Built, slot: str) -> None:
    """A byte in every quarter MiB: one of them is read early in a start."""
    start = built.manifest["partitions"][slot]["start"]
    with disk.open("r+b") as file:
        for block in range(64, built.manifest["blocks"], 64):
            file.seek(start + block * BLOCK + 100)
            file.write(b"damage")


def count(disk: Path, built: Built, slot: str, root_hash: str, starts: int) -> None:
    """The slot's count of starts that have not lasted."""
    place = built.manifest["partitions"][slot]
    with disk.open("r+b") as file:
        file.seek(place["start"] + place["size"] - BLOCK)
        file.write(f"{slots.STARTS_WORD} {root_hash} {starts}\n".encode().ljust(BLOCK, b"\0"))


def counted(disk: Path, built: Built, slot: str) -> bytes:
    """That count as it stands on the disk."""
    place = built.manifest["partitions"][slot]
    with disk.open("rb") as file:
        file.seek(place["start"] + place["size"] - BLOCK)
        return file.read(BLOCK).rstrip(b"\0")


def direct(device: Device) -> Machine:
    """The image's kernel and initrd without firmware and boot loader, slot a; a restart ends the machine."""
    told = device.built.manifest
    line = f"{told['command_line']} {slots.slot_words('novacron-a', told['blocks'], told['root_hash'], told['salt'])}"
    wiring = Wiring(PROFILE.memory_mib, direct=(device.built.image.with_name("linux"), device.built.image.with_name("initrd"), line))
    return Machine([*command(ARCH, device.disk, device.flash, wiring), "-no-reboot"], told_to(device.state / "console.log"))


def names(device: Device) -> set[str]:
    """The boot loader's entries on the device's disk."""
    start = device.built.manifest["partitions"][ESP_NAME]["start"]
    with device.disk.open("rb") as file:
        def read(at: int, size: int) -> bytes:
            file.seek(start + at)
            return file.read(size)

        return {found.name for found in Fat(read).names(slots.ENTRIES) if slots.parse_name(found.name)}


def test_image_alone_that_is_damaged_stays_off_with_the_reason(built: Built, tmp_path: Path) -> None:
    device = Device(built, tmp_path)
    damage(device.disk, built, "novacron-a")
    count(device.disk, built, "novacron-a", built.manifest["root_hash"], LASTING_STARTS)
    with direct(device) as machine:
        machine.wait_for("damaged: it was read twice.*there is no other slot.*stays off", BOOT_S)
        assert not machine.ended


def test_image_that_is_whole_starts_also_after_starts_that_did_not_last(built: Built, tmp_path: Path) -> None:
    device = Device(built, tmp_path)
    count(device.disk, built, "novacron-a", built.manifest["root_hash"], LASTING_STARTS)
    with direct(device) as machine:
        machine.wait_for(f"{LASTING_STARTS} starts have not lasted: reading the whole slot", BOOT_S)
        machine.wait_for("Reached target sysinit.target", BOOT_S)
    assert counted(device.disk, built, "novacron-a") == f"{slots.STARTS_WORD} {built.manifest['root_hash']} 1\n".encode()


def test_image_whose_tree_is_another_is_left_at_once(built: Built, tmp_path: Path) -> None:
    image("next", 1)
    device = Device(built, tmp_path)
    told = into_second_slot(device.disk, built, output(HOME, ARCH, PROFILE, "next"), tmp_path)
    with device.disk.open("r+b") as file:
        file.seek(built.manifest["partitions"]["novacron-a"]["start"] + built.manifest["blocks"] * BLOCK)
        file.write(b"x" * BLOCK)
    kept = slots.Entry(told["sequence"], "novacron-b").name
    entry = slots.Entry(built.manifest["sequence"], "novacron-a", slots.FACTORY_STARTS).name
    assert names(device) == {entry, kept}
    plain = slots.Entry(built.manifest["sequence"], "novacron-a").name
    tools.run(["mren", "-i", f"{device.disk}@@{built.manifest['partitions'][ESP_NAME]['start']}", f"::/{slots.ENTRIES}/{entry}", f"::/{slots.ENTRIES}/{plain}"], field="test", remedy="")
    with direct(device) as machine:
        machine.wait_for("no disk's slot novacron-a has the root hash", BOOT_S)
        machine.wait_for("the other slot is taken", BOOT_S)
    assert names(device) == {kept}


def test_image_that_was_kept_and_is_damaged_is_left_for_the_other_which_says_why(built: Built, tmp_path: Path) -> None:
    image("next", 1)
    device = Device(built, tmp_path)
    told = into_second_slot(device.disk, built, output(HOME, ARCH, PROFILE, "next"), tmp_path)
    damage(device.disk, built, "novacron-b")
    count(device.disk, built, "novacron-b", told["root_hash"], LASTING_STARTS - 1)  # one more is enough
    with device.on() as machine:
        machine.wait_for("no other slot|the other slot is taken", STARTS_S)
        assert any("Kernel panic" in text or "has corrupted" in text for _, text in machine.lines), machine.tail(60)
        machine.wait_for("=== end of report", STARTS_S)
        assert any("novacron-a" in text for text in machine.between("slot:", "root:")), machine.tail()

        def known() -> dict[str, Any] | None:
            try:
                return next((one for one in device.ask("/api/v1/updates") if one["state"] == "failed"), None)
            except (OSError, ValueError):
                return None

        found = until_sync(known, STARTS_S, "the reason is told")
    assert found["id"] == f"damaged-{told['root_hash'][:16]}" and "novacron-b is damaged: it was read twice" in found["reason"], found
