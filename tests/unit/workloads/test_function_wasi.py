"""WASI and a function's document, held against whatever comes: a program's pointers and numbers give an error number and touch nothing beyond its memory, a document is read or refused."""

import struct
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from edge_runtime.workloads.drivers import function_wasi
from edge_runtime.workloads.drivers.face import Key, Order, Refused
from edge_runtime.workloads.drivers.function_spec import MAX_OUTPUT, PAGE, Limits, limits
from edge_runtime.workloads.drivers.function_wasi import BADF, FAULT, SIGNATURES, Exit, World

SIZE = 4096


class Memory:
    """Linear memory that fails loudly where it is touched outside."""

    def __init__(self, data: bytes = b"") -> None:
        self.data = bytearray(data.ljust(SIZE, b"\0"))

    def read(self, start: int, end: int) -> bytes:
        assert start >= 0 and end >= start
        return bytes(self.data[start:end])  # as a slice: what is beyond is left out, as the engine's own does it

    def write(self, data: bytes, start: int) -> None:
        assert start >= 0
        if start + len(data) > SIZE:
            raise IndexError
        self.data[start:start + len(data)] = data


def world(data: bytes = b"", stdin: bytes = b"", said: list[tuple[int, bytes]] | None = None) -> tuple[World, Memory]:
    made, memory = World(["name", "one"], ["A=b"]), Memory(data)
    made.begin(lambda descriptor, piece: said.append((descriptor, piece)) if said is not None else None)
    made.stdin, made.read, made.write = memoryview(stdin), memory.read, memory.write
    return made, memory


NUMBERS = st.one_of(st.integers(-(1 << 31), (1 << 31) - 1), st.integers(0, SIZE), st.sampled_from([0, 1, 2, 3, -1, SIZE - 1, SIZE, (1 << 31) - 1]))
WIDE = st.one_of(st.integers(-(1 << 63), (1 << 63) - 1), NUMBERS)


@given(st.sampled_from(sorted(SIGNATURES)), st.data(), st.binary(max_size=600))
def test_no_call_raises_and_each_answers_a_number(name: str, data: Any, content: bytes) -> None:
    made, memory = world(content, b"in")
    given_ = [data.draw(NUMBERS if kind == "i" else WIDE) for kind in SIGNATURES[name]]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(function_wasi.time, "sleep", lambda seconds: None if 0 <= seconds <= function_wasi.LONGEST_S else pytest.fail("no such wait"))
        if name == "random_get" and given_[1] < 0:
            given_[1] = 70_000  # the same path, without drawing gigabytes
        if name == "proc_exit":
            with pytest.raises(Exit) as left:
                made.function(name)(*given_)
            assert left.value.code == given_[0] & 0xFFFF_FFFF
        else:
            answer = made.function(name)(*given_)
            assert isinstance(answer, int) and 0 <= answer < 77
    assert len(memory.data) == SIZE


def test_control_without_the_guard_a_stray_pointer_would_raise() -> None:
    made, _ = world()
    assert made.function("clock_time_get")(0, 0, SIZE) == FAULT
    with pytest.raises(IndexError):
        made._clock_time_get(0, 0, SIZE)


def test_what_is_read_and_written() -> None:
    said: list[tuple[int, bytes]] = []
    made, memory = world(struct.pack("<IIII", 100, 2, 200, 50), b"abcdef", said)
    assert made.function("fd_read")(0, 0, 2, 40) == 0 and struct.unpack_from("<I", memory.data, 40) == (6,)
    assert memory.data[100:102] == b"ab" and memory.data[200:204] == b"cdef"
    assert made.function("fd_read")(0, 0, 2, 40) == 0 and struct.unpack_from("<I", memory.data, 40) == (0,), "the end"
    assert made.function("fd_write")(2, 0, 1, 40) == 0 and said == [(2, b"ab")]
    assert made.function("fd_write")(3, 0, 1, 40) == made.function("fd_read")(1, 0, 1, 40) == BADF
    assert made.function("args_sizes_get")(0, 4) == 0 and struct.unpack_from("<II", memory.data, 0) == (2, 9)
    assert made.function("args_get")(0, 300) == 0 and memory.data[300:309] == b"name\0one\0" and struct.unpack_from("<II", memory.data, 0) == (300, 305)


def test_another_instance_finds_nothing_of_the_one_before() -> None:
    made, _ = world(stdin=b"secret")
    made.begin(lambda _descriptor, _piece: None)
    assert bytes(made.stdin) == b"" and made.read is None and made.function("fd_read")(0, 0, 1, 40) == FAULT


VALUES = st.recursive(
    st.one_of(st.none(), st.booleans(), st.integers(-10, 1 << 70), st.floats(), st.text(max_size=5), st.sampled_from(["1Mi", "64Ki", "4Gi", "-1"])),
    lambda inner: st.one_of(st.lists(inner, max_size=3), st.dictionaries(st.text(max_size=5), inner, max_size=3)), max_leaves=6,
)


@given(st.dictionaries(st.sampled_from(["args", "env", "timeout_s", "limits", "concurrency", "queue", "warm", "output", "odd"]), VALUES, max_size=4), st.booleans(), st.integers(0, 1 << 40))
@example({"limits": {"memory": "1Mi"}, "concurrency": 3}, False, 3 << 20)
def test_a_document_is_read_or_refused(spec: dict[str, Any], job: bool, memory: int) -> None:
    try:
        found = limits(Order(Key("a", 1), "i", {"memory": memory}, spec, job))
    except Refused as error:
        assert error.field.startswith("spec.") and error.problem and error.remedy
        return
    assert isinstance(found, Limits) and found.memory >= PAGE and found.warm <= found.concurrency and 0 <= found.output_bytes <= MAX_OUTPUT
    assert not memory or found.memory * found.concurrency <= memory
    assert found.timeout_s > 0 or job
