"""What the bench of an update's power cut rests on: the reader of FAT against mtools, the log of a machine's writes, the verdict on a disk, each with what it must not believe."""

import os
import random
import struct
import subprocess
import tempfile
import uuid
from pathlib import Path

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from edge_runtime.updates import slots
from edge_runtime.updates.fat import Fat
from edge_runtime.updates.verity import BLOCK
from firmware_images import build, recipes, tools
from tests.unit.updates_world import SALT, Image, image
from tools.powercut.machine_log import MAGIC, Replay, entries, write_sparse
from tools.powercut.slot_verdict import Known, Verdict

ESP_BYTES = 34 << 20
"""The least that is a FAT32 with clusters of one sector."""

IMAGES = image(1, blocks=8), image(2, blocks=8)
SLOT_BYTES = 1 << 20
PARTITIONS = {"novacron-esp": {"start": 0, "size": ESP_BYTES}, "novacron-a": {"start": ESP_BYTES, "size": SLOT_BYTES}, "novacron-b": {"start": ESP_BYTES + SLOT_BYTES, "size": SLOT_BYTES}}


def needs(*programs: str) -> None:
    if absent := tools.missing(programs):
        pytest.skip(f"{', '.join(absent)} not installed (Debian packages {', '.join(tools.PACKAGES.get(name, name) for name in absent)})")


def fat(path: Path, files: dict[str, bytes]) -> None:
    """A boot partition with these files, made by other people's programs."""
    needs("mkfs.vfat", "mmd", "mcopy")
    with path.open("wb") as file:
        file.truncate(ESP_BYTES)
    env = {**os.environ, "MTOOLS_SKIP_CHECK": "1"}
    subprocess.run([tools.find("mkfs.vfat") or "", "-F", "32", "-s", "1", str(path)], check=True, capture_output=True)
    made: set[str] = set()
    for name, data in files.items():
        parts = name.split("/")
        for depth in range(1, len(parts)):
            folder = "/".join(parts[:depth])
            if folder not in made:
                subprocess.run(["mmd", "-i", str(path), f"::/{folder}"], check=True, capture_output=True, env=env)
                made.add(folder)
        with tempfile.NamedTemporaryFile() as source:
            source.write(data)
            source.flush()
            subprocess.run(["mcopy", "-i", str(path), source.name, f"::/{name}"], check=True, capture_output=True, env=env)


FILES = {
    "loader/entries/novacron-0000000001-a.conf": b"title x\n", "loader/entries/novacron-0000000002-b+3.conf": b"y" * 5000, "EFI/BOOT/BOOTX64.EFI": os.urandom(70_000), "empty": b"", "short.txt": b"1",
    "a name that is quite a bit longer than thirteen letters.text": os.urandom(513),
}


def test_what_mtools_wrote_is_read(tmp_path: Path) -> None:
    fat(tmp_path / "esp", FILES)
    raw = (tmp_path / "esp").read_bytes()
    here = Fat(lambda at, size: raw[at : at + size])
    for name, data in FILES.items():
        assert here.file(name) == data, name
    assert {found.name for found in here.names("loader/entries")} == {"novacron-0000000001-a.conf", "novacron-0000000002-b+3.conf"}
    for name in ("nothing", "loader", "short.txt/x", "loader/nothing"):
        with pytest.raises(FileNotFoundError):
            here.file(name)


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> bytes:
    path = tmp_path_factory.mktemp("fat") / "esp"
    fat(path, FILES)
    return path.read_bytes()


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture, HealthCheck.too_slow], max_examples=100)
@given(st.lists(st.tuples(st.integers(0, 700_000), st.binary(min_size=1, max_size=8)), max_size=6))
def test_a_damaged_file_system_is_read_or_refused(whole: bytes, damage: list[tuple[int, bytes]]) -> None:
    raw = bytearray(whole)
    for at, data in damage:
        raw[at : at + len(data)] = data
    for name in FILES:
        try:
            Fat(lambda at, size: bytes(raw[at : at + size])).file(name)
        except (ValueError, FileNotFoundError):
            pass


def logged(entries_: list[tuple[int, bytes, int]]) -> bytes:
    """A log with (sector, data, flags), as QEMU writes it."""
    out = bytearray(struct.pack("<QQQI", MAGIC, 1, len(entries_), 512).ljust(512, b"\0"))
    for sector, data, flags in entries_:
        out += struct.pack("<QQQQ", sector, len(data) // 512, flags, 0).ljust(512, b"\0") + data
    return bytes(out)


def test_a_log_is_played_and_what_was_not_flushed_may_be_lost(tmp_path: Path) -> None:
    (tmp_path / "disk").write_bytes(bytes(8 * 512))
    raw = logged([(1, b"a" * 512, 0), (0, b"", 1), (2, b"b" * 1024, 0), (4, b"c" * 512, 0), (5, b"d" * 512, 2)])
    (tmp_path / "log").write_bytes(raw + b"\1" * 600)  # killed while it wrote the next
    assert len(list(entries(raw[:-1]))) == 4
    replay = Replay(tmp_path / "disk", tmp_path / "log")
    for _ in range(4):
        replay.step()
    assert replay.content[512:2560] == b"a" * 512 + b"b" * 1024 + b"c" * 512
    draw = random.Random(1)
    seen = set()
    for _ in range(50):
        with replay.lossy(draw) as disk:
            assert disk[512:1024] == b"a" * 512  # this was flushed
            seen.add(disk[1024:2560])
    assert len(seen) > 3 and bytes(1536) in seen
    assert replay.durable[1024:2560] == bytes(1536)  # nothing of it stays
    assert replay.unsure(1024, 1) and replay.unsure(0, 4096) and not replay.unsure(0, 1024) and not replay.unsure(2560, 512)
    replay.step()
    assert replay.durable[512:3072] == replay.content[512:3072]
    write_sparse(replay.content, tmp_path / "out", [(512, 1024)], 4096)
    assert (tmp_path / "out").read_bytes() == (bytes(512) + b"a" * 512 + b"b" * 512).ljust(4096, b"\0")
    with pytest.raises(ValueError, match="no log"):
        list(entries(b"\0" * 600))


def known(made: Image) -> Known:
    import hashlib

    return Known(made.sequence, made.root_hash, SALT.hex(), 8, hashlib.sha256(made.content["linux"]).hexdigest(), hashlib.sha256(made.content["initrd"]).hexdigest())


def disk_with(folder: Path, entry: slots.Entry, damage: str = "") -> bytearray:
    """A disk with the first image in slot a, the second in b with `entry`, one part of that damaged."""
    files: dict[str, bytes] = {}
    both = {"novacron-a": IMAGES[0], "novacron-b": IMAGES[1]}
    for slot, made, name in (("novacron-a", IMAGES[0], slots.Entry(1, "novacron-a").name), ("novacron-b", IMAGES[1], entry.name)):
        options = "quiet " + slots.slot_words(slot, 8, made.root_hash, SALT.hex())
        files[f"{slots.ENTRIES}/{name}"] = slots.entry_text("x", "1", made.sequence, made.root_hash, options).encode()
        for part in ("linux", "initrd"):
            spoilt = slot == "novacron-b" and damage == part
            files[f"{slots.folder(made.root_hash)}/{part}"] = b"spoilt" if spoilt else made.content[part]
    if damage == "no kernel":
        del files[f"{slots.folder(IMAGES[1].root_hash)}/linux"]
    fat(folder / "esp", files)
    disk = bytearray((folder / "esp").read_bytes() + bytes(2 * SLOT_BYTES))
    for slot, made in both.items():
        data = made.content["root"] + made.tree.tree
        disk[PARTITIONS[slot]["start"] : PARTITIONS[slot]["start"] + len(data)] = data
    if damage == "root":
        disk[PARTITIONS["novacron-b"]["start"] + 3 * BLOCK] ^= 1
    return disk


@pytest.mark.parametrize(("entry", "damage", "told"), [
    (slots.Entry(2, "novacron-b", 3), "", 2), (slots.Entry(2, "novacron-b"), "", 2), (slots.Entry(2, "novacron-b", 0, 3), "", 1), (slots.Entry(2, "novacron-b", 0, 3), "root", 1), (slots.Entry(2, "novacron-b", 3), "no kernel", 1),
    (slots.Entry(2, "novacron-b", 3), "root", "root is not whole"), (slots.Entry(2, "novacron-b", 3), "linux", "linux is not whole"), (slots.Entry(2, "novacron-b", 3), "initrd", "initrd is not whole"),
])
def test_a_disk_is_judged_by_its_bytes(tmp_path: Path, entry: slots.Entry, damage: str, told: int | str) -> None:
    verdict = Verdict(PARTITIONS, [known(made) for made in IMAGES])
    disk = disk_with(tmp_path, entry, damage)
    if isinstance(told, int):
        assert verdict.sequence(disk, dict.fromkeys(slots.SLOTS, 0)) == told
        return
    with pytest.raises(ValueError, match=told):
        verdict.sequence(disk, dict.fromkeys(slots.SLOTS, 0))


def test_the_folders_of_a_new_boot_partition_have_room_and_are_the_same_each_time(tmp_path: Path) -> None:
    """A folder that grows is what a power cut breaks; room for names is there when their chain of clusters is long and what stands in it is short."""
    needs("mkfs.vfat", "mmd", "mcopy", "mdel")
    made = []
    for number in range(2):
        top = tmp_path / str(number)
        top.mkdir()
        for name in ("loader.efi", "linux", "initrd"):
            (top / name).write_bytes(name.encode() * 100)
        build._boot_partition(top, recipes.architecture("amd64"), "novacron-0123456789abcdef", slots.Entry(0, "novacron-a").name, "title x\n", 1_700_000_000, uuid.UUID(int=7))
        made.append((top / "esp.vfat").read_bytes())
    assert made[0] == made[1]
    here = Fat(lambda at, size: made[0][at : at + size])
    assert [found.name for found in here.names(slots.ENTRIES)] == ["novacron-0000000000-a.conf"]
    assert {found.name.lower() for found in here.names("/")} >= {"efi", "loader", "novacron", "novacron-0123456789abcdef"}
    for folder in (slots.ENTRIES, "/"):
        assert here.room(folder) >= 100, folder
    # Control: a folder that nobody made room in.
    assert here.room("EFI") < 16


def test_cleaning_a_folder_cut_after_any_write_keeps_its_names(tmp_path: Path) -> None:
    files = {f"loader/entries/a-name-that-takes-four-entries-of-the-folder-{number:02}": b"x" * number for number in range(30)}
    fat(tmp_path / "esp", files)
    env = {**os.environ, "MTOOLS_SKIP_CHECK": "1"}
    gone = [name for number, name in enumerate(files) if number > 9 or number % 3 == 0]
    subprocess.run(["mdel", "-i", str(tmp_path / "esp"), *(f"::/{name}" for name in gone)], check=True, capture_output=True, env=env)
    raw = bytearray((tmp_path / "esp").read_bytes())
    here = Fat(lambda at, size: bytes(raw[at : at + size]))
    left = {name.split("/")[-1] for name in files if name not in gone}
    before = here.room(slots.ENTRIES)
    writes = here.cleaned(slots.ENTRIES)
    assert len(writes) > 3
    for at, data in writes:
        raw[at : at + len(data)] = data
        assert {found.name for found in Fat(lambda at, size: bytes(raw[at : at + size])).names(slots.ENTRIES)} == left
    assert here.room(slots.ENTRIES) >= before + 4 * 20 and not here.cleaned(slots.ENTRIES)
