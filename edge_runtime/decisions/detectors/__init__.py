"""Streaming detectors that learn on the device: anomalies, quality of values, time to threshold. Pure."""

from .detector import Detector, DetectorStateError, Observation

__all__ = ["Detector", "DetectorStateError", "Observation"]
