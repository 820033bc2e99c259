"""How often the edge does what no message asks for. Read anew before each wait, so a running edge can be slowed down or hurried."""

from .contract.lean_dataclass import dataclass


@dataclass(slots=True)
class Pace:
    """Seconds between two rounds of each periodic duty.

    Attributes:
        tick_s: time-driven rules are looked at; half a second late is nothing against the durations that rules wait for.
        engine_state_s: the rules' latches and timers are kept. A latch that changes with a decision is in that decision's record as well.
        watch_s: a sign of life to systemd at most this far apart, storage alarms.
        tidy_s: free pages of the heap go back to the system, for 0.1 ms. The heap frays where messages of all sizes come and go: by 4 MiB an hour under load, with
            nothing more in use.
        upkeep_s: the journal's caps, free space and growth are looked at.
        heartbeat_s: the presence is said again while the link is up: the hub shows its age, and it carries the outage hours.
    """

    tick_s: float = 0.5
    engine_state_s: float = 30.0
    watch_s: float = 10.0
    tidy_s: float = 60.0
    upkeep_s: float = 2.0
    heartbeat_s: float = 30.0
