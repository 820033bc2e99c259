"""Putting a bundle into the slot that does not run, switching to it, and what became of that. Runs as root, beside the agent, on what `Places` names.

What must survive a power cut is on the disk before what relies on it: bytes of a piece before the progress that counts it; kernel, initrd and the plan of the trial before the boot loader's entry; the entry without a
counter before the one with a counter goes. The running slot, its kernel and its entry are never written.
"""

import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..system.disk_pace import Pace
from . import slots
from .bundle import HEAD_BYTES, Artifact, Manifest, Piece, Refused, Running, check_for, layout, open_manifest, parse_head
from .source import Interrupted, Source, open_source
from .verity import BLOCK, Hasher, Verity

SYNC_BYTES = 4 << 20
"""Bytes that are written between two syncs, each of which moves the progress on: what is fetched anew after a power cut at most."""

READ_BYTES = 1 << 20
"""Read at once when what was written is looked at."""

DOCUMENT_MAX_BYTES = 65_536
"""Of a request, the progress, the status."""

DONE = frozenset(("refused", "failed", "good"))
"""States in which an order has ended."""


@dataclass(frozen=True, slots=True)
class Places:
    """This device: its mounted boot partition, slots by name, the folder of the installer's own files, the running kernel's command line, the image's facts, and who checks signatures (message, signature)."""

    esp: Path
    slots: Mapping[str, Path]
    state: Path
    command_line: str
    image: Mapping[str, Any]
    verified: Callable[[bytes, bytes], bool]

    @property
    def running(self) -> tuple[str, str]:
        """Slot and root hash."""
        return slots.running(self.command_line)


def read_document(path: Path) -> dict[str, Any]:
    """A JSON object from a file; empty where there is none, or none that can be read. Links are not followed: the request's folder is the agent's."""
    try:
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
        with os.fdopen(handle, "rb") as file:
            value = json.loads(file.read(DOCUMENT_MAX_BYTES))
    except (OSError, ValueError, RecursionError):
        return {}
    return value if isinstance(value, dict) else {}


def _sync_folder(folder: Path) -> None:
    handle = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def write_file(path: Path, data: bytes) -> None:
    """Whole and on the disk, or not there: under another name first.

    On FAT a file's size and first cluster stand beside its name. Linux writes a new name with neither, and the two go to the disk with the file, not with its folder: without the second fsync a cut leaves the name with an empty file
    (found so on a boot loader's entry, which was passed over). The file goes first: its size is then in the same write as its name.
    """
    new = path.with_name(path.name + ".new")
    with new.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())
        os.replace(new, path)
        os.fsync(file.fileno())
    _sync_folder(path.parent)


def write_document(path: Path, value: Mapping[str, Any]) -> None:
    """A JSON object, whole and on the disk."""
    write_file(path, json.dumps(value).encode())


def remove(path: Path) -> None:
    """Gone from the disk, file or folder, where it is there."""
    if path.is_dir():
        shutil.rmtree(path)
    elif path.exists():
        path.unlink()
    else:
        return
    _sync_folder(path.parent)


class Installer:
    """One device's installer. Every method may be cut anywhere and called again."""

    def __init__(self, places: Places, say: Callable[[str], None]) -> None:
        self._places, self._say = places, say
        self._slot, self._root_hash = places.running
        self._target = slots.other(self._slot)
        self._status, self._progress, self._trial, self._note, self._firmware = (places.state / name for name in ("status.json", "progress.json", "trial.json", "note.json", "firmware.json"))

    # -- what is known -------------------------------------------------------------------------------------------------------

    @property
    def status(self) -> dict[str, Any]:
        """How the last order stands: id, state, reason, detail."""
        return read_document(self._status)

    @property
    def trial(self) -> dict[str, Any]:
        """The image that has been switched to and has not proven itself yet; empty where there is none."""
        return read_document(self._trial)

    def on_trial(self) -> bool:
        """Whether what runs is the image that has to prove itself."""
        return self.trial.get("root_hash") == self._root_hash

    def _tell(self, order: Mapping[str, Any], state: str, reason: str = "", **detail: Any) -> None:
        self._say(f"update {order.get('id')}: {state}{f': {reason}' if reason else ''}")
        write_document(self._status, {"id": order.get("id", ""), "state": state, "reason": reason, "detail": detail})

    def entries(self) -> list[tuple[slots.Entry, Path]]:
        """The boot loader's entries that are ours."""
        folder = self._places.esp / slots.ENTRIES
        return [(entry, path) for path in sorted(folder.iterdir()) if (entry := slots.parse_name(path.name)) is not None]

    # -- a turn --------------------------------------------------------------------------------------------------------------

    def settle(self) -> None:
        """After a start: what there is to learn from how it came about, and to tell."""
        self._learn()
        self._settle_trial()
        self._tell_damage()

    def to_settle(self) -> bool:
        """Whether `settle` would change the boot partition, as far as no trial is under way."""
        return (self._places.esp / slots.DAMAGED).exists() or any(entry.left is not None for entry, _ in self._mine())

    def _mine(self) -> list[tuple[slots.Entry, Path]]:
        """The entries of what runs."""
        return [(entry, path) for entry, path in self.entries() if (entry.slot, entry.sequence) == (self._slot, self._places.image["sequence"])]

    def _learn(self) -> None:
        """Whether the firmware lets the boot loader count: it has just started an entry with a counter. What a disk is made with loses its counter then: there is nothing to go back to."""
        counted = [(entry, path) for entry, path in self._mine() if entry.left is not None]
        if not counted:
            return
        found = {"counts": any(entry.done for entry, _ in counted)}
        if read_document(self._firmware) != found:
            write_document(self._firmware, found)
            self._say(f"the boot loader {'counts' if found['counts'] else 'cannot count'} starts on this firmware")
        if all(entry.slot == self._slot for entry, _ in self.entries()):
            self._keep(counted)

    def _keep(self, counted: list[tuple[slots.Entry, Path]]) -> None:
        """An entry without a counter beside the one with it, then the latter goes: between the two, either starts the same slot."""
        good = counted[0][1].with_name(slots.Entry(counted[0][0].sequence, self._slot).name)
        if not good.exists():
            write_file(good, counted[0][1].read_bytes())
        for _, path in counted:
            remove(path)

    def _left_behind(self) -> tuple[str, str, str] | None:
        """Slot, root hash and reason of a start that ended early (`slots.DAMAGED`)."""
        try:
            slot, root_hash, reason = (self._places.esp / slots.DAMAGED).read_text(errors="replace")[:DOCUMENT_MAX_BYTES].split(maxsplit=2)
        except (OSError, ValueError):
            return None
        return slot, root_hash, reason.strip()[:500]

    def _tell_damage(self) -> None:
        """What the initrd of the other slot has left behind."""
        if self.trial or not (found := self._left_behind()):
            return
        slot, root_hash, reason = found
        if slot == self._target:
            self._tell({"id": f"damaged-{root_hash[:16]}"}, "failed", f"{reason}; it was left, {self._slot} with sequence {self._places.image['sequence']} runs")
        remove(self._places.esp / slots.DAMAGED)

    def no_data(self, reason: str) -> None:
        """There is no data partition, so what is on trial cannot be known: where the boot loader counts the starts of what runs, leave `reason` for the slot that it goes back to."""
        if any(entry.left is not None for entry, _ in self._mine()):
            (self._places.esp / slots.DAMAGED).parent.mkdir(exist_ok=True)
            write_file(self._places.esp / slots.DAMAGED, f"{self._slot} {self._root_hash} {reason}\n".encode())

    def lasted(self) -> None:
        """This start has lasted: the initrd counts from zero again."""
        with self._places.slots[self._slot].open("r+b", buffering=0) as device:
            at = device.seek(0, os.SEEK_END) - BLOCK
            if os.pread(device.fileno(), BLOCK, at).strip(b"\0"):
                _write_all_at(device.fileno(), bytes(BLOCK), at)
                os.fsync(device.fileno())

    def _settle_trial(self) -> None:
        trial = self.trial
        if not trial:
            remove(self._trial)
            return
        if self.status.get("state") in DONE and self.status.get("id") == trial.get("id"):
            remove(self._places.esp / slots.DAMAGED)
            remove(self._trial)
            return
        detail = {"version": trial.get("version", ""), "sequence": trial.get("sequence", 0)}
        if self.on_trial():
            write_document(self._trial, {**trial, "came_up": int(trial.get("came_up", 0)) + 1})
            self._tell(trial, "trial", **detail)
            return
        note = read_document(self._note)
        found = next((entry for entry, _ in self.entries() if entry.slot == trial.get("slot") and entry.sequence == trial.get("sequence")), None)
        if note.get("id") == trial.get("id"):
            reason = f"the new image started and did not prove itself: {note.get('reason', '')}"
        elif found is None:
            # The plan was on the disk and the entry was not yet: nothing has been switched.
            remove(self._trial)
            self._tell(trial, "written", **detail)
            return
        else:
            came = int(trial.get("came_up", 0))
            cause = "each ended before it proved itself" if came else "kernel, root or an early program fails"
            if (left := self._left_behind()) and left[:2] == (trial.get("slot"), trial.get("root_hash")):
                cause = left[2]
            reason = f"the new image had {found.done} of {trial.get('tries')} starts, {came} of them came up, none proved itself: {cause}"
        self._clear()
        self._tell(trial, "failed", reason, **detail)
        for path in (self._places.esp / slots.DAMAGED, self._trial, self._note, self._progress):
            remove(path)

    def turn(self, order: Mapping[str, Any]) -> bool:
        """Do what the order asks (`action` install, switch, good), where that is next; whether the device shall start again. Raises Interrupted."""
        status, action = self.status, order.get("action")
        known = status.get("id") == order.get("id")
        if not isinstance(order.get("id"), str) or not order["id"]:
            return False
        if action == "install" and (not known or status.get("state") in ("checking", "writing", "waiting")):
            if self.trial:
                self._tell(order, "refused", "trial: an image is on trial; wait until it has proven itself")
                return False
            try:
                self._install(order)
            except Refused as error:
                self._tell(order, "refused", str(error), field=error.field, why=error.reason)
                self._clear()
                remove(self._progress)
            except Interrupted as error:
                self._tell(order, "waiting", str(error), bytes=read_document(self._progress).get("bytes", 0))
                raise
            except OSError as error:
                self._tell(order, "failed", f"{error.filename or 'the disk'} cannot be written or read ({error.strerror})")
        elif action == "switch" and known and status.get("state") in ("written", "switched"):
            return self._switch(order)
        elif action == "good" and known and status.get("state") == "trial" and self.on_trial():
            self._mark_good(order)
        return False

    def give_up(self, reason: str) -> None:
        """The image on trial has not proven itself: write down why, take its entry away. The next start is the other slot's."""
        trial = self.trial
        write_document(self._note, {"id": trial.get("id"), "reason": reason})
        for entry, path in self.entries():
            if entry.sequence == trial.get("sequence") and entry.slot == trial.get("slot"):
                remove(path)

    # -- installing ----------------------------------------------------------------------------------------------------------

    def _clear(self) -> None:
        """No entry and no kernel for the slot that does not run: from here on nothing can start it."""
        kept = {slots.folder(self._root_hash).lower()}
        for entry, path in self.entries():
            if entry.slot == self._target:
                remove(path)
        for path in sorted((self._places.esp / slots.ENTRIES).glob("*.new")):
            remove(path)
        for path in sorted(self._places.esp.glob("novacron-*")):
            if path.name.lower() not in kept:
                remove(path)

    def _open(self, source: Source) -> tuple[Manifest, int, str]:
        """The believed manifest, where the pieces begin, and the manifest's own digest."""
        head = source.read(0, HEAD_BYTES)
        length, _ = parse_head(head)
        raw = source.read(HEAD_BYTES, length)
        manifest = open_manifest(head, raw, self._places.verified)
        if read_document(self._firmware).get("counts") is False:
            raise Refused("firmware", "does not let the boot loader count starts (it cannot rename a file), so an image that does not come up could not be left", "take a firmware that can, or write the disk anew", "firmware")
        with self._places.slots[self._target].open("rb") as device:
            room = device.seek(0, os.SEEK_END) - BLOCK  # the last one counts starts
        image = self._places.image
        check_for(manifest, Running(image["arch"], image["profile"], image["sequence"], self._root_hash, room))
        begins = HEAD_BYTES + length
        if source.size != begins + manifest.carried:
            reason = "truncated" if source.size < begins + manifest.carried else "format"
            raise Refused("bundle", f"{source.size} bytes are not the {begins + manifest.carried} that its manifest says", "download or build it again", reason)
        return manifest, begins, hashlib.sha256(raw).hexdigest()

    def _install(self, order: Mapping[str, Any]) -> None:
        self._tell(order, "checking")
        source = open_source(dict(order))
        try:
            manifest, begins, digest = self._open(source)
            progress = read_document(self._progress)
            if (progress.get("digest"), progress.get("slot")) != (digest, self._target):
                self._clear()
                progress = {"digest": digest, "slot": self._target, "pieces": 0, "bytes": 0}
                write_document(self._progress, progress)
            about: dict[str, Any] = {"version": manifest.version, "sequence": manifest.sequence, "total": sum(part.size for part in manifest.artifacts), "carried": manifest.carried}
            self._write_root(order, manifest, source, begins, progress, about)
            verity = self._read_back(manifest)
            self._write_tree(manifest, verity)
            self._write_kernel(manifest, source, begins)
        finally:
            source.close()
        write_document(self._progress, {**progress, "manifest": {**manifest.to_json(), "root": None, "linux": None, "initrd": None}, "blocks": manifest.blocks, "whole": True})
        self._tell(order, "written", **about, bytes=about["total"])

    def _bytes_of(self, artifact: Artifact, piece: Piece, source: Source, at: int) -> bytes:
        """A piece, as its digest wants it. Raises Refused."""
        if piece.source == "data":
            data = source.read(at, piece.size)
        else:
            base = self._places.slots[self._slot] if artifact.name == "root" else self._places.esp / slots.folder(self._root_hash) / artifact.name
            with base.open("rb") as file:
                file.seek(piece.offset)
                data = file.read(piece.size)
        if hashlib.sha256(data).hexdigest() != piece.sha256:
            where = "the bundle" if piece.source == "data" else "the running slot"
            raise Refused(f"{artifact.name}.pieces", f"{piece.size} bytes of {where} do not have the digest of the manifest", "download the bundle again; take the whole one instead of a delta", "digest")
        return data

    def _write_root(self, order: Mapping[str, Any], manifest: Manifest, source: Source, begins: int, progress: dict[str, Any], about: dict[str, Any]) -> None:
        done = int(progress.get("pieces", 0))
        self._tell(order, "writing", **about, bytes=progress["bytes"])
        with self._places.slots[self._target].open("r+b", buffering=0) as device:
            unsynced, pace = 0, Pace(os.fdatasync)
            for number, (artifact, piece, at, carried) in enumerate(layout(manifest)):
                if artifact.name != "root" or number < done:
                    continue
                device.seek(at)
                _write_all(device.fileno(), self._bytes_of(artifact, piece, source, begins + carried))
                unsynced += piece.size
                pace.wrote(device.fileno(), piece.size)
                if unsynced >= SYNC_BYTES:
                    os.fsync(device.fileno())
                    unsynced = 0
                    progress.update(pieces=number + 1, bytes=at + piece.size)
                    write_document(self._progress, progress)
                    self._tell(order, "writing", **about, bytes=progress["bytes"])
            os.fsync(device.fileno())
        progress.update(pieces=len(manifest.root.pieces), bytes=manifest.root.size)
        write_document(self._progress, progress)

    def _read_back(self, manifest: Manifest) -> Verity:
        """The hash tree over what is on the disk now. Raises Refused where it is not what the manifest says."""
        hasher = Hasher(bytes.fromhex(manifest.salt))
        with self._places.slots[self._target].open("rb", buffering=0) as device:
            os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            left = manifest.root.size
            while left:
                data = os.pread(device.fileno(), min(READ_BYTES, left), manifest.root.size - left)
                if not data or len(data) % BLOCK:
                    raise Refused("root", "the slot cannot be read back", "the disk may be damaged", "verity")
                hasher.add(data)
                left -= len(data)
        verity = hasher.finish()
        if verity.root.hex() != manifest.root_hash:
            remove(self._progress)
            raise Refused("root_hash", "what is in the slot does not have it", "order the update again; build the bundle anew, or look at the disk", "verity")
        return verity

    def _write_tree(self, manifest: Manifest, verity: Verity) -> None:
        with self._places.slots[self._target].open("r+b", buffering=0) as device:
            device.seek(manifest.root.size)
            _write_all(device.fileno(), verity.tree)
            os.fsync(device.fileno())
            os.posix_fadvise(device.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
            if os.pread(device.fileno(), len(verity.tree), manifest.root.size) != verity.tree:
                raise Refused("root", "the hash tree cannot be read back", "the disk may be damaged", "verity")

    def _write_kernel(self, manifest: Manifest, source: Source, begins: int) -> None:
        folder = self._places.esp / slots.folder(manifest.root_hash)
        remove(folder)
        folder.mkdir()
        _sync_folder(self._places.esp)
        whole = {name: hashlib.sha256() for name in ("linux", "initrd")}
        for artifact, piece, at, carried in layout(manifest):
            if artifact.name == "root":
                continue
            data = self._bytes_of(artifact, piece, source, begins + carried)
            whole[artifact.name].update(data)
            with (folder / artifact.name).open("ab" if at else "wb") as file:
                file.write(data)
        for name, wanted in whole.items():
            with (folder / name).open("rb") as file:
                os.fsync(file.fileno())
                os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
                if hashlib.file_digest(file, "sha256").digest() != wanted.digest():
                    raise Refused(name, "cannot be read back from the boot partition", "the disk may be damaged", "digest")
        _sync_folder(folder)

    # -- the switch ----------------------------------------------------------------------------------------------------------

    def _switch(self, order: Mapping[str, Any]) -> bool:
        """Let the boot loader start the new slot; True: start again now."""
        progress = read_document(self._progress)
        if not progress.get("whole") or progress.get("slot") != self._target:
            self._tell(order, "failed", "what was written is not known any more: order the update again")
            return False
        told = progress["manifest"]
        entry = slots.Entry(told["sequence"], self._target, told["tries"])
        about: dict[str, Any] = {"version": told["version"], "sequence": told["sequence"]}
        write_document(self._trial, {"id": order["id"], "slot": self._target, "root_hash": told["root_hash"], "tries": told["tries"], "gate_s": told["gate_s"], "from": self._places.image["sequence"], **about})
        remove(self._note)
        options = f"{told['command_line']} {slots.slot_words(self._target, progress['blocks'], told['root_hash'], told['salt'])}"
        text = slots.entry_text(f"NovaCron {told['profile']}", told["version"], told["sequence"], told["root_hash"], options)
        write_file(self._places.esp / slots.ENTRIES / entry.name, text.encode())
        self._tell(order, "switched", **about)
        return True

    def _mark_good(self, order: Mapping[str, Any]) -> None:
        trial = self.trial
        mine = [(entry, path) for entry, path in self.entries() if (entry.sequence, entry.slot) == (int(trial["sequence"]), self._slot)]
        if not mine:
            self._tell(order, "failed", "the boot loader's entry of the running image is gone: the next start is the other slot's")
            remove(self._trial)
            return
        if counted := [(entry, path) for entry, path in mine if entry.left is not None]:
            self._keep(counted)
        self._tell(order, "good", version=trial.get("version", ""), sequence=trial.get("sequence", 0))
        for path in (self._places.esp / slots.DAMAGED, self._trial, self._note, self._progress):
            remove(path)


def _write_all_at(handle: int, data: bytes, at: int) -> None:
    os.lseek(handle, at, os.SEEK_SET)
    _write_all(handle, data)


def _write_all(handle: int, data: bytes) -> None:
    view = memoryview(data)
    while view:
        view = view[os.write(handle, view) :]


@contextmanager
def alone(state: Path) -> Iterator[None]:
    """One installer at a time; the next one waits."""
    import fcntl

    state.mkdir(parents=True, exist_ok=True)
    with (state / "lock").open("w") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield
