"""Room for the migration engine: pages, deltas and streams. Imports nothing of ours. Nothing is here yet."""
