"""Where an image comes from: an OCI layout (a folder or a tar archive of one), or what `docker save` writes. A registry will be a third.

A source is read into a `Plan` before anything is kept: documents verified by their digests, layers named and sized; then each layer is opened once.
"""

import os
import stat
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import Any, BinaryIO, Protocol

from . import manifest as documents
from .errors import ImageError
from .layer import Limits, packed
from .manifest import Config, Descriptor, Platform
from .tar import FILE, HARD_LINK, SYMLINK, TarError, TarReader

MAX_ARCHIVE_MEMBERS = 20_000
"""Files of an archive that holds images: each layer has up to four."""

MAX_LINKS = 8
"""Links from name to name in an archive; `docker save` of old made one."""

PLAIN_LAYER = "application/vnd.oci.image.layer.v1.tar"


@dataclass(frozen=True, slots=True)
class Layer:
    """One layer of a plan. `digest` is empty where the source tells none (then its `diff_id` is what it is held against)."""

    media: str
    digest: str
    size: int
    diff_id: str
    open: Callable[[], BinaryIO]


@dataclass(frozen=True, slots=True)
class Plan:
    """An image that could be taken: `digest` of its manifest (of its config, where there is no manifest), the names it goes by there, its config, its layers from the lowest up."""

    digest: str
    names: tuple[str, ...]
    config: Config
    layers: tuple[Layer, ...]


class Files(Protocol):
    """Named files, below a folder or in an archive."""

    def open(self, name: str) -> BinaryIO | None:
        """Open for reading; None where it is not there."""

    def size(self, name: str) -> int | None:
        """Bytes of it."""


class FolderFiles:
    """Files below a folder; no link is followed."""

    def __init__(self, root: Path) -> None:
        self._root = root

    def open(self, name: str) -> BinaryIO | None:
        here = os.open(self._root, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
        parts = name.split("/")
        try:
            for at, part in enumerate(parts):
                last = at == len(parts) - 1
                below = os.open(part, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK | (0 if last else os.O_DIRECTORY), dir_fd=here)
                os.close(here)
                here = below
            if not stat.S_ISREG(os.fstat(here).st_mode):
                os.close(here)
                return None
            return os.fdopen(here, "rb")
        except FileNotFoundError:
            os.close(here)
            return None
        except OSError as error:
            os.close(here)
            raise ImageError(name, f"cannot be read: {error.strerror}", "give a folder of plain files") from None

    def size(self, name: str) -> int | None:
        handle = self.open(name)
        if handle is None:
            return None
        with handle:
            return os.fstat(handle.fileno()).st_size


class _Part:
    """A piece of an archive, as a stream of its own."""

    def __init__(self, path: Path, offset: int, size: int) -> None:
        self._handle = open(path, "rb")  # noqa: SIM115 - closed by close()
        self._handle.seek(offset)
        self._left = size

    def read(self, most: int = -1) -> bytes:
        data = self._handle.read(self._left if most < 0 else min(most, self._left))
        self._left -= len(data)
        return data

    def close(self) -> None:
        self._handle.close()

    def __enter__(self) -> "_Part":
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class ArchiveFiles:
    """Files of a tar archive: found once, then read where they are. Links in it are followed by name only, within it."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._where: dict[str, tuple[int, int]] = {}
        self._links: dict[str, str] = {}
        with open(path, "rb") as handle:
            try:
                reader = _IndexReader(handle, MAX_ARCHIVE_MEMBERS)
                for member in reader:
                    name = _normal(member.name.decode("utf-8", "surrogateescape"))
                    if member.kind == FILE:
                        self._where[name] = (member.offset, member.size)
                    elif member.kind == SYMLINK:
                        self._links[name] = _normal(f"{name.rpartition('/')[0]}/{member.target.decode('utf-8', 'surrogateescape')}")
                    elif member.kind == HARD_LINK:
                        self._links[name] = _normal(member.target.decode("utf-8", "surrogateescape"))
            except TarError as error:
                raise ImageError("archive", error.problem, error.remedy) from None

    def _find(self, name: str) -> tuple[int, int] | None:
        for _ in range(MAX_LINKS):
            if name in self._where:
                return self._where[name]
            if name not in self._links:
                return None
            name = self._links[name]
        return None

    def open(self, name: str) -> BinaryIO | None:
        found = self._find(_normal(name))
        return None if found is None else _Part(self._path, *found)  # type: ignore[return-value]

    def size(self, name: str) -> int | None:
        found = self._find(_normal(name))
        return None if found is None else found[1]


class _IndexReader(TarReader):
    """Jumps over data instead of reading it. A member that reaches past the archive's end is found where it is read."""

    def _skip(self) -> None:
        self._stream.seek(self._left + self._padding, os.SEEK_CUR)
        self._offset += self._left + self._padding
        self._left = self._padding = 0


def _normal(name: str) -> str:
    """A name without `.`, `..` and doubled slashes; what would lead out of the archive stays at its top."""
    parts: list[str] = []
    for part in name.split("/"):
        if part == "..":
            del parts[-1:]
        elif part not in ("", "."):
            parts.append(part)
    return "/".join(parts)


def opened(path: Path) -> Files:
    """The files of a source; raises `ImageError` where there is none."""
    try:
        mode = os.stat(path).st_mode
        if stat.S_ISDIR(mode):
            return FolderFiles(path)
        if stat.S_ISREG(mode):
            return ArchiveFiles(path)
    except OSError as error:
        raise ImageError("source", f"{path} cannot be read: {error.strerror}", "look at its path and rights") from None
    raise ImageError("source", f"{path} is neither a folder nor a file", "name an OCI layout, or an archive of one")


def plan(files: Files, reference: str, here: Platform, limits: Limits, *, strict: bool = False) -> Plan:
    """Read what an image is. `reference` chooses among several; empty: there must be one. `strict`: the only one must go by it too."""
    if files.size("oci-layout") is not None:
        return _oci(files, reference, here, limits, strict)
    if files.size("manifest.json") is not None:
        return _docker(files, reference, here, limits, strict)
    raise ImageError("source", "has neither oci-layout nor manifest.json", "make it with `docker save`, `podman save`, `skopeo copy ... oci-archive:FILE` or `buildx --output type=oci`")


def _whole(files: Files, name: str, what: str) -> bytes:
    handle = files.open(name)
    if handle is None:
        raise ImageError(what, f"{name[:100]} is missing", "copy the image again")
    with handle:
        raw = handle.read(documents.MAX_DOCUMENT + 1)
    if len(raw) > documents.MAX_DOCUMENT:
        raise ImageError(what, f"more than {documents.MAX_DOCUMENT} bytes", "build the image again")
    return raw


def _blob(files: Files, pointer: Descriptor, what: str) -> bytes:
    raw = _whole(files, f"blobs/sha256/{pointer.digest}", what)
    if len(raw) != pointer.size or sha256(raw).hexdigest() != pointer.digest:
        raise ImageError(what, f"is not what its digest sha256:{pointer.digest} says", "copy the image again: it was damaged or changed")
    return raw


def _oci(files: Files, reference: str, here: Platform, limits: Limits, strict: bool) -> Plan:
    layout = documents.loads(_whole(files, "oci-layout", "oci-layout"), "oci-layout")
    if layout.get("imageLayoutVersion") != "1.0.0":
        raise ImageError("oci-layout", f"version {str(layout.get('imageLayoutVersion'))[:20]!r} is not 1.0.0", "write the layout again with a current tool")
    listed = documents.entries(documents.loads(_whole(files, "index.json", "index.json"), "index.json"))
    if reference:
        # A layout with one image under another name, or under none, is meant as well: what is asked for becomes its name here.
        listed = documents.named(listed, reference) or (listed if len({one.digest for one in listed}) == 1 and not strict else ())
        if not listed:
            raise ImageError("reference", f"{reference[:100]} is not in it", "name one that is: see index.json")
    elif len({one.annotations.get(documents.FULL_NAME, one.annotations.get(documents.REF_NAME)) for one in listed}) > 1:
        raise ImageError("reference", "it holds several images", "say which one")
    names = tuple(dict.fromkeys(name for one in listed for key in (documents.FULL_NAME, documents.REF_NAME) if isinstance(name := one.annotations.get(key), str)))
    chosen = listed[0] if len(listed) == 1 else documents.choose(listed, here)
    for _ in range(documents.MAX_INDEX_DEPTH):
        raw = _blob(files, chosen, "manifest")
        if chosen.media not in documents.INDEXES:
            break
        chosen = documents.choose(documents.entries(documents.loads(raw, "index")), here)
    else:
        raise ImageError("index", f"indexes are nested over {documents.MAX_INDEX_DEPTH} deep", "build the image again")
    if chosen.media not in documents.MANIFESTS:
        raise ImageError("manifest", f"{chosen.media[:80]!r} is no image", "name an image; other artefacts cannot be run")
    config_pointer, pointers = documents.manifest(raw, limits)
    raw = _blob(files, config_pointer, "config")
    config = documents.module_config(pointers[0]) if pointers[0].media in documents.MODULES else documents.config(raw, here, len(pointers))
    layers = []
    for at, (pointer, diff_id) in enumerate(zip(pointers, config.diff_ids, strict=True)):
        size = files.size(f"blobs/sha256/{pointer.digest}")
        if size != pointer.size:
            raise ImageError(f"layers[{at}]", "is missing" if size is None else f"has {size} bytes, the manifest says {pointer.size}", "copy the image again")
        layers.append(Layer(pointer.media, pointer.digest, pointer.size, diff_id, _opener(files, f"blobs/sha256/{pointer.digest}", f"layers[{at}]")))
    return Plan(chosen.digest, names, config, tuple(layers))


def _docker(files: Files, reference: str, here: Platform, limits: Limits, strict: bool) -> Plan:
    raw = _whole(files, "manifest.json", "manifest.json")
    listed: Any = documents.loads(b'{"images":' + raw + b"}", "manifest.json").get("images")
    if not isinstance(listed, list) or not all(isinstance(one, dict) for one in listed):
        raise ImageError("manifest.json", "is not a list of images", "save the image again")
    found = [one for one in listed if reference in documents.texts(one.get("RepoTags"), "RepoTags")] if reference else listed
    found = found or (listed if len(listed) == 1 and not strict else [])
    if len(found) != 1:
        raise ImageError("reference", f"{reference[:100] or 'no name'} does not mean one of the {len(listed)} images in it", "say which one")
    entry: Mapping[str, Any] = found[0]
    raw = _whole(files, documents.text(entry.get("Config"), "manifest.json.Config"), "config")
    digest = sha256(raw).hexdigest()
    if digest not in str(entry["Config"]):
        raise ImageError("config", f"is not what its name {str(entry['Config'])[:100]} says", "copy the image again: it was damaged or changed")
    paths = documents.texts(entry.get("Layers"), "manifest.json.Layers")
    if not 0 < len(paths) <= limits.layers:
        raise ImageError("manifest.json.Layers", f"{len(paths)} layers are not 1 to {limits.layers}", "build the image with fewer layers")
    config = documents.config(raw, here, len(paths))
    layers = []
    for at, (path, diff_id) in enumerate(zip(paths, config.diff_ids, strict=True)):
        size = files.size(path)
        if size is None or size > limits.layer_bytes:
            raise ImageError(f"layers[{at}]", "is missing" if size is None else f"{size} bytes are over {limits.layer_bytes}", "copy the image again" if size is None else "build a smaller image")
        open_it = _opener(files, path, f"layers[{at}]")
        with open_it() as handle:
            how = packed(handle.read(4))
        media = PLAIN_LAYER + (f"+{how}" if how else "")
        layers.append(Layer(media, "", size, diff_id, open_it))
    return Plan(digest, documents.texts(entry.get("RepoTags"), "RepoTags"), config, tuple(layers))


def _opener(files: Files, name: str, what: str) -> Callable[[], BinaryIO]:
    def open_it() -> BinaryIO:
        handle = files.open(name)
        if handle is None:
            raise ImageError(what, "is missing", "copy the image again")
        return handle

    return open_it
