"""What the initrd does with a slot that is damaged: the function itself, run by the shell on plain folders in place of boot partitions."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from edge_runtime.updates import slots
from firmware_images.layout import ESP_NAME
from firmware_images.scripts import INIT

ROOT_A, ROOT_B = "a" * 64, "b" * 64

WORLD = """
say() { echo "say: $*"; }
again() { echo "again: $*"; exit; }
stay_off() { echo "off: $*"; exit; }
modprobe() { :; }
mount() { ln -s "@/${3##*/}" "@/esp"; }
umount() { rm "$1"; }
"""
"""Stands for the machine: a disk's partition is the folder of its name, mounted by a link."""

FUNCTION = re.search(r"^damaged\(\) \{\n.*?^\}\n", INIT, re.MULTILINE | re.DOTALL)


def disk(folder: Path, name: str, *entries: slots.Entry) -> None:
    """A disk with a boot partition `name` that has these entries; an entry's slot says which root."""
    (folder / "sys" / name).mkdir(parents=True)
    (folder / "sys" / name / "uevent").write_text(f"DEVNAME={name}\nPARTNAME={ESP_NAME}\n")
    (folder / name / slots.ENTRIES).mkdir(parents=True)
    (folder / name / slots.DAMAGED).parent.mkdir()
    for entry in entries:
        root = ROOT_A if entry.slot == "novacron-a" else ROOT_B
        (folder / name / slots.ENTRIES / entry.name).write_text(slots.entry_text("x", "1", entry.sequence, root, slots.slot_words(entry.slot, 8, root, "00")))


def left(folder: Path, change: str = "") -> str:
    """What becomes of it where slot b is damaged; `change` takes a line of the function away."""
    assert FUNCTION is not None
    text = FUNCTION[0]
    if change:
        assert change in text
        text = "\n".join(line for line in text.splitlines() if change not in line)
    script = WORLD.replace("@", str(folder)) + text.replace("/esp", str(folder / "esp")).replace("/sys/class/block", str(folder / "sys")) + f'\nname=novacron-b root={ROOT_B}\ndamaged "the slot is damaged"\n'
    shell = ["busybox", "sh"] if shutil.which("busybox") else ["sh"]
    done = subprocess.run([*shell, "-c", script], capture_output=True, text=True, timeout=60)
    assert not done.stderr, done.stderr
    return done.stdout.splitlines()[-1]


def entries(folder: Path, name: str = "vda1") -> set[str]:
    return {path.name for path in (folder / name / slots.ENTRIES).iterdir()}


A, B = slots.Entry(1, "novacron-a"), slots.Entry(2, "novacron-b")


def test_a_kept_image_is_left_for_the_other_slot_with_a_note(tmp_path: Path) -> None:
    disk(tmp_path, "sda1", slots.Entry(5, "novacron-a"))  # another disk of ours, which is not what we were started from
    disk(tmp_path, "vda1", A, B)
    assert left(tmp_path) == "again: the other slot is taken"
    assert entries(tmp_path) == {A.name} and entries(tmp_path, "sda1") == {slots.Entry(5, "novacron-a").name}
    assert (tmp_path / "vda1" / slots.DAMAGED).read_text() == f"novacron-b {ROOT_B} the slot is damaged\n"
    assert not (tmp_path / "sda1" / slots.DAMAGED).exists()


@pytest.mark.parametrize("there", [(B,), (slots.Entry(2, "novacron-b", 0, 1),), (B, slots.Entry(1, "novacron-a", 0, 3))], ids=["alone", "as it was made", "the other one has no start left"])
def test_where_no_other_slot_can_start_the_device_stays_off(tmp_path: Path, there: tuple[slots.Entry, ...]) -> None:
    disk(tmp_path, "vda1", *there)
    assert left(tmp_path) == "off: the slot is damaged, and there is no other slot that could start"
    assert entries(tmp_path) == {entry.name for entry in there} and not (tmp_path / "vda1" / slots.DAMAGED).exists()


def test_where_there_is_no_boot_partition_it_stays_off(tmp_path: Path) -> None:
    (tmp_path / "sys" / "vda3").mkdir(parents=True)
    (tmp_path / "sys" / "vda3" / "uevent").write_text("DEVNAME=vda3\nPARTNAME=novacron-b\n")
    assert left(tmp_path).startswith("off: ")


def test_an_image_on_trial_is_left_to_the_boot_loader(tmp_path: Path) -> None:
    trial = slots.Entry(2, "novacron-b", 1, 2)
    disk(tmp_path, "vda1", A, trial)
    assert left(tmp_path) == "again: the slot is damaged"
    assert entries(tmp_path) == {A.name, trial.name}


def test_control_a_function_that_leaves_a_trial_too_is_noticed(tmp_path: Path) -> None:
    disk(tmp_path, "vda1", A, slots.Entry(2, "novacron-b", 1, 2))
    assert left(tmp_path, 'case "$mine"') == "again: the other slot is taken"
