"""Messages of containerd's API on the wire: against protobuf's own implementation, with fields that we do not know, and bytes that are no message."""

from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from edge_runtime.workloads.drivers import containerd_wire as wire
from edge_runtime.workloads.drivers.containerd_wire import Field, Kind, Message, Method, WireError, decode, encode

MESSAGES: dict[str, Message] = {
    f"{name}_{part}": message for name, method in vars(wire).items() if isinstance(method, Method) for part, message in (("request", method.request), ("answer", method.answer))
}

TEXTS = st.text(st.characters(exclude_categories=("Cs",)), max_size=200)


def values(message: Message) -> st.SearchStrategy[dict[str, Any]]:
    """All that a message may hold, with every field said."""
    return st.fixed_dictionaries({name: _value(field) for name, field in message.items()})


def _value(field: Field) -> st.SearchStrategy[Any]:
    if field.table:
        return st.dictionaries(TEXTS, TEXTS, max_size=3)
    one = {Kind.TEXT: TEXTS, Kind.BYTES: st.binary(max_size=300), Kind.NUMBER: st.integers(0, (1 << 32) - 1), Kind.FLAG: st.booleans()}[field.kind] if isinstance(field.kind, Kind) else values(field.kind)
    return st.lists(one, max_size=3) if field.many else one if isinstance(field.kind, Kind) else one | st.none()


def said(message: Message, value: dict[str, Any]) -> dict[str, Any]:
    """Without the messages that are not there, as `encode` takes it."""
    def of(kind: Any, one: Any) -> Any:
        return one if isinstance(kind, Kind) else said(kind, one)

    return {name: [of(message[name].kind, part) for part in one] if message[name].many else of(message[name].kind, one) if not message[name].table else one for name, one in value.items() if one is not None}


@given(name=st.sampled_from(sorted(MESSAGES)), data=st.data())
@settings(max_examples=120)
def test_what_is_written_is_read_again(name: str, data: st.DataObject) -> None:
    value = data.draw(values(MESSAGES[name]))
    assert decode(MESSAGES[name], encode(MESSAGES[name], said(MESSAGES[name], value))) == value


def peers() -> Any:
    """The same messages by protobuf's own library, which shares nothing with ours but the table of fields."""
    pytest.importorskip("google.protobuf")
    from google.protobuf import descriptor_pb2, descriptor_pool, message_factory

    file = descriptor_pb2.FileDescriptorProto(name="t.proto", package="t", syntax="proto3")
    kinds = {Kind.TEXT: 9, Kind.BYTES: 12, Kind.NUMBER: 4, Kind.FLAG: 8}

    def add(place: Any, name: str, message: Message, path: str) -> None:
        made = place.add(name=name)
        for field_name, field in message.items():
            label = 3 if field.many or field.table else 1
            if field.table:
                inner = made.nested_type.add(name=f"{field_name.title()}Entry")
                inner.options.map_entry = True
                for at, part in enumerate(("key", "value"), 1):
                    inner.field.add(name=part, number=at, type=9, label=1)
                made.field.add(name=field_name, number=field.number, type=11, label=3, type_name=f".{path}.{name}.{field_name.title()}Entry")
            elif isinstance(field.kind, Kind):
                made.field.add(name=field_name, number=field.number, type=kinds[field.kind], label=label)
            else:
                add(made.nested_type, f"M{field.number}", field.kind, f"{path}.{name}")
                made.field.add(name=field_name, number=field.number, type=11, label=label, type_name=f".{path}.{name}.M{field.number}")

    for name, message in MESSAGES.items():
        add(file.message_type, name, message, "t")
    pool = descriptor_pool.DescriptorPool()
    pool.Add(file)
    return {name: message_factory.GetMessageClass(pool.FindMessageTypeByName(f"t.{name}")) for name in MESSAGES}


@pytest.mark.parametrize("name", ["CREATE_CONTAINER_request", "LIST_CONTAINERS_answer", "CREATE_request", "GET_answer", "KILL_request", "EXEC_request", "WAIT_answer"])
def test_protobufs_own_library_reads_what_we_write_and_writes_what_we_read(name: str) -> None:
    peer = peers()[name]

    @given(value=values(MESSAGES[name]))
    @settings(max_examples=25)
    def compare(value: dict[str, Any]) -> None:
        made = peer(**said(MESSAGES[name], value))
        assert decode(MESSAGES[name], made.SerializeToString()) == value
        read = peer()
        read.ParseFromString(encode(MESSAGES[name], said(MESSAGES[name], value)))
        assert read == made

    compare()


def test_fields_of_a_later_version_are_skipped_whatever_they_hold() -> None:
    known = encode(wire.START.answer, {"pid": 7})
    strange = bytes([15 << 3 & 0x7F | 0]) + b"\x05" + bytes([14 << 3 | 2]) + b"\x02hi" + bytes([13 << 3 | 1]) + bytes(8) + bytes([12 << 3 | 5]) + bytes(4)
    assert decode(wire.START.answer, strange + known + strange)["pid"] == 7


@given(st.binary(max_size=200))
def test_bytes_that_are_no_message_are_one_clear_error(data: bytes) -> None:
    for message in MESSAGES.values():
        try:
            decode(message, data)
        except WireError:
            pass


@pytest.mark.parametrize(("data", "says"), [
    (b"\x0a\x05ab", "cut off"), (b"\x18", "cut off"), (b"\x18" + b"\xff" * 11, "too long"), (b"\x0a\x01\xff", "is no text"), (b"\x08\x01", "wire type 0"), (b"\x0b", "wire type 3"), (b"\x02\x00", "number 0"),
])
def test_what_is_wrong_is_said(data: bytes, says: str) -> None:
    with pytest.raises(WireError, match=says):
        decode({"name": Field(1), "number": Field(3, Kind.NUMBER)}, data)


def test_a_field_that_a_message_has_not_is_a_mistake_of_ours() -> None:
    with pytest.raises(KeyError):
        encode(wire.START.request, {"container": "x"})
