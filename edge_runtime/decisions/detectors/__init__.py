"""Streaming detectors that learn on the device: anomalies, quality of values, time to threshold. Pure.

Nothing is imported before a rule asks: an edge whose rules have no detectors does not pay for them (0.9 MB).
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from .detector import Detector, DetectorStateError, Observation

__all__ = ["Detector", "DetectorStateError", "Observation"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(name)
    from . import detector

    return getattr(detector, name)
