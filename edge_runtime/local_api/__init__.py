"""The edge's own HTTP: health, readiness, metrics, /api/v1. Imported only where `api.enabled` is set."""
