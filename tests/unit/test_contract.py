"""The contract: strict JSON, tables that name the field, versions, batches that come back as they were."""

import json

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.contract import ContractError, apidoc, jsoncodec, topics
from edge_runtime.contract.desired import parse_desired
from edge_runtime.contract.device_messages import parse_telemetry
from edge_runtime.contract.limits import MAX_MESSAGE_BYTES
from edge_runtime.contract.operations import Operation
from edge_runtime.contract.presence import EDGE_PRESENCE
from edge_runtime.contract.receipts import RECEIPTS
from edge_runtime.contract.records import CHAIN_START, Record, chain_over, encode_batch, parse_batch

NUMBERS = st.integers(-(2**63) + 1, 2**63 - 1) | st.floats(allow_nan=False, allow_infinity=False)
JSON = st.recursive(st.none() | st.booleans() | NUMBERS | st.text(max_size=20), lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=8), inner, max_size=4), max_leaves=12)


@given(JSON)
def test_canonical_text_survives_the_way_there_and_back(value: object) -> None:
    text = jsoncodec.encode(value)
    assert jsoncodec.encode(jsoncodec.decode(text.encode())) == text


@pytest.mark.parametrize(
    ("payload", "reason"),
    [
        (b"{", "json"), (b"", "json"), (b"{} x", "json"), (b"\xff\xfe", "utf8"), (b'{"a":NaN}', "nan"), (b"[Infinity]", "nan"), (b'{"a":1e999}', "nan"),
        (b"[123456789012345678901234567890]", "limit"), (b"[" * 100_000 + b"]" * 100_000, "depth"), (b"[" * 17 + b"]" * 17, "depth"), (b" " * (MAX_MESSAGE_BYTES + 1), "size"),
        (b"1" * 5000, "json"),
    ],
)
def test_bad_payloads_are_refused_with_a_reason(payload: bytes, reason: str) -> None:
    with pytest.raises(ContractError) as caught:
        jsoncodec.decode(payload)
    assert caught.value.reason == reason
    assert caught.value.remedy


@given(st.from_regex(r"-?(0|[1-9][0-9]{0,330})(\.[0-9]{1,12})?([eE][+-]?[0-9]{1,4})?", fullmatch=True))
@example("9223372036854775807")
@example("9223372036854775808")
@example("1" + "0" * 309 + ".0")
def test_a_message_that_is_not_walked_holds_no_number_that_a_walk_would_refuse(number: str) -> None:
    def walked() -> bool:
        try:
            jsoncodec.check_tree(json.loads(number))
        except ContractError:
            return False
        return True

    try:
        jsoncodec.decode(f'{{"a":{number}}}'.encode())
        accepted = True
    except ContractError:
        accepted = False
    assert accepted == walked()


@given(st.binary(max_size=200))
def test_untrusted_bytes_never_raise_anything_else(payload: bytes) -> None:
    try:
        parse_telemetry(jsoncodec.decode(payload))
    except ContractError as error:
        assert error.field and error.problem and error.remedy


@pytest.mark.parametrize("value", [float("nan"), float("inf"), {1, 2}, b"x"])
def test_what_is_not_json_is_not_written(value: object) -> None:
    with pytest.raises(ContractError):
        jsoncodec.encode({"a": value})


def _batch(records: list[Record]) -> bytes:
    return encode_batch(
        edge="gw", boot="b1", boot_n=1, stream="decision", lane="live", floor=1, floor_chain=CHAIN_START, dropped=0, live=1, history=1, next_seq=9, records=records,
        chain=chain_over(records, CHAIN_START),
    )


@given(st.lists(st.dictionaries(st.text(max_size=8), JSON, max_size=3), min_size=1, max_size=5))
def test_batches_come_back_with_the_same_chain(bodies: list[dict[str, object]]) -> None:
    records = [Record(seq, "b1", seq * 10, seq * 20, "rtc", "decision", jsoncodec.encode(body)) for seq, body in enumerate(bodies, 1)]
    parsed = parse_batch(jsoncodec.decode(_batch(records)), "gw")
    assert list(parsed.records) == records
    assert chain_over(parsed.records, CHAIN_START) == parsed.chain


def test_one_changed_byte_changes_the_chain() -> None:
    record = Record(1, "b1", 1, 2, "rtc", "decision", '{"a":1}')
    assert record.chain(CHAIN_START) != Record(1, "b1", 1, 2, "rtc", "decision", '{"a":2}').chain(CHAIN_START)


@pytest.mark.parametrize(
    ("change", "field", "reason"),
    [
        ({"v": 2}, "v", "version"), ({"v": True}, "v", "version"), ({"edge": "other"}, "edge", "topic"), ({"stream": "gossip"}, "stream", "type"), ({"floor": 0}, "floor", "limit"),
        ({"floor_chain": "zz"}, "floor_chain", "type"), ({"floor_chain": "ab"}, "floor_chain", "type"), ({"records": "x"}, "records", "type"), ({"boot_n": 1.5}, "boot_n", "type"),
    ],
)
def test_a_wrong_field_of_a_batch_is_named(change: dict[str, object], field: str, reason: str) -> None:
    good = json.loads(_batch([Record(1, "b1", 1, 2, "rtc", "decision", "{}")]))
    with pytest.raises(ContractError) as caught:
        parse_batch({**good, **change}, "gw")
    assert (caught.value.field, caught.value.reason) == (field, reason)


def test_records_out_of_order_are_refused() -> None:
    records = [Record(seq, "b1", 1, 2, "rtc", "decision", "{}") for seq in (2, 1)]
    with pytest.raises(ContractError, match=r"records\[1\].seq"):
        parse_batch(jsoncodec.decode(_batch(records)), "gw")


def test_a_newer_peer_may_send_fields_we_do_not_know() -> None:
    good = json.loads(_batch([Record(1, "b1", 1, 2, "rtc", "decision", "{}")]))
    assert parse_batch({**good, "colour": "blue"}, "gw").edge == "gw"


def test_every_example_of_the_api_page_is_valid() -> None:
    for message in apidoc.MESSAGES:
        if message.fields:
            message.parse(dict(message.example))
    assert "novacron/1/edge/<edge>/up" in apidoc.markdown()


def test_telemetry_forms() -> None:
    assert parse_telemetry(21.5)[0].values == {"value": 21.5}
    assert parse_telemetry({"a": {"b": {"c": 1}}, "d": None})[0].values == {"a.b.c": 1}
    readings = parse_telemetry([{"ts": 5, "values": {"x": 1}}, {"x": True}])
    assert [(reading.values, reading.device_ms) for reading in readings] == [({"x": 1}, 5), ({"x": True}, None)]


@pytest.mark.parametrize(
    "value", [None, [], {}, [[1]], {"a": []}, {"a b": 1}, {"x" * 80: 1}, {"a": {"b": {"c": {"d": {"e": 1}}}}}, {f"m{i}": 1 for i in range(65)}, {"a": "x" * 2000},
              [1] * 101, {"ts": "now", "values": {"x": 1}}, {"ts": -1, "values": {"x": 1}}, {"a": 2**70}],
)
def test_bad_telemetry_is_refused(value: object) -> None:
    if value == []:
        assert parse_telemetry(value) == []
        return
    with pytest.raises(ContractError):
        parse_telemetry(value)


@pytest.mark.parametrize("topic", ["novacron/1/device/x", "novacron/1/device/a b/telemetry", "other/1/device/x/telemetry", "novacron/1/device/x/gossip", "novacron/2/device/x/telemetry", "", "a/b/c/d/e"])
def test_topics_outside_the_contract(topic: str) -> None:
    with pytest.raises(ContractError):
        topics.parse(topic, "device", topics.DEVICE_LEAVES)


def test_desired_state_is_all_or_nothing() -> None:
    good = {"v": 1, "edge": "gw", "generation": 3, "spec": {"twins": {"fan": {"speed": 1}}}}
    assert parse_desired(good, "gw").twins == {"fan": {"speed": 1}}
    for spec, field in (
        ({"twins": {"fan": 3}}, "spec.twins.fan"), ({"commands": [{"id": "a"}]}, "spec.commands[0].device"), ({"rules": ["x"]}, "spec.rules[0]"),
        ({"commands": [{"id": "a", "device": "d", "name": "n", "expires_ms": 1}] * 2}, "spec.commands[1].id"),
    ):
        with pytest.raises(ContractError) as caught:
            parse_desired({**good, "spec": spec}, "gw")
        assert caught.value.field == field


def test_operations_are_fenced_and_end_once() -> None:
    running = Operation("o", "command").advance("running", epoch=2)
    with pytest.raises(ContractError, match="older"):
        running.advance("succeeded", epoch=1)
    done = running.advance("succeeded", epoch=2)
    with pytest.raises(ContractError, match="ended"):
        done.advance("failed", epoch=3)
    assert Operation.from_json(done.to_json()).to_json() == done.to_json()


def test_wanted_ranges_must_be_ranges() -> None:
    mark = {"stream": "decision", "upto": 1, "want": [[5, 2]]}
    with pytest.raises(ContractError, match=r"want\[0\]"):
        RECEIPTS.parse({"v": 1, "edge": "e", "hub": "h", "boot": "b", "marks": [mark], "credit": 1})


def test_presence_refuses_wrong_types() -> None:
    with pytest.raises(ContractError, match="boot_n"):
        EDGE_PRESENCE.parse({"v": 1, "edge": "e", "boot": "b", "boot_n": "1", "state": "online"})
