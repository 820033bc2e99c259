"""Workloads in the hub: what was submitted, where it is placed, what became of it. `planner` decides (pure), `service` writes, answers and publishes."""
