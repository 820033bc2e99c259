"""Tables in memory that can be taken back to a mark, as the scheduler's state can. Pure."""

from typing import Any, TypeVar

K = TypeVar("K")
V = TypeVar("V")


class Ledger:
    """Remembers what stood in dictionaries before they were changed through it."""

    def __init__(self) -> None:
        self._past: list[tuple[dict[Any, Any], Any, Any]] = []

    def put(self, table: dict[K, V], key: K, value: V | None) -> None:
        """Set `table[key]`; None removes it."""
        self._past.append((table, key, table.get(key)))
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
