"""The builder's pure parts, each against another's work where there is one (veritysetup, sfdisk, cpio, objdump), and its machines."""

import io
import json
import os
import random
import re
import select
import shutil
import subprocess
import sys
import tarfile
import uuid
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.updates.verity import BLOCK, hash_tree
from firmware_images import build, contents, elf, gpt, initrd, packages, recipes, root, sbom, scripts, tools, units
from firmware_images.data import take_out
from firmware_images.errors import FirmwareError
from firmware_images.machine import COLD, Machine, Wiring, command, with_hashing
from firmware_images.tree import Entry, Tree, as_cpio, as_tar, take_tar
from tools.bench.harness import ROOT

AMD64, DEVICE = recipes.architecture("amd64"), recipes.profile("device")


def needs(program: str) -> str:
    found = tools.find(program)
    if found is None:
        pytest.skip(f"{program} is not installed (Debian package {tools.PACKAGES.get(program, program)})")
    return found


# -- the tree --------------------------------------------------------------------------------------------------------------------

NAMES = st.text("abc", min_size=1, max_size=2)
PATHS = st.lists(NAMES, min_size=1, max_size=4).map(lambda parts: "/" + "/".join(parts))


@settings(max_examples=100)
@given(st.dictionaries(PATHS, st.binary(max_size=700), max_size=12))
def test_a_tree_comes_back_from_its_tar_and_gives_the_same_bytes_in_any_order(files: dict[str, bytes]) -> None:
    def made(order: list[str]) -> Tree:
        tree = Tree()
        for path in order:
            tree.file(path, files[path])
        return tree

    files = {path: data for path, data in files.items() if not any(other.startswith(path + "/") for other in files)}
    tree = made(sorted(files))
    raw = b"".join(as_tar(tree.items(), 1_700_000_000))
    assert raw == b"".join(as_tar(made(sorted(files, reverse=True)).items(), 1_700_000_000))
    again = Tree()
    take_tar(again, io.BytesIO(raw), lambda path: False)
    assert dict(again.items()) == dict(tree.items())


def test_what_is_read_first_lies_first_and_nothing_is_left_out() -> None:
    tree = Tree()
    for path in ("/a/1", "/b/2", "/b/3", "/c/4"):
        tree.file(path, path.encode())
    tree.link("/a/link", "1")
    ordered = list(tree.items_for_reading(["/c/4", "/a/1", "/c/4", "/a/link", "/b", "/absent"]))
    assert [path for path, entry in ordered if entry.kind == "dir"] == ["/", "/a", "/b", "/c"] and [path for path, _ in ordered[4:]] == ["/c/4", "/a/1", "/a/link", "/b/2", "/b/3"]
    assert dict(ordered) == dict(tree.items())


def test_a_package_keeps_merged_folders_and_loses_owners_and_set_uid() -> None:
    tree = Tree()
    tree.folder("/usr/lib")
    tree.link("/lib", "usr/lib")
    raw = io.BytesIO()
    with tarfile.open(fileobj=raw, mode="w") as archive:
        for name, kind, mode, target in (("./lib", tarfile.DIRTYPE, 0o755, ""), ("./lib/x.so", tarfile.REGTYPE, 0o4755, ""), ("./lib/y.so", tarfile.SYMTYPE, 0o777, "x.so"), ("./null", tarfile.CHRTYPE, 0o666, "")):
            member = tarfile.TarInfo(name)
            member.type, member.mode, member.linkname, member.uid = kind, mode, target, 1000
            archive.addfile(member)
    take_tar(tree, io.BytesIO(raw.getvalue()), lambda path: False)
    assert tree["/usr/lib/x.so"].mode == 0o755 and tree.follow("/lib/y.so") == tree["/lib/x.so"]
    assert "/null" not in tree
    with pytest.raises(ValueError, match="damaged"):
        take_tar(tree, io.BytesIO(b"x" * 900), lambda path: False)


def test_links_that_lead_in_circles_or_outside_end_inside() -> None:
    tree = Tree()
    tree.link("/a", "b")
    tree.link("/b", "a")
    with pytest.raises(ValueError, match="too many"):
        tree.resolve("/a/x")
    tree.link("/out", "../../../etc")
    tree.file("/out/passwd", "x")
    assert "/etc/passwd" in tree


def test_a_squashed_root_is_roots_whoever_builds(tmp_path: Path) -> None:
    needs("mksquashfs")
    tree = Tree()
    tree.file("/etc/x", "x" * 5000)
    build._squash(tree, [], tmp_path / "one", 1_700_000_000)
    told = subprocess.run([needs("unsquashfs"), "-lln", str(tmp_path / "one")], capture_output=True, text=True, check=True).stdout
    assert [line.split()[:2] for line in told.splitlines() if line.strip()] == [["drwxr-xr-x", "0/0"], ["drwxr-xr-x", "0/0"], ["-rw-r--r--", "0/0"]]


def test_cpio_reads_our_archive() -> None:
    program = shutil.which("cpio")
    if program is None:
        pytest.skip("cpio is not installed (Debian package cpio)")
    tree = Tree()
    tree.file("/init", "#!/bin/sh\n", 0o755)
    tree.file("/lib/a", b"12345")
    tree.link("/bin", "usr/bin")
    told = subprocess.run([program, "-itv", "--quiet"], input=as_cpio(tree.items(), 0), capture_output=True, check=True).stdout.decode()
    assert {line.split()[0] + " " + line.split(maxsplit=8)[8] for line in told.splitlines()} == {"-rwxr-xr-x init", "-rw-r--r-- lib/a", "drwxr-xr-x lib", "lrwxrwxrwx bin -> usr/bin"}


# -- dm-verity, partitions -------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("blocks", [1, 2, 128, 129, 128 * 128 + 1])
def test_the_hash_tree_is_veritysetups(tmp_path: Path, blocks: int) -> None:
    program = needs("veritysetup")
    data, salt = random.Random(blocks).randbytes(blocks * BLOCK), bytes(range(32))
    ours = hash_tree(data, salt)
    (tmp_path / "data").write_bytes(data)
    told = subprocess.run([program, "format", "--no-superblock", "--salt", salt.hex(), str(tmp_path / "data"), str(tmp_path / "tree")], capture_output=True, check=True, text=True).stdout
    assert re.search(r"Root hash:\s+(\w+)", told)[1] == ours.root.hex()  # type: ignore[index]
    assert (tmp_path / "tree").read_bytes() == ours.tree
    changed = bytearray(data)
    changed[-1] ^= 1
    assert hash_tree(changed, salt).root != ours.root


def test_the_hash_tree_wants_whole_blocks() -> None:
    for data in (b"", b"x"):
        with pytest.raises(ValueError, match="whole number"):
            hash_tree(data, b"")


def test_sfdisk_reads_our_partition_table(tmp_path: Path) -> None:
    program = needs("sfdisk")
    identities = [uuid.uuid4() for _ in range(3)]
    parts, size = gpt.lay_out([("novacron-esp", "esp", 5 << 20, identities[0]), ("b", "linux", 1, identities[1]), ("c" * 36, "linux", 3 << 20, identities[2])])
    front, back = gpt.tables(parts, size, uuid.uuid4())
    disk = tmp_path / "disk"
    disk.write_bytes(front + bytes(size - len(front) - len(back)) + back)
    done = subprocess.run([program, "--json", str(disk)], capture_output=True, check=True, text=True)
    assert not done.stderr
    told = json.loads(done.stdout)["partitiontable"]["partitions"]
    assert [(row["name"], row["start"] * 512, row["size"] * 512, row["uuid"].lower()) for row in told] == [(part.name, part.start, part.size, str(part.identity)) for part in parts]
    verify = subprocess.run([program, "--verify", str(disk)], capture_output=True, text=True)
    assert "No errors" in verify.stdout, verify
    # Control: one flipped bit of the table is seen.
    broken = bytearray(front)
    broken[1024 + 40] ^= 1
    disk.write_bytes(bytes(broken) + bytes(size - len(front) - len(back)) + back)
    assert subprocess.run([program, "--verify", str(disk)], capture_output=True, text=True).stderr


@given(st.integers(1, 120), st.data())
def test_a_partition_table_is_read_where_one_of_the_two_is_whole(count: int, data: st.DataObject) -> None:
    parts, size = gpt.lay_out([(f"part {number}", "linux", number << 10, uuid.UUID(int=number)) for number in range(1, count + 1)])
    front, back = gpt.tables(parts, size, uuid.UUID(int=1000))
    disk = bytearray(len(front) + len(back))  # as if nothing stood between them

    def laid_out(one: bytes, other: bytes) -> gpt.Readable:
        class Disk:
            def __getitem__(self, part: slice, /) -> bytes:
                shift = 0 if part.start < len(one) else size - len(disk)
                return (one + other)[part.start - shift : part.stop - shift]

        return Disk()

    wanted = {part.name: (part.start, part.size) for part in parts}
    assert gpt.read(laid_out(front, back), size) == wanted
    bit = data.draw(st.integers(8 * 512, 8 * (512 + 92) - 1) | st.integers(8 * 1024, 8 * len(front) - 1))
    damaged = bytearray(front)
    damaged[bit // 8] ^= 1 << bit % 8
    assert gpt.read(laid_out(bytes(damaged), back), size) == wanted
    with pytest.raises(ValueError, match="neither"):
        gpt.read(laid_out(bytes(damaged), bytes(len(back))), size)


@pytest.mark.parametrize("content", [b"", b"short", bytes(1 << 20), b"EFI PART" * 1000])
def test_what_is_no_disk_of_an_image_has_no_data_to_take_out(content: bytes, tmp_path: Path) -> None:
    needs("e2fsck")
    (tmp_path / "disk").write_bytes(content)
    with pytest.raises(FirmwareError, match="^data partition: it is not found on .*; is it a disk of an image"):
        take_out(tmp_path / "disk", tmp_path / "out")


def test_the_data_partition_has_a_journal_and_is_the_same_each_time(tmp_path: Path) -> None:
    needs("mke2fs")
    identity = uuid.uuid4()
    for name in ("a", "b"):
        build._data_partition(tmp_path / name, 64 << 20, identity, 1_700_000_000)
    assert (tmp_path / "a").read_bytes() == (tmp_path / "b").read_bytes()
    told = subprocess.run([needs("debugfs"), "-R", "stats -h", str(tmp_path / "a")], capture_output=True, text=True, check=True).stdout
    features = next(line for line in told.splitlines() if line.startswith("Filesystem features")).split()
    assert {"has_journal", "extent", "metadata_csum"} <= set(features)
    assert subprocess.run([needs("e2fsck"), "-fn", str(tmp_path / "a")], capture_output=True).returncode == 0


def test_partitions_that_cannot_be() -> None:
    one = ("a", "linux", 1, uuid.uuid4())
    for wanted in ([("", "linux", 1, uuid.uuid4())], [("a" * 37, "linux", 1, uuid.uuid4())], [("a", "odd", 1, uuid.uuid4())], [("a", "linux", 0, uuid.uuid4())], [one, one]):
        with pytest.raises(ValueError, match="cannot be"):
            gpt.lay_out(wanted)


# -- libraries, modules ----------------------------------------------------------------------------------------------------------

def test_needed_libraries_are_those_that_objdump_names() -> None:
    program, objdump = shutil.which("ls"), shutil.which("objdump")
    if program is None or objdump is None:
        pytest.skip("objdump is not installed (Debian package binutils)")
    told = subprocess.run([objdump, "-p", program], capture_output=True, text=True, check=True).stdout
    assert {name for name in elf.needed(Path(program).read_bytes()).names if not name.startswith("/")} == set(re.findall(r"NEEDED\s+(\S+)", told))


@settings(max_examples=200)
@given(st.binary(max_size=300), st.integers(0, 4000))
def test_a_damaged_program_is_no_program(noise: bytes, at: int) -> None:
    elf.needed(noise)
    good = Path("/bin/true").read_bytes()[:6000]
    elf.needed(good[:at] + noise + good[at + len(noise) :])


def test_a_library_that_was_left_out_is_noticed() -> None:
    tree = Tree()
    program = Path("/bin/ls").read_bytes()
    names = elf.needed(program).names
    tree.put("/usr/bin/ls", Entry("file", 0o755, program))
    for name in names:
        tree.file(name if name.startswith("/") else f"/usr/lib/x86_64-linux-gnu/{name}", b"")
    assert initrd.missing_libraries(tree) == []
    gone = next(name for name in names if not name.startswith("/") and not name.startswith("libc."))
    tree.drop(lambda path: path.endswith(gone))
    assert initrd.missing_libraries(tree) == [f"/usr/bin/ls needs {gone}"]


def test_libraries_have_the_names_that_maintainer_scripts_would_have_given_them() -> None:
    library = next(Path("/usr/lib").glob("*-linux-gnu/libc.so.6")).read_bytes()
    assert elf.needed(library).soname == "libc.so.6" and elf.needed(Path("/bin/ls").read_bytes()).soname == ""
    tree, folder = Tree(), "/usr/lib/riscv64-linux-gnu"
    tree.file(f"{folder}/ld-linux-riscv64-lp64d.so.1", b"loader")
    tree.file(f"{folder}/libthat.so.6.1", library)
    tree.file("/usr/lib/python3/libthis.so", library)  # no folder of the loader's
    for kind in ("blas", "lapack"):
        tree.file(f"{folder}/{kind}/lib{kind}.so.3.12.1", kind.encode())
        tree.link(f"{folder}/{kind}/lib{kind}.so.3", f"lib{kind}.so.3.12.1")
    root.library_names(tree)
    for name, content in (("libc.so.6", library), ("libblas.so.3", b"blas"), ("liblapack.so.3", b"lapack")):
        found = tree.follow(f"{folder}/{name}")
        assert found is not None and found.data == content
    assert tree.follow("/usr/lib/python3/libc.so.6") is None
    tree.put(f"{folder}/libthat.so.6", Entry("file", 0o755, library))
    tree.file(f"{folder}/libc.so.6", b"the package's own")
    root.library_names(tree)
    assert tree[f"{folder}/libc.so.6"].data == b"the package's own"


def test_modules_come_with_what_they_depend_on() -> None:
    dependencies = initrd.parse_dependencies("kernel/a-b.ko.xz: kernel/c.ko.xz\nkernel/c.ko.xz: kernel/d.ko\nkernel/d.ko:\nkernel/e.ko:\n")
    assert initrd.closure(["a_b", "none"], dependencies) == ["kernel/a-b.ko.xz", "kernel/c.ko.xz", "kernel/d.ko"]
    with pytest.raises(ValueError, match="not known"):
        initrd.unpacked("kernel/a.ko.zst", b"")


# -- recipe, contents ------------------------------------------------------------------------------------------------------------

def test_what_stays_out_of_a_device() -> None:
    for path in ("/usr/share/doc/x", "/usr/lib/modules/6.1/kernel/drivers/gpu/x.ko.xz", "/usr/lib/python3.13/idlelib/x.py", "/usr/lib/x86_64-linux-gnu/gconv/X.so"):
        assert recipes.unwanted(path, DEVICE), path
    for path in ("/usr/bin/env", "/usr/lib/modules/6.1/kernel/drivers/nvme/host/nvme.ko.xz", "/usr/lib/modules/6.1/modules.builtin", "/usr/lib/systemd/systemd"):
        assert not recipes.unwanted(path, DEVICE), path
    assert not recipes.unwanted("/usr/lib/modules/6.1/kernel/drivers/gpu/x.ko.xz", recipes.profile("host"))


def test_the_lock_gives_hashes_for_every_wheel_of_every_profile() -> None:
    lock = (ROOT / "requirements" / "run.lock").read_text()
    for profile in recipes.PROFILES.values():
        lines = recipes.locked(lock, profile.wheels, (3, 13))
        assert lines.count("==") == len(profile.wheels) and lines.count("--hash=sha256:") >= len(profile.wheels) and ";" not in lines
    with pytest.raises(FirmwareError, match=r"lacks no-such.*make lock"):
        recipes.locked(lock, ["no-such"], (3, 13))


@pytest.mark.parametrize("profile", list(recipes.PROFILES.values()), ids=str)
def test_an_image_has_no_login_no_password_and_no_port_but_its_own(profile: recipes.Profile) -> None:
    tree = Tree()
    folder = ROOT / "tools" / "systemd"
    contents.add(tree, AMD64, profile, (folder / "novacron-edge.service").read_text(), (folder / "novacron-edge.service.d" / "containers.conf").read_text(), "1")
    assert all(line.split(":")[1].startswith("!") for line in tree["/etc/shadow"].data.decode().splitlines())
    assert all(line.endswith("/nologin") for line in tree["/etc/passwd"].data.decode().splitlines())
    for unit in ("getty@.service", "serial-getty@.service", "debug-shell.service"):
        assert tree[f"/etc/systemd/system/{unit}"].target == "/dev/null"
    agent = "".join(data.decode() for path, data in tree.files("/usr/lib/systemd/system") if path.split("/")[-1].startswith("novacron-edge") or "/novacron-edge.service.d/" in path)
    for word in ("WatchdogSec=", "MemoryMax=", "TasksMax=", "ProtectSystem=strict", "SystemCallFilter=@system-service"):
        assert word in agent
    if "containers" not in profile.extra:  # what stands for the walls that it does without
        for word in ("\nCapabilityBoundingSet=\n", "\nNoNewPrivileges=yes\n", "\nUser=novacron\n", "\nReadOnlyPaths=/proc/sys /sys\n", "\nPrivateDevices=yes\n", "\nSystemCallFilter=@system-service\n"):
            assert word in agent
    if "broker" in profile.extra:
        lines = tree["/etc/mosquitto/novacron.conf"].data.decode().splitlines()
        assert [line for line in lines if line.startswith("listener")] == ["listener 1883 127.0.0.1"] and "allow_anonymous false" in lines
        # With it mosquitto 2.0.21 drops what comes for a client that it knows from its file alone.
        assert not any(line.startswith("per_listener_settings") for line in lines)
    for path, data in tree.files("/usr/lib/novacron"):
        assert subprocess.run(["sh", "-n"], input=data, capture_output=True).returncode == 0, path
    assert subprocess.run(["sh", "-n"], input=scripts.INIT.encode(), capture_output=True).returncode == 0


BARS = ("ProtectHostname", "ProtectClock", "ProtectKernelLogs", "ProtectKernelTunables", "ProtectKernelModules", "ProtectControlGroups", "PrivateDevices", "RestrictNamespaces", "RestrictSUIDSGID", "RestrictRealtime", "NoNewPrivileges", "LockPersonality")
"""Walls around an agent that would be around its containers, and stop some of them."""


def barred(units: list[str]) -> list[str]:
    """Those that stand at the end, as systemd reads a unit and its drop-ins: what comes last counts."""
    found = dict(line.split("=", 1) for unit in units for line in unit.splitlines() if "=" in line and not line.startswith("#"))
    return [name for name in BARS if found.get(name, "no") != "no"] + [name for name in ("SystemCallFilter", "SystemCallArchitectures") if found.get(name)]


def test_nothing_around_a_hosts_agent_stops_its_containers() -> None:
    tree, folder = Tree(), ROOT / "tools" / "systemd"
    whole, drop_in = (folder / "novacron-edge.service").read_text(), (folder / "novacron-edge.service.d" / "containers.conf").read_text()
    contents.add(tree, AMD64, recipes.PROFILES["host"], whole, drop_in, "1")
    units = [data.decode() for path, data in sorted(tree.files("/usr/lib/systemd/system")) if path.endswith("/novacron-edge.service") or "/novacron-edge.service.d/" in path]
    assert len(units) == 3 and barred(units) == [] and barred([whole, drop_in]) == []
    assert barred([*units, "ProtectHostname=yes\n"]) == ["ProtectHostname"] and len(barred([whole])) > 6, "the control"


def test_a_device_without_data_starts_again_whatever_fails() -> None:
    """systemd gives a oneshot service no end of its own."""
    for word in ("SuccessAction=reboot-force", "FailureAction=reboot-force", "ExecStart=-/usr/bin/python3", "TimeoutStartSec="):
        assert f"\n{word}" in units.NO_DATA
    tree = Tree()
    folder = ROOT / "tools" / "systemd"
    contents.add(tree, AMD64, DEVICE, (folder / "novacron-edge.service").read_text(), (folder / "novacron-edge.service.d" / "containers.conf").read_text(), "1")
    assert b"\nOnFailure=novacron-no-data.service\n" in tree["/usr/lib/systemd/system/var-lib-novacron.mount.d/novacron.conf"].data


def test_a_bill_of_materials_is_cyclonedx_and_the_same_each_time() -> None:
    package = packages.Package("libc6", "2.41-12+deb13u5", "amd64", "f", "0" * 64, "u")
    made = [sbom.document("image", "1", "ab" * 32, [sbom.of_package(package, "trixie"), sbom.of_wheel("PyYAML-6.0.4-cp313-x.whl", "1" * 64)], 0) for _ in range(2)]
    assert made[0] == made[1] and made[0]["bomFormat"] == "CycloneDX"
    assert [entry["purl"] for entry in made[0]["components"]] == ["pkg:deb/debian/libc6@2.41-12%2Bdeb13u5?arch=amd64&distro=trixie", "pkg:pypi/pyyaml@6.0.4"]


def test_only_files_with_a_sha256_are_taken_from_apt() -> None:
    line = "'http://m/pool/a_1%3a2.0_amd64.deb' a_1%3a2.0_amd64.deb 5 SHA256:" + "a" * 64
    assert packages.parse_uris("Reading\n" + line) == [packages.Package("a", "1:2.0", "amd64", "a_1%3a2.0_amd64.deb", "a" * 64, "http://m/pool/a_1%3a2.0_amd64.deb")]
    with pytest.raises(ValueError, match="without a SHA-256"):
        packages.parse_uris("'http://m/a_1_all.deb' a_1_all.deb 5 MD5Sum:" + "a" * 32)


# -- machines --------------------------------------------------------------------------------------------------------------------

def test_a_machine_is_offline_and_emulated_unless_told_otherwise() -> None:
    line = command(AMD64, Path("disk"), Path("flash"), Wiring(192, {8000: 8470}, {"novacron.edge.yaml": Path("e")}))
    assert "user,id=net,restrict=on,hostfwd=tcp:127.0.0.1:8000-:8470" in line and line[line.index("-accel") + 1] == "tcg"
    with pytest.raises(FirmwareError, match="comma"):
        command(AMD64, Path("disk"), Path("flash"), Wiring(192, credentials={"novacron.edge.yaml": Path("a,b")}))


@pytest.mark.parametrize(("words", "runs"), [((COLD,), 3), ((), 1)], ids=["emulated", "control"])
def test_a_guest_that_starts_again_gets_a_fresh_machine_until_that_fails(tmp_path: Path, words: tuple[str, ...], runs: int) -> None:
    count = tmp_path / "count"
    with Machine(["sh", "-c", f"echo >> {count}; number=$(wc -l < {count}); echo run $number; [ $number -lt 3 ]", *words]) as machine:
        machine.wait()
        assert machine.ended and [text for _, text in machine.lines] == [f"run {number}" for number in range(1, runs + 1)]


@pytest.mark.parametrize(("version", "accelerator", "hashes"), [((10, 0), "tcg", True), ((8, 2), "tcg", True), ((7, 2), "tcg", False), ((0, 0), "tcg", False), ((10, 0), "kvm", False)])
def test_an_emulated_machine_hashes_by_instructions_where_its_qemu_has_them(version: tuple[int, int], accelerator: str, hashes: bool) -> None:
    words = with_hashing(command(AMD64, Path("disk"), Path("flash"), Wiring(192, accelerator=accelerator)), lambda: version)
    assert ("+sha-ni" in words[words.index("-cpu") + 1].split(",")) is hashes
    arm = command(recipes.architecture("arm64"), Path("disk"), Path("flash"), Wiring(192))
    assert with_hashing(arm, lambda: pytest.fail("there is nothing to ask it for")) == arm


def test_a_newer_qemu_that_lies_beside_the_project_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "BESIDE", tmp_path)
    installed = tools.find("sh")
    assert installed is not None and not installed.startswith(str(tmp_path))
    (tmp_path / "sh").write_text("#!/bin/sh\necho QEMU emulator version 10.0.11 '(Debian 1:10.0.11)'\n")
    assert tools.find("sh") == installed, "it cannot be run"
    (tmp_path / "sh").chmod(0o755)
    assert tools.find("sh") == str(tmp_path / "sh") and tools.qemu_version(str(tmp_path / "sh")) == (10, 0)
    assert tools.qemu_version("/bin/true") == tools.qemu_version(str(tmp_path / "none")) == (0, 0)


def test_a_machine_whose_power_is_cut_does_not_start_again(tmp_path: Path) -> None:
    count = tmp_path / "count"
    with Machine(["sh", "-c", f"echo >> {count}; echo up; exec sleep 600", COLD]) as machine:
        machine.wait_for("up", 30)
        assert not machine.ended
    assert machine.ended and count.read_text() == "\n"


def test_a_machine_whose_command_is_killed_is_killed_too() -> None:
    program = "from firmware_images.machine import Machine\nmachine = Machine(['sh', '-c', 'echo up; exec sleep 600'])\nmachine.wait_for('up', 60)\nprint(machine.process.pid, flush=True)\nmachine.wait()\n"
    with subprocess.Popen([sys.executable, "-c", program], cwd=ROOT, stdout=subprocess.PIPE, text=True) as parent:
        assert parent.stdout is not None
        machine = os.pidfd_open(int(parent.stdout.readline()))
        assert not select.select([machine], [], [], 0)[0]  # it runs
        parent.kill()
        assert select.select([machine], [], [], 60)[0]
    os.close(machine)


def test_an_emulated_machine_is_started_afresh_but_not_where_its_writes_are_logged_or_by_kvm() -> None:
    for wiring, cold in ((Wiring(192), True), (Wiring(192, log=Path("log")), False), (Wiring(192, accelerator="kvm"), False)):
        assert (COLD in command(AMD64, Path("disk"), Path("flash"), wiring)) is cold


def test_a_console_is_bounded_and_cannot_move_ours() -> None:
    script = r"printf '\033[2Jone\007\n'; head -c 10000 /dev/zero | tr '\0' x; printf '\n\377two\n'"
    with Machine(["sh", "-c", script]) as machine:
        machine.wait_for("two", 10)
        with pytest.raises(EOFError, match="ended before"):
            machine.wait_for("never", 10)
    texts = [text for _, text in machine.lines]
    assert texts[0] == "one" and max(map(len, texts)) <= 4096 and machine.between("one", "two")
