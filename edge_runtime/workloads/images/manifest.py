"""What an image is: index, manifest and config of OCI and of Docker, read and checked. Pure."""

import json
import platform
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from .errors import ImageError
from .layer import Limits

MAX_DOCUMENT = 4 << 20
"""Bytes of an index, manifest or config: what registries take."""

MAX_INDEX_DEPTH = 4
"""An index may name an index; real ones do so once."""

MAX_TEXTS, MAX_TEXT = 1024, 65_536
"""Arguments or environment variables of an image, and bytes of one."""

INDEXES = frozenset(("application/vnd.oci.image.index.v1+json", "application/vnd.docker.distribution.manifest.list.v2+json"))
MANIFESTS = frozenset(("application/vnd.oci.image.manifest.v1+json", "application/vnd.docker.distribution.manifest.v2+json"))
LAYERS = frozenset((
    "application/vnd.oci.image.layer.v1.tar", "application/vnd.oci.image.layer.v1.tar+gzip", "application/vnd.oci.image.layer.v1.tar+zstd",
    "application/vnd.docker.image.rootfs.diff.tar", "application/vnd.docker.image.rootfs.diff.tar.gzip", "application/vnd.docker.image.rootfs.diff.tar.zstd",
))
"""Those of foreign (non-distributable) layers are not among them: what they are is elsewhere."""

MODULES = frozenset(("application/wasm", "application/vnd.wasm.content.layer.v1+wasm", "application/vnd.module.wasm.content.layer.v1+wasm"))
"""A WebAssembly module instead of layers: as the CNCF's artefact guide has it, and as wasm-to-oci and older tools wrote it. There is one, and it is not compressed."""

MODULE_FILE = "module.wasm"
"""Its name in the folder that the store keeps of it, as if it were a layer."""

REF_NAME = "org.opencontainers.image.ref.name"
FULL_NAME = "io.containerd.image.name"
"""Annotations of an index's entry: the tag, and the whole reference as containerd and Docker write it."""

_DIGEST = re.compile(r"sha256:([0-9a-f]{64})\Z")
_ARCH = {"x86_64": "amd64", "aarch64": "arm64", "armv7l": "arm", "armv6l": "arm", "i686": "386", "riscv64": "riscv64", "ppc64le": "ppc64le", "s390x": "s390x"}
_VARIANT = {"aarch64": "v8", "armv7l": "v7", "armv6l": "v6"}
_DEFAULT_VARIANT = {"arm64": "v8", "arm": "v7"}


@dataclass(frozen=True, slots=True)
class Platform:
    """What an image was built for, in Go's names."""

    os: str = "linux"
    arch: str = "amd64"
    variant: str = ""

    @staticmethod
    def here() -> "Platform":
        """This machine's."""
        machine = platform.machine()
        return Platform("linux", _ARCH.get(machine, machine), _VARIANT.get(machine, ""))

    def takes(self, entry: Mapping[str, Any]) -> bool:
        """Whether what says this of itself runs here. An older variant of arm runs on a newer one; no variant is the architecture's usual one."""
        if entry.get("os") != self.os or entry.get("architecture") != self.arch:
            return False
        usual = _DEFAULT_VARIANT.get(self.arch, "")
        return str(entry.get("variant") or usual) <= (self.variant or usual)

    def __str__(self) -> str:
        return "/".join(part for part in (self.os, self.arch, self.variant) if part)


@dataclass(frozen=True, slots=True)
class Descriptor:
    """What points to a blob: `digest` is 64 hex digits of its SHA-256."""

    media: str
    digest: str
    size: int
    platform: Mapping[str, Any] = field(default_factory=dict)
    annotations: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Config:
    """How an image is run: arguments, environment, folder, user; and what its layers unpack to, from the lowest up. `module`: it is a WebAssembly module, of which there is no more than
    its bytes (`diff_ids` has their digest)."""

    args: tuple[str, ...]
    entrypoint: tuple[str, ...]
    env: tuple[str, ...]
    cwd: str
    user: str
    stop_signal: str
    diff_ids: tuple[str, ...]
    module: bool = False


def loads(raw: bytes, what: str) -> dict[str, Any]:
    """A JSON object of bounded size."""
    if len(raw) > MAX_DOCUMENT:
        raise ImageError(what, f"{len(raw)} bytes are over {MAX_DOCUMENT}", "build the image again")
    try:
        value: Any = json.loads(raw)
    except (ValueError, RecursionError):
        raise ImageError(what, "is not JSON", "build or copy the image again") from None
    if not isinstance(value, dict):
        raise ImageError(what, "is not a JSON object", "build or copy the image again")
    return value


def digest_of(value: Any, what: str) -> str:
    """64 hex digits of `sha256:...`."""
    match = _DIGEST.match(value) if isinstance(value, str) else None
    if match is None:
        raise ImageError(what, f"{str(value)[:80]!r} is no SHA-256 digest", "build the image with SHA-256 digests")
    return match.group(1)


def descriptor(value: Any, what: str) -> Descriptor:
    """One entry of an index or a manifest."""
    if not isinstance(value, dict):
        raise ImageError(what, "is not a JSON object", "build the image again")
    size = value.get("size")
    if not isinstance(size, int) or isinstance(size, bool) or not 0 <= size < 1 << 50:
        raise ImageError(f"{what}.size", "is not a size in bytes", "build the image again")
    known, notes = value.get("platform"), value.get("annotations")
    return Descriptor(
        str(value.get("mediaType", "")), digest_of(value.get("digest"), f"{what}.digest"), size, known if isinstance(known, dict) else {}, notes if isinstance(notes, dict) else {},
    )


def entries(index: Mapping[str, Any]) -> tuple[Descriptor, ...]:
    """What an index lists."""
    listed = index.get("manifests")
    if not isinstance(listed, list) or len(listed) > 10_000:
        raise ImageError("index.manifests", "is not a list of at most 10000 entries", "build the image again")
    return tuple(descriptor(one, f"index.manifests[{at}]") for at, one in enumerate(listed))


def named(listed: tuple[Descriptor, ...], reference: str) -> tuple[Descriptor, ...]:
    """The entries of a layout's index that a reference means: by its whole name, by its tag, by its digest."""
    tag = reference.rpartition(":")[2] if "/" not in reference.rpartition(":")[2] else ""
    by_digest = reference.rpartition("@sha256:")[2]
    for wanted in (
        [one for one in listed if one.annotations.get(FULL_NAME) == reference or one.annotations.get(REF_NAME) == reference], [one for one in listed if one.digest == by_digest],
        [one for one in listed if tag and one.annotations.get(REF_NAME) == tag and FULL_NAME not in one.annotations],
    ):
        if wanted:
            return tuple(wanted)
    return ()


def choose(listed: tuple[Descriptor, ...], here: Platform) -> Descriptor:
    """The entry for this platform: the newest variant that runs here. One that says no platform is taken where it is alone."""
    images = [one for one in listed if one.annotations.get("vnd.docker.reference.type") != "attestation-manifest"]
    fits = sorted((one for one in images if here.takes(one.platform)), key=lambda one: str(one.platform.get("variant", "")), reverse=True)
    if fits:
        return fits[0]
    unsaid = [one for one in images if not one.platform]
    if len(images) == 1 and unsaid:
        return unsaid[0]
    there = ", ".join(sorted({"/".join(str(one.platform[key]) for key in ("os", "architecture", "variant") if one.platform.get(key)) or "unsaid" for one in images})[:16]) or "nothing"
    raise ImageError("index", f"has nothing for {here} (it has {there})", f"build the image for {here} too")


def manifest(raw: bytes, limits: Limits) -> tuple[Descriptor, tuple[Descriptor, ...]]:
    """Config and layers, the lowest first."""
    value = loads(raw, "manifest")
    if value.get("schemaVersion") != 2:
        raise ImageError("manifest.schemaVersion", "is not 2", "push or save the image with a Docker of this decade")
    config = descriptor(value.get("config"), "manifest.config")
    listed = value.get("layers")
    if not isinstance(listed, list) or not listed:
        raise ImageError("manifest.layers", "is not a list with something in it", "this is no image that can be run; name one that is")
    if len(listed) > limits.layers:
        raise ImageError("manifest.layers", f"{len(listed)} layers are over {limits.layers}", "build the image with fewer layers")
    layers = tuple(descriptor(one, f"manifest.layers[{at}]") for at, one in enumerate(listed))
    if len(layers) > 1 and any(layer.media in MODULES for layer in layers):
        raise ImageError("manifest.layers", "a WebAssembly module beside other layers is no program", "put one module, and nothing else, into the artefact")
    for at, layer in enumerate(layers):
        if layer.media not in LAYERS and layer.media not in MODULES:
            raise ImageError(f"manifest.layers[{at}].mediaType", f"{layer.media[:80]!r} is no layer that can be read", "build the image with tar or gzip layers; foreign layers are not fetched")
        if layer.size > limits.layer_bytes:
            raise ImageError(f"manifest.layers[{at}].size", f"{layer.size} bytes are over {limits.layer_bytes}", "build a smaller image, or raise the limit")
    return config, layers


def config(raw: bytes, here: Platform, layers: int) -> Config:
    """How it is run; raises where it is for another platform, or does not have `layers` layers."""
    value = loads(raw, "config")
    if not here.takes(value):
        raise ImageError("config", f"the image is for {value.get('os')}/{value.get('architecture')}, this machine is {here}", f"build the image for {here}")
    root = value.get("rootfs")
    listed = root.get("diff_ids") if isinstance(root, dict) else None
    if not isinstance(listed, list) or len(listed) != layers:
        raise ImageError("config.rootfs.diff_ids", f"does not name {layers} layers", "build the image again")
    run = value.get("config") or {}
    if not isinstance(run, dict):
        raise ImageError("config.config", "is not a JSON object", "build the image again")
    entrypoint, command = texts(run.get("Entrypoint"), "config.Entrypoint"), texts(run.get("Cmd"), "config.Cmd")
    env = texts(run.get("Env"), "config.Env")
    for one in env:
        if "=" not in one or one.startswith("="):
            raise ImageError("config.Env", f"{one[:40]!r} is not NAME=VALUE", "build the image again")
    return Config(
        command, entrypoint, env, text(run.get("WorkingDir"), "config.WorkingDir") or "/", text(run.get("User"), "config.User"), text(run.get("StopSignal"), "config.StopSignal"),
        tuple(digest_of(one, f"config.rootfs.diff_ids[{at}]") for at, one in enumerate(listed)),
    )


def module_config(layer: Descriptor) -> Config:
    """That of an artefact with a WebAssembly module: what its own config says is of no use here, and a component (WASI preview 2) is refused when it is compiled."""
    return Config((), (), (), "/", "", "", (layer.digest,), module=True)


def text(value: Any, what: str) -> str:
    """A string without a zero byte; empty where there is none."""
    if value is None:
        return ""
    if not isinstance(value, str) or "\0" in value or len(value) > MAX_TEXT:
        raise ImageError(what, f"is not a text of up to {MAX_TEXT} characters without zero bytes", "build the image again")
    return value


def texts(value: Any, what: str) -> tuple[str, ...]:
    """A list of strings; empty where there is none."""
    if value is None:
        return ()
    if not isinstance(value, list) or len(value) > MAX_TEXTS:
        raise ImageError(what, f"is not a list of up to {MAX_TEXTS} texts", "build the image again")
    return tuple(text(one, what) for one in value)
