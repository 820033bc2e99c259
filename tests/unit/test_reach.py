"""Names with several addresses, of which some lead nowhere: real sockets on loopback; only the name server is a double."""

import contextlib
import errno
import socket
from collections.abc import Iterator
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from edge_runtime.system.reach import ADDRESSES_MOST, interleaved, reach
from tests.integration.silent import Name, silent

FOUR, SIX = socket.AF_INET, socket.AF_INET6


def info(family: int, number: int) -> Any:
    return (family, socket.SOCK_STREAM, 6, "", number)


@pytest.fixture
def listener() -> Iterator[socket.socket]:
    with socket.create_server(("127.0.0.1", 0)) as made:
        yield made


def test_one_that_answers_is_reached_past_those_that_say_nothing(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    """One after the other, as Python has it, the third would be tried after twice the time."""
    port = listener.getsockname()[1]
    with silent("127.0.0.2", port), silent("127.0.0.3", port):
        Name(monkeypatch, "hub.example", ["127.0.0.2", "127.0.0.3", "127.0.0.1"])
        with reach("hub.example", port, 60.0) as sock:
            assert sock.getpeername() == ("127.0.0.1", port) and sock.gettimeout() == 60.0
        with pytest.raises(TimeoutError, match="timed out"):  # the control: they do say nothing
            Name(monkeypatch, "hub.example", ["127.0.0.2", "127.0.0.3"])
            reach("hub.example", port, 1.0)


def test_a_refusal_brings_the_next_at_once_and_is_told_where_all_refuse(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    port = listener.getsockname()[1]
    Name(monkeypatch, "hub.example", ["127.0.0.4", "127.0.0.5", "127.0.0.1"])
    with reach("hub.example", port, 60.0) as sock:
        assert sock.getpeername()[0] == "127.0.0.1"
    Name(monkeypatch, "hub.example", ["127.0.0.4", "127.0.0.5"])
    with pytest.raises(ConnectionRefusedError) as found:
        reach("hub.example", port, 60.0)
    assert found.value.errno == errno.ECONNREFUSED


def test_the_end_of_many_that_say_nothing_is_the_time_that_was_given(listener: socket.socket, monkeypatch: pytest.MonkeyPatch) -> None:
    port = listener.getsockname()[1]
    with contextlib.ExitStack() as stack:
        places = [f"127.0.1.{number}" for number in range(1, ADDRESSES_MOST + 4)]
        for place in places:
            stack.enter_context(silent(place, port))
        Name(monkeypatch, "hub.example", places)
        with pytest.raises(TimeoutError):
            reach("hub.example", port, 0.5)


@given(st.lists(st.sampled_from([FOUR, SIX]), min_size=1, max_size=40))
def test_families_take_turns_and_no_address_is_lost(families: list[int]) -> None:
    found = [info(family, number) for number, family in enumerate(families)]
    made = interleaved(found)
    assert sorted(one[4] for one in made) == [one[4] for one in found] and made[0] == found[0]
    for family in (FOUR, SIX):
        assert [one for one in made if one[0] == family] == [one for one in found if one[0] == family]
    both = 2 * min(families.count(FOUR), families.count(SIX))
    assert all(made[at][0] != made[at + 1][0] for at in range(max(0, both - 1)))
