"""Names of images in registries, and which registries there are: parsed and checked. Pure.

A name says its registry where its first part has a dot, a colon or is `localhost` (as Docker has it): `registry.example:5000/team/app:3`, `ghcr.io/org/app@sha256:...`. A name without one
means a registry only where the configuration says which (`short: true`); else it is only looked for on this node.
"""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from .errors import ImageError

MAX_REGISTRIES = 32
"""Registries that a configuration may say something about."""

MAX_MIRRORS = 8
"""Mirrors of one registry: each is tried in turn."""

DOCKER_HUB, DOCKER_HUB_HOST, DOCKER_LIBRARY = "docker.io", "registry-1.docker.io", "library/"
"""Docker's own registry: the name that images have, where it answers, and where its images of one part are."""

_HOST = re.compile(r"[A-Za-z0-9](?:[A-Za-z0-9.-]{0,250}[A-Za-z0-9])?(?::[0-9]{1,5})?\Z")
_REPOSITORY = re.compile(r"[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*(?:/[a-z0-9]+(?:(?:\.|_|__|-+)[a-z0-9]+)*)*\Z")
_TAG = re.compile(r"[A-Za-z0-9_][A-Za-z0-9._-]{0,127}\Z")
_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z")
_PARAMETER = re.compile(r'([A-Za-z_]+)\s*=\s*(?:"([^"\\]*)"|([^\s",]+))')
_KEYS = {"host": str, "mirrors": list, "insecure": bool, "ca_file": str, "short": bool}


@dataclass(frozen=True, slots=True)
class Reference:
    """An image in a registry: `digest` (64 hex digits) counts before `tag` where both are there."""

    host: str
    repository: str
    tag: str
    digest: str

    @property
    def wanted(self) -> str:
        """What a registry is asked for."""
        return f"sha256:{self.digest}" if self.digest else self.tag


@dataclass(frozen=True, slots=True)
class Host:
    """What is configured for a registry: others that are asked first, whether it is spoken to without TLS, the authorities (PEM) that it is trusted by, whether names without a registry mean it."""

    name: str
    mirrors: tuple[str, ...] = ()
    insecure: bool = False
    ca_file: str = ""
    short: bool = False

    @property
    def origin(self) -> str:
        """Where it answers."""
        return f"{'http' if self.insecure else 'https'}://{DOCKER_HUB_HOST if self.name == DOCKER_HUB else self.name}"


def hosts(entries: Iterable[Mapping[str, Any]]) -> dict[str, Host]:
    """The configuration `workloads.registries`, by name. Raises `ImageError` naming the key."""
    found: dict[str, Host] = {}
    for at, entry in enumerate(entries):
        where = f"workloads.registries[{at}]"
        for key, value in entry.items():
            if key not in _KEYS:
                raise ImageError(f"{where}.{str(key)[:40]}", "is unknown", f"known are {', '.join(_KEYS)}")
            if not isinstance(value, _KEYS[key]):
                raise ImageError(f"{where}.{key}", f"is {type(value).__name__}", f"give a {_KEYS[key].__name__}")
        mirrors = entry.get("mirrors", [])
        if len(mirrors) > MAX_MIRRORS:
            raise ImageError(f"{where}.mirrors", f"{len(mirrors)} are over {MAX_MIRRORS}", "name fewer")
        for key, name in (("host", entry.get("host", "")), *(("mirrors", mirror) for mirror in mirrors)):
            if not isinstance(name, str) or not _HOST.match(name):
                raise ImageError(f"{where}.{key}", f"{str(name)[:80]!r} is no host", "write host or host:port, without https:// and path")
        host = Host(entry["host"], tuple(mirrors), entry.get("insecure", False), entry.get("ca_file", ""), entry.get("short", False))
        if host.name in found:
            raise ImageError(f"{where}.host", f"{host.name} stands twice", "say all of one registry in one entry")
        if host.short and any(other.short for other in found.values()):
            raise ImageError(f"{where}.short", "names without a registry can mean only one", "leave it at one of them")
        found[host.name] = host
        if len(found) > MAX_REGISTRIES:
            raise ImageError("workloads.registries", f"more than {MAX_REGISTRIES}", "name fewer")
    return found


def parse(text: str, known: Mapping[str, Host]) -> Reference | None:
    """What a name means; None where it means no registry. Raises `ImageError` where it is none."""
    name, at, digest = text.partition("@")
    first, slash, rest = name.partition("/")
    if slash and ("." in first or ":" in first or first == "localhost"):
        host = first
    else:
        host, rest = next((one.name for one in known.values() if one.short), ""), name
        if not host:
            return None
    repository, colon, tag = rest.rpartition(":") if ":" in rest.rpartition("/")[2] else (rest, "", "")
    if host == DOCKER_HUB and "/" not in repository:
        repository = DOCKER_LIBRARY + repository
    match = _DIGEST.match(digest)
    for part, good, what in ((host, _HOST.match(host), "registry"), (repository, _REPOSITORY.match(repository), "name"), (tag, not colon or _TAG.match(tag), "tag"), (digest, not at or match, "digest")):
        if not good:
            raise ImageError("image", f"{part[:100]!r} is no {what} of an image", "write registry[:port]/name[:tag] or registry[:port]/name@sha256:DIGEST, names in small letters")
    return Reference(host, repository, tag or "latest", match.group(1) if match else "")


def may_follow(here: str, there: str) -> bool:
    """Whether what one address says may lead to another: over TLS, or to where we are (scheme, host and port). So no answer makes this node ask plain services in its own network."""
    try:
        one, other = urlsplit(here), urlsplit(there)
        if other.username is not None or other.password is not None or not other.hostname:
            return False
        return other.scheme == "https" or (other.scheme == one.scheme == "http" and same_origin(here, there))
    except ValueError:
        return False


def same_origin(one: str, other: str) -> bool:
    """Scheme, host and port are the same."""
    try:
        return _origin(one) == _origin(other)
    except ValueError:
        return False


def _origin(url: str) -> tuple[str, str, int]:
    parts = urlsplit(url)
    return parts.scheme, (parts.hostname or "").lower(), parts.port or (443 if parts.scheme == "https" else 80)


def challenge(headers: Iterable[str]) -> tuple[str, dict[str, str]]:
    """How a registry wants to be asked, from its WWW-Authenticate headers: (`bearer` or `basic`, parameters); empty where it says neither."""
    said: dict[str, dict[str, str]] = {}
    for header in headers:
        scheme, _, rest = header[:4096].strip().partition(" ")
        said.setdefault(scheme.lower(), {match[1].lower(): match[2] if match[2] is not None else match[3] for match in _PARAMETER.finditer(rest)})
    return next(((scheme, said[scheme]) for scheme in ("bearer", "basic") if scheme in said), ("", {}))
