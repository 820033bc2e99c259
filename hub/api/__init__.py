"""The hub's REST API under /api/v1, described by OpenAPI 3.1 from the same table that routes it."""
