"""Records of several small extents: what is put together is taken apart again, and nothing else is."""

import socket
import threading

import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_migration import keys, wire
from gpu_migration.errors import FormatError
from gpu_migration.wire import GROUP_MOST, GROUPED, SMALL, Kind
from tests.integration.waiting import until_sync

PARTS = st.lists(st.tuples(st.integers(0, (1 << 32) - 1), st.binary(min_size=1, max_size=300)), max_size=GROUP_MOST)


@given(parts=PARTS)
def test_a_group_is_taken_apart_as_it_was_put_together(parts: list[tuple[int, bytes]]) -> None:
    assert [(attempt, bytes(encoded)) for attempt, encoded in wire.ungrouped(memoryview(wire.grouped(parts)))] == parts
    assert len(wire.grouped(parts)) <= wire.PAYLOAD_MAX


@given(parts=PARTS.filter(bool), cut=st.integers(1, 400))
def test_a_group_that_ends_within_an_extent_is_refused(parts: list[tuple[int, bytes]], cut: int) -> None:
    whole = wire.grouped(parts)
    left = whole[: max(0, len(whole) - cut)]
    ends = [sum(GROUPED.size + len(encoded) for _, encoded in parts[:n]) for n in range(len(parts))]
    if len(left) in ends:  # fewer, and whole
        assert len(wire.ungrouped(memoryview(left))) == ends.index(len(left))
    else:
        with pytest.raises(FormatError):
            wire.ungrouped(memoryview(left))


@given(data=st.binary(max_size=400))
def test_any_bytes_give_extents_or_one_error(data: bytes) -> None:
    try:
        assert wire.grouped([(attempt, bytes(encoded)) for attempt, encoded in wire.ungrouped(memoryview(data))]) == data
    except FormatError:
        pass


@pytest.mark.parametrize("payload", [
    wire.grouped([(1, b"x")] * (GROUP_MOST + 1)), wire.grouped([(1, bytes(SMALL + 1))]), wire.grouped([(1, b"")]), GROUPED.pack(1, 0xFFFFFFFF), b"\1",
])
def test_too_many_too_large_or_empty(payload: bytes) -> None:
    with pytest.raises(FormatError, match=r"stream: "):
        wire.ungrouped(memoryview(payload))


def pair() -> tuple[wire.Stream, wire.Stream]:
    """Both ends of a stream."""
    with socket.create_server(("127.0.0.1", 0)) as listener:
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
    there, back = (keys.Seal(bytes([n]) * 32, bytes(16)) for n in (1, 2))
    also_there, also_back = (keys.Seal(bytes([n]) * 32, bytes(16)) for n in (1, 2))
    return wire.Stream(near, keys.Seals(there, back)), wire.Stream(far, keys.Seals(also_back, also_there))


def test_a_stream_says_whether_more_has_come_and_gives_up_in_time() -> None:
    near, far = pair()
    try:
        assert not far.waits()
        near.send(Kind.EXTENT, b"some", 3, 1)
        near.send(Kind.BYE)
        assert far.receive()[:3] == (Kind.EXTENT, 3, 1)
        until_sync(far.waits)
        assert far.receive()[0] == Kind.BYE and not far.waits()
        far.timeout(0.05)
        with pytest.raises(TimeoutError):
            far.receive()
        near.timeout(0.05)
        with pytest.raises(TimeoutError):
            while True:
                near.send(Kind.EXTENT, bytes(1 << 20))  # nobody takes it
    finally:
        near.close()
        far.close()


def test_a_thread_that_waits_wakes_when_its_stream_is_closed() -> None:
    near, far = pair()
    failed: list[BaseException] = []

    def wait() -> None:
        try:
            far.receive()
        except OSError as error:
            failed.append(error)

    waiting = threading.Thread(target=wait)
    waiting.start()
    far.close()
    waiting.join(30)
    assert not waiting.is_alive() and failed
    near.close()
