"""The builder's pure parts, each against another's work where there is one (veritysetup, sfdisk, cpio, objdump), and what it refuses."""

import errno
import io
import json
import os
import random
import re
import select
import shutil
import socket
import subprocess
import sys
import tarfile
import uuid
from pathlib import Path
from types import SimpleNamespace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.updates.verity import BLOCK, hash_tree
from firmware_images import boot, build, bundles, cli, configuration, contents, elf, gpt, initrd, packages, recipes, room, sbom, tools
from firmware_images.errors import FirmwareError
from firmware_images.machine import COLD, Machine, Wiring, command
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
    build._squash(tree, tmp_path / "one", 1_700_000_000)
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
    units = ROOT / "tools" / "systemd"
    contents.add(tree, AMD64, profile, (units / "novacron-edge.service").read_text(), (units / "novacron-edge.service.d" / "containers.conf").read_text(), "1")
    assert all(line.split(":")[1].startswith("!") for line in tree["/etc/shadow"].data.decode().splitlines())
    assert all(line.endswith("/nologin") for line in tree["/etc/passwd"].data.decode().splitlines())
    for unit in ("getty@.service", "serial-getty@.service", "debug-shell.service"):
        assert tree[f"/etc/systemd/system/{unit}"].target == "/dev/null"
    agent = "".join(data.decode() for path, data in tree.files("/usr/lib/systemd/system") if path.split("/")[-1].startswith("novacron-edge") or "/novacron-edge.service.d/" in path)
    for word in ("WatchdogSec=", "MemoryMax=", "TasksMax=", "ProtectSystem=strict", "SystemCallFilter=@system-service"):
        assert word in agent
    if "broker" in profile.extra:
        listeners = [line for line in tree["/etc/mosquitto/novacron.conf"].data.decode().splitlines() if line.startswith("listener")]
        assert listeners == ["listener 1883 127.0.0.1"]
    for path, data in tree.files("/usr/lib/novacron"):
        assert subprocess.run(["sh", "-n"], input=data, capture_output=True).returncode == 0, path
    assert subprocess.run(["sh", "-n"], input=contents.initrd_init().encode(), capture_output=True).returncode == 0


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


# -- what is refused -------------------------------------------------------------------------------------------------------------

@pytest.mark.parametrize(("arguments", "words"), [
    (["build", "--arch", "vax"], "arch: 'vax' is unknown; take one of amd64"), (["build", "--profile", "toaster"], "profile: 'toaster' is unknown"), (["boot", "--memory", "8"], "memory: 8 MiB"),
    (["boot"], "image: there is none"), (["boot", "--config", "/nonexistent.yaml"], "config:"), (["build", "--sequence", "-1"], "sequence: -1; give 0 to 9999999999"), (["build", "--variant", "../x"], "variant: '../x' is no name"),
    (["boot", "--port", "99999"], "port: 99999; give 1 to 65535"), (["boot", "--port", "-1"], "port: -1; give 1 to 65535"), (["boot", "--clock", "noon"], "clock: 'noon' is no date; give one such as 1970-01-02"),
    (["bundle", "--output", "/nonexistent/bundle"], "image:"),
])
def test_bad_input_is_one_clear_line_before_anything_is_done(arguments: list[str], words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main([*arguments, "--home", str(tmp_path)]) == 2
    assert words in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["build", "containers"])
@pytest.mark.parametrize(("home", "words"), [("file", "file is no folder"), ("file/in", "file is no folder"), ("link", "link cannot be made or written (File exists)")])
def test_a_home_that_cannot_be_used_is_one_clear_line(command: str, home: str, words: str, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tools, "find", lambda program: "/bin/true")
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("nowhere")
    assert cli.main([command, "--home", str(tmp_path / home)]) == 2
    told = capsys.readouterr().err.splitlines()
    assert told[-1].startswith("home: ") and words in told[-1] and told[-1].endswith("give another one with --home")


def test_a_folder_that_is_not_ours_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "theirs").mkdir(0o555)
    if os.geteuid() == 0:  # whom rights do not stop
        monkeypatch.setattr(room.os, "access", lambda path, mode: bool(os.stat(path).st_mode & 0o200))
    with pytest.raises(FirmwareError, match=r"^state: .*theirs cannot be written; give another one with --state$"):
        room.ready(tmp_path / "theirs" / "new" / "machine", "state", "--state")


def test_a_bundle_has_a_place_before_it_is_made(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bundles, "_contents", lambda folder: ({}, {"root": b""}))
    (tmp_path / "file").touch()
    for target, words in ((tmp_path, "is a folder; give the name of the bundle's file"), (tmp_path / "file" / "x", "is no folder; give another one with --output")):
        with pytest.raises(FirmwareError, match=f"^output: .*{words}"):
            bundles.bundle(tmp_path, None, tmp_path / "key", target)


def test_a_disk_that_becomes_full_is_one_clear_line_and_our_own_faults_are_not_hidden(monkeypatch: pytest.MonkeyPatch, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    def fails(number: int) -> None:
        def build_it(*arguments: object) -> None:
            raise OSError(number, os.strerror(number), "some/file")

        monkeypatch.setattr(build, "build", build_it)

    fails(errno.ENOSPC)
    assert cli.main(["build", "--home", str(tmp_path)]) == 2
    assert capsys.readouterr().err == "space: some/file cannot be written or read (No space left on device); make room, or give another folder (--home, --state, --output)\n"
    fails(errno.ECHILD)
    with pytest.raises(ChildProcessError):
        cli.main(["build", "--home", str(tmp_path)])


def test_a_port_that_another_has_is_refused_and_one_that_is_free_is_not(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server((boot.LOOPBACK, 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["boot", "--home", str(tmp_path), "--port", str(port)]) == 2
        assert f"port: {port} of 127.0.0.1 cannot be had (Address already in use); give another one" in capsys.readouterr().err
    assert boot.usable_port(port) == port and boot.usable_port(0)


def test_missing_tools_are_named_with_their_packages(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tools, "find", lambda program: None if program in ("mcopy", "mmd", "mksquashfs") else "/bin/true")
    with pytest.raises(FirmwareError, match=r"mksquashfs, mmd, mcopy not found; as root, apt install --no-install-recommends mtools squashfs-tools"):
        build.preflight(tmp_path, AMD64, DEVICE)


def test_no_space_is_said_first(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setattr(tools, "find", lambda program: "/bin/true")
    monkeypatch.setattr(room.shutil, "disk_usage", lambda path: SimpleNamespace(free=100 << 20))
    with pytest.raises(FirmwareError, match=r"^space: .*100 MiB free, 2368 are wanted; make room, or give another folder with --home$"):
        build.preflight(tmp_path / "new", AMD64, DEVICE)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("command", ["build", "containers"])
def test_a_small_disk_is_refused_before_the_build_begins(command: str, tmp_path: Path) -> None:
    """A real one: a file system of 64 MiB in a namespace of the command's own."""
    wrap = ["unshare", "--user", "--map-root-user", "--mount", "sh", "-c", f'mount -t tmpfs -o size=64m none {tmp_path} && "$@"; code=$?; ls -A {tmp_path}; exit $code', "sh"]
    if shutil.which("unshare") is None or subprocess.run([*wrap, "true"], capture_output=True).returncode:
        pytest.skip("no mount in a namespace of one's own here (unshare, of util-linux)")
    if tools.missing(tools.BUILD):
        pytest.skip(f"not installed: {', '.join(tools.missing(tools.BUILD))}")
    done = subprocess.run([*wrap, sys.executable, "-m", "firmware_images", command, "--home", str(tmp_path / "home")], cwd=ROOT, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "") and done.stderr.startswith("space: ") and "home has 64 MiB free" in done.stderr and "make room, or give another folder with --home" in done.stderr, done


def test_a_path_without_the_programs_is_refused_before_the_build_begins(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The command itself, with a PATH that has nothing, and nothing where it looks besides."""
    program = "from firmware_images import cli, tools; import sys; tools.SBIN = (); sys.exit(cli.main(sys.argv[1:]))"
    done = subprocess.run([sys.executable, "-c", program, "build", "--home", str(tmp_path / "home")], cwd=ROOT, env={**os.environ, "PATH": str(tmp_path)}, capture_output=True, text=True)
    assert (done.returncode, done.stdout, list(tmp_path.iterdir())) == (2, "", [])
    assert done.stderr == f"tools: {', '.join(tools.BUILD)} not found; as root, apt install --no-install-recommends apt coreutils dosfstools dpkg e2fsprogs kmod mtools openssl squashfs-tools\n"


@pytest.mark.parametrize(("text", "words"), [
    ("edge_id: a\nuplink: {enabled: false}\n", "no login"), ("edge_id: a\n", "no login"), ("uplink: {url: 'mqtt://hub:1883'}\n", "edge_id is left out"), ("edge_id: a\nuplink: {urll: x}\n", "urll"),
    ("edge_id: a\nuplink: {url: 'mqtt://hub:1883'}\n", ""), ("edge_id: a\nuplink: {enabled: false}\nbus: {url: 'mqtt://10.0.0.2:1883'}\n", ""),
    ("edge_id: a\nuplink: {enabled: false}\napi: {host: 0.0.0.0, token_file: /x}\n", ""),
])
def test_a_configuration_that_leaves_a_device_out_of_reach_is_refused(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "edge.yaml"
    path.write_text(text)
    if words:
        with pytest.raises(FirmwareError, match=words):
            configuration.check(path)
    else:
        configuration.check(path)


@pytest.mark.parametrize(("hub", "url"), [
    ("mqtt://127.0.0.1:1883", "mqtt://10.0.2.2:1883"), ("mqtt://localhost", "mqtt://10.0.2.2"), ("mqtts://[::1]:8883", "mqtts://10.0.2.2:8883"), ("mqtt://a:b@127.0.0.1:1883", "mqtt://a:b@10.0.2.2:1883"), ("mqtt://hub:1883", "mqtt://hub:1883"),
])
def test_a_device_that_is_given_a_hub_alone_finds_it_also_on_this_machine(tmp_path: Path, hub: str, url: str) -> None:
    (tmp_path / "edge.yaml").write_text(boot.plain("device-amd64", hub))
    config = configuration.check(tmp_path / "edge.yaml")
    assert config.uplink.enabled and config.uplink.url == url and config.edge_id == "device-amd64"
    (tmp_path / "edge.yaml").write_text(boot.plain("device-amd64"))
    assert not configuration.check(tmp_path / "edge.yaml").uplink.enabled


@pytest.mark.parametrize("hub", ["127.0.0.1:1883", "http://hub:8460", "mqtt://", "mqtt://hub:port", "mqtt://hub:99999", 'mqtt://hub"}'])
def test_what_is_no_address_of_a_hub_is_refused(hub: str) -> None:
    with pytest.raises(FirmwareError, match="no address of a broker"):
        boot.plain("device-amd64", hub)


def test_a_machine_that_has_taken_a_configuration_over_is_not_given_another(tmp_path: Path) -> None:
    state = tmp_path / "machine"
    boot.settle(state, "edge_id: a\n")
    assert boot.settle(state, "edge_id: b\n").read_text() == "edge_id: b\n"  # it has not been started yet
    (state / "disk.img").touch()
    boot.settle(state, "edge_id: b\n")
    with pytest.raises(FirmwareError, match="started with another one"):
        boot.settle(state, "edge_id: a\n")
    assert (state / boot.GIVEN).read_text() == "edge_id: b\n"


def test_a_machine_gets_no_folder_whose_name_qemu_would_cut(tmp_path: Path) -> None:
    with pytest.raises(FirmwareError, match=r"^state: .*comma.*give another one with --state$"):
        boot.settle(tmp_path / "a,b", "edge_id: a\n")
    assert list(tmp_path.iterdir()) == []


def test_a_machine_that_does_not_start_is_a_failure_of_the_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    folder = build.output(tmp_path, AMD64, DEVICE)
    folder.mkdir()
    (folder / "manifest.json").write_text("{}")
    monkeypatch.setattr(boot, "prepare", lambda arch, image, state: (Path("disk"), Path("flash")))
    for status in (1, 0):
        monkeypatch.setattr(boot, "command", lambda *arguments, status=status: ["sh", "-c", f"echo no such machine; exit {status}"])
        assert cli.main(["boot", "--home", str(tmp_path), "--accel", "tcg"]) == 2 * status
        told = capsys.readouterr().err
        assert "no such machine" in told and ("machine: QEMU ended with status 1" in told) == bool(status)


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
