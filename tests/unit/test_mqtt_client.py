"""The traffic that is taken past paho: what it makes of any bytes in any pieces is what paho makes of them."""

import socket
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from paho.mqtt import client as paho
from paho.mqtt.enums import CallbackAPIVersion

from edge_runtime.contract.limits import MAX_MESSAGE_BYTES
from edge_runtime.mqtt_client import PACKET_MAX, traffic_client

TOPICS = st.text(st.characters(codec="utf-8", exclude_characters="#+\0"), min_size=1, max_size=20).map(str.encode)
MIDS = st.integers(1, 65_535)


def length(value: int) -> bytes:
    """A variable byte integer, by the standard (1.5.5)."""
    out = b""
    while True:
        value, digit = value // 128, value % 128
        out += bytes((digit | (0x80 if value else 0),))
        if not value:
            return out


def packet(command: int, body: bytes) -> bytes:
    return bytes((command,)) + length(len(body)) + body


@st.composite
def publishes(draw: st.DrawFn, five: bool) -> bytes:
    qos, topic, payload = draw(st.sampled_from((0, 1, 1, 1))), draw(TOPICS), draw(st.binary(max_size=300))
    flags = (8 if qos and draw(st.booleans()) else 0) | qos << 1 | draw(st.integers(0, 1))
    properties = b""
    if five:
        properties = draw(st.sampled_from((b"\0", b"\0", b"\0", b"\x05\x02\0\0\0\x07", b"\x02\x01\x01")))
    mid = draw(MIDS).to_bytes(2, "big") if qos else b""
    return packet(0x30 | flags, len(topic).to_bytes(2, "big") + topic + mid + properties + payload)


@st.composite
def streams(draw: st.DrawFn, five: bool) -> list[bytes]:
    acks = MIDS.map(lambda mid: packet(0x40, mid.to_bytes(2, "big")))
    if five:
        acks = st.one_of(acks, st.builds(lambda mid, reason: packet(0x40, mid.to_bytes(2, "big") + reason), MIDS, st.sampled_from((b"\0", b"\x10", b"\x87", b"\0\0"))))
    return draw(st.lists(st.one_of(publishes(five), acks, st.just(packet(0xD0, b""))), max_size=12))


class Line:
    """A client of ours with a real socket, and everything it took."""

    def __init__(self, five: bool) -> None:
        self.near, self.far = socket.socketpair()
        self.near.setblocking(False)
        self.client = traffic_client()(CallbackAPIVersion.VERSION2, client_id="x", protocol=paho.MQTTv5 if five else paho.MQTTv311, manual_ack=True)
        self.client._sock = self.near
        self.taken: list[tuple[bytes, bytes, int]] = []
        self.acknowledged: list[int] = []
        self.client.on_taken = lambda topic, payload, mid: self.taken.append((topic, payload, mid))
        self.client.on_acknowledged = self.acknowledged.append
        self.client.on_message = lambda _client, _userdata, message: self.taken.append((message._topic, bytes(message.payload), message.mid))

    def feed(self, data: bytes, most: int = 200) -> bool:
        """Send it and take everything; False as `take`."""
        self.far.sendall(data)
        while True:
            if not self.client.take(most):
                return False
            if self.client.has_more:
                continue
            try:
                self.near.recv(1, socket.MSG_PEEK)
            except BlockingIOError:
                return True

    def close(self) -> None:
        self.client._sock = None
        self.near.close()
        self.far.close()


def by_paho(stream: bytes, five: bool) -> list[tuple[bytes, bytes, int]]:
    """The messages as paho's own reading finds them."""
    near, far = socket.socketpair()
    near.setblocking(False)
    client = paho.Client(CallbackAPIVersion.VERSION2, client_id="x", protocol=paho.MQTTv5 if five else paho.MQTTv311, manual_ack=True)
    client._sock = near
    found: list[tuple[bytes, bytes, int]] = []
    client.on_message = lambda _client, _userdata, message: found.append((message._topic, bytes(message.payload), message.mid))
    far.sendall(stream)
    for _ in range(40):  # more than the packets of any stream here: paho says nothing of having found none
        assert client.loop_read() == 0
    client._sock = None
    near.close()
    far.close()
    return found


@pytest.mark.parametrize("five", [False, True], ids=["3.1.1", "5"])
@settings(max_examples=150, deadline=None)
@given(data=st.data())
def test_any_pieces_give_what_paho_finds_in_the_whole(five: bool, data: st.DataObject) -> None:
    packets = data.draw(streams(five))
    stream = b"".join(packets)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(stream)), max_size=8)))
    line = Line(five)
    try:
        for start, stop in zip([0, *cuts], [*cuts, len(stream)], strict=True):
            if start < stop:
                assert line.feed(stream[start:stop], data.draw(st.integers(1, 5)))
        assert line.taken == by_paho(stream, five)
        assert line.acknowledged == [int.from_bytes(one[2:4], "big") for one in packets if one[0] == 0x40]
    finally:
        line.close()


@pytest.mark.parametrize("five", [False, True], ids=["3.1.1", "5"])
@settings(max_examples=300, deadline=None)
@given(noise=st.binary(min_size=1, max_size=200))
def test_no_bytes_raise(five: bool, noise: bytes) -> None:
    line = Line(five)
    line.client.on_disconnect = lambda *_: None
    try:
        line.feed(noise)
    finally:
        line.close()


@pytest.mark.parametrize("wrong", [b"\x32\xff\xff\xff\xff\x01", b"\x40\x01\x07", b"\x40\x00", packet(0x40, b"\0\x01\0")], ids=["length", "short puback", "empty puback", "puback of MQTT 5"])
def test_what_is_no_mqtt_ends_the_connection(wrong: bytes) -> None:
    line = Line(five=False)
    assert not line.feed(wrong)
    line.close()


@pytest.mark.parametrize("five", [False, True], ids=["3.1.1", "5"])
def test_a_message_that_is_far_too_large_is_cut_and_what_follows_is_whole(five: bool) -> None:
    line = Line(five)
    none = b"\0" if five else b""
    huge = packet(0x32, b"\0\x01t" + b"\0\x07" + none + b"x" * (4 << 20))
    after = packet(0x32, b"\0\x01t" + b"\0\x08" + none + b"after")
    stream = huge + after
    for start in range(0, len(stream), 100_000):  # what a socket pair takes at once
        assert line.feed(stream[start : start + 100_000])
    (topic, cut, mid), rest = line.taken
    assert (topic, mid) == (b"t", 7) and MAX_MESSAGE_BYTES < len(cut) <= PACKET_MAX
    assert rest == (b"t", b"after", 8)
    line.close()


def test_a_packet_identifier_under_way_is_not_given_again() -> None:
    line = Line(five=False)
    line.client._last_mid = 65_533
    taken: dict[int, Any] = {65_535: None, 1: None}
    mids = []
    for _ in range(3):
        mids.append(line.client.send(b"t", b"p", False, b"", taken))
        taken[mids[-1]] = None
    assert mids == [65_534, 2, 3]
    assert line.client.send(b"t", b"p", False, b"", dict.fromkeys(range(1, 65_536))) == 0
    line.close()
    assert line.client.send(b"t", b"p", False, b"", {}) == 0


@pytest.mark.parametrize("five", [False, True], ids=["3.1.1", "5"])
@settings(max_examples=100, deadline=None)
@given(topic=TOPICS, payload=st.binary(max_size=400), retain=st.booleans(), expires=st.booleans())
def test_what_is_sent_is_what_paho_would_read(five: bool, topic: bytes, payload: bytes, retain: bool, expires: bool) -> None:
    line = Line(five)
    properties = (b"\x05\x02\0\0\0\x3c" if expires else b"\0") if five else b""
    mid = line.client.send(topic, payload, retain, properties, {})
    line.client.acknowledge(9)
    assert line.client.push() and not line.client.unsent
    sent = line.far.recv(4096)
    assert sent[-4:] == b"\x40\x02\0\x09" and sent[0] == (0x33 if retain else 0x32)
    assert by_paho(sent[:-4], five) == [(topic, payload, mid)]
    line.close()
