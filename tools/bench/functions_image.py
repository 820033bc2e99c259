"""The artefact that start-up is measured with: a module that writes one line."""

import json
from hashlib import sha256
from pathlib import Path
from typing import Any

LINE = b"the first line\n"

_TEXT = """(module
  (import "wasi_snapshot_preview1" "fd_write" (func $write (param i32 i32 i32 i32) (result i32)))
  (memory (export "memory") 1)
  (data (i32.const 0) "\\10\\00\\00\\00\\0f\\00\\00\\00")
  (data (i32.const 16) "the first line\\n")
  (func (export "_start") (drop (call $write (i32.const 1) (i32.const 0) (i32.const 1) (i32.const 8)))))"""


def artefact(folder: Path) -> Path:
    """An OCI layout with the module."""
    import wasmtime

    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True)

    def put(data: bytes, media: str) -> dict[str, Any]:
        (blobs / sha256(data).hexdigest()).write_bytes(data)
        return {"mediaType": media, "digest": f"sha256:{sha256(data).hexdigest()}", "size": len(data)}

    layer, config = put(bytes(wasmtime.wat2wasm(_TEXT)), "application/wasm"), put(b"{}", "application/vnd.oci.empty.v1+json")
    entry = put(json.dumps({"schemaVersion": 2, "config": config, "layers": [layer]}).encode(), "application/vnd.oci.image.manifest.v1+json")
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [entry]}))
    return folder
