"""Where things are on a device: names of partitions, folders and files. Pure."""

DATA = "/var/lib/novacron"
"""The data partition: journal and models in edge/, configuration in config/."""

ESP_NAME, DATA_NAME = "novacron-esp", "novacron-data"
"""Names of partitions, beside the two slots (`edge_runtime.updates.slots`). The initrd takes a slot by its name and its root hash, so that no other disk's slot is taken for it."""

SITE = "/usr/lib/python3/dist-packages"
"""Where Debian's Python looks for packages."""

START_CODE = "/usr/lib/novacron/start.code"
"""Byte code of the agent's start in one file (`edge_runtime.start_code`)."""

AGENT_UID = 990

PROVISIONED = ("ca.pem", "cert.pem", "key.pem", "api.token", "uplink.password", "bus.password", "report", "edge.yaml")
"""Files that a device takes over, edge.yaml last: where it is, the others are whole. `report`, whatever is in it, has each start told on the console."""

BROKER_FILES = ("broker.passwords", "broker.cert.pem", "broker.key.pem", "broker.acl")
"""Files that an image with a broker takes over besides: what lets devices in. The first three come together; without the last a device speaks for itself alone."""

REPART = "/usr/lib/novacron/repart.d"
"""What systemd-repart is told of the disk. Not where it looks by itself: in a start of ours it has nothing to do but for `grow`."""

UPDATE_KEYS = "/usr/lib/novacron/update-keys"
"""Public keys whose bundles a device takes; without one it takes none."""

TOLD = "/run/novacron-told"
"""What the scripts of a start say of what the device was given, for its agent to tell the hub (`edge_runtime.provisioned`). In memory: each start says its own."""
