"""A tunnel between two local sockets loses nothing at its end, however that comes; and says whether all went over."""

import contextlib
import random
import select
import socket
import struct
import threading

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from gpu_migration import wire
from gpu_migration.tunnel import Tunnel
from tests.integration.waiting import until_sync
from tests.unit.migration.test_guest_disks import PATIENCE, Ends, read
from tests.unit.migration.test_wire import pair

MUCH = 64 << 20
"""Bytes: several times what all sockets on the way hold."""


def over(ends: Ends) -> list[bool]:
    """Once both tunnels have ended by themselves: whether each says that all went over."""
    for tunnel in ends.tunnels:
        for thread in tunnel._threads:
            thread.join(PATIENCE)
            assert not thread.is_alive()
    return [tunnel.whole for tunnel in ends.tunnels]


@pytest.mark.parametrize("unread", [False, True])
def test_all_that_was_sent_before_the_end_arrives_at_a_slow_reader(unread: bool) -> None:
    """`unread`: the writer has closed its connection with something in it, which makes the kernel reset connections."""
    ends = Ends()
    try:
        here, there = ends.outside
        data = random.Random(1).randbytes(1 << 20)
        if unread:
            there.sendall(data[: 100_000])
            until_sync(lambda: ends.tunnels[0].received, what="something to leave unread")

        def write() -> None:
            for _ in range(MUCH >> 20):
                here.sendall(data)
            here.close()

        writing = threading.Thread(target=write)
        writing.start()
        until_sync(lambda: ends.tunnels[0].sent > 2 << 20, what="what waits for the reader")
        got = bytearray()
        while writing.is_alive():  # in small pieces; from where the writer has gone on, all is on its way
            got += there.recv(16_384)
        if unread:
            with contextlib.suppress(OSError):
                there.sendall(data[:100_000])
        while part := there.recv(65_536):
            got += part
        assert len(got) == MUCH and all(got[at : at + len(data)] == data for at in range(0, MUCH, len(data)))
        there.close()
        assert over(ends) == [True, True]
    finally:
        ends.close()


def answered() -> None:
    ends = Ends()
    try:
        here, there = ends.outside
        here.sendall(b"question")
        here.shutdown(socket.SHUT_WR)
        assert read(there, 100) == b"question"
        there.sendall(b"answer" * 100_000)
        there.close()
        assert read(here, 1 << 20) == b"answer" * 100_000
        assert over(ends) == [True, True]
    finally:
        ends.close()


def test_who_only_stops_sending_is_answered() -> None:
    answered()


def test_control_a_tunnel_that_ends_both_ways_with_one_is_caught(monkeypatch: pytest.MonkeyPatch) -> None:
    def as_it_was(self: Tunnel) -> None:
        buffer = memoryview(bytearray(1 << 20))
        with contextlib.suppress(OSError):
            while count := self._local.recv_into(buffer):
                self._stream.send(wire.Kind.NBD, buffer[:count])
        self.hang_up()

    monkeypatch.setattr(Tunnel, "_out", as_it_was)
    with pytest.raises((AssertionError, OSError)):
        answered()


def test_both_may_stop_one_after_the_other() -> None:
    ends = Ends()
    try:
        for out, other in (ends.outside, reversed(ends.outside)):
            out.sendall(b"x")
            out.shutdown(socket.SHUT_WR)
            assert read(other, 2) == b"x"
        assert over(ends) == [True, True]
    finally:
        ends.close()


def test_who_only_writes_sees_that_the_other_is_gone() -> None:
    ends = Ends()
    try:
        ends.outside[1].close()
        waiting = select.poll()
        waiting.register(ends.outside[0], 0)
        assert waiting.poll(PATIENCE * 1000)[0][1] & select.POLLHUP
        with pytest.raises(OSError):
            ends.outside[0].sendall(b"x")
        assert over(ends) == [True, True]
    finally:
        ends.close()


@pytest.mark.parametrize("which", [0, 1])
def test_an_end_that_is_gone_without_a_word_ends_it_and_is_told_from_an_orderly_one(which: int) -> None:
    ends = Ends()
    try:
        ends.outside[which].sendall(b"before")
        assert read(ends.outside[1 - which], 6) == b"before"
        ends.tunnels[which]._stream.hang_up()  # as the kernel does for a process that is killed
        assert ends.outside[0].recv(1) == b"" and ends.outside[1].recv(1) == b""
        assert over(ends) == [False, False]
    finally:
        ends.close()


def test_it_is_ended_at_once_where_that_is_asked_for() -> None:
    ends = Ends()
    try:
        ends.tunnels[0].close()
        assert ends.outside[0].recv(1) == b"" and ends.outside[1].recv(1) == b""
        assert over(ends) == [False, False]
    finally:
        ends.close()


def test_an_earlier_release_at_the_other_end_is_understood() -> None:
    """It takes records without bytes for nothing, and the stream's end for the end."""
    outside, inside = socket.socketpair()
    near, far = pair()
    tunnel = Tunnel(inside, near, PATIENCE)
    try:
        outside.sendall(b"out")
        assert bytes(far.receive()[3]) == b"out"
        far.send(wire.Kind.NBD, b"in")
        assert read(outside, 2) == b"in"
        outside.close()
        assert far.receive()[0] == wire.Kind.NBD
        with pytest.raises(OSError, match="closed"):
            far.receive()
        far.hang_up()
        tunnel.wait()
        assert not tunnel.whole
    finally:
        tunnel.close()
        far.close()


@pytest.mark.parametrize(("kind", "attempt"), [(wire.Kind.NBD, 0), (wire.Kind.NBD, 3), (wire.Kind.CHANNEL, 1)])
def test_what_is_no_record_of_a_tunnel_ends_it(kind: wire.Kind, attempt: int) -> None:
    outside, inside = socket.socketpair()
    near, far = pair()
    tunnel = Tunnel(inside, near, PATIENCE)
    try:
        far.send(kind, b"", 0, attempt)
        outside.settimeout(PATIENCE)
        assert outside.recv(1) == b""
        tunnel.wait()
        assert not tunnel.whole
    finally:
        tunnel.close()
        far.close()
        outside.close()


def test_a_stream_that_lasts_is_not_ended_by_what_its_handshake_was_given() -> None:
    near, far = pair()
    try:
        assert struct.unpack("@ll", near._socket.getsockopt(socket.SOL_SOCKET, socket.SO_RCVTIMEO, 16)) != (0, 0)
        near.lasting(PATIENCE)
        for way in (socket.SO_RCVTIMEO, socket.SO_SNDTIMEO):
            assert struct.unpack("@ll", near._socket.getsockopt(socket.SOL_SOCKET, way, 16)) == (0, 0)
    finally:
        near.close()
        far.close()


SENT = st.lists(st.binary(min_size=1, max_size=200_000), max_size=4)
ENDING = st.sampled_from(["close", "stop"])


@settings(max_examples=40)
@given(both=st.tuples(SENT, SENT), endings=st.tuples(ENDING, ENDING))
def test_whatever_both_send_and_however_they_end_it_arrives(both: tuple[list[bytes], list[bytes]], endings: tuple[str, str]) -> None:
    """Each ends its sending once all is written; who closes does so only once it has read all, for what comes later has nobody to take it."""
    ends = Ends()
    got = [bytearray(), bytearray()]

    def process(number: int) -> None:
        out = ends.outside[number]
        writing = threading.Thread(target=lambda: [out.sendall(part) for part in both[number]])
        writing.start()
        due = sum(map(len, both[1 - number]))
        while endings[number] == "close" and len(got[number]) < due and (part := out.recv(8192)):
            got[number].extend(part)
        writing.join()
        if endings[number] == "close":
            out.close()
            return
        out.shutdown(socket.SHUT_WR)
        while part := out.recv(8192):
            got[number].extend(part)

    processes = [threading.Thread(target=process, args=(number,)) for number in (0, 1)]
    try:
        for one in processes:
            one.start()
        for one in processes:
            one.join(PATIENCE)
            assert not one.is_alive()
        assert [bytes(one) for one in got] == [b"".join(both[1]), b"".join(both[0])]
        assert over(ends) == [True, True]
    finally:
        ends.close()
