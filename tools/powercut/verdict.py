"""A cut, tried: its content on a loop device, the real start of the agent on it, and what is then in the journal against what the world had seen."""

import asyncio
import json
import os
import select
import signal
import sqlite3
import subprocess
import time
import traceback
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path

from edge_runtime.config import EdgeConfig
from edge_runtime.config.schema import ApiConfig, BusConfig, DecisionsConfig, DevicesConfig, HostConfig, JournalConfig, LoggingConfig, UplinkConfig
from edge_runtime.contract.records import Record
from edge_runtime.contract.streams import STREAMS
from edge_runtime.journal.database import database_streams
from edge_runtime.runtime import EdgeRuntime
from edge_runtime.surroundings import Surroundings
from tools.bench.agent import Agent

from .block_log import Write
from .claims import Expected
from .fuse_disk import TrialDisk
from .mounts import attach, mount, program, unmount
from .recording import EDGE, GROUP_BLOCKS, SETTINGS, rule
from .small_agent import SMALL_WAL_BYTES

BOOT_TIMEOUT_S = 60.0
"""A boot that takes longer on this small disk does not end."""

DISK_NAME = "disk"
"""The file that a bench's disk appears at."""

REPAIRED = (0, 1, 2)
"""Exit statuses of e2fsck that say that all is well now."""

APPENDED = 3
"""Records appended to each stream after a boot, to see which numbers they get."""


@dataclass(slots=True)
class Found:
    """What a boot on one cut came to; sent from the child that booted as JSON."""

    boot: str = ""
    boot_n: int = 0
    generation: int = 0
    twins: dict[str, int] = field(default_factory=dict)
    reported: dict[str, int] = field(default_factory=dict)
    recoveries: list[str] = field(default_factory=list)


@dataclass(slots=True)
class Trial:
    """One boot on one content: broken promises in words, databases that had to be rebuilt, whether the file system had to be repaired first, records that
    had been freed by then."""

    violations: list[str] = field(default_factory=list)
    recoveries: list[str] = field(default_factory=list)
    repaired: bool = False
    freed: int = 0


def start_edge(data: Path) -> Found:
    """The agent's own start in this process, on its own: no bus, no uplink. Then records in each stream, and the orderly stop."""
    config = EdgeConfig(
        edge_id=EDGE, data_dir=str(data), uplink=UplinkConfig(enabled=False), bus=BusConfig(enabled=False), api=ApiConfig(enabled=False), logging=LoggingConfig(level="error"),
        journal=JournalConfig(**SETTINGS), devices=DevicesConfig(host=HostConfig(enabled=False)), decisions=DecisionsConfig(rules=(rule(0),)),
    )

    async def boot() -> Found:
        runtime = EdgeRuntime(config, surroundings=Surroundings(wal_bytes=SMALL_WAL_BYTES))
        await runtime.start()
        journal = runtime.journal
        found = Found(
            journal.boot, journal.boot_n, runtime.desired.generation if runtime.desired else 0,
            {name: device.desired_version for name, device in runtime.registry.devices.items()},
            {name: device.reported.get("n", 0) for name, device in runtime.registry.devices.items()}, [f"{item.database}: {item.damage}, lost {item.lost}" for item in journal.recoveries],
        )
        for number in range(APPENDED):
            for stream in STREAMS:
                journal.append(stream, "reading" if stream == "telemetry" else "operation", {"device": "after", "values": {"n": -1 - number}})
        await journal.flush()
        await runtime.stop()
        return found

    return asyncio.run(boot())


def boot_in_child(data: Path) -> Found:
    """`start_edge` in a forked process; raises RuntimeError with its words where it does not end well."""
    reader, writer = os.pipe()
    pid = os.fork()
    if pid == 0:
        try:
            os.close(reader)
            found = start_edge(data)
            answer = json.dumps({name: getattr(found, name) for name in Found.__slots__})
        except BaseException:
            answer = json.dumps({"error": traceback.format_exc()[-1500:]})
        os.write(writer, answer.encode())
        os._exit(0)
    os.close(writer)
    parts: list[bytes] = []
    end = time.monotonic() + BOOT_TIMEOUT_S
    try:
        while select.select([reader], [], [], max(0.0, end - time.monotonic()))[0]:
            part = os.read(reader, 65_536)
            if not part:
                break
            parts.append(part)
        else:
            os.kill(pid, signal.SIGKILL)
            raise RuntimeError(f"it did not come up within {BOOT_TIMEOUT_S:.0f} s")
    finally:
        os.close(reader)
        os.waitpid(pid, 0)
    answer_ = json.loads(b"".join(parts) or b'{"error": "it died without a word"}')
    if "error" in answer_:
        raise RuntimeError(answer_["error"])
    return Found(**answer_)


def boot_as_process(data: Path) -> Found:
    """The agent as it is deployed: the command, a process of its own, its API asked, SIGTERM."""
    extra = {"bus": {"enabled": False}, "journal": SETTINGS, "decisions": {"rules": [rule(0)]}}
    with Agent(1, model="", host=False, data=data, extra=extra) as agent:
        status = agent.get("/api/v1/status")
        devices = {entry["id"]: entry for entry in agent.get("/api/v1/devices")}
        journal = agent.get("/api/v1/journal")
        found = Found(
            status["boot"], status["boot_n"], status["generation"], {name: entry["twin"]["desired_version"] for name, entry in devices.items()},
            {name: entry["twin"]["reported"].get("n", 0) for name, entry in devices.items()}, [str(item) for item in journal["recoveries"]],
        )
    assert agent.process is not None
    if agent.process.returncode != 0:
        raise RuntimeError(f"the agent's process ended with status {agent.process.returncode}")
    return found


def side_file(data: Path, expected: Expected) -> list[str]:
    """The promise of `marks.json` by itself: whole, and ahead of everything that was ever shown."""
    if not expected.boot_n:
        return []
    try:
        side = json.loads((data / "journal" / "marks.json").read_bytes())
        boot_n, reserved = int(side["boot_n"]), dict(side["reserved"])
    except (OSError, ValueError, KeyError) as error:
        return [f"marks.json cannot be read: {error!r}"]
    wrong = [] if boot_n >= expected.boot_n else [f"marks.json counts {boot_n} boots, {expected.boot_n} was shown"]
    return wrong + [f"marks.json reserves {stream} up to {reserved.get(stream, 0)}, {seq} was published" for stream, seq in expected.newest.items() if reserved.get(stream, 0) < seq]


def judge(data: Path, found: Found, expected: Expected) -> tuple[list[str], int]:
    """Everything that was seen before the cut against the journal after the boot: what is broken, in words; and how many records had been freed."""
    wrong = list(expected.conflicts)
    rows: dict[tuple[str, int], Record] = {}
    floors: dict[str, int] = {}
    for name, streams in database_streams().items():
        connection = sqlite3.connect(f"file:{data / 'journal' / f'{name}.db'}?mode=ro", uri=True)
        try:
            verdict = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
            if verdict != "ok":
                wrong.append(f"{name}.db after the boot: {verdict}")
            for stream in streams:
                wrong += _read_stream(connection, stream, rows, floors, expected)
        finally:
            connection.close()
    for (stream, seq), record in expected.records.items():
        row = rows.get((stream, seq))
        if row is None and seq < floors[stream]:
            if seq > expected.receipts.get(stream, 0):
                wrong.append(f"lost: {stream} {seq} was freed, the hub had said {expected.receipts.get(stream, 0)}")
        elif row is None:
            wrong.append(f"lost: {stream} {seq} was published")
        elif row != record:
            wrong.append(f"doubled: {stream} {seq} was published as {record} and is now {row}")
    for (stream, seq), row in rows.items():
        if row.boot == found.boot and seq <= expected.newest.get(stream, 0):
            wrong.append(f"doubled: number {seq} of {stream} was given again")
    everything = {**{key: record for key, record in expected.records.items() if key not in rows}, **rows}
    return wrong + _judge_effects(found, expected, everything), sum(floors.values()) - len(floors)


def _read_stream(connection: sqlite3.Connection, stream: str, rows: dict[tuple[str, int], Record], floors: dict[str, int], expected: Expected) -> list[str]:
    """Take the rows of one stream; gaps, a broken chain, records dropped or receipted without a receipt."""
    marks = connection.execute("SELECT floor, floor_chain, receipted, dropped FROM streams WHERE stream=?", (stream,)).fetchone()
    floor, chain, receipted, dropped = marks or (1, bytes(16), 0, 0)
    floors[stream] = floor
    wrong = []
    if dropped:
        wrong.append(f"lost: {dropped} records of {stream} are counted as dropped")
    if receipted > expected.receipts.get(stream, 0):
        wrong.append(f"{stream} counts as receipted to {receipted}, the hub had said {expected.receipts.get(stream, 0)}")
    seq = floor
    for *values, stored in connection.execute(
        f"SELECT seq, boots.boot, mono, wall, tq, kind, body, chain FROM records_{stream} AS r CROSS JOIN boots ON boots.number=r.boot ORDER BY seq"
    ):
        record = Record(*values)
        if record.seq != seq:
            return [*wrong, f"gap: {stream} goes on with {record.seq} instead of {seq}"]
        chain = record.chain(chain)
        if chain != stored:
            return [*wrong, f"{stream}: the chain breaks at {seq}"]
        rows[(stream, seq)] = record
        seq += 1
    return wrong


def _judge_effects(found: Found, expected: Expected, everything: dict[tuple[str, int], Record]) -> list[str]:
    wrong = []
    readings: set[tuple[str, int]] = set()
    decided: Counter[tuple[str, int]] = Counter()
    operations: set[tuple[str, str]] = set()
    for (stream, _), record in everything.items():
        if record.kind not in ("reading", "decision", "operation"):
            continue
        body = json.loads(record.body)
        if stream == "telemetry":
            readings.add((body["device"], body["values"]["n"]))
        elif record.kind == "decision":
            decided[(body["device"], body["inputs"]["n"])] += 1
        elif record.kind == "operation" and "id" in body:
            operations.add((body["id"], body["state"]))
    wrong += [f"lost: reading {key} was acknowledged" for key in expected.readings if key not in readings]
    wrong += [f"lost: the decision on reading {key}, which was acknowledged" for key in expected.readings if key not in decided]
    for command, (boot, seq, number) in expected.commands.items():
        record_ = everything.get(("decision", seq))
        if record_ is None or not record_.boot.startswith(boot) or json.loads(record_.body)["inputs"]["n"] != number:
            wrong.append(f"lost: command {command} was sent, its decision is {record_}")
    wrong += [f"lost: command {one} of the hub was sent to its device, no record says so" for one in expected.orders if (one, "running") not in operations]
    wrong += [f"lost: the result of {one} was acknowledged" for one in expected.results if (one, "succeeded") not in operations]
    wrong += [f"lost: twin {name} was published at version {version}, it is at {found.twins.get(name, 0)}" for name, version in expected.twins.items() if found.twins.get(name, 0) < version]
    wrong += [f"lost: state {value} that {name} reported was acknowledged" for name, value in expected.reported.items() if found.reported.get(name, 0) < value]
    if found.generation < expected.generation:
        wrong.append(f"lost: desired state {expected.generation} was acknowledged, {found.generation} is there")
    if found.boot_n <= expected.boot_n:
        wrong.append(f"doubled: boot number {found.boot_n} was used before ({expected.boot_n} was shown)")
    return wrong


class Bench:
    """Boots on one content after the other. Use as a context manager.

    Args:
        folder: an empty folder of its own.
        size: bytes of the disk.
    """

    def __init__(self, folder: Path, size: int) -> None:
        target = folder / DISK_NAME
        self._mount = folder / "mount"
        self._mount.mkdir(parents=True)
        target.touch()
        self._target = target
        self._disk = TrialDisk(size, target)

    def __enter__(self) -> "Bench":
        self._disk.__enter__()
        return self

    def __exit__(self, *_: object) -> None:
        self._disk.__exit__()

    def trial(self, content: bytes | bytearray, writes: Iterable[Write], expected: Expected, *, process: bool = False) -> Trial:
        """Boot on `content` with `writes` done to it; `process` starts the agent as a real process."""
        if self._disk.error is not None:
            raise self._disk.error
        self._disk.reset(content, writes)
        trial = Trial()
        device, descriptor = attach(self._target)
        try:
            self._mount_repaired(device, trial)
        except (OSError, subprocess.SubprocessError) as error:
            trial.violations.append(f"the file system does not come up: {error}")
            return trial
        finally:
            os.close(descriptor)
        data = self._mount / "data"
        try:
            trial.violations += side_file(data, expected)
            try:
                found = boot_as_process(data) if process else boot_in_child(data)
            except (RuntimeError, TimeoutError, OSError) as error:
                trial.violations.append(f"it does not boot: {error}")
                return trial
            trial.recoveries = found.recoveries
            broken, trial.freed = judge(data, found, expected)
            trial.violations += broken
            return trial
        finally:
            unmount(self._mount)

    def _mount_repaired(self, device: str, trial: Trial) -> None:
        """As a machine does at its start: where the file system cannot be mounted, it is checked and repaired first."""
        try:
            mount(device, self._mount, "ext4", "noinit_itable")
        except OSError:
            # e2fsck looks for the backup of a torn superblock by itself, but only where groups have their usual size.
            for where in ([], ["-b", str(GROUP_BLOCKS), "-B", "4096"]):
                done = subprocess.run([program("e2fsck"), "-f", "-y", *where, device], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, timeout=BOOT_TIMEOUT_S)
                if done.returncode in REPAIRED:
                    break
            trial.repaired = True
            mount(device, self._mount, "ext4", "noinit_itable")
