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

KEEP_PER_NAME = 2
"""Versions kept per model: the active one and the last good one."""


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
        state = self._state()
        entry = state.setdefault(manifest.name, {})
        entry["current"] = digest
        self._write("active.json", json.dumps(state).encode())
        return manifest

    def activate(self, name: str) -> Model:
        """Load the current version of `name`; where it fails the last good one becomes current again and the error is raised."""
        state = self._state()
        entry = state.get(name, {})
        digest = entry.get("current", "")
        if not digest:
            raise ModelError("name", f"no model {name!r} is here", "send it")
        try:
            manifest = read_manifest((self.directory / f"{digest}.json").read_bytes())
            model = load_model(manifest, self.directory / f"{digest}.data")
        except (ModelError, OSError) as error:
            good = entry.get("good", "")
            if good and good != digest:
                entry["current"] = good
                self._write("active.json", json.dumps(state).encode())
            if isinstance(error, ModelError):
                raise
            raise ModelError("data", f"the artefact cannot be read: {error}", "send the model again") from None
        if entry.get("good") != digest:
            entry["previous"] = entry.get("good", "")
            entry["good"] = digest
            self._write("active.json", json.dumps(state).encode())
        self._prune(state)
        return model

    def _prune(self, state: dict[str, dict[str, str]]) -> None:
        wanted = {digest for entry in state.values() for digest in (entry.get("current"), entry.get("good"), entry.get("previous")) if digest}
        for file in self.directory.iterdir():
            if file.suffix in (".data", ".json") and file.name != "active.json" and file.stem not in wanted:
                file.unlink(missing_ok=True)
