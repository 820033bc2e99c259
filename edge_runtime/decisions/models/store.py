"""Model artefacts on disk by content address: what arrived is kept under its hash, one is active, the last good one stays.

    <dir>/<sha256>.data   <dir>/<sha256>.json (its manifest)   <dir>/active.json {"name": {"current": sha, "good": sha}}
"""

import hashlib
import json
import os
from pathlib import Path
from typing import Any

from .manifest import ModelError, ModelManifest, read_manifest
from .model import Model, load_model


class ModelStore:
    """Artefacts below `directory`."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        directory.mkdir(parents=True, exist_ok=True)

    def _state(self) -> dict[str, dict[str, str]]:
        try:
            value: Any = json.loads((self.directory / "active.json").read_bytes())
        except (OSError, ValueError):
            return {}
        return {name: entry for name, entry in value.items() if isinstance(entry, dict)} if isinstance(value, dict) else {}

    def _write(self, name: str, data: bytes) -> None:
        path = self.directory / name
        temporary = path.with_name(name + ".new")
        with open(temporary, "wb") as handle:
            handle.write(data)
            handle.flush()
            os.fsync(handle.fileno())
        os.replace(temporary, path)

    def put(self, manifest_raw: bytes, data: bytes) -> ModelManifest:
        """Keep an artefact; raises `ModelError` where size or hash are not the manifest's. The active model does not change."""
        manifest = read_manifest(manifest_raw)
        if len(data) != manifest.size_bytes:
            raise ModelError("size_bytes", f"the data has {len(data)} bytes, the manifest says {manifest.size_bytes}", "send the manifest that belongs to it")
        digest = hashlib.sha256(data).hexdigest()
        if digest != manifest.sha256:
            raise ModelError("sha256", f"the data has {digest}, the manifest says {manifest.sha256}", "send the model again")
        self._write(f"{digest}.data", data)
        self._write(f"{digest}.json", manifest_raw)
        return manifest

    def load(self, digest: str) -> Model:
        """Load and try a kept artefact; raises `ModelError`. Nothing changes on the disk."""
        try:
            manifest = read_manifest((self.directory / f"{digest}.json").read_bytes())
        except OSError as error:
            raise ModelError("sha256", f"no artefact {digest[:16]}... is here ({error.strerror})", "send the model again") from None
        return load_model(manifest, self.directory / f"{digest}.data")

    def activate(self, loaded: dict[str, Model]) -> None:
        """Make these models, which have been loaded, the ones in force, all at once; what was in force before is kept as the last good one."""
        state = self._state()
        for name, model in loaded.items():
            entry = state.setdefault(name, {})
            if entry.get("current") != model.manifest.sha256:
                entry["good"], entry["current"] = entry.get("current", ""), model.manifest.sha256
        self._write("active.json", json.dumps(state).encode())
        self._prune(state)

    def active(self, name: str) -> tuple[Model, list[ModelError]]:
        """The model in force, or the last good one where that cannot be loaded any more, and what was wrong; raises `ModelError` where neither can."""
        entry = self._state().get(name, {})
        errors: list[ModelError] = []
        for digest in (entry.get("current", ""), entry.get("good", "")):
            if digest:
                try:
                    return self.load(digest), errors
                except ModelError as error:
                    errors.append(error)
        raise errors[0] if errors else ModelError("name", f"no model {name!r} is here", "send it")

    def _prune(self, state: dict[str, dict[str, str]]) -> None:
        wanted = {digest for entry in state.values() for digest in (entry.get("current"), entry.get("good")) if digest}
        for file in self.directory.iterdir():
            # `.new` is what a power cut left half written.
            if file.suffix == ".new" or (file.suffix in (".data", ".json") and file.name != "active.json" and file.stem not in wanted):
                file.unlink(missing_ok=True)
