"""The journal: what the edge knows it has said. See ARCHITECTURE.md, "The journal"."""

from .journal import Journal, JournalSettings
from .planner import StoragePlan

__all__ = ["Journal", "JournalSettings", "StoragePlan"]
