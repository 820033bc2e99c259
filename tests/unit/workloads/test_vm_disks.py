"""Disks of virtual machines: headers that nobody vouches for, the empty disk, the file system for cloud-init, the sample's loader. What other programs think of them counts."""

import json
import os
import shutil
import struct
import subprocess
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.workloads.drivers import vm_image, vm_qcow2, vm_seed
from edge_runtime.workloads.drivers.face import Refused
from tools.novactl import vm_sample

QEMU_IMG, MTYPE = shutil.which("qemu-img"), shutil.which("mtype")

needs_qemu_img = pytest.mark.skipif(QEMU_IMG is None, reason="no qemu-img (apt install qemu-utils)")


def disk(folder: Path, size: int = 1 << 20, name: str = "d.qcow2") -> Path:
    """An empty disk of ours."""
    path = folder / name
    head, length = vm_qcow2.empty(size)
    path.write_bytes(head)
    os.truncate(path, length)
    return path


def info(path: Path) -> dict[str, object]:
    """What qemu-img says of a disk."""
    assert QEMU_IMG is not None
    done = subprocess.run([QEMU_IMG, "info", "--output=json", "-f", "qcow2", str(path)], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr
    told: dict[str, object] = json.loads(done.stdout)
    return told


@needs_qemu_img
@pytest.mark.parametrize("size", [512, 1 << 20, (1 << 29) + 512, 1 << 40])
def test_our_empty_disk_is_one_for_qemu_too(tmp_path: Path, size: int) -> None:
    path = disk(tmp_path, size)
    assert QEMU_IMG is not None
    checked = subprocess.run([QEMU_IMG, "check", "-f", "qcow2", str(path)], capture_output=True, text=True, timeout=60)
    assert checked.returncode == 0 and "No errors" in checked.stdout, checked
    assert info(path)["virtual-size"] == size and "backing-filename" not in info(path)
    assert vm_qcow2.check(path.read_bytes()[:vm_qcow2.LOOK], path.stat().st_size) == vm_qcow2.Header(3, size)


@needs_qemu_img
@pytest.mark.parametrize("options", [[], ["-o", "compat=0.10"], ["-o", "cluster_size=512"], ["-o", "extended_l2=on"], ["-o", "compression_type=zstd"], ["-o", "preallocation=metadata"]])
def test_qemus_own_disks_are_taken(tmp_path: Path, options: list[str]) -> None:
    path = tmp_path / "d.qcow2"
    assert QEMU_IMG is not None
    done = subprocess.run([QEMU_IMG, "create", "-q", "-f", "qcow2", *options, str(path), "3M"], capture_output=True, text=True, timeout=60)
    if done.returncode:
        pytest.skip(f"this qemu-img cannot: {done.stderr.strip()}")
    assert vm_image.disk_bytes(path) == 3 << 20


@needs_qemu_img
@pytest.mark.parametrize(("options", "why"), [
    (["-b", "base.raw", "-F", "raw"], "backing file"),
    (["-b", "/etc/passwd", "-F", "raw", "-u"], "backing file"),
    (["-o", "data_file=data.raw", "-o", "data_file_raw=on"], "file for its data"),
    # by AES: for LUKS qemu-img times its key derivation, and fails on a machine whose clock of processor time is too coarse for it
    (["--object", "secret,id=s,data=abc", "-o", "encrypt.format=aes,encrypt.key-secret=s"], "encrypted"),
])
def test_a_disk_that_leads_elsewhere_is_refused(tmp_path: Path, options: list[str], why: str) -> None:
    (tmp_path / "base.raw").write_bytes(bytes(1 << 20))
    assert QEMU_IMG is not None
    subprocess.run([QEMU_IMG, "create", "-q", "-f", "qcow2", *options, "d.qcow2", "1M"], cwd=tmp_path, check=True, capture_output=True, timeout=60)
    with pytest.raises(Refused, match=why):
        vm_image.disk_bytes(tmp_path / "d.qcow2")


def test_each_lie_of_a_header_is_named(tmp_path: Path) -> None:
    good = bytearray(disk(tmp_path).read_bytes())
    length = len(good)

    def bad(at: int, form: str, value: int) -> str:
        data = bytearray(good)
        struct.pack_into(form, data, at, value)
        with pytest.raises(vm_qcow2.BadDisk) as told:
            vm_qcow2.check(bytes(data[:vm_qcow2.LOOK]), length)
        return str(told.value)

    assert "version 4" in bad(4, ">I", 4) and "backing" in bad(8, ">Q", 4096) and "backing" in bad(16, ">I", 9) and "2^30" in bad(20, ">I", 30)
    assert "cannot be" in bad(24, ">Q", 1 << 62) and "cannot be" in bad(24, ">Q", 0) and "encrypted" in bad(32, ">I", 2) and "beyond its end" in bad(40, ">Q", 1 << 40)
    assert "file for its data" in bad(72, ">Q", 4) and "not closed or damaged" in bad(72, ">Q", 1) and "not closed or damaged" in bad(72, ">Q", 2) and "not known here" in bad(72, ">Q", 1 << 9)
    assert "header has" in bad(100, ">I", 3) and "file for its data" in bad(104, ">I", vm_qcow2.DATA_FILE_NAME) and "no end" in bad(104, ">Q", 0x1234_5678_7FFF_FFFF)


@settings(max_examples=60)  # each that is taken starts a program
@given(st.data())
def test_no_header_that_is_taken_names_a_file(tmp_path_factory: pytest.TempPathFactory, data: st.DataObject) -> None:
    """Whatever is changed in a good header: it is refused, or QEMU finds no other file in it."""
    head, length = vm_qcow2.empty(1 << 20)
    changed = bytearray(head)
    for _ in range(data.draw(st.integers(1, 4))):
        at = data.draw(st.integers(0, 143))
        changed[at:at + 1] = data.draw(st.binary(min_size=1, max_size=1))
    try:
        vm_qcow2.check(bytes(changed[:vm_qcow2.LOOK]), length)
    except vm_qcow2.BadDisk:
        return
    if QEMU_IMG is not None:
        path = tmp_path_factory.mktemp("disk") / "d.qcow2"
        path.write_bytes(changed)
        os.truncate(path, length)
        done = subprocess.run([QEMU_IMG, "info", "--output=json", "-f", "qcow2", str(path)], capture_output=True, text=True, timeout=60)
        if done.returncode == 0:  # what QEMU refuses harms nobody
            told = json.loads(done.stdout)
            assert "backing-filename" not in told and "data-file" not in json.dumps(told), told


@given(st.binary(max_size=300), st.integers(0, 1 << 50))
def test_any_bytes_are_judged(data: bytes, length: int) -> None:
    for head in (data, vm_qcow2.MAGIC + data, vm_qcow2.MAGIC + b"\0\0\0\3" + data):
        try:
            assert vm_qcow2.check(head, length).bytes > 0
        except vm_qcow2.BadDisk as error:
            assert str(error)


def image(folder: Path, files: dict[str, bytes]) -> Path:
    """A layer's folder."""
    for name, content in files.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        (folder / name).chmod(0o644)
    return folder


def test_where_an_images_disk_is(tmp_path: Path) -> None:
    lower, upper = image(tmp_path / "l", {"disk/a.img": bytes(1024), "boot/vmlinuz": b"k", "boot/cmdline": b"quiet\n"}), image(tmp_path / "u", {"disk/a.img": bytes(512), "disk/notes.txt": b"n"})
    found = vm_image.find([upper, lower])
    assert (found.disk, found.format, found.bytes, found.kernel, found.initrd, found.arguments) == (upper / "disk/a.img", "raw", 512, lower / "boot/vmlinuz", None, "quiet")
    for files, why in (
        ({"disk/a.img": bytes(100)}, "no whole number of sectors"), ({"disk/a.img": b""}, "no whole number of sectors"), ({"disk/a.raw": vm_qcow2.MAGIC.ljust(512, b"\0")}, "begins as a qcow2"),
        ({"disk/a.qcow2": bytes(512)}, "does not begin as"), ({"disk/a.raw": bytes(512), "disk/b.raw": bytes(512)}, "has 2 disks"), ({"etc/passwd": b"x"}, "has no disk"),
    ):
        shutil.rmtree(tmp_path / "x", ignore_errors=True)
        with pytest.raises(Refused, match=why):
            vm_image.find([image(tmp_path / "x", files)])
    shutil.rmtree(tmp_path / "x")
    (tmp_path / "x/disk").mkdir(parents=True)
    (tmp_path / "x/disk/a.raw").symlink_to(lower / "disk/a.img")
    with pytest.raises(Refused, match="has no disk"):
        vm_image.find([tmp_path / "x"])
    shutil.rmtree(tmp_path / "x/disk")
    (tmp_path / "x/disk").symlink_to(lower / "disk")
    with pytest.raises(Refused, match="has no disk"):
        vm_image.find([tmp_path / "x"])
    os.chmod(lower / "boot/vmlinuz", 0o600)
    with pytest.raises(Refused, match="may be read by its owner only"):
        vm_image.find([upper, lower])


@pytest.mark.skipif(MTYPE is None, reason="no mtools (apt install mtools)")
@settings(max_examples=20)  # each starts some
@given(st.dictionaries(st.sampled_from([*vm_seed.NAMES, "vendor-data", "a", "exactly-26-characters-long"]), st.binary(max_size=3000), max_size=4))
def test_other_tools_read_what_a_seed_has(tmp_path_factory: pytest.TempPathFactory, files: dict[str, bytes]) -> None:
    path = tmp_path_factory.mktemp("seed") / "seed.img"
    path.write_bytes(vm_seed.seed(files))
    assert MTYPE is not None and path.stat().st_size == 1 << 20 and vm_seed.seed(files) == path.read_bytes()
    for name, content in files.items():
        assert subprocess.run([MTYPE, "-i", str(path), f"::{name}"], capture_output=True, timeout=60, check=True).stdout == content


def test_a_seed_is_bounded_and_says_who_is_meant() -> None:
    with pytest.raises(ValueError, match="do not fit"):
        vm_seed.seed({"user-data": bytes(vm_seed.ROOM + 1)})
    assert len(vm_seed.seed({"user-data": bytes(vm_seed.ROOM)})) == 1 << 20
    found = vm_seed.files("web.3", "web", {"user_data": "#!/bin/sh\n", "network_config": "version: 2\n"})
    assert json.loads(found["meta-data"]) == {"instance-id": "web.3", "local-hostname": "web"} and found["user-data"] == b"#!/bin/sh\n" and found["network-config"] == b"version: 2\n"
    assert vm_seed.files("a.1", "a", {})["user-data"].startswith(b"#cloud-config")


@pytest.mark.skipif(shutil.which("as") is None or shutil.which("ld") is None, reason="no assembler (apt install binutils)")
def test_the_samples_loader_is_what_its_text_says(tmp_path: Path) -> None:
    (tmp_path / "loader.s").write_text(vm_sample.LOADER_TEXT)
    subprocess.run(["as", "--32", "-o", "loader.o", "loader.s"], cwd=tmp_path, check=True, timeout=60)
    subprocess.run(["ld", "-m", "elf_i386", "-Ttext", "0x7c00", "--oformat", "binary", "-o", "loader", "loader.o"], cwd=tmp_path, check=True, timeout=60)
    assert (tmp_path / "loader").read_bytes()[:vm_sample.NUMBERS_AT].rstrip(b"\0") == vm_sample.LOADER


def test_the_sample_is_the_same_each_time() -> None:
    kernel = bytearray(40 * 512)
    kernel[0x1F1] = 3
    made = vm_sample.assemble(bytes(kernel), b"initramfs")
    assert made == vm_sample.assemble(bytes(kernel), b"initramfs") and len(made) % 512 == 0 and made[510:512] == b"\x55\xaa"
    assert struct.unpack_from("<IIIIIH", made, vm_sample.NUMBERS_AT) == (8, 36, 48, 9, vm_sample.INITRAMFS_ADDRESS, 4) and made[48 * 512:].startswith(b"initramfs")
