"""This node towards the hub's scheduler: tells what it has, answers what it shall run."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ..config import EdgeConfig
from ..journal import Journal
from ..metrics import Metrics
from . import drivers
from .answers import answers
from .capacity import changed, describe

log = logging.getLogger(__name__)

ANSWERED = "workloads"
"""The journal's state document that keeps which entries of desired state have been answered."""


class WorkloadNode:
    """One node; says everything through the journal."""

    def __init__(self, config: EdgeConfig, journal: Journal, metrics: Metrics) -> None:
        self._config, self._journal, self._metrics = config, journal, metrics

    async def run(self) -> None:
        """Tell what this node has: at boot, and when it has changed. Until cancelled."""
        told: dict[str, Any] | None = None
        while True:
            try:
                body = await asyncio.get_running_loop().run_in_executor(None, self.describe)
                if changed(told, body):
                    self._journal.append("event", "node.capacity", body)
                    told = body
            except Exception:
                self._metrics.inc("capacity_errors_total")
                log.exception("what this node has could not be told")
            await asyncio.sleep(self._config.workloads.interval_s)

    def describe(self) -> dict[str, Any]:
        """The body of a `node.capacity` record."""
        config, workloads = self._config, self._config.workloads
        return describe(
            kind=workloads.kind, region=config.region, site=config.site, labels=config.labels, taints=workloads.taints, runs=drivers(), reserve_milli=workloads.reserve_cpu_milli,
            reserve_memory=workloads.reserve_memory_bytes, reserve_disk=workloads.reserve_disk_bytes, most=workloads.max_workloads, data_dir=Path(config.data_dir),
        )

    def take(self, entries: Sequence[dict[str, Any]]) -> None:
        """Answer the workloads of a desired state that was taken; each entry once, also over restarts."""
        answered = self._journal.state(ANSWERED) or []
        reports, now = answers(entries, answered, drivers(), self._config.workloads.enabled)
        for body in reports:
            self._journal.append("event", "workload", body)
        if now != answered:
            self._journal.put_state(ANSWERED, now)
