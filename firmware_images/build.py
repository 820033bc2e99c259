"""From a recipe to a disk: every step's progress told, nothing half made left under the final name."""

import json
import os
import platform
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from edge_runtime import __version__
from edge_runtime.updates import slots
from edge_runtime.updates.fat import Fat
from edge_runtime.updates.verity import BLOCK, hash_tree

from . import bundles, gpt, initrd, packages, recipes, room, root, sbom, tools
from .contents import command_line
from .errors import FirmwareError
from .layout import DATA_NAME, ESP_NAME
from .recipes import MIB, Architecture, Profile
from .tree import Tree, as_tar, take_tar

REPOSITORY = Path(__file__).resolve().parents[1]

ESP_MIB = 128
"""Two kernels with their initrds: an update is written beside what runs. For amd64 they are 18 MB, for arm64 and riscv64, whose kernels are not compressed, 42 MB and more."""

SQUASHFS = ("-comp", "zstd", "-Xcompression-level", "19", "-b", "131072", "-all-root", "-root-mode", "0755", "-no-xattrs", "-quiet", "-no-progress")
"""zstd unpacks several times as fast as xz on a small processor, for a tenth more space. 128 KiB blocks: larger ones cost memory at each read.

The root folder is not in the archive: without `-all-root` and `-root-mode` it would be of the user who builds, and writable by everyone."""

DATA_FEATURES = "none,has_journal,extent,huge_file,flex_bg,metadata_csum,64bit,dir_nlink,extra_isize,ext_attr,resize_inode,dir_index,filetype,sparse_super,large_file"
"""Named one by one, so that this machine's mke2fs.conf decides nothing: without a configuration mke2fs leaves even the journal out, and a power cut then damages the file system."""

RESERVED_NAMES = 40
"""Of four entries of 32 bytes each: ten clusters of 512. An update needs room for some five names of as many entries, and cleans up behind those of the one before."""

SPACE_BYTES = 2 << 30
"""Free space that a build wants beside its disk: packages, trees in work, the squashed root."""

MACHINES = {"x86_64": "amd64", "aarch64": "arm64", "riscv64": "riscv64"}

_NAMESPACE = uuid.UUID("c9a5c1de-2d7b-5b55-9e0e-7a6f2f4b8d10")


@dataclass(frozen=True, slots=True)
class Built:
    """A finished image: its disk, and its manifest as written."""

    image: Path
    manifest: dict[str, Any]


def output(home: Path, arch: Architecture, chosen: Profile, variant: str = "") -> Path:
    """Where an image goes."""
    return home / f"{arch.name}-{chosen.name}{f'-{variant}' if variant else ''}"


def finished(home: Path, arch: Architecture, chosen: Profile, variant: str = "") -> Built:
    """The image that was built last. Raises FirmwareError where there is none."""
    folder = output(home, arch, chosen, variant)
    try:
        return Built(folder / "disk.img", json.loads((folder / "manifest.json").read_text()))
    except (OSError, ValueError):
        raise FirmwareError("image", f"there is none in {folder}", f"python -m firmware_images build --arch {arch.name} --profile {chosen.name}") from None


def sources(home: Path) -> str:
    """A digest of what this repository gives to an image: the agent, how images are made, the locked wheels, the unit, and the keys that images of `home` trust. Debian's packages are not in it, they come when they are asked for."""
    return root.digest_of({**root.files_of(REPOSITORY, root.GIVES), **{f"key {name}": data for name, data in bundles.there(home).items()}})


def current(home: Path, arch: Architecture, chosen: Profile, say: Callable[[str], None], sequence: int = 0, variant: str = "") -> Built:
    """The image of this very code: the one that was built last where it is that, else one that is built now. What measures or tests an image takes it from here: an older one would tell of code that is no more. Raises FirmwareError."""
    try:
        found = finished(home, arch, chosen, variant)
        if (found.manifest.get("sources"), found.manifest["sequence"]) == (sources(home), sequence):
            return found
    except (FirmwareError, KeyError):
        pass
    return build(home, arch, chosen, say, sequence=sequence, variant=variant)


def preflight(home: Path, arch: Architecture, chosen: Profile) -> None:
    """What would fail later fails now. Raises FirmwareError."""
    tools.require(tools.BUILD)
    if platform.machine() not in MACHINES:
        raise FirmwareError("machine", f"{platform.machine()} cannot build", f"build on one of {', '.join(MACHINES)}")
    room.ready(home, "home", "--home", SPACE_BYTES + (ESP_MIB + 2 * chosen.slot_mib) * MIB)


def chosen_wheels(cache: Path, arch: Architecture, names: Sequence[str], say: Callable[[str], None]) -> list[Path]:
    """The wheels of these names that the lock has for the target, verified. Raises FirmwareError."""
    lines = recipes.locked((REPOSITORY / "requirements" / "run.lock").read_text(), names, arch.python)
    wheels = packages.wheels(cache, arch, lines, len(names), say)
    for wheel in wheels:
        if packages.digest_of(wheel) not in lines:
            raise FirmwareError(f"wheel {wheel.name}", "its SHA-256 is not in the lock", f"remove {wheel.parent} and build again")
    return wheels


def build(home: Path, arch: Architecture, chosen: Profile, say: Callable[[str], None], refresh: bool = False, sequence: int = 0, variant: str = "") -> Built:
    """Build one image into `home`; `sequence` grows with each release. Raises FirmwareError."""
    preflight(home, arch, chosen)
    keys = bundles.trusted(home)
    cache = home / "cache"
    (cache / "wheels").mkdir(parents=True, exist_ok=True)
    started = time.monotonic()
    made_of = sources(home)  # before any of it is read: an edit in between makes the image an old one

    def tell(text: str) -> None:
        say(f"[{time.monotonic() - started:5.1f} s] {text}")

    tell(f"packages of {arch.suite} for {arch.name}")
    resolved = packages.resolve(cache, arch.suite, arch.name, recipes.packages(arch, chosen), tell, refresh, chosen.kept)
    own = packages.resolve(cache, arch.suite, MACHINES[platform.machine()], ["python3-minimal", "libpython3-stdlib"], tell, refresh)
    wheels = [] if arch.debian_modules else chosen_wheels(cache, arch, chosen.wheels, tell)
    tell(f"root from {len(resolved.packages)} packages and {len(wheels)} wheels")
    tree, agent, first = root.make(cache, REPOSITORY, arch, chosen, resolved.packages, wheels, root.unpack(cache, own.packages, chosen), __version__, sequence, keys)
    with tempfile.TemporaryDirectory(dir=home) as top:
        image, manifest = _assemble(Path(top), arch, chosen, tree, first, resolved, sequence, tell)
        manifest["sources"] = made_of
        manifest["inputs"] = {
            "agent": agent, "packages": {package.name: f"{package.version} {package.sha256}" for package in resolved.packages}, "wheels": {wheel.name: packages.digest_of(wheel) for wheel in wheels},
        }
        components = [sbom.of_package(package, arch.suite) for package in resolved.packages] + [sbom.of_wheel(wheel.name, packages.digest_of(wheel)) for wheel in wheels]
        components.append(sbom.component("novacron-edge", __version__, agent, f"pkg:generic/novacron-edge@{__version__}", "application"))
        target = output(home, arch, chosen, variant)
        target.mkdir(exist_ok=True)
        (target / "manifest.json").unlink(missing_ok=True)  # its presence says that the rest is whole
        os.replace(image, target / "disk.img")
        for name in ("linux", "initrd", "root"):
            os.replace(Path(top) / name, target / name)
        packages.write_whole(target / "sbom.cdx.json", json.dumps(sbom.document(f"novacron-{chosen.name}-{arch.name}", __version__, manifest["root_hash"], components, resolved.date_s), indent=1))
        packages.write_whole(target / "manifest.json", json.dumps(manifest, indent=1))
    tell(f"{target / 'disk.img'}: root {manifest['bytes']['root'] / 1e6:.1f} MB, kernel and initrd {(manifest['bytes']['kernel'] + manifest['bytes']['initrd']) / 1e6:.1f} MB, sha256 {manifest['sha256'][:16]}")
    return Built(target / "disk.img", manifest)


def _assemble(top: Path, arch: Architecture, chosen: Profile, tree: Tree, first: Sequence[str], resolved: packages.Resolved, sequence: int, tell: Callable[[str], None]) -> tuple[Path, dict[str, Any]]:
    """Squash, hash, lay out, write; the disk and its manifest."""
    time_s = resolved.date_s
    try:
        version, kernel = initrd.kernel_of(tree)
        early, modules = initrd.make(tree, version, time_s)
    except (ValueError, KeyError) as error:
        raise FirmwareError("initrd", str(error), "see the recipe's packages") from None
    loader = next((data for path, data in tree.files("/usr/lib/systemd") if path.endswith(f"/systemd-boot{arch.efi}.efi")), None) or _boot_loader(resolved, arch, top.parent / "cache")
    initrd.drop_kernel(tree)
    tell(f"squashing {len(tree)} files")
    squashed = top / "root.squashfs"
    _squash(tree, first, squashed, time_s)
    data = squashed.read_bytes()
    data += bytes(-len(data) % BLOCK)
    (top / "root").write_bytes(data)
    salt = uuid.uuid5(_NAMESPACE, f"{arch.name} {chosen.name}").bytes * 2
    verity = hash_tree(data, salt)
    slot_bytes = chosen.slot_mib * MIB
    if len(data) + len(verity.tree) > slot_bytes - BLOCK:  # the last one counts starts
        raise FirmwareError("profile", f"the root takes {(len(data) + len(verity.tree)) // MIB} MiB, a slot of {chosen.name} holds {chosen.slot_mib}", "leave something out, or make the slot larger")
    identity = uuid.uuid5(_NAMESPACE, verity.root.hex())
    slot = slots.SLOTS[0]
    partitions, disk_bytes = gpt.lay_out([
        (ESP_NAME, "esp", ESP_MIB * MIB, uuid.uuid5(identity, "esp")), (slot, "linux", slot_bytes, uuid.uuid5(identity, "a")),
        (slots.SLOTS[1], "linux", slot_bytes, uuid.uuid5(identity, "b")), (DATA_NAME, "linux", chosen.data_mib * MIB, uuid.uuid5(identity, "data")),
    ])
    line = command_line(arch)
    options = f"{line} {slots.slot_words(slot, verity.blocks, verity.root.hex(), salt.hex())}"
    entry = slots.entry_text(f"NovaCron {chosen.name}", __version__, sequence, verity.root.hex(), options)
    (top / "linux").write_bytes(kernel.data)
    (top / "initrd").write_bytes(early)
    (top / "loader.efi").write_bytes(loader)
    tell("boot partition, data partition, disk")
    _boot_partition(top, arch, slots.folder(verity.root.hex()), slots.Entry(sequence, slot, slots.FACTORY_STARTS).name, entry, time_s, identity)
    _data_partition(top / "data.ext4", chosen.data_mib * MIB, uuid.uuid5(identity, "file system"), time_s)
    front, back = gpt.tables(partitions, disk_bytes, uuid.uuid5(identity, "disk"))
    image = top / "disk.img"
    with image.open("wb") as file:
        file.truncate(disk_bytes)
        file.write(front)
        file.seek(disk_bytes - len(back))
        file.write(back)
        file.seek(partitions[1].start)
        file.write(data + verity.tree)
        for partition, name in ((partitions[0], "esp.vfat"), (partitions[3], "data.ext4")):
            _copy_sparse(top / name, file, partition.start)
    manifest = {
        "arch": arch.name, "profile": chosen.name, "version": __version__, "suite": arch.suite, "kernel": version, "time_s": time_s, "root_hash": verity.root.hex(), "slot": slot, "sequence": sequence, "salt": salt.hex(), "blocks": verity.blocks, "command_line": line,
        "sha256": packages.digest_of(image), "disk_bytes": disk_bytes, "partitions": {part.name: {"start": part.start, "size": part.size} for part in partitions}, "initrd_modules": modules,
        "bytes": {"root": len(data) + len(verity.tree), "kernel": len(kernel.data), "initrd": len(early), "loader": len(loader)},
    }
    return image, manifest


def _boot_loader(resolved: packages.Resolved, arch: Architecture, cache: Path) -> bytes:
    """systemd-boot for the target, which the root itself has no use for."""
    found = Tree()
    package = next(package for package in resolved.packages if package.name == "systemd-boot-efi")
    with subprocess.Popen([tools.find("dpkg-deb") or "dpkg-deb", "--fsys-tarfile", str(cache / "debs" / package.file)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        take_tar(found, process.stdout, lambda path: ".efi" in path and not path.endswith(f"/systemd-boot{arch.efi}.efi"))
    for _, data in found.files("/usr/lib/systemd/boot"):
        return data
    raise FirmwareError("packages", f"systemd-boot-efi has no loader for {arch.name}", "take another suite")


def _squash(tree: Tree, first: Sequence[str], target: Path, time_s: int) -> None:
    """`first`: files that a start reads, in that order. Small files share blocks of 128 KiB, of which the kernel keeps three: read in another order than they lie in, a block is unpacked for each of them."""
    with tempfile.TemporaryFile(dir=target.parent) as archive:
        for piece in as_tar(tree.items_for_reading(first), time_s):
            archive.write(piece)
        archive.seek(0)
        tools.run(["mksquashfs", "-", str(target), "-tar", *SQUASHFS], field="root", remedy="is there room?", env={"SOURCE_DATE_EPOCH": str(time_s)}, stdin=archive)


def _boot_partition(top: Path, arch: Architecture, folder: str, entry: str, text: str, time_s: int, identity: uuid.UUID) -> None:
    """A FAT file system with systemd-boot, the kernel and its entry; files have the image's time."""
    target = top / "esp.vfat"
    with target.open("wb") as file:
        file.truncate(ESP_MIB * MIB)
    env = {"SOURCE_DATE_EPOCH": str(time_s), "MTOOLS_SKIP_CHECK": "1", "TZ": "UTC"}
    tools.run(["mkfs.vfat", "--invariant", "-F", "32", "-s", "1", "-n", "NOVACRON", "-i", identity.hex[:8], str(target)], field="boot partition", remedy="see mkfs.vfat's words", env=env)
    (top / "loader.conf").write_text("timeout 0\neditor no\nauto-entries no\nauto-firmware no\nrandom-seed-mode off\n")
    (top / "entry.conf").write_text(text)
    for inside in ("EFI", "EFI/BOOT", "loader", slots.ENTRIES, folder, "novacron"):
        tools.run(["mmd", "-i", str(target), f"::/{inside}"], field="boot partition", remedy="see mmd's words", env=env)
        if inside == slots.ENTRIES:
            _reserve(top, target, inside, env)
    _reserve(top, target, "", env)
    copies: Sequence[tuple[str, str]] = (
        ("loader.efi", f"EFI/BOOT/{arch.loader}"), ("loader.conf", "loader/loader.conf"), ("entry.conf", f"{slots.ENTRIES}/{entry}"), ("linux", f"{folder}/linux"), ("initrd", f"{folder}/initrd"),
    )
    for name, inside in copies:
        os.utime(top / name, (time_s, time_s))
        tools.run(["mcopy", "-m", "-i", str(target), str(top / name), f"::/{inside}"], field="boot partition", remedy="the boot partition may be too small (ESP_MIB)", env=env)


def _reserve(top: Path, target: Path, folder: str, env: dict[str, str]) -> None:
    """Room in a folder for names to come (`edge_runtime.updates.fat` says why): it is made longer by files that are removed again, and their places are cleaned."""
    names = [f"reserved-for-names-that-are-to-come-{number:02}" for number in range(RESERVED_NAMES)]
    with tempfile.TemporaryDirectory(dir=top) as made:
        for name in names:
            (Path(made) / name).touch()
            os.utime(Path(made) / name, (0, 0))
        tools.run(["mcopy", "-m", "-i", str(target), *(f"{made}/{name}" for name in names), f"::/{folder}"], field="boot partition", remedy="see mcopy's words", env=env)
    tools.run(["mdel", "-i", str(target), *(f"::/{folder}/{name}" for name in names)], field="boot partition", remedy="see mdel's words", env=env)
    with target.open("r+b") as file:
        def read(at: int, size: int) -> bytes:
            file.seek(at)
            return file.read(size)

        for at, data in Fat(read).cleaned(folder):
            file.seek(at)
            file.write(data)


def _data_partition(target: Path, size: int, identity: uuid.UUID, time_s: int) -> None:
    """An empty ext4. It is made here and never by the device: what a device cannot read it must not format."""
    with target.open("wb") as file:
        file.truncate(size)
    tools.run(
        ["mke2fs", "-q", "-F", "-t", "ext4", "-L", "novacron-data", "-U", str(identity), "-m", "1", "-I", "256", "-b", "4096", "-O", DATA_FEATURES, "-E", f"hash_seed={identity},root_owner=0:0,nodiscard,lazy_itable_init=1,lazy_journal_init=1", str(target)],
        field="data partition", remedy="see mke2fs's words", env={"E2FSPROGS_FAKE_TIME": str(time_s), "SOURCE_DATE_EPOCH": str(time_s), "MKE2FS_CONFIG": "/dev/null"},
    )


def _copy_sparse(source: Path, target: Any, offset: int) -> None:
    """Copy a file into the disk, leaving holes where it is zero."""
    with source.open("rb") as file:
        at = offset
        while piece := file.read(MIB):
            if piece.count(0) != len(piece):
                target.seek(at)
                target.write(piece)
            at += len(piece)
