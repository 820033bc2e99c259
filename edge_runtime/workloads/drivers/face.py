"""The one face of every driver: what can be asked, what is answered, and how it is refused.

A driver is asked once what it can do here (`probe`, which runs a real thing) and answers with `Capabilities`: each ability is there, or the reason why not. All drivers have the
operations of `Driver`. The others are protocols of their own; a driver has those that its capabilities name, so there is no operation that exists only to fail.
Whoever calls asks `Capabilities.demand` first. Operations that wait are coroutines; none blocks the loop.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from enum import StrEnum
from pathlib import Path
from typing import Any, Protocol, runtime_checkable


class Ability(StrEnum):
    """What a driver can be able to do: operations, and ways of doing them."""

    START = "start"
    STOP = "stop"
    ADOPT = "adopt"
    """What runs outlives the agent, and is found by the next one."""
    PAUSE = "pause"
    STATS = "stats"
    LOGS = "logs"
    EXEC = "exec"
    CHECKPOINT = "checkpoint"
    RESTORE = "restore"
    SNAPSHOT = "snapshot"
    MIGRATE_OUT = "migrate-out"
    MIGRATE_IN = "migrate-in"
    LIVE = "live"
    """A move while it runs."""
    INCREMENTAL = "incremental"
    """A checkpoint that carries only what changed."""
    LAZY = "lazy"
    """A restore that fetches memory as it is touched."""
    LIMITS = "limits"
    DISK_LIMIT = "disk-limit"
    """What it writes to its root is held to `requests.disk`."""
    NETWORK = "network"
    """More than loopback, and ports that are published on the node."""
    SECCOMP = "seccomp"
    USER_NAMESPACE = "user-namespace"
    ROOTLESS = "rootless"


LAYER, QCOW2 = "layer", "qcow2"
"""Forms of a snapshot."""


class DriverError(Exception):
    """An operation that was not done: `field` (of the workload's document, or what failed), `problem`, `remedy`."""

    def __init__(self, field: str, problem: str, remedy: str) -> None:
        super().__init__(f"{field}: {problem}; {remedy}")
        self.field, self.problem, self.remedy = field, problem, remedy

    def to_json(self) -> dict[str, str]:
        """The error as a JSON object."""
        return {"field": self.field, "problem": self.problem, "remedy": self.remedy}


class Refused(DriverError):
    """Refused before anything was touched: the document asks for what is wrong, or for what this driver or host cannot do."""


class Failed(DriverError):
    """It was tried, and failed; what had been done of it has been undone, except where the problem says otherwise."""


@dataclass(frozen=True, slots=True)
class Capabilities:
    """What one driver can do on one host.

    Attributes:
        driver, kind: its name, and the kind of workload that it runs.
        runtime: name and version of what it drives; empty where there is none.
        arch, cpu_flags: what a process may have come to rely on; a checkpoint goes only to a host that has all of it.
        cgroup: `v1`, `v2`, `hybrid` or `none`.
        kernel: release of the kernel.
        cannot: reason by ability; what is not in it can be done.
    """

    driver: str
    kind: str
    runtime: str
    arch: str
    cpu_flags: tuple[str, ...]
    cgroup: str
    kernel: str
    cannot: Mapping[Ability, str]

    def can(self, ability: Ability) -> bool:
        """Whether it can."""
        return ability not in self.cannot

    @property
    def usable(self) -> bool:
        """Whether anything can be run."""
        return self.can(Ability.START)

    def demand(self, ability: Ability) -> None:
        """Raises `Refused` with the reason where the driver cannot."""
        if ability in self.cannot:
            raise Refused(ability.value, f"the {self.driver} driver cannot do this here: {self.cannot[ability]}", "run it on a node whose driver can")

    def to_json(self) -> dict[str, Any]:
        """The report as a JSON object."""
        return {
            "driver": self.driver, "kind": self.kind, "usable": self.usable, "runtime": self.runtime, "arch": self.arch, "cpu_flags": list(self.cpu_flags), "cgroup": self.cgroup, "kernel": self.kernel,
            "can": [ability.value for ability in Ability if self.can(ability)], "cannot": {ability.value: self.cannot[ability] for ability in Ability if ability in self.cannot},
        }


class Phase(StrEnum):
    """Where an instance is in its life."""

    PREPARED = "prepared"
    RUNNING = "running"
    PAUSED = "paused"
    CHECKPOINTED = "checkpointed"
    """It does not run, and goes on where its state is restored: that was taken, and ended it."""
    ENDED = "ended"
    LOST = "lost"
    """It does not run, and nobody saw how it ended: the machine restarted, or what watched it was killed."""


@dataclass(frozen=True, slots=True)
class Key:
    """Which instance: the workload and the epoch of its placement. Two epochs of one workload are two instances."""

    id: str
    epoch: int


@dataclass(frozen=True, slots=True)
class Exit:
    """How it ended: the code, or the signal (0: none); whether the kernel ended it for want of memory, and how many of its processes it had killed for that, as far as is known."""

    code: int
    signal: int = 0
    out_of_memory: bool = False
    at_ms: int = 0
    memory_kills: int = 0

    @property
    def reason(self) -> str:
        """In words; empty where all is well."""
        if self.out_of_memory:
            return "killed: its memory limit was reached"
        why = f"killed by signal {self.signal}" if self.signal else f"exit code {self.code}" if self.code else ""
        return f"{why}; before that the kernel killed {self.memory_kills} of its processes for want of memory" if why and self.memory_kills else why


@dataclass(frozen=True, slots=True)
class Status:
    """What is known of an instance. `pid` is its first process on the host, 0 where it does not run; `reason` says why where something is amiss; `load_ms` how long its start
    took until it stood ready, 0 where that was not measured."""

    key: Key
    phase: Phase
    pid: int = 0
    exit: Exit | None = None
    reason: str = ""
    load_ms: float = 0.0
    still_ms: float = 0.0
    """Of one that has just come while it ran: for how long it stood still."""
    leased: bool = False
    """It runs only as long as `Leases.renew` says; where that ended it, it is lost."""
    form: str = ""
    """Of what can be converted: what it is now (`contract.workloads.FORMS`)."""


@dataclass(frozen=True, slots=True)
class Stats:
    """Use since the start: processor time (ns), and now: memory (bytes), processes and threads."""

    cpu_ns: int
    memory_bytes: int
    processes: int


@dataclass(frozen=True, slots=True)
class Output:
    """The end of what an instance, or a command in it, wrote. `cut`: there was more before."""

    stdout: bytes
    stderr: bytes
    cut: bool = False


@dataclass(frozen=True, slots=True)
class Ran:
    """A command that was run in an instance."""

    exit: Exit
    output: Output


@dataclass(frozen=True, slots=True)
class Order:
    """What shall run: an entry of desired state.

    Attributes:
        key: workload and epoch.
        image: reference of the image.
        requests: what the scheduler has set aside: `cpu` in milli-CPU, `memory` and `disk` in bytes.
        spec: the document's `spec`: what the driver wants to know.
        job: it runs to its end (kind `batch`); nobody calls it.
        leased: it shall run only as long as `Leases.renew` says, also where the agent is dead.
    """

    key: Key
    image: str
    requests: Mapping[str, int] = field(default_factory=dict)
    spec: Mapping[str, Any] = field(default_factory=dict)
    job: bool = False
    leased: bool = False


class Driver(Protocol):
    """What every driver has. Errors are `Refused` and `Failed`."""

    async def probe(self) -> Capabilities:
        """Run a real thing and say what can be done here. Never raises for what the host lacks."""

    async def prepare(self, order: Order) -> Status:
        """Check everything and lay it out on the disk, all or nothing. Doing it again for the same key is answered as it stands."""

    async def start(self, key: Key) -> Status:
        """Start what is prepared; returns when it runs. What runs already is answered as it stands."""

    async def wait(self, key: Key) -> Status:
        """Until it does not run any more."""

    async def stop(self, key: Key, grace_s: float) -> Status:
        """Ask it to end, kill it after `grace_s` seconds; returns when it has ended. Ended ones are answered as they stand."""

    async def status(self, key: Key) -> Status:
        """What is known of it; raises `Refused` where nothing is."""

    async def instances(self) -> Sequence[Status]:
        """All that are on the disk, also those that an earlier agent started."""

    async def delete(self, key: Key) -> None:
        """Stop it at once where it runs and remove all of it. What is not there is deleted already."""


@runtime_checkable
class Leases(Protocol):
    """Drivers that end what runs by themselves when its time is over."""

    def renew(self, key: Key, until_ms: int) -> None:
        """It may run until then, milliseconds of CLOCK_BOOTTIME; also before it is prepared."""

    def lease_ms(self, key: Key) -> int:
        """Until when it may run, 0 where nobody said."""


@runtime_checkable
class Pauses(Protocol):
    """`Ability.PAUSE`."""

    async def pause(self, key: Key) -> Status:
        """Nothing of it gets the processor any more."""

    async def resume(self, key: Key) -> Status:
        """It goes on."""


@runtime_checkable
class Observes(Protocol):
    """`Ability.STATS` and `Ability.LOGS`."""

    async def stats(self, key: Key) -> Stats:
        """What it uses."""

    async def logs(self, key: Key, most: int) -> Output:
        """The last `most` bytes of each stream."""


@runtime_checkable
class Executes(Protocol):
    """`Ability.EXEC`."""

    async def exec(self, key: Key, args: Sequence[str], timeout_s: float) -> Ran:
        """Run a command in it, as its user. It is killed after `timeout_s` seconds, and that raises `Failed`."""


@runtime_checkable
class Checkpoints(Protocol):
    """`Ability.CHECKPOINT` and `Ability.RESTORE`."""

    def demand(self, ability: Ability) -> None:
        """Raises `Refused` where it cannot do that here, by the last probe."""

    async def checkpoint(self, key: Key, folder: Path, *, leave_running: bool) -> Mapping[str, Any]:
        """Write its state to an empty folder; returns what a restore needs to know."""

    def folder(self, key: Key) -> Path:
        """An instance's folder, there or not."""

    async def examine(self, folder: Path) -> Mapping[str, Any]:
        """What a restore needs to know of a checkpoint that can go on here; raises `Refused` where it cannot. Changes nothing."""

    async def restore(self, order: Order, folder: Path, *, output: Path | None = None) -> Status:
        """Go on from a checkpoint, where nothing has the order's key. `output`: a folder with what it wrote before, that it goes on with (`instance.link_output`)."""

    async def come_back(self, key: Key) -> Status:
        """Bring to its end a `restore` that an earlier agent began; of it there is something."""


@runtime_checkable
class GoesAhead(Protocol):
    """Drivers of what has a disk that can be copied while it runs, so that a checkpoint needs only what was written since."""

    async def ahead(self, key: Key, name: str, target: Path, speed: int = 0) -> Mapping[str, Any]:
        """Copy the disk of one that runs, as of one moment, to `target`, which is not there, and remember from then on what is written, under `name`. Returns `bytes` of the copy. It has no earlier one any more.
        `speed`: bytes in a second at most; 0: no bound."""

    async def checkpoint(self, key: Key, folder: Path, *, leave_running: bool, since: str = "") -> Mapping[str, Any]:
        """As `Checkpoints` has it. `since`: with only that part of the disk which was written since `ahead` under that name, where that is known still; else with all of it."""


@runtime_checkable
class Converts(Protocol):
    """Drivers of what can become something else while it runs, as the same processes."""

    async def convert(self, key: Key, to: str) -> Status:
        """Make it that (`contract.workloads.FORMS`). What it is already is answered as it stands. Where this raises it is what it was, or what the problem says."""


@runtime_checkable
class Snapshots(Protocol):
    """`Ability.SNAPSHOT`."""

    def snapshot_bytes(self, key: Key) -> int:
        """What `snapshot` may write, as far as that is known before. Blocks."""

    async def snapshot(self, key: Key, folder: Path) -> Mapping[str, Any]:
        """Write what it has on its disk, as of one moment, to an empty folder; then it goes on as it was.

        Returns:
            `file` in the folder: a layer (tar) of what it changed over its image's, or a disk (qcow2, with none below it); `format`: `layer` or `qcow2`; `image`: digest of its image;
            `at_ms`: which moment, since 1970; `paused_ms`: how long it stood still.
        """


@runtime_checkable
class Migrates(Checkpoints, Protocol):
    """`Ability.MIGRATE_OUT` and `Ability.MIGRATE_IN`: what a checkpoint of it holds goes on on another host. Both look and touch nothing; then it is a `checkpoint` there and a `restore` here."""

    async def migrate_out(self, key: Key) -> Mapping[str, Any]:
        """What the other side has to know of one that runs and can leave (its *offer*): `host`, `image`, `layers`, `bytes` that its state may take; raises `Refused` where it cannot."""

    async def migrate_in(self, order: Order, offer: Mapping[str, Any]) -> None:
        """Whether what is offered could go on here; raises `Refused` where it could not. Nothing of the order's key is here, before and after."""


@runtime_checkable
class Lives(Protocol):
    """`Ability.LIVE`: what runs moves without being stopped first. One node's `leave` and another's `arrive` and `go` work at the same time, over connections that others carry."""

    def demand(self, ability: Ability) -> None:
        """See `Checkpoints`."""

    async def leave(self, key: Key, folder: Path, speed: int) -> None:
        """Copy one that runs to where it shall go, by the sockets in `folder`, which may not be there yet; returns when nearly all of it is there. Where this raises, it stays. From then on it leaves as soon as its target lets it begin.
        `speed`: bytes in a second at most; 0: no bound."""

    async def stay(self, key: Key) -> None:
        """One that left, or was about to, is this node's again: its target never began it, and never will."""

    async def arrive(self, order: Order, offer: Mapping[str, Any], folder: Path) -> None:
        """Be ready for one that comes: from here on there are sockets in `folder` by which it does. Where one waits already under that key, it is that one. Where this raises, nothing of it is here."""

    async def go(self, key: Key) -> Status:
        """Let one that comes begin as soon as all of it is here; how it is then. Raises `Refused` where it never will; then nothing of it is here."""

    def waits(self, key: Key) -> bool:
        """Whether what is here under a key has yet to come."""
