"""Workloads that change their form: a running container that goes on as the same process in a micro-VM and comes back (`hot`), and an image that becomes a bootable disk and back (`cold`).

Loaded only where somebody converts.
"""
