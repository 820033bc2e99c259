"""Tables in memory that can be taken back to a mark, as the scheduler's state can. Pure."""

from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")

MAX_NEWS = 10_000
"""Keys that a watch collects before it says only that there were too many: as many as a hub plans jobs."""


class Watch:
    """What was changed in a table, or taken back, since `clear`."""

    def __init__(self) -> None:
        self.keys: dict[Any, bool] = {}
        self.lost = False
        """More than can be told."""
        self.moved = False
        """A key that was taken out came back, behind all others."""

    def note(self, key: Any, anew: bool) -> None:
        """A key was changed; `anew`: it was not in the table before."""
        if anew and key in self.keys:
            self.moved = True
        if len(self.keys) >= MAX_NEWS:
            self.keys, self.lost = {}, True
        self.keys[key] = True

    def clear(self) -> None:
        """Begin again."""
        self.keys, self.lost, self.moved = {}, False, False


class Ledger:
    """Remembers what stood in dictionaries before they were changed through it."""

    def __init__(self) -> None:
        self._past: list[tuple[dict[Any, Any], Any, Any]] = []
        self._watched: dict[int, list[Watch]] = {}
        """By the identity of a table, which lives as long as its ledger."""

    def watch(self, table: dict[K, V]) -> Watch:
        """Be told what is changed in a table from now on."""
        watch = Watch()
        self._watched.setdefault(id(table), []).append(watch)
        return watch

    def put(self, table: dict[K, V], key: K, value: V | None) -> None:
        """Set `table[key]`; None removes it."""
        before = table.get(key)
        self._past.append((table, key, before))
        for watch in self._watched.get(id(table), ()):
            watch.note(key, before is None)
        if value is None:
            table.pop(key, None)
        else:
            table[key] = value

    def mark(self) -> int:
        """Where `undo` goes back to."""
        return len(self._past)

    def undo(self, mark: int) -> None:
        """Take back every change since the mark, newest first."""
        while len(self._past) > mark:
            table, key, value = self._past.pop()
            for watch in self._watched.get(id(table), ()):
                watch.note(key, key not in table)
            if value is None:
                table.pop(key, None)
            else:
                table[key] = value

    def touched(self, table: dict[K, V]) -> list[K]:
        """The keys of `table` that were changed, each once, in order."""
        return list(dict.fromkeys(key for where, key, _ in self._past if where is table))

    def forget(self) -> None:
        """Let everything stand."""
        self._past.clear()
