"""The parts of a conversion that need no guest: the reader of ext4, held against what mke2fs writes and against bytes that are damaged; what stands against a conversion; what goes into a guest's disk."""

import io
import os
import random
import shutil
import stat
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.workloads.conversion import checks, guest, state
from edge_runtime.workloads.conversion.ext4 import Ext4
from edge_runtime.workloads.drivers.face import Refused
from edge_runtime.workloads.drivers.programs import searched
from tests.unit.workloads.image_side import AS_ROOT

MKE2FS = searched("mke2fs")
needs_mke2fs = pytest.mark.skipif(MKE2FS is None, reason="no mke2fs (apt install e2fsprogs)")


def made(folder: Path, tree: Path, size_mb: int = 16, *more: str) -> Path:
    """A file system of a folder's content."""
    path = folder / "disk"
    subprocess.run([str(MKE2FS), "-q", "-F", "-t", "ext4", "-b", "4096", "-O", "^has_journal", *more, "-d", str(tree), str(path), f"{size_mb}m"], check=True, capture_output=True)
    return path


def listed(path: Path, below: bytes = b"") -> dict[bytes, tuple[int, bytes]]:
    """Mode, and content or target, by name."""
    with Ext4(path) as system:
        found = {}
        for name, node in system.walk(below):
            content = b"".join(system.content(node)) if stat.S_ISREG(node.mode) else system.link(node) if stat.S_ISLNK(node.mode) else b""
            found[name] = (node.mode, content)
        return found


@needs_mke2fs
def test_what_mke2fs_wrote_is_read_as_it_was(tmp_path: Path) -> None:
    tree, draw = tmp_path / "tree", random.Random(1)
    for folder in range(3):
        (tree / f"folder {folder}").mkdir(parents=True)
        for number in range(120):  # more than one block of names
            (tree / f"folder {folder}" / f"a name that takes some room {number}").write_bytes(draw.randbytes(draw.choice((0, 1, 4095, 4096, 70_000))))
    with open(tree / "holes", "wb") as holes:
        for at in (0, 1 << 20, 3 << 20):
            holes.seek(at)
            holes.write(b"here")
        holes.truncate(4 << 20)
    (tree / "short").symlink_to("to")
    (tree / "long").symlink_to("x" * 200)
    os.mkfifo(tree / "fifo")
    found = listed(made(tmp_path, tree, 64))
    want = {os.fsencode(path.relative_to(tree)): path for path in tree.rglob("*")}
    assert set(found) - {b"", b"lost+found"} == set(want)
    for name, path in want.items():
        told = os.lstat(path)
        assert found[name][0] == told.st_mode, name
        assert found[name][1] == (os.readlink(path).encode() if path.is_symlink() else path.read_bytes() if stat.S_ISREG(told.st_mode) else b""), name


@needs_mke2fs
@pytest.mark.skipif(not AS_ROOT, reason="device nodes and trusted attributes need root")
def test_devices_owners_and_attributes(tmp_path: Path) -> None:
    (tmp_path / "tree/opaque").mkdir(parents=True)
    os.mknod(tmp_path / "tree/gone", stat.S_IFCHR, os.makedev(0, 0))
    os.mknod(tmp_path / "tree/device", stat.S_IFBLK | 0o600, os.makedev(259, 70_000))
    os.chown(tmp_path / "tree/opaque", 70_000, 80_000)
    try:
        os.setxattr(tmp_path / "tree/opaque", "trusted.overlay.opaque", b"y")
    except OSError:
        pytest.skip("no trusted attributes on this file system")
    with Ext4(made(tmp_path, tmp_path / "tree")) as system:
        folder, gone, device = (system.find(name) for name in (b"opaque", b"gone", b"device"))
        assert (folder.uid, folder.gid, system.attributes(folder)) == (70_000, 80_000, {"trusted.overlay.opaque": b"y"})
        assert stat.S_ISCHR(gone.mode) and gone.device == (0, 0) and device.device == (259, 70_000)


@needs_mke2fs
@pytest.mark.parametrize("name", [b"..", b"a/b", b"a\0b"])
def test_a_name_that_is_none_is_refused(tmp_path: Path, name: bytes) -> None:
    """As a guest could write it."""
    (tmp_path / "tree").mkdir()
    (tmp_path / "tree" / ("q" * len(name))).write_text("content")
    path = made(tmp_path, tmp_path / "tree", 16, "-O", "^metadata_csum,^dir_index")
    data = path.read_bytes()
    assert data.count(b"q" * len(name) + b"\0") >= 1
    at = data.index(bytes((len(name), 1)) + b"q" * len(name))
    path.write_bytes(data[:at + 2] + name + data[at + 2 + len(name):])
    if name == b"..":  # what stands for the folder above is passed over
        assert set(listed(path)) == {b"", b"lost+found"}
        return
    with pytest.raises(Refused, match="has the name"):
        listed(path)


@needs_mke2fs
def test_a_folder_within_itself_and_what_points_outside_are_refused(tmp_path: Path) -> None:
    (tmp_path / "tree/inner").mkdir(parents=True)
    path = made(tmp_path, tmp_path / "tree", 16, "-O", "^metadata_csum")
    with Ext4(path) as system:
        inner = dict(system.folder(system.node(2)))[b"inner"]
    data = path.read_bytes()
    entry = inner.to_bytes(4, "little")
    at = data.index(b"\x05\x02inner") - 6
    assert data[at:at + 4] == entry
    path.write_bytes(data[:at] + (2).to_bytes(4, "little") + data[at + 4:])
    with pytest.raises(Refused, match="within itself"):
        listed(path)
    path.write_bytes(data[:at] + (1 << 31).to_bytes(4, "little") + data[at + 4:])
    with pytest.raises(Refused, match="which there cannot be"):
        listed(path)


SMALL: dict[str, bytes] = {}


@needs_mke2fs
@given(draw=st.lists(st.tuples(st.integers(0, 120_000), st.integers(0, 255)), min_size=1, max_size=12), cut=st.integers(0, 1 << 20))
def test_damaged_bytes_are_read_or_refused_and_nothing_else(tmp_path_factory: pytest.TempPathFactory, draw: list[tuple[int, int]], cut: int) -> None:
    if not SMALL:
        top = tmp_path_factory.mktemp("small")
        (top / "tree/a/b").mkdir(parents=True)
        (top / "tree/a/b/file").write_bytes(b"content" * 1000)
        (top / "tree/link").symlink_to("a")
        SMALL["data"], SMALL["folder"] = made(top, top / "tree", 1, "-N", "64").read_bytes(), os.fsencode(top)
    data = bytearray(SMALL["data"])
    for at, value in draw:
        data[at % len(data)] = value
    path = Path(os.fsdecode(SMALL["folder"]), "damaged")
    path.write_bytes(data[:cut] if cut < 4096 else data)
    try:
        with Ext4(path) as system:
            for _, node in system.walk():
                system.attributes(node)
                if stat.S_ISREG(node.mode) and node.size < 1 << 24:
                    assert sum(map(len, system.content(node))) == node.size
                elif stat.S_ISLNK(node.mode):
                    system.link(node)
    except Refused:
        pass


# -- what stands against it ------------------------------------------------------------------------------------------------------


def test_a_program_is_kept_from_what_the_guest_lacks() -> None:
    found = checks.masks(["avx2", "avx512f", "xsavec", "gfni"], ["avx2"], {})
    assert found["GLIBC_TUNABLES"] == "glibc.cpu.hwcaps=-AVX512F,-XSAVEC" and found["LD_BIND_NOW"] == "1" and "OPENSSL_ia32cap" in found
    assert checks.masks(["avx512f"], [], {"GLIBC_TUNABLES": "glibc.malloc.check=3"})["GLIBC_TUNABLES"] == "glibc.malloc.check=3:glibc.cpu.hwcaps=-AVX512F"
    with pytest.raises(Refused, match="for itself"):
        checks.masks(["avx512f"], [], {"GLIBC_TUNABLES": "glibc.cpu.hwcaps=-AVX2"})
    assert checks.processor(["avx2", "avx512f", "xsavec", "gfni"], ["avx2"], {7: found}) == ["gfni"]


@given(host=st.sets(st.sampled_from(sorted(checks.HWCAPS))), there=st.sets(st.sampled_from(sorted(checks.HWCAPS))))
def test_what_was_masked_passes_and_what_was_not_is_refused(host: set[str], there: set[str]) -> None:
    assert checks.processor(host, there, {1: checks.masks(host, there, {})}) == []
    if host - there:
        with pytest.raises(Refused, match=r"resource\.processor"):
            checks.processor(host, there, {1: {"OPENSSL_ia32cap": checks.OPENSSL_MASK}})


def test_mounts_that_a_guest_does_not_have_are_refused() -> None:
    checks.mounts({"mounts": [{"target": "/tmp", "tmpfs": "1Mi"}]})
    with pytest.raises(Refused, match="a folder of the node"):
        checks.mounts({"mounts": [{"target": "/data", "source": "/srv"}]})
    lines = "1 0 0:1 / / rw - overlay overlay rw\n2 1 0:6 /null /proc/keys rw,relatime - devtmpfs devtmpfs rw\n3 1 0:6 /zero /dev/zero rw - devtmpfs devtmpfs rw"
    assert checks.devices(lines) == [["/proc/keys", "/dev/null"], ["/dev/zero", "/dev/zero"]]
    with pytest.raises(Refused, match="ext4"):
        checks.devices(lines + "\n4 1 8:1 / /data rw - ext4 /dev/sda1 rw")


# -- what goes with it -----------------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not AS_ROOT, reason="device nodes and trusted attributes need root")
def test_a_changed_root_goes_with_deleted_and_hidden_names_as_devices(tmp_path: Path) -> None:
    lower, upper = tmp_path / "lower", tmp_path / "upper"
    for name in ("gone", "hidden/a", "hidden/b", "kept"):
        (lower / name).parent.mkdir(parents=True, exist_ok=True)
        (lower / name).write_text("below")
    (upper / "hidden").mkdir(parents=True)
    (upper / "hidden/b").write_text("above")
    os.chown(upper / "hidden/b", 1005, 1006)
    os.mknod(upper / "gone", stat.S_IFCHR, os.makedev(0, 0))
    try:
        os.setxattr(upper / "hidden", "trusted.overlay.opaque", b"y")
    except OSError:
        pytest.skip("no trusted attributes on this file system")
    with tarfile.open(fileobj=io.BytesIO(state.changed(upper, [lower], 1000))) as archive:
        members = {member.name: member for member in archive.getmembers()}
        assert archive.extractfile("hidden/b").read() == b"above"  # type: ignore[union-attr]
    assert {name for name, member in members.items() if member.ischr()} == {"gone", "hidden/a"}
    assert (members["hidden/b"].uid, members["hidden/b"].gid) == (5, 6)


def test_the_scripts_are_shell() -> None:
    """With names that a shell would take apart."""
    shell = shutil.which("busybox")
    if shell is None:
        pytest.skip("no busybox")
    scripts = [
        guest.restore(pipes=["pipe:[1]", "pipe:[2]"], memory=1, pids=2, cpu_us=3, now_s=4), guest.dump([["/proc/a b'c", "/dev/null"]], "token"), guest.go(), guest.resume(), guest.kill(15),
        guest.STAGE.decode(), guest.INIT.decode(), *(data.decode() for name, _, data in guest.files({}, {"ADDRESS": "1.2.3.4/24"}) if name != "bin/await"),
    ]
    for script in scripts:
        done = subprocess.run([shell, "sh", "-n"], input=script, text=True, capture_output=True)
        assert done.returncode == 0, (done.stderr, script)


@pytest.mark.parametrize(("groups", "unified", "found"), [
    ("0::/novacron/a.1\n", True, ""),
    ("0::/novacron/a.1/inner\n", True, "/novacron/a.1/inner"),
    ("4:pids:/novacron/a.1\n3:cpu,cpuacct:/novacron/a.1\n2:name=systemd:/user\n0::/\n", False, ""),
    ("4:pids:/novacron/a.1\n3:cpu,cpuacct:/other:one\n0::/novacron/a.1\n", False, "/other:one"),
])
def test_a_process_in_another_control_group_is_seen_in_either_layout(groups: str, unified: bool, found: str) -> None:
    assert checks.elsewhere(groups, "/novacron/a.1", unified) == found
