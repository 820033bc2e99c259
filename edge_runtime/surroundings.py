"""What an edge stands in: clock, disk, network, threads, chance. This machine's by default; the simulator brings its own.

One place, so that nothing of the runtime has to be patched to be tested under another clock or on a failing disk.
"""

import asyncio
import gc
import os
import random
from collections.abc import Callable, Mapping

from .clock import SystemClock
from .contract.lean_dataclass import dataclass, field
from .decisions.engine import DecisionEngine, Predictor
from .decisions.rules import RuleSet
from .journal.database import WAL_GROWN_BYTES
from .journal.lane import Worker
from .journal.recovery import RESERVE_BLOCK
from .journal.storage import FILES, Storage
from .mqtt_session import MqttSession
from .pace import Pace
from .system.process import return_free_memory


def settle() -> None:
    """After start-up: what is there stays, so the collector need not look at it again, and free pages go back to the system."""
    gc.collect()
    gc.freeze()
    return_free_memory()


@dataclass(slots=True)
class Surroundings:
    """Where one edge runs.

    Attributes:
        clock: wall and monotonic time.
        storage: the disk of the journal.
        entropy: chance: boot ids, jitter.
        session: makes MQTT connections; the arguments of `MqttSession`.
        worker: makes threads that do jobs in order.
        engine: makes the decision engine.
        pace: how often periodic duties run.
        settle: called once when everything is up.
        tidy: called every `Pace.tidy_s`.
        told: the folder with what this machine's start says of what it was given (`provisioned`); empty for none.
        wal_bytes, reserve_block: see `JournalDatabase.grow_wal` and `SideFile.reserve`.
    """

    clock: SystemClock = field(default_factory=SystemClock)
    storage: Storage = FILES
    entropy: random.Random = field(default_factory=random.SystemRandom)
    session: Callable[..., MqttSession] = MqttSession
    worker: Callable[[str, asyncio.AbstractEventLoop], Worker] = Worker
    engine: Callable[[RuleSet, Mapping[str, Predictor]], DecisionEngine] = DecisionEngine
    pace: Pace = field(default_factory=Pace)
    settle: Callable[[], None] = settle
    tidy: Callable[[], None] = return_free_memory
    told: str = field(default_factory=lambda: os.environ.get("NOVACRON_TOLD", ""))
    wal_bytes: int = WAL_GROWN_BYTES
    reserve_block: int = RESERVE_BLOCK
