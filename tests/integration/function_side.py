"""Real functions for tests: modules from their text, artefacts around them, and a driver over a store. Skips where wasmtime is missing."""

import asyncio
import importlib.util
import json
from pathlib import Path
from typing import Any

import pytest

from edge_runtime.workloads.drivers.face import Key, Order, Status
from edge_runtime.workloads.drivers.function import FunctionDriver
from edge_runtime.workloads.images import ImageStore, Limits
from tests.unit.workloads.image_side import AS_ROOT, sha

WASM = "application/wasm"

IMPORTS = {
    "fd_read": "(param i32 i32 i32 i32) (result i32)", "fd_write": "(param i32 i32 i32 i32) (result i32)", "proc_exit": "(param i32)", "poll_oneoff": "(param i32 i32 i32 i32) (result i32)",
    "path_open": "(param i32 i32 i32 i32 i32 i64 i64 i32 i32) (result i32)", "fd_prestat_get": "(param i32 i32) (result i32)", "args_get": "(param i32 i32) (result i32)",
    "environ_get": "(param i32 i32) (result i32)", "sock_accept": "(param i32 i32 i32) (result i32)",
}


def text(body: str, memory: str = "1", more: str = "") -> str:
    """A module with all of `IMPORTS`, a function `$say` (descriptor, address, size), and a start of this body. Addresses below 100 are scratch."""
    imports = "\n".join(f'(import "wasi_snapshot_preview1" "{name}" (func ${name} {kind}))' for name, kind in IMPORTS.items())
    return f"""(module {imports}
      (memory (export "memory") {memory})
      (func $say (param i32 i32 i32)
        (i32.store (i32.const 0) (local.get 1)) (i32.store (i32.const 4) (local.get 2))
        (drop (call $fd_write (local.get 0) (i32.const 0) (i32.const 1) (i32.const 8))))
      {more}
      (func (export "_start") {body}))"""


MODULES = {
    # What it is given, after "hello "; a word to stderr.
    "echo": text("""
        (i32.store (i32.const 16) (i32.const 1000)) (i32.store (i32.const 20) (i32.const 60000))
        (drop (call $fd_read (i32.const 0) (i32.const 16) (i32.const 1) (i32.const 24)))
        (call $say (i32.const 1) (i32.const 100) (i32.const 6)) (call $say (i32.const 1) (i32.const 1000) (i32.load (i32.const 24)))
        (call $say (i32.const 2) (i32.const 110) (i32.const 6))""", more='(data (i32.const 100) "hello ") (data (i32.const 110) "heard\\n")'),
    "exit": text("(call $say (i32.const 1) (i32.const 100) (i32.const 4)) (call $proc_exit (i32.const 3))", more='(data (i32.const 100) "out\\n")'),
    "loop": text("(loop (br 0))"),
    # Waits an hour in the host's hands: no instruction of its own runs.
    "sleep": text("""
        (i32.store (i32.const 216) (i32.const 1)) (i64.store (i32.const 224) (i64.const 3600000000000))
        (drop (call $poll_oneoff (i32.const 200) (i32.const 300) (i32.const 1) (i32.const 400)))"""),
    "trap": text("(unreachable)"),
    "deep": text("(call $deep)", more="(func $deep (call $deep) (call $deep))"),
    # Grows until it is refused, and tells after how many pages by its exit code; then writes to all of it.
    "grow": text("""(local i32)
        (loop (if (i32.ne (memory.grow (i32.const 1)) (i32.const -1)) (then (local.set 0 (i32.add (local.get 0) (i32.const 1))) (br 1))))
        (memory.fill (i32.const 0) (i32.const 1) (i32.mul (memory.size) (i32.const 65536)))
        (call $proc_exit (local.get 0))"""),
    "flood": text("(loop (call $say (i32.const 1) (i32.const 0) (i32.const 60000)) (br_if 0 (i32.lt_u (local.tee 0 (i32.add (local.get 0) (i32.const 1))) (i32.const 100))))".replace("(loop", "(local i32) (loop", 1)),
    # Bits of what it was refused: no folder, no file, no socket.
    "escape": text("""
        (call $proc_exit (i32.or (i32.or
          (i32.eq (call $fd_prestat_get (i32.const 3) (i32.const 0)) (i32.const 8))
          (i32.shl (i32.eq (call $path_open (i32.const 3) (i32.const 0) (i32.const 0) (i32.const 4) (i32.const 0) (i64.const -1) (i64.const -1) (i32.const 0) (i32.const 8)) (i32.const 8)) (i32.const 1)))
          (i32.shl (i32.eq (call $sock_accept (i32.const 3) (i32.const 0) (i32.const 0)) (i32.const 8)) (i32.const 2))))"""),
    # Pointers beyond its memory: the answer is an error number, 21.
    "stray": text("(call $proc_exit (call $fd_write (i32.const 1) (i32.const -8) (i32.const 1) (i32.const -4)))"),
    "count": text("""
        (i32.store (i32.const 500) (i32.add (i32.load (i32.const 500)) (i32.const 1))) (call $proc_exit (i32.load (i32.const 500)))"""),
    "args": text("(drop (call $args_get (i32.const 16) (i32.const 1000))) (drop (call $environ_get (i32.const 16) (i32.const 1100))) (call $say (i32.const 1) (i32.const 1000) (i32.const 130))"),
    "early": text("", more="(func $boom (unreachable)) (start $boom)"),
}


def reason_against() -> str:
    """Why functions cannot be tested here; empty where they can."""
    return "" if importlib.util.find_spec("wasmtime") is not None else "no wasmtime (pip install '.[functions]')"


def module(name: str) -> bytes:
    """The bytes of one of `MODULES`, or of a module's text."""
    import wasmtime

    return bytes(wasmtime.wat2wasm(MODULES.get(name, name)))


def artefact(folder: Path, raw: bytes, name: str, media: str = WASM, spoil: bytes = b"") -> Path:
    """An OCI layout with a module; a folder that has one already gets one more. `spoil`: what is there in place of the module."""
    blobs = folder / "blobs/sha256"
    blobs.mkdir(parents=True, exist_ok=True)

    def put(data: bytes, kind: str) -> dict[str, Any]:
        (blobs / sha(data)).write_bytes(data)
        return {"mediaType": kind, "digest": f"sha256:{sha(data)}", "size": len(data)}

    layer = put(raw, media)
    if spoil:
        (blobs / sha(raw)).write_bytes(spoil)
    config = put(json.dumps({"architecture": "wasm", "os": "wasip1", "layerDigests": [layer["digest"]]}).encode(), "application/vnd.wasm.config.v0+json")
    entry = put(json.dumps({"schemaVersion": 2, "config": config, "layers": [layer]}).encode(), "application/vnd.oci.image.manifest.v1+json")
    before = json.loads((folder / "index.json").read_text())["manifests"] if (folder / "index.json").exists() else []
    (folder / "oci-layout").write_text('{"imageLayoutVersion": "1.0.0"}')
    (folder / "index.json").write_text(json.dumps({"schemaVersion": 2, "manifests": [*before, entry | {"annotations": {"org.opencontainers.image.ref.name": name}}]}))
    return folder


def made_store(folder: Path) -> ImageStore:
    """A store with all of `MODULES`, each as `NAME:1`."""
    store = ImageStore(folder / "images", limits=Limits(keep_free=0), own=AS_ROOT)
    for name in MODULES:
        artefact(folder / "in", module(name), f"{name}:1")
        store.add(folder / "in", f"{name}:1", strict=True)
    return store


async def started(driver: FunctionDriver, name: str, image: str = "", *, job: bool = False, requests: dict[str, int] | None = None, **spec: Any) -> Key:
    """A function that runs."""
    key = Key(name, 1)
    await driver.prepare(Order(key, f"{image or name}:1", requests or {}, spec, job))
    await driver.start(key)
    return key


async def job(driver: FunctionDriver, name: str, **spec: Any) -> tuple[Status, bytes, bytes]:
    """A job to its end: how that was, and what it wrote."""
    key = await started(driver, name, job=True, **spec)
    status = await driver.wait(key)
    told = await driver.logs(key, 1 << 20)
    await driver.delete(key)
    return status, told.stdout, told.stderr


def end_all(driver: FunctionDriver) -> None:
    """Delete all that is there."""
    async def do() -> None:
        for status in await driver.instances():
            await driver.delete(status.key)

    asyncio.run(do())
    driver.close()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Any:
    """One driver for a module's tests; what they leave running is ended."""
    folder = tmp_path_factory.mktemp("functions")
    store = made_store(folder)
    made = FunctionDriver(folder, store)
    yield made
    end_all(made)
    store.close()
