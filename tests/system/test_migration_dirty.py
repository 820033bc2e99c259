"""Which pages of another process's shared memory were written: every one that was, whatever the tracker."""

import os
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from gpu_migration import dirty, layout
from gpu_migration.errors import SourceError
from gpu_migration.layout import PAGE
from gpu_migration.sources import FileSource

MEMORY = 24 << 20
FILLED = 16 << 20
WRITER = """
import mmap, sys
file = open(sys.argv[1], "r+b")
memory = mmap.mmap(file.fileno(), 0, flags=mmap.MAP_PRIVATE if sys.argv[2] == "private" else mmap.MAP_SHARED)
memory[:int(sys.argv[3])] = bytes(range(256)) * (int(sys.argv[3]) // 256)
print("ready", flush=True)
for line in sys.stdin:
    for page in map(int, line.split()):
        memory[page * 4096 + 7] ^= 255
    print("done", flush=True)
"""


class Writer:
    """A process that writes into pages that it is told."""

    def __init__(self, path: Path, how: str = "shared") -> None:
        self.process = subprocess.Popen([sys.executable, "-c", WRITER, str(path), how, str(FILLED)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        self._said()

    def _said(self) -> None:
        assert self.process.stdout is not None and self.process.stdout.readline()

    def write(self, pages: list[int]) -> None:
        assert self.process.stdin is not None
        self.process.stdin.write(" ".join(map(str, pages)) + "\n")
        self.process.stdin.flush()
        self._said()

    def end(self) -> None:
        assert self.process.stdin is not None and self.process.stdout is not None
        self.process.stdin.close()
        assert self.process.wait(60) == 0, "being looked at has not harmed it"
        self.process.stdout.close()


@pytest.fixture
def memory() -> Iterator[Path]:
    path = Path(f"/dev/shm/dirty-test-{os.getpid()}")
    with path.open("wb") as file:
        file.truncate(MEMORY)
    yield path
    path.unlink()


@pytest.fixture
def writer(memory: Path) -> Iterator[Writer]:
    made = Writer(memory)
    yield made
    made.end()


def protect(pid: int, source: FileSource) -> dirty.Tracker:
    try:
        return dirty.tracker(pid, source, 2, "protect")
    except SourceError as error:
        if "no write protection" in str(error):
            pytest.skip(str(error))
        raise


@pytest.mark.parametrize("kind", ["protect", "hash"])
def test_every_written_page_is_found_and_no_other(memory: Path, writer: Writer, kind: str) -> None:
    source, rng = FileSource(memory), np.random.default_rng(5)
    tracker = protect(writer.process.pid, source) if kind == "protect" else dirty.tracker(writer.process.pid, source, 2, "hash")
    try:
        tracker.arm()
        tracker.brought(source.hashes(2))
        assert tracker.written().tolist() == []
        for count in (1, 50, 3000, 0):
            pages = sorted(set(rng.integers(0, MEMORY // PAGE, count).tolist()))
            writer.write(pages)
            found = tracker.written()
            assert found.tolist() == pages
            tracker.sent(found, memoryview(source.mapped()[found].tobytes()))
    finally:
        tracker.close()
        source.close()
    writer.write([1, 2, 3])


def test_a_page_that_was_sent_and_written_back_is_found(memory: Path, writer: Writer) -> None:
    """Control: held against the look before, it would be as it was."""
    source = FileSource(memory)
    tracker = dirty.PageHashes(source, 2)
    try:
        tracker.brought(source.hashes(2))
        writer.write([9])
        found = tracker.written()
        tracker.sent(found, memoryview(source.mapped()[found].tobytes()))
        writer.write([9])
        assert tracker.written().tolist() == [9]
    finally:
        source.close()


def test_an_extent_that_was_sent_otherwise_is_given_whole(memory: Path, writer: Writer) -> None:
    source = FileSource(memory)
    tracker = dirty.PageHashes(source, 2)
    try:
        held = source.hashes(2)
        writer.write([300])
        tracker.brought(held)
        assert tracker.written().tolist() == list(range(layout.PAGES, 2 * layout.PAGES))
    finally:
        source.close()


def test_what_others_map_or_is_not_shared_is_not_protected(memory: Path) -> None:
    source, first = FileSource(memory), Writer(memory)
    try:
        protect(first.process.pid, source).close()
        assert dirty.tracker(first.process.pid, source, 1, unseen="a disk writes into it").name == "page hashes"
        with pytest.raises(SourceError, match="a disk writes into it"):
            dirty.tracker(first.process.pid, source, 1, "protect", "a disk writes into it")
        second = Writer(memory)
        with pytest.raises(SourceError, match=f"process {second.process.pid} maps it too"):
            dirty.tracker(first.process.pid, source, 1, "protect")
        assert dirty.tracker(first.process.pid, source, 1).name == "page hashes"
        second.end()
        private = Writer(memory, "private")
        first.end()
        with pytest.raises(SourceError, match="share=on"):
            dirty.tracker(private.process.pid, source, 1, "protect")
        private.end()
        with pytest.raises(SourceError, match="does not map all"):
            dirty.tracker(os.getpid(), source, 1, "protect")
    finally:
        source.close()
