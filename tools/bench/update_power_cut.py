"""An update whose power is cut: at every write to the boot partition, and at random writes of the whole, a device still starts one of the two images, whole, and its journal is intact.

A real update is recorded once: a machine in QEMU (emulated) downloads a delta, writes the other slot, switches, proves itself and is marked good, while every write of its disk and every flush is noted (blklogwrites).
Then the disk is made as a cut leaves it: after each write with all that was written so far, which is what QEMU killed there leaves, and again with a random part of what was not flushed lost or torn. From its bytes is told what
systemd-boot starts and whether that kernel, initrd and root are whole (tools/powercut/slot_verdict.py). Some of the disks are booted for real: they must come up in the slot that was told. Of some the journal is read: whole, and
with all that the device had shown by then.

`--control` believes no flush: what an updater that never syncs would leave; that must be caught.
"""

import hashlib
import json
import random
import shutil
import sys
import tempfile
import threading
import time
from collections import Counter
from dataclasses import dataclass, field, replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

if not __package__:
    __import__("as_module").again(__file__)

import urllib.request

from edge_runtime.updates import slots
from firmware_images import bundles, gpt, recipes
from firmware_images.boot import API_PORT, credentials
from firmware_images.build import Built, current
from firmware_images.data import take_out
from firmware_images.errors import FirmwareError
from firmware_images.layout import DATA_NAME, ESP_NAME
from firmware_images.machine import HERE, Machine, Wiring, command, free_port, prepare
from tools.novactl.client import CommandError
from tools.novactl.journal import check
from tools.powercut.machine_log import Replay, write_sparse
from tools.powercut.slot_verdict import Known, Verdict

from .harness import ROOT, arguments, machine, note, report

RANDOM_CUTS = 200
"""Random writes of the whole update at which it is cut, beside each write to the boot partition."""

LOSSES = 8
"""Draws of what is lost of the unflushed writes, after each write to the boot partition."""

DISKS_READ, DISKS_BOOTED = 20, 20
"""Of those: disks whose journal is read, and disks that are really booted."""

UPDATE_S, BOOT_S = 3600, 1200
"""Longest waits for a whole update and for one boot, emulated on a machine that others use too."""

VARIANT = "next"


@dataclass(slots=True)
class Recorded:
    """One recorded update: the disk before it, the log, the token of its interface, what the device had shown (bytes of the log at that time, newest decision), and the log's bytes when it had told that it keeps the new image."""

    before: Path
    log: Path
    token: Path
    shown: list[tuple[int, int]] = field(default_factory=list)
    kept_at: int = 0


@dataclass(slots=True)
class Tally:
    """What the cuts came to: `started` counts by what would start, `bad` tells the others."""

    cuts: int = 0
    started: Counter[str] = field(default_factory=Counter)
    bad: list[str] = field(default_factory=list)


class Device:
    """The machine's interface."""

    def __init__(self, folder: Path, built: Built, arch: recipes.Architecture) -> None:
        self.disk, self.flash = prepare(arch, built.image, folder)
        handed, self._token = credentials(folder, None, [], True, "power-cut")
        self._port = free_port()
        self.arch = arch
        self.wiring = Wiring(built_memory(built), {self._port: API_PORT}, handed, online=True, clock="1970-01-02")

    def on(self, **changed: Any) -> Machine:
        """Power on."""
        return Machine(command(self.arch, self.disk, self.flash, replace(self.wiring, **changed)))

    def ask(self, path: str, body: Any = None) -> Any:
        """An answer; None where there is none now."""
        request = urllib.request.Request(f"http://127.0.0.1:{self._port}{path}", None if body is None else json.dumps(body).encode(), {"Authorization": f"Bearer {self._token}"})
        try:
            with urllib.request.urlopen(request, timeout=10) as answer:
                return json.load(answer)
        except (OSError, ValueError):
            return None


def built_memory(built: Built) -> int:
    """MiB that the image's profile is made for."""
    return recipes.profile(built.manifest["profile"]).memory_mib


class Bundle:
    """A server of one bundle, with ranges."""

    def __init__(self, data: bytes) -> None:
        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                begin = int(self.headers["Range"].removeprefix("bytes=").rstrip("-"))
                self.send_response(206)
                self.send_header("Content-Range", f"bytes {begin}-{len(data) - 1}/{len(data)}")
                self.send_header("Content-Length", str(len(data) - begin))
                self.end_headers()
                self.wfile.write(data[begin:])

            def log_message(self, format: str, *arguments: Any) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        self.url = f"http://{HERE}:{self._server.server_address[1]}/bundle"

    def stop(self) -> None:
        """No more answers."""
        self._server.shutdown()
        self._server.server_close()


def record(folder: Path, built: Built, newer: Path, key: Path, options: Any) -> Recorded:
    """One update from the first write to the last. SystemExit where it does not succeed."""
    made = bundles.bundle(newer, built.image.parent, key, folder / "bundle", gate_s=UPDATE_S)
    note(options, f"delta of {made.size / 1e6:.2f} MB")
    device = Device(folder / "machine", built, recipes.architecture(built.manifest["arch"]))
    log = folder / "log"
    log.touch()
    done = Recorded(built.image, log, folder / "machine" / "api.token")
    server = Bundle((folder / "bundle").read_bytes())
    try:
        with device.on(log=log) as running:
            ordered = told = None
            while told is None or done.shown[-1][0] <= done.kept_at:  # and on until it decides once more: an image that is kept is the one that starts from then on
                if time.monotonic() - running.started_s > UPDATE_S:
                    raise SystemExit(f"no end of the update within {UPDATE_S} s:\n{running.tail(60)}")
                found = device.ask("/api/v1/decisions?limit=1")
                if found:
                    # The log's size after the answer: what is shown is durable, so its flush stands before that. Late at worst.
                    done.shown.append((log.stat().st_size, int(found[0]["seq"])))
                    if ordered is None:
                        ordered = device.ask("/api/v1/updates", {"id": "power-cut", "url": server.url})
                    for one in device.ask("/api/v1/updates") or []:
                        if one["state"] in ("succeeded", "failed") and told is None:
                            told, done.kept_at = one, log.stat().st_size
                if told is not None and told["state"] != "succeeded":
                    break
                time.sleep(0.2)
            if told is None or told["state"] != "succeeded":
                raise SystemExit(f"the update did not succeed: {told}\n{running.tail(60)}")
    finally:
        server.stop()
    return done


def known(folder: Path) -> Known:
    """An image as a verdict wants it."""
    told = json.loads((folder / "manifest.json").read_text())
    return Known(told["sequence"], told["root_hash"], told["salt"], told["blocks"], *(hashlib.sha256((folder / name).read_bytes()).hexdigest() for name in ("linux", "initrd")))


def cut(recorded: Recorded, built: Built, newer: Path, options: Any, folder: Path) -> tuple[Tally, Tally, dict[str, int]]:
    """Every cut; what all came to, what the booted ones came to, and counts."""
    partitions = built.manifest["partitions"]
    known_newer = known(newer)
    verdict = Verdict(partitions, [known(built.image.parent), known_newer])
    replay = Replay(recorded.before, recorded.log, flushes=not options.control)
    draw = random.Random(options.seed)
    esp = partitions[ESP_NAME]
    written = [number for number, entry in enumerate(replay.entries) if entry.size]
    switching = {number for number in written if esp["start"] <= replay.entries[number].offset < esp["start"] + esp["size"]}
    drawn = set(draw.sample(written, min(options.cuts, len(written))))
    drawn |= {number for number in written if recorded.kept_at and replay.entries[number].end > recorded.kept_at}
    chosen = sorted(switching | drawn)
    read, booted = set(draw.sample(chosen, min(options.read, len(chosen)))), set(draw.sample(chosen, min(options.boots, len(chosen))))
    versions = Counter[str]()
    all_cuts, boots = Tally(), Tally()
    for number in range(len(replay.entries)):
        entry = replay.step()
        for name in slots.SLOTS:
            if entry.size and entry.offset < partitions[name]["start"] + partitions[name]["size"] and entry.offset + entry.size > partitions[name]["start"]:
                versions[name] += 1
        if number not in switching and number not in drawn:
            continue
        where = f"write {number} of {len(replay.entries)}"
        kept = known_newer if recorded.kept_at and entry.end > recorded.kept_at else None
        told = _judge(verdict, replay.content, versions, all_cuts, where, kept)
        # A boot partition may lose its unflushed writes in many ways, and looking costs little.
        for lost in range(LOSSES if number in switching else 1):
            with replay.lossy(draw) as disk:
                # A slot with unflushed writes is torn too: its content is this cut's own.
                own = {name: (number, lost) if replay.unsure(partitions[name]["start"], partitions[name]["size"]) else versions[name] for name in slots.SLOTS}
                _judge(verdict, disk, own, all_cuts, f"{where}, unflushed lost", kept)
                if number in read and not lost:
                    _read(disk, partitions, recorded, entry.end, folder, all_cuts, where)
                if number in booted and not lost and not options.control:
                    _boot(disk, built, recorded, folder, boots, where, verdict)
                    note(options, f"booted {boots.cuts} of {len(booted)}: {where}; {dict(boots.started)}, bad {len(boots.bad)}")
        if len(all_cuts.bad) + len(boots.bad) > 50:
            break
        if all_cuts.cuts % 200 == 0:
            note(options, f"{all_cuts.cuts} cuts, last {told}; {dict(all_cuts.started)}; booted {boots.cuts}; bad {len(all_cuts.bad) + len(boots.bad)}")
    return all_cuts, boots, {"writes": len(written), "to the boot partition": len(switching), "drawn, and after it was kept": len(drawn), "journals read": len(read), "flushes": sum(entry.flush for entry in replay.entries)}


def _judge(verdict: Verdict, disk: Any, versions: Any, tally: Tally, where: str, kept: Known | None) -> str:
    tally.cuts += 1
    try:
        sequence = verdict.sequence(disk, versions)
    except (ValueError, FileNotFoundError) as error:
        tally.bad.append(f"{where}: {error}")
        return "nothing"
    told = f"image {sequence}"
    tally.started[told] += 1
    if kept is not None:
        tally.started["after it was kept"] += 1
        if sequence != kept.sequence:
            tally.bad.append(f"{where}: {told} would start, and the device had told that it keeps image {kept.sequence}")
    return told


def _read(disk: Any, partitions: Any, recorded: Recorded, log_end: int, folder: Path, tally: Tally, where: str) -> None:
    """The journal on a cut disk: whole, and not behind what was shown."""
    data = partitions[DATA_NAME]
    target = folder / "cut.img"
    write_sparse(disk, target, [(0, gpt.ALIGN_BYTES), (data["start"], data["size"]), (len(disk) - gpt.ALIGN_BYTES, gpt.ALIGN_BYTES)], len(disk))
    with tempfile.TemporaryDirectory(dir=folder) as top:
        edge = take_out(target, Path(top)) / "edge"
        least = max((seq for at, seq in recorded.shown if at <= log_end), default=0)
        try:
            told = check(edge, lambda *_: None)
        except CommandError as error:
            if least:  # before the first start has made it there is none to lose
                tally.bad.append(f"{where}: there is no journal, and decision {least} had been shown: {error}")
            return
        if not told["ok"] or int(told["records"].get("decision", 0)) < least:
            tally.bad.append(f"{where}: the journal is not whole, or behind decision {least}: {told}")
        tally.started["journal intact"] += 1


def _boot(disk: Any, built: Built, recorded: Recorded, folder: Path, tally: Tally, where: str, verdict: Verdict) -> None:
    """A real start of a cut disk: it comes up, in the slot that was told."""
    tally.cuts += 1
    entry, _, _ = verdict.choice(disk)
    made = Path(tempfile.mkdtemp(dir=folder))
    write_sparse(disk, made / "disk.img", [(0, len(disk))], len(disk))
    shutil.copyfile(recorded.token, made / "api.token")
    device = Device(made, built, recipes.architecture(built.manifest["arch"]))
    with device.on() as running:
        try:
            running.wait_for("=== end of report", BOOT_S)
        except (TimeoutError, EOFError) as error:
            tally.bad.append(f"{where}: {error}")
            return
        lines = running.between("slot:", "root:")
        if not any(entry.slot in line for line in lines) or not device.ask("/api/v1/status"):
            tally.bad.append(f"{where}: it is not in {entry.slot}, or its agent does not answer: {lines}")
        tally.started[f"image {entry.sequence}"] += 1
    shutil.rmtree(made)


def main() -> int:
    parser = arguments(__doc__)
    parser.add_argument("--home", type=Path, default=ROOT / ".novacron" / "images", help="folder of caches and images")
    parser.add_argument("--cuts", type=int, default=RANDOM_CUTS, help=f"random writes at which it is cut ({RANDOM_CUTS})")
    parser.add_argument("--read", type=int, default=DISKS_READ, help=f"cut disks whose journal is read ({DISKS_READ})")
    parser.add_argument("--boots", type=int, default=DISKS_BOOTED, help=f"cut disks that are booted ({DISKS_BOOTED})")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--keep", type=Path, help="folder for the recording; one that is there is used again")
    parser.add_argument("--control", action="store_true", help="believe no flush: this must be caught")
    options = parser.parse_args()
    about = machine()
    arch, chosen = recipes.architecture("amd64"), recipes.profile("device")
    images = []
    try:
        for sequence, variant in ((0, ""), (1, VARIANT)):
            images.append(current(options.home, arch, chosen, lambda text: note(options, text), sequence, variant))
        built, newer = images[0], images[1].image.parent
        with tempfile.TemporaryDirectory(dir=options.home) as top:
            folder = options.keep or Path(top)
            folder.mkdir(exist_ok=True)
            kept = folder / "recorded.json"
            if kept.exists():
                said = json.loads(kept.read_text())
                recorded = Recorded(built.image, folder / "log", folder / "machine" / "api.token", [(int(at), int(seq)) for at, seq in said["shown"]], int(said["kept_at"]))
            else:
                recorded = record(folder, built, newer, options.home / "keys" / "update.key", options)
                kept.write_text(json.dumps({"shown": recorded.shown, "kept_at": recorded.kept_at}))
            note(options, f"recorded: {recorded.log.stat().st_size / 1e6:.0f} MB of writes")
            cuts, boots, counts = cut(recorded, built, newer, options, Path(top))
    except FirmwareError as error:
        raise SystemExit(str(error)) from None
    bad = cuts.bad + boots.bad
    both = all(cuts.started[name] > 0 for name in ("image 0", "image 1", "after it was kept"))
    ok = both and not bad and counts["drawn, and after it was kept"] >= min(RANDOM_CUTS, options.cuts) if not options.control else bool(bad)
    details = {"cuts": cuts.cuts, **counts, "started": dict(cuts.started), "booted": boots.cuts, "booted as": dict(boots.started), "bad": bad[:20]}
    inputs = {"arch": arch.name, "profile": chosen.name, "seed": options.seed, "control": options.control, "emulated": True}
    return report(options, about, "cuts of an update's power after which nothing whole would start, or a record is lost", len(bad), "cuts", ok, inputs=inputs, details=details)


if __name__ == "__main__":
    sys.exit(main())
