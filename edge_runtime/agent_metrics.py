"""What an agent shows at /metrics: every gauge and counter, by name, with its one-line meaning."""

from typing import TYPE_CHECKING

from .system.process import open_descriptors, resident_bytes

if TYPE_CHECKING:
    from .runtime import EdgeRuntime


def describe(runtime: "EdgeRuntime") -> None:
    """Register every gauge and counter of a runtime with its `metrics`."""
    gauge, metrics = runtime.metrics.gauge, runtime.metrics
    gauge("resident_memory_bytes", "Resident memory of the agent.", resident_bytes)
    gauge("open_descriptors", "Open file descriptors.", open_descriptors)
    gauge("devices", "Registered devices.", lambda: len(runtime.registry.devices))
    gauge("early_readings", "Readings that wait for their device's registration.", lambda: runtime.registry.early_waiting)
    gauge("link_up", "1 while a hub is reachable.", lambda: float(not runtime.is_offline()))
    gauge("journal_waiting_records", "Records appended and not durable yet.", lambda: sum(lane.waiting for lane in runtime.journal.lanes.values()))
    gauge("journal_backlog_records", "Records that the hub is not known to have.", lambda: runtime.uplink.lanes.backlog() if runtime.uplink else 0)
    gauge("journal_used_bytes", "Bytes of the journal's databases.", lambda: runtime.journal.bytes_in_use)
    gauge("journal_free_bytes", "Free bytes of the journal's file system.", lambda: runtime.journal.storage_plan.free_bytes)
    gauge("journal_outage_seconds", "Seconds of outage that the free space holds.", lambda: runtime.journal.storage_plan.outage_hours * 3600)
    gauge("clock_jumps", "Jumps of the wall clock since start.", lambda: runtime.clock.jumps)
    gauge("info", "1; the agent runs.", lambda: 1)
    for name, read, text in (
        ("readings_total", lambda: runtime.pipeline.readings_taken, "Readings taken in."),
        ("decisions_total", lambda: runtime.pipeline.decided, "Decisions made."),
        ("decisions_offline_total", lambda: runtime.pipeline.decided_offline, "Decisions made while no hub was reachable."),
        ("journal_commits_total", lambda: sum(lane.commits for lane in runtime.journal.lanes.values()), "Commits."),
        ("journal_failed_commits_total", lambda: sum(lane.failed_commits for lane in runtime.journal.lanes.values()), "Commits that failed and were tried again."),
        ("journal_dropped_records_total", lambda: _dropped(runtime), "Records dropped before the hub had them."),
        ("journal_refused_telemetry_total", lambda: runtime.journal.refused_telemetry, "Telemetry refused because the disk is full."),
        ("journal_undurable_effects_total", lambda: sum(lane.acted_undurable for lane in runtime.journal.lanes.values()), "Effects done although the journal could not be written."),
        ("rule_errors_total", lambda: sum(runtime.engine.errors.values()), "Conditions that could not be evaluated."),
        ("early_dropped_readings_total", lambda: runtime.registry.early_dropped, "Early readings dropped."),
    ):
        gauge(name, text, read)  # type: ignore[arg-type]
        metrics.describe(name, "counter", text)
    metrics.describe("detectors_refused_total", "counter", "Detectors whose kept state was damaged or unknown; they started anew.")
    gauge("detectors", "Detectors that learn.", lambda: len(runtime.engine.detectors))
    metrics.describe("device_rejected_messages_total", "counter", "Device messages refused, by reason.")
    metrics.describe("uplink_rejected_messages_total", "counter", "Hub messages refused, by reason.")


def _dropped(runtime: "EdgeRuntime") -> float:
    """Records that were lost before the hub had them: over a cap, or waiting for a disk that did not take them."""
    total = sum(marks.dropped for lane in runtime.journal.lanes.values() for marks in lane.marks.values())
    return total + sum(lane.dropped_waiting for lane in runtime.journal.lanes.values())
