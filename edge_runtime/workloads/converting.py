"""The operation `convert`: what runs here goes on as something else, as the same processes, where its driver can do that (`drivers.face.Converts`).

The steps of a conversion are the driver's own, and written down there; it brings what an agent was killed at to its end before operations are gone on with. So an operation that finds the workload as it
shall be has succeeded, whoever did it. One that was begun and finds it as it was has been undone, and says so: it is not begun again by itself, as it may be what killed the agent.
"""

from collections.abc import Mapping
from typing import Any

from ..contract.workloads import CONVERTS, FORMS
from .drivers.face import Converts, Driver, Failed, Phase, Refused, Status
from .operations import Operations

CONVERTING = "converting"
"""The step that is written down before anything is done."""


async def convert(asked: Mapping[str, Any], operations: Operations, driver: Driver | None, status: Status | None) -> dict[str, Any]:
    """Carry one out; what is told of it then. Raises `DriverError`.

    Args:
        asked: an entry of `spec.operations`.
        driver, status: on whose disk the workload is and how it stands; None where it is on none.
    """
    workload, to = asked["workload"], asked.get("to", "")
    if to not in FORMS:
        raise Refused("to", f"{str(to)[:40]!r} is none of {', '.join(FORMS)}", "say what it shall be")
    if driver is None or status is None:
        raise Refused("workload", f"{workload} does not run here yet", "ask again when it runs")
    if not isinstance(driver, Converts):
        raise Refused(f"spec.{CONVERTS}", f"{workload} was not started as one that can be converted", f"submit it anew with {CONVERTS}: true in its spec")
    begun = operations.step(asked["id"]) == CONVERTING
    if begun and status.form != to:
        raise Failed("convert", f"the agent ended while it was converted; that has been undone, and it is a {status.form} as before", "ask again")
    if not begun:
        if status.phase is not Phase.RUNNING:
            raise Refused("workload", f"{workload} does not run ({status.phase.value})", "ask again when it runs")
        await operations.reach(asked["id"], CONVERTING)
        status = await driver.convert(status.key, to)
    return {"workload": workload, "form": status.form}
