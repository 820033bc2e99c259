"""What the power cuts are made of: the log of a disk, the disk of a trial, the wiretap and the books about what was seen."""

import json
import random
import struct
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.contract.records import Record, encode_batch
from tools.powercut.block_log import PAGE, SECTOR, BlockLog, Entry, Flush, Loss, Player, Write, apply, survivors
from tools.powercut.claims import Claim, Claims, Expected
from tools.powercut.fuse_disk import TrialDisk
from tools.powercut.wiretap import Packets, length_at, parse_publish

SIZE = 8 * PAGE

writes = st.builds(lambda sector, count, fill: Write(sector * SECTOR, bytes([fill]) * (count * SECTOR)), st.integers(0, SIZE // SECTOR - 17), st.integers(1, 17), st.integers(1, 255))
entries: st.SearchStrategy[list[Entry]] = st.lists(st.one_of(writes, writes, writes, st.just(Flush()), st.builds(lambda write: Loss((write,)), writes)), max_size=30)


def played(log: BlockLog, position: int) -> bytes:
    content = bytearray(log.base)
    for entry in log.entries[:position]:
        apply(content, entry)
    return bytes(content)


# -- the log of a disk -----------------------------------------------------------------------------------------------------------


@given(entries, st.data())
def test_a_player_is_at_each_position_what_was_written_and_what_was_flushed(log_entries: list[Entry], data: st.DataObject) -> None:
    log = BlockLog(bytes(SIZE), log_entries)
    player = Player(log)
    for position in sorted(data.draw(st.lists(st.integers(0, len(log_entries)), max_size=6))):
        player.go(position)
        durable = max((number + 1 for number, entry in enumerate(log_entries[:position]) if not isinstance(entry, Write)), default=0)
        assert player.content == played(log, position) and player.durable == played(log, durable)
        assert log.unflushed(position) == log_entries[durable:position]


@given(entries, st.integers(0, 1 << 30))
def test_a_lossy_cut_keeps_what_was_flushed_and_invents_nothing(log_entries: list[Entry], seed: int) -> None:
    log = BlockLog(bytes(SIZE), [*log_entries, Write(0, bytes([7]) * SECTOR * 3)])
    player = Player(log)
    player.go(log.position)
    left, pending = player.lossy(random.Random(seed)), log.unflushed(log.position)
    assert left != pending
    for write in left:
        assert any(
            whole.offset <= write.offset and write.offset + len(write.data) <= whole.offset + len(whole.data)
            and whole.data[write.offset - whole.offset :][: len(write.data)] == write.data and (write.offset - whole.offset) % SECTOR == 0 for whole in pending
        )


def test_all_kinds_of_loss_are_drawn() -> None:
    pending = [Write(0, bytes(PAGE * 2)), Write(PAGE * 2, b"a" * PAGE)]
    kinds = {tuple((write.offset, len(write.data)) for write in survivors(pending, random.Random(seed))) for seed in range(300)}
    assert () in kinds and ((0, PAGE * 2), (PAGE * 2, PAGE)) in kinds
    assert any(size % PAGE and size % SECTOR == 0 for kind in kinds for _, size in kind)  # torn at a sector
    assert any(offset > PAGE * 2 for kind in kinds for offset, _ in kind)  # its end without its beginning


def test_cuts_lie_behind_each_write() -> None:
    log = BlockLog(b"", [Write(0, b"x"), Flush(), Flush(), Write(1, b"y"), Loss(()), Write(2, b"z")])
    assert (log.cuts(), log.writes, log.flushes) == ([1, 4, 6], 3, 2)


@given(st.lists(st.tuples(st.integers(0, SIZE - 1), st.binary(min_size=1, max_size=2 * PAGE)), max_size=12), st.integers(0, SIZE - 1), st.integers(1, 3 * PAGE))
def test_a_trial_disk_reads_what_was_written_and_leaves_its_base_alone(changes: list[tuple[int, bytes]], offset: int, size: int) -> None:
    base = bytes(range(256)) * (SIZE // 256)
    disk, model = TrialDisk(SIZE, Path("unused")), bytearray(base)
    disk.reset(base)
    for where, data in changes:
        data = data[: SIZE - where]
        disk.write(where, data)
        model[where : where + len(data)] = data
    size = min(size, SIZE - offset)
    assert disk.read(offset, size) == model[offset : offset + size]
    disk.reset(base, [Write(3, b"abc")])
    assert disk.read(0, SIZE) == base[:3] + b"abc" + base[6:]


# -- the wiretap -----------------------------------------------------------------------------------------------------------------


def length(value: int) -> bytes:
    out = bytearray()
    while True:
        value, digit = value >> 7, value & 0x7F
        out.append(digit | (0x80 if value else 0))
        if not value:
            return bytes(out)


def publish(topic: str, packet: int, payload: bytes, version: int) -> bytes:
    body = struct.pack(">H", len(topic)) + topic.encode() + (struct.pack(">H", packet) if packet else b"") + (length(5) + b"\x02" + bytes(4) if version == 5 else b"") + payload
    return bytes([0x32 if packet else 0x30]) + length(len(body)) + body


@given(st.lists(st.tuples(st.integers(0, 65_535), st.binary(max_size=400)), max_size=8), st.sampled_from([4, 5]), st.randoms())
def test_packets_are_found_however_the_stream_is_cut(messages: list[tuple[int, bytes]], version: int, draw: random.Random) -> None:
    stream = b"".join(publish("a/b", packet, payload, version) for packet, payload in messages)
    packets, found = Packets(), []
    while stream:
        cut = draw.randint(1, len(stream))
        found += packets.feed(stream[:cut])
        stream = stream[cut:]
    assert [parse_publish(first, body, version) for first, body in found] == [("a/b", packet, payload) for packet, payload in messages]


def test_what_is_not_mqtt_is_an_error_and_not_a_wait_for_ever() -> None:
    with pytest.raises(ValueError):
        Packets().feed(b"\x30\xff\xff\xff\xff\x01")
    with pytest.raises(ValueError):
        Packets().feed(b"\x30" + length(1 << 25))
    assert length_at(b"\x80", 0) is None


# -- the books -------------------------------------------------------------------------------------------------------------------


def batch(records: list[Record], chain: bytes = b"") -> bytes:
    return encode_batch(
        edge="e", boot="b1", boot_n=3, stream="decision", lane="live", floor=1, floor_chain=bytes(16), dropped=0, live=1, history=1, next_seq=9, records=records, chain=chain,
    )


def test_claims_hold_from_their_position_on() -> None:
    claims, expected = Claims(), Expected()
    first, second = Record(1, "b1", 5, 6, "ntp", "decision", '{"inputs":{"n":1}}'), Record(2, "b1", 5, 6, "ntp", "decision", '{"inputs":{"n":2}}')
    claims.edge_published(4, "novacron/1/edge/e/up", batch([first]))
    claims.edge_acknowledged(7, "novacron/1/device/boiler/telemetry", b'{"n": 1}')
    claims.edge_published(9, "novacron/1/device/fan/command", json.dumps({"id": "e.b1.2.0", "name": "act", "args": {"n": 2}}).encode())
    claims.edge_published(9, "novacron/1/edge/e/up", batch([second]))
    claims.edge_published(9, "novacron/1/device/fan/command", json.dumps({"id": "of-the-hub", "name": "speed", "args": {}}).encode())
    claims.hub_said(12, "novacron/1/edge/e/receipts", b'{"marks": [{"stream": "decision", "upto": 2}]}')
    claims.advance(expected, 3)
    assert not expected.records and expected.boot_n == 0
    claims.advance(expected, 4)
    assert list(expected.records) == [("decision", 1)] and expected.records["decision", 1] == first and expected.boot_n == 3
    claims.advance(expected, 8)
    assert expected.readings == {("boiler", 1)} and not expected.commands
    claims.advance(expected, 100)
    assert expected.commands == {"e.b1.2.0": ("b1", 2, 2)} and expected.orders == {"of-the-hub"} and expected.receipts == {"decision": 2} and expected.newest == {"decision": 2}
    assert not expected.conflicts


def test_one_number_with_two_contents_is_a_conflict() -> None:
    expected = Expected()
    for body in ("{}", "{}", '{"other":1}'):
        expected.add(Claim(1, "record", ("event", 5), Record(5, "b", 1, 1, "ntp", "boot", body)))
    assert len(expected.conflicts) == 1 and "event 5" in expected.conflicts[0]
