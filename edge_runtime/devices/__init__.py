"""Devices: the host itself and whatever speaks JSON on the local bus; who they are (registry) and how they are meant to be (twins)."""
