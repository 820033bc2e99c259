"""novactl convert: what a cold conversion would lose, an image into a disk, a disk into an image, and a start of the disk. On this machine, as root; no hub and no edge is asked."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from .client import CommandError

Printer = Callable[..., None]

WHAT = ("report", "disk", "image", "boot")


def add_commands(command: Callable[[str, Callable[[Any], int], str], Any], printer: Printer) -> None:
    """Add the command."""
    made = command("convert", lambda options: _convert(options, printer), "report ARCHIVE, disk ARCHIVE --to FILE, image DISK --to FOLDER, boot DISK [VOLUME..]: between a container's image and a disk that a machine boots")
    made.add_argument("what", choices=WHAT, help="report: what a disk would lose, and nothing is written")
    made.add_argument("source", type=Path, help="an OCI layout or archive; of image and boot: the disk")
    made.add_argument("volumes", type=Path, nargs="*", help="of boot: the volumes' disks, in order")
    made.add_argument("--to", type=Path, help="what is written")
    made.add_argument("--image", default="", help="the image's name in the archive, or in the layout that is written")
    made.add_argument("--spec", type=Path, help="a workload's `spec`, as JSON")
    made.add_argument("--allow-mount", action="append", default=[], help="a folder of the node that the spec may mount; may be given several times")
    made.add_argument("--disk-bytes", type=int, default=1 << 30, help="what may be written to the disk beyond the image")
    made.add_argument("--format", choices=("raw", "qcow2"), default="raw")
    made.add_argument("--guest-kernel", default="", help="folder with boot/ and lib/modules/ of the machine's kernel; default: this machine's")


def _convert(options: Any, printer: Printer) -> int:
    try:
        from edge_runtime.workloads.conversion import cold
        from edge_runtime.workloads.drivers import qemu_kernel
        from edge_runtime.workloads.drivers.face import DriverError
        from edge_runtime.workloads.images import ImageError
    except ImportError as error:
        raise CommandError(f"convert: the edge's part is not installed here ({error})") from None
    try:
        if options.what in ("report", "disk"):
            return _disk(options, printer, cold, qemu_kernel)
        if options.what == "image":
            found = cold.to_image(options.source, _to(options), options.image or "converted:1")
            _print(printer, options, {"written": str(options.to), "digest": found["digest"], "files": found["files"], "lost": found["lost"]})
            return 0
        return _boot(options, cold)
    except qemu_kernel.NoKernel as error:
        raise CommandError(f"convert: {error}") from None
    except (DriverError, ImageError) as error:
        raise CommandError(f"convert: {error.field}: {error.problem}; {error.remedy}") from None


def _to(options: Any) -> Path:
    if options.to is None:
        raise CommandError("convert: --to is missing; say what is to be written")
    return Path(os.path.abspath(options.to))


def _disk(options: Any, printer: Printer, cold: Any, qemu_kernel: Any) -> int:
    from edge_runtime.workloads.drivers.face import Key, Order
    from edge_runtime.workloads.images import ImageStore, Limits

    target = _to(options) if options.what == "disk" else None
    try:
        spec = json.loads(options.spec.read_text()) if options.spec else {}
    except ValueError as error:
        raise CommandError(f"convert: {options.spec} is no JSON ({error}); give a workload's spec") from None
    if not isinstance(spec, dict):
        raise CommandError(f"convert: {options.spec} is no JSON object; give a workload's spec")
    with tempfile.TemporaryDirectory(dir=target.parent if target is not None else None) as top:
        store = ImageStore(Path(top) / "images", limits=Limits(keep_free=0))
        try:
            image = store.add(options.source, options.image)
            found = cold.plan(store, Order(Key("converted", 1), options.image or image.names[0], {"disk": options.disk_bytes}, spec), tuple(options.allow_mount))
            told: dict[str, Any] = found.to_json()
            _print(printer, options, told)
            if target is not None:  # what is lost has been said before it starts
                sys.stdout.flush()
                written = cold.to_disk(found, target, qemu_kernel.find(options.guest_kernel), options.format)
                if not options.json:
                    print("written: " + ", ".join(map(str, written)))
        finally:
            store.close()
    return 0


def _print(printer: Printer, options: Any, told: Mapping[str, Any]) -> None:
    if options.json:
        printer(told, True)
        return
    for name, value in told.items():
        if name not in ("lost", "document"):
            print(f"{name}: {value}")
    for loss in told["lost"]:
        print(f"lost: {loss['field']}: {loss['problem']}; {loss['remedy']}")


def _boot(options: Any, cold: Any) -> int:
    """In place of this process: QEMU, with its console here."""
    from edge_runtime.workloads.drivers.microvm_templates import tsc_khz

    folder = Path(tempfile.mkdtemp(prefix="novacron-boot-"))
    with open(options.source, "rb") as handle:
        form = "qcow2" if handle.read(4) == cold.QCOW2 else "raw"
    if form == "qcow2":
        raise CommandError("convert: boot takes the kernel from a raw disk; write it with --format raw, or boot it by a kernel of your own")
    kernel, initramfs, document = cold.boot_parts(options.source, folder)
    if len(options.volumes) != len(document["volumes"]):
        raise CommandError(f"convert: the disk has {len(document['volumes'])} volumes, {len(options.volumes)} were named; name the files NAME.0, NAME.1, ..")
    words = cold.boot_command(options.source, options.volumes, kernel, initramfs, document, tsc_khz=tsc_khz())
    print(f"boots {options.source}; the kernel taken from it is in {folder}", file=sys.stderr, flush=True)
    try:
        os.execvp(words[0], words)
    except OSError as error:
        raise CommandError(f"convert: {words[0]} cannot be run: {error.strerror}; as root: apt install qemu-system-x86") from None
