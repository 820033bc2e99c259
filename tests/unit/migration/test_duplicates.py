"""References to pages of other extents: whatever is proposed is equal, whatever is not there or not equal is asked for again, and the bytes that arrive are those that were sent."""

import random
import threading
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_migration import codecs, extents, layout
from gpu_migration.duplicates import PageIndex
from gpu_migration.errors import BaseMismatch
from gpu_migration.layout import EXTENT, PAGE, PAGES, Page
from gpu_migration.receiver import Receiver
from gpu_migration.sender import Sender, Sent
from gpu_migration.sources import FileSource

from .memory import memory

LZ4 = codecs.BY_NAME["lz4"]


def spread(seed: int, count: int, few: int) -> bytes:
    """So many extents of a few pages each, which are drawn from a few different ones, some of them nearly alike; the last not whole."""
    rng = random.Random(seed)
    pool = [memory(1, seed * 100 + n, ("text", "random", "almost zero")) for n in range(few)]
    out = b"".join(b"".join(rng.choice(pool) for _ in range(rng.randrange(1, 6))).ljust(EXTENT, b"\0") for _ in range(count))
    return out[: len(out) - EXTENT + 5 * PAGE - rng.randrange(PAGE)]


class Ends:
    """Both ends without a wire: what the destination holds is what was decoded there."""

    def __init__(self, data: bytes) -> None:
        self.source, self.there, self.held = bytearray(data), bytearray(len(data)), set[int]()
        self.index = PageIndex(layout.pages_of(len(data)), lambda number: bytes(self.source[number * PAGE : (number + 1) * PAGE]), self.held.__contains__)

    def page(self, number: int) -> bytes:
        return bytes(self.there[number * PAGE : (number + 1) * PAGE]) if number // PAGES in self.held else b""

    def encode(self, n: int) -> extents.Encoded:
        return extents.encode(n, bytes(self.source[n * EXTENT : (n + 1) * EXTENT]), lambda _: LZ4, elsewhere=self.index)

    def arrive(self, n: int, encoded: extents.Encoded) -> None:
        raw = extents.decoded(layout.unpack(encoded.data), memoryview(bytearray(EXTENT)), page_at=self.page)
        self.there[n * EXTENT : n * EXTENT + len(raw)] = raw
        self.held.add(n)


@given(seed=st.integers(0, 2**32), few=st.integers(1, 8), window=st.integers(1, 4))
@settings(max_examples=30)
def test_what_arrives_is_what_was_sent_whatever_is_on_its_way(seed: int, few: int, window: int) -> None:
    """Up to `window` extents are under way while others are encoded."""
    ends, waiting, dups = Ends(spread(seed, 6, few)), [], 0
    for n in range(6):
        waiting.append((n, ends.encode(n)))
        dups += waiting[-1][1].counts[Page.DUP]
        if len(waiting) == window:
            ends.arrive(*waiting.pop(0))
    for one in waiting:
        ends.arrive(*one)
    assert ends.there == ends.source
    if few == 1 and window == 1:
        assert dups >= 4


@given(seed=st.integers(0, 2**32), few=st.integers(1, 6), at=st.integers(0, 10**6))
@settings(max_examples=30)
def test_a_source_that_changes_gives_the_right_bytes_or_is_asked_for_again(seed: int, few: int, at: int) -> None:
    """A page is changed after its extent went out: an equal page elsewhere may still be taken for it, and the destination sees it."""
    ends = Ends(spread(seed, 4, few))
    for n in (0, 1):
        ends.arrive(n, ends.encode(n))
    place = at % (2 * EXTENT)
    ends.source[place] ^= 1
    ends.source[2 * EXTENT : 2 * EXTENT + PAGE] = ends.source[place // PAGE * PAGE : (place // PAGE + 1) * PAGE]
    for n in (2, 3):
        try:
            ends.arrive(n, ends.encode(n))
        except BaseMismatch:
            ends.arrive(n, extents.encode(n, bytes(ends.source[n * EXTENT : (n + 1) * EXTENT]), lambda _: LZ4))
    assert ends.there[2 * EXTENT :] == ends.source[2 * EXTENT :]


def test_negative_control_an_index_that_does_not_compare_is_caught_by_the_hash() -> None:
    ends = Ends(spread(3, 3, 4))
    ends.arrive(0, ends.encode(0))

    class Trusting(PageIndex):
        def find(self, index: int, pages: extents.Words, rows: extents.Rows, marks: extents.Words) -> tuple[extents.Rows, extents.Words]:
            return rows[:1], np.zeros(1, np.uint64)

    ends.index.find = Trusting(1, ends.page, ends.held.__contains__).find  # type: ignore[method-assign]
    ends.source[EXTENT : EXTENT + PAGE] = memory(1, 999, ("text",))
    with pytest.raises(BaseMismatch, match="other bytes come out"):
        ends.arrive(1, ends.encode(1))


def test_a_page_that_only_looks_alike_is_not_proposed_and_forgotten() -> None:
    ends = Ends(memory(1, 1, ("text",)).ljust(EXTENT, b"\0") * 2)
    ends.arrive(0, ends.encode(0))
    ends.source[EXTENT + 3000] ^= 1  # between two samples
    assert ends.encode(1).counts[Page.DUP] == 0
    ends.source[EXTENT + 3000] ^= 1
    ends.held.add(1)
    assert ends.encode(1).counts[Page.DUP] == 0  # the entry is its own now


def move(folder: Path, data: bytes, **options: object) -> Sent:
    (folder / "source").write_bytes(data)
    taking = Receiver(folder / "target", bytes(32), ("127.0.0.1", 0), patience=60)
    serving = threading.Thread(target=taking.serve)
    serving.start()
    file = FileSource(folder / "source")
    try:
        # So slow a link that the wire is what holds the move up: equal pages are looked for then.
        return Sender(file, bytes(32), taking.address, threads=1, codecs=("lz4",), limit=5e6, **options).run()  # type: ignore[arg-type]
    finally:
        serving.join()
        file.close()
        assert (folder / "target").read_bytes() == data


def test_a_move_with_and_without_references(tmp_path: Path) -> None:
    data = spread(5, 12, 3)
    for name, references in (("with", True), ("without", False)):
        (tmp_path / name).mkdir()
        done = move(tmp_path / name, data, references=references)
        assert done.resent == 0


@pytest.mark.parametrize("pages", [9, 1])
def test_a_reference_that_is_wrong_there_is_sent_again_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, pages: int) -> None:
    """The destination loses what it was thought to hold, as one that was started anew would: it is asked for nothing twice, and all arrives. With one page, in a record with others."""
    refused: list[int] = []
    find = PageIndex.find

    def wrong(self: PageIndex, index: int, pages: extents.Words, rows: extents.Rows, marks: extents.Words) -> tuple[extents.Rows, extents.Words]:
        if index == 3:
            refused.append(index)
            return rows[:1], np.array([0], np.uint64)  # whatever is there, it is another page
        return find(self, index, pages, rows, marks)

    monkeypatch.setattr(PageIndex, "find", wrong)
    data = b"".join(memory(pages, 50 + n, ("text",)).ljust(EXTENT, b"\0") for n in range(5))
    move(tmp_path, data)
    assert refused == [3]
