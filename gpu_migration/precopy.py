"""Moves a source that is written to meanwhile: passes while it runs, then the writer is paused for the last one. Whatever fails before the commit is asked for, the writer runs again."""

import math
import shlex
import subprocess
import time
from collections.abc import Callable
from dataclasses import dataclass, replace

from .convergence import SECONDS_A_GIB, Control, Limits, Next, Pass, Reason, Verdict
from .errors import NotConverged, PauseFailed, Undecided
from .layout import EXTENT
from .sender import Sender, Sent

COMMAND_S = 10.0
"""Seconds that a command for pausing or resuming may take: well over what a signal or a monitor's answer takes."""
PAUSE_MOST_S = 5.0
"""Seconds that the writer stands still at most before the commit is asked for, where twice the ceiling is not more: then the move is given up and it runs again."""
STDERR_MOST = 300
"""Characters of a command's complaint that are shown."""


@dataclass(frozen=True, slots=True)
class Hook:
    """How the writer is paused and resumed. Both return once it is so, may be called twice, and raise PauseFailed."""

    pause: Callable[[], None]
    resume: Callable[[], None]


@dataclass(frozen=True, slots=True)
class Live:
    """What came of it. Seconds."""

    sent: Sent
    downtime: float
    """From before the writer was asked to pause until the destination was known to be committed; 0 where nothing was paused."""
    pausing: float
    last_pass: float
    committing: float
    implied: float
    """What was expected of overhead and last pass."""
    allowed: float


def commands(pause: str, resume: str) -> Hook:
    """By commands, run without a shell. Raises PauseFailed where one cannot be read."""
    return Hook(_command("pause", pause), _command("resume", resume))


def _command(what: str, text: str) -> Callable[[], None]:
    try:
        words = shlex.split(text)
    except ValueError as error:
        raise PauseFailed(f"--{what}-command: {error}; quote it as for a shell") from None
    if not words:
        raise PauseFailed(f"--{what}-command: it is empty; give a command that {what}s the writer")

    def run() -> None:
        try:
            done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=COMMAND_S, check=False)
        except OSError as error:
            raise PauseFailed(f"--{what}-command {words[0]}: {error.strerror or error}") from None
        except subprocess.TimeoutExpired:
            raise PauseFailed(f"--{what}-command {words[0]}: not done after {COMMAND_S:g} s") from None
        if done.returncode:
            said = " ".join(done.stderr.decode(errors="replace").split())[:STDERR_MOST]
            raise PauseFailed(f"--{what}-command {words[0]}: exit status {done.returncode}{': ' + said if said else ''}")

    return run


def limits_for(length: int, limits: Limits | None = None) -> Limits:
    """Those given, with the time in all that a source of that length may take."""
    return replace(limits or Limits(), seconds=SECONDS_A_GIB * max(1.0, length / (1 << 30)))


def move(sender: Sender, hook: Hook | None, limits: Limits | None = None, pause_most: float = 0.0, seen: Callable[[Pass], None] | None = None) -> Live:
    """All of it. Without a hook nothing can be paused, so that only a source that is found unchanged after a pass is committed.

    Raises NotConverged, Undecided, and every other MigrationError; the source is only read. `pause_most`: seconds, 0: by the limits. `seen` is told each pass."""
    limits = limits or limits_for(sender.length)
    if hook is None:
        limits = replace(limits, first=0.0, ceiling=0.0)
    try:
        sender.start()
        if sender.committed:  # by an earlier run that did not hear of it, and start has found the source to be what was committed
            return Live(sender.commit(), 0.0, 0.0, 0.0, 0.0, 0.0, 0.0)
        verdict = _converge(sender, Control(limits), hook is not None, seen)
        if hook is None:
            return Live(sender.commit(), 0.0, 0.0, 0.0, 0.0, verdict.implied, verdict.allowed)
        return _switch(sender, hook, verdict, pause_most or max(PAUSE_MOST_S, 2 * limits.ceiling))
    finally:
        sender.close()


def _converge(sender: Sender, control: Control, pausing: bool, seen: Callable[[Pass], None] | None) -> Verdict:
    """Passes until it may be switched over. Raises NotConverged."""
    which: list[int] | None = None
    while True:
        before, began = sender.moved(), time.monotonic()
        sender.pass_over(which)
        passed, after = time.monotonic(), sender.moved()
        # The first pass brings the whole, and pages of zeros would make the wire look faster than it is; later ones bring the same kind that remains.
        kind = 1 if which is None else 0
        which = sender.survey()
        looked = time.monotonic()
        remaining = min(sender.length, len(which) * EXTENT)
        # The last pass looks at the whole too, so that what one look takes is the least that a switch-over does.
        done = Pass(after[kind] - before[kind], passed - began, looked - began, remaining, looked - passed if pausing else 0.0)
        if seen is not None:
            seen(done)
        verdict = control.after(done)
        if verdict.next is Next.SWITCH:
            return verdict
        if verdict.next is Next.GIVE_UP:
            assert verdict.reason is not None
            raise NotConverged(_gave_up(control, verdict, verdict.reason, remaining, pausing), verdict.reason)


def _gave_up(control: Control, verdict: Verdict, reason: Reason, remaining: int, pausing: bool) -> str:
    what = {
        Reason.STALLED: f"no progress for {control.limits.stall:g} s", Reason.PASSES: f"{control.passes} passes were not enough",
        Reason.SECONDS: f"{control.limits.seconds:g} s were not enough",
    }[reason]
    if not pausing:
        return f"the source still changes ({what}, {remaining} bytes differ); pause who writes it, or give --pause-command and --resume-command"
    wait = f"{verdict.implied:.2f} s" if math.isfinite(verdict.implied) else "an unknown time"
    return (f"the source changes faster than it can be moved ({what}, {remaining} bytes remain): its writer would stand still for {wait}, and {verdict.allowed:g} s are allowed; "
            "give a higher --downtime, or try when it is quieter")


def _switch(sender: Sender, hook: Hook, verdict: Verdict, pause_most: float) -> Live:
    """Pause, last pass, commit."""
    began = time.monotonic()
    deadline = began + pause_most
    try:
        hook.pause()
        paused = time.monotonic()
        sender.pass_over(None, deadline)
        passed = time.monotonic()
        sent = sender.commit(deadline)
        done = time.monotonic()
    except BaseException as error:
        if sender.asked:
            raise Undecided(
                f"{error}; the destination was asked to commit and whether it has is not known: the writer stays paused. Run the same command again; resume the writer only if the destination is not there"
            ) from error
        try:
            hook.resume()
        except Exception as second:  # a caller's own too
            raise PauseFailed(f"{second}; the writer may still be paused: resume it by hand (before that: {error})") from error
        raise
    return Live(sent, done - began, paused - began, passed - paused, done - passed, verdict.implied, verdict.allowed)
