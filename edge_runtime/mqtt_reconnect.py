"""An MQTT connection that is kept up: again after each end, in the version that the broker takes."""

import asyncio
import logging
from collections.abc import Awaitable, Callable

from .mqtt_session import MqttSession, SessionClosed
from .system.reasons import Reasons

log = logging.getLogger(__name__)

PROBE_TIMEOUT_S = 2.0
"""CONNACK of a try with MQTT 5 that the broker has not taken yet: one without it may say nothing at all (amqtt), and 3.1.1 is tried next."""

FAILURES = 3
"""Connections in a row that the broker did not accept, after which a version that it took before is given up for the other: it may be another broker by now."""

PROBE_AGAIN_S = 3600.0
"""How long 3.1.1 is spoken before MQTT 5 is tried again at the next connection: a broker that was only slow when it was first asked has it."""


class VersionChoice:
    """Which version of MQTT the next connection speaks. Pure.

    Brokers without MQTT 5 refuse, close or stay silent, and so does one that is only starting, or busy: which of them is not worth telling apart.

    Args:
        protocol: `auto`, `5` or `3.1.1`.
        now_s: monotonic, seconds; of every method.
    """

    def __init__(self, protocol: str, now_s: float) -> None:
        self.five = protocol != "3.1.1"
        self._free = protocol == "auto"
        self._taken: bool | None = None
        self._failures = 0
        self._tried_five_s = now_s

    @property
    def probing(self) -> bool:
        """MQTT 5 is tried at a broker that has not taken it."""
        return self._free and self.five and not self._taken

    def begin(self, now_s: float) -> None:
        """A connection is about to be made."""
        if self._free and not self.five and self._taken is False and now_s - self._tried_five_s >= PROBE_AGAIN_S:
            self.five = True
        if self.five:
            self._tried_five_s = now_s

    def ended(self, reached: bool, accepted: bool) -> None:
        """A connection has ended: whether there was somebody at the address, and whether he accepted it."""
        if accepted:
            self._taken, self._failures = self.five, 0
        elif reached and self._free:
            self._failures += 1
            if self._taken != self.five or self._failures >= FAILURES:
                self.five, self._failures = not self.five, 0


async def run_session(
    make: Callable[[bool], MqttSession], serve: Callable[[MqttSession], Awaitable[None]], *, protocol: str, next_pause_s: Callable[[], float],
    on_failure: Callable[[SessionClosed], None], wake: asyncio.Event, broker: str,
) -> None:
    """Keep one session up for ever: connect, `serve` until it closes, wait, again. Ends only by cancellation.

    Args:
        make: builds a session; its argument says whether to speak MQTT 5.
        serve: subscribes and works; returns or raises when the session has ended.
        protocol: `auto`, `5` or `3.1.1`, see `VersionChoice`.
        next_pause_s: seconds to wait before the next try.
        wake: set it to try again at once.
        broker: what it is, for the log.
    """
    loop = asyncio.get_running_loop()
    reasons = Reasons()
    version = VersionChoice(protocol, loop.time())
    task = asyncio.current_task()
    while True:
        if task is not None and task.cancelling():
            # asyncio.wait_for (until Python 3.12) forgets a cancellation where what it waits for ends in the same turn.
            raise asyncio.CancelledError
        version.begin(loop.time())
        session = make(version.five)
        if version.probing:
            session.connack_timeout_s = PROBE_TIMEOUT_S
        try:
            await session.connect()
            if reasons.told:
                log.info("%s is there again", broker)
                reasons.told = False
            await serve(session)
            error = session.closed.result() if session.closed.done() else SessionClosed("served")
        except SessionClosed as raised:
            error = raised
        except Exception as unexpected:  # a fault of ours: the link would be gone for good, where the next connection may do without it
            log.exception("what a connection does has failed")
            error = SessionClosed(f"{type(unexpected).__name__}: {unexpected}"[:300])
        finally:
            session.abort("session ended")
        version.ended(session.reached, session.accepted)
        if reasons.worth(error.reason, loop.time()):
            log.warning("%s is away: %s", broker, error.reason)
        on_failure(error)
        wake.clear()
        try:
            await asyncio.wait_for(wake.wait(), next_pause_s())
        except TimeoutError:
            pass
