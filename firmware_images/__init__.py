"""Bootable images of the edge: built without root, loop devices or device-mapper, booted in QEMU."""
