"""Models: three engines behind one face, artefacts by content address.

`load_model(manifest, path)` gives a `Model`; `ModelStore` keeps what the hub sent, the last good one as well. Nothing heavy is imported
here: an engine comes in with the first model that needs it.
"""

from .manifest import ModelError, ModelManifest, read_manifest
from .model import Model, load_model
from .store import ModelStore

__all__ = ["Model", "ModelError", "ModelManifest", "ModelStore", "load_model", "read_manifest"]
