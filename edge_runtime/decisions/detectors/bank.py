"""The detectors of an engine: one per (device, metric) that a rule asks about, bounded, and what of them must be written down. Pure."""

from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from .detector import Detector

MAX_DETECTORS = 1_024
"""Detectors kept: about 26 KiB each in memory as in the journal, so at most 26 MiB. One more is refused and counted: pushing out one that is in use would make all of them forget what they learned in turn."""

IDLE_MS = 86_400_000
"""A detector that saw nothing for a day gives its place to a new one where all are taken."""

KEPT_APART_MS = 600_000
"""Least time between two writings of one detector: ten minutes of learning are what a power cut may cost, and flash wears out."""

Key = tuple[str, str]


class _Entry:
    """A detector, when it last saw a value and was last written (monotonic ms), whether it learned since."""

    __slots__ = ("changed", "detector", "kept_ms", "seen_ms")

    def __init__(self, detector: "Detector", mono_ms: int) -> None:
        self.detector = detector
        self.seen_ms = self.kept_ms = mono_ms
        self.changed = False


class DetectorBank:
    """Detectors by device and metric, the one unused for longest first."""

    def __init__(self) -> None:
        self._entries: OrderedDict[Key, _Entry] = OrderedDict()
        self._gone: set[Key] = set()
        self.refused = 0

    def __len__(self) -> int:
        return len(self._entries)

    def get(self, device: str, metric: str) -> "Detector | None":
        """The detector of a metric, where it has seen one value at least."""
        entry = self._entries.get((device, metric))
        return entry.detector if entry is not None else None

    def observe(self, device: str, metric: str, at_ms: int, value: float, mono_ms: int) -> bool:
        """Feed one value; False where there is no room for one more detector."""
        key = (device, metric)
        entry = self._entries.get(key)
        if entry is None:
            if not self._room(mono_ms):
                self.refused += 1
                return False
            from .detector import Detector

            entry = self._entries[key] = _Entry(Detector(), mono_ms)
            self._gone.discard(key)
        else:
            self._entries.move_to_end(key)
        entry.seen_ms = mono_ms
        entry.changed = True
        entry.detector.observe(at_ms, value)
        return True

    def _room(self, mono_ms: int) -> bool:
        if len(self._entries) < MAX_DETECTORS:
            return True
        oldest, entry = next(iter(self._entries.items()))
        if mono_ms - entry.seen_ms < IDLE_MS:
            return False
        self._drop(oldest)
        return True

    def _drop(self, key: Key) -> None:
        del self._entries[key]
        self._gone.add(key)

    def keep_only(self, wanted: Callable[[str, str], bool]) -> None:
        """Forget the detectors that no rule asks about any more."""
        for key in [key for key in self._entries if not wanted(*key)]:
            self._drop(key)

    # -- state ---------------------------------------------------------------------------------------------------------------

    def take_gone(self) -> list[Key]:
        """Detectors forgotten since the last call: their written state is to be deleted."""
        gone, self._gone = sorted(self._gone), set()
        return gone

    def take_changed(self, mono_ms: int, limit: int, apart_ms: int = KEPT_APART_MS) -> list[tuple[str, str, str]]:
        """Device, metric and state of up to `limit` detectors that learned and were not taken for `apart_ms`, the longest unwritten first."""
        due = [(entry.kept_ms, key) for key, entry in self._entries.items() if entry.changed and mono_ms - entry.kept_ms >= apart_ms]
        taken = []
        for _, key in sorted(due)[:limit]:
            entry = self._entries[key]
            entry.kept_ms, entry.changed = mono_ms, False
            taken.append((*key, entry.detector.export_state()))
        return taken

    def restore(self, device: str, metric: str, state: object, mono_ms: int) -> None:
        """Go on from a written state; raises `DetectorStateError`; the detector then starts anew with its next value. A full bank leaves it out."""
        from .detector import Detector

        detector = Detector.from_state(state)
        if self._room(mono_ms):
            self._entries[device, metric] = _Entry(detector, mono_ms)
