"""Which version of MQTT is spoken next: at brokers that lack one, that are slow, and that are replaced by another."""

from edge_runtime.mqtt_reconnect import FAILURES, PROBE_AGAIN_S, VersionChoice
from edge_runtime.system.reasons import TELL_AGAIN_S, TELL_APART_S, Reasons


class Broker:
    """Accepts the versions that it has, at once or (`slow`) none within the time of a probe."""

    def __init__(self, choice: VersionChoice, *versions: int, slow: bool = False) -> None:
        self.choice, self.versions, self.slow = choice, versions, slow

    def meet(self, now_s: float = 0.0, there: bool = True) -> int:
        """One connection; the version that it was tried in, negative where it was not accepted."""
        self.choice.begin(now_s)
        tried = 5 if self.choice.five else 3
        accepted = there and tried in self.versions and not (self.slow and self.choice.probing)
        self.choice.ended(there, accepted)
        return tried if accepted else -tried


def test_what_the_configuration_names_is_spoken_and_nothing_else() -> None:
    for protocol, version, other in (("5", 5, 3), ("3.1.1", 3, 5)):
        broker = Broker(VersionChoice(protocol, 0.0), other)
        assert {broker.meet(PROBE_AGAIN_S * turn) for turn in range(3 * FAILURES)} == {-version}


def test_one_without_mqtt_5_is_spoken_to_in_3_1_1_and_asked_again_each_hour_at_most() -> None:
    broker = Broker(VersionChoice("auto", 0.0), 3)
    assert [broker.meet(float(now)) for now in range(5)] == [-5, 3, 3, 3, 3]
    assert [broker.meet(PROBE_AGAIN_S + now) for now in range(4)] == [-5, 3, 3, 3]


def test_one_that_was_slow_at_first_is_spoken_to_in_mqtt_5_later() -> None:
    broker = Broker(VersionChoice("auto", 0.0), 3, 5, slow=True)
    assert [broker.meet(), broker.meet(1.0)] == [-5, 3]
    broker.slow = False
    assert [broker.meet(2.0), broker.meet(PROBE_AGAIN_S + 2.0), broker.meet(PROBE_AGAIN_S + 3.0)] == [3, 5, 5]


def test_one_that_is_replaced_by_another_is_reached_in_what_that_has() -> None:
    broker = Broker(VersionChoice("auto", 0.0), 3, 5)
    assert broker.meet() == 5
    broker.versions = (3,)
    assert [broker.meet(1.0) for _ in range(FAILURES + 2)] == [-5] * FAILURES + [3, 3]
    broker.versions = (5,)
    assert [broker.meet(2.0) for _ in range(FAILURES + 2)] == [-3] * FAILURES + [5, 5]


def test_nobody_at_the_address_says_nothing_about_versions() -> None:
    broker = Broker(VersionChoice("auto", 0.0), 3, 5)
    assert [broker.meet(there=False) for _ in range(3 * FAILURES)] == [-5] * 3 * FAILURES
    assert broker.meet() == 5
    assert [broker.meet(there=False) for _ in range(3 * FAILURES)] == [-5] * 3 * FAILURES


def test_a_broker_that_stumbles_once_is_not_taken_for_one_without_mqtt_5() -> None:
    choice = VersionChoice("auto", 0.0)
    broker = Broker(choice, 3, 5)
    assert broker.meet() == 5
    for _ in range(5):
        for _ in range(FAILURES - 1):
            choice.begin(1.0)
            choice.ended(True, False)
            assert choice.five
        assert broker.meet(1.0) == 5


def test_why_there_is_no_connection_is_in_the_log_and_does_not_fill_it() -> None:
    reasons = Reasons()
    assert not reasons.told
    assert [reasons.worth("refused", now) for now in (0.0, 1.0, TELL_AGAIN_S - 1, TELL_AGAIN_S)] == [True, False, False, True] and reasons.told
    reasons.told = False  # it was there again
    assert [reasons.worth("refused", TELL_AGAIN_S + now) for now in (1.0, TELL_APART_S)] == [False, True]
    days = [reasons.worth(("refused", "timed out")[second % 2], 2 * TELL_AGAIN_S + second) for second in range(72 * 3600)]
    assert sum(days) <= 72 * 3600 / TELL_APART_S
