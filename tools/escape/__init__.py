"""Attempts to get out of a workload, run inside of it: what each driver's boundary holds."""
