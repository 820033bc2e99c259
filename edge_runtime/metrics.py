"""Counters and gauges in the Prometheus text format. Kept small: the client library costs 14 MiB that an edge does not have.

Names follow the Prometheus conventions: prefix `novacron_edge_`, base units, `_total` for counters. No per-device labels: label
values come from the code, never from messages, so cardinality is bounded.
"""

from collections.abc import Callable

PREFIX = "novacron_edge_"
MAX_SERIES = 512
"""Series of one process; more is a bug (a label from outside), and is folded into the label value `other`."""


class Metrics:
    """Every number the agent shows. One instance per process, made in the composition root."""

    def __init__(self) -> None:
        self._help: dict[str, tuple[str, str]] = {}
        self._values: dict[tuple[str, str], float] = {}
        self._gauges: dict[str, Callable[[], float]] = {}

    def describe(self, name: str, kind: str, text: str) -> None:
        """Give a metric its type (`counter` or `gauge`) and its one-line meaning."""
        self._help[name] = (kind, text)

    def gauge(self, name: str, text: str, read: Callable[[], float]) -> None:
        """A gauge that is read when it is shown."""
        self.describe(name, "gauge", text)
        self._gauges[name] = read

    def inc(self, name: str, by: float = 1, **labels: str) -> None:
        """Add to a counter."""
        key = (name, _label_text(labels)) if labels else (name, "")
        if key not in self._values and len(self._values) >= MAX_SERIES:
            key = (name, '{reason="other"}')
        self._values[key] = self._values.get(key, 0) + by

    def set(self, name: str, value: float) -> None:
        """Set a gauge."""
        self._values[(name, "")] = value

    def value(self, name: str, **labels: str) -> float:
        """One series as it stands; 0 where nothing was counted yet."""
        return self._values.get((name, _label_text(labels)), 0)

    def total(self, name: str) -> float:
        """The sum over all label values of a metric."""
        return sum(value for (metric, _), value in self._values.items() if metric == name)

    def render(self) -> str:
        """The Prometheus text exposition (version 0.0.4)."""
        values: dict[str, list[str]] = {}
        for name, read in self._gauges.items():
            values[name] = [f"{PREFIX}{name} {read():.10g}"]
        for (name, labels), value in self._values.items():
            values.setdefault(name, []).append(f"{PREFIX}{name}{labels} {value:.16g}")
        lines: list[str] = []
        for name in sorted(set(values) | set(self._help)):
            kind, text = self._help.get(name, ("counter" if name.endswith("_total") else "gauge", name.replace("_", " ")))
            lines.append(f"# HELP {PREFIX}{name} {text}")
            lines.append(f"# TYPE {PREFIX}{name} {kind}")
            lines.extend(sorted(values.get(name, [f"{PREFIX}{name} 0"])))
        return "\n".join(lines) + "\n"


def _label_text(labels: dict[str, str]) -> str:
    if not labels:
        return ""
    inner = ",".join(f'{key}="{value}"' for key, value in sorted(labels.items()))
    return "{" + inner + "}"
