"""What this machine's own start says of what it was given before the agent: another configuration, a gateway's passwords. A device has no console that anybody reads: its hub is told.

Who says it (an image's scripts) leaves a file for each thing in a folder, named as that: its first line is what came of it, the next one why. The folder is in memory, so that each start says its own. The variable NOVACRON_TOLD names it.
"""

import logging
from pathlib import Path

FILES_MOST, BYTES_MOST = 8, 4096
OUTCOMES = ("taken", "refused")

log = logging.getLogger(__name__)


def provisioned(folder: Path) -> list[dict[str, str]]:
    """Bodies of the events that tell it: what, outcome (taken, refused), reason. What is not as it should be is left out, and said in the log."""
    found = []
    try:
        names = sorted(path for path in folder.iterdir() if path.suffix != ".new")[:FILES_MOST]  # .new: its writer was cut off
    except FileNotFoundError:
        return []
    except OSError as error:
        log.warning("NOVACRON_TOLD=%s: %s", folder, error.strerror)
        return []
    for path in names:
        try:
            with path.open("rb") as file:
                outcome, _, reason = file.read(BYTES_MOST).decode("utf-8", "replace").partition("\n")
        except OSError as error:
            log.warning("%s: %s", path, error.strerror)
            continue
        if outcome not in OUTCOMES:
            log.warning("%s: its first line is none of %s", path, ", ".join(OUTCOMES))
            continue
        found.append({"what": path.name, "outcome": outcome, "reason": " ".join(reason.split())})
    return found
