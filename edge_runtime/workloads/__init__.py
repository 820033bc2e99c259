"""Workloads on this node: what it has for them (`capacity`), what is answered to desired state (`answers`), where one fits on a cut-off site (`placement`).

Room for the drivers of containers, micro-VMs, VMs, functions and batch jobs: `drivers()` names the kinds that this agent can run, none yet. Imported only where configured.
"""


def drivers() -> tuple[str, ...]:
    """The kinds of workload for which there is a driver here."""
    return ()
