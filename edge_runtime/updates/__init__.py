"""A device's own image: signed bundles into the slot that does not run, a switch that a power cut cannot spoil, a way back. See README.md."""
