"""Debian packages and wheels: resolved once, recorded with their hashes, kept; from then on no network is needed and the same files come out.

apt works in a root of its own below the cache, so the machine's own packages are neither asked nor changed, and no root is needed.
"""

import hashlib
import json
import os
import re
import shutil
import sys
import urllib.parse
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from email.utils import parsedate_to_datetime
from pathlib import Path

from . import tools
from .errors import FirmwareError
from .recipes import LEFT_OUT, Architecture

KEYRING = "/usr/share/keyrings/debian-archive-keyring.gpg"

MIRROR, SECURITY = "http://deb.debian.org/debian", "http://deb.debian.org/debian-security"
"""What is signed needs no TLS; NOVACRON_DEBIAN_MIRROR names another mirror of the first."""

_URI = re.compile(r"^'(?P<url>[^']+)' (?P<name>\S+) (?P<size>\d+) SHA256:(?P<sha256>[0-9a-f]{64})$")

RESOLVE_REMEDY = "is the network there? (needed once; afterwards the cache is enough)"


@dataclass(frozen=True, slots=True)
class Package:
    """One file of the archive: `file` is its name in the cache."""

    name: str
    version: str
    arch: str
    file: str
    sha256: str
    url: str


@dataclass(frozen=True, slots=True)
class Resolved:
    """The packages of an image in one order, and the archive's own date (seconds since 1970): the image's time."""

    packages: tuple[Package, ...]
    date_s: int


def sources(suite: str, mirror: str) -> str:
    """apt's sources of a suite; unstable has neither updates nor a security archive."""
    text = f"Types: deb\nURIs: {mirror}\nSuites: {suite}{'' if suite == 'unstable' else f' {suite}-updates'}\nComponents: main\nSigned-By: {KEYRING}\n"
    if suite != "unstable":
        text += f"\nTypes: deb\nURIs: {SECURITY}\nSuites: {suite}-security\nComponents: main\nSigned-By: {KEYRING}\n"
    return text


def configuration(root: Path, arch: str, parts: str) -> str:
    """apt's configuration for a root of its own. A Release file may look expired by this machine's clock (Check-Valid-Until): hashes and signatures still hold."""
    return (
        f'Dir "{root}";\nDir::State "state";\nDir::State::status "{root}/status";\nDir::Cache "cache";\nDir::Etc "etc";\nDir::Etc::sourceparts "sources.list.d";\nDir::Etc::parts "{parts}";\n'
        f'Dir::Etc::preferencesparts "{root}/etc";\nDir::Bin::methods "/usr/lib/apt/methods";\nAPT::Architecture "{arch}";\nAPT::Architectures {{"{arch}";}};\n'
    )


_OPTIONS = (
    "-o", "Acquire::Check-Valid-Until=false", "-o", "Acquire::Check-Date=false", "-o", "Acquire::Languages=none", "-o", "APT::Install-Recommends=false", "-o", "APT::Sandbox::User=root", "-o", "Acquire::Retries=3",
    "-o", "APT::Get::AllowUnauthenticated=false", "-o", "Acquire::ForceHash=sha256",
)


def parse_uris(text: str) -> list[Package]:
    """What `apt-get --print-uris` says, in order of names. Raises ValueError for a file without a SHA-256."""
    found = []
    for line in text.splitlines():
        if not line.startswith("'"):
            continue
        matched = _URI.match(line)
        if matched is None:
            raise ValueError(f"apt names a file without a SHA-256: {line[:200]}")
        name, version, rest = matched["name"].split("_", 2)
        found.append(Package(name, urllib.parse.unquote(version), rest.removesuffix(".deb"), matched["name"], matched["sha256"], matched["url"]))
    return sorted(found, key=lambda package: (package.name, package.arch))


def digest_of(path: Path) -> str:
    """SHA-256 of a file, hexadecimal."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def write_whole(path: Path, text: str) -> None:
    """Write a file so that it is there whole or not at all."""
    new = path.with_name(path.name + ".new")
    new.write_text(text)
    os.replace(new, path)


def resolve(cache: Path, suite: str, arch: str, wanted: Sequence[str], say: Callable[[str], None], refresh: bool = False, kept: frozenset[str] = frozenset()) -> Resolved:
    """The packages that `wanted` needs (but LEFT_OUT, of which those `kept` stay), in the cache and verified; from the record of the last time, where there is one.

    Raises:
        FirmwareError: no record and no network, or an unknown package.
    """
    left_out = LEFT_OUT - kept
    key = hashlib.sha256("\n".join([suite, arch, *sorted(wanted), *sorted(left_out)]).encode()).hexdigest()[:16]
    record = cache / "resolved" / f"{suite}-{arch}-{key}.json"
    if record.exists() and not refresh:
        told = json.loads(record.read_text())
        resolved = Resolved(tuple(Package(**entry) for entry in told["packages"]), told["date_s"])
    else:
        resolved = _resolve(cache / "apt" / f"{suite}-{arch}", suite, arch, wanted, left_out, say)
        record.parent.mkdir(parents=True, exist_ok=True)
        write_whole(record, json.dumps({"packages": [asdict(package) for package in resolved.packages], "date_s": resolved.date_s}, indent=1))
    debs = cache / "debs"
    debs.mkdir(parents=True, exist_ok=True)
    lacking = [package for package in resolved.packages if not _whole(debs / package.file, package.sha256)]
    if lacking:
        _download(cache / "apt" / f"{suite}-{arch}", suite, arch, lacking, debs, say)
    return resolved


def _whole(path: Path, sha256: str) -> bool:
    return path.exists() and digest_of(path) == sha256


def _apt(root: Path, suite: str, arch: str) -> dict[str, str]:
    """Make apt's root; the environment that names it."""
    if not Path(KEYRING).exists():
        raise FirmwareError("tools", f"no {KEYRING}", "as root, apt install debian-archive-keyring")
    for folder in ("state/lists/partial", "cache/archives/partial", "etc/sources.list.d"):
        (root / folder).mkdir(parents=True, exist_ok=True)
    (root / "status").touch()
    (root / "etc/sources.list.d/debian.sources").write_text(sources(suite, os.environ.get("NOVACRON_DEBIAN_MIRROR", MIRROR)))
    (root / "apt.conf").write_text(configuration(root.absolute(), arch, "/etc/apt/apt.conf.d" if Path("/etc/apt/apt.conf.d").is_dir() else "parts"))
    return {"APT_CONFIG": str((root / "apt.conf").absolute())}


def _resolve(root: Path, suite: str, arch: str, wanted: Sequence[str], left_out: frozenset[str], say: Callable[[str], None]) -> Resolved:
    env = _apt(root, suite, arch)
    say(f"asking Debian {suite} for {arch}")
    tools.run(["apt-get", "-q", *_OPTIONS, "-o", "APT::Update::Error-Mode=any", "update"], field="network", remedy=RESOLVE_REMEDY, env=env)
    told = tools.run(["apt-get", "-q", "-y", *_OPTIONS, "--print-uris", "install", *wanted], field="packages", remedy="see the recipe's packages", env=env)
    try:
        packages = tuple(package for package in parse_uris(told) if package.name not in left_out)
    except ValueError as error:
        raise FirmwareError("packages", str(error), "take a mirror with SHA-256 in its index") from None
    dates = []
    for release in (root / "state/lists").glob("*Release"):
        if found := re.search(r"^Date: (.+)$", release.read_text(errors="replace"), re.MULTILINE):
            dates.append(int(parsedate_to_datetime(found[1]).timestamp()))
    return Resolved(packages, max(dates))


def _download(root: Path, suite: str, arch: str, lacking: Sequence[Package], debs: Path, say: Callable[[str], None]) -> None:
    env = _apt(root, suite, arch)
    partial = debs / "partial"
    partial.mkdir(exist_ok=True)
    say(f"fetching {len(lacking)} packages")
    for package in lacking:
        # By address and not by name: the record says which file it was, and the hash is what is believed.
        tools.run(["/usr/lib/apt/apt-helper", *_OPTIONS, "download-file", package.url, str(partial / package.file), f"SHA256:{package.sha256}"], field=f"package {package.name}",
                  remedy="the archive may have a newer one by now: build with --refresh; or " + RESOLVE_REMEDY, env=env)
        if not _whole(partial / package.file, package.sha256):
            raise FirmwareError(f"package {package.name}", "its SHA-256 is not the recorded one", "build with --refresh")
        os.replace(partial / package.file, debs / package.file)


def wheels(cache: Path, arch: Architecture, lines: str, count: int, say: Callable[[str], None]) -> list[Path]:
    """The wheels that the lock's `lines` name, for the target, hashes checked by pip; from the cache, where all are there.

    Raises:
        FirmwareError: a hash differs, there is no such wheel, no network.
    """
    key = hashlib.sha256((lines + arch.name + str(arch.python)).encode()).hexdigest()[:16]
    folder = cache / "wheels" / f"{arch.name}-{key}"
    if not folder.exists():
        new = folder.with_name(folder.name + ".new")
        shutil.rmtree(new, ignore_errors=True)
        new.mkdir(parents=True)
        (new / "requirements.txt").write_text(lines)
        say(f"fetching {count} wheels")
        version = "".join(str(part) for part in arch.python)
        platforms = [word for platform in arch.wheel_platforms for word in ("--platform", platform)]
        tools.run(
            [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check", "--require-hashes", "--no-deps", "--only-binary", ":all:", "--implementation", "cp", "--python-version", version, *platforms,
             "-d", str(new), "-r", str(new / "requirements.txt")],
            field="wheels", remedy=RESOLVE_REMEDY,
        )
        os.replace(new, folder)
    found = sorted(folder.glob("*.whl"))
    if len(found) != count:
        raise FirmwareError("wheels", f"{folder} has {len(found)} of {count}", f"remove {folder} and build again")
    return found
