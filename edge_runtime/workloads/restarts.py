"""When what has ended is started again, and after how long; and the other keys that are no driver's. Pure.

Keys of a workload's `spec` that are not its driver's:

    restart      `never`, `on-failure` or `always`; by default a container never, a function always (it has no end of its own), a batch job as its `retries` say
    retries      restarts in a row without a stable run between them; by default 0 for a batch job, else without an end
    pull         `always`, `missing` (default) or `never`: when a registry is asked for the image
    checkpoint   `{"every_s": 600}`: its state is taken so often while it goes on, the newest is kept, and what is lost with its machine goes on from there
    deadline_s   of a batch job: seconds from its first start, over all tries, after which it is stopped
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from .drivers.face import Phase, Refused, Status

KEYS = ("checkpoint", "deadline_s", "pull", "restart", "retries")

PULL_MISSING = "missing"
PULLS = ("always", PULL_MISSING, "never")
"""When a registry is asked for the image."""

NEVER, ON_FAILURE, ALWAYS = "never", "on-failure", "always"

FIRST_S, LONGEST_S = 1.0, 300.0
"""Pause before the first restart, doubled each time, and its most: a minute's trouble is survived by some tries, and an hour's costs twelve an hour (kubelet's cap is the same)."""

STABLE_MS = 600_000
"""A run of ten minutes is a stable one: the next pause is the first one again (kubelet's)."""

MAX_RETRIES = 1000
MAX_DEADLINE_S = 30 * 86_400

LEAST_CHECKPOINT_S, MOST_CHECKPOINT_S = 10, 86_400
"""Seconds between two checkpoints: it stands still for a second or more with each."""


@dataclass(frozen=True, slots=True)
class Policy:
    """How one workload is restarted. `retries` None: without an end; `deadline_s` 0: none; `checkpoint_s`: seconds between two checkpoints, 0: none are taken."""

    restart: str
    retries: int | None
    deadline_s: float
    checkpoint_s: float = 0.0

    def again(self, ended: Status, tries: int) -> bool:
        """Whether it is started again after this end, and `tries` restarts in a row."""
        if self.restart == NEVER or (self.restart == ON_FAILURE and succeeded(ended)):
            return False
        return self.retries is None or tries < self.retries


def succeeded(ended: Status) -> bool:
    """Whether it ended as it should."""
    return ended.phase is Phase.ENDED and ended.exit is not None and ended.exit.code == 0


def pause_s(tries: int) -> float:
    """Seconds before restart number `tries` + 1 in a row."""
    return min(LONGEST_S, FIRST_S * 2.0 ** min(tries, 30))


def when_to_pull(spec: Mapping[str, Any]) -> str:
    """One of `PULLS`. Raises `Refused`."""
    pull = spec.get("pull", PULL_MISSING)
    if pull not in PULLS:
        raise Refused("spec.pull", f"{str(pull)[:40]!r} is unknown", f"use {', '.join(PULLS)}")
    return str(pull)


def policy(kind: str, spec: Mapping[str, Any]) -> Policy:
    """That of a document. Raises `Refused`."""
    job = kind == "batch"
    retries = spec.get("retries", 0 if job else None)
    if retries is not None and (not isinstance(retries, int) or isinstance(retries, bool) or not 0 <= retries <= MAX_RETRIES):
        raise Refused("spec.retries", f"{str(retries)[:40]} is no whole number from 0 to {MAX_RETRIES}", "give one, or leave it out")
    restart = spec.get("restart", ON_FAILURE if job else ALWAYS if kind == "function" else NEVER)
    if restart not in (NEVER, ON_FAILURE, ALWAYS):
        raise Refused("spec.restart", f"{str(restart)[:40]!r} is unknown", f"use {NEVER}, {ON_FAILURE} or {ALWAYS}")
    if job and restart == ALWAYS:
        raise Refused("spec.restart", "a batch job that is always started again has no end", f"use {ON_FAILURE} with retries, or a container")
    deadline = spec.get("deadline_s", 0)
    if not isinstance(deadline, (int, float)) or isinstance(deadline, bool) or not 0 <= deadline <= MAX_DEADLINE_S:
        raise Refused("spec.deadline_s", f"{str(deadline)[:40]} is no number of seconds up to {MAX_DEADLINE_S}", "give one, or leave it out")
    if deadline and not job:
        raise Refused("spec.deadline_s", f"a {kind} has no end that it could miss", "submit a batch job, or leave it out")
    return Policy(restart, retries, float(deadline), _checkpoints(kind, spec))


def _checkpoints(kind: str, spec: Mapping[str, Any]) -> float:
    told = spec.get("checkpoint")
    if told is None:
        return 0.0
    every = told.get("every_s") if isinstance(told, dict) and set(told) == {"every_s"} else None
    if not isinstance(every, (int, float)) or isinstance(every, bool) or not LEAST_CHECKPOINT_S <= every <= MOST_CHECKPOINT_S:
        raise Refused("spec.checkpoint", f"{str(told)[:60]} is not {{\"every_s\": {LEAST_CHECKPOINT_S} to {MOST_CHECKPOINT_S}}}", "give the seconds between two checkpoints, or leave it out")
    if kind not in ("container", "batch"):
        raise Refused("spec.checkpoint", f"the state of a {kind} cannot be taken", "run it as a container or a batch job, or leave it out")
    return float(every)
