"""The initrd: busybox, dmsetup with its libraries, and the drivers of what a root may lie on. Pure."""

import gzip
import lzma
import posixpath
from collections.abc import Iterable, Mapping

from . import elf
from .contents import INITRD_APPLETS, INITRD_MODULES, initrd_init
from .tree import Entry, Tree, as_cpio

MODULE_MAX_BYTES = 64 << 20
"""A module is never larger than this when it is unpacked; the largest are some 10 MiB."""


def parse_dependencies(text: str) -> dict[str, tuple[str, ...]]:
    """`modules.dep`: a module's path to the paths that it needs, all relative to the modules' folder."""
    found = {}
    for line in text.splitlines():
        name, colon, rest = line.partition(":")
        if colon:
            found[name] = tuple(rest.split())
    return found


def module_name(path: str) -> str:
    """The kernel's name of a module, with underscores."""
    return posixpath.basename(path).partition(".ko")[0].replace("-", "_")


def closure(wanted: Iterable[str], dependencies: Mapping[str, tuple[str, ...]]) -> list[str]:
    """Paths of the modules `wanted` (by name) that there are, and of all they need."""
    names = {name.replace("-", "_") for name in wanted}
    taken: set[str] = set()
    rest = [path for path in dependencies if module_name(path) in names]
    while rest:
        path = rest.pop()
        if path not in taken:
            taken.add(path)
            rest.extend(dependencies.get(path, ()))
    return sorted(taken)


def unpacked(path: str, data: bytes) -> bytes:
    """A module as the initrd's modprobe can load it. Raises ValueError for a compression that is not known."""
    if path.endswith(".ko"):
        return data
    if path.endswith(".ko.xz"):
        whole = lzma.LZMADecompressor(memlimit=MODULE_MAX_BYTES).decompress(data, MODULE_MAX_BYTES)
        if len(whole) >= MODULE_MAX_BYTES:
            raise ValueError(f"{path}: larger than {MODULE_MAX_BYTES} bytes")
        return whole
    raise ValueError(f"{path}: its compression is not known")


def library_folders(tree: Tree) -> list[str]:
    """Where the loader looks, the architecture's own folders first."""
    multiarch = sorted({posixpath.dirname(path) for path, _ in tree.files("/usr/lib") if posixpath.basename(path).startswith(("libc.so", "ld-linux"))})
    return [*multiarch, "/usr/lib", "/usr/lib64"]


def needs(tree: Tree, program: str) -> list[str]:
    """Paths of all libraries (and the loader) that a program needs, itself not. Raises ValueError naming one that is missing."""
    folders = library_folders(tree)
    taken: dict[str, None] = {}
    rest = [tree.resolve(program, last=True)]
    while rest:
        entry = tree.follow(rest.pop())
        assert entry is not None
        for name in elf.needed(entry.data):
            candidates = [name] if name.startswith("/") else [f"{folder}/{name}" for folder in folders]
            path = next((path for path in candidates if tree.follow(path) is not None), None)
            if path is None:
                raise ValueError(f"{program} needs {name}")
            if path not in taken:
                taken[path] = None
                rest.append(path)
    return list(taken)


def missing_libraries(tree: Tree) -> list[str]:
    """Programs and libraries of the tree that need a library which the tree lacks; each as `PATH needs NAME`. A library beside the one that asks for it counts as found."""
    folders = library_folders(tree)
    there = {posixpath.basename(path) for path, entry in tree.items() if entry.kind in ("file", "link") and ".so" in path}
    told = []
    for path, data in tree.files():
        for name in elf.needed(data):
            if name.startswith("/"):
                if tree.follow(name) is None:
                    told.append(f"{path} needs {name}")
            elif not any(tree.follow(f"{folder}/{name}") is not None for folder in (posixpath.dirname(path), *folders)) and not (name in there and _private(path)):
                told.append(f"{path} needs {name}")
    return told


def _private(path: str) -> bool:
    """Whether the file may have a search path of its own (systemd's, a wheel's)."""
    return "/systemd" in path or "/dist-packages/" in path or posixpath.basename(path) in ("udevadm", "systemctl", "journalctl", "networkctl", "resolvectl", "busctl", "bootctl", "timedatectl") or path.startswith("/usr/bin/systemd-")


def make(tree: Tree, version: str, time_s: int) -> tuple[bytes, list[str]]:
    """The compressed initrd for the kernel `version` of the tree, and the names of the modules in it.

    Raises:
        ValueError: the tree lacks something that the initrd needs.
    """
    folder = f"/usr/lib/modules/{version}"
    made = Tree()
    for name in ("bin", "dev", "proc", "sys", "root", "lib", "usr/lib", "usr/bin", "tmp"):
        made.folder(f"/{name}")
    for name in ("lib64", "sbin"):
        made.link(f"/{name}", "lib" if name == "lib64" else "bin")
    for program in ("/usr/bin/busybox", "/usr/sbin/dmsetup"):
        entry = tree.follow(program)
        if entry is None:
            raise ValueError(f"there is no {program}")
        made.put("/bin/" + posixpath.basename(program), entry)
        for path in needs(tree, program):
            library = tree.follow(path)
            assert library is not None
            made.put(path if path.startswith("/lib") else "/lib/" + path.removeprefix("/usr/lib/"), library)
    for applet in INITRD_APPLETS:
        made.link(f"/bin/{applet}", "busybox")
    made.file("/init", initrd_init(), 0o755)
    dependencies = parse_dependencies(tree[f"{folder}/modules.dep"].data.decode())
    modules = closure(INITRD_MODULES, dependencies)
    plain = {path: path.partition(".ko")[0] + ".ko" for path in dependencies}
    for path in modules:
        made.file(f"/lib/modules/{version}/{plain[path]}", unpacked(path, tree[f"{folder}/{path}"].data))
    kept = set(modules)
    made.file(f"/lib/modules/{version}/modules.dep", "".join(f"{plain[path]}: {' '.join(plain[other] for other in dependencies[path])}\n" for path in modules))
    names = {module_name(path) for path in kept}
    aliases = tree[f"{folder}/modules.alias"].data.decode().splitlines()
    made.file(f"/lib/modules/{version}/modules.alias", "".join(f"{line}\n" for line in aliases if line.startswith("alias ") and line.split()[-1].replace("-", "_") in names))
    made.file(f"/lib/modules/{version}/modules.symbols", "")
    return gzip.compress(as_cpio(made.items(), time_s), compresslevel=9, mtime=0), sorted(names)


def kernel_of(tree: Tree) -> tuple[str, Entry]:
    """The one kernel of the tree: version and image. Raises ValueError where there is none, or more than one."""
    found = [(path.removeprefix("/boot/").partition("-")[2], entry) for path, entry in tree.items() if path.startswith(("/boot/vmlinuz-", "/boot/vmlinux-")) and entry.kind == "file"]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels in /boot, not one")
    return found[0]
