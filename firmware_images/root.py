"""The root file system of an image, put together in memory from packages, wheels and our own code, and made ready for its kernel and interpreter."""

import hashlib
import posixpath
import subprocess
import tempfile
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path

from edge_runtime import start_code

from . import elf, initrd, recipes, tools
from .contents import add
from .errors import FirmwareError
from .layout import SITE, START_CODE
from .packages import Package
from .recipes import Architecture, Profile, unwanted
from .tree import Tree, take_tar

MERGED = ("bin", "sbin", "lib", "lib64")
"""Folders that are links into /usr."""

_SOURCES = (".pyx", ".pxd", ".pxi", ".c", ".h", ".pyi", ".typed", ".hash", ".cc", ".rst")
"""Files of wheels and of our code that nothing reads at run time."""

AGENT_DATA = (".py", ".json", ".portable")
"""The agent's own: code, documents, models of the portable evaluator. Those of other engines stay out where the engines do."""

GIVES = {"edge_runtime": AGENT_DATA, "firmware_images": (".py",), "tools/systemd": (".service", ".conf"), "requirements": (".lock",)}
"""What of the repository goes into an image or decides how it is made: folders, and the kinds of files in them."""

SLOWER_TWIN = ("frozenlist/_frozenlist.",)
"""Compiled parts that stay out because their package does without them: this one alone would bring the library of C++ (2.5 MB on the disk, more in memory), for lists of a few signals."""

SANE_WHEEL_BYTES = 256 << 20
"""A wheel that unpacks to more than this is not one of ours."""


def unpack(cache: Path, resolved: Sequence[Package], chosen: Profile) -> Tree:
    """The packages' files, merged. Raises FirmwareError for a damaged package."""
    tree = Tree()
    for name in MERGED:
        tree.folder(f"/usr/{name}")
        tree.link(f"/{name}", f"usr/{name}")
    for package in resolved:
        unpack_one(tree, cache / "debs" / package.file, chosen)
    return tree


def unpack_one(tree: Tree, deb: Path, chosen: Profile) -> None:
    """Put one package's files into the tree."""
    with subprocess.Popen([tools.find("dpkg-deb") or "dpkg-deb", "--fsys-tarfile", str(deb)], stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        try:
            take_tar(tree, process.stdout, lambda path: unwanted(path, chosen))
            while process.stdout.read(1 << 16):
                pass
        except ValueError as error:
            raise FirmwareError(f"package {deb.name}", str(error), "remove it from the cache and build again") from None
    if process.returncode:
        raise FirmwareError(f"package {deb.name}", f"dpkg-deb ended with {process.returncode}", "remove it from the cache and build again")


def add_wheel(tree: Tree, wheel: Path) -> None:
    """Unpack a wheel into SITE; its scripts, tests and sources of C stay out. Raises FirmwareError."""
    try:
        with zipfile.ZipFile(wheel) as archive:
            if sum(info.file_size for info in archive.infolist()) > SANE_WHEEL_BYTES:
                raise FirmwareError(f"wheel {wheel.name}", "it unpacks to too much", "look at the lock")
            for info in archive.infolist():
                name = info.filename
                parts = name.split("/")
                if name.endswith("/") or ".." in parts or name.startswith("/") or name.endswith(_SOURCES) or name.startswith(SLOWER_TWIN) or "tests" in parts or parts[0].endswith(".data") or parts[-1] in ("RECORD", "WHEEL", "top_level.txt"):
                    continue
                tree.file(f"{SITE}/{name}", archive.read(info), 0o755 if ".so" in parts[-1] else 0o644)
    except (zipfile.BadZipFile, OSError) as error:
        raise FirmwareError(f"wheel {wheel.name}", f"it cannot be read ({error})", "remove it from the cache and build again") from None


def files_of(repository: Path, kinds: Mapping[str, tuple[str, ...]]) -> dict[str, bytes]:
    """Files by their path in the repository: those below each folder that end in one of its suffixes."""
    found = sorted(path for folder, suffixes in kinds.items() for path in (repository / folder).rglob("*") if path.suffix in suffixes and "__pycache__" not in path.parts and path.is_file())
    return {path.relative_to(repository).as_posix(): path.read_bytes() for path in found}


def digest_of(files: Mapping[str, bytes]) -> str:
    """SHA-256 over names, lengths and contents."""
    digest = hashlib.sha256()
    for name, data in files.items():
        digest.update(f"{name}\0{len(data)}\0".encode() + data)
    return digest.hexdigest()


def add_code(tree: Tree, repository: Path, folders: Sequence[str], suffixes: tuple[str, ...]) -> str:
    """Our own code into SITE: files with these suffixes below these folders of the repository; the digest of what went in."""
    code = files_of(repository, dict.fromkeys(folders, suffixes))
    for name, data in code.items():
        tree.file(f"{SITE}/{name}", data)
    return digest_of(code)


def certificates(tree: Tree) -> None:
    """The authorities that Debian's maintainer script would have put together."""
    bundle = b"".join(data if data.endswith(b"\n") else data + b"\n" for path, data in tree.files("/usr/share/ca-certificates") if path.endswith(".crt"))
    tree.file("/etc/ssl/certs/ca-certificates.crt", bundle)
    tree.link("/usr/lib/ssl/cert.pem", "/etc/ssl/certs/ca-certificates.crt")
    tree.drop(lambda path: path == "/usr/share/ca-certificates")


def library_names(tree: Tree) -> None:
    """The links to libraries that Debian's maintainer scripts would have made: those of ldconfig, which not each package has itself, and those of BLAS and LAPACK, which are in folders of their own, as there may be others."""
    folders = initrd.library_folders(tree)
    for path, data in list(tree.files("/usr/lib")):
        folder, name = posixpath.split(path)
        if folder in folders and ".so" in name and (soname := elf.needed(data).soname) and "/" not in soname and f"{folder}/{soname}" not in tree:
            tree.link(f"{folder}/{soname}", name)
    for folder in folders:
        for kind in ("blas", "lapack"):
            if f"{folder}/{kind}/lib{kind}.so.3" in tree:
                tree.link(f"{folder}/lib{kind}.so.3", f"{kind}/lib{kind}.so.3")


def write_out(tree: Tree, folder: Path, under: tuple[str, ...]) -> None:
    """Files of the tree below the paths `under` (and links among them) into a folder of this machine."""
    for path, entry in tree.items():
        if not path.startswith(under):
            continue
        target = folder / path[1:]
        if entry.kind == "dir":
            target.mkdir(parents=True, exist_ok=True)
            continue
        target.parent.mkdir(parents=True, exist_ok=True)
        if entry.kind == "link":
            target.symlink_to(entry.target if not entry.target.startswith("/") else folder / entry.target[1:])
        else:
            target.write_bytes(entry.data)
            target.chmod(entry.mode | 0o600)


def compile_python(tree: Tree, interpreter: Tree, python: tuple[int, int], levels: Sequence[str] = ("2",)) -> int:
    """Byte code (for `-OO`, or for the `levels` of optimisation), made by the interpreter of the same version for this machine; how many files.

    Missing byte code costs the agent 8 MiB and a second. It is not checked against its source (the root cannot change), so it depends on no time.
    """
    version = f"{python[0]}.{python[1]}"
    with tempfile.TemporaryDirectory() as top:
        own, sources_at = Path(top) / "python", Path(top) / "sources"
        command, environment = _write_interpreter(interpreter, own, version)
        sources = [(path, data) for path, data in tree.files("/usr/lib") if path.endswith(".py") and path.startswith(("/usr/lib/python3", f"/usr/lib/python{version}"))]
        for path, data in sources:
            (sources_at / path[1:]).parent.mkdir(parents=True, exist_ok=True)
            (sources_at / path[1:]).write_bytes(data)
        tools.run(
            [*command, "-S", "-m", "compileall", "-q", *(word for level in levels for word in ("-o", level)), "--invalidation-mode", "unchecked-hash", "-s", str(sources_at), "-p", "/", str(sources_at)],
            field="compile", remedy="see the file that is named", env={**environment, "PYTHONDONTWRITEBYTECODE": "", "PYTHONPATH": ""},
        )
        count = 0
        for made in sorted(sources_at.rglob("*.pyc")):
            tree.file("/" + made.relative_to(sources_at).as_posix(), made.read_bytes())
            count += 1
    return count


def _write_interpreter(interpreter: Tree, own: Path, version: str) -> tuple[list[str], dict[str, str]]:
    """Write Debian's Python for this machine into a folder; the words that start it, and their environment."""
    write_out(interpreter, own, ("/usr/bin/python", "/usr/lib", "/lib", "/lib64"))
    loader = next((own / path[1:] for path, _ in interpreter.items() if path.startswith("/usr/lib") and "/ld-linux" in path), None)
    if loader is None:
        raise FirmwareError("tools", "Debian's packages for this machine have no loader", "build on amd64, arm64 or riscv64")
    libraries = ":".join(str(own / folder[1:]) for folder in initrd.library_folders(interpreter))
    return [str(loader), "--library-path", libraries, str(own / f"usr/bin/python{version}")], {"PYTHONHOME": str(own / "usr"), "PYTHONHASHSEED": "0"}


PYC_HEADER_BYTES = 16
"""Before the byte code: magic number, flags, and the source's hash or time and size (PEP 552)."""

_START = """
import sys
import edge_runtime.cli
from edge_runtime.lean_imports import import_asyncio, leave_out_openssl, leave_out_typing
with leave_out_typing():
    import edge_runtime.config, edge_runtime.config.prototype
leave_out_openssl()
import_asyncio()
with leave_out_typing():
    import sqlite3, edge_runtime.logs, edge_runtime.runtime, edge_runtime.devices.host, edge_runtime.updates.duty
ready = set(sys.modules)
import edge_runtime.local_api.server
for name, module in sys.modules.items():
    spec = getattr(module, "__spec__", None)
    if getattr(spec, "cached", None):
        print(name, spec.cached, spec.origin, int(spec.submodule_search_locations is not None), int(name in ready), sep="\t")
"""


_TAKEN = "import sys; from edge_runtime import start_code; print(start_code.use(sys.argv[1]))"
"""Whether an agent will take its start from the file. Where it does not it says nothing, and is slow."""


def start_order(tree: Tree, interpreter: Tree, python: tuple[int, int]) -> list[str]:
    """Files that the agent's start reads, in the order of its imports, as this machine's build of the same Python has it: one with the byte code of all that it loads until it is ready, which is made here, and the byte code of what it loads after
    that. Modules that are compiled for the target are not among them."""
    with tempfile.TemporaryDirectory() as top:
        own, agent = Path(top) / "python", Path(top) / "agent"
        command, environment = _write_interpreter(interpreter, own, f"{python[0]}.{python[1]}")
        write_out(tree, agent, (f"{SITE}/edge_runtime/",))
        told = tools.run([*command, "-S", "-P", "-OO", "-c", _START], field="order of files", remedy="see the module that is named", env={**environment, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(agent / SITE[1:])})
        found: list[str] = []
        modules = []
        codes = dict(tree.files("/usr/lib"))
        for line in told.splitlines():
            name, cached, source, package, ready = line.split("\t")
            base = next((str(base) for base in (own, agent) if cached.startswith(f"{base}/")), None)
            if base is None or (path := cached.removeprefix(base)) not in tree:
                continue
            found.append(path)
            if ready == "1":
                modules.append((name, source.removeprefix(base), package == "1", codes[path][PYC_HEADER_BYTES:]))
        packed = start_code.pack(start_code.tag(f"cpython-{python[0]}{python[1]}", 2), modules)
        (Path(top) / "code").write_bytes(packed)
        taken = tools.run([*command, "-S", "-P", "-OO", "-c", _TAKEN, str(Path(top) / "code")], field="start code", remedy="see edge_runtime.start_code", env={**environment, "PYTHONDONTWRITEBYTECODE": "1", "PYTHONPATH": str(agent / SITE[1:])})
    if taken.strip() != "True":
        raise FirmwareError("start code", f"Python {python[0]}.{python[1]} does not take it", "see edge_runtime.start_code")
    tree.file(START_CODE, packed)
    if not any(path.startswith(f"{SITE}/edge_runtime/") for path in found):  # as where the folder that the build runs in has an agent of its own
        raise FirmwareError("order of files", "the agent's byte code is not among what its start reads", "see start_order")
    return [START_CODE, *found]


def index_modules(tree: Tree, version: str) -> None:
    """What depmod would write, into the tree."""
    with tempfile.TemporaryDirectory() as top:
        folder = f"/usr/lib/modules/{version}"
        write_out(tree, Path(top), (folder + "/",))
        (Path(top) / "lib").symlink_to("usr/lib")
        tools.run(["depmod", "-b", top, version], field="kernel", remedy="see depmod's words")
        for path in sorted((Path(top) / folder[1:]).glob("modules.*")):
            tree.file(f"{folder}/{path.name}", path.read_bytes())


def make(cache: Path, repository: Path, arch: Architecture, chosen: Profile, resolved: Sequence[Package], wheels: Sequence[Path], interpreter: Tree, version: str, sequence: int, keys: Mapping[str, bytes]) -> tuple[Tree, str, list[str]]:
    """The finished root, the agent's digest, and the byte code that a start reads, in its order. /boot is still in it.

    Raises:
        FirmwareError: a library is missing, a file cannot be read.
    """
    tree = unpack(cache, resolved, chosen)
    for wheel in wheels:
        add_wheel(tree, wheel)
    agent = add_code(tree, repository, ("edge_runtime",), AGENT_DATA)
    certificates(tree)
    units = repository / "tools" / "systemd"
    add(tree, arch, chosen, (units / "novacron-edge.service").read_text(), (units / "novacron-edge.service.d" / "containers.conf").read_text(), version, sequence, keys)
    try:
        if lacking := initrd.missing_libraries(tree):
            raise FirmwareError("packages", "; ".join(lacking[:10]), "take the package that has it out of LEFT_OUT, or leave out the file that needs it")
        kernel = initrd.kernel_of(tree)[0]
        index_modules(tree, kernel)
        if chosen.kernel_modules and (lacking := initrd.lacking(tree, kernel, chosen.kernel_modules, recipes.HOST_OPTIONS.get(arch.name, ()))):
            raise FirmwareError("profile", f"the kernel {kernel} of {arch.name} lacks {', '.join(lacking)}, which {chosen.name} needs", "take another kernel, or another profile")
    except ValueError as error:
        raise FirmwareError("packages", str(error), "see the recipe") from None
    compile_python(tree, interpreter, arch.python)
    return tree, agent, start_order(tree, interpreter, arch.python)
