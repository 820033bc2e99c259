"""Records of single pages: what comes out is what went in, and nothing else ever does."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from gpu_migration import patches
from gpu_migration.codecs import CODERS, Coder
from gpu_migration.dirty import expand, merged
from gpu_migration.errors import BaseMismatch, FormatError, HashMismatch
from gpu_migration.layout import EXTENT, PAGE
from gpu_migration.wire import PAYLOAD_MAX

from .memory import memory

PAGES = 1 << 20
numbers_of = st.sets(st.integers(0, PAGES - 1), min_size=1, max_size=40).map(lambda found: np.array(sorted(found), np.int64))


def packed(numbers: np.ndarray, seed: int, coder: Coder = CODERS[0]) -> tuple[bytes, bytes]:  # type: ignore[type-arg]
    data = memory(len(numbers), seed)
    return patches.pack(numbers, memoryview(data), lambda plain: coder)[0], data


@given(numbers=numbers_of, seed=st.integers(0, 1000), coder=st.sampled_from(CODERS))
def test_what_comes_out_is_what_went_in(numbers: np.ndarray, seed: int, coder: Coder) -> None:  # type: ignore[type-arg]
    payload, data = packed(numbers, seed, coder)
    found, raw = patches.unpack(memoryview(payload), memoryview(bytearray(EXTENT)), PAGES)
    assert found.tolist() == numbers.tolist() and raw == data


@given(numbers=numbers_of, seed=st.integers(0, 1000), data=st.data())
def test_a_record_that_was_changed_or_cut_never_comes_out_as_another(numbers: np.ndarray, seed: int, data: st.DataObject) -> None:  # type: ignore[type-arg]
    payload, raw = packed(numbers, seed)
    broken = bytearray(payload)
    if data.draw(st.booleans()):
        place = data.draw(st.integers(0, len(broken) - 1))
        broken[place] ^= 1 << data.draw(st.integers(0, 7))
    else:
        del broken[data.draw(st.integers(0, len(broken) - 1)) :]
    try:
        found, out = patches.unpack(memoryview(bytes(broken)), memoryview(bytearray(EXTENT)), PAGES)
    except (FormatError, HashMismatch, BaseMismatch):
        return
    # The numbers have no hash of their own; the record's seal and the chain cover them.
    assert out == raw and found.tolist() != numbers.tolist()
    assert patches.follow(bytes(32), bytes(broken)) != patches.follow(bytes(32), payload)


@given(st.binary(max_size=300))
def test_any_bytes_are_refused(data: bytes) -> None:
    with pytest.raises((FormatError, HashMismatch, BaseMismatch)):
        patches.unpack(memoryview(data), memoryview(bytearray(EXTENT)), PAGES)


def test_the_largest_record_fits_the_wire_and_a_larger_one_is_refused() -> None:
    numbers = np.arange(patches.MOST, dtype=np.int64) * 2
    data = np.random.default_rng(1).bytes(patches.MOST * PAGE)
    payload, _ = patches.pack(numbers, memoryview(data), lambda plain: CODERS[0])
    assert len(payload) <= PAYLOAD_MAX
    assert patches.unpack(memoryview(payload), memoryview(bytearray(EXTENT)), PAGES)[1] == data
    with pytest.raises(ValueError, match="pages"):
        patches.pack(np.arange(patches.MOST + 1, dtype=np.int64), memoryview(bytes((patches.MOST + 1) * PAGE)), lambda plain: CODERS[0])


@pytest.mark.parametrize("numbers", [[5, 5], [6, 5], [1, PAGES]])
def test_numbers_that_do_not_ascend_within_the_memory_are_refused(numbers: list[int]) -> None:
    payload, _ = patches.pack(np.array(numbers, np.int64), memoryview(bytes(2 * PAGE)), lambda plain: CODERS[0])
    with pytest.raises(FormatError, match="ascend"):
        patches.unpack(memoryview(payload), memoryview(bytearray(EXTENT)), PAGES)


@given(st.lists(st.tuples(st.integers(1, 9), st.integers(0, 9)), min_size=1, max_size=20))
def test_runs_are_taken_apart(gaps: list[tuple[int, int]]) -> None:
    at, runs, pages = 0, [], []
    for gap, length in gaps:
        first = at + gap
        at = first + length + 1
        runs.append((first, at))
        pages += range(first, at)
    assert expand(np.array(runs, np.int64)).tolist() == pages


@given(numbers=numbers_of.filter(lambda found: found[-1] < 4096), data=st.data())
def test_pages_as_they_are_come_out_so_and_nothing_else_does(numbers: np.ndarray, data: st.DataObject) -> None:  # type: ignore[type-arg]
    plain = patches.Plain()
    plain.pack(np.arange(patches.MOST, dtype=np.int64), WHOLE)  # what was in its place before is of no account
    payload, pages = plain.pack(numbers, WHOLE)
    assert pages == WHOLE[numbers].tobytes()
    found, raw = patches.unpack_plain(payload, 4096)
    assert found.tolist() == numbers.tolist() and raw == pages
    with pytest.raises(FormatError):
        patches.unpack_plain(payload[: data.draw(st.integers(0, len(payload) - 1))], 4096)
    with pytest.raises(FormatError):
        patches.unpack_plain(memoryview(bytes(payload) + b"x"), 4096)
    with pytest.raises(FormatError, match="ascend"):
        patches.unpack_plain(payload, int(numbers[-1]))
    broken = bytearray(payload)
    broken[data.draw(st.integers(0, len(broken) - 1))] ^= 1
    assert patches.chain(bytes(32), broken) != patches.chain(bytes(32), payload)


WHOLE = np.random.default_rng(7).integers(0, 256, (4096, PAGE), np.uint8)


def test_the_largest_record_of_pages_as_they_are_fits_the_wire() -> None:
    assert len(patches.Plain().pack(np.arange(patches.MOST, dtype=np.int64), WHOLE)[0]) <= PAYLOAD_MAX
    for count in (0, patches.MOST + 1):
        with pytest.raises(ValueError, match="pages"):
            patches.Plain().pack(np.arange(count, dtype=np.int64), WHOLE)


@given(st.binary(max_size=300))
def test_any_bytes_are_no_pages(data: bytes) -> None:
    with pytest.raises(FormatError):
        patches.unpack_plain(memoryview(data), PAGES)


@given(st.lists(st.lists(st.integers(0, 50)), min_size=1, max_size=4))
def test_page_numbers_are_merged(sets: list[list[int]]) -> None:
    found = merged(*(np.array(one, np.int64) for one in sets))
    assert found.dtype == np.int64 and found.tolist() == sorted({number for one in sets for number in one})
