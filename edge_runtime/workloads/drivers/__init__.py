"""Drivers: each runs one kind of workload behind one face (`face`). Imported only where workloads are enabled."""
