"""The initrd: busybox, dmsetup with its libraries, and the drivers of what a root may lie on. Pure."""

import gzip
import lzma
import posixpath
import re
from collections.abc import Iterable, Mapping

from . import elf
from .scripts import INIT, INITRD_APPLETS, INITRD_MODULES
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


def _find(tree: Tree, asking: str, wanted: elf.Needs, name: str, folders: Iterable[str]) -> str | None:
    """Path of a library, by the file's own search path and then the loader's; None where there is none."""
    own = [folder.replace("${ORIGIN}", "$ORIGIN").replace("$ORIGIN", posixpath.dirname(asking)) for folder in wanted.folders]
    # Its own folder too: systemd's libsystemd-core finds its neighbour because systemd has loaded it before.
    candidates = [name] if name.startswith("/") else [f"{folder}/{name}" for folder in (*own, *folders, posixpath.dirname(asking))]
    return next((path for path in candidates if tree.follow(path) is not None), None)


def needs(tree: Tree, program: str) -> list[str]:
    """Paths of all libraries (and the loader) that a program needs, itself not. Raises ValueError naming one that is missing."""
    folders = library_folders(tree)
    taken: dict[str, None] = {}
    rest = [tree.resolve(program, last=True)]
    while rest:
        asking = rest.pop()
        entry = tree.follow(asking)
        assert entry is not None
        wanted = elf.needed(entry.data)
        for name in wanted.names:
            path = _find(tree, asking, wanted, name, folders)
            if path is None:
                raise ValueError(f"{asking} needs {name}")
            if path not in taken:
                taken[path] = None
                rest.append(path)
    return list(taken)


def missing_libraries(tree: Tree) -> list[str]:
    """Programs and libraries of the tree that need a library which the tree lacks; each as `PATH needs NAME`."""
    folders = library_folders(tree)
    told = []
    for path, data in tree.files():
        wanted = elf.needed(data)
        told += [f"{path} needs {name}" for name in wanted.names if _find(tree, path, wanted, name, folders) is None]
    return told


def make(tree: Tree, version: str, time_s: int) -> tuple[bytes, list[str]]:
    """The compressed initrd for the kernel `version` of the tree, and the names of the modules in it.

    Raises:
        ValueError: the tree lacks something that the initrd needs.
    """
    folder = f"/usr/lib/modules/{version}"
    made = Tree()
    for name in ("bin", "dev", "proc", "sys", "root", "lib", "usr/lib", "usr/bin", "tmp", "esp"):
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
    made.file("/init", INIT, 0o755)
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


_KERNELS = re.compile(r"/boot/vmlinu[xz]-(.+)|/usr/lib/modules/([^/]+)/vmlinu[xz]")
"""Where Debian's packages have a kernel: with 13 in /boot, later beside its modules."""


def kernel_of(tree: Tree) -> tuple[str, Entry]:
    """The one kernel of the tree: version and image. Raises ValueError where there is none, or more than one."""
    found = [(matched[1] or matched[2], entry) for path, entry in tree.items() if (matched := _KERNELS.fullmatch(path)) and entry.kind == "file"]
    if len(found) != 1:
        raise ValueError(f"{len(found)} kernels in the packages, not one")
    return found[0]


_OPTIONS = re.compile(r"/boot/config-.+|/usr/lib/modules/[^/]+/config")


def lacking(tree: Tree, version: str, modules: Iterable[str], options: Iterable[str]) -> list[str]:
    """Those of the modules (by name) and options (without CONFIG_) that the tree's kernel, whose modules are indexed, does not have."""
    folder = f"/usr/lib/modules/{version}"
    dependencies, built_in = tree[f"{folder}/modules.dep"].data.decode(), tree[f"{folder}/modules.builtin"].data.decode()
    has = {module_name(path) for path in (*parse_dependencies(dependencies), *built_in.splitlines())}
    chosen = {line for path, entry in tree.items() if _OPTIONS.fullmatch(path) and entry.kind == "file" for line in entry.data.decode().splitlines()}
    return [*(name for name in modules if name not in has), *(f"CONFIG_{name}" for name in options if f"CONFIG_{name}=y" not in chosen)]


def drop_kernel(tree: Tree) -> None:
    """Take the kernel out of the root, and how it was made: it is in the boot partition."""
    tree.drop(lambda path: path.startswith("/boot/") or _KERNELS.fullmatch(path) is not None or _OPTIONS.fullmatch(path) is not None)
