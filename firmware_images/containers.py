"""Images of containers of edge and hub, from the same packages, wheels and code as the devices' roots, as OCI layouts; no daemon is asked. What is in which is data (`SERVICES`)."""

import platform
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

from edge_runtime import __version__

from . import oci, packages, recipes, room, root, tools
from .build import MACHINES, REPOSITORY, chosen_wheels
from .errors import FirmwareError
from .initrd import missing_libraries
from .recipes import Architecture, Profile
from .tree import Tree

USER = 990
"""The user that a container's program is; the same number as on a device, so that a volume may go from one to the other."""

DATA = "/var/lib/novacron"
CONFIG = "/etc/novacron"

SPACE_BYTES = 1 << 30
"""Free space that a build wants: packages, wheels, a tree of some hundred MB at work."""

BASE_PACKAGES = ("python3-minimal", "libpython3-stdlib", "ca-certificates", "netbase", "tzdata")

MODES = ("production", "development")
"""`production`: byte code without docstrings and asserts, no shell. `development`: asserts hold, a shell, novactl, more words in the log."""


@dataclass(frozen=True, slots=True)
class Service:
    """What runs in a container: `code` are folders of the repository, `wheels` come from the lock (`debian` instead, where an architecture has none; `kept` of those packages that are LEFT_OUT elsewhere)."""

    name: str
    module: str
    code: tuple[str, ...]
    packages: tuple[str, ...]
    wheels: tuple[str, ...]
    debian: tuple[str, ...]
    arguments: tuple[str, ...]
    environment: tuple[str, ...]
    ports: tuple[int, ...]
    suffixes: tuple[str, ...] = root.AGENT_DATA
    kept: frozenset[str] = frozenset()


SERVICES = {
    service.name: service
    for service in (
        Service(
            "edge", "edge_runtime", ("edge_runtime",), (), recipes.LEAN_WHEELS, recipes.DEBIAN_MODULES, ("run",),
            (f"NOVACRON_EDGE__DATA_DIR={DATA}", "MALLOC_ARENA_MAX=1", "GLIBC_TUNABLES=glibc.malloc.tcache_count=0:glibc.malloc.mxfast=0"), (8470,),
        ),
        Service(
            # libstdc++6: numpy's compiled parts want it. mosquitto: the hub starts it as its broker; unstable's wants GnuTLS, which wants libgmp10. python3-asyncio-mqtt is aiomqtt, by the name that it once had.
            "hub", "hub", ("edge_runtime", "hub"), ("mosquitto", "libstdc++6"),
            (*recipes.LEAN_WHEELS, "aiomqtt", "click", "click-default-group", "numpy", "pluggy", "python-dateutil", "six", "sqlite-fts4", "sqlite-utils", "tabulate"),
            (*recipes.DEBIAN_MODULES, "python3-asyncio-mqtt", "python3-numpy", "sqlite-utils"), (),
            (f"NOVACRON_HUB_DATA_DIR={DATA}", "NOVACRON_HUB_LISTEN=0.0.0.0:8460", "MALLOC_ARENA_MAX=2"), (8460, 1883), (*root.AGENT_DATA, ".html", ".js", ".css", ".onnx"), frozenset({"libgmp10"}),
        ),
    )
}


def service(name: str) -> Service:
    """By name; raises FirmwareError."""
    if name not in SERVICES:
        raise FirmwareError("service", f"{name!r} is unknown", f"take one of {', '.join(SERVICES)}")
    return SERVICES[name]


def layout(home: Path, chosen: Service, mode: str) -> Path:
    """Where an image's layout is: one for each service and mode, with all architectures that were built."""
    return home / "containers" / f"{chosen.name}-{mode}"


def reference(chosen: Service, mode: str) -> str:
    """The name that the image goes by in its layout."""
    return f"novacron-{chosen.name}:{__version__}{'' if mode == 'production' else '-dev'}"


def process(chosen: Service, mode: str) -> oci.Process:
    """How it is started. Pure."""
    flags = ("-OO", "-X", "no_debug_ranges") if mode == "production" else ()
    # The agent would start itself again without asserts.
    more: Mapping[str, tuple[str, ...]] = {"edge": ("NOVACRON_EDGE__LOGGING__LEVEL=debug", "NOVACRON_NO_REEXEC=1"), "hub": ("NOVACRON_HUB_LOG_LEVEL=debug",)}
    environment = ("PATH=/usr/sbin:/usr/bin", f"HOME={DATA}", "LANG=C.UTF-8", "PYTHONDONTWRITEBYTECODE=1", "PYTHONUNBUFFERED=1", *chosen.environment, *(() if mode == "production" else more[chosen.name]))
    return oci.Process(("/usr/bin/python3", *flags, "-m", chosen.module, *chosen.arguments), environment, f"{USER}:{USER}", "/", chosen.ports, (DATA,))


def furnish(tree: Tree, chosen: Service, mode: str) -> None:
    """What is there beside packages and code: the user, folders, and in development a shell."""
    users = {"root": 0, "novacron": USER, "nobody": 65534}
    tree.file("/etc/passwd", "".join(f"{name}:x:{number}:{number}::{DATA if number == USER else '/'}:/usr/sbin/nologin\n" for name, number in users.items()))
    tree.file("/etc/group", "".join(f"{name}:x:{number}:\n" for name, number in users.items()))
    tree.file("/etc/nsswitch.conf", "passwd: files\ngroup: files\nhosts: files dns\n")
    tree.file("/usr/lib/os-release", f'NAME=NovaCron\nID=novacron\nID_LIKE=debian\nPRETTY_NAME="NovaCron {chosen.name} {__version__}"\nVERSION_ID={__version__}\nVARIANT_ID={mode}\n')
    tree.link("/etc/os-release", "../usr/lib/os-release")
    tree.link("/etc/localtime", "../usr/share/zoneinfo/Etc/UTC")
    tree.folder("/tmp", 0o1777)
    # A fresh volume takes its rights from here, and everything in the layer is root's: the sticky bit keeps others' files from being moved.
    tree.folder(DATA, 0o1777)
    tree.folder(CONFIG)
    for name in ("proc", "sys", "dev", "run", "root"):
        tree.folder(f"/{name}")
    if mode == "development":
        for applet in ("sh", "ls", "cat", "ps", "top", "vi", "wget", "nc", "grep", "find", "less", "mount", "kill", "env", "df", "du", "tail", "head", "id", "sleep"):
            tree.link(f"/usr/bin/{applet}", "busybox")


def make_root(cache: Path, arch: Architecture, chosen: Service, mode: str, say: Callable[[str], None], refresh: bool) -> tuple[Tree, int, str]:
    """The files of the image, the archive's date and the digest of our code. Raises FirmwareError."""
    wanted = [*BASE_PACKAGES, *chosen.packages, *(("busybox-static",) if mode == "development" else ()), *(chosen.debian if arch.debian_modules else ())]
    resolved = packages.resolve(cache, arch.suite, arch.name, wanted, say, refresh, chosen.kept if arch.debian_modules else frozenset())
    own = packages.resolve(cache, arch.suite, MACHINES[platform.machine()], ["python3-minimal", "libpython3-stdlib"], say, refresh)
    wheels = [] if arch.debian_modules else chosen_wheels(cache, arch, chosen.wheels, say)
    profile = Profile("container")
    tree = root.unpack(cache, resolved.packages, profile)
    for wheel in wheels:
        root.add_wheel(tree, wheel)
    code = root.add_code(tree, REPOSITORY, (*chosen.code, *(("tools/novactl",) if mode == "development" else ())), chosen.suffixes)
    root.certificates(tree)
    root.library_names(tree)
    # No init, no devices, no logins.
    tree.drop(lambda path: path.startswith(("/usr/lib/systemd", "/usr/lib/udev", "/usr/lib/tmpfiles.d", "/usr/lib/sysusers.d", "/boot", "/etc/security")))
    furnish(tree, chosen, mode)
    try:
        if lacking := missing_libraries(tree):
            raise FirmwareError("packages", "; ".join(lacking[:10]), "add the package that has it to the service, or leave out the file that needs it")
    except ValueError as error:
        raise FirmwareError("packages", str(error), "see the recipe") from None
    root.compile_python(tree, root.unpack(cache, own.packages, profile), arch.python, ("2",) if mode == "production" else ("0",))
    return tree, resolved.date_s, code


def build(home: Path, arch: Architecture, chosen: Service, mode: str, say: Callable[[str], None], refresh: bool = False) -> Path:
    """Build one image into its layout; the layout's folder. Raises FirmwareError."""
    if mode not in MODES:
        raise FirmwareError("mode", f"{mode!r} is unknown", f"take one of {', '.join(MODES)}")
    tools.require(("apt-get", "dpkg-deb"))
    if platform.machine() not in MACHINES:
        raise FirmwareError("machine", f"{platform.machine()} cannot build", f"build on one of {', '.join(MACHINES)}")
    room.ready(home, "home", "--home", SPACE_BYTES)
    started = time.monotonic()
    cache = home / "cache"
    (cache / "wheels").mkdir(parents=True, exist_ok=True)
    say(f"{reference(chosen, mode)} for {arch.name}")
    tree, date_s, code = make_root(cache, arch, chosen, mode, say, refresh)
    labels = {"org.opencontainers.image.title": f"novacron-{chosen.name}", "org.opencontainers.image.version": __version__, "org.opencontainers.image.licenses": "Apache-2.0", "org.opencontainers.image.revision": code}
    image = oci.image(tree.items(), arch.name, process(chosen, mode), labels, date_s)
    target = layout(home, chosen, mode)
    oci.add(target, reference(chosen, mode), image, MACHINES[platform.machine()])
    say(f"[{time.monotonic() - started:5.1f} s] {target}: {sum(map(len, image.blobs.values())) / 1e6:.1f} MB for {arch.name}, manifest {image.entry['digest'][:19]}")
    return target
