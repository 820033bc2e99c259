"""How programs that a test runs elsewhere (a guest, namespaces of their own) go step by step: each step is waited for and named on the console."""

import time
from collections.abc import Callable
from typing import Any

PATIENCE_S = 240.0
"""For a step on a machine that others keep busy, or that is emulated."""


def until(what: str, look: Callable[[], Any]) -> Any:
    """What `look` gives, once it is true; what is not there yet is waited for. Raises AssertionError, also that of `look` at once."""
    end, last = time.monotonic() + PATIENCE_S, ""
    while time.monotonic() < end:
        try:
            if found := look():
                print(f"step: {what}", flush=True)
                return found
        except (OSError, ValueError, LookupError, RuntimeError) as error:
            last = str(error)
        time.sleep(0.5)
    raise AssertionError(f"{what} did not happen; {last}")
